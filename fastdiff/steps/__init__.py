"""Samplers as step tables: a sampler is a function from a schedule and the levels to visit to the rows of the reverse
update x' = c x0hat + d x + e pred + f z + g hist, x0hat = clip(a x + b pred).

Through x0hat (Ho et al. 2020, arXiv:2006.11239; Song et al. 2021a, arXiv:2010.02502; Lu et al. 2022, arXiv:2211.01095;
Karras et al. 2022, arXiv:2206.00364): ancestral, ddim, dpm_solver_pp_2m, heun. Through the score s(x, t) (Song & Ermon
2019, arXiv:1907.05600; Song et al. 2021b, arXiv:2011.13456): euler_maruyama, reverse_diffusion, probability_flow,
predictor_corrector, annealed_langevin. All of them take every objective, and chains as well as SDEs.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..objective import conversion_rows, x0_rows
from ..process import Grid, Process
from ..schedule import NoiseSchedule

# Row columns. h: log standard deviation at raw = 1 where the variance is learned (then f is that at raw = -1).
A, B, C, D, E, F, G, H, W = range(9)
# exp(-200) is 0 in float32, and unlike -inf it may be multiplied by 0.
LOG_ZERO = -200.0
# Beyond this gain an unclipped x_0 from eps has no digit left in float32.
MAX_GAIN = 1e5

VARIANCES = ("posterior", "beta", "learned")


@dataclass(frozen=True, eq=False)
class StepTable:
    """n steps; step k asks the model at levels[k] and leaves the state at levels[k + 1].

    levels: (n + 1,) int64, or times of an SDE, float64. rows: (n, 9) float64. noisy: whether any step adds noise. keep:
    what a step leaves in hist, "none", "x0hat" or "x". start: standard deviation of the state to start from.
    kinds: of each step, "predict"; "add", which only scales and adds noise, without the model; or "correct", a Langevin
    corrector, whose row gives the score, with f = 2 alpha r^2 (Song et al. 2021b, algorithms 4, 5). learned: the model
    says how much noise, between f and h.
    """

    levels: Tensor
    rows: Tensor
    noisy: bool
    keep: str = "none"
    start: float = 1.0
    kinds: Sequence[str] = ()
    learned: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", tuple(self.kinds) or ("predict",) * len(self))
        if not bool(self.rows.float().isfinite().all()):
            step = int((~self.rows.float().isfinite()).any(1).nonzero()[0])
            raise ValueError(
                f"steps: the step from level {self.levels[step].item():g} to {self.levels[step + 1].item():g} "
                f"has coefficients beyond float32: {self.rows[step].tolist()}"
            )


# --- through x0hat ----------------------------------------------------------------------------------------------


def ancestral(
    schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None = None, variance: str = "posterior"
) -> StepTable:
    """DDPM: draw from q(x_s | x_t, x0hat) with its variance beta~ ("posterior"), with beta ("beta"), or in between as
    the model says ("learned") (Ho et al. 2020, eq. 6, 7 and section 3.2; Nichol & Dhariwal 2021, eq. 15).

    The step to level 0 adds no noise. Any decreasing levels will do: skipping some gives the respaced chain. Where
    alpha = 1 it is the ancestral sampler of VE (Song et al. 2021b, eq. 47).
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
    return _table(schedule, levels, rows, noisy=bool((~last).any()), learned=variance == "learned")


