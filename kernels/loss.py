"""Weighted regression loss L = w_t mean(rho(pred - y)), y = p_t x_0 + q_t z, with its gradient in the same pass.

The noise of the forward pass is drawn again, not read. Partial sums go through a second small kernel in a fixed order,
so equal inputs give equal bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import (
    FUSED,
    block_of,
    grid_of,
    kernel,
    launch,
    load_float32,
    on_nvidia,
    owner,
    row_of,
    sizes_of,
    stride_of,
)
from .layout import lay_out
from .noise import tile, tile_normals

REDUCE_BLOCK = 1024


@kernel
def loss_kernel(
    pred_ptr,  # (B, n), any floating type
    x0_ptr,  # (B, n) or None: p = 0
    noise_ptr,  # (B, n) or None: draw it
    partial_ptr,  # (B, blocks) float32
    grad_ptr,  # (B, n), any floating type, or None
    t_ptr,  # (1,) or (B,) int64
    table_ptr,  # (levels, 3) float32: p, q, w
    seed_ptr,  # (1,) int64, or None: given noise, or q = 0
    ids_ptr,  # (B,) int64 or None: sample i is number i
    batch, n, levels, t_stride, scale, grad_scale, delta,
    RHO: tl.constexpr,
    STREAM: tl.constexpr, FAST: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    sample, block = owner()
    if sample >= batch:
        return
    t, row, poison = row_of(t_ptr, t_stride, sample, levels)
    w = tl.load(table_ptr + row * 3 + 2) + poison

    start, offsets, mask = tile(block, n, CHANNELS, BLOCK)
    start += sample.to(tl.int64) * n
    residual = load_float32(pred_ptr + start + offsets, mask)
    if x0_ptr is not None:
        p = tl.load(table_ptr + row * 3)
        residual -= p * load_float32(x0_ptr + start + offsets, mask)
    if noise_ptr is not None:
        q = tl.load(table_ptr + row * 3 + 1)
        residual -= q * load_float32(noise_ptr + start + offsets, mask)
    elif seed_ptr is not None:
        q = tl.load(table_ptr + row * 3 + 1)
        number = sample if ids_ptr is None else tl.load(ids_ptr + sample)
        residual -= q * tile_normals(seed_ptr, number, t, block, n, STREAM, CHANNELS, BLOCK, VEC, FAST)

    if RHO == "mse":
        value = residual * residual
        slope = 2.0 * residual
    elif RHO == "l1":
        value = tl.abs(residual)
        slope = tl.where(residual > 0, 1.0, tl.where(residual < 0, -1.0, residual))
    else:  # Huber: r^2 / 2 up to delta, then delta (|r| - delta / 2)
        slope = tl.clamp(residual, -delta, delta, propagate_nan=tl.PropagateNan.ALL)
        value = slope * (residual - 0.5 * slope)
    total = tl.sum(tl.where(mask, value, 0.0))
    tl.store(partial_ptr + sample.to(tl.int64) * tl.num_programs(0) + block, total * (w * scale))
    if grad_ptr is not None:
        tl.store(grad_ptr + start + offsets, slope * (w * grad_scale), mask=mask)


@triton.jit
def reduce_kernel(partial_ptr, out_ptr, columns, BLOCK: tl.constexpr):
    """out[row] = sum of partial[row, :], always in the same order; partial (rows, columns) and out (rows,) float32."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + row * columns + column, mask=column < columns, other=0.0)
    tl.store(out_ptr + row, tl.sum(total))


@kernel
def scale_kernel(
    grad_ptr,  # (B, n), any floating type; scaled in place
    incoming_ptr,  # (1,) or (B,) float32
    batch, n, incoming_stride, factor, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, block = owner()
    if sample >= batch:
        return
    by = tl.load(incoming_ptr + sample.to(tl.int64) * incoming_stride) * factor
    if by != 1.0:
        start = block * BLOCK
        offsets = tl.arange(0, BLOCK)
        mask = start + offsets < n
        pointers = grad_ptr + sample.to(tl.int64) * n + start + offsets
        tl.store(pointers, load_float32(pointers, mask) * by, mask=mask)


def loss(
    out: Tensor, grad: Tensor | None, pred: Tensor, x0: Tensor | None, t: Tensor, table: Tensor,
    seed: Tensor | None, ids: Tensor | None, noise: Tensor | None, stream: int,
    rho: str, delta: float, scale: float, grad_scale: float,
) -> None:  # fmt: skip
    """Write scale w_t sum(rho) of each sample into out (B,), or of the whole batch into out (), float32; and
    grad_scale w_t rho' into grad, shaped like pred, if it is given."""
    generated = noise is None and seed is not None
    lead = pred if grad is None else grad
    channels, (laid, pred, x0, noise) = lay_out(lead, pred, x0, noise, generated=generated)
    batch, n = sizes_of(laid)
    meta = block_of(n, channels, generated, laid, pred, x0, noise)
    grid = grid_of(batch, n, meta["BLOCK"])
    partial = torch.empty(batch, grid[0], dtype=torch.float32, device=pred.device)
    launch(
        loss_kernel, grid, (pred, x0, noise, partial, None if grad is None else laid, t, table, seed, ids),
        (batch, n, table.shape[0], stride_of(t), scale, grad_scale, delta),
        {"RHO": rho, "STREAM": stream, "FAST": on_nvidia(laid), **meta},
    )  # fmt: skip
    reduce(partial, out)
    if grad is not None and laid is not grad:
        grad.copy_(laid)


def reduce(partial: Tensor, out: Tensor) -> None:
    """Write the sums of equal runs of partial, as many as out has elements, into out."""
    rows = out.numel()
    launch(reduce_kernel, (rows, 1, 1), (partial, out), (partial.numel() // rows,), {"BLOCK": REDUCE_BLOCK, **FUSED})


def scale_(grad: Tensor, incoming: Tensor, factor: float) -> None:
    """Gapless grad *= incoming * factor in place, incoming (1,) or (B,) float32; returns at once where that is 1."""
    batch, n = sizes_of(grad)
    meta = block_of(n, 1, False, grad)
    launch(
        scale_kernel, grid_of(batch, n, meta["BLOCK"]), (grad, incoming), (batch, n, stride_of(incoming), factor),
        {"BLOCK": meta["BLOCK"], "num_warps": meta["num_warps"], **FUSED},
    )  # fmt: skip
