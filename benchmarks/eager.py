"""DDPM as one writes it in eager PyTorch: what the library is compared with."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLIP = 1.0  # of the predicted x_0, in the library's steps too


class Eager:
    """DDPM (Ho et al. 2020, arXiv:2006.11239) in eager PyTorch: linear betas, eps prediction, 0-based t.

    With `compiled`, q_sample, corrupt, mse and step are compiled by torch.compile.
    """

    def __init__(self, timesteps: int, device: torch.device, compiled: bool = False) -> None:
        beta = torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64)
        alpha_bar = (1 - beta).cumprod(0)
        before = F.pad(alpha_bar[:-1], (1, 0), value=1.0)
        a, b = (1 / alpha_bar).sqrt(), -(1 / alpha_bar - 1).sqrt()
        c = before.sqrt() * beta / (1 - alpha_bar)
        d = (1 - beta).sqrt() * (1 - before) / (1 - alpha_bar)
        f = (beta * (1 - before) / (1 - alpha_bar)).sqrt()
        q = ((1 - before) / (1 - alpha_bar)).sqrt()
        self.timesteps = timesteps
        self.sqrt_alpha_bar = alpha_bar.sqrt().float().to(device)
        self.sqrt_one_minus_alpha_bar = (1 - alpha_bar).sqrt().float().to(device)
        self.rows = {
            "ddpm": torch.stack((a, b, c, d, f), 1).float().to(device),
            "ddim": torch.stack((a, b, before.sqrt() - alpha_bar.sqrt() * q, q, 0 * f), 1).float().to(device),
        }
        wrap: Callable[..., Callable[..., Tensor]] = torch.compile if compiled else _identity
        self.q_sample = wrap(self._q_sample)
        self.mse = wrap(self._mse)
        self.step = wrap(self._step)
        self.corrupt: Callable[..., tuple[Tensor, Tensor]] = wrap(self._corrupt)  # type: ignore[assignment]

    def _corrupt(self, x0: Tensor, t: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x_t, noise); t: (B,)."""
        if noise is None:
            noise = torch.randn_like(x0)
        shape = (-1, *[1] * (x0.ndim - 1))
        a = self.sqrt_alpha_bar[t].to(x0.dtype).view(shape)
        s = self.sqrt_one_minus_alpha_bar[t].to(x0.dtype).view(shape)
        return a * x0 + s * noise, noise

    def _q_sample(self, x0: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        return self._corrupt(x0, t, noise)[0]

    def _mse(self, pred: Tensor, noise: Tensor) -> Tensor:
        return F.mse_loss(pred.float(), noise.float())

    def _step(self, x: Tensor, eps: Tensor, row: Tensor, noisy: bool, noise: Tensor | None = None) -> Tensor:
        """x_{t-1}. row: (5,), one of rows["ddpm"], with noise, or of rows["ddim"], without."""
        a, b, c, d, f = row.unbind()
        x0 = (a * x + b * eps).clamp(-CLIP, CLIP)
        mean = c * x0 + d * x
        if not noisy:
            return mean
        return mean + f * (torch.randn_like(x) if noise is None else noise)

    def loss(self, net: nn.Module, x0: Tensor, t: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        if t is None:
            t = torch.randint(0, self.timesteps, x0.shape[:1], device=x0.device)
        x_t, noise = self.corrupt(x0, t, noise)
        return self.mse(net(x_t, t), noise)

    @torch.inference_mode()
    def sample(self, net: nn.Module, sampler: str, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_0 from x = x_T. noise: (timesteps, B, ...), in the order of use."""
        levels = torch.arange(self.timesteps, device=x.device)
        for k in reversed(range(self.timesteps)):
            eps = net(x, levels[k].expand(len(x)))
            given = None if noise is None else noise[self.timesteps - 1 - k]
            x = self.step(x, eps, self.rows[sampler][k], sampler == "ddpm", given)
        return x


def _identity(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return function
