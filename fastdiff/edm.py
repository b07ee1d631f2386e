"""EDM: a denoiser D(x; sigma) = c_skip x + c_out F(c_in x; ln(sigma) / 4) around a network F (Karras et al. 2022,
arXiv:2206.00364).

In EDM x = x_0 + sigma eps. Here the state is what the network sees, c_in x, with c_in = 1 / sqrt(sigma^2 +
sigma_data^2). So the levels are alpha = c_in and alpha sigma, nothing is scaled on the way to the network, and F is
objective "edm". Level 0 is data as it is.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import named
from .continuous import ContinuousDiffusion
from .objective import Weighting
from .process import KARRAS_RANGE, Grid, Process
from .schedule import NoiseSchedule
from .support.scalars import as_number, as_positive
from .support.settable import settable


class Preconditioned(Process):
    """Times are EDM's sigma, r: alpha = c_in, sigma = r c_in, f = -r / n, g^2 = 2 r / n with n = r^2 + sigma_data^2 =
    1 / c_in^2. The model sees ln(r) / 4.

    Args:
        sigma_data: the standard deviation of the data.

    Reference: Karras et al. 2022, table 1, for s(t) = c_in and sigma(t) = t in eq. 2.
    """

    first, last = KARRAS_RANGE
    default_steps = 18

    def __init__(self, sigma_data: float = 0.5) -> None:
        self.sigma_data = as_positive("sigma_data", sigma_data)

    @property
    def first_scale(self) -> float:  # type: ignore[override]
        """c_in at `first`."""
        return 1 / math.hypot(self.first, self.sigma_data)

    def at(self, times: Tensor) -> NoiseSchedule:
        r = times.double()
        n = r**2 + self.sigma_data**2
        return NoiseSchedule(-n.log() / 2, r / n.sqrt(), False, r, -r / n, 2 * r / n, self.sigma_data)

    def condition(self, times: Tensor) -> Tensor:
        return times.log() / 4

    def time_of(self, ratio: Tensor) -> Tensor:
        return ratio

    def noisiness(self, times: Tensor) -> Tensor:
        """The noise in the state: sigma c_in. Nearly all sigma in use are a tiny share of the largest."""
        return self.at(times).sigma

    def grid(self, steps: int | Iterable[float] | None) -> Grid:
        """As Process.grid, but a number of steps is a number of Karras' levels."""
        return super().grid(steps) if isinstance(steps, Iterable) else self.karras(steps)


class Edm(ContinuousDiffusion):
    """A preconditioned denoising model (Karras et al. 2022, arXiv:2206.00364).

    Args:
        model: F, called as model(c_in x, ln(sigma) / 4, **model_kwargs) with c_in x (B, ...) and ln(sigma) / 4 (B,),
            float32 or float64 as the state; returns F, shaped like x.
        sigma_data: the standard deviation of the data.
        P_mean, P_std: training draws ln sigma ~ N(P_mean, P_std^2).
        objective: what the model predicts, F = "edm" or another of fastdiff.objective.OBJECTIVES.
        loss: "mse", "l1" or "huber".
        weighting: "simple" (1 on the error of F, which is EDM's 1 / c_out^2 on that of D) or "min_snr".
        clip: the sampler keeps its estimate of x_0 in [-clip, clip]; None, as published, leaves it free.

    Times t are sigma, in (0, 80]. States are c_in x, also those of `q_sample`, `x_T` and callbacks; the last is data.
    `sample` is Heun's rule on 18 of Karras' levels unless it is told otherwise; churn and other ranges are in
    steps=edm.process.karras(...).

    Raises: ValueError for an unknown name, and unless sigma_data and P_std are above 0.

    >>> edm = Edm(UNet(sample_size=32))
    >>> edm(torch.rand(8, 3, 32, 32) * 2 - 1).backward()
    >>> edm.sample(16, steps=edm.process.karras(18, churn=40, churn_min=0.05, churn_max=50))
    """

    process: Preconditioned
    default_sampler = "heun"
    P_mean: float = settable("P_mean", lambda value: as_number("P_mean", value))
    P_std: float = settable("P_std", lambda value: as_number("P_std", value))

    def __init__(
        self,
        model: nn.Module,
        sigma_data: float = 0.5,
        P_mean: float = -1.2,
        P_std: float = 1.2,
        objective: str = "edm",
        loss: str = "mse",
        weighting: str | Weighting = "simple",
        clip: float | None = None,
    ) -> None:
        super().__init__(model, Preconditioned(sigma_data), objective, loss, weighting, clip)
        self.P_mean, self.P_std = P_mean, P_std
        Edm.apply_options(self)

    def apply_options(self) -> None:
        super().apply_options()
        if not isinstance(self.process, Preconditioned):
            raise TypeError(f"process: expected a Preconditioned, got {type(self.process).__name__}")
        if not math.isfinite(self.P_mean):
            raise ValueError(f"P_mean: expected a finite number, got {self.P_mean}")
        as_positive("P_std", self.P_std)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's options but the model, JSON-serialisable."""
        return {
            "sigma_data": self.process.sigma_data,
            "P_mean": self.P_mean,
            "P_std": self.P_std,
            "objective": self.objective,
            "loss": self.loss_kind,
            "weighting": named("weighting", self.weighting),
            "clip": self.clip,
        }

    def times_at(self, quantiles: Tensor) -> Tensor:
        """The values of sigma (B,) to train at, for quantiles (B,) in [0, 1) (Karras et al. 2022, table 1)."""
        normal = torch.special.ndtri(quantiles.double().clamp(min=2**-54))  # at 0 it is -inf
        sigma: Tensor = (self.P_mean + self.P_std * normal).exp()
        return sigma
