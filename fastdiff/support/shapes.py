"""Shapes of batches."""

import math

from torch import Tensor


def flat(x: Tensor) -> Tensor:
    """(B, n) of (B, ...), also where B is 0 or a sample is one number."""
    return x.reshape(len(x), math.prod(x.shape[1:]))
