"""Samplers that step through x0hat, the model's estimate of the data.

In the docstrings t -> s is one step, x0 = clip(x0_from_x x_t + x0_from_pred pred) the model's estimate, and z standard
normal noise. alpha_ts and beta_ts are the coefficients of q(x_t | x_s) = N(alpha_ts x_s, beta_ts I). `fastdiff.steps`
describes the arguments.

All raise ValueError if the prediction does not determine x_0 at a level, or loses it unclipped to rounding.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

from ..objective import conversion_rows, needs_noise, x0_rows
from ..rows import LOG_ZERO, make_rows
from ..schedule import NoiseSchedule
from ..support.scalars import as_not_negative
from .table import StepTable, check_finite_ratio, check_signal, make_table, x0_columns

VARIANCES = ("posterior", "beta", "learned")


def ancestral(
    schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None = None, variance: str = "posterior"
) -> StepTable:
    """DDPM's sampler: draw x_s from the posterior q(x_s | x_t, x0).

        x0  = denoise(x_t)
        mu  = alpha_s beta_ts / sigma_t^2 x0 + alpha_ts sigma_s^2 / sigma_t^2 x_t
        x_s = mu + sd z,    sd^2 = beta~ = beta_ts sigma_s^2 / sigma_t^2;    sd = 0 at the step to data

    Row: from_x0, from_x = the two coefficients of mu; noise = sd; if learned, noise and noise_high = the logarithms of
    sqrt(beta~) and sqrt(beta_ts). Where alpha = 1 this is the ancestral sampler of VE.

    Args:
        schedule, levels, objective, clip: see `fastdiff.steps`.
        variance: sd^2 is "posterior" (beta~), "beta" (beta_ts) or "learned" (in between, as the model says).

    Returns: one row and one call of the model per step. Leaving out levels gives the respaced chain.
    Raises: ValueError for another variance.
    Reference: Ho et al. 2020, arXiv:2006.11239, eq. 6, 7 and section 3.2; Nichol & Dhariwal 2021, arXiv:2102.09672,
        eq. 15; Song et al. 2021b, arXiv:2011.13456, eq. 47.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance: expected one of {', '.join(VARIANCES)}, got {variance!r}")
    t, s = levels[:-1], levels[1:]
    on_x0, on_x, posterior = schedule.posterior(t, s)
    beta = schedule.transition(t, s)[1]
    last, learned = s == 0, variance == "learned"
    values: dict[str, Any] = {**x0_columns(schedule, t, s, objective, clip), "from_x0": on_x0, "from_x": on_x}
    if learned:
        values["noise"] = torch.where(last, LOG_ZERO, 0.5 * posterior.log())
        values["noise_high"] = torch.where(last, LOG_ZERO, 0.5 * beta.log())
    else:
        values["noise"] = torch.where(last, 0.0, (beta if variance == "beta" else posterior).sqrt())
    return make_table(schedule, levels, learned=learned, **values)


def ddim(
    schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None = None, eta: float = 0.0
) -> StepTable:
    """DDIM: a deterministic step along the probability-flow ODE, or with eta part of the ancestral noise.

        x0  = denoise(x_t)
        eps = (x_t - alpha_t x0) / sigma_t
        x_s = alpha_s x0 + q eps + sd z,    sd = eta sigma_s sqrt(beta_ts) / sigma_t,    q^2 + sd^2 = sigma_s^2

    Row: from_x0 = alpha_s - alpha_t q / sigma_t; from_x = q / sigma_t; noise = sd.

    Args:
        schedule, levels, objective, clip: see `fastdiff.steps`.
        eta: 0 is deterministic, 1 is the ancestral sampler.

    Returns: one row and one call of the model per step; first order.
    Raises: ValueError if eta < 0, or asks for more noise than a level holds.
    Reference: Song et al. 2021a, arXiv:2010.02502, eq. 12 and 16.
    """
    as_not_negative("eta", eta)
    t, s = levels[:-1], levels[1:]
    denoised = x0_columns(schedule, t, s, objective, clip)
    sigma_t, sigma_s = schedule.sigma[t], schedule.sigma[s]
    sd = eta * sigma_s * (schedule.transition(t, s)[1].sqrt() / sigma_t)
    if bool((sd > sigma_s * (1 + 1e-12)).any()):
        raise ValueError(f"eta: {eta} asks for more noise than a level holds; expected at most 1")
    q = (sigma_s**2 - sd**2).clamp(min=0).sqrt()
    from_x0 = schedule.alpha[s] - schedule.alpha[t] * q / sigma_t
    return make_table(schedule, levels, **denoised, from_x0=from_x0, from_x=q / sigma_t, noise=sd)


