"""DDPMScheduler: the ancestral sampler."""

from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor

from ... import ops
from ...rows import LOG_ZERO, make_rows
from ..stock import promoted
from .common import PREDICTIONS, Generators, LevelScheduler, alike, index_of, is_level, normal

LEARNED = ("learned", "learned_range")


class DDPMScheduler(LevelScheduler, diffusers.DDPMScheduler, stock=diffusers.DDPMScheduler):
    """diffusers.DDPMScheduler on the fused operations; see the package.

        x_{t-1} = from_x0 x_0 + from_x x_t + noise z

    Reference: Ho et al. 2020, arXiv:2006.11239, eq. 6 and 7.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, ...]:
        """One step of the ancestral sampler: x_0 from the prediction, then the mean and the noise in one pass."""
        kind = self.config.variance_type
        raw = None
        if model_output.shape[1] == sample.shape[1] * 2 and self.variance_type in LEARNED:
            model_output, raw = model_output.split(sample.shape[1], dim=1)
        if not (self.config.prediction_type in PREDICTIONS and is_level(timestep) and alike(sample, model_output)):
            return NotImplemented
        t = self._number(timestep)
        known = t is not None and not torch.compiler.is_compiling()
        if known and self._respaced() and t not in self._host_timesteps():
            raise ValueError(f"timestep: expected one of self.timesteps, got {t}")
        noisy = t is None or t > 0
        if noisy and kind in LEARNED and raw is None:
            raise TypeError(
                f"model_output: expected {2 * sample.shape[1]} channels for variance_type {kind!r}, "
                f"got {model_output.shape[1]}"
            )
        index = index_of(timestep, sample.device)
        noise: dict[str, Any] = self._noise(model_output, generator, index) if noisy else {"noisy": False}
        if noisy and kind == "learned_range":
            noise["raw_variance"] = raw
        elif noisy and kind == "learned":
            z = noise["noise"] if "noise" in noise else normal(model_output, noise["seed"], index)
            noise = {"noise": raw**0.5 * z}  # type: ignore[operator]
        sample, model_output = promoted(sample, model_output)
        x0 = self._x0(model_output, sample, index)
        prev_sample = ops.update(sample, x0, self._steps(sample.device), index, **noise)
        if not return_dict:
            return (prev_sample, x0)
        return DDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)

    def _respaced(self) -> bool:
        return bool(self.custom_timesteps or self.num_inference_steps)

    def _steps(self, device: torch.device) -> Tensor:
        """One row per timestep; NaN at those that are not in self.timesteps."""
        respaced = self._respaced()
        kind, form = self.config.variance_type, self.variance_type

        def build() -> Tensor:
            levels = self.alphas_cumprod
            if respaced:
                t = self.timesteps.to(levels.device)
                previous = torch.cat((t[1:], t.new_full((1,), -1)))
            else:
                t = torch.arange(len(levels), device=levels.device)
                previous = t - 1
            before = torch.where(previous >= 0, levels[previous.clamp(min=0)], self.one.to(levels))
            rows = ancestral_rows(levels[t], before, t == 0, kind, form)
            if respaced:
                # If a timestep occurs twice, stock goes by the first.
                table = rows.new_full((len(levels), rows.shape[1]), torch.nan)
                rows = table.index_put((t.flip(0),), rows.flip(0))
            return rows.to(device)

        sources = (self.alphas_cumprod, self.timesteps, self.one)
        return self._table("steps", build, sources, device, respaced, kind, form)


def ancestral_rows(alpha_bar: Tensor, alpha_bar_prev: Tensor, last: Tensor, kind: str, form: str) -> Tensor:
    """Rows of the steps from alpha_bar (n,) to alpha_bar_prev (n,), with no noise where `last` (n,).

    The operations of stock's step and _get_variance, in their order. Stock reads the variance's kind from its
    configuration, and the form of what _get_variance returns from its attribute.
    """
    beta_bar, beta_bar_prev = 1 - alpha_bar, 1 - alpha_bar_prev
    alpha = alpha_bar / alpha_bar_prev
    beta = 1 - alpha
    from_x0 = alpha_bar_prev**0.5 * beta / beta_bar
    from_x = alpha**0.5 * beta_bar_prev / beta_bar
    small = torch.clamp((1 - alpha_bar_prev) / (1 - alpha_bar) * beta, min=1e-20)
    high: Tensor | float = 0.0
    if kind == "learned_range":  # the logarithms of both ends
        noise, high = (torch.where(last, LOG_ZERO, 0.5 * v.log()) for v in (small, beta))
    else:
        if kind == "learned":
            noise = torch.ones_like(beta)
        elif kind == "fixed_small_log":
            noise = torch.exp(0.5 * torch.log(small))
        else:
            noise = beta if kind in ("fixed_large", "fixed_large_log") else small
        if form != "fixed_small_log" and kind != "learned":
            noise = noise**0.5
        noise = torch.where(last, 0.0, noise)
    return make_rows(
        alpha_bar, torch.float32, x0_from_pred=1.0, from_x0=from_x0, from_x=from_x, noise=noise, noise_high=high
    )
