"""The normal distribution function far out, with derivatives that keep their digits."""

import math

import torch
from torch import Tensor


def log_ndtr(z: Tensor) -> Tensor:
    """log Phi(z), as torch.special.log_ndtr, whose derivatives cancel far to the left."""
    left, right = z.clamp(max=-1), z.clamp(min=-1)
    below = (torch.special.erfcx(-left / math.sqrt(2)) / 2).log() - left * left / 2
    return torch.where(z < -1, below, torch.log1p(-torch.special.erfc(right / math.sqrt(2)) / 2))


def density_ratio(z: Tensor) -> Tensor:
    """phi(z) / Phi(z) of the normal distribution, without overflow: -z far to the left, 0 far to the right."""
    left, right = z.clamp(max=0), z.clamp(min=0)
    over = math.sqrt(2 / math.pi) / torch.special.erfcx(-left / math.sqrt(2))
    density = (-0.5 * right * right - 0.5 * math.log(2 * math.pi) - torch.special.log_ndtr(right)).exp()
    return torch.where(z < 0, over, density)
