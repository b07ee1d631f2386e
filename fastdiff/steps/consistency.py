"""Samplers of distilled models: a call of the model leads to data, and noise back to the next level.

Common arguments as in `through_x0`. Few steps, 1 to 8, are enough for a model that was distilled to them.
"""

from typing import Any

import torch
from torch import Tensor

from ..schedule import NoiseSchedule
from .table import StepTable, check_at_least_0, check_finite_ratio, make_table, x0_columns


def consistency(
    schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None = None, least: float = 0.0
) -> StepTable:
    """Multistep consistency sampling.

        x0  = denoise(x_t)
        x_s = alpha_s (x0 + sqrt(rho_s^2 - least^2) z),    rho = sigma / alpha

    Row: from_x0 = alpha_s; noise = alpha_s sqrt(rho_s^2 - least^2).

    Args:
        least: the rho at which the model returns its input: 0.002 for the models of Song et al.

    Returns: one row and one call of the model per step; no order, as the model is not a local estimate.
    Raises: ValueError if least < 0.
    Reference: Song et al. 2023, arXiv:2303.01469, algorithm 1.
    """
    check_at_least_0("least", least)
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
        tau = scaling (t - 1)

    Row: from_x0 = alpha_s c_out; from_x = alpha_s c_skip; noise = sigma_s.

    Args:
        levels: whole levels of a chain: tau counts the timesteps that the model sees.

    Returns: one row and one call of the model per step.
    Raises: ValueError for levels that are no timesteps.
    Reference: Luo et al. 2023, arXiv:2310.04378, algorithm 3 and section 4.1; the scaling of timesteps is diffusers'.
    """
    check_at_least_0("sigma_data", sigma_data)
    _check_whole("lcm", schedule)
    t, s = levels[:-1], levels[1:]
    tau = scaling * (t.double() - 1)
    size = tau**2 + sigma_data**2
    values = {"from_x0": schedule.alpha[s] * tau / size.sqrt(), "from_x": schedule.alpha[s] * sigma_data**2 / size}
    denoised = x0_columns(schedule, t, s, objective, clip)
    return make_table(schedule, levels, **denoised, **values, noise=schedule.sigma[s])


def tcd(
    schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None = None, gamma: float = 0.3
) -> StepTable:
    """Trajectory consistency: along the ODE to a level u below the next one, and with noise back to it.

        x0  = denoise(x_t),    eps = (x_t - alpha_t x0) / sigma_t,    u = floor((1 - gamma) (s - 1)) + 1
        x_u = alpha_u x0 + sigma_u eps
        x_s = alpha_s / alpha_u x_u + sqrt(sigma_s^2 - (alpha_s sigma_u / alpha_u)^2) z

    Row: with k = alpha_s sigma_u / alpha_u: from_x = k / sigma_t; from_x0 = alpha_s - alpha_t k / sigma_t; noise is the
    root. The step to data gives x0.

    Args:
        levels: whole levels of a chain: u counts timesteps.
        gamma: from 0, `ddim`, to 1, from level 1 up with new noise.

    Returns: one row and one call of the model per step.
    Raises: ValueError for gamma outside of [0, 1], and levels that are no timesteps.
    Reference: Zheng et al. 2024, arXiv:2402.19159, algorithm 3; the level u is that of diffusers.
    """
    check_at_least_0("gamma", gamma)
    if gamma > 1:
        raise ValueError(f"gamma: expected a number from 0 to 1, got {gamma}")
    _check_whole("tcd", schedule)
    t, s = levels[:-1], levels[1:]
    u = torch.where(s == 0, 0, ((1 - gamma) * (s - 1)).floor().long() + 1)
    check_finite_ratio("tcd", schedule, u)
    k = (schedule.log_alpha[s] - schedule.log_alpha[u]).exp() * schedule.sigma[u]
    from_x = k / schedule.sigma[t]
    values: dict[str, Any] = {"from_x0": schedule.alpha[s] - schedule.alpha[t] * from_x, "from_x": from_x}
    values["noise"] = (schedule.sigma[s] ** 2 - k**2).clamp(min=0).sqrt()
    return make_table(schedule, levels, **x0_columns(schedule, t, s, objective, clip), **values)


def _check_whole(name: str, schedule: NoiseSchedule) -> None:
    if schedule.time is not None:
        raise ValueError(f"sampler: {name!r} expected whole levels of a chain, got times; use 'consistency'")
