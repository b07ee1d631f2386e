"""Multistep samplers through x0hat: exponential integrators over lambda = log(alpha / sigma) that remember estimates.

In lambda the probability-flow ODE, and with eta the reverse SDE, are linear but for x0(lambda):

    x_s = sigma_s / sigma_t e^(-eta h) x_t + alpha_s (1 + eta) int e^(-(1 + eta)(lambda_s - u)) x0(u) du + noise

with h = lambda_s - lambda_t. The rules differ in the polynomial through the last estimates that stands for x0(u). The
first step knows one estimate, and so does the step to data, which gives it. `fastdiff.steps` describes the common
arguments.

A start without signal, alpha = 0, is an estimate at lambda = -inf: it has no part in later steps.
"""

import math

import torch
from torch import Tensor

from ..schedule import NoiseSchedule
from ..support.scalars import as_not_negative, integer
from .table import StepTable, check_decreasing, make_table, x0_columns
from .weights import exponential_moments, phi, ring, weights_of

VARIANTS = ("bh1", "bh2")


def dpm_solver_pp_2m(schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None = None) -> StepTable:
    """DPM-Solver++(2M): an exponential integrator over lambda = log(alpha / sigma), with the last two estimates of x_0.

        x0  = denoise(x_t),    h = lambda_s - lambda_t,    w = h / (2 h_before)
        x   = (1 + w) x0 - w x0_before
        x_s = sigma_s / sigma_t x_t + alpha_s (1 - exp(-h)) x

    Row: with k = alpha_s (1 - exp(-h)): from_x0 = k (1 + w); from_x = sigma_s / sigma_t; from_hist = -k w, hist holds
    x0_before.

    Args:
        schedule, levels, objective, clip: see `fastdiff.steps`.

    Returns: one row and one call of the model per step; second order. The first step and the one to data are of first
        order, w = 0.
    Raises: ValueError if the prediction does not determine x_0 at a level.
    Reference: Lu et al. 2022, arXiv:2211.01095, algorithm 2.
    """
    return dpm_solver_pp_2m_sde(schedule, levels, objective, clip, eta=0.0)


def dpm_solver_pp_2m_sde(
    schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None = None, eta: float = 1.0
) -> StepTable:
    """DPM-Solver++(2M) for the reverse SDE: `dpm_solver_pp_2m` with noise.

        x0  = denoise(x_t),    h = lambda_s - lambda_t,    w = h / (2 h_before)
        x   = (1 + w) x0 - w x0_before
        x_s = sigma_s / sigma_t e^(-eta h) x_t + alpha_s (1 - e^(-(1 + eta) h)) x + sigma_s sqrt(1 - e^(-2 eta h)) z

    Row: as that of `dpm_solver_pp_2m` with k = alpha_s (1 - e^(-(1 + eta) h)).

    Args:
        schedule, levels, objective, clip: see `fastdiff.steps`.
        eta: 1 is the reverse SDE, 0 the ODE.

    Returns: one row and one call of the model per step; second order in mean and variance.
    Raises: ValueError if eta < 0.
    Reference: SDE-DPM-Solver++(2M) of Lu et al. 2022, arXiv:2211.01095; k-diffusion's sample_dpmpp_2m_sde ("midpoint").
    """
    as_not_negative("eta", eta)
    t, s = levels[:-1], levels[1:]
    denoised = x0_columns(schedule, t, s, objective, clip)
    h, from_x, noise = _drift(schedule, t, s, eta)
    k = schedule.alpha[s] * -torch.expm1(-(1 + eta) * h)
    w = torch.zeros_like(h)
    w[1:] = torch.where(s[1:] == 0, 0.0, h[1:] / (2 * h[:-1]))
    denoised |= {"from_x0": k * (1 + w), "from_x": from_x, "noise": noise, "from_hist": -k * w}
    return make_table(schedule, levels, keep="x0hat", **denoised)


