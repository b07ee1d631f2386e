"""Rows and operands of the terms of the variational bound."""

import mpmath
import torch
from strategies import DEVICE, table, tensor
from torch import Tensor

ROWS = 6


def bound_rows(salt: int) -> Tensor:
    """(ROWS, 6) float32: terms of a chain in the even rows; decoders with deviations around a bin in the odd."""
    generator = torch.Generator().manual_seed(salt + 5)
    u = torch.rand(ROWS, 3, generator=generator)
    decoder = torch.arange(ROWS) % 2
    low = torch.where(decoder == 1, 12 * u[:, 1] - 11, 4 * u[:, 1] - 1)
    rows = torch.stack((8 * u[:, 0] - 3, low, low + 4 * u[:, 2] - 1, decoder), 1)
    rows[:, 0].exp_()
    return torch.cat((table(ROWS, 2, salt), rows.to(DEVICE)), 1)


def inputs(shape: tuple[int, ...], salt: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """(pred, raw, x_t, x0)."""
    return [tensor(shape, dtype, salt=salt + i) for i in range(4)]


def nats_of(x0: float, mean: float, std: float) -> mpmath.mpf:
    """-log of the probability of x_0's bin, as it is written (Ho et al. 2020, eq. 13)."""
    upper = mpmath.inf if x0 > 0.999 else (mpmath.mpf(x0) + mpmath.mpf(1) / 255 - mean) / std
    lower = -mpmath.inf if x0 < -0.999 else (mpmath.mpf(x0) - mpmath.mpf(1) / 255 - mean) / std
    if lower > 0:
        upper, lower = -lower, -upper
    return -mpmath.log(mpmath.ncdf(upper) - mpmath.ncdf(lower))
