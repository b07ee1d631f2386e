"""DDIMInverseScheduler: deterministic DDIM from data to noise."""

import diffusers
import torch
from diffusers.schedulers.scheduling_ddim_inverse import DDIMSchedulerOutput
from torch import Tensor

from ... import ops
from ...rows import make_rows
from ..stock import promoted
from .common import PREDICTIONS, FusedScheduler, alike, index_of, is_level, x0_from_level


class DDIMInverseScheduler(FusedScheduler, diffusers.DDIMInverseScheduler, stock=diffusers.DDIMInverseScheduler):
    """diffusers.DDIMInverseScheduler on the fused operations; see the package.

        x_s = sqrt(alpha_bar_s) x_0 + sqrt(1 - alpha_bar_s) eps,    s > t

    Reference: Song et al. 2021, arXiv:2010.02502, section 4.3.
    """

    alphas_cumprod: Tensor
    initial_alpha_cumprod: Tensor

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> DDIMSchedulerOutput | tuple[Tensor, ...]:
        """One step: x_0 from the prediction, then its sum with eps in one pass. `timestep` is s."""
        config = self.config
        if self.num_inference_steps is None or config.prediction_type not in PREDICTIONS:
            return NotImplemented  # stock's error
        if not (is_level(timestep) and alike(sample, model_output)):
            return NotImplemented
        index = index_of(timestep, sample.device)
        sample, output = promoted(sample, model_output)
        x0_rows, rows = self._steps(sample.device)
        x0 = output if config.prediction_type == "sample" else ops.combine(sample, output, x0_rows, index)
        if config.clip_sample:
            x0 = x0.clamp(-config.clip_sample_range, config.clip_sample_range)
        prev_sample = ops.combine(sample, output, rows, index, z=x0)
        if not return_dict:
            return (prev_sample, x0)
        return DDIMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)

    def _steps(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows by timestep s: of x_0, and of x_s, whose column of noise takes x_0."""
        prediction = self.config.prediction_type
        last = self.config.num_train_timesteps - 1
        stride = (last + 1) // self.num_inference_steps

        def build() -> tuple[Tensor, Tensor]:
            to = self.alphas_cumprod
            before = (torch.arange(len(to), device=to.device) - stride).clamp(max=last)
            alpha_bar = torch.where(before >= 0, to[before.clamp(min=0)], self.initial_alpha_cumprod.to(to))
            alpha, sigma, direction = alpha_bar**0.5, (1 - alpha_bar) ** 0.5, (1 - to) ** 0.5
            one = torch.ones_like(alpha)
            # (a, b, c) of c (a x + b pred), where the bracket is rounded before c, as in stock.
            of_eps = {
                "epsilon": (0 * one, one, direction),
                "sample": (one, -alpha, direction / sigma),
                "v_prediction": (sigma, alpha, direction),
            }[prediction]
            of_x0 = x0_from_level(prediction, alpha, sigma)
            x0_rows, rows = (
                make_rows(to, torch.float32, x0_from_x=a, x0_from_pred=b, from_x0=c, noise=noise)
                for (a, b, c), noise in ((of_x0, 0.0), (of_eps, to**0.5))
            )
            return x0_rows.to(device), rows.to(device)

        found: tuple[Tensor, Tensor] = self._table(
            "steps", build, (self.alphas_cumprod, self.initial_alpha_cumprod), device, stride, last, prediction
        )
        return found
