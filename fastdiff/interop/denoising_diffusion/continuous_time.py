"""ContinuousTimeGaussianDiffusion: noise prediction at times in [0, 1], with a schedule that may be learned."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.checks import check_choice
from ..stock import remembered
from .continuous import Continuous, cosine_log_snr, reduced
from .images import check_reduction


def linear_log_snr(t: Tensor) -> Tensor:
    """log SNR that approximates the linear schedule of Ho et al. 2020 (Kingma et al. 2021, arXiv:2107.00630)."""
    return -torch.special.expm1(1e-4 + 10 * (t**2)).clamp(min=1e-20).log()


class MonotonicLinear(nn.Module):
    """A linear layer of the absolute weights."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.net = nn.Linear(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.net.weight.abs(), self.net.bias.abs())


class Residual(nn.Module):
    """x + fn(x)."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.fn(x)
        return out


class LearnedNoiseSchedule(nn.Module):
    """A monotonic network from 0 to 1, scaled to the two ends (Kingma et al. 2021, arXiv:2107.00630, appendix H).

    Args:
        log_snr_max, log_snr_min: log SNR at times 0 and 1.
        frac_gradient: the share of the gradient that reaches the network.
    """

    def __init__(
        self, *, log_snr_max: float, log_snr_min: float, hidden_dim: int = 1024, frac_gradient: float = 1.0
    ) -> None:
        super().__init__()
        self.slope = log_snr_min - log_snr_max
        self.intercept = log_snr_max
        # The first and the last stand where stock has a change of shape, for the names of the weights.
        self.net = nn.Sequential(
            nn.Identity(),
            MonotonicLinear(1, 1),
            Residual(nn.Sequential(MonotonicLinear(1, hidden_dim), nn.Sigmoid(), MonotonicLinear(hidden_dim, 1))),
            nn.Identity(),
        )
        self.frac_gradient = frac_gradient

    def forward(self, x: Tensor) -> Tensor:
        first, last, here = (self.net(t[..., None])[..., 0] for t in (torch.zeros_like(x), torch.ones_like(x), x))
        normed = self.slope * ((here - first) / (last - first)) + self.intercept
        return normed * self.frac_gradient + normed.detach() * (1 - self.frac_gradient)


@remembered
class ContinuousTimeGaussianDiffusion(Continuous):
    """denoising_diffusion_pytorch.ContinuousTimeGaussianDiffusion on the fused operations; see the package.

    Images are in [0, 1]. Times are numbers (B,) in [0, 1].

    Args:
        model: model(x, log_snr) returns the noise (B, C, H, W). Its attribute random_or_learned_sinusoidal_cond is
            true, and self_condition false.
        noise_schedule: "linear", "cosine" or "learned".
        clip_sample_denoised: sampling keeps x_0 in [-1, 1].

    The other arguments are stock's. Raises: ValueError, naming the argument.
    """

    def __init__(
        self,
        model: Any,
        *,
        image_size: int,
        channels: int = 3,
        noise_schedule: str = "linear",
        num_sample_steps: int = 500,
        clip_sample_denoised: bool = True,
        learned_schedule_net_hidden_dim: int = 1024,
        learned_noise_schedule_frac_gradient: float = 1.0,
        min_snr_loss_weight: bool = False,
        min_snr_gamma: float = 5,
    ) -> None:
        check_choice("noise_schedule", noise_schedule, ("linear", "cosine", "learned"))
        log_snr: Any = {"linear": linear_log_snr, "cosine": cosine_log_snr}.get(noise_schedule)
        if log_snr is None:
            first, last = (linear_log_snr(torch.tensor([t], device="cpu")).item() for t in (0.0, 1.0))
            log_snr = LearnedNoiseSchedule(
                log_snr_max=first,
                log_snr_min=last,
                hidden_dim=learned_schedule_net_hidden_dim,
                frac_gradient=learned_noise_schedule_frac_gradient,
            )
        super().__init__(model, log_snr, image_size, channels, num_sample_steps, clip_sample_denoised)
        self.min_snr_loss_weight = min_snr_loss_weight
        self.min_snr_gamma = min_snr_gamma

    def _start(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return 1 / alpha, -sigma / alpha

    def q_sample(self, x_start: Tensor, times: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(alpha x_0 + sigma noise, log SNR); noise None draws it."""
        noise = torch.randn_like(x_start) if noise is None else noise
        log_snr, alpha, sigma = self._levels(x_start, times)
        return self._noised(x_start, noise, alpha, sigma), log_snr

    def p_losses(
        self, x_start: Tensor, times: Tensor, noise: Tensor | None = None, loss_reduction: str = "mean"
    ) -> Tensor:
        """The mean squared error of the noise: () for loss_reduction "mean", (B,) for "none". It draws the noise if it
        is None."""
        check_reduction(loss_reduction)
        noise = torch.randn_like(x_start) if noise is None else noise
        x, log_snr = self.q_sample(x_start=x_start, times=times, noise=noise)
        one = torch.ones(1, device=x_start.device)
        losses = self._loss(self.model(x, log_snr), None, one, x_start, noise)
        if self.min_snr_loss_weight:
            snr = log_snr.exp()
            losses = losses * (snr.clamp(max=self.min_snr_gamma) / snr)
        return reduced(losses, loss_reduction)