def dpm_solver_pp_3m_sde(
    schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None = None, eta: float = 1.0
) -> StepTable:
    """DPM-Solver++(3M) SDE: three estimates of x_0, as in k-diffusion.

        x0    = denoise(x_t),    h = lambda_s - lambda_t,    H = (1 + eta) h
        r_0   = h_before / h,    r_1 = h_older / h
        d_0   = (x0 - x0_before) / r_0,    d_1 = (x0_before - x0_older) / r_1
        d     = d_0 + (d_0 - d_1) r_0 / (r_0 + r_1),    dd = (d_0 - d_1) / (r_0 + r_1)
        x_s   = sigma_s / sigma_t e^(-eta h) x_t + alpha_s ((1 - e^(-H)) x0 + H phi_2(-H) d + H phi_3(-H) dd)
                + sigma_s sqrt(1 - e^(-2 eta h)) z

    The integral of the parabola through the estimates has 2 H phi_3 dd. The published rule has half of it, and so do
    the third-order rules of DPM-Solver: it is of second order, with a smaller error than 2M.

    Row: from_x0 and hist are what the last line takes from the estimates; two slots in a ring.

    Args:
        schedule, levels, objective, clip: see `fastdiff.steps`.
        eta: 1 is the reverse SDE, 0 the ODE.

    Returns: one row and one call of the model per step; second order in mean and variance.
    Raises: ValueError if eta < 0.
    Reference: k-diffusion's sample_dpmpp_3m_sde; the functions phi are those of Lu et al. 2022, arXiv:2206.00927.
    """
    as_not_negative("eta", eta)
    check_decreasing("dpm++3m_sde", levels)
    t, s = levels[:-1], levels[1:]
    denoised = x0_columns(schedule, t, s, objective, clip)
    steps, from_x, noise = _drift(schedule, t, s, eta)
    rows = []
    h = steps.tolist()
    for i, (here, level) in enumerate(zip(h, s.tolist(), strict=True)):
        total = (1 + eta) * here
        # How d and dd depend on x0, x0_before and x0_older.
        slope, bend = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
        if i > 0 and level > 0:
            r0 = h[i - 1] / here
            slope = [1 / r0, -1 / r0, 0.0]
            if i > 1:
                r1 = h[i - 2] / here
                second = [1 / r0, -1 / r0 - 1 / r1, 1 / r1]
                slope = [a + b * r0 / (r0 + r1) for a, b in zip(slope, second, strict=True)]
                bend = [b / (r0 + r1) for b in second]
        own = [-math.expm1(-total), 0.0, 0.0]
        if level > 0 and math.isfinite(total):
            curve = total * phi(2, -total), total * phi(3, -total)
            own = [o + curve[0] * a + curve[1] * b for o, a, b in zip(own, slope, bend, strict=True)]
        rows.append(own)
    shares = torch.tensor(rows, dtype=torch.float64, device="cpu") * schedule.alpha[s][:, None]
    values = {"from_x0": shares[:, 0], "from_x": from_x, "noise": noise, **ring(shares[:, 1:])}
    return make_table(schedule, levels, keep="x0hat", slots=2, **denoised, **values)


