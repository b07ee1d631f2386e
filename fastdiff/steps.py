"""Samplers as step tables: a sampler is a function from a schedule and a grid of levels to the rows of the reverse
update x' = c x0hat + d x + e pred + f z + g hist, x0hat = clip(a x + b pred).

Song et al. 2021 is DDIM (arXiv:2010.02502), Ho et al. 2020 is DDPM (arXiv:2006.11239).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .objective import x0_rows
from .schedule import NoiseSchedule

# Row columns. h: log standard deviation at raw = 1 where the variance is learned (then f is that at raw = -1).
A, B, C, D, E, F, G, H, W = range(9)
# exp(-200) is 0 in float32, and unlike -inf it may be multiplied by 0.
LOG_ZERO = -200.0
# Beyond this gain an unclipped x_0 from eps has no digit left in float32.
MAX_GAIN = 1e5

VARIANCES = ("posterior", "beta", "learned")


@dataclass(frozen=True, eq=False)
class StepTable:
    """n steps from levels[0] to levels[n].

    levels: (n + 1,) int64. rows: (n, 9) float64. noisy: whether any step adds noise. keep: what a step leaves in hist,
    "none", "x0hat" or "x".
    """

    levels: Tensor
    rows: Tensor
    noisy: bool
    keep: str = "none"

    def __len__(self) -> int:
        return len(self.rows)

    def __post_init__(self) -> None:
        if not bool(self.rows.float().isfinite().all()):
            step = int((~self.rows.float().isfinite()).any(1).nonzero()[0])
            raise ValueError(
                f"steps: the step from level {int(self.levels[step])} to {int(self.levels[step + 1])} "
                f"has coefficients beyond float32: {self.rows[step].tolist()}"
            )


def grid(timesteps: int, steps: int | None) -> Tensor:
    """Levels from T down to 0 in `steps` near-equal strides, round(linspace(0, T, steps + 1)); all of them if None.

    ValueError unless 1 <= steps <= T.
    """
    steps = timesteps if steps is None else steps
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= timesteps:
        raise ValueError(f"steps: expected an integer from 1 to {timesteps}, got {steps!r}")
    return torch.linspace(0, timesteps, steps + 1, dtype=torch.float64, device="cpu").round().long().flip(0)


def ancestral(
    schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None = None, variance: str = "posterior"
) -> StepTable:
    """DDPM: draw from q(x_s | x_t, x0hat) with its variance beta~ ("posterior"), with beta ("beta"), or in between as
    the model says ("learned") (Ho et al. 2020, eq. 6, 7 and section 3.2; Nichol & Dhariwal 2021, eq. 15).

    The step to level 0 adds no noise. Any decreasing levels will do: skipping some gives the respaced chain.
    """
    t, s = levels[:-1], levels[1:]
    rows = _rows_with_x0(schedule, t, s, objective, clip)
    rows[:, C], rows[:, D], var = schedule.posterior(t, s)
    beta = schedule.transition(t, s)[1]
    last = s == 0
    if variance == "learned":
        rows[:, F] = torch.where(last, LOG_ZERO, 0.5 * var.log())
        rows[:, H] = torch.where(last, LOG_ZERO, 0.5 * beta.log())
    else:
        rows[:, F] = torch.where(last, 0.0, (beta if variance == "beta" else var).sqrt())
    return StepTable(levels, rows, noisy=bool((~last).any()))


def ddim(
    schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None = None, eta: float = 0.0
) -> StepTable:
    """DDIM (Song et al. 2021, eq. 12, 16): x_s = alpha_s x0hat + q eps + f z with q^2 + f^2 = sigma_s^2 and
    f = eta sigma_s sqrt(beta_ts) / sigma_t. eta = 0 is deterministic, eta = 1 is the ancestral sampler.

    ValueError where eta < 0 or f > sigma_s.
    """
    if not (math.isfinite(eta) and eta >= 0):
        raise ValueError(f"eta: expected a finite number of at least 0, got {eta}")
    t, s = levels[:-1], levels[1:]
    rows = _rows_with_x0(schedule, t, s, objective, clip)
    sigma_t, sigma_s = schedule.sigma[t], schedule.sigma[s]
    f = eta * sigma_s * (schedule.transition(t, s)[1].sqrt() / sigma_t)
    if bool((f > sigma_s * (1 + 1e-12)).any()):
        raise ValueError(f"eta: {eta} asks for more noise than a level holds; expected at most 1")
    q = (sigma_s**2 - f**2).clamp(min=0).sqrt()
    rows[:, C] = schedule.alpha[s] - schedule.alpha[t] * q / sigma_t
    rows[:, D] = q / sigma_t
    rows[:, F] = f
    return StepTable(levels, rows, noisy=bool((f > 0).any()))


def denoise(schedule: NoiseSchedule, objective: str) -> Tensor:
    """Rows (T + 1, 9) that turn x_t into x0hat, row t for level t; non-finite rows become NaN."""
    a, b = x0_rows(schedule, objective)
    rows = a.new_zeros(len(a), 9)
    rows[:, A], rows[:, B], rows[:, C], rows[:, W] = a, b, 1.0, 1.0
    known = rows.float().isfinite().all(1, keepdim=True)
    return torch.where(known, rows, math.nan)


def _rows_with_x0(schedule: NoiseSchedule, t: Tensor, s: Tensor, objective: str, clip: float | None) -> Tensor:
    """Rows with (a, b) and w = 1 set; ValueError where the prediction does not determine x_0."""
    a, b = x0_rows(schedule, objective)
    if objective == "eps":
        check_eps(schedule, t)
        gain = (schedule.log_alpha[s] - schedule.log_alpha[t]).exp()
        if clip is None and bool((gain > MAX_GAIN).any()):
            k = int((gain > MAX_GAIN).nonzero()[0])
            raise ValueError(
                f"objective: 'eps' without clip loses x_0 from level {int(t[k])} to {int(s[k])}, where "
                f"alpha_s / alpha_t = {gain[k].item():.3g} (at most {MAX_GAIN:g}); set clip, or use 'x0' or 'v'"
            )
    rows = a.new_zeros(len(t), 9)
    rows[:, A], rows[:, B], rows[:, W] = a[t], b[t], 1.0
    return rows


def check_eps(schedule: NoiseSchedule, t: Tensor) -> None:
    """ValueError where alpha_t is 0 in float32 at one of the levels t, so that eps says nothing of x_0."""
    lost = schedule.alpha[t].float() < torch.finfo(torch.float32).tiny
    if bool(lost.any()):
        level = int(t[lost].min())
        raise ValueError(
            f"objective: 'eps' cannot determine x_0 at level {level}, where alpha = {schedule.alpha[level].item():.3g};"
            " use 'x0' or 'v', or a schedule that keeps some signal"
        )
