"""CogVideoXDDIMScheduler: DDIM by the sample and the prediction of data."""

from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_ddim_cogvideox import DDIMSchedulerOutput
from torch import Tensor

from ...rows import make_rows
from .common import PREDICTIONS, Generators, LevelScheduler, alike, index_of, is_level
from .sigmas import two_results


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
        device, output, dtype = sample.device, model_output.dtype, sample.dtype
        if dtype != output:
            dtype = torch.promote_types(dtype, output)
        dtypes = dtype, output if prediction == "sample" else dtype
        rows = self._steps(device)
        prev_sample, x0 = two_results(sample, model_output, rows, index_of(timestep, device), dtypes)
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
            # (a, b, c) of x_0 = c (a x + b pred), where the bracket is rounded before c, as in stock.
            kinds: dict[str, tuple[Any, Any, Any]] = {
                "epsilon": (1.0, -sigma, 1 / alpha),
                "sample": (0.0, 1.0, 1.0),
                "v_prediction": (alpha, -sigma, 1.0),
            }
            a, b, c = kinds[prediction]
            return make_rows(
                alpha, torch.float32, x0_from_x=a, x0_from_pred=b, from_x0=from_x0 * c, from_x=from_x, kept_from_x0=c
            ).to(device)

        return self._table("steps", build, (self.alphas_cumprod, self.final_alpha_cumprod), device, stride, prediction)
