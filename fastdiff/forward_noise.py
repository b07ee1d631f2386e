"""The noise of a training step: drawn once and kept, or drawn again by the loss."""

from typing import NamedTuple

from torch import Tensor

from . import ops
from .ops.memory import LARGEST
from .reference import work_dtype


class Noised(NamedTuple):
    """The states that a loss asks about, and the noise in them, or what draws it again."""

    x_t: Tensor
    seed: int | Tensor | None
    sample_ids: Tensor | None
    noise: Tensor | None


def kept_noise(
    x0: Tensor, index: int | Tensor, seed: Tensor, ids: Tensor | None = None, always: bool = False
) -> Tensor | None:
    """The noise of ops.noising(x0, index, seed=seed, sample_ids=ids), if keeping it costs less than drawing it again.

    That is so on a CPU, for tensors whose memory the C library recycles (see fastdiff.ops.memory). None elsewhere,
    unless `always`.
    """
    if not always and (not x0.is_cpu or 4 * x0.numel() > LARGEST):
        return None
    dtype, device = work_dtype(x0.dtype), x0.device
    return ops.normal(x0.shape, seed, sample_ids=ids, step=index, stream=ops.FORWARD, dtype=dtype, device=device)
