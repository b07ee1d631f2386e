"""ElucidatedDiffusion: EDM's preconditioned denoiser and its samplers."""

import random
from collections.abc import Callable
from functools import partial
from math import sqrt
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ... import ops
from ...reference import work_dtype
from ...rows import make_rows
from ..stock import combine, noising, overridden, remembered
from .images import check_images, check_reduction, normalize_to_neg_one_to_one, unnormalize_to_zero_to_one
from .tables import denoised_rows

STEPS = "sampling time step"  # what the progress bar says


class Step(NamedTuple):
    """The noise that a step adds, as a factor; the level with that noise, and the next level."""

    added: float
    sigma: float
    sigma_next: float


@remembered
class ElucidatedDiffusion(nn.Module):
    """denoising_diffusion_pytorch.ElucidatedDiffusion on the fused operations; see the package.

    D(x, sigma) = c_skip x + c_out F(c_in x, ln(sigma) / 4) estimates x_0 of x = x_0 + sigma noise. In the samplers the
    state is c_in x, what the network sees, so nothing is scaled in a pass of its own. Images are in [0, 1].

    Args:
        net: F, called as net(c_in x, ln(sigma) / 4, self_cond), (B, C, H, W). Its attribute
            random_or_learned_sinusoidal_cond is true; it has self_condition too.
        image_size: H = W.
        sigma_data: the standard deviation of the data.
        rho: of the levels, from sigma_max to sigma_min.
        P_mean, P_std: training draws ln sigma ~ N(P_mean, P_std^2).
        S_churn, S_tmin, S_tmax, S_noise: of the noise that `sample` adds (algorithm 2).

    Raises: ValueError, naming the argument.
    Reference: Karras et al. 2022, arXiv:2206.00364.
    """

    originals: ClassVar[dict[str, Any]]

    def __init__(
        self,
        net: Any,
        *,
        image_size: int,
        channels: int = 3,
        num_sample_steps: int = 32,
        sigma_min: float = 0.002,
        sigma_max: float = 80,
        sigma_data: float = 0.5,
        rho: float = 7,
        P_mean: float = -1.2,
        P_std: float = 1.2,
        S_churn: float = 80,
        S_tmin: float = 0.05,
        S_tmax: float = 50,
        S_noise: float = 1.003,
    ) -> None:
        super().__init__()
        if not net.random_or_learned_sinusoidal_cond:
            raise ValueError("net: expected random or learned sinusoidal conditioning, for continuous noise levels")
        _check_steps(num_sample_steps)
        self.net = net
        self.self_condition = net.self_condition
        self.channels = channels
        self.image_size = image_size
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.sigma_data = sigma_data
        self.rho = rho
        self.P_mean = P_mean
        self.P_std = P_std
        self.num_sample_steps = num_sample_steps
        self.S_churn = S_churn
        self.S_tmin = S_tmin
        self.S_tmax = S_tmax
        self.S_noise = S_noise

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.net.parameters()).device
        return device

    # --- the denoiser (Karras et al. 2022, table 1 and eq. 7)

    def c_skip(self, sigma: Any) -> Any:
        return (self.sigma_data**2) / (sigma**2 + self.sigma_data**2)

    def c_out(self, sigma: Any) -> Any:
        return sigma * self.sigma_data * (self.sigma_data**2 + sigma**2) ** -0.5

    def c_in(self, sigma: Any) -> Any:
        return 1 * (sigma**2 + self.sigma_data**2) ** -0.5

    def c_noise(self, sigma: Tensor) -> Tensor:
        return sigma.clamp(min=1e-20).log() * 0.25

    def preconditioned_network_forward(
        self, noised_images: Tensor, sigma: Any, self_cond: Tensor | None = None, clamp: bool = False
    ) -> Tensor:
        """D(noised_images, sigma), with clamp in [-1, 1]. sigma: a float, or (B,)."""
        batch = len(noised_images)
        sigma = torch.full((batch,), sigma, device=noised_images.device) if isinstance(sigma, float) else sigma
        padded = sigma[:, None, None, None]
        output = self.net(self.c_in(padded) * noised_images, self.c_noise(sigma), self_cond)
        if sigma.requires_grad:
            denoised = self.c_skip(padded) * noised_images + self.c_out(padded) * output
            return denoised.clamp(-1.0, 1.0) if clamp else denoised
        rows = denoised_rows(self.c_skip(sigma), self.c_out(sigma))
        x = noised_images.to(torch.promote_types(noised_images.dtype, rows.dtype))
        return combine(x, output, rows, _each(rows), clip=1.0 if clamp else None)

    # --- sampling

    def sample_schedule(self, num_sample_steps: int | None = None) -> Tensor:
        """(num_sample_steps + 1,) levels, the last 0 (Karras et al. 2022, eq. 5)."""
        n = self.num_sample_steps if num_sample_steps is None else num_sample_steps
        _check_steps(n)
        root = 1 / self.rho
        steps = torch.arange(n, device=self.device, dtype=torch.float32)
        span = self.sigma_min**root - self.sigma_max**root
        sigmas = (self.sigma_max**root + steps / max(n - 1, 1) * span) ** self.rho
        return F.pad(sigmas, (0, 1), value=0.0)

    @torch.no_grad()
    def sample(self, batch_size: int = 16, num_sample_steps: int | None = None, clamp: bool = True) -> Tensor:
        """(batch_size, C, H, W) in [0, 1], of Heun's rule with noise added (Karras et al. 2022, algorithm 2).

        With clamp D is kept in [-1, 1].
        """
        n = self.num_sample_steps if num_sample_steps is None else num_sample_steps
        sigmas = self.sample_schedule(n)
        churned = (sigmas >= self.S_tmin) & (sigmas <= self.S_tmax)
        gammas = torch.where(churned, min(self.S_churn / n, sqrt(2) - 1), 0.0).tolist()
        images = sigmas[0] * torch.randn(self._shape(batch_size), device=self.device)
        levels, steps = sigmas.tolist(), []
        for sigma, gamma, sigma_next in zip(levels[:-1], gammas[:-1], levels[1:], strict=True):
            sigma_hat = sigma + gamma * sigma
            steps.append(Step(sqrt(sigma_hat**2 - sigma**2) * self.S_noise, sigma_hat, sigma_next))
        step = partial(self._heun_of_denoised, steps) if self._overridden() else self._heun(steps)
        x_start = None
        for i in tqdm(range(len(steps)), desc=STEPS):
            images, x_start = step(i, images, torch.randn(images.shape, device=self.device), x_start, clamp)
        return unnormalize_to_zero_to_one(images.clamp(-1.0, 1.0))

    @torch.no_grad()
    def sample_using_dpmpp(self, batch_size: int = 16, num_sample_steps: int | None = None) -> Tensor:
        """(batch_size, C, H, W) in [0, 1], of DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2)."""
        sigmas = self.sample_schedule(num_sample_steps)
        images = sigmas[0] * torch.randn(self._shape(batch_size), device=self.device)
        ratio, now, before = _multistep_terms(sigmas)
        if self._overridden():
            old = None
            for i, sigma in enumerate(tqdm(sigmas[:-1].tolist())):
                denoised = self.preconditioned_network_forward(images, sigma)
                images = ratio[i] * images + now[i] * denoised + (0 if old is None else before[i] * old)
                old = denoised
            return unnormalize_to_zero_to_one(images.clamp(-1.0, 1.0))
        here, c_in = sigmas[:-1], self._scales(sigmas)
        rows = make_rows(
            here,
            x0_from_x=self.c_skip(here) / c_in[:-1],
            x0_from_pred=self.c_out(here),
            from_x0=c_in[1:] * now,
            from_x=c_in[1:] * ratio / c_in[:-1],
            from_hist=c_in[1:] * before,
        )
        images, noise_levels, old = c_in[0] * images, self.c_noise(here), torch.zeros_like(images)
        for i in tqdm(range(len(here))):
            output = self.net(images, noise_levels[i].repeat(batch_size), None)
            images = ops.update(images, output, rows, i, hist=old, keep="x0hat", noisy=False)
        return unnormalize_to_zero_to_one(images.clamp(-1.0, 1.0))

    def _shape(self, batch_size: int) -> tuple[int, int, int, int]:
        return batch_size, self.channels, self.image_size, self.image_size

    def _overridden(self) -> bool:
        name = "preconditioned_network_forward"
        return overridden(self, {name: self.originals[name]})

    def _scales(self, sigmas: Tensor) -> Tensor:
        """c_in of the levels, and 1 of the last, which is data."""
        return F.pad(self.c_in(sigmas[:-1]), (0, 1), value=1.0)

    def _heun_of_denoised(
        self, steps: list[Step], i: int, images: Tensor, eps: Tensor, x_start: Tensor | None, clamp: bool
    ) -> tuple[Tensor, Tensor]:
        """(images, x_0) of a step in stock's operations."""
        added, sigma, sigma_next = steps[i]
        hat = images + added * eps
        start = self.preconditioned_network_forward(hat, sigma, x_start if self.self_condition else None, clamp=clamp)
        slope = (hat - start) / sigma
        images = hat + (sigma_next - sigma) * slope
        if sigma_next != 0:
            cond = start if self.self_condition else None
            start = self.preconditioned_network_forward(images, sigma_next, cond, clamp=clamp)
            images = hat + 0.5 * (sigma_next - sigma) * (slope + (images - start) / sigma_next)
        return images, start

    def _heun(self, steps: list[Step]) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """The same in three passes: noise, Euler's step, and its correction.

            y    = c_in(s) (images + added eps),                      D  = c_skip / c_in y + c_out F(y)
            y'   = c_in(s') (s' x / s + (1 - s' / s) D),              D' as D
            x''  = x / 2 + (1 - r / 2) x' + (r - 1) / 2 D',           r  = s / s'

        with x and x' from y and y'. Here s is sigma with the noise added, s' the next.
        """
        device = self.device
        hat, nxt = torch.tensor([s[1:] for s in steps], dtype=torch.float64, device=device).unbind(1)
        at, after = self._scales(F.pad(hat, (0, 1)))[:-1], torch.where(nxt == 0, 1.0, self.c_in(nxt))
        r = hat / torch.where(nxt == 0, hat, nxt)
        ratio = nxt / hat
        denoise = {"x0_from_x": self.c_skip(hat) / at, "x0_from_pred": self.c_out(hat)}
        denoise_next = {"x0_from_x": self.c_skip(nxt) / after, "x0_from_pred": self.c_out(nxt)}
        euler = make_rows(hat, torch.float32, **denoise, from_x0=after * (1 - ratio), from_x=after * ratio / at)
        heun = make_rows(
            hat, torch.float32, **denoise_next, from_x0=(r - 1) / 2, from_x=(1 - r / 2) / after, noise=0.5 / at
        )
        start = make_rows(hat, torch.float32, **denoise, from_x0=1.0)
        start_next = make_rows(hat, torch.float32, **denoise_next, from_x0=1.0)
        noise_levels, next_levels = self.c_noise(hat.float()), self.c_noise(nxt.float())
        scales = at.tolist()

        def step(
            i: int, images: Tensor, eps: Tensor, x_start: Tensor | None, clamp: bool
        ) -> tuple[Tensor, Tensor | None]:
            clip, cond = 1.0 if clamp else None, self.self_condition
            table = torch.tensor([[scales[i], scales[i] * steps[i].added]], device=device)
            y = ops.noising(images, 0, table, noise=eps)
            output = self.net(y, noise_levels[i].repeat(len(y)), x_start)
            x_start = ops.combine(y, output, start, i, clip=clip) if cond else None
            y_next = ops.combine(y, output, euler, i, clip=clip)
            if steps[i].sigma_next == 0:
                return y_next, x_start
            output = self.net(y_next, next_levels[i].repeat(len(y)), x_start)
            x_start = ops.combine(y_next, output, start_next, i, clip=clip) if cond else None
            return ops.combine(y_next, output, heun, i, z=y, clip=clip), x_start

        return step

    # --- training

    def loss_weight(self, sigma: Tensor) -> Tensor:
        return (sigma**2 + self.sigma_data**2) * (sigma * self.sigma_data) ** -2

    def noise_distribution(self, batch_size: int) -> Tensor:
        """(batch_size,) values of sigma to train at."""
        return (self.P_mean + self.P_std * torch.randn((batch_size,), device=self.device)).exp()

    def forward(
        self, images: Tensor, *args: Any, sigma: Tensor | None = None, loss_reduction: str = "mean", **kwargs: Any
    ) -> Tensor:
        """loss_weight times the mean squared error of D: () for loss_reduction "mean", (B,) for "none".

        Images are (B, C, H, W); sigma (B,) is drawn if it is None, then the noise. With self-conditioning a number of
        Python's `random` is drawn too: below 1/2 the model first predicts the x_0 that conditions it.
        """
        check_images(images, self.image_size, self.channels)
        check_reduction(loss_reduction)
        images = normalize_to_neg_one_to_one(images)
        sigmas = self.noise_distribution(len(images)) if sigma is None else sigma
        noise = torch.randn_like(images)
        images = images.to(torch.promote_types(images.dtype, sigmas.dtype))
        twice = self.self_condition and random.random() < 0.5
        losses = (self._loss_of_denoised if self._overridden() else self._loss)(images, sigmas, noise, twice)
        return losses.mean() if loss_reduction == "mean" else losses

    def _loss_of_denoised(self, images: Tensor, sigmas: Tensor, noise: Tensor, twice: bool) -> Tensor:
        """(B,) by D."""
        one = torch.ones_like(sigmas)
        table = torch.stack((one, sigmas), 1).to(work_dtype(sigmas))
        noised = noising(images, noise, _each(table), table)
        cond = None
        if twice:
            with torch.no_grad():
                cond = self.preconditioned_network_forward(noised, sigmas)
        denoised = self.preconditioned_network_forward(noised, sigmas, cond)
        table = torch.stack((one, 0 * one, self.loss_weight(sigmas)), 1).float()
        return ops.loss(denoised, _each(table), table, x0=images, reduction="none")

    def _loss(self, images: Tensor, sigmas: Tensor, noise: Tensor, twice: bool) -> Tensor:
        """The same by F: D - x_0 = c_out (F - p x_0 - q noise), p = (1 - c_skip) / c_out, q = -c_skip sigma / c_out."""
        s = sigmas.double()
        c_skip, c_out, c_in = self.c_skip(s), self.c_out(s), self.c_in(s)
        index, condition = _each(s), self.c_noise(sigmas)
        y = noising(images, noise, index, torch.stack((c_in, c_in * s), 1).float())
        cond = None
        if twice:
            with torch.no_grad():
                output = self.net(y, condition, None)
                cond = combine(y, output, denoised_rows(c_skip / c_in, c_out).float(), index)
        output = self.net(y, condition, cond)
        weight = self.loss_weight(s) * c_out**2
        table = torch.stack(((1 - c_skip) / c_out, -c_skip * s / c_out, weight), 1).float()
        return ops.loss(output, index, table, x0=images, noise=noise, reduction="none")


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"num_sample_steps: expected 1 or more, got {steps}")


def _each(numbers: Tensor) -> Tensor:
    """0 to B - 1: each sample has a row of its own."""
    return torch.arange(len(numbers), device=numbers.device)


def _multistep_terms(sigmas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(ratio, now, before) of x' = ratio x + now D + before D_old for each step, in stock's order of operations."""
    t = sigmas.log().neg()
    h = t.diff()
    weight = torch.zeros_like(h)  # 1 / (2 r), but for the first step and the last, which have one D
    weight[1:-1] = 1 / (2 * (h[:-2] / h[1:-1]))
    change = -(-h).expm1()
    return t[1:].neg().exp() / t[:-1].neg().exp(), change * (1 + weight), -change * weight
