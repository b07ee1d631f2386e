"""FlowMatchHeunDiscreteScheduler: Heun's rule on the ODE of flow matching, with two calls of the network a step."""

import diffusers
import torch
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteSchedulerOutput
from torch import Tensor

from ... import ops
from ...rows import make_rows
from .common import Generators, addable, index_of
from .heun import HalfwayScheduler
from .sigmas import FlowScheduler, in_float32, two_results


class FlowMatchHeunDiscreteScheduler(
    HalfwayScheduler,
    FlowScheduler,
    diffusers.FlowMatchHeunDiscreteScheduler,
    stock=diffusers.FlowMatchHeunDiscreteScheduler,
):
    """diffusers.FlowMatchHeunDiscreteScheduler on the fused operations; see the package.

        x'  = x_t + (sigma_s - sigma_t) v
        x_s = x_t + (sigma_s - sigma_t) (v + v')/2,    v': the prediction at x'

    The first half of a step also leaves x_t + (sigma_s - sigma_t) v/2 to the second. Stock's step runs with s_churn.

    Reference: Karras et al. 2022, arXiv:2206.00364, algorithm 1; Lipman et al. 2023, arXiv:2210.02747.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> FlowMatchHeunDiscreteSchedulerOutput | tuple[Tensor, ...]:
        """Half a step in one pass."""
        if not (self._takes(model_output, timestep, sample) and self._goes_on(sample)):
            return self._hand_over()
        if s_churn:
            self._hand_over()
            return self._left_to_stock("s_churn")
        i, device, dtype = self._place(timestep), sample.device, model_output.dtype
        first, second, dts = self._table("steps", lambda: self._steps(device), (self.sigmas,), device)
        if i >= len(dts):
            return self._hand_over()  # stock's error, or NaN
        halfway = self._halfway
        if self.dt is None or halfway is None:
            x = in_float32(sample)
            prev_sample, self._halfway = two_results(x, model_output, first, i, (dtype, x.dtype))
            self.dt, self.sample = dts[i], x
        else:
            prev_sample = ops.update(halfway, model_output, second, i, noisy=False)
            prev_sample = prev_sample if prev_sample.dtype == dtype else prev_sample.to(dtype)
            self.dt = self.sample = self._halfway = None
        self._step_index += 1
        if not return_dict:
            return (prev_sample,)
        return FlowMatchHeunDiscreteSchedulerOutput(prev_sample=prev_sample)

    def scale_noise(  # type: ignore[override]  # stock has no default
        self, sample: Tensor, timestep: float | Tensor, noise: Tensor
    ) -> Tensor:
        """(1 - sigma) x_0 + sigma noise in one pass, at the step of a pipeline, or where it would start."""
        if not addable(sample, noise):
            return NotImplemented
        return self._noised_at(sample, noise, index_of(self._place(timestep), sample.device))

    def _steps(self, device: torch.device) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Rows (n, WIDE) of first halves, (n, WIDTH) of second halves by their own place, and dt of every step."""
        dt = self.sigmas.diff()
        first = make_rows(
            dt, torch.float32, x0_from_pred=1.0, from_x0=dt, from_x=1.0, kept_from_x0=dt / 2, kept_from_x=1.0
        )  # fmt: skip
        second = make_rows(dt, torch.float32, from_x=1.0, from_pred=dt.roll(1) / 2)
        return first.to(device), second.to(device), dt.unbind()
