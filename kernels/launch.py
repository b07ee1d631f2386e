"""How every kernel of this package is laid over its tensors: memory layout, grid, block size.

All tensors of one call have the shape (B, ...). A program owns BLOCK elements of one sample; its sample and block are
`owner(batch)`. Kernels address by (sample stride, offset within the sample), so batch-strided views need no copy.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Grid axes 1 and 2 hold at most 65,535 programs; a power of two keeps the product exact.
MAX_GRID_Y = 32768
# The arithmetic is written for fused multiply-adds; Triton 3.10 stops contracting by default.
FUSED = {"enable_fp_fusion": True}


@triton.jit
def owner():
    """(sample, int64 block) of this program; the sample can lie beyond the batch in the last row of the grid."""
    return tl.program_id(2) * 32768 + tl.program_id(1), tl.program_id(0).to(tl.int64)


@triton.jit
def row_of(index_ptr, index_stride, sample, rows):
    """(index, its row, 0 or NaN): an index outside the table cannot be refused without a host sync, so it reads row 0
    and whatever is computed with it gets the NaN added."""
    index = tl.load(index_ptr + sample.to(tl.int64) * index_stride)
    known = index.to(tl.uint64, bitcast=True) < rows  # a negative index is a huge one
    return index, tl.where(known, index.to(tl.int32), 0), tl.where(known, 0.0, float("nan"))


def channels_of(x: Tensor) -> int:
    """1 where every sample of x is contiguous, C where it is channels last, 0 for any other layout.

    Says nothing of the stride between samples.
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


def lay_out(x: Tensor, *others: Tensor | None, generated: bool) -> tuple[int, list[Tensor | None]]:
    """(CHANNELS, gapless operands of one layout), that of x where possible; copies only what does not share it.

    CHANNELS = 1 walks a sample in memory order. Generated noise belongs to logical elements, so a sample stored
    channels last is walked by groups of four pixels of a channel, which needs 4 | H W and 32-bit offsets.
    """
    channels = 1
    if not x.is_contiguous():
        if not is_dense(x):
            x = x.contiguous()
        elif generated:
            n = x[0].numel()
            channels = channels_of(x)
            if channels == 0 or n % (4 * channels) or n >= 2**31:
                x, channels = x.contiguous(), 1
    return channels, [x, *(None if t is None else laid_like(x, t) for t in others)]


def is_dense(x: Tensor) -> bool:
    """Whether x fills one gapless, non-overlapping range of memory with the samples outermost."""
    return x.stride(0) == x[0].numel() and torch.empty_like(x, device="meta").stride() == x.stride()


def laid_like(x: Tensor, t: Tensor) -> Tensor:
    """t itself where it lies in memory as x does, else a copy that does."""
    if t.stride() == x.stride() or (t.is_contiguous() and x.is_contiguous()):
        return t
    return torch.empty_like(x, dtype=t.dtype).copy_(t)


def sliced_like(x: Tensor, t: Tensor, stride: int) -> bool:
    """Whether every sample of t lies in memory as those of x do, `stride` elements after the one before."""
    one, other = x[0], t[0]
    return t.stride(0) == stride and (
        one.stride() == other.stride() or (one.is_contiguous() and other.is_contiguous())
    )


def block_of(n: int, channels: int, generated: bool, *tensors: Tensor | None) -> dict[str, Any]:
    """CHANNELS, BLOCK, VEC and num_warps for samples of n elements: one 16-byte access of the narrowest type at a time;
    16 elements a thread, or 32 where no noise is drawn and the work before the first element weighs more."""
    narrow = min(t.element_size() for t in tensors if t is not None)
    per_thread = 16 if generated else 32
    block = min(128 * per_thread, max(256, triton.next_power_of_2(n)))
    vec = 8 if narrow == 2 and channels == 1 else 4
    warps = max(1, block // (32 * per_thread))
    return {"CHANNELS": channels, "BLOCK": block, "VEC": vec, "num_warps": warps} | FUSED


def grid_of(batch: int, n: int, block: int) -> tuple[int, int, int]:
    return triton.cdiv(n, block), min(batch, MAX_GRID_Y), triton.cdiv(batch, MAX_GRID_Y)


def is_fast(x: Tensor) -> bool:
    """Whether NVIDIA's hardware approximations may stand in for the polynomials of the noise."""
    return x.is_cuda and torch.version.hip is None


def stride_of(index: Tensor) -> int:
    """0 where one index serves the whole batch, else 1."""
    return int(index.numel() > 1)
