"""EDMEulerScheduler: Euler's rule for networks with the preconditioning of EDM."""

import diffusers
from diffusers.schedulers.scheduling_edm_euler import EDMEulerSchedulerOutput
from torch import Tensor

from .common import Generators
from .sigmas import ChurningScheduler


class EDMEulerScheduler(ChurningScheduler, diffusers.EDMEulerScheduler, stock=diffusers.EDMEulerScheduler):
    """diffusers.EDMEulerScheduler on the fused operations; see the package.

        x_0 = c_skip x_t + c_out F,    x_s = x_t + (sigma_s - sigma_t)/sigma_t (x_t - x_0)

    Stock's step runs if pred_original_sample is given.

    Reference: Karras et al. 2022, arXiv:2206.00364, eq. 7 and algorithm 2 without its second half.
    """

    predictions = ("epsilon", "v_prediction")
    scale_model_input = diffusers.EDMEulerScheduler.scale_model_input  # by c_in

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
        pred_original_sample: Tensor | None = None,
    ) -> EDMEulerSchedulerOutput | tuple[Tensor, ...]:
        """One step: x_0 and its sum with x_t in one pass, after one more that churns."""
        if pred_original_sample is not None:
            return self._left_to_stock("pred_original_sample")
        results = self._euler(model_output, timestep, sample, (s_churn, s_tmin, s_tmax, s_noise), generator)
        if results is NotImplemented or not return_dict:
            return results
        prev_sample, x0 = results
        return EDMEulerSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)

    def _x0_columns(self, sigma: Tensor, sigma_hat: Tensor) -> tuple[Tensor | float, Tensor | float]:
        data, total = self.config.sigma_data, sigma_hat**2 + self.config.sigma_data**2
        sign = 1 if self.config.prediction_type == "epsilon" else -1
        return data**2 / total, sign * sigma_hat * data / total**0.5

    def _scale(self) -> float:
        return self.config.sigma_data
