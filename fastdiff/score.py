"""Score-based models: the noise-conditional ladder (NCSN) and the score SDEs.

All learn the score s(x, t) = grad log p_t(x) by denoising: its best estimate is -E[eps | x_t] / sigma, so that DDPM's
networks are score models too, and samplers of one formulation run the models of another.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .ddpm import ChainDiffusion
from .diffusion import Diffusion
from .objective import target_rows, weights
from .ops.checks import check_choice, check_floating
from .process import SDES, Ladder, Process
from .progress import state_dtype
from .steps import denoise_rows


class NCSN(ChainDiffusion):
    """A noise-conditional score network (Song & Ermon 2019, arXiv:1907.05600): x_t = x_0 + sigma_t z over a geometric
    ladder of noise levels, trained by denoising score matching with the weight sigma^2, sampled by annealed Langevin
    dynamics.

    Args:
        model: called as model(x_t, sigma, **model_kwargs) with x_t (B, ...) and sigma (B,), float32 or float64 as the
            state; returns the prediction, shaped like x_t. A UNet with time_embedding_type "fourier" takes sigma, and
            divides its output by it, as a score wants.
        sigma_max, sigma_min, levels: sigma of level t = 1..levels is geometric from sigma_min to sigma_max.
        objective: "score" = -z / sigma, "eps" = z, or "x0".
        loss: "mse", "l1" or "huber".
        weighting: "simple" (sigma^2 on the error of the score, 1 on that of eps or x0), "min_snr" or "vlb".
        clip: the sampler keeps its estimate of x_0 in [-clip, clip]; None, as published, leaves it free.

    ValueError for an unknown name and unless 0 < sigma_min < sigma_max.
    """

    process: Ladder
    default_sampler = "annealed_langevin"

    def __init__(
        self,
        model: nn.Module,
        sigma_max: float = 1.0,
        sigma_min: float = 0.01,
        levels: int = 10,
        objective: str = "score",
        loss: str = "mse",
        weighting: str = "simple",
        clip: float | None = None,
    ) -> None:
        super().__init__(model, Ladder(sigma_max, sigma_min, levels), objective, loss, weighting, clip)
        self.sigma_max, self.sigma_min = sigma_max, sigma_min

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's options but the model, JSON-serialisable."""
        return {
            "sigma_max": self.sigma_max,
            "sigma_min": self.sigma_min,
            "levels": self.timesteps,
            "objective": self.objective,
            "loss": self.loss_kind,
            "weighting": self.weighting,
            "clip": self.clip,
        }

    def _condition(self, times: Tensor) -> Tensor:
        if times.is_floating_point() or self._dtype() == torch.float64:
            return super()._condition(times)
        # On the device, where `at` would wait for it.
        return self._rows("noising", times, torch.float32)[0][times.clamp(min=1), 1]


class ScoreSDE(Diffusion):
    """A score model of an SDE in continuous time (Song et al. 2021, arXiv:2011.13456).

    Args:
        model: called as model(x_t, c, **model_kwargs) with x_t (B, ...) and c (B,), float32 or float64 as the state:
            999 t for VP and sub-VP, sigma for VE; returns the prediction, shaped like x_t.
        sde: "vp", "subvp", "ve", or a fastdiff.process.Process. sde_options: of the named one, beta_min and beta_max,
            or sigma_min and sigma_max.
        objective: "score", "eps" = -sigma score, "x0" or "v".
        loss: "mse", "l1" or "huber".
        weighting: "simple" (sigma^2 on the error of the score), "likelihood" (g^2, which bounds the likelihood: Song et
            al. 2021, arXiv:2101.09258) or "min_snr".
        clip: the sampler keeps its estimate of x_0 in [-clip, clip]; None, as published, leaves it free.

    Times t are drawn uniformly from [sde.first, 1] in training. ValueError for an unknown name.
    """

    default_sampler = "euler_maruyama"

    def __init__(
        self,
        model: nn.Module,
        sde: str | Process = "vp",
        objective: str = "score",
        loss: str = "mse",
        weighting: str = "simple",
        clip: float | None = None,
        **sde_options: float,
    ) -> None:
        super().__init__(model, objective, loss, clip)
        check_choice("weighting", weighting, ("simple", "likelihood", "min_snr"))
        if isinstance(sde, Process):
            if sde_options:
                raise ValueError(f"{next(iter(sde_options))}: expected no options beside a process, got {sde_options}")
            self.process = sde
        else:
            check_choice("sde", sde, SDES)
            self.process = SDES[sde](**sde_options)
        self.sde = sde if isinstance(sde, str) else None
        self.sde_options = sde_options
        self.weighting = weighting

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's options but the model, JSON-serialisable. ValueError where the SDE has no name."""
        if self.sde is None:
            raise ValueError("config: expected an SDE given by name, got an object")
        return {
            "sde": self.sde,
            "objective": self.objective,
            "loss": self.loss_kind,
            "weighting": self.weighting,
            "clip": self.clip,
            **self.sde_options,
        }

    def q_sample(
        self,
        x0: Tensor,
        t: float | Tensor,
        *,
        seed: int | Tensor | None = None,
        noise: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """x_t = alpha(t) x_0 + sigma(t) z, z ~ N(0, I) (Song et al. 2021, eq. 29); t: times, a number, () or (B,)."""
        rows, row = self._rows("noising", self._times("x0", x0, t), x0.dtype)
        return ops.noising(x0, row, rows, seed=seed, noise=noise, out=out)

    def _rows(self, kind: str, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A row for each sample, in float64 until the last."""
        made = self.process.at(t.double())
        if kind == "noising":
            rows = torch.stack((made.alpha, made.sigma), 1)
        elif kind == "loss":
            rows = torch.stack((*target_rows(made, self.objective), weights(made, self.objective, self.weighting)), 1)
        else:
            rows = denoise_rows(made, self.objective)
        return rows.to(state_dtype(dtype)), torch.arange(len(t), device=t.device)

    def _times(self, name: str, x: Tensor, t: Any) -> Tensor:
        """(B,) float64 times for the data x; uniformly drawn from [first, last] if t is None."""
        check_floating(name, x)
        first, last = self.process.first, self.process.last
        if t is None:
            return first + (last - first) * torch.rand(x.shape[:1], dtype=torch.float64, device=x.device)
        if not isinstance(t, Tensor):
            if isinstance(t, bool) or not isinstance(t, int | float):
                raise TypeError(f"t: expected a number or a tensor, got {type(t).__name__}")
            if not 0 < t <= last or not math.isfinite(t):
                raise ValueError(f"t: expected times in (0, {last:g}], got {t}")
            return torch.full(x.shape[:1], t, dtype=torch.float64, device=x.device)
        if not t.is_floating_point() or t.device != x.device:
            raise TypeError(f"t: expected a floating tensor on {x.device}, got {t.dtype} on {t.device}")
        if t.ndim > 1 or (t.ndim == 1 and len(t) not in (1, len(x))):
            raise ValueError(f"t: expected shape () or ({len(x)},), got {tuple(t.shape)}")
        visible = t.device.type == "cpu" and not torch.compiler.is_compiling()
        if visible and not bool(((t > 0) & (t <= last)).all()):
            raise ValueError(f"t: expected times in (0, {last:g}], got {t}")
        return t.double().expand(len(x))