def ddim(
    schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None = None, eta: float = 0.0
) -> StepTable:
    """DDIM (Song et al. 2021a, eq. 12, 16): x_s = alpha_s x0hat + q eps + f z with q^2 + f^2 = sigma_s^2 and
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
    return _table(schedule, levels, rows, noisy=bool((f > 0).any()))


def ddim_inversion(schedule: NoiseSchedule, levels: Tensor, objective: str) -> StepTable:
    """DDIM from data to noise, for increasing levels: x_s = alpha_s x0hat + sigma_s epshat, both from the prediction at
    level t < s, unclipped (Song et al. 2021a, section 4.3: the same ODE, backwards).

    A first-order inverse of `ddim`: the error falls with the size of the steps. ValueError from level 0 with x0 or
    score, which say nothing of the noise in data.
    """
    t, s = levels[:-1], levels[1:]
    if objective in ("x0", "score") and bool((t == 0).any()):
        raise ValueError(
            f"objective: {objective!r} cannot be inverted from level 0, where alpha_bar = 1 and the noise is not "
            "determined; use 'eps' or 'v', or start from level 1"
        )
    check_signal(schedule, t, objective)
    a, b = x0_rows(schedule, objective)
    u, v = conversion_rows(schedule, objective, "eps")
    rows = a.new_zeros(len(t), 9)
    rows[:, D] = schedule.alpha[s] * a[t] + schedule.sigma[s] * u[t]
    rows[:, E] = schedule.alpha[s] * b[t] + schedule.sigma[s] * v[t]
    rows[:, W] = 1.0
    return _table(schedule, levels, rows, noisy=False)


def dpm_solver_pp_2m(
    schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None = None
) -> StepTable:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): with lambda = log(alpha / sigma), h = lambda_s - lambda_t,
    w = h / (2 h_before) and k = alpha_s (1 - exp(-h)), x_s = k ((1 + w) x0hat - w x0hat_before) + sigma_s / sigma_t x.

    The first step and the one to level 0 are of first order (w = 0).
    """
    t, s = levels[:-1], levels[1:]
    rows = _rows_with_x0(schedule, t, s, objective, clip)
    half_log_snr = schedule.log_snr / 2
    h = half_log_snr[s] - half_log_snr[t]
    k = schedule.alpha[s] * -torch.expm1(-h)
    w = torch.zeros_like(h)
    w[1:] = torch.where(s[1:] == 0, 0.0, h[1:] / (2 * h[:-1]))
    rows[:, C], rows[:, D], rows[:, G] = k * (1 + w), schedule.sigma[s] / schedule.sigma[t], -k * w
    return _table(schedule, levels, rows, noisy=False, keep="x0hat")


def heun(
    schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None = None, noise_scale: float = 1.0
) -> StepTable:
    """EDM's sampler (Karras et al. 2022, algorithms 1, 2) in the coordinates of any schedule: Heun's rule for
    d(x/alpha) / d(sigma/alpha) = (x - alpha x0hat) / sigma, in two calls of the model a level, and Euler's to level 0.

    Where the levels rise, noise is added to match (churn; its standard deviation times noise_scale): see
    Process.karras, which makes such a grid.
    """
    if not (math.isfinite(noise_scale) and noise_scale >= 0):
        raise ValueError(f"noise_scale: expected a finite number of at least 0, got {noise_scale}")
    check_signal(schedule, levels[:-1], objective)
    _check_finite_ratio("heun", schedule, levels[:-1])
    ratio = (-schedule.log_snr / 2).exp()  # sigma / alpha
    made, visited, kinds = [], [levels[0]], []

    def append(row: Tensor, at: Tensor, kind: str = "predict") -> None:
        made.append(row)
        visited.append(at)
        kinds.append(kind)

    for t, s in itertools.pairwise(levels):
        scale = schedule.alpha[s] / schedule.alpha[t]
        if ratio[s] > ratio[t]:
            row = ratio.new_zeros(9)
            row[D] = scale
            row[F] = noise_scale * schedule.alpha[s] * (ratio[s] ** 2 - ratio[t] ** 2).sqrt()
            append(row, s, "add")
            continue
        step = torch.stack((t, s))
        append(ddim(schedule, step, objective, clip).rows[0], s)
        if s > 0:
            # hist is x_t; x0hat at t follows from it and x_s, so that half a step of each slope is left to do.
            row = _rows_with_x0(schedule, s[None], s[None], objective, clip)[0]
            growth = 0.5 * (ratio[t] / ratio[s] - 1)
            row[C], row[D], row[G] = schedule.alpha[s] * growth, 0.5 - growth, 0.5 * scale
            append(row, s)
    rows = torch.stack(made)
    noisy = bool((rows[:, F] > 0).any())
    return _table(schedule, torch.stack(visited), rows, noisy, keep="x", kinds=kinds)


