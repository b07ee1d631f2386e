"""LCMScheduler: the multistep sampler of latent consistency models."""

import diffusers
import torch
from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput
from torch import Tensor

from ...rows import make_rows
from ..stock import promoted
from .common import LARGE, PREDICTIONS, Generators, LevelScheduler, alike, index_of, is_level, x0_from_level
from .sigmas import CountingScheduler, two_results


class LCMScheduler(CountingScheduler, LevelScheduler, diffusers.LCMScheduler, stock=diffusers.LCMScheduler):
    """diffusers.LCMScheduler on the fused operations; see the package.

        f   = c_skip x_t + c_out x_0
        x_s = sqrt(alpha_bar_s) f + sqrt(1 - alpha_bar_s) z

    Reference: Luo et al. 2023, arXiv:2310.04378, algorithm 3.
    """

    num_inference_steps: int

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> LCMSchedulerOutput | tuple[Tensor, ...]:
        """One step: x_0, its sum with x_t, and the noise in one pass; thresholding of x_0 is a pass before it."""
        config = self.config
        if self.num_inference_steps is None or config.prediction_type not in PREDICTIONS:
            return NotImplemented  # stock's error
        if not (is_level(timestep) and alike(sample, model_output)):
            return NotImplemented
        i = self._own_place(timestep)
        if i is None:
            return NotImplemented
        device, prediction = sample.device, config.prediction_type
        clip = config.clip_sample_range if config.clip_sample and not config.thresholding else None
        sample = promoted(sample, model_output)[0]
        if config.thresholding:
            model_output, prediction = self._x0(model_output, sample, index_of(timestep, device)), "sample"
        noise = {} if i == self.num_inference_steps - 1 else self._noise(sample, generator, i)
        rows = self._steps(device, prediction, clip is not None)
        prev_sample, denoised = two_results(sample, model_output, rows, i, (sample.dtype,) * 2, clip, **noise)
        self._step_index += 1
        if not return_dict:
            return (prev_sample, denoised)
        return LCMSchedulerOutput(prev_sample=prev_sample, denoised=denoised)

    def _steps(self, device: torch.device, prediction: str, clipped: bool) -> Tensor:
        """One row per step; x_0 comes from a prediction of this kind, and may be clipped."""

        def build() -> Tensor:
            t = self.timesteps.to(self.alphas_cumprod.device)
            before = torch.cat((t[1:], t[-1:]))
            alpha_bar, final = self.alphas_cumprod[t], self.final_alpha_cumprod.to(self.alphas_cumprod)
            alpha_bar_prev = torch.where(before >= 0, self.alphas_cumprod[before.clamp(min=0)], final)
            alpha, sigma, alpha_prev = alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), alpha_bar_prev.sqrt()
            last = torch.arange(len(t), device=t.device) == count - 1
            c_skip, c_out = self.get_scalings_for_boundary_condition_discrete(t)
            share = torch.where(last, 1.0, alpha_prev)
            from_x, from_pred, scale = x0_from_level(prediction, alpha, sigma)
            if clipped:  # then the bracket must be x_0 itself; else the fewer roundings, the better
                scale = scale.clamp(max=LARGE)  # at alpha = 0 the clip says x_0 by the sign
                from_x, from_pred, scale = from_x * scale, from_pred * scale, torch.ones_like(scale)
            return make_rows(
                alpha, torch.float32, x0_from_x=from_x, x0_from_pred=from_pred,
                from_x0=share * c_out * scale, from_x=share * c_skip, noise=(1 - alpha_bar_prev).sqrt(),
                kept_from_x0=c_out * scale, kept_from_x=c_skip,
            ).to(device)  # fmt: skip

        count = self.num_inference_steps
        sources = self.alphas_cumprod, self.final_alpha_cumprod, self.timesteps
        return self._table("steps", build, sources, device, prediction, clipped, count, self.config.timestep_scaling)
