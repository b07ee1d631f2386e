"""TCDScheduler: the sampler of trajectory consistency distillation."""

import diffusers
import torch
from diffusers.schedulers.scheduling_tcd import TCDSchedulerOutput
from torch import Tensor

from ...rows import make_rows
from ..stock import promoted
from .common import PREDICTIONS, Generators, LevelScheduler, alike, is_level
from .sigmas import CountingScheduler, two_results


class TCDScheduler(CountingScheduler, LevelScheduler, diffusers.TCDScheduler, stock=diffusers.TCDScheduler):
    """diffusers.TCDScheduler on the fused operations; see the package.

        x_r = alpha_r x_0 + sigma_r eps,    r = floor((1 - eta) s)
        x_s = alpha_s / alpha_r x_r + sqrt(1 - (alpha_s / alpha_r)^2) z

    Reference: Zheng et al. 2024, arXiv:2402.19159, algorithm 4.
    """

    num_inference_steps: int

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.3,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> TCDSchedulerOutput | tuple[Tensor, ...]:
        """One step: x_r, and its sum with the noise, in one pass."""
        if self.num_inference_steps is None or self.config.prediction_type not in PREDICTIONS or not 0 <= eta <= 1:
            return NotImplemented  # stock's error
        if not (is_level(timestep) and alike(sample, model_output)):
            return NotImplemented
        i = self._own_place(timestep)
        if i is None:
            return NotImplemented
        sample = promoted(sample, model_output)[0]
        noisy = eta > 0 and i != self.num_inference_steps - 1
        noise = self._noise(sample, generator, i) if noisy else {}
        rows = self._steps(sample.device, float(eta))
        prev_sample, noised = two_results(sample, model_output, rows, i, (sample.dtype,) * 2, **noise)
        self._step_index += 1
        if not return_dict:
            return (prev_sample, noised)
        return TCDSchedulerOutput(prev_sample=prev_sample, pred_noised_sample=noised)

    def _steps(self, device: torch.device, eta: float) -> Tensor:
        """One row per step; x_r is in the column of x_0."""
        prediction, count = self.config.prediction_type, self.num_inference_steps

        def build() -> Tensor:
            levels = self.alphas_cumprod.double()
            t = self.timesteps.to(levels.device)
            s = torch.cat((t[1:], torch.zeros_like(t[:1])))
            r = torch.floor((1 - eta) * s).long()
            alpha, sigma = levels[t].sqrt(), (1 - levels[t]).sqrt()
            alpha_r, sigma_r = levels[r].sqrt(), (1 - levels[r]).sqrt()
            noiseless = torch.arange(len(t), device=t.device) == count - 1
            left = torch.where(noiseless, 1.0, levels[s] / levels[r])
            one = torch.ones_like(alpha)
            # x_r = scale (from_x x + from_pred pred); where alpha = 0 the bracket is finite.
            from_x, from_pred, scale = {
                "epsilon": (one, sigma_r * alpha / alpha_r - sigma, alpha_r / alpha),
                "sample": (sigma_r / sigma, alpha_r - sigma_r * alpha / sigma, one),
                "v_prediction": (alpha_r * alpha + sigma_r * sigma, sigma_r * alpha - alpha_r * sigma, one),
            }[prediction]
            return make_rows(
                alpha, torch.float32, x0_from_x=from_x, x0_from_pred=from_pred, from_x0=left.sqrt() * scale,
                noise=(1 - left).sqrt(), kept_from_x0=scale,
            ).to(device)  # fmt: skip

        return self._table("steps", build, (self.alphas_cumprod, self.timesteps), device, prediction, eta, count)
