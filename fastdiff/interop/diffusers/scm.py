"""SCMScheduler: the multistep sampler of continuous-time consistency models."""

import diffusers
import torch
from diffusers.schedulers.scheduling_scm import SCMSchedulerOutput
from torch import Tensor

from ...rows import make_rows
from .common import Generators, alike, typed
from .sigmas import CountingScheduler, in_float32, two_results


class SCMScheduler(CountingScheduler, diffusers.SCMScheduler, stock=diffusers.SCMScheduler):
    """diffusers.SCMScheduler on the fused operations; see the package.

        x_0 = cos(t) x_t - sin(t) F,    x_s = cos(s) x_0 + sin(s) sigma_data z

    Reference: Lu & Song 2024, arXiv:2410.11081, section 3.
    """

    num_inference_steps: int

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SCMSchedulerOutput | tuple[Tensor, ...]:
        """One step: x_0 and its sum with the noise in one pass."""
        if self.num_inference_steps is None or self.config.prediction_type != "trigflow":
            return NotImplemented  # stock's error
        if not alike(sample, model_output):
            return NotImplemented
        i, device = self._place(timestep), sample.device
        if i + 1 >= self.timesteps.shape[0]:  # len() of a tensor costs more
            return NotImplemented  # stock's error
        sigma_data = self.config.sigma_data
        rows = self._table("steps", lambda: self._steps(device, sigma_data), (self.timesteps,), device, sigma_data)
        # Stock's draw, whatever the type of the sample, from which the result has its type.
        noise = self._noise(typed(model_output, torch.get_default_dtype()), generator, i)
        dtype = sample.dtype
        if dtype != model_output.dtype:
            dtype = torch.promote_types(dtype, model_output.dtype)
        dtypes = torch.promote_types(dtype, torch.float32), dtype
        prev_sample, x0 = two_results(in_float32(sample), model_output, rows, i, dtypes, **noise)
        self._step_index += 1
        if not return_dict:
            return (prev_sample, x0)
        return SCMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)

    def _steps(self, device: torch.device, sigma_data: float) -> Tensor:
        """One row per step."""
        t, s = self.timesteps[:-1], self.timesteps[1:]
        return make_rows(
            t, torch.float32, x0_from_x=t.cos(), x0_from_pred=-t.sin(), from_x0=s.cos(),
            noise=s.sin() * sigma_data, kept_from_x0=1.0,
        ).to(device)  # fmt: skip
