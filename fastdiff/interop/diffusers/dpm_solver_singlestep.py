"""DPMSolverSinglestepScheduler: DPM-Solver and DPM-Solver++ in steps of up to three calls of the network."""

import functools
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ... import ops
from ...rows import make_rows
from ..stock import promoted
from .common import PREDICTIONS, Generators, alike
from .multistep import MultistepScheduler


class DPMSolverSinglestepScheduler(
    MultistepScheduler, diffusers.DPMSolverSinglestepScheduler, stock=diffusers.DPMSolverSinglestepScheduler
):
    """diffusers.DPMSolverSinglestepScheduler on the fused operations; see the package.

    Every algorithm_type, solver_type and order. A step of second order of "dpmsolver++" by "midpoint" has two calls:

        x_m = sigma_m / sigma_t x_t + k_m x_0
        x_s = sigma_s / sigma_t x_t + k (1 - w) x_0 + k w x_0',    x_0': the prediction at x_m

    "dpmsolver" has eps in the place of x_0. "sde-dpmsolver++" adds noise: above the first order in a pass of its own.

    Reference: Lu et al. 2022, arXiv:2206.00927, algorithms 1 and 2, and arXiv:2211.01095, algorithm 1.
    """

    sample: Tensor | None  # x_t
    order_list: list[int]

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """One call's part of a step: x_0 or eps, and its sum with x_t and the ones before, in one pass."""
        config = self.config
        algorithm, prediction = config.algorithm_type, config.prediction_type
        of_noise, random = not algorithm.endswith("++"), algorithm.startswith("sde")
        learned = prediction == "epsilon" and config.variance_type in ("learned", "learned_range")
        output = model_output[:, :3] if learned else model_output
        if prediction not in (PREDICTIONS if of_noise else (*PREDICTIONS, "flow_prediction")):
            return NotImplemented  # stock's error
        if (of_noise and config.thresholding) or not self._takes(output, sample):
            return NotImplemented  # stock thresholds no eps
        i = self._place(timestep)
        if i >= len(self.order_list):
            return NotImplemented  # stock's error
        order = self.order_list[i]
        while order > 1 and self.model_outputs[1 - order] is None:
            order -= 1
        start = sample if order == 1 else self.sample
        if start is None or not alike(sample, start):
            return NotImplemented
        noise: dict[str, Any] = {}
        if random:
            noise = self._noise(output if prediction == "sample" else promoted(sample, output)[0], generator, i)
        x, output, begun, *_ = promoted(sample, output, start, *(self.model_outputs[1 - order :] if order > 1 else ()))
        if config.thresholding:
            output = self._thresholded(x, output, i, of_noise)
        rows, starts = self._table(
            "steps", functools.partial(self._steps, x.device, of_noise, random), (self.sigmas,),
            x.device, prediction, algorithm, config.solver_type, config.use_flow_sigmas, config.thresholding,
            len(self.model_outputs),
        )  # fmt: skip
        if order > 1:
            noise = {"noise": ops.update(begun, output, starts[order - 1], i, **noise) if random else begun}
        outputs = self.model_outputs
        prev_sample, kept = self._in_turn(x, output, rows[order - 1], i, outputs, len(outputs), **noise)
        outputs[:], self.sample = [*outputs[1:], kept], start
        self._step_index = i + 1
        if not return_dict:
            return (prev_sample,)
        return SchedulerOutput(prev_sample=prev_sample)

    def _steps(self, device: torch.device, of_noise: bool, random: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Rows of the steps by each order, and rows of x_t with noise.

        Above the first order the first take x_t in the column of noise: scaled and with noise already if `random`.
        """
        stock = diffusers.DPMSolverSinglestepScheduler
        rules = (
            stock.dpm_solver_first_order_update,
            stock.singlestep_dpm_solver_second_order_update,
            stock.singlestep_dpm_solver_third_order_update,
        )
        rows, starts = [], []
        for order, rule in enumerate(rules[: len(self.model_outputs)], 1):
            from_x, from_m, ages, noise = self._shares(rule, order, random)
            starts.append(make_rows(from_x, torch.float32, from_x=from_x, noise=noise))
            if order > 1:
                from_x, noise = torch.zeros_like(from_x), torch.ones_like(from_x) if random else from_x
            rows.append(self._rows_of(from_x, from_m, ages, noise, self.config.thresholding, of_noise))
        rows, starts = (list(torch.stack(tables).to(device).unbind()) for tables in (rows, starts))
        return rows, starts
