"""What the model predicts, as rows: the training target, the way from one prediction to another, and the loss weights.

Every prediction is a mixture of data and noise, `scale pred = p x_0 + q eps`. So is the state, x_t = alpha x_0 +
sigma eps. Two mixtures give both unknowns:

    D   = alpha q - sigma p
    x_0 = (q x_t - sigma scale pred) / D
    eps = (alpha scale pred - p x_t) / D

An error of pred is an error of x_0 times sigma scale / D, and one of eps times alpha scale / D. Where D = 0, x_t and
pred are the same mixture, and nothing else follows from them.

A schedule here is anything with alpha, sigma, snr and log_snr, one per level, and sigma_data.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .schedule import NoiseSchedule
from .support.choices import did_you_mean
from .support.scalars import as_number


def edm(alpha: Any, sigma: Any, sigma_data: float = 0.5) -> tuple[Any, Any, Any]:
    """F of D(x; r) = c_skip x + c_out F(c_in x), r = sigma / alpha (Karras et al. 2022, arXiv:2206.00364, table 1).

    With s = sigma_data and n = sqrt(sigma^2 + s^2 alpha^2): F = sigma / (s n) x_0 - s alpha / n eps. For data of
    variance s^2 its variance is 1.
    """
    n = (sigma**2 + (sigma_data * alpha) ** 2) ** 0.5
    return sigma / (sigma_data * n), -sigma_data * alpha / n, 1.0


# (p, q, scale) at a level (alpha, sigma). Everything else about an objective follows from its row.
# scale is 1 but for the score, which is infinite on data: sigma score = -eps stays finite.
OBJECTIVES: dict[str, Callable[..., tuple[Any, Any, Any]]] = {
    "eps": lambda alpha, sigma: (0.0, 1.0, 1.0),  # the noise (Ho et al. 2020, arXiv:2006.11239)
    "x0": lambda alpha, sigma: (1.0, 0.0, 1.0),  # the data
    "v": lambda alpha, sigma: (-sigma, alpha, 1.0),  # velocity (Salimans & Ho 2022, arXiv:2202.00512)
    "score": lambda alpha, sigma: (0.0, -1.0, sigma),  # grad log p(x_t) (Song et al. 2021, arXiv:2011.13456)
    "flow": lambda alpha, sigma: (-1.0, 1.0, 1.0),  # eps - x_0, dx/dt of straight paths (Liu et al. 2023)
    "edm": edm,
}
# A weighting that a user gives: (levels, objective) -> w (levels,) on the squared error of the prediction.
Weighting = Callable[[NoiseSchedule, str], Tensor]
WEIGHTINGS = ("simple", "min_snr", "vlb")
MIN_SNR_GAMMA = 5.0
# Before another gamma in the name of a weighting, as in "min_snr:3".
WITH_GAMMA = "min_snr:"


def uses_x0(objective: str) -> bool:
    """Whether the training target holds x_0, which it does where p != 0."""
    return bool(OBJECTIVES[objective](0.6, 0.8)[0] != 0)


def uses_noise(objective: str) -> bool:
    """Whether the training target holds eps, which it does where q != 0."""
    return bool(OBJECTIVES[objective](0.6, 0.8)[1] != 0)


def needs_signal(objective: str) -> bool:
    """Whether the prediction leaves x_0 open in pure noise, alpha = 0: D = 0 there."""
    return _information(objective, 0.0, 1.0) == 0


def needs_noise(objective: str) -> bool:
    """Whether the prediction leaves eps open on data, sigma = 0: D scale = 0 there."""
    return _information(objective, 1.0, 0.0) == 0


def target_rows(schedule: NoiseSchedule, objective: str) -> tuple[Tensor, Tensor]:
    """(p, q) of the training target y = p x_0 + q z, one per level each.

    Args:
        schedule: the noise levels.
        objective: a name of OBJECTIVES.

    Returns: eps: (0, 1). x0: (1, 0). v: (-sigma, alpha). score: (0, -1 / sigma), the score of q(x_t | x_0).
        flow: (-1, 1). edm: see `edm`.
    Reference: Ho et al. 2020, eq. 14; Salimans & Ho 2022, app. D; Song & Ermon 2019, arXiv:1907.05600, eq. 5; Liu et
        al. 2023, arXiv:2209.03003, eq. 1.
    """
    p, q, scale = _row(schedule, objective)
    return torch.where(p == 0, p, p / scale), q / scale  # 0, also where scale is


def conversion_rows(schedule: NoiseSchedule, objective: str, wanted: str) -> tuple[Tensor, Tensor]:
    """(u, v), one per level each: wanted = u x_t + v pred, for any two of OBJECTIVES.

    With (p', q', scale') of what is wanted and D' = alpha q' - sigma p':

        u = (p' q - q' p) / (D scale')
        v = D' scale / (D scale')

    Args:
        schedule: the noise levels.
        objective: what pred is.
        wanted: what to make of it.

    Returns: rows that are infinite or NaN where x_t and pred do not determine what is wanted: x0 from eps where alpha
        is 0, eps from x0 where sigma is.
    """
    alpha, sigma = schedule.alpha, schedule.sigma
    if wanted == objective:
        return torch.zeros_like(sigma), torch.ones_like(sigma)
    p, q, scale = _row(schedule, objective)
    p_wanted, q_wanted, scale_wanted = _row(schedule, wanted)
    d, d_wanted = alpha * q - sigma * p, alpha * q_wanted - sigma * p_wanted
    cross = p_wanted * q - q_wanted * p
    # x_t says nothing that pred does not, and what is wanted is a multiple of pred.
    multiple = (d == 0) & (cross == 0)
    u = torch.where(multiple, 0.0, cross / d)
    v = torch.where(multiple, (p * p_wanted + q * q_wanted) / (p * p + q * q), d_wanted / d)
    return u * (1 / scale_wanted), v * scale * (1 / scale_wanted)


def x0_rows(schedule: NoiseSchedule, objective: str) -> tuple[Tensor, Tensor]:
    """(u, v), one per level each: x_0 = u x_t + v pred. Infinite where alpha = 0 and the objective needs a signal."""
    return conversion_rows(schedule, objective, "x0")


def min_snr(schedule: NoiseSchedule, objective: str, gamma: float = MIN_SNR_GAMMA) -> Tensor:
    """w_t = min(SNR_t, gamma) on the squared error of x_0, as one on that of the prediction; (levels,).

        DDPM(model, weighting=functools.partial(min_snr, gamma=3))

    Args:
        schedule: the noise levels.
        objective: what the model predicts.
        gamma: above 0.

    Raises: ValueError for another gamma.
    Reference: Hang et al. 2023, arXiv:2303.09556, section 3.4.
    """
    if not as_number("gamma", gamma) > 0:
        raise ValueError(f"gamma: expected a number above 0, got {gamma}")
    x0_error, eps_error = _errors(schedule, objective)
    return torch.minimum(eps_error, gamma * x0_error)  # without SNR = 0 times an infinite error


def check_weighting(weighting: str | Weighting, names: tuple[str, ...]) -> None:
    """A function, one of the names, or min_snr with a gamma. ValueError for anything else."""
    if callable(weighting) or weighting in names:
        return
    if not isinstance(weighting, str) or not weighting.startswith(WITH_GAMMA):
        raise ValueError(
            f"weighting: expected one of {', '.join(names)}, got {weighting!r}{did_you_mean(weighting, names)}"
        )
    try:
        ok = float(weighting.removeprefix(WITH_GAMMA)) > 0
    except ValueError:
        ok = False
    if not ok:
        raise ValueError(f"weighting: expected {WITH_GAMMA}GAMMA with a number above 0, got {weighting!r}")


def weights(schedule: NoiseSchedule, objective: str, weighting: str | Weighting) -> Tensor:
    """w_t on the squared error of the prediction, one per level.

    Args:
        schedule: the noise levels.
        objective: what the model predicts.
        weighting: the quantity whose error counts alike at all levels, or as often as said here:
            "simple": scale pred, so 1, and sigma^2 for the score, which makes it the simple loss of eps.
            "min_snr": x_0, min(SNR, 5) times. "min_snr:3": min(SNR, 3) times.
            "vlb": x_0, (SNR_{t-1} - SNR_t) / 2 times: the terms of the variational bound in nats with the posterior
                variance. At t = 1, where that variance is 0, beta_1 stands for it, which gives 1 / (2 beta_1).
            "likelihood": the score, g^2 times; for levels of an SDE.
            Or a function of the schedule and the objective that returns w_t, as `min_snr` is. w_t may have a gradient
            (learned weights); else a chain asks once and keeps the answer.

    Raises: ValueError for "likelihood" without rates of an SDE, and for a function that returns anything but a number
        for each level.
    Reference: simple: Ho et al. 2020, eq. 14; Song & Ermon 2019, eq. 6. min_snr: Hang et al. 2023, arXiv:2303.09556,
        section 3.4. vlb: Kingma et al. 2021, arXiv:2107.00630, eq. 13. likelihood: Song et al. 2021,
        arXiv:2101.09258, theorem 1.
    """
    if callable(weighting):
        w = weighting(schedule, objective)
        if not isinstance(w, Tensor) or w.shape != schedule.sigma.shape:
            got = tuple(w.shape) if isinstance(w, Tensor) else type(w).__name__
            raise ValueError(f"weighting: expected shape {tuple(schedule.sigma.shape)} of the function, got {got}")
        return w.to(schedule.sigma)
    if weighting == "simple":
        return _row(schedule, objective)[2] ** 2
    if weighting == "likelihood":
        return schedule.rates[1] * conversion_rows(schedule, objective, "score")[1] ** 2
    if weighting == "vlb":
        return _bound_weights(schedule, objective, *_errors(schedule, objective))
    gamma = weighting.removeprefix(WITH_GAMMA)
    return min_snr(schedule, objective, MIN_SNR_GAMMA if gamma == weighting else float(gamma))


def _errors(schedule: NoiseSchedule, objective: str) -> tuple[Tensor, Tensor]:
    """What a squared error 1 of pred is worth in x_0 and in eps; the first over the second is 1 / SNR."""
    x0, eps = (conversion_rows(schedule, objective, wanted)[1] ** 2 for wanted in ("x0", "eps"))
    return x0, eps


def _bound_weights(schedule: NoiseSchedule, objective: str, x0_error: Tensor, eps_error: Tensor) -> Tensor:
    t = torch.arange(1, len(schedule.sigma), device="cpu")
    log_snr = schedule.log_snr
    fall = log_snr[t - 1] - log_snr[t]
    # (SNR_{t-1} - SNR_t) / 2 = SNR_{t-1} (1 - SNR_t / SNR_{t-1}) / 2
    on_x0 = 0.5 * schedule.snr[t - 1] * -torch.expm1(-fall)
    on_eps = 0.5 * torch.expm1(fall)
    # 1 / (2 beta) at level 1, for x_1 = alpha x_0 + sigma eps.
    on_x0[0], on_eps[0] = 0.5 / schedule.sigma[1] ** 2, 0.5 / schedule.alpha[1] ** 2
    # Through x_0, unless the prediction is noise alone: its error of x_0 grows beyond all numbers as alpha goes to 0.
    w = on_x0 * x0_error[t] if uses_x0(objective) else on_eps * eps_error[t]
    return torch.cat((w.new_zeros(1), w))


def _row(schedule: NoiseSchedule, objective: str) -> tuple[Tensor, Tensor, Tensor]:
    """(p, q, scale), one per level each."""
    row, sigma = OBJECTIVES[objective], schedule.sigma
    parts = row(schedule.alpha, sigma, schedule.sigma_data) if row is edm else row(schedule.alpha, sigma)
    p, q, scale = (part if isinstance(part, Tensor) else torch.full_like(sigma, part) for part in parts)
    return p, q, scale


def _information(objective: str, alpha: float, sigma: float) -> float:
    """D scale: how much x_t and pred say of x_0 and eps together; 0 where they leave one open."""
    p, q, scale = OBJECTIVES[objective](alpha, sigma)
    return float((alpha * q - sigma * p) * scale)
