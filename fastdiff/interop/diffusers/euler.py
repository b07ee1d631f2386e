"""EulerDiscreteScheduler: Euler's rule on the probability-flow ODE."""

import diffusers
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from torch import Tensor

from .common import Generators
from .sigmas import SAMPLE, ChurningScheduler


class EulerDiscreteScheduler(
    ChurningScheduler, diffusers.EulerDiscreteScheduler, stock=diffusers.EulerDiscreteScheduler
):
    """diffusers.EulerDiscreteScheduler on the fused operations; see the package.

        x_s = x_t + (sigma_s - sigma_t)/sigma_t (x_t - x_0)

    Reference: Karras et al. 2022, arXiv:2206.00364, algorithm 2 without its second half.
    """

    predictions = ("epsilon", "v_prediction", *SAMPLE)

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
    ) -> EulerDiscreteSchedulerOutput | tuple[Tensor, ...]:
        """One step: x_0 and its sum with x_t in one pass, after one more that churns."""
        results = self._euler(model_output, timestep, sample, (s_churn, s_tmin, s_tmax, s_noise), generator)
        if results is NotImplemented or not return_dict:
            return results
        prev_sample, x0 = results
        return EulerDiscreteSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)
