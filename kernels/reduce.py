"""Sums in a fixed order: equal inputs give equal bits.

A kernel leaves one partial sum per program; `reduce_kernel` adds them up, without atomics.

    out[row] = sum over columns of partial[row, column]

Moves: reads rows x columns float32, writes rows float32.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import FUSED, launch

BLOCK_COLUMNS = 1024


@triton.jit
def reduce_kernel(
    partial_ptr,  # (rows, columns) float32
    out_ptr,  # (rows,) float32, written
    columns,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + row * columns + column, mask=column < columns, other=0.0)
    tl.store(out_ptr + row, tl.sum(total))


def reduce(partial: Tensor, out: Tensor) -> None:
    """Write the sums of partial into out: as many equal runs of partial as out has elements."""
    rows = out.numel()
    launch(
        reduce_kernel,
        (rows, 1, 1),
        partial_ptr=partial,
        out_ptr=out,
        columns=partial.numel() // rows,
        BLOCK=BLOCK_COLUMNS,
        **FUSED,
    )
