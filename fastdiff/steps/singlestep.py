"""Samplers that ask the model twice a step: at a level, and in the middle of the way to the next one.

The way is counted in log rho, rho = sigma / alpha, and y = x / alpha. With eta a step goes down to rho_d, and noise
raises it to rho_s again:

    rho_u = eta rho_s sqrt(1 - rho_s^2 / rho_t^2),    rho_d^2 = rho_s^2 - rho_u^2

`fastdiff.steps` describes the common arguments, but for

    levels: (n,) int64: t, m, s, m, ...: after each of decreasing levels the middle of the way to the next one, except
        before 0 (data). fastdiff.steps.make_steps adds the middles. With eta = 1 they are the next ones.
    eta: 0 is the ODE, 1 has the noise of the ancestral sampler.

All raise ValueError if sigma / alpha is infinite at a level, eta is not within 0 and 1, or a middle is elsewhere.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..rows import make_rows
from ..schedule import NoiseSchedule
from ..support.scalars import as_not_negative
from .table import StepTable, check_finite_ratio, check_signal, make_table, x0_columns
from .through_x0 import ddim


class Way(NamedTuple):
    """Of each step: the levels t, m and s, and alpha and rho at them."""

    t: Tensor
    m: Tensor
    s: Tensor
    alpha: tuple[Tensor, Tensor, Tensor]
    rho: tuple[Tensor, Tensor, Tensor]


def dpm2(schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None = None) -> StepTable:
    """DPM-Solver-2 as in k-diffusion, the midpoint rule for dy / d rho = eps: `dpm2_ancestral` with eta = 0.

    Args:
        schedule, levels, objective, clip: see `fastdiff.steps`.

    Returns: two rows and two calls of the model per step, and Euler's alone to data; second order.
    Raises: ValueError if sigma / alpha is infinite at a level, or a middle is not where this rule wants it.
    Reference: k-diffusion's sample_dpm_2; after Karras et al. 2022, arXiv:2206.00364, algorithm 2, and Lu et al. 2022,
        arXiv:2206.00927.
    """
    return dpm2_ancestral(schedule, levels, objective, clip, eta=0.0)


def dpm2_ancestral(
    schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None = None, eta: float = 1.0
) -> StepTable:
    """DPM2 with noise: the midpoint rule for dy / d rho = eps down to rho_d, where rho_m^2 = rho_t rho_d.

        eps = (x_t - alpha_t denoise(x_t)) / sigma_t
        y_m = y_t + (rho_m - rho_t) eps
        y_s = y_t + (rho_d - rho_t) eps_m + rho_u z,    eps_m the same at y_m

    Rows: the first is that of `ddim`, and keeps x_t in hist. The second: with g = alpha_s (rho_d - rho_t): from_x0 =
    -g / rho_m; from_x = g / sigma_m; from_hist = alpha_s / alpha_t; noise = alpha_s rho_u.

    Args:
        schedule, levels, objective, clip, eta: see `fastdiff.steps`.

    Returns: two rows and two calls of the model per step, and Euler's alone to data; first order, second for eta = 0.
    Raises: ValueError if sigma / alpha is infinite at a level, a middle is elsewhere, or eta is not within 0 and 1.
    Reference: k-diffusion's sample_dpm_2_ancestral.
    """
    way = _way("dpm2", schedule, levels, objective, eta)
    (alpha_t, alpha_m, alpha_s), (rho_t, rho_m, rho_s) = way.alpha, way.rho
    down, up = ancestral_step(rho_t, rho_s, eta)
    _check_middles(way, down)
    g = alpha_s * (down - rho_t)
    second = make_rows(
        rho_t, guidance=1.0, **x0_columns(schedule, way.m, way.s, objective, clip),
        from_x0=-g / rho_m, from_x=g / (alpha_m * rho_m), from_hist=alpha_s / alpha_t, noise=alpha_s * up,
    )  # fmt: skip
    return _twice(schedule, levels, objective, clip, _euler(schedule, way, objective, clip), second, "x")


def dpm_solver_pp_2s(schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None = None) -> StepTable:
    """DPM-Solver++(2S), an exponential integrator: `dpm_solver_pp_2s_ancestral` with eta = 0.

    Args:
        schedule, levels, objective, clip: see `fastdiff.steps`.

    Returns: two rows and two calls of the model per step, and the first alone to data; second order.
    Raises: ValueError if sigma / alpha is infinite at a level, or a middle is not where this rule wants it.
    Reference: Lu et al. 2022, arXiv:2211.01095, algorithm 1 with r = 1/2.
    """
    return dpm_solver_pp_2s_ancestral(schedule, levels, objective, clip, eta=0.0)


def dpm_solver_pp_2s_ancestral(
    schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None = None, eta: float = 1.0
) -> StepTable:
    """DPM-Solver++(2S) with noise: an exponential integrator down to rho_d, where rho_m^2 = rho_t rho_d.

        y_m = rho_m / rho_t y_t + (1 - rho_m / rho_t) denoise(x_t)
        y_s = rho_d / rho_t y_t + (1 - rho_d / rho_t) denoise(x_m) + rho_u z

    Rows: the first is that of `ddim`, and keeps x_t in hist. The second: from_x0 = alpha_s (1 - rho_d / rho_t);
    from_hist = alpha_s rho_d / (alpha_t rho_t); noise = alpha_s rho_u.

    Args:
        schedule, levels, objective, clip, eta: see `fastdiff.steps`.

    Returns: two rows and two calls of the model per step, and the first alone to data; first order, second for eta = 0.
    Raises: ValueError if sigma / alpha is infinite at a level, a middle is elsewhere, or eta is not within 0 and 1.
    Reference: k-diffusion's sample_dpmpp_2s_ancestral.
    """
    way = _way("dpm++2s", schedule, levels, objective, eta)
    (alpha_t, _, alpha_s), (rho_t, _, rho_s) = way.alpha, way.rho
    down, up = ancestral_step(rho_t, rho_s, eta)
    _check_middles(way, down)
    left = down / rho_t
    second = make_rows(
        rho_t, guidance=1.0, **x0_columns(schedule, way.m, way.s, objective, clip),
        from_x0=alpha_s * (1 - left), from_hist=alpha_s / alpha_t * left, noise=alpha_s * up,
    )  # fmt: skip
    return _twice(schedule, levels, objective, clip, _euler(schedule, way, objective, clip), second, "x")


def dpm_solver_pp_sde(
    schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None = None, eta: float = 1.0
) -> StepTable:
    """DPM-Solver++ SDE with r = 1/2: a step with noise to the middle, rho_m^2 = rho_t rho_s, whose estimate is used.

        y_m = p y_t + (1 - p) denoise(x_t) + u z,     p = rho_d / rho_t and u = rho_u of the way to the middle
        y_s = q y_t + (1 - q) denoise(x_m) + v z',    q and v the same of the way to s
        z'  = c z + sqrt(1 - c^2) z_s,                c^2 = (rho_t - rho_m) / (rho_t - rho_s)

    z and z' belong to one Brownian motion in rho. The first is u z = y_m - p y_t - (1 - p) denoise(x_t). So the first
    row keeps all that the second needs of x_t and its estimate, with k = c v / u:

    Rows: the first is the first line, and keeps the mix alpha_s ((q - k p) y_t - k (1 - p) denoise(x_t)). The second:
    from_x0 = alpha_s (1 - q); from_x = alpha_s k / alpha_m; from_hist = 1; noise = alpha_s v sqrt(1 - c^2).

    Args:
        schedule, levels, objective, clip, eta: see `fastdiff.steps`.

    Returns: two rows and two calls of the model per step, and Euler's alone to data; second order in mean and variance.
    Raises: ValueError if sigma / alpha is infinite at a level, a middle is elsewhere, or eta is not within 0 and 1.
    Reference: k-diffusion's sample_dpmpp_sde with its Brownian tree; Lu et al. 2022, arXiv:2211.01095.
    """
    way = _way("dpm++sde", schedule, levels, objective, eta)
    (alpha_t, alpha_m, alpha_s), (rho_t, rho_m, rho_s) = way.alpha, way.rho
    _check_middles(way, rho_s)
    (to_m, u), (to_s, v) = ancestral_step(rho_t, rho_m, eta), ancestral_step(rho_t, rho_s, eta)
    p, q = to_m / rho_t, to_s / rho_t
    c2 = (rho_t - rho_m) / (rho_t - rho_s)
    k = c2.sqrt() * v / u if eta else torch.zeros_like(u)
    first = make_rows(
        rho_t, guidance=1.0, **x0_columns(schedule, way.t, way.m, objective, clip),
        from_x0=alpha_m * (1 - p), from_x=alpha_m / alpha_t * p, noise=alpha_m * u,
        kept_from_x0=-alpha_s * k * (1 - p), kept_from_x=alpha_s / alpha_t * (q - k * p),
    )  # fmt: skip
    second = make_rows(
        rho_t, guidance=1.0, **x0_columns(schedule, way.m, way.s, objective, clip),
        from_x0=alpha_s * (1 - q), from_x=alpha_s / alpha_m * k, from_hist=1.0, noise=alpha_s * v * (1 - c2).sqrt(),
        kept_from_x0=0.0,
    )  # fmt: skip
    return _twice(schedule, levels, objective, clip, first, second, "mix")


def ancestral_step(rho_t: Tensor, rho_s: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """(rho_d, rho_u) of the way from rho_t to rho_s."""
    up = eta * rho_s * (1 - (rho_s / rho_t) ** 2).sqrt()
    return (rho_s**2 - up**2).clamp(min=0).sqrt(), up


def middles(schedule: NoiseSchedule, levels: Tensor, eta: float = 0.0) -> Tensor:
    """rho_m = sqrt(rho_t rho_d) of each step between levels (n + 1,), but of none to data; ValueError for eta."""
    _check_eta(eta)
    rho = (-schedule.log_snr / 2).exp()[levels]
    before, after = rho[:-1][rho[1:] > 0], rho[1:][rho[1:] > 0]
    return (before * ancestral_step(before, after, eta)[0]).sqrt()


def _check_eta(eta: float) -> None:
    as_not_negative("eta", eta)
    if eta > 1:
        raise ValueError(f"eta: {eta} asks for more noise than a level holds; expected at most 1")


def _way(name: str, schedule: NoiseSchedule, levels: Tensor, objective: str, eta: float) -> Way:
    _check_eta(eta)
    check_signal(schedule, levels[:-1], objective)
    check_finite_ratio(name, schedule, levels[:-1])
    steps = (len(levels) - 1) // 2
    visited = torch.cat((levels[:-1:2], levels[-1:]))
    if len(levels) < 2 or bool((visited.diff() >= 0).any()) or bool(levels[-1] == 0) != (len(levels) % 2 == 0):
        raise ValueError(
            f"levels: expected decreasing levels, and the middle of the way after each one but that before 0, got "
            f"{levels.tolist()}"
        )
    t, m, s = levels[: 2 * steps : 2], levels[1 : 2 * steps : 2], levels[2 : 2 * steps + 1 : 2]
    rho = (-schedule.log_snr / 2).exp()
    return Way(t, m, s, (schedule.alpha[t], schedule.alpha[m], schedule.alpha[s]), (rho[t], rho[m], rho[s]))


def _check_middles(way: Way, down: Tensor) -> None:
    wanted, found = (way.rho[0] * down).sqrt(), way.rho[1]
    wrong = ~torch.isclose(wanted, found, rtol=1e-6, atol=0.0)  # levels of a chain are found by interpolation
    if bool(wrong.any()):
        raise ValueError(
            f"levels: expected sigma / alpha = {wanted[wrong][0].item():.6g} at level {int(way.m[wrong][0])}, the "
            f"middle of the way from level {int(way.t[wrong][0])}, got {found[wrong][0].item():.6g}; make_steps adds "
            "middles"
        )


def _euler(schedule: NoiseSchedule, way: Way, objective: str, clip: float | None) -> Tensor:
    """The rows of `ddim` from t to m."""
    from_x = schedule.sigma[way.m] / schedule.sigma[way.t]
    values = x0_columns(schedule, way.t, way.m, objective, clip)
    return make_rows(from_x, guidance=1.0, **values, from_x0=way.alpha[1] - way.alpha[0] * from_x, from_x=from_x)


def _twice(
    schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None,
    first: Tensor, second: Tensor, keep: str,
) -> StepTable:  # fmt: skip
    """The first and the second row of each step in turn, then the row of `ddim` for the step to data."""
    rows = torch.stack((first, second), 1).flatten(0, 1)
    if levels[-1] == 0:
        last = ddim(schedule, levels[-2:], objective, clip).rows
        rows = torch.cat((rows, torch.nn.functional.pad(last, (0, rows.shape[1] - last.shape[1]))))
    return make_table(schedule, levels, rows, keep=keep)