def _drift(schedule: NoiseSchedule, t: Tensor, s: Tensor, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """(h, from_x, noise) of steps of the SDE with eta."""
    half_log_snr = schedule.log_snr / 2
    h = half_log_snr[s] - half_log_snr[t]
    decay = eta * h if eta else torch.zeros_like(h)  # 0 times infinity is NaN
    from_x = schedule.sigma[s] / schedule.sigma[t] * torch.exp(-decay)
    return h, from_x, schedule.sigma[s] * torch.expm1(-2 * decay).abs().sqrt()


def unipc(
    schedule: NoiseSchedule,
    levels: Tensor,
    objective: str,
    clip: float | None = None,
    order: int = 3,
    variant: str = "bh2",
) -> StepTable:
    """UniPC: the model's estimate at the predicted state corrects that state, and predicts the next one.

        x0  = denoise(x_t)
        x_t = sigma_t / sigma_r x_r + alpha_t int e^(-(lambda_t - u)) P(u) du    from lambda_r to lambda_t  (correct)
        x_s = sigma_s / sigma_t x_t + alpha_s int e^(-(lambda_s - u)) Q(u) du    from lambda_t to lambda_s  (predict)

    P is the polynomial through x0 and the estimates before it, Q that through the same but the oldest. r is the level
    before t, and x_r the corrected state there. It follows from the predicted x_t and the estimates that predicted it.
    So both lines are one row, and only estimates are remembered. Where Q is a line, or P has two points, the integral
    of the slope is replaced by B / 2: B = h for "bh1", 1 - e^(-h) for "bh2".

    Row: from_x = sigma_s / sigma_t; from_x0 and hist are what both lines take from the estimates; `order` slots in a
    ring. The state between steps is the predicted one.

    Args:
        schedule, levels, objective, clip: see `fastdiff.steps`.
        order: points of Q, 1 to 3. The first steps, and the last ones before data, have fewer.
        variant: "bh1" or "bh2".

    Returns: one row and one call of the model per step; of order `order` + 1 once all points are there.
    Raises: ValueError for another order or variant.
    Reference: Zhao et al. 2023, arXiv:2302.04867, algorithms 1 and 2, in the form that predicts data.
    """
    count = integer(order)
    if count is None or not 1 <= count <= 3:
        raise ValueError(f"order: expected 1, 2 or 3, got {order!r}")
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
    check_decreasing("unipc", levels)
    t, s = levels[:-1], levels[1:]
    denoised = x0_columns(schedule, t, s, objective, clip)
    place, alpha = (values[levels].tolist() for values in (schedule.log_snr / 2, schedule.alpha))
    keep = (schedule.sigma[s] / schedule.sigma[t]).tolist()
    n, to_data, lost = len(t), math.isinf(place[-1]), int(math.isinf(place[0]))
    rows = []
    before: list[float] = []  # the weights that predicted x_t
    for i in range(n):
        points = max(1, min(count, i + 1 - lost, n - i if to_data else count))
        following = _integral(place, alpha[i + 1], i, [i - j for j in range(points)], variant)
        own = [*following, *[0.0] * (count + 1 - points)]  # by the age of the estimate
        if i > lost:
            # from the state that was predicted with weights `before` to the corrected one
            corrected = _integral(place, alpha[i], i - 1, [i - j for j in range(len(before) + 1)], variant)
            for age, weight in enumerate(corrected):
                own[age] += keep[i] * weight
            for age, weight in enumerate(before):
                own[age + 1] -= keep[i] * weight
        rows.append(own)
        before = following
    shares, from_x = (torch.tensor(made, dtype=torch.float64, device="cpu") for made in (rows, keep))
    values = {"from_x0": shares[:, 0], "from_x": from_x, **ring(shares[:, 1:])}
    return make_table(schedule, levels, keep="x0hat", slots=count, **denoised, **values)


def _integral(place: list[float], alpha: float, i: int, points: list[int], variant: str) -> list[float]:
    """The weights of the estimates at `points` in alpha int e^(-(lambda_(i+1) - u)) P(u) du over step i, by UniPC."""
    h = place[i + 1] - place[i]
    whole = -math.expm1(-h)
    if len(points) == 1:
        return [alpha * whole]
    nodes = [(place[j] - place[i]) / h for j in points]
    if len(points) == 2:  # one point is the start of the step, node 0
        slope = 0.5 * (h if variant == "bh1" else whole) / (nodes[0] + nodes[1])
        own = [slope if node else whole - slope for node in nodes]
    else:
        own = weights_of(nodes, exponential_moments(len(points), h))
    return [alpha * w for w in own]
