"""Samplers of distilled models: a call of the model leads to data, and noise back to the next level.

Few steps, 1 to 8, are enough for a model that was distilled to them. `fastdiff.steps` describes the common arguments.
"""

import math

import torch
from torch import Tensor

from ..schedule import NoiseSchedule
from ..support.scalars import as_not_negative, as_positive, as_share
from .table import StepTable, make_table, x0_columns


def consistency(
    schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None = None, least: float = 0.0
) -> StepTable:
    """Multistep consistency sampling.

        x0  = denoise(x_t)
        x_s = alpha_s (x0 + sqrt(rho_s^2 - least^2) z),    rho = sigma / alpha

    Row: from_x0 = alpha_s; noise = alpha_s sqrt(rho_s^2 - least^2).

    Args:
        schedule, levels, objective, clip: see `fastdiff.steps`.
        least: the rho at which the model returns its input: 0.002 for the models of Song et al.

    Returns: one row and one call of the model per step; no order, as the model is not a local estimate.
    Raises: ValueError if least < 0.
    Reference: Song et al. 2023, arXiv:2303.01469, algorithm 1.
    """
    as_not_negative("least", least)
    t, s = levels[:-1], levels[1:]
    rest = (schedule.sigma[s] ** 2 - (least * schedule.alpha[s]) ** 2).clamp(min=0).sqrt()
    return make_table(
        schedule, levels, **x0_columns(schedule, t, s, objective, clip), from_x0=schedule.alpha[s], noise=rest
    )


def lcm(
    schedule: NoiseSchedule,
    levels: Tensor,
    objective: str,
    clip: float | None = None,
    sigma_data: float = 0.5,
    scaling: float = 10.0,
) -> StepTable:
    """Latent consistency models: `consistency` with the boundary condition as a part of the step.

        f   = c_skip x_t + c_out denoise(x_t)
        x_s = alpha_s f + sigma_s z
        c_skip = sigma_data^2 / (tau^2 + sigma_data^2),    c_out = tau / sqrt(tau^2 + sigma_data^2)

    tau = scaling (t - 1) counts the timesteps of a chain. Where there are none, between levels and on an SDE, f is
    denoise(x_t): c_skip is below 0.003 at all timesteps but 0.

    Row: from_x0 = alpha_s c_out; from_x = alpha_s c_skip; noise = sigma_s.

    Args:
        schedule, levels, objective, clip: see `fastdiff.steps`.
        sigma_data, scaling: of the boundary condition, as the model was distilled; sigma_data of at least 0.

    Returns: one row and one call of the model per step.
    Raises: ValueError if sigma_data < 0 or scaling <= 0.
    Reference: Luo et al. 2023, arXiv:2310.04378, algorithm 3 and section 4.1; the scaling of timesteps is diffusers'.
    """
    as_not_negative("sigma_data", sigma_data)
    as_positive("scaling", scaling)
    t, s = levels[:-1], levels[1:]
    tau = scaling * (t.double() - 1) if schedule.time is None else torch.full_like(t, math.inf, dtype=torch.float64)
    alpha, shift = schedule.alpha[s], sigma_data / tau
    skip = torch.where(tau == 0, 1.0, shift**2 / (1 + shift**2))
    out = torch.where(tau == 0, 0.0, 1 / (1 + shift**2).sqrt())
    denoised = x0_columns(schedule, t, s, objective, clip)
    return make_table(schedule, levels, **denoised, from_x0=alpha * out, from_x=alpha * skip, noise=schedule.sigma[s])


def tcd(
    schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None = None, gamma: float = 0.3
) -> StepTable:
    """Trajectory consistency: along the ODE to a level u below the next one, and with noise back to it.

        x0  = denoise(x_t),    eps = (x_t - alpha_t x0) / sigma_t,    u = floor((1 - gamma) (s - 1)) + 1
        x_s = alpha_s (x0 + rho_u eps + sqrt(rho_s^2 - rho_u^2) z),    rho = sigma / alpha

    u counts the timesteps of a chain. Where there are none, between levels and on an SDE, rho_u = (1 - gamma) rho_s.

    Row: from_x = alpha_s rho_u / sigma_t; from_x0 = alpha_s - alpha_t from_x; noise = alpha_s sqrt(rho_s^2 - rho_u^2).

    Args:
        schedule, levels, objective, clip: see `fastdiff.steps`.
        gamma: from 0, `ddim`, to 1, new noise at every level.

    Returns: one row and one call of the model per step.
    Raises: ValueError for gamma outside of [0, 1].
    Reference: Zheng et al. 2024, arXiv:2402.19159, algorithm 3; the level u is that of diffusers.
    """
    as_share("gamma", gamma)
    t, s = levels[:-1], levels[1:]
    denoised = x0_columns(schedule, t, s, objective, clip)
    if schedule.time is None:
        u = torch.where(s == 0, 0, ((1 - gamma) * (s - 1)).floor().long() + 1)
        on_eps = schedule.sigma[u] * (schedule.log_alpha[s] - schedule.log_alpha[u]).exp()
    else:
        on_eps = (1 - gamma) * schedule.sigma[s]
    from_x = on_eps / schedule.sigma[t]
    return make_table(
        schedule, levels, **denoised, from_x0=schedule.alpha[s] - schedule.alpha[t] * from_x, from_x=from_x,
        noise=(schedule.sigma[s] ** 2 - on_eps**2).clamp(min=0).sqrt(),
    )  # fmt: skip