# --- through the score ------------------------------------------------------------------------------------------


def euler_maruyama(
    schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None = None, denoise: bool = True
) -> StepTable:
    """Euler-Maruyama's rule for the reverse SDE dx = (f x - g^2 s(x, t)) dt + g dw (Song et al. 2021b, eq. 6):
    x_s = x - f dt x + g^2 dt score + sqrt(g^2 dt) z.

    denoise: the step to level 0 gives x0hat (Tweedie's formula, app. G); otherwise it is left out.
    """
    t, s = levels[:-1], levels[1:]
    _check_finite_ratio("euler_maruyama", schedule, t)
    drift, g2 = schedule.increments(t, s)
    return _score_steps(schedule, levels, objective, clip, 1 - drift, g2, g2.sqrt(), denoise)


def probability_flow(
    schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None = None, denoise: bool = False
) -> StepTable:
    """Euler's rule for the probability-flow ODE dx/dt = f x - g^2/2 s(x, t), whose marginals are those of the SDE (Song
    et al. 2021b, eq. 13). denoise: as in euler_maruyama."""
    t, s = levels[:-1], levels[1:]
    _check_finite_ratio("probability_flow", schedule, t)
    drift, g2 = schedule.increments(t, s)
    return _score_steps(schedule, levels, objective, clip, 1 - drift, g2 / 2, torch.zeros_like(g2), denoise)


def reverse_diffusion(
    schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None = None, denoise: bool = True
) -> StepTable:
    """The reverse SDE discretised as the forward chain x_t = alpha_ts x_s + sqrt(beta_ts) z is (Song et al. 2021b, app.
    E): x_s = (2 - alpha_ts) x + beta_ts score + sqrt(beta_ts) z. denoise: as in euler_maruyama."""
    alpha_ts, beta = schedule.transition(levels[:-1], levels[1:])
    return _score_steps(schedule, levels, objective, clip, 2 - alpha_ts, beta, beta.sqrt(), denoise)


PREDICTORS: dict[str, Callable[..., StepTable]] = {
    "reverse_diffusion": reverse_diffusion,
    "euler_maruyama": euler_maruyama,
    "ddpm": ancestral,
}


def predictor_corrector(
    schedule: NoiseSchedule,
    levels: Tensor,
    objective: str,
    clip: float | None = None,
    predictor: str = "reverse_diffusion",
    corrections: int = 1,
    snr: float = 0.16,
) -> StepTable:
    """At every level `corrections` steps of Langevin dynamics, then one of the predictor to the next (Song et al.
    2021b, algorithms 2 to 5): x <- x + e score + sqrt(2 e) z with e = 2 alpha (snr |z| / |score|)^2, alpha = alpha_ts^2
    and the norms of each sample by itself.

    predictor: "reverse_diffusion", "euler_maruyama" or "ddpm" (ancestral).
    """
    if predictor not in PREDICTORS:
        raise ValueError(f"predictor: expected one of {', '.join(PREDICTORS)}, got {predictor!r}")
    if isinstance(corrections, bool) or not isinstance(corrections, int) or corrections < 1:
        raise ValueError(f"corrections: expected an integer of at least 1, got {corrections!r}")
    if not (math.isfinite(snr) and snr > 0):
        raise ValueError(f"snr: expected a finite number above 0, got {snr}")
    table = PREDICTORS[predictor](schedule, levels, objective, clip)
    t, s = levels[:-1], levels[1:]
    n = len(t) - int((s == 0).sum())  # the last step denoises: nothing to correct
    rows = _score_rows(schedule, t[:n], s[:n], objective, clip, torch.ones(n, dtype=torch.float64))
    rows[:, F] = 2 * schedule.transition(t[:n], s[:n])[0] ** 2 * snr**2
    made, visited, kinds = [], [table.levels[0]], []
    for k in range(len(table)):
        count = corrections if k < n else 0
        made += [*rows[k : k + 1]] * count + [table.rows[k]]
        visited += [table.levels[k]] * count + [table.levels[k + 1]]
        kinds += ["correct"] * count + ["predict"]
    return StepTable(torch.stack(visited), torch.stack(made), noisy=True, start=table.start, kinds=kinds)


