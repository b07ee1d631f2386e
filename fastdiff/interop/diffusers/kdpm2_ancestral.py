"""KDPM2AncestralDiscreteScheduler: a step of the midpoint rule to below the next level, and noise up to it."""

import diffusers
from diffusers.schedulers.scheduling_k_dpm_2_ancestral_discrete import KDPM2AncestralDiscreteSchedulerOutput
from torch import Tensor

from .common import Generators
from .midpoint import MidpointScheduler


class KDPM2AncestralDiscreteScheduler(
    MidpointScheduler, diffusers.KDPM2AncestralDiscreteScheduler, stock=diffusers.KDPM2AncestralDiscreteScheduler
):
    """diffusers.KDPM2AncestralDiscreteScheduler on the fused operations; see the package.

        up^2 = sigma_s^2 (sigma_t^2 - sigma_s^2)/sigma_t^2,    down^2 = sigma_s^2 - up^2,    sigma_m^2 = sigma_t down
        x_m  = x_t + (sigma_m - sigma_t)/sigma_t (x_t - x_0)
        x_s  = x_t + (down - sigma_t)/sigma_m (x_m - x_0') + up z,    x_0': the prediction at x_m

    The noise takes a pass of its own, in the second half.

    Reference: k-diffusion's sample_dpm_2_ancestral; Karras et al. 2022, arXiv:2206.00364, algorithm 2.
    """

    sigmas_up: Tensor
    sigmas_down: Tensor

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> KDPM2AncestralDiscreteSchedulerOutput | tuple[Tensor, ...]:
        """Half a step: x_0 and its sum with x_t in one pass, after one more for the noise of a second half."""
        results = self._half(model_output, timestep, sample, generator)
        if results is NotImplemented or not return_dict:
            return results
        prev_sample, x0 = results
        return KDPM2AncestralDiscreteSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)

    def _sources(self) -> tuple[Tensor, ...]:
        return self.sigmas, self.sigmas_interpol, self.sigmas_up, self.sigmas_down

    def _levels_of_steps(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.sigmas_interpol, self.sigmas_down, self.sigmas_up
