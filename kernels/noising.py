"""Forward noising: x_t = alpha_t x_0 + sigma_t z   (Ho et al. 2020, eq. 4).

Moves, per element: reads x_0, writes x_t; z is drawn in registers, or read if `noise` is given.
Row of the table: (alpha, sigma) of each level.
"""

import triton.language as tl
from torch import Tensor

from .launch import block_of, grid_of, kernel, launch, on_nvidia
from .layout import lay_out, sizes_of, stride_of
from .noise import tile_normals
from .tile import load_float32, owner, table_row, tile


@kernel
def noising_kernel(
    x0_ptr,  # (batch, size)            any floating type
    noise_ptr,  # (batch, size) or None any floating type; None: draw z
    out_ptr,  # (batch, size)           any floating type, written: x_t
    t_ptr,  # (1,) or (batch,)          int64
    table_ptr,  # (levels, 2)           float32: alpha, sigma
    seed_ptr,  # (1,) or None           int64
    ids_ptr,  # (batch,) or None        int64: the number of each sample; None: sample i is number i
    batch, size, levels, t_stride,
    STREAM: tl.constexpr, FAST: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    sample, block = owner()
    if sample >= batch:
        return
    t, row, poison = table_row(t_ptr, t_stride, sample, levels)
    alpha = tl.load(table_ptr + row * 2) + poison
    sigma = tl.load(table_ptr + row * 2 + 1)

    start, offsets, mask = tile(block, size, CHANNELS, BLOCK)
    start += sample.to(tl.int64) * size
    x0 = load_float32(x0_ptr + start + offsets, mask)
    if noise_ptr is None:
        number = sample if ids_ptr is None else tl.load(ids_ptr + sample)
        z = tile_normals(seed_ptr, number, t, block, size, STREAM, CHANNELS, BLOCK, VEC, FAST)
    else:
        z = load_float32(noise_ptr + start + offsets, mask)
    tl.store(out_ptr + start + offsets, alpha * x0 + sigma * z, mask=mask)


def noising(
    out: Tensor, x0: Tensor, t: Tensor, table: Tensor,
    seed: Tensor | None, ids: Tensor | None, noise: Tensor | None, stream: int,
) -> None:  # fmt: skip
    """Write x_t into out (B, ...), shaped like x0."""
    generated = noise is None
    channels, (written, x0, noise) = lay_out(out, x0, noise, generated=generated)
    batch, size = sizes_of(written)
    constants = block_of(size, channels, generated, written, x0, noise)
    launch(
        noising_kernel, grid_of(batch, size, constants["BLOCK"]),
        x0_ptr=x0, noise_ptr=noise, out_ptr=written, t_ptr=t, table_ptr=table, seed_ptr=seed, ids_ptr=ids,
        batch=batch, size=size, levels=table.shape[0], t_stride=stride_of(t),
        STREAM=stream, FAST=on_nvidia(written), **constants,
    )  # fmt: skip
    if written is not out:
        out.copy_(written)
