"""CogVideoXDDIMScheduler: DDIM by the sample and the prediction of data."""

import diffusers
import torch
from diffusers.schedulers.scheduling_ddim_cogvideox import DDIMSchedulerOutput
from torch import Tensor

from ...rows import make_rows
from .common import PREDICTIONS, Generators, LevelScheduler, alike, index_of, is_level, x0_from_level
from .sigmas import result_types, two_results


class CogVideoXDDIMScheduler(LevelScheduler, diffusers.CogVideoXDDIMScheduler, stock=diffusers.CogVideoXDDIMScheduler):
    """diffusers.CogVideoXDDIMScheduler on the fused operations; see the package.

        x_s = r x_t + (sqrt(alpha_bar_s) - sqrt(alpha_bar_t) r) x_0,    r^2 = (1 - alpha_bar_s)/(1 - alpha_bar_t)

    Reference: Song et al. 2021, arXiv:2010.02502, eq. 12.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, ...]:
        """One step: x_0 and its sum with x_t in one pass. Like stock's it has no use for the arguments from eta on."""
        prediction = self.config.prediction_type
        if self.num_inference_steps is None or prediction not in PREDICTIONS:
            return NotImplemented  # stock's error
        if not (is_level(timestep) and alike(sample, model_output)):
            return NotImplemented
        rows, index = self._steps(sample.device), index_of(timestep, sample.device)
        dtypes = result_types(prediction, sample, model_output)
        prev_sample, x0 = two_results(sample, model_output, rows, index, dtypes)
        if not return_dict:
            return (prev_sample, x0)
        return DDIMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)

    def _steps(self, device: torch.device) -> Tensor:
        """One row per timestep."""
        stride, prediction = self.config.num_train_timesteps // self.num_inference_steps, self.config.prediction_type

        def build() -> Tensor:
            alpha_bar = self.alphas_cumprod
            previous = torch.arange(len(alpha_bar), device=alpha_bar.device) - stride
            final = self.final_alpha_cumprod.to(alpha_bar)
            alpha_bar_prev = torch.where(previous >= 0, alpha_bar[previous.clamp(min=0)], final)
            alpha, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
            from_x = ((1 - alpha_bar_prev) / (1 - alpha_bar)) ** 0.5
            from_x0 = alpha_bar_prev**0.5 - alpha * from_x
            a, b, c = x0_from_level(prediction, alpha, sigma)
            return make_rows(
                alpha, torch.float32, x0_from_x=a, x0_from_pred=b, from_x0=from_x0 * c, from_x=from_x, kept_from_x0=c
            ).to(device)

        return self._table("steps", build, (self.alphas_cumprod, self.final_alpha_cumprod), device, stride, prediction)
