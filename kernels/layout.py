"""How the operands of a launch lie in memory. All tensors of a launch have the shape (batch, ...)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def sizes_of(x: Tensor) -> tuple[int, int]:
    """(batch, elements of a sample) of x, which is not empty."""
    batch = x.shape[0]
    return batch, x.numel() // batch


def stride_of(index: Tensor) -> int:
    """0 if one index serves the whole batch, else 1."""
    return int(index.numel() > 1)


def channels_of(x: Tensor) -> int:
    """1 if every sample of x is contiguous, C if it is channels last, 0 for any other layout.

    The stride between samples does not matter.
    """
    if x.is_contiguous():
        return 1
    shape, stride = x.shape[1:], x.stride()[1:]
    dims = list(range(len(shape)))
    for order, channels in ((dims, 1), ([*dims[1:], *dims[:1]], shape[0] if dims else 1)):
        expected = 1
        for i in reversed(order):
            if shape[i] > 1 and stride[i] != expected:
                break
            expected *= shape[i]
        else:
            return channels
    return 0


def lay_out(x: Tensor, *others: Tensor | None, generated: bool) -> tuple[int, list[Any]]:
    """(CHANNELS, the operands without gaps and in one layout): that of x if possible. Others are copied.

    CHANNELS = 1 walks a sample in memory order. Generated noise belongs to logical elements. So a sample stored
    channels last is walked in groups of four pixels of a channel, which needs 4 | H W and 32-bit offsets.
    """
    channels = 1
    if not x.is_contiguous():
        if not is_dense(x):
            x = x.contiguous()
        elif generated:
            size = x[0].numel()
            channels = channels_of(x)
            if channels == 0 or size % (4 * channels) or size >= 2**31:
                x, channels = x.contiguous(), 1
    return channels, [x, *(None if t is None else laid_like(x, t) for t in others)]


def is_dense(x: Tensor) -> bool:
    """Whether x fills one range of memory without gaps or overlaps, with the samples outermost."""
    if x.stride(0) != x[0].numel():
        return False
    expected = 1
    for stride, length in sorted(zip(x.stride(), x.shape, strict=True)):
        if length > 1:
            if stride != expected:
                return False
            expected *= length
    return True


def laid_like(x: Tensor, t: Tensor) -> Tensor:
    """t itself if it lies in memory as x does, else a copy that does."""
    if t.stride() == x.stride() or (t.is_contiguous() and x.is_contiguous()):
        return t
    return torch.empty_like(x, dtype=t.dtype).copy_(t)


def slots_like(x: Tensor, hist: Tensor | None) -> tuple[int, Tensor | None]:
    """(slots, hist) of hist, shaped like x or (slots, ...): itself if it lies as x does, slot by slot; else a copy."""
    if hist is None or hist.ndim == x.ndim:
        return 1, None if hist is None else laid_like(x, hist)
    if hist.stride(0) != x.numel() or not sliced_like(x, hist[0], x.stride(0)):
        strides = (x.numel(), *x.stride())
        hist = torch.empty_strided(hist.shape, strides, dtype=hist.dtype, device=hist.device).copy_(hist)
    return len(hist), hist


def sliced_like(x: Tensor, t: Tensor, stride: int) -> bool:
    """Whether every sample of t lies in memory as those of x do, `stride` elements after the one before."""
    given, own = t.stride(), x.stride()
    if given[0] != stride:
        return False
    return given[1:] == own[1:] or (t[0].is_contiguous() and x[0].is_contiguous())


def slices_like(x: Tensor, first: Tensor, *others: Tensor | None) -> list[Any]:
    """Tensors like x, often halves of one output. They stay as they are if their samples have the layout of x's and are
    the same distance apart. Else they are copies with the layout of x."""
    given = (first, *others)
    if all(t is None or sliced_like(x, t, first.stride(0)) for t in given):
        return [*given]
    return [None if t is None else laid_like(x, t) for t in given]


def strides_of(x: Tensor, channels: int) -> tuple[int, ...]:
    """The strides of a gapless tensor like x (B, C, ...), but of so many channels: channels last if x is, else
    contiguous."""

    def strides(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
        found, step = [0] * len(shape), 1
        for dim in order:  # from the innermost
            found[dim], step = step, step * shape[dim]
        return tuple(found)

    inner = list(range(x.ndim - 1, 1, -1))
    expected = strides(x.shape, [1, *inner, 0])
    strided = zip(x.shape, x.stride(), expected, strict=True)
    last = not x.is_contiguous() and all(n == 1 or stride == own for n, stride, own in strided)
    return strides((x.shape[0], channels, *x.shape[2:]), [1, *inner, 0] if last else [*inner, 1, 0])
