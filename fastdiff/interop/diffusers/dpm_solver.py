"""DPM-Solver and DPM-Solver++ of orders 1 to 3, of the ODE and of the SDE: the step of three schedulers, and one."""

import functools
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ..stock import promoted
from .common import PREDICTIONS, Generators, alike, typed
from .multistep import MultistepScheduler


class DPMSolver(MultistepScheduler):
    """A multistep scheduler of DPM-Solver; see `DPMSolverMultistepScheduler`."""

    _predictions: tuple[str, ...] = (*PREDICTIONS, "flow_prediction")  # those that stock does not refuse
    _third_of_sde: tuple[str, ...] = ()  # the algorithms of the SDE that stock has a third order of
    _draws_float32 = False  # whether stock draws noise so whatever the type of the model's output

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """One step: x_0 or eps from the prediction, and its sum with x_t, the ones before and noise, in one pass."""
        config = self.config
        algorithm, prediction = config.algorithm_type, config.prediction_type
        of_noise, random = not algorithm.endswith("++"), algorithm.startswith("sde")
        learned = prediction == "epsilon" and config.get("variance_type") in ("learned", "learned_range")
        output = model_output[:, :3] if learned else model_output
        if prediction not in self._predictions or (of_noise and prediction == "flow_prediction"):
            return NotImplemented  # stock's error
        if random and config.solver_order == 3 and algorithm not in self._third_of_sde:
            return NotImplemented  # stock's error
        if not self._takes(output, sample):
            return NotImplemented
        if random and variance_noise is not None and not alike(sample, variance_noise):
            return NotImplemented
        i, n = self._place(timestep), len(self.timesteps)
        if i >= n:
            return NotImplemented  # stock's error
        few = config.lower_order_final and n < 15
        order = min(config.solver_order, self.lower_order_nums + 1)
        if i == n - 1 and (config.euler_at_final or few or config.get("final_sigmas_type") == "zero"):
            order = 1
        elif i == n - 2 and few:
            order = min(order, 2)
        said = output.dtype
        sample, output = promoted(sample, output)
        noise: dict[str, Any] = {}
        if random and variance_noise is not None:
            noise = {"noise": variance_noise.to(torch.float32)}
        elif random:
            drawn = said if prediction == ("epsilon" if of_noise else "sample") else output.dtype
            like = typed(output, torch.float32 if self._draws_float32 else drawn)
            noise = self._noise(like, generator, i)
        if config.thresholding:
            output = self._thresholded(sample, output, i, of_noise)
        rows = self._table(
            "steps", functools.partial(self._steps, sample.device, of_noise, random), (self.sigmas,),
            sample.device, algorithm, config.solver_type, config.thresholding, len(self.model_outputs),
            *self._levels_key(),
        )  # fmt: skip
        prev_sample = self._step_with(sample, output, rows[order - 1], i, **noise)
        if not return_dict:
            return (prev_sample,)
        return SchedulerOutput(prev_sample=prev_sample)

    def _steps(self, device: torch.device, of_noise: bool, random: bool) -> list[Tensor]:
        """Rows of the steps by each order."""
        stock: Any = self.stock
        rules = (
            stock.dpm_solver_first_order_update,
            stock.multistep_dpm_solver_second_order_update,
            stock.multistep_dpm_solver_third_order_update,
        )
        return self._rows_by_order(rules, device, of_noise, random)


class DPMSolverMultistepScheduler(
    DPMSolver, diffusers.DPMSolverMultistepScheduler, stock=diffusers.DPMSolverMultistepScheduler
):
    """diffusers.DPMSolverMultistepScheduler on the fused operations; see the package.

    Every algorithm_type, solver_type and order. A step of second order of "dpmsolver++" by "midpoint":

        x_s = sigma_s / sigma_t x_t + k (1 + w) x_0 - k w x_0',    x_0': the prediction of the step before

    "dpmsolver" has eps in the place of x_0, and "sde-" adds noise.

    Reference: Lu et al. 2022, arXiv:2206.00927 and arXiv:2211.01095, algorithm 2.
    """

    _third_of_sde = ("sde-dpmsolver++",)
    _draws_float32 = True
