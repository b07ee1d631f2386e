"""How every Triton kernel is launched: grid, block size, and the compiled kernel that is remembered.

A launcher names the operands of its kernel: `launch(kernel, grid, x_ptr=x, size=size, BLOCK=block, num_warps=4)`.
"""

import functools
from typing import Any

import torch
import triton
from torch import Tensor

# Grid axes 1 and 2 hold at most 65,535 programs; a power of two keeps the product exact.
MAX_GRID_Y = 32768
# The arithmetic is written for fused multiply-adds; Triton 3.10 stops contracting by default.
FUSED = {"enable_fp_fusion": True}
# Decorates what is launched. The numbers of samples and rows, and the address of a number, change from step to step
# and from call to call. A kernel compiled for each of them gains nothing, and would be compiled within a sampling loop
# or the capture of a CUDA graph.
kernel = functools.partial(
    triton.jit,
    do_not_specialize=["batch", "levels", "steps", "first"],
    do_not_specialize_on_alignment=[
        f"{name}_ptr" for name in ("t", "step", "table", "rows", "seed", "ids", "incoming")
    ],
)


def launch(kernel: Any, grid: tuple[int, ...], **operands: Any) -> None:
    """kernel[grid](**operands): parameters and compiler options by name.

    Triton needs longer to look up the compiled kernel than a small kernel runs. On NVIDIA it is asked once for each
    kind of operands that it tells apart: types, alignment to 16 bytes, and of integers 1, multiples of 16 and width.
    """
    arguments = [operands[name] for name in kernel.arg_names]
    lead = next(a for a in arguments if isinstance(a, Tensor))
    if not on_nvidia(lead):
        kernel[grid](**operands)
        return
    fixed = [operands[p.name] for p in kernel.params if p.is_constexpr]
    key = (kernel.fn, lead.get_device(), operands.get("num_warps"), *fixed, *map(_kind, arguments))
    if found := _compiled.get(key):
        found[grid](*arguments)
        return
    _compiled[key] = kernel[grid](**operands)


# The kernel compiled for each kind of operands.
_compiled: dict[tuple[Any, ...], Any] = {}


def _kind(argument: Any) -> Any:
    """What Triton compiles a kernel for, of one argument."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if type(argument) is int:
        return argument == 1, argument % 16 == 0, argument < 2**31
    return None


def block_of(size: int, channels: int, generated: bool, *tensors: Tensor | None) -> dict[str, Any]:
    """CHANNELS, BLOCK, VEC and the compiler's options, for samples of `size` elements.

    A thread makes one 16-byte access of the narrowest type at a time. It has 16 elements, or 32 if no noise is
    generated: then the work before the first element weighs more.
    """
    return _block_of(size, channels, generated, min(t.element_size() for t in tensors if t is not None))


@functools.lru_cache
def _block_of(size: int, channels: int, generated: bool, narrowest: int) -> dict[str, Any]:
    per_thread = 16 if generated else 32
    block = min(128 * per_thread, max(256, triton.next_power_of_2(size)))
    vec = 8 if narrowest == 2 and channels == 1 else 4
    warps = max(1, block // (32 * per_thread))
    return {"CHANNELS": channels, "BLOCK": block, "VEC": vec, "num_warps": warps} | FUSED


def grid_of(batch: int, size: int, block: int) -> tuple[int, int, int]:
    """The grid in which every block of every sample has a program; see `tile.owner`."""
    return -(-size // block), min(batch, MAX_GRID_Y), -(-batch // MAX_GRID_Y)


def on_nvidia(x: Tensor) -> bool:
    """Whether x lies on an NVIDIA GPU: there the hardware's approximations replace the noise's polynomials (FAST)."""
    return x.is_cuda and torch.version.hip is None


def sizes_of(x: Tensor) -> tuple[int, int]:
    """(batch, elements of a sample) of x, which is not empty."""
    batch = x.shape[0]
    return batch, x.numel() // batch


def stride_of(index: Tensor) -> int:
    """0 if one index serves the whole batch, else 1."""
    return int(index.numel() > 1)
