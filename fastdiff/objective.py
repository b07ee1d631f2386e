"""What the model predicts, as rows: the training target, the way back to x_0, and the loss weight per level."""

import torch
from torch import Tensor

from .schedule import NoiseSchedule

OBJECTIVES = ("eps", "x0", "v")
WEIGHTINGS = ("simple", "min_snr")
MIN_SNR_GAMMA = 5.0


def target_rows(schedule: NoiseSchedule, objective: str) -> tuple[Tensor, Tensor]:
    """(p, q), each (T + 1,): the target is y = p x_0 + q z.

    eps: z (Ho et al. 2020, eq. 14). x0: x_0. v: alpha z - sigma x_0 (Salimans & Ho 2022, arXiv:2202.00512, app. D).
    """
    one = torch.ones_like(schedule.sigma)
    return {
        "eps": (0 * one, one),
        "x0": (one, 0 * one),
        "v": (-schedule.sigma, schedule.alpha),
    }[objective]


def x0_rows(schedule: NoiseSchedule, objective: str) -> tuple[Tensor, Tensor]:
    """(a, b), each (T + 1,): x_0 = a x_t + b pred. For eps they are infinite where alpha_t = 0."""
    alpha, sigma = schedule.alpha, schedule.sigma
    one = torch.ones_like(sigma)
    norm = alpha**2 + sigma**2
    return {
        "eps": (1 / alpha, -sigma / alpha),
        "x0": (0 * one, one),
        "v": (alpha / norm, -sigma / norm),
    }[objective]


def weights(schedule: NoiseSchedule, objective: str, weighting: str) -> Tensor:
    """w_t, (T + 1,). simple: 1 (Ho et al. 2020, eq. 14). min_snr: min(SNR, 5) on the error of x_0, that is times 1/SNR
    for eps and 1/(SNR + 1) for v (Hang et al. 2023, arXiv:2303.09556, section 3.4)."""
    if weighting == "simple":
        return torch.ones_like(schedule.sigma)
    snr = schedule.snr
    per_error = {"eps": snr, "x0": torch.ones_like(snr), "v": snr + 1}[objective]
    # At SNR = 0 both cut-off and divisor vanish for eps: the ratio's limit is 1.
    return torch.where(snr > 0, snr.clamp(max=MIN_SNR_GAMMA) / per_error, 1.0 if objective == "eps" else 0.0)
