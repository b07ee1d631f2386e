"""KDPM2DiscreteScheduler: the midpoint rule on the probability-flow ODE, with two calls of the network a step."""

import diffusers
from diffusers.schedulers.scheduling_k_dpm_2_discrete import KDPM2DiscreteSchedulerOutput
from torch import Tensor

from .midpoint import MidpointScheduler


class KDPM2DiscreteScheduler(
    MidpointScheduler, diffusers.KDPM2DiscreteScheduler, stock=diffusers.KDPM2DiscreteScheduler
):
    """diffusers.KDPM2DiscreteScheduler on the fused operations; see the package.

        x_m = x_t + (sigma_m - sigma_t)/sigma_t (x_t - x_0),    sigma_m^2 = sigma_t sigma_s
        x_s = x_t + (sigma_s - sigma_t)/sigma_m (x_m - x_0'),    x_0': the prediction at x_m

    Reference: k-diffusion's sample_dpm_2; Karras et al. 2022, arXiv:2206.00364, algorithm 2.
    """

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> KDPM2DiscreteSchedulerOutput | tuple[Tensor, ...]:
        """Half a step: x_0 and its sum with x_t in one pass."""
        results = self._half(model_output, timestep, sample)
        if results is NotImplemented or not return_dict:
            return results
        prev_sample, x0 = results
        return KDPM2DiscreteSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)

    def _sources(self) -> tuple[Tensor, ...]:
        return self.sigmas, self.sigmas_interpol

    def _levels_of_steps(self) -> tuple[Tensor, Tensor, None]:
        return self.sigmas_interpol[1:], self.sigmas[1:], None
