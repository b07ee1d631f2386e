"""What the two classes with times in [0, 1] share: a log signal-to-noise ratio, and the steps as rows of numbers."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ... import ops
from ...reference import work_dtype
from ...rows import make_rows
from ..stock import broadcast, combine, noising, overridden
from .discrete import LOOP
from .images import check_images, check_reduction, normalize_to_neg_one_to_one, unnormalize_to_zero_to_one


def cosine_log_snr(t: Tensor, s: float = 0.008) -> Tensor:
    """log SNR of alpha = cos(pi/2 (t + s) / (1 + s)) (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17)."""
    return -((torch.cos((t + s) / (1 + s) * math.pi * 0.5) ** -2) - 1).clamp(min=1e-5).log()


class Continuous(nn.Module, ABC):
    """A diffusion with times in [0, 1], alpha^2 = sigmoid(log_snr(t)) and sigma^2 = sigmoid(-log_snr(t)).

    A class of this kind has `p_losses` and `_start`, and is a class `remembered`. Its model sees log SNR, (B,).

    Args:
        log_snr: a decreasing function of times, elementwise.
    """

    originals: ClassVar[dict[str, Any]]
    p_losses: Callable[..., Tensor]
    model: Any

    def __init__(
        self,
        model: Any,
        log_snr: Callable[[Tensor], Tensor],
        image_size: int,
        channels: int,
        num_sample_steps: int,
        clip_sample_denoised: bool,
    ) -> None:
        super().__init__()
        if not model.random_or_learned_sinusoidal_cond:
            raise ValueError("model: expected random or learned sinusoidal conditioning, for continuous times")
        if model.self_condition:
            raise ValueError("model: expected no self-conditioning")
        if num_sample_steps < 1:
            raise ValueError(f"num_sample_steps: expected 1 or more, got {num_sample_steps}")
        self.model = model
        self.channels = channels
        self.image_size = image_size
        self.log_snr = log_snr
        self.num_sample_steps = num_sample_steps
        self.clip_sample_denoised = clip_sample_denoised

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    def p_mean_variance(self, x: Tensor, time: Tensor, time_next: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance () of p(x_next | x) (Kingma et al. 2021, arXiv:2107.00630, appendix A.4)."""
        log_snr = self._log_snr(time, time_next)
        rows, variance = self._rows(log_snr)
        return self._mean(x, log_snr[0], rows, 0), variance[0]

    # --- sampling

    @torch.no_grad()
    def p_sample(self, x: Tensor, time: Tensor, time_next: Tensor) -> Tensor:
        """x at time_next, with noise unless that is 0."""
        mean, variance = self.p_mean_variance(x=x, time=time, time_next=time_next)
        return mean if time_next == 0 else mean + variance.sqrt() * torch.randn_like(x)

    @torch.no_grad()
    def p_sample_loop(self, shape: tuple[int, ...]) -> Tensor:
        """Samples (B, C, H, W) in [0, 1] of num_sample_steps steps."""
        img = torch.randn(shape, device=self.device)
        times = torch.linspace(1.0, 0.0, self.num_sample_steps + 1, device=self.device)
        stock_path = overridden(self, {name: self.originals[name] for name in ("p_sample", "p_mean_variance")})
        log_snr = self._log_snr(*times)
        rows, _ = self._rows(log_snr)
        for i in tqdm(range(self.num_sample_steps), desc=LOOP, total=self.num_sample_steps):
            if stock_path:
                img = self.p_sample(img, times[i], times[i + 1])
            else:
                img = self._mean(img, log_snr[i], rows, i, noisy=i < self.num_sample_steps - 1)
        return unnormalize_to_zero_to_one(img.clamp(-1.0, 1.0))

    @torch.no_grad()
    def sample(self, batch_size: int = 16) -> Tensor:
        """(batch_size, C, H, W) in [0, 1]."""
        return self.p_sample_loop((batch_size, self.channels, self.image_size, self.image_size))

    def _mean(self, x: Tensor, log_snr: Tensor, rows: Tensor, i: int, noisy: bool = False) -> Tensor:
        """The step of row i in one pass; noise is drawn if it is wanted."""
        output = self.model(x, log_snr.repeat(len(x)))
        noise = torch.randn_like(x) if noisy else None
        x = x.to(torch.promote_types(x.dtype, rows.dtype))
        return combine(x, output, rows, i, z=noise, clip=1.0 if self.clip_sample_denoised else None)

    def _log_snr(self, *times: Tensor) -> Tensor:
        """Of each time () alone, as in stock: a network rounds otherwise in a batch."""
        return torch.stack([self.log_snr(t) for t in times])

    def _rows(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, variances (n,)) of the n steps between n + 1 levels.

        In stock's order of operations, where 1 - c is 0 for the largest steps.
        """
        here, there = log_snr[:-1], log_snr[1:]
        c = -torch.special.expm1(here - there)
        alpha, sigma, alpha_next = (level.sigmoid().sqrt() for level in (here, -here, there))
        variance = (-there).sigmoid() * c
        x0_from_x, x0_from_pred = self._start(alpha, sigma)
        rows = make_rows(
            c,
            work_dtype(c),
            x0_from_x=x0_from_x,
            x0_from_pred=x0_from_pred,
            from_x0=alpha_next * c,
            from_x=alpha_next * (1 - c) / alpha,
            noise=variance.sqrt(),
        )
        return rows, variance

    @abstractmethod
    def _start(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(x0_from_x, x0_from_pred)."""

    # --- training

    def random_times(self, batch_size: int) -> Tensor:
        """(batch_size,) uniform in [0, 1)."""
        return torch.zeros(batch_size, device=self.device).uniform_(0, 1)

    def forward(
        self, img: Tensor, *args: Any, times: Tensor | None = None, loss_reduction: str = "mean", **kwargs: Any
    ) -> Tensor:
        """p_losses of images (B, C, H, W) at `times`; random ones are drawn in any case, and taken if it is None."""
        check_images(img, self.image_size)
        drawn = self.random_times(len(img))
        kwargs["loss_reduction"] = loss_reduction
        return self.p_losses(normalize_to_neg_one_to_one(img), drawn if times is None else times, *args, **kwargs)

    def _levels(self, x_start: Tensor, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(log SNR, alpha, sigma), the last two (B, 1, 1, 1)."""
        log_snr = self.log_snr(times)
        padded = log_snr.reshape(*log_snr.shape, *[1] * (x_start.ndim - log_snr.ndim))
        return log_snr, padded.sigmoid().sqrt(), (-padded).sigmoid().sqrt()

    def _noised(self, x_start: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """alpha x_start + sigma noise, in one pass unless a gradient by the levels is wanted."""
        if alpha.requires_grad:
            return x_start * alpha + noise * sigma
        table = torch.stack((alpha.flatten(), sigma.flatten()), 1).to(work_dtype(alpha))
        x_start = x_start.to(torch.promote_types(x_start.dtype, alpha.dtype))
        return noising(x_start, noise, torch.arange(len(table), device=table.device), table)

    def _loss(self, output: Tensor, p: Tensor | None, q: Tensor, x_start: Tensor, noise: Tensor) -> Tensor:
        """(B,): the mean squared error of the output against p x_start + q noise, numbers for each sample."""
        zero = torch.zeros_like(q)
        table = torch.stack((zero if p is None else p, q, torch.ones_like(q)), 1).float()
        index = torch.arange(len(table), device=table.device)
        output, x_start, noise = broadcast(index, output, x_start, noise)
        return ops.loss(output, index, table, x0=None if p is None else x_start, noise=noise, reduction="none")


def reduced(losses: Tensor, loss_reduction: str) -> Tensor:
    """The losses (B,), or their mean."""
    check_reduction(loss_reduction)
    return losses.mean() if loss_reduction == "mean" else losses
