"""Shapes of batches."""

import math

from torch import Tensor


def fits(size: int, whole: int) -> bool:
    """Whether a dimension of `size` expands to `whole`. No `in`: Dynamo finds no number among sizes that may vary.

    They come from `shape`, never from `len`, which torch.export takes for a constant.
    """
    return size == 1 or size == whole


def flat(x: Tensor) -> Tensor:
    """(B, n) of (B, ...), also where B is 0 or a sample is one number."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))
