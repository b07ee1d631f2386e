"""How every Triton kernel is laid over its tensors: grid, block size, table rows.

A program owns BLOCK elements of one sample, those that `owner` names.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Grid axes 1 and 2 hold at most 65,535 programs; a power of two keeps the product exact.
MAX_GRID_Y = 32768
# The arithmetic is written for fused multiply-adds; Triton 3.10 stops contracting by default.
FUSED = {"enable_fp_fusion": True}
# Decorates what is launched. The numbers of samples and rows, and where a number is read, differ from step to step and
# call to call: to compile for each would gain nothing, and happen within a sampling loop or a CUDA graph's capture.
kernel = functools.partial(
    triton.jit,
    do_not_specialize=["batch", "levels", "steps"],
    do_not_specialize_on_alignment=[
        f"{name}_ptr" for name in ("t", "step", "table", "rows", "seed", "ids", "incoming")
    ],
)


@triton.jit
def owner():
    """(sample, int64 block) of this program; the sample can lie beyond the batch in the last row of the grid."""
    return tl.program_id(2) * 32768 + tl.program_id(1), tl.program_id(0).to(tl.int64)


@triton.jit
def row_of(index_ptr, index_stride, sample, rows):
    """(index, its row, 0 or NaN): an index outside the table cannot be refused without a host sync, so it reads row 0
    and whatever is computed with it gets the NaN added."""
    index = tl.load(index_ptr + sample * index_stride)
    known = index.to(tl.uint64, bitcast=True) < rows  # a negative index is a huge one
    return index, tl.where(known, index.to(tl.int32), 0), tl.where(known, 0.0, float("nan"))


@triton.jit
def load_float32(pointers, mask):
    x = tl.load(pointers, mask=mask)
    if x.dtype == tl.bfloat16:  # The upper half of a float32: one shift or mask, where the cast takes up to two.
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


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