def annealed_langevin(
    schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None = None, eps: float = 2e-5
) -> StepTable:
    """Annealed Langevin dynamics: x <- x + e_i score + sqrt(2 e_i) z with e_i = eps sigma_i^2 / sigma_1^2, at each of
    the levels in turn, which may repeat; x0hat at the step to level 0 (Song & Ermon 2019, algorithm 1, with their step
    alpha_i = 2 e_i; the last step from Jolicoeur-Martineau et al. 2021, arXiv:2009.05475).

    ValueError unless alpha = 1: between levels nothing is rescaled.
    """
    if not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"eps: expected a finite number above 0, got {eps}")
    if bool((schedule.log_alpha != 0).any()):
        raise ValueError("sampler: 'annealed_langevin' expected alpha = 1 at every level (NCSN), got less")
    step = eps * (schedule.sigma[levels[:-1]] / schedule.sigma[1]) ** 2
    return _score_steps(schedule, levels, objective, clip, torch.ones_like(step), step, (2 * step).sqrt(), True)


# --- by name ----------------------------------------------------------------------------------------------------

Sampler = Callable[..., StepTable]
SAMPLERS: dict[str, Sampler] = {
    "ddpm": ancestral,
    "ddim": ddim,
    "dpm++2m": dpm_solver_pp_2m,
    "heun": heun,
    "euler_maruyama": euler_maruyama,
    "reverse_diffusion": reverse_diffusion,
    "probability_flow": probability_flow,
    "predictor_corrector": predictor_corrector,
    "annealed_langevin": annealed_langevin,
}


def make_steps(
    process: Process,
    sampler: str | Sampler,
    steps: int | Iterable[float] | Grid | None,
    objective: str,
    clip: float | None,
    **options: Any,
) -> StepTable:
    """The table of a sampler by its name, or of a function like those above (functools.partial sets its options).

    steps: how many (the process's own number if None), the decreasing levels or times to visit, or a grid of the
    process. "heun" counts the levels of Process.karras, "annealed_langevin" the steps at each level.
    """
    if isinstance(sampler, str):
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler: expected one of {', '.join(SAMPLERS)} or a function, got {sampler!r}")
        sampler = SAMPLERS[sampler]
    elif not callable(sampler):
        raise TypeError(f"sampler: expected a name or a function, got {type(sampler).__name__}")
    rule = sampler
    while isinstance(rule, functools.partial):
        rule = rule.func
    if isinstance(steps, tuple) and len(steps) == 2 and isinstance(steps[0], NoiseSchedule):
        schedule, levels = steps
    elif rule is heun and (steps is None or isinstance(steps, int)):
        schedule, levels = process.karras(steps)
    elif rule is annealed_langevin and (steps is None or isinstance(steps, int)):
        schedule, levels = process.ladder(steps)
    else:
        schedule, levels = process.grid(steps)
    return sampler(schedule, levels, objective, clip, **options)


def denoise_rows(schedule: NoiseSchedule, objective: str) -> Tensor:
    """Rows (levels, 9) that turn x_t into x0hat, one for each level; non-finite rows become NaN."""
    a, b = x0_rows(schedule, objective)
    rows = a.new_zeros(len(a), 9)
    rows[:, A], rows[:, B], rows[:, C], rows[:, W] = a, b, 1.0, 1.0
    known = rows.float().isfinite().all(1, keepdim=True)
    return torch.where(known, rows, math.nan)


