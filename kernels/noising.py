"""Forward noising x_t = alpha_t x_0 + sigma_t z: reads x_0, writes x_t, and draws z in registers."""

import triton.language as tl
from torch import Tensor

from .launch import block_of, grid_of, kernel, launch, load_float32, on_nvidia, owner, row_of, sizes_of, stride_of
from .layout import lay_out
from .noise import tile, tile_normals


@kernel
def noising_kernel(
    x0_ptr,  # (B, n), any floating type
    noise_ptr,  # (B, n) or None: draw it
    out_ptr,  # (B, n), any floating type
    t_ptr,  # (1,) or (B,) int64
    table_ptr,  # (levels, 2) float32: alpha, sigma
    seed_ptr,  # (1,) int64 or None
    ids_ptr,  # (B,) int64 or None: sample i is number i
    batch, n, levels, t_stride,
    STREAM: tl.constexpr, FAST: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    sample, block = owner()
    if sample >= batch:
        return
    t, row, poison = row_of(t_ptr, t_stride, sample, levels)
    alpha = tl.load(table_ptr + row * 2) + poison
    sigma = tl.load(table_ptr + row * 2 + 1)

    start, offsets, mask = tile(block, n, CHANNELS, BLOCK)
    start += sample.to(tl.int64) * n
    x0 = load_float32(x0_ptr + start + offsets, mask)
    if noise_ptr is None:
        number = sample if ids_ptr is None else tl.load(ids_ptr + sample)
        z = tile_normals(seed_ptr, number, t, block, n, STREAM, CHANNELS, BLOCK, VEC, FAST)
    else:
        z = load_float32(noise_ptr + start + offsets, mask)
    tl.store(out_ptr + start + offsets, alpha * x0 + sigma * z, mask=mask)


def noising(
    out: Tensor, x0: Tensor, t: Tensor, table: Tensor,
    seed: Tensor | None, ids: Tensor | None, noise: Tensor | None, stream: int,
) -> None:  # fmt: skip
    """Write x_t into out (B, ...), shaped like x0."""
    generated = noise is None
    channels, (laid, x0, noise) = lay_out(out, x0, noise, generated=generated)
    batch, n = sizes_of(laid)
    meta = block_of(n, channels, generated, laid, x0, noise)
    launch(
        noising_kernel, grid_of(batch, n, meta["BLOCK"]),
        (x0, noise, laid, t, table, seed, ids), (batch, n, table.shape[0], stride_of(t)),
        {"STREAM": stream, "FAST": on_nvidia(laid), **meta},
    )  # fmt: skip
    if laid is not out:
        out.copy_(laid)
