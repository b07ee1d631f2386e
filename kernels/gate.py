"""A gate: out = hidden gelu(gate), hidden and gate the first and the second half of each row (Shazeer 2020, eq. 6).

gelu(g) = g Phi(g), Phi the normal distribution function, in float32, rounded once.
Moves, per element of the result: reads hidden and gate, writes out.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import FUSED, kernel, launch
from .tile import load_float32
from .vlb import INV_SQRT_2PI, mills

BLOCK, WIDEST = 2048, 256  # elements of a program, of which so many stand in a row: 256 divides most widths


@triton.jit
def gelu(g):
    """g Phi(g). Left of 0 it keeps its relative accuracy, which 1 + erf loses."""
    left = mills(tl.abs(g)) * (INV_SQRT_2PI * tl.exp(-0.5 * g * g))
    return g * tl.where(g > 0.0, 1.0 - left, left)


@kernel
def gated_gelu_kernel(
    x_ptr,  # (batch, 2 channels)  any floating type: hidden, gate
    out_ptr,  # (batch, channels)  any floating type, written
    batch, channels,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(channels, COLUMNS)
    program = tl.program_id(0)
    row = (program // across).to(tl.int64) * (BLOCK // COLUMNS) + tl.arange(0, BLOCK // COLUMNS)[:, None]
    column = (program % across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (row < batch) & (column < channels)
    pointers = x_ptr + row * (2 * channels) + column
    hidden = load_float32(pointers, mask)
    gate = load_float32(pointers + channels, mask)
    tl.store(out_ptr + row * channels + column, hidden * gelu(gate), mask=mask)


def gated_gelu(out: Tensor, x: Tensor) -> None:
    """Write the gated halves of x (..., 2 C) into out (..., C), which is contiguous."""
    channels = out.shape[-1]
    columns = min(WIDEST, triton.next_power_of_2(channels))
    batch = out.numel() // channels
    grid = triton.cdiv(batch, BLOCK // columns) * triton.cdiv(channels, columns), 1, 1
    launch(
        gated_gelu_kernel, grid, x_ptr=x.contiguous(), out_ptr=out, batch=batch, channels=channels,
        COLUMNS=columns, BLOCK=BLOCK, num_warps=4, **FUSED,
    )  # fmt: skip
