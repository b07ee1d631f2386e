"""EulerAncestralDiscreteScheduler: a step of Euler's rule to below the next level, and noise up to it."""

import diffusers
import torch
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteSchedulerOutput
from torch import Tensor

from .common import Generators
from .sigmas import VarianceExplodingScheduler, derivative_rows, two_results, x0_from_sigma


class EulerAncestralDiscreteScheduler(
    VarianceExplodingScheduler,
    diffusers.EulerAncestralDiscreteScheduler,
    stock=diffusers.EulerAncestralDiscreteScheduler,
):
    """diffusers.EulerAncestralDiscreteScheduler on the fused operations; see the package.

        up^2 = sigma_s^2 (sigma_t^2 - sigma_s^2)/sigma_t^2,    down^2 = sigma_s^2 - up^2
        x_s  = x_t + (down - sigma_t)/sigma_t (x_t - x_0) + up z

    Reference: k-diffusion's sample_euler_ancestral; the variance is that of Ho et al. 2020, arXiv:2006.11239, eq. 7.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> EulerAncestralDiscreteSchedulerOutput | tuple[Tensor, ...]:
        """One step: x_0, its sum with x_t and the noise in one pass."""
        prediction = self.config.prediction_type
        if not self._takes(model_output, timestep, sample) or prediction not in ("epsilon", "v_prediction"):
            return NotImplemented
        self._remind_of_scaling()
        i = self._place(timestep)
        if i + 1 >= self.sigmas.shape[0]:  # len() of a tensor costs more
            return NotImplemented  # stock's error

        def build() -> Tensor:
            sigma, to = self.sigmas[:-1], self.sigmas[1:]
            up = (to**2 * (sigma**2 - to**2) / sigma**2) ** 0.5
            share = ((to**2 - up**2) ** 0.5 - sigma).double() / sigma
            a, b = x0_from_sigma(prediction, sigma.double(), sigma.double())
            return derivative_rows(a, b, share, noise=up, kept_from_x0=1.0).to(device)

        device = sample.device
        rows = self._table("steps", build, (self.sigmas,), device, prediction)
        noise, dtype = self._noise(model_output, generator, i), model_output.dtype
        dtypes = dtype, torch.promote_types(dtype, torch.float32)
        prev_sample, x0 = two_results(sample, model_output, rows, i, dtypes, **noise)
        self._step_index += 1
        if not return_dict:
            return (prev_sample, x0)
        return EulerAncestralDiscreteSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)
