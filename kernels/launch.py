"""How every Triton kernel is laid over its tensors: grid, block size, table rows.

A program owns BLOCK elements of one sample, those that `owner` names.
"""

import functools
from collections.abc import Sequence
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
    do_not_specialize=["batch", "levels", "steps", "first"],
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
    return to_float32(tl.load(pointers, mask=mask))


@triton.jit
def to_float32(x):
    if x.dtype == tl.bfloat16:  # The upper half of a float32: one shift or mask, where the cast takes up to two.
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


def launch(
    kernel: Any, grid: tuple[int, ...], tensors: Sequence[Tensor | None], numbers: Sequence[int | float],
    constants: dict[str, Any],
) -> None:  # fmt: skip
    """kernel[grid](*tensors, *numbers, **constants): every operand in the order of the kernel.

    To look up the compiled kernel takes Triton longer than a small kernel runs. On NVIDIA it is asked once for each
    kind of operands that it tells apart: types, alignment to 16 bytes, and of integers 1, multiples of 16 and width.
    """
    if not on_nvidia(tensors[0]):
        kernel[grid](*tensors, *numbers, **constants)
        return
    key = (
        kernel.fn,
        tensors[0].get_device(),
        *constants.values(),
        *[None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors],
        *[None if type(v) is float else (v == 1, v % 16 == 0, v < 2**31) for v in numbers],
    )
    if found := _compiled.get(key):
        compiled, fixed = found
        compiled[grid](*tensors, *numbers, *fixed)
        return
    compiled = kernel[grid](*tensors, *numbers, **constants)
    _compiled[key] = compiled, [constants[p.name] for p in kernel.params if p.is_constexpr]


# By kind of operands: the kernel compiled for them, and its constants in their order.
_compiled: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}


def block_of(n: int, channels: int, generated: bool, *tensors: Tensor | None) -> dict[str, Any]:
    """CHANNELS, BLOCK, VEC and num_warps for samples of n elements: one 16-byte access of the narrowest type at a time;
    16 elements a thread, or 32 where no noise is drawn and the work before the first element weighs more."""
    return _block_of(n, channels, generated, min(t.element_size() for t in tensors if t is not None))


@functools.lru_cache
def _block_of(n: int, channels: int, generated: bool, narrow: int) -> dict[str, Any]:
    per_thread = 16 if generated else 32
    block = min(128 * per_thread, max(256, triton.next_power_of_2(n)))
    vec = 8 if narrow == 2 and channels == 1 else 4
    warps = max(1, block // (32 * per_thread))
    return {"CHANNELS": channels, "BLOCK": block, "VEC": vec, "num_warps": warps} | FUSED


def grid_of(batch: int, n: int, block: int) -> tuple[int, int, int]:
    return -(-n // block), min(batch, MAX_GRID_Y), -(-batch // MAX_GRID_Y)


def on_nvidia(x: Tensor) -> bool:
    """There the hardware's approximations stand in for the polynomials of the noise (FAST)."""
    return x.is_cuda and torch.version.hip is None


def sizes_of(x: Tensor) -> tuple[int, int]:
    """(B, elements of a sample) of x, which is not empty."""
    batch = x.shape[0]
    return batch, x.numel() // batch


def stride_of(index: Tensor) -> int:
    """0 where one index serves the whole batch, else 1."""
    return int(index.numel() > 1)
