"""Score-based models: the noise-conditional ladder (NCSN) and the score SDEs.

All learn the score s(x, t) = grad log p_t(x) by denoising. Its best estimate is -E[eps | x_t] / sigma, so DDPM's
networks are score models too, and samplers of one formulation run the models of another.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from .arguments import named
from .chain import ChainDiffusion
from .continuous import ContinuousDiffusion
from .objective import Weighting
from .ops.checks import check_choice
from .process import KARRAS_RANGE, SDES, VE, Ladder, Process


class NCSN(ChainDiffusion):
    """A noise-conditional score network (Song & Ermon 2019, arXiv:1907.05600).

    x_t = x_0 + sigma_t z over a geometric ladder of noise levels. It is trained by denoising score matching with the
    weight sigma^2, and sampled by annealed Langevin dynamics.

    Args:
        model: called as model(x_t, sigma, **model_kwargs) with x_t (B, ...) and sigma (B,), float32 or float64 as the
            state; returns the prediction, shaped like x_t. A UNet with time_embedding_type "fourier" takes sigma, and
            divides its output by it, as a score wants.
        sigma_max, sigma_min, levels: sigma of level t = 1..levels is geometric from sigma_min to sigma_max.
        objective: "score" = -z / sigma, "eps" = z, or "x0".
        loss: "mse", "l1" or "huber".
        weighting: "simple" (sigma^2 on the error of the score, 1 on that of eps or x0), "min_snr" or "vlb".
        clip: the sampler keeps its estimate of x_0 in [-clip, clip]; None, as published, leaves it free.

    `sample` takes annealed Langevin dynamics, 100 steps at each level, unless it is told otherwise.

    Raises: ValueError for an unknown name, and unless 0 < sigma_min < sigma_max.

    >>> ncsn = NCSN(UNet(sample_size=32, time_embedding_type="fourier"), sigma_max=50.0, levels=200)
    >>> ncsn(torch.rand(8, 3, 32, 32) * 2 - 1).backward()
    >>> ncsn.sample(16, steps=10)
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
        weighting: str | Weighting = "simple",
        clip: float | None = None,
    ) -> None:
        with _disable_current_modes():  # the levels have values, also where fake weights have none
            super().__init__(model, Ladder(sigma_max, sigma_min, levels), objective, loss, weighting, clip)

    def apply_options(self) -> None:
        super().apply_options()
        if not isinstance(self.process, Ladder):
            raise TypeError(f"process: expected a Ladder, got {type(self.process).__name__}")

    @property
    def sigma_max(self) -> float:
        """sigma of level T."""
        return self.process.sigma_max

    @property
    def sigma_min(self) -> float:
        """sigma of level 1."""
        return self.process.sigma_min

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's options but the model, JSON-serialisable."""
        return {
            "sigma_max": self.sigma_max,
            "sigma_min": self.sigma_min,
            "levels": self.timesteps,
            "objective": self.objective,
            "loss": self.loss_kind,
            "weighting": named("weighting", self.weighting),
            "clip": self.clip,
        }

    def condition(self, times: Tensor) -> Tensor:
        if times.is_floating_point() or self.dtype == torch.float64:
            return super().condition(times)
        # On the device, where `at` would wait for it.
        return self.noising_rows(times, torch.float32)[0][times.clamp(min=1), 1]


class ScoreSDE(ContinuousDiffusion):
    """A score model of an SDE in continuous time (Song et al. 2021, arXiv:2011.13456).

    Args:
        model: called as model(x_t, c, **model_kwargs) with x_t (B, ...) and c (B,), float32 or float64 as the state:
            999 t for VP and sub-VP, sigma for VE; returns the prediction, shaped like x_t.
        sde: "vp", "subvp", "ve", or a fastdiff.process.Process.
        objective: "score", "eps" = -sigma score, "x0" or "v".
        loss: "mse", "l1" or "huber".
        weighting: "simple" (sigma^2 on the error of the score), "likelihood" (g^2, which bounds the likelihood: Song et
            al. 2021, arXiv:2101.09258) or "min_snr".
        clip: the sampler keeps its estimate of x_0 in [-clip, clip]; None, as published, leaves it free.
        sde_options: of the named SDE: beta_min and beta_max of "vp" and "subvp", sigma_min and sigma_max of "ve".

    Training draws times t uniformly from [process.first, 1]. `sample` takes Euler-Maruyama in 1000 steps unless it is
    told otherwise.

    Raises: ValueError for an unknown name; TypeError for an option of another SDE.

    >>> sde = ScoreSDE(UNet(sample_size=32), "vp")
    >>> sde(torch.rand(8, 3, 32, 32) * 2 - 1).backward()
    >>> sde.sample(16, sampler="heun", steps=18)
    """

    default_sampler = "euler_maruyama"
    weightings = ("simple", "likelihood", "min_snr")

    def __init__(
        self,
        model: nn.Module,
        sde: str | Process = "vp",
        objective: str = "score",
        loss: str = "mse",
        weighting: str | Weighting = "simple",
        clip: float | None = None,
        **sde_options: float,
    ) -> None:
        if isinstance(sde, Process):
            if sde_options:
                raise ValueError(f"{next(iter(sde_options))}: expected no options beside a process, got {sde_options}")
            process = sde
        else:
            check_choice("sde", sde, SDES)
            known = inspect.signature(SDES[sde]).parameters
            for name in sde_options:
                if name not in known:
                    raise TypeError(f"{name}: expected options of {sde!r}, {' and '.join(known)}, got another")
            process = SDES[sde](**sde_options)
        super().__init__(model, process, objective, loss, weighting, clip)
        self._named = (sde, sde_options, process) if isinstance(sde, str) else None

    @classmethod
    def from_edm(
        cls, denoiser: Callable[..., Tensor], sigma_min: float = KARRAS_RANGE[0], sigma_max: float = KARRAS_RANGE[1]
    ) -> "ScoreSDE":
        """A denoiser D(x, sigma) of EDM or k-diffusion, x = x_0 + sigma eps, for every sampler of this library.

        Args:
            denoiser: called as denoiser(x, sigma, **model_kwargs) with sigma (B,); a module or a function. It returns
                the estimate of x_0.
            sigma_min, sigma_max: the range of sigma.

        Raises: TypeError or ValueError, naming the argument.
        Reference: Karras et al. 2022, arXiv:2206.00364, eq. 3.
        """
        if not callable(denoiser):
            raise TypeError(f"denoiser: expected a module or a function, got {type(denoiser).__name__}")
        model = denoiser if isinstance(denoiser, nn.Module) else _Function(denoiser)
        return cls(model, VE(sigma_min, sigma_max), objective="x0")

    @property
    def sde(self) -> str | None:
        """The name of the SDE; None if the process was given."""
        return self._named[0] if self._named is not None and self._named[2] is self.process else None

    @property
    def sde_options(self) -> dict[str, float]:
        """The options of the named SDE."""
        return {} if self._named is None or self.sde is None else self._named[1]

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's options but the model, JSON-serialisable. ValueError if the SDE has no name."""
        if self.sde is None:
            raise ValueError("config: expected an SDE given by name, got an object")
        return {
            "sde": self.sde,
            "objective": self.objective,
            "loss": self.loss_kind,
            "weighting": named("weighting", self.weighting),
            "clip": self.clip,
            **self.sde_options,
        }


class _Function(nn.Module):
    """A function as a module without weights."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.function(*args, **kwargs)