def euler_ancestral(
    schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None = None, eta: float = 1.0
) -> StepTable:
    """Euler's rule for d(x/alpha) / d(sigma/alpha) = eps down to less noise than s has, then noise: `ddim` with eta.

        r    = sigma / alpha,    up = eta r_s sqrt(1 - r_s^2 / r_t^2),    down^2 = r_s^2 - up^2
        eps  = (x_t - alpha_t denoise(x_t)) / sigma_t
        x_s  = alpha_s (x_t / alpha_t + (down - r_t) eps + up z)

    Row: that of `ddim`; with eta = 1 also that of `ancestral`.

    Args:
        schedule, levels, objective, clip, eta: see `fastdiff.steps`.

    Returns: one row and one call of the model per step; first order.
    Raises: ValueError as `ddim`.
    Reference: k-diffusion's sample_euler_ancestral.
    """
    return ddim(schedule, levels, objective, clip, eta)


def ddim_inversion(schedule: NoiseSchedule, levels: Tensor, objective: str) -> StepTable:
    """DDIM from data to noise: the same ODE walked backwards, for increasing levels t < s.

        x0  = denoise(x_t)
        eps = noise of x_t by the same prediction
        x_s = alpha_s x0 + sigma_s eps

    Row: from_x, from_pred = what alpha_s x0 + sigma_s eps takes from x_t and pred; nothing is clipped.

    Args:
        schedule, objective: see `fastdiff.steps`.
        levels: (n + 1,) int64, increasing.

    Returns: one row and one call of the model per step. A first-order inverse of `ddim`: the error falls with the size
        of the steps.
    Raises: ValueError from level 0 with x0 or score, which say nothing of the noise in data.
    Reference: Song et al. 2021a, arXiv:2010.02502, section 4.3.
    """
    t, s = levels[:-1], levels[1:]
    if needs_noise(objective) and bool((t == 0).any()):
        raise ValueError(
            f"objective: {objective!r} cannot be inverted from level 0, where alpha_bar = 1 and the noise is not "
            "determined; use 'eps' or 'v', or end `steps` above it"
        )
    check_signal(schedule, t, objective)
    x0, eps = x0_rows(schedule, objective), conversion_rows(schedule, objective, "eps")
    from_x, from_pred = (schedule.alpha[s] * x0[i][t] + schedule.sigma[s] * eps[i][t] for i in (0, 1))
    return make_table(schedule, levels, from_x=from_x, from_pred=from_pred)


def heun(
    schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None = None, noise_scale: float = 1.0
) -> StepTable:
    """EDM's sampler in the coordinates of any schedule: Heun's rule for d(x/alpha) / d(sigma/alpha) = eps.

        eps = (x_t - alpha_t denoise(x_t)) / sigma_t
        x_s = alpha_s (x_t / alpha_t + h eps),    h = sigma_s / alpha_s - sigma_t / alpha_t       (Euler)
        x_s = alpha_s (x_t / alpha_t + h (eps + eps_s) / 2),    eps_s the same at Euler's x_s     (then Heun)

    Rows: Euler's is that of `ddim`, and keeps x_t in hist. Heun's takes x0 at s, x_s and hist: with r = sigma / alpha
    and g = (r_t / r_s - 1) / 2, from_x0 = alpha_s g; from_x = 1/2 - g; from_hist = alpha_s / (2 alpha_t).

    Args:
        schedule, objective, clip: see `fastdiff.steps`.
        levels: (n + 1,) int64. Where they rise, noise is added to match (churn); Process.karras makes such a grid.
        noise_scale: the standard deviation of churn's noise is multiplied by it.

    Returns: two rows and two calls of the model per level, and Euler's alone to data; second order. A rise is one row
        without a call.
    Raises: ValueError if sigma / alpha is infinite at a level, or noise_scale < 0.
    Reference: Karras et al. 2022, arXiv:2206.00364, algorithms 1 and 2.
    """
    as_not_negative("noise_scale", noise_scale)
    check_signal(schedule, levels[:-1], objective)
    check_finite_ratio("heun", schedule, levels[:-1])
    ratio = (-schedule.log_snr / 2).exp()
    rows, visited, kinds = [], [levels[:1]], []
    for t, s in itertools.pairwise(levels.split(1)):
        scale = schedule.alpha[s] / schedule.alpha[t]
        if ratio[s] > ratio[t]:
            sd = noise_scale * schedule.alpha[s] * (ratio[s] ** 2 - ratio[t] ** 2).sqrt()
            steps = [make_rows(scale, from_x=scale, noise=sd)]
        else:
            steps = [ddim(schedule, torch.cat((t, s)), objective, clip).rows]
            if s > 0:
                # x0hat at t follows from hist and x_s, so that half a step of each slope is left to do.
                half = 0.5 * (ratio[t] / ratio[s] - 1)
                values = x0_columns(schedule, s, s, objective, clip)
                values |= {"from_x0": schedule.alpha[s] * half, "from_x": 0.5 - half, "from_hist": 0.5 * scale}
                steps.append(make_rows(scale, guidance=1.0, **values))
        rows += steps
        visited += [s] * len(steps)
        kinds += ["add" if ratio[s] > ratio[t] else "predict"] * len(steps)
    return make_table(schedule, torch.cat(visited), torch.cat(rows), keep="x", kinds=kinds)
