"""DDIMScheduler: DDIM, deterministic or with part of the ancestral noise."""

from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

from ... import ops
from ...rows import make_rows
from ..stock import promoted
from .common import PREDICTIONS, Generators, LevelScheduler, alike, index_of, is_level


class DDIMScheduler(LevelScheduler, diffusers.DDIMScheduler, stock=diffusers.DDIMScheduler):
    """diffusers.DDIMScheduler on the fused operations; see the package.

        x_s = sqrt(alpha_bar_s) x_0 + sqrt(1 - alpha_bar_s - std^2) eps + std z

    Reference: Song et al. 2021, arXiv:2010.02502, eq. 12 and 16.
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
        """One step: x_0 and eps from the prediction, then their sum with the noise in one pass."""
        prediction = self.config.prediction_type
        given = variance_noise if eta > 0 else None
        tensors = (sample, model_output) if given is None else (sample, model_output, given)
        both = given is not None and generator is not None
        if self.num_inference_steps is None or prediction not in PREDICTIONS or both:
            return NotImplemented  # stock's error
        if not (is_level(timestep) and alike(*tensors)):
            return NotImplemented
        index = index_of(timestep, sample.device)
        noise: dict[str, Any] = {"noisy": False}
        if given is not None:
            noise = {"noise": given}
        elif eta > 0:
            noise = self._noise(model_output, generator, index)
        sample, model_output = promoted(sample, model_output)
        x0 = self._x0(model_output, sample, index)
        if use_clipped_model_output or prediction == "sample":
            clean = x0 if use_clipped_model_output else model_output
            eps = self._ratio("eps of x0", lambda a, s: (1.0, -a, s), sample, clean, index)
        elif prediction == "v_prediction":
            eps = self._ratio("eps of v", lambda a, s: (s, a, 1.0), sample, model_output, index)
        else:
            eps = model_output
        prev_sample = ops.update(eps, x0, self._steps(sample.device, float(eta)), index, **noise)
        if not return_dict:
            return (prev_sample, x0)
        return DDIMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)

    def _steps(self, device: torch.device, eta: float) -> Tensor:
        """One row per timestep, applied to eps as x and to x_0 as the prediction."""
        stride = self.config.num_train_timesteps // self.num_inference_steps

        def build() -> Tensor:
            alpha_bar = self.alphas_cumprod
            previous = torch.arange(len(alpha_bar), device=alpha_bar.device) - stride
            final = self.final_alpha_cumprod.to(alpha_bar)
            alpha_bar_prev = torch.where(previous >= 0, alpha_bar[previous.clamp(min=0)], final)
            beta_bar, beta_bar_prev = 1 - alpha_bar, 1 - alpha_bar_prev
            variance = (beta_bar_prev / beta_bar) * (1 - alpha_bar / alpha_bar_prev)
            std = eta * variance**0.5
            from_eps = (1 - alpha_bar_prev - std**2) ** 0.5
            return make_rows(
                alpha_bar, torch.float32, x0_from_pred=1.0, from_x0=alpha_bar_prev**0.5, from_x=from_eps, noise=std
            ).to(device)

        return self._table("steps", build, (self.alphas_cumprod, self.final_alpha_cumprod), device, stride, eta)
