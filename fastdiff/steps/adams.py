"""Multistep samplers through the noise: Adams-Bashforth rules for d(x / alpha) = eps d(sigma / alpha).

    eps = (x_t - alpha_t denoise(x_t)) / sigma_t
    x_s = alpha_s (x_t / alpha_t + w_0 eps + w_1 eps_before + ...)

What is remembered is eps. The rules differ in the curve through its last values, whose integral over rho = sigma /
alpha gives the weights. All raise ValueError where sigma / alpha is infinite. `fastdiff.steps` describes the common
arguments.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..rows import make_rows
from ..schedule import NoiseSchedule
from ..support.scalars import integer
from .table import StepTable, check_decreasing, check_finite_ratio, check_signal, make_table, x0_columns
from .weights import exponential_moments, ring, weights_of

# Adams-Bashforth for equal steps, newest first.
EQUAL = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def deis(
    schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None = None, order: int = 3
) -> StepTable:
    """DEIS: the curve is a polynomial in log rho, through `order` values of eps.

        w_a = int l_a(log rho) d rho    from rho_t to rho_s, l_a the Lagrange polynomial of value a

    Row: from_x0 and from_x = what x_s takes through eps; hist = alpha_s w_a, order - 1 slots in a ring, each an eps.

    Args:
        schedule, levels, objective, clip: see `fastdiff.steps`.
        order: 1 to 4. The first steps have fewer values; the step to data, where log rho = -inf, has one.

    Returns: one row and one call of the model per step; of order `order` once all values are there.
    Raises: ValueError for another order, or if sigma / alpha is infinite at a level.
    Reference: Zhang & Chen 2023, arXiv:2204.13902, tAB-DEIS with log rho for t, as in diffusers' "logrho".
    """

    def rule(rho: list[float], i: int, values: int) -> list[float]:
        if rho[i + 1] == 0:
            return [-rho[i]]
        h = math.log(rho[i] / rho[i + 1])
        nodes = [math.log(rho[i] / rho[i - a]) / h for a in range(values)]
        return [-rho[i + 1] * w for w in weights_of(nodes, exponential_moments(values, h, 1.0))]

    return _adams("deis", schedule, levels, objective, clip, order, rule)


def lms(
    schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None = None, order: int = 4
) -> StepTable:
    """The linear multistep method: the curve is a polynomial in rho, through `order` values of eps.

        w_a = int l_a(rho) d rho    from rho_t to rho_s, l_a the Lagrange polynomial of value a

    Row: as that of `deis`.

    Args:
        schedule, levels, objective, clip: see `fastdiff.steps`.
        order: 1 to 4. The first steps have fewer values.

    Returns: one row and one call of the model per step; of order `order` once all values are there.
    Raises: ValueError for another order, or if sigma / alpha is infinite at a level.
    Reference: k-diffusion's sample_lms; rho-AB-DEIS of Zhang & Chen 2023, arXiv:2204.13902.
    """

    def rule(rho: list[float], i: int, values: int) -> list[float]:
        h = rho[i + 1] - rho[i]
        nodes = [(rho[i - a] - rho[i]) / h for a in range(values)]
        return weights_of(nodes, [h / (j + 1) for j in range(values)])

    return _adams("lms", schedule, levels, objective, clip, order, rule)


def plms(schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None = None) -> StepTable:
    """PLMS, the linear multistep part of PNDM: Adams-Bashforth's weights for equal steps, whatever the steps are.

        w = (rho_s - rho_t) (55, -59, 37, -9) / 24    in the first steps (3, -1) / 2 and (23, -16, 5) / 12
        x_s = alpha_s (x_t / alpha_t + (rho_s - rho_t) (eps + eps_s) / 2)    at first, eps_s at Euler's x_s

    Rows: the first step is Euler's row and one that corrects it at s, from_hist = -alpha_s (rho_s - rho_t) / 2. The
    others are as those of `deis`, three slots in a ring; eps_s is not remembered.

    Args:
        schedule, levels, objective, clip: see `fastdiff.steps`.

    Returns: one row and one call of the model per step, and one more at the first; second order.
    Raises: ValueError if sigma / alpha is infinite at a level.
    Reference: Liu et al. 2022, arXiv:2202.09778, eq. 9 and 12; the first step is that of latent diffusion's PLMS.
    """
    rho = _ratios("plms", schedule, levels, objective)
    twice = rho[1] > 0
    starts = [0, 1, *range(1, len(rho) - 1)] if twice else [0]  # of each row; the second one goes nowhere
    ends = [1, 1, *range(2, len(rho))] if twice else [1]
    shares = torch.zeros(len(starts), 4, dtype=torch.float64, device="cpu")
    kept = torch.arange(len(starts), device="cpu") != 1
    for k, (i, j) in enumerate(zip(starts, ends, strict=True)):
        weights = EQUAL[max(0, min(k - 1, 3))]
        shares[k, : len(weights)] = (rho[j] - rho[i]) * torch.tensor(weights, dtype=torch.float64, device="cpu")
    if twice:
        shares[1, :2] = 0.5 * (rho[1] - rho[0]) * torch.tensor([1.0, -1.0], dtype=torch.float64, device="cpu")
    return _eps_table(schedule, levels[starts], levels[ends], objective, clip, shares, kept)


def _adams(
    name: str, schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None, order: int, rule: Any
) -> StepTable:
    """The table of a rule that gives the weights of so many values in step i."""
    count = integer(order)
    if count is None or not 1 <= count <= 4:
        raise ValueError(f"order: expected 1, 2, 3 or 4, got {order!r}")
    rho = _ratios(name, schedule, levels, objective)
    shares = []
    for i in range(len(rho) - 1):
        weights = rule(rho, i, min(count, i + 1))
        shares.append([*weights, *[0.0] * (max(2, count) - len(weights))])
    by_age = torch.tensor(shares, dtype=torch.float64, device="cpu")
    return _eps_table(schedule, levels[:-1], levels[1:], objective, clip, by_age)


def _ratios(name: str, schedule: NoiseSchedule, levels: Tensor, objective: str) -> list[float]:
    """rho at the levels."""
    check_decreasing(name, levels)
    check_signal(schedule, levels[:-1], objective)
    check_finite_ratio(name, schedule, levels[:-1])
    found: list[float] = (-schedule.log_snr / 2).exp()[levels].tolist()
    return found


def _eps_table(
    schedule: NoiseSchedule, t: Tensor, s: Tensor, objective: str, clip: float | None, shares: Tensor,
    kept: Tensor | None = None,
) -> StepTable:  # fmt: skip
    """Rows from the levels t to s that add the shares (n, K + 1) of eps, newest first, to x / alpha."""
    alpha_t, alpha_s, sigma = schedule.alpha[t], schedule.alpha[s], schedule.sigma[t]
    shares = alpha_s[:, None] * shares
    rows = make_rows(
        sigma,
        guidance=1.0,
        **x0_columns(schedule, t, s, objective, clip),
        from_x0=-shares[:, 0] * alpha_t / sigma,
        from_x=alpha_s / alpha_t + shares[:, 0] / sigma,
        kept_from_x0=-alpha_t / sigma,
        kept_from_x=1 / sigma,
        **ring(shares[:, 1:], kept),
    )
    visited = torch.cat((t, s[-1:]))
    return make_table(schedule, visited, rows, keep="mix", slots=shares.shape[1] - 1)
