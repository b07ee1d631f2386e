"""VParamContinuousTimeGaussianDiffusion: v prediction at times in [0, 1]."""

from typing import Any

import torch
from torch import Tensor

from ..stock import remembered
from .continuous import Continuous, cosine_log_snr, reduced
from .images import check_reduction


@remembered
class VParamContinuousTimeGaussianDiffusion(Continuous):
    """denoising_diffusion_pytorch.VParamContinuousTimeGaussianDiffusion on the fused operations; see the package.

    Images are in [0, 1]. Times are numbers (B,) in [0, 1], and the schedule is the cosine one.

    Args:
        model: model(x, log_snr) returns v = alpha noise - sigma x_0 (B, C, H, W) (Salimans & Ho 2022,
            arXiv:2202.00512, appendix D). Its attribute random_or_learned_sinusoidal_cond is true, and self_condition
            false.
        clip_sample_denoised: sampling keeps x_0 in [-1, 1].

    The other arguments are stock's. Raises: ValueError, naming the argument.
    """

    def __init__(
        self,
        model: Any,
        *,
        image_size: int,
        channels: int = 3,
        num_sample_steps: int = 500,
        clip_sample_denoised: bool = True,
    ) -> None:
        super().__init__(model, cosine_log_snr, image_size, channels, num_sample_steps, clip_sample_denoised)

    def _start(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return alpha, -sigma

    def q_sample(
        self, x_start: Tensor, times: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(alpha x_0 + sigma noise, log SNR, alpha, sigma), the last two (B, 1, 1, 1); noise None draws it."""
        noise = torch.randn_like(x_start) if noise is None else noise
        log_snr, alpha, sigma = self._levels(x_start, times)
        return self._noised(x_start, noise, alpha, sigma), log_snr, alpha, sigma

    def p_losses(
        self, x_start: Tensor, times: Tensor, noise: Tensor | None = None, loss_reduction: str = "mean"
    ) -> Tensor:
        """The mean squared error of v: () for loss_reduction "mean", (B,) for "none". It draws the noise if it is
        None."""
        check_reduction(loss_reduction)
        noise = torch.randn_like(x_start) if noise is None else noise
        x, log_snr, alpha, sigma = self.q_sample(x_start=x_start, times=times, noise=noise)
        output = self.model(x, log_snr)
        return reduced(self._loss(output, -sigma.flatten(), alpha.flatten(), x_start, noise), loss_reduction)
