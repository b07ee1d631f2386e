"""The rows that the fused operations apply, made of the buffers in stock's order of operations.

`start` is (a, b) of x_0 = a x - b output, or () if the output is x_0 itself.
"""

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...reference import work_dtype
from ...rows import make_rows

# By objective, the buffers that are `start`.
START: dict[str, tuple[str, ...]] = {
    "pred_noise": ("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
    "pred_x0": (),
    "pred_v": ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
}
OBJECTIVES = tuple(START)


class ModelPrediction(NamedTuple):
    """What the original's model_predictions returns: eps and x_0."""

    pred_noise: Tensor
    pred_x_start: Tensor


def row_index(t: Any) -> Any:
    """Times in int64; stock takes int32 too."""
    return t.long() if isinstance(t, Tensor) and t.dtype == torch.int32 else t


def values_at(buffer: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """buffer[t], shaped (B, 1, ...) to multiply `like`."""
    return buffer[t].reshape(-1, *[1] * (like.ndim - 1))


def sum_table(alpha: Tensor, sigma: Tensor, sign: int) -> Tensor:
    """Rows (alpha, sign sigma) of `ops.noising`."""
    return torch.stack((alpha, sign * sigma), 1).to(work_dtype(alpha))


def target_table(objective: str, root: Tensor, noise_root: Tensor, weight: Tensor) -> Tensor:
    """Rows (p, q, w) of `ops.loss`: the target p x_0 + q noise and its weight.

    root, noise_root: sqrt(alpha_bar) and sqrt(1 - alpha_bar).
    """
    zero, one = torch.zeros_like(root), torch.ones_like(root)
    p, q = {"pred_noise": (zero, one), "pred_x0": (one, zero), "pred_v": (-noise_root, root)}[objective]
    return torch.stack((p, q, weight), 1).float()


def start_rows(a: Tensor, b: Tensor) -> Tensor:
    """x_0 of x and the output."""
    return make_rows(a, work_dtype(a), **_x0((a, b)), from_x0=1.0)


def noise_rows(recip: Tensor) -> Tensor:
    """recip x - x_0 of x and x_0, which over sqrt(1 / alpha_bar - 1) is the noise. recip: sqrt(1 / alpha_bar)."""
    return make_rows(recip, work_dtype(recip), x0_from_x=recip, x0_from_pred=-1.0, from_x0=1.0)


def denoised_rows(c_skip: Tensor, c_out: Tensor) -> Tensor:
    """c_skip x + c_out output."""
    return make_rows(c_skip, work_dtype(c_skip), x0_from_x=c_skip, x0_from_pred=c_out, from_x0=1.0)


def ancestral_rows(from_x0: Tensor, from_x: Tensor, log_variance: Tensor, *start: Tensor) -> Tensor:
    """from_x0 x_0 + from_x x + std z of x and the output."""
    std = (0.5 * log_variance).exp()
    return make_rows(from_x0, work_dtype(from_x0), **_x0(start), from_x0=from_x0, from_x=from_x, noise=std)


def ancestral_rows_of_range(
    from_x0: Tensor, from_x: Tensor, log_variance: Tensor, beta: Tensor, *start: Tensor
) -> Tensor:
    """The same with a learned variance, between exp(log_variance) and beta."""
    low, high = 0.5 * log_variance, 0.5 * beta.log()
    columns = {"from_x0": from_x0, "from_x": from_x, "noise": low, "noise_high": high}
    return make_rows(from_x0, work_dtype(from_x0), **_x0(start), **columns)


def bound_rows(from_x0: Tensor, log_variance: Tensor, beta: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Rows (a, b, w, low, high, decoder) of `ops.vlb` for a learned variance, without a decoder; the first gives 0."""
    w, high = from_x0.double() ** 2 * (-log_variance.double()).exp(), beta.double().log() - log_variance.double()
    zero = torch.zeros_like(w)
    rows = torch.stack((a.double(), -b.double(), w, zero, high, zero), 1)
    rows[0, 2:] = 0
    return rows.to(work_dtype(beta))


def ddim_times(timesteps: int, steps: int) -> list[int]:
    """The times of `steps` steps: from timesteps - 1 down to -1, evenly. The last stands for the data."""
    return torch.linspace(-1, timesteps - 1, steps=steps + 1, device="cpu").int().tolist()[::-1]


def ddim_rows(times: list[int], eta: float, alpha_bar: Tensor) -> Tensor:
    """root x_0 + direction eps + sigma z, one row per step but the last, applied to eps as x and x_0 as the output."""
    root, direction, sigma = _ddim_terms(times, eta, alpha_bar)
    return make_rows(root, work_dtype(root), x0_from_pred=1.0, from_x0=root, from_x=direction, noise=sigma)


def ddim_rows_of_output(
    times: list[int], eta: float, derived: bool, alpha_bar: Tensor, recip: Tensor, recipm1: Tensor, *start: Tensor
) -> Tensor:
    """The same in one pass from x and the output, one row per step. The last step gives x_0.

    derived: eps is that of x_0; else it is the output.
    """
    root, direction, sigma = _ddim_terms(times, eta, alpha_bar)
    x0 = _x0(tuple(column[times[:-1]] for column in start))
    make = functools.partial(make_rows, alpha_bar[times[:-1]], work_dtype(alpha_bar), **x0, noise=F.pad(sigma, (0, 1)))
    if not derived:
        return make(from_x0=F.pad(root, (0, 1), value=1.0), from_pred=F.pad(direction, (0, 1)))
    # eps = (recip x - x_0) / recipm1. The column of x_0 is then a difference of numbers near 1.
    k = direction.double() / recipm1[times[:-2]].double()
    from_x0 = F.pad(root.double() - k, (0, 1), value=1.0)
    from_x = F.pad(k * recip[times[:-2]].double(), (0, 1))
    return make(from_x0=from_x0, from_x=from_x)


def _ddim_terms(times: list[int], eta: float, alpha_bar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(root, direction, sigma) of every step but the last (Song et al. 2021, arXiv:2010.02502, eq. 12 and 16)."""
    alpha, alpha_next = alpha_bar[times[:-2]], alpha_bar[times[1:-1]]
    sigma = eta * ((1 - alpha / alpha_next) * (1 - alpha_next) / (1 - alpha)).sqrt()
    return alpha_next.sqrt(), (1 - alpha_next - sigma**2).sqrt(), sigma


def _x0(start: tuple[Tensor, ...]) -> dict[str, Tensor | float]:
    if not start:
        return {"x0_from_pred": 1.0}
    a, b = start
    return {"x0_from_x": a, "x0_from_pred": -b}
