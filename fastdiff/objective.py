"""What the model predicts, as rows: the training target, the way from one prediction to another, and the loss weights.

With x_t = alpha x_0 + sigma eps every pair of x_t and one of

    eps      the noise (Ho et al. 2020, arXiv:2006.11239)
    x0       the data
    v        alpha eps - sigma x_0 (Salimans & Ho 2022, arXiv:2202.00512)
    score    the gradient of log p(x_t): -eps / sigma in expectation (Vincent 2011; Song et al. 2021, arXiv:2011.13456)

gives all the others, linearly. A schedule here is anything with alpha, sigma, snr and log_snr per level.
"""

import torch
from torch import Tensor

from .schedule import NoiseSchedule

OBJECTIVES = ("eps", "x0", "v", "score")
WEIGHTINGS = ("simple", "min_snr", "vlb")
MIN_SNR_GAMMA = 5.0


def target_rows(schedule: NoiseSchedule, objective: str) -> tuple[Tensor, Tensor]:
    """(p, q), one per level each: the training target is y = p x_0 + q z.

    eps: z (Ho et al. 2020, eq. 14). x0: x_0. v: alpha z - sigma x_0 (Salimans & Ho 2022, app. D). score: -z / sigma,
    the score of q(x_t | x_0) (denoising score matching, Song & Ermon 2019, arXiv:1907.05600, eq. 5).
    """
    one = torch.ones_like(schedule.sigma)
    if objective == "score":
        return 0 * one, -1 / schedule.sigma
    return {
        "eps": (0 * one, one),
        "x0": (one, 0 * one),
        "v": (-schedule.sigma, schedule.alpha),
    }[objective]


def conversion_rows(schedule: NoiseSchedule, objective: str, wanted: str) -> tuple[Tensor, Tensor]:
    """(u, v), one per level each: what is wanted = u x_t + v pred, for any two of OBJECTIVES.

    Infinite or NaN where the prediction does not determine it: x0 from eps where alpha = 0, eps from x0 where sigma is.
    """
    alpha, sigma = schedule.alpha, schedule.sigma
    zero, one = torch.zeros_like(sigma), torch.ones_like(sigma)
    if wanted == objective:
        return zero, one
    norm = alpha**2 + sigma**2
    # Through eps, which is all that the score is.
    scale = -sigma if objective == "score" else one
    source = "eps" if objective == "score" else objective
    to_eps = {
        "eps": (zero, one),
        "x0": (1 / sigma, -alpha / sigma),
        "v": (sigma / norm, alpha / norm),
    }
    if wanted in ("eps", "score"):
        u, v = to_eps[source]
        by = -1 / sigma if wanted == "score" else one
        return by * u, by * v * scale
    u, v = {
        ("eps", "x0"): (1 / alpha, -sigma / alpha),
        ("eps", "v"): (-sigma / alpha, norm / alpha),
        ("x0", "v"): (alpha / sigma, -norm / sigma),
        ("v", "x0"): (alpha / norm, -sigma / norm),
    }[source, wanted]
    return u, v * scale


def x0_rows(schedule: NoiseSchedule, objective: str) -> tuple[Tensor, Tensor]:
    """(a, b), one per level each: x_0 = a x_t + b pred. For eps and score they are infinite where alpha_t = 0."""
    return conversion_rows(schedule, objective, "x0")


def weights(schedule: NoiseSchedule, objective: str, weighting: str) -> Tensor:
    """w_t on the error of the prediction, one per level.

    simple: 1 (Ho et al. 2020, eq. 14); for score sigma^2, which makes it the simple loss of eps (Song & Ermon 2019,
        eq. 6).
    min_snr: min(SNR, 5) on the error of x_0, that is times 1/SNR for eps and 1/(SNR + 1) for v (Hang et al. 2023,
        arXiv:2303.09556, section 3.4).
    vlb: (SNR_{t-1} - SNR_t) / 2 on the error of x_0: the terms of the variational bound in nats with the posterior
        variance (Kingma et al. 2021, arXiv:2107.00630, eq. 13). At t = 1, where that variance is 0, beta_1 stands for
        it, which gives 1 / (2 beta_1).
    likelihood: g^2 on the error of the score (Song et al. 2021, arXiv:2101.09258, theorem 1); for levels of an SDE.
    """
    if weighting == "simple":
        return schedule.sigma**2 if objective == "score" else torch.ones_like(schedule.sigma)
    if weighting == "likelihood":
        return schedule.rates[1] * conversion_rows(schedule, objective, "score")[1] ** 2
    if weighting == "vlb":
        return _bound_weights(schedule, objective)
    snr, sigma2 = schedule.snr, schedule.sigma**2
    norm = schedule.alpha**2 + sigma2
    # The error of the prediction is that of x_0 times the square root of this.
    per_error = {"eps": snr, "x0": torch.ones_like(snr), "v": norm**2 / sigma2, "score": schedule.alpha**2 / sigma2**2}
    # At SNR = 0 both cut-off and divisor vanish for eps: the ratio's limit is 1, and sigma^2 for the score.
    limit = {"eps": torch.ones_like(snr), "score": sigma2}.get(objective, torch.zeros_like(snr))
    return torch.where(snr > 0, snr.clamp(max=MIN_SNR_GAMMA) / per_error[objective], limit)


def _bound_weights(schedule: NoiseSchedule, objective: str) -> Tensor:
    t = torch.arange(1, len(schedule.sigma), device="cpu")
    log_snr = schedule.log_snr
    fall = log_snr[t - 1] - log_snr[t]
    # (SNR_{t-1} - SNR_t) / 2 = SNR_{t-1} (1 - SNR_t / SNR_{t-1}) / 2
    on_x0 = 0.5 * schedule.snr[t - 1] * -torch.expm1(-fall)
    on_eps = 0.5 * torch.expm1(fall)
    # 1 / (2 beta) at level 1, for x_1 = alpha x_0 + sigma eps.
    on_x0[0], on_eps[0] = 0.5 / schedule.sigma[1] ** 2, 0.5 / schedule.alpha[1] ** 2
    sigma, alpha = schedule.sigma[t], schedule.alpha[t]
    w = {
        "x0": on_x0,
        "eps": on_eps,
        "score": on_eps * sigma**2,
        "v": on_x0 * (sigma / (alpha**2 + sigma**2)) ** 2,
    }[objective]
    return torch.cat((w.new_zeros(1), w))
