"""Grids of levels: which noise levels a sampler visits, beside `Process.grid` and `Process.karras`.

Each returns (levels, those to visit in turn) for `sample(steps=...)`, from the most noise down to data:

    ddpm.sample(4, sampler="unipc", steps=grids.exponential(ddpm.process, 10))

Common arguments:
    process: where the levels come from.
    steps: how many.
    sigma_min, sigma_max: the range of sigma / alpha; that of the process within [0.002, 80] if None.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .process import Chain, Grid, Process
from .schedule import as_float64
from .support.scalars import as_count, as_number

# sigma / alpha of ten steps and of their end, for which 0 stands.
ALIGN_YOUR_STEPS = {
    "sd": (
        14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092, 0.9642583904, 0.6523686016,
        0.3977456272, 0.1515232662, 0.0291671582,
    ),
    "sdxl": (
        14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945, 0.8620721141, 0.5550693289, 0.3798540708,
        0.2332364134, 0.1114188177, 0.0291671582,
    ),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}  # fmt: skip
SPACINGS = ("trailing", "leading", "linspace")


def given(process: Process, sigmas: Iterable[float] | Tensor) -> Grid:
    """These values of sigma / alpha, then data.

    Args:
        sigmas: decreasing; a 0 at the end is data.

    Raises: ValueError for anything else, and for values that a chain does not have.
    """
    values = as_float64("sigmas", sigmas if isinstance(sigmas, Tensor) else list(sigmas))
    if values.ndim == 1 and len(values) and values[-1] == 0:
        values = values[:-1]
    if values.ndim != 1 or not len(values) or not bool(values.isfinite().all()) or not bool((values > 0).all()):
        raise ValueError(f"sigmas: expected one or more finite numbers above 0, then 0 for data, got {values.tolist()}")
    if not bool((values.diff() < 0).all()):
        raise ValueError(f"sigmas: expected decreasing numbers, got {values.tolist()}")
    return process.discretize(process.time_of(values.flip(0))), torch.arange(len(values), -1, -1, device="cpu")


def exponential(
    process: Process, steps: int, *, sigma_min: float | None = None, sigma_max: float | None = None
) -> Grid:
    """Even in log(sigma / alpha), so also in lambda = log(alpha / sigma) and in the log-SNR.

    Raises: ValueError for a range that is none.
    Reference: k-diffusion's get_sigmas_exponential; the uniform lambda of Lu et al. 2022, arXiv:2206.00927.
    """
    low, high = process.ratio_range(sigma_min, sigma_max)
    n = _count(steps, low, high)
    return given(process, torch.linspace(math.log(high), math.log(low), n, dtype=torch.float64, device="cpu").exp())


def beta(
    process: Process,
    steps: int,
    *,
    alpha: float = 0.6,
    beta: float = 0.6,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Grid:
    """Quantiles of a Beta distribution: with alpha = beta < 1 more levels at both ends of the range.

        ratio_i = min + (max - min) q(1 - i / (n - 1)),    q the quantile of Beta(alpha, beta),    i = 0..n-1

    Raises: ValueError for a range that is none, and unless alpha and beta are above 0.
    Reference: Lee et al. 2024, arXiv:2407.12173, in diffusers' form.
    """
    low, high = process.ratio_range(sigma_min, sigma_max)
    a, b = as_number("alpha", alpha), as_number("beta", beta)
    if not (0 < a < math.inf and 0 < b < math.inf):
        raise ValueError(f"alpha, beta: expected finite numbers above 0, got {alpha} and {beta}")
    share = torch.linspace(1, 0, _count(steps, low, high), dtype=torch.float64, device="cpu")
    return given(process, low + (high - low) * _beta_quantile(share, a, b))


def align_your_steps(process: Process, model: str, steps: int = 10) -> Grid:
    """The levels found for latent diffusion models by Align Your Steps, kept within the range of the process.

    Args:
        model: "sd" (Stable Diffusion 1), "sdxl" or "svd" (Stable Video Diffusion).
        steps: 10 are as published; others interpolate log sigma.

    Raises: ValueError for another model.
    Reference: Sabour et al. 2024, arXiv:2404.14507, and the quickstart guide of their page.
    """
    if model not in ALIGN_YOUR_STEPS:
        raise ValueError(f"model: expected one of {', '.join(ALIGN_YOUR_STEPS)}, got {model!r}")
    known = torch.tensor(ALIGN_YOUR_STEPS[model], dtype=torch.float64, device="cpu").log()
    n = _count(steps)
    place = torch.linspace(0, len(known) - 1, n + 1, dtype=torch.float64, device="cpu")[:-1]
    at = place.floor().long()
    ratios = (known[at] + (place - at) * (known[at + 1] - known[at])).exp()
    low, high = process.sigma_range()
    return given(process, ratios.clamp(low, min(high, process.largest_ratio())).unique().flip(0))


def spaced(process: Chain, steps: int, spacing: str, offset: int = 0) -> Grid:
    """The timesteps of other libraries: whole levels t + 1 of a chain of T, for n steps.

        trailing    t + 1 = round(T - k T / n)               k = 0..n-1
        leading     t = k floor(T / n) + offset              k = n-1..0
        linspace    t = round(k (T - 1) / (n - 1))           k = n-1..0

    `Process.grid` is "trailing" but where T / n is no whole number: both round then, from other ends.

    Args:
        offset: of "leading", as steps_offset of diffusers.

    Raises: ValueError for another spacing, and for more steps than levels.
    Reference: Lin et al. 2023, arXiv:2305.08891, table 2.
    """
    if not isinstance(process, Chain):
        raise ValueError(f"process: expected a chain, which has timesteps, got {type(process).__name__}")
    if spacing not in SPACINGS:
        raise ValueError(f"spacing: expected one of {', '.join(SPACINGS)}, got {spacing!r}")
    total, n = process.schedule.timesteps, _count(steps)
    if n > total:
        raise ValueError(f"steps: expected an integer from 1 to {total}, got {steps!r}")
    if spacing == "trailing":
        levels = (total - torch.arange(n, dtype=torch.float64, device="cpu") * (total / n)).round().long()
    elif spacing == "leading":
        levels = torch.arange(n - 1, -1, -1, device="cpu") * (total // n) + offset + 1
    else:
        levels = torch.linspace(0, total - 1, n, dtype=torch.float64, device="cpu").round().long().flip(0) + 1
    if int(levels[-1]) < 1 or int(levels[0]) > total:
        raise ValueError(f"offset: expected levels from 1 to {total}, got {int(levels[-1])} to {int(levels[0])}")
    return process.schedule, torch.cat((levels, levels.new_zeros(1)))


def with_middles(process: Process, grid: Grid, ratios: Tensor) -> Grid:
    """A grid with further levels: after the i-th level that is visited comes the one with sigma / alpha = ratios[i]."""
    schedule, levels = grid
    times, n = schedule.times(levels).double(), len(ratios)
    visited = torch.cat((torch.stack((times[:n], process.time_of(ratios)), 1).flatten(), times[n:]))
    noisy = torch.cat((levels.new_ones(2 * n), levels[n:])) > 0
    increasing, where = visited[noisy].unique(return_inverse=True)
    found = torch.zeros(len(visited), dtype=torch.int64, device="cpu")
    found[noisy] = where + 1
    return process.discretize(increasing), found


def _count(steps: int, low: float = 0.0, high: float = 1.0) -> int:
    """How many levels; a range of one ratio is one level."""
    number = as_count("steps", steps)
    return 1 if low == high else number


def _beta_quantile(share: Tensor, a: float, b: float) -> Tensor:
    """x with I_x(a, b) = share, by bisection."""
    low, high = torch.zeros_like(share), torch.ones_like(share)
    for _ in range(60):
        middle = (low + high) / 2
        below = torch.where(middle <= 0.5, _incomplete_beta(middle, a, b), 1 - _incomplete_beta(1 - middle, b, a))
        low, high = torch.where(below < share, middle, low), torch.where(below < share, high, middle)
    return torch.where(share == 0, 0.0, torch.where(share == 1, 1.0, (low + high) / 2))


def _incomplete_beta(x: Tensor, a: float, b: float) -> Tensor:
    """I_x(a, b) = x^a / B(a, b) sum of (1 - b)_n x^n / (n! (a + n)), which 60 terms give for x <= 1/2."""
    total, factor = torch.zeros_like(x), torch.ones_like(x)
    for n in range(60):
        total = total + factor / (a + n)
        factor = factor * x * ((n + 1 - b) / (n + 1))
    scale = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b))
    return scale * x**a * total
