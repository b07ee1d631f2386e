"""DPMSolverMultistepScheduler: DPM-Solver++(2M)."""

import functools

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ... import ops
from ...reference import work_dtype
from ...rows import make_rows
from ..stock import noising, promoted
from .common import PREDICTIONS, FusedScheduler, Generators, addable, alike, index_of


class DPMSolverMultistepScheduler(
    FusedScheduler, diffusers.DPMSolverMultistepScheduler, stock=diffusers.DPMSolverMultistepScheduler
):
    """diffusers.DPMSolverMultistepScheduler on the fused operations; see the package.

    Only DPM-Solver++(2M) is fused: algorithm_type "dpmsolver++", solver_order 2 and solver_type "midpoint", which are
    the defaults. Any other solver runs stock's step.

        x_s = sigma_s / sigma_t x_t + k (1 + w) x_0 - k w x_0',    x_0': the prediction of the step before

    Reference: Lu et al. 2022, arXiv:2211.01095, algorithm 2.
    """

    lower_order_nums: int

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """One step: x_0 from the prediction, then its sum with x_t and the x_0 of the step before in one pass."""
        config = self.config
        learned = config.prediction_type == "epsilon" and config.variance_type in ("learned", "learned_range")
        output = model_output[:, :3] if learned else model_output
        if (
            self.num_inference_steps is None
            or (config.algorithm_type, config.solver_order, config.solver_type) != ("dpmsolver++", 2, "midpoint")
            or config.prediction_type not in (*PREDICTIONS, "flow_prediction")
            or not alike(sample, output)
            or not self._fits_history(sample)
        ):
            return NotImplemented
        if self.step_index is None:
            self._init_step_index(timestep)
        i, n = self.step_index, len(self.timesteps)
        if i >= n:
            return NotImplemented  # stock's error
        last = i == n - 1 and (
            config.euler_at_final or (config.lower_order_final and n < 15) or config.final_sigmas_type == "zero"
        )
        second = self.lower_order_nums > 0 and not last
        sample, output = promoted(sample, output)
        x0_rows, rows = self._table(
            "steps", functools.partial(self._steps, sample.device), (self.sigmas,),
            sample.device, config.prediction_type, config.use_flow_sigmas,
        )  # fmt: skip
        x0 = output
        if config.prediction_type != "sample":
            x0 = ops.combine(sample, output, x0_rows, i)
        if config.thresholding:
            x0 = self._threshold_sample(x0)
        before = self.model_outputs[-1]
        self.model_outputs[0], self.model_outputs[1] = before, x0
        prev_sample = ops.combine(sample, x0, rows, 2 * i + second, z=before if second else None)
        self.lower_order_nums = min(self.lower_order_nums + 1, 2)
        self._step_index += 1
        if not return_dict:
            return (prev_sample,)
        return SchedulerOutput(prev_sample=prev_sample)

    def _fits_history(self, sample: Tensor) -> bool:
        """Whether the x_0 of the step before, if there is one, is shaped like the sample and beside it."""
        before = self.model_outputs[-1]
        return before is None or (before.shape == sample.shape and before.device == sample.device)

    def _steps(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows (n, 9) of x_0, and rows (2 n, 9) of the steps: of each step the first order, then the second."""
        alphas, sigmas = self._sigma_to_alpha_sigma_t(self.sigmas)
        if self.config.prediction_type == "flow_prediction":
            from_x, from_pred, scale = 1.0, -self.sigmas, 1.0
        elif self.config.prediction_type == "v_prediction":
            from_x, from_pred, scale = alphas, -sigmas, 1.0
        else:
            from_x, from_pred, scale = 1.0, -sigmas, 1 / alphas
        x0 = make_rows(alphas, torch.float32, x0_from_x=from_x, x0_from_pred=from_pred, from_x0=scale)
        lambdas = torch.log(alphas) - torch.log(sigmas)
        h = lambdas[1:] - lambdas[:-1]
        h_last = h.roll(1)  # row 0 is never of second order, so its number does not matter
        from_x = sigmas[1:] / sigmas[:-1]
        k = -(alphas[1:] * (torch.exp(-h) - 1.0))
        w = 0.5 * k * (1.0 / (h_last / h))
        first = make_rows(h, torch.float32, x0_from_pred=1.0, from_x0=k, from_x=from_x)
        # The column of noise takes the x_0 of the step before.
        second = make_rows(h, torch.float32, x0_from_pred=1.0, from_x0=k + w, from_x=from_x, noise=-w)
        return x0.to(device), torch.stack((first, second), 1).flatten(0, 1).to(device)

    def _init_step_index(self, timestep: int | Tensor) -> None:
        t = self._number(timestep) if self.begin_index is None else None
        if t is None:
            super()._init_step_index(timestep)
            return
        found = [i for i, s in enumerate(self._host_timesteps()) if s == t]
        # As index_for_timestep: the second of several, and the last step if there is none.
        self._step_index = found[min(len(found), 2) - 1] if found else len(self.timesteps) - 1

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x_0 + sigma noise at the timesteps' places in self.timesteps, or at the current step of a pipeline."""
        if not addable(original_samples, noise):
            return NotImplemented

        def build() -> Tensor:
            levels = self._sigma_to_alpha_sigma_t(self.sigmas.to(dtype))
            return torch.stack(levels, 1).to(device)

        device, dtype = original_samples.device, work_dtype(original_samples)
        table = self._table("levels", build, (self.sigmas,), device, dtype, self.config.use_flow_sigmas)
        if self.begin_index is None:
            # As index_for_timestep: the second of several, and the last step if there is none.
            hits = self.timesteps.to(device) == timesteps.to(device).reshape(-1, 1)
            count = hits.sum(1, keepdim=True)
            place = (hits & (hits.cumsum(1) == count.clamp(max=2))).int().argmax(1)
            index = torch.where(count[:, 0] > 0, place, len(self.timesteps) - 1)
        else:
            index = index_of(self.begin_index if self.step_index is None else self.step_index, device)
        return noising(original_samples, noise, index, table)