def check_signal(schedule: NoiseSchedule, t: Tensor, objective: str) -> None:
    """ValueError where alpha_t is 0 in float32 at one of the levels t and the objective says nothing of x_0 there."""
    if objective not in ("eps", "score"):
        return
    lost = schedule.alpha[t].float() < torch.finfo(torch.float32).tiny
    if bool(lost.any()):
        level = int(t[lost].min())
        raise ValueError(
            f"objective: {objective!r} cannot determine x_0 at level {level}, where alpha = "
            f"{schedule.alpha[level].item():.3g}; use 'x0' or 'v', or a schedule that keeps some signal"
        )


def _check_finite_ratio(sampler: str, schedule: NoiseSchedule, t: Tensor) -> None:
    """ValueError where sigma / alpha is infinite at one of the levels t."""
    if bool((schedule.alpha[t] == 0).any()):
        raise ValueError(
            f"sampler: {sampler!r} expected a finite sigma / alpha, got alpha = 0 at level "
            f"{int(t[schedule.alpha[t] == 0].max())}; start below it, or use 'ddpm', 'ddim' or 'dpm++2m'"
        )


def _rows_with_x0(schedule: NoiseSchedule, t: Tensor, s: Tensor, objective: str, clip: float | None) -> Tensor:
    """Rows with (a, b) and w = 1 set; ValueError where the prediction does not determine x_0."""
    check_signal(schedule, t, objective)
    if objective in ("eps", "score"):
        gain = (schedule.log_alpha[s] - schedule.log_alpha[t]).exp()
        if clip is None and bool((gain > MAX_GAIN).any()):
            k = int((gain > MAX_GAIN).nonzero()[0])
            raise ValueError(
                f"objective: {objective!r} without clip loses x_0 from level {int(t[k])} to {int(s[k])}, where "
                f"alpha_s / alpha_t = {gain[k].item():.3g} (at most {MAX_GAIN:g}); set clip, or use 'x0' or 'v'"
            )
    a, b = x0_rows(schedule, objective)
    rows = a.new_zeros(len(t), 9)
    rows[:, A], rows[:, B], rows[:, W] = a[t], b[t], 1.0
    return rows


def _score_rows(
    schedule: NoiseSchedule, t: Tensor, s: Tensor, objective: str, clip: float | None, gain: Tensor
) -> Tensor:
    """Rows of gain times the score: straight from the prediction, or through x0hat where that is clipped."""
    if clip is None:
        check_signal(schedule, t, objective)
        u, v = conversion_rows(schedule, objective, "score")
        rows = u.new_zeros(len(t), 9)
        rows[:, D], rows[:, E], rows[:, W] = gain * u[t], gain * v[t], 1.0
        return rows
    rows = _rows_with_x0(schedule, t, s, objective, clip)
    by = gain / schedule.sigma[t] ** 2  # score = (alpha x0hat - x) / sigma^2
    rows[:, C], rows[:, D] = by * schedule.alpha[t], -by
    return rows


def _score_steps(
    schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None,
    on_x: Tensor, on_score: Tensor, on_noise: Tensor, denoise: bool,
) -> StepTable:  # fmt: skip
    """x_s = on_x x + on_score score + on_noise z, and x0hat at the step to level 0, or nothing."""
    t, s = levels[:-1], levels[1:]
    n = len(t) - int((s == 0).sum())
    if n + denoise == 0:
        raise ValueError("steps: expected a step that does not end at level 0, where there is no denoising")
    rows = _score_rows(schedule, t[:n], s[:n], objective, clip, on_score[:n])
    rows[:, D] += on_x[:n]
    rows[:, F] = on_noise[:n]
    if n < len(t) and denoise:
        last = _rows_with_x0(schedule, t[n:], s[n:], objective, clip)
        last[:, C] = 1.0
        rows = torch.cat((rows, last))
    return _table(schedule, levels[: len(rows) + 1], rows, noisy=bool((on_noise[:n] > 0).any()))


def _table(
    schedule: NoiseSchedule, levels: Tensor, rows: Tensor, noisy: bool, keep: str = "none", **more: Any
) -> StepTable:
    return StepTable(schedule.times(levels), rows, noisy, keep, schedule.prior_std(int(levels[0])), **more)
