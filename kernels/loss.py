"""Weighted regression loss L = w_t mean(m rho(pred - y)), y = p_t x_0 + q_t z, with its gradient in the same pass.

The noise of the forward pass is drawn again, not read. rho(r) is r^2, |r|, or Huber's: r^2 / 2 up to delta, then
delta (|r| - delta / 2).

Moves, per element: reads pred (and x_0 if p != 0, and z and the mask m if given); writes the gradient if it is wanted.
`scale_kernel` reads and writes the gradient once more, if what comes in from the backward pass is not 1.
Row of the table: (p, q, w) of each level.
"""

import torch
import triton.language as tl
from torch import Tensor

from .launch import FUSED, block_of, grid_of, kernel, launch, on_nvidia
from .layout import lay_out, sizes_of, stride_of
from .noise import tile_normals
from .reduce import reduce
from .tile import load_float32, owner, table_row, tile


@kernel
def loss_kernel(
    pred_ptr,  # (batch, size)           any floating type
    x0_ptr,  # (batch, size) or None     any floating type; None: p = 0
    noise_ptr,  # (batch, size) or None  any floating type; None: draw z
    mask_ptr,  # (batch, size) or None   any floating type; None: m = 1
    partial_ptr,  # (batch, blocks)      float32, written: loss_scale w sum(m rho)
    grad_ptr,  # (batch, size) or None   any floating type, written: grad_scale w m rho'
    t_ptr,  # (1,) or (batch,)           int64
    table_ptr,  # (levels, 3)            float32: p, q, w
    seed_ptr,  # (1,) or None            int64; None: given noise, or q = 0
    ids_ptr,  # (batch,) or None         int64: the number of each sample; None: sample i is number i
    batch, size, levels, t_stride, loss_scale, grad_scale, delta,
    RHO: tl.constexpr,
    STREAM: tl.constexpr, FAST: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    sample, block = owner()
    if sample >= batch:
        return
    t, row, poison = table_row(t_ptr, t_stride, sample, levels)
    w = tl.load(table_ptr + row * 3 + 2) + poison

    start, offsets, mask = tile(block, size, CHANNELS, BLOCK)
    start += sample.to(tl.int64) * size
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
        residual -= q * tile_normals(seed_ptr, number, t, block, size, STREAM, CHANNELS, BLOCK, VEC, FAST)

    if RHO == "mse":
        value = residual * residual
        slope = 2.0 * residual
    elif RHO == "l1":
        value = tl.abs(residual)
        slope = tl.where(residual > 0, 1.0, tl.where(residual < 0, -1.0, residual))
    else:  # Huber: r^2 / 2 up to delta, then delta (|r| - delta / 2)
        slope = tl.clamp(residual, -delta, delta, propagate_nan=tl.PropagateNan.ALL)
        value = slope * (residual - 0.5 * slope)
    if mask_ptr is not None:
        m = load_float32(mask_ptr + start + offsets, mask)
        value *= m
        slope *= m
    total = tl.sum(tl.where(mask, value, 0.0))
    tl.store(partial_ptr + sample.to(tl.int64) * tl.num_programs(0) + block, total * (w * loss_scale))
    if grad_ptr is not None:
        tl.store(grad_ptr + start + offsets, slope * (w * grad_scale), mask=mask)


@kernel
def scale_kernel(
    grad_ptr,  # (batch, size)           any floating type; scaled in place
    incoming_ptr,  # (1,) or (batch,)    float32
    batch, size, incoming_stride, factor,
    BLOCK: tl.constexpr,
):  # fmt: skip
    sample, block = owner()
    if sample >= batch:
        return
    by = tl.load(incoming_ptr + sample.to(tl.int64) * incoming_stride) * factor
    if by != 1.0:
        start = block * BLOCK
        offsets = tl.arange(0, BLOCK)
        mask = start + offsets < size
        pointers = grad_ptr + sample.to(tl.int64) * size + start + offsets
        tl.store(pointers, load_float32(pointers, mask) * by, mask=mask)


def loss(
    out: Tensor, grad: Tensor | None, pred: Tensor, x0: Tensor | None, t: Tensor, table: Tensor,
    seed: Tensor | None, ids: Tensor | None, noise: Tensor | None, mask: Tensor | None, stream: int,
    rho: str, delta: float, loss_scale: float, grad_scale: float,
) -> None:  # fmt: skip
    """Write loss_scale w_t sum(m rho) of each sample into out (B,), or of the whole batch into out (), float32; and
    grad_scale w_t m rho' into grad, shaped like pred, if it is given."""
    generated = noise is None and seed is not None
    lead = pred if grad is None else grad
    channels, (written, pred, x0, noise, mask) = lay_out(lead, pred, x0, noise, mask, generated=generated)
    batch, size = sizes_of(written)
    constants = block_of(size, channels, generated, written, pred, x0, noise, mask)
    grid = grid_of(batch, size, constants["BLOCK"])
    partial = torch.empty(batch, grid[0], dtype=torch.float32, device=pred.device)
    launch(
        loss_kernel, grid,
        pred_ptr=pred, x0_ptr=x0, noise_ptr=noise, mask_ptr=mask,
        partial_ptr=partial, grad_ptr=None if grad is None else written,
        t_ptr=t, table_ptr=table, seed_ptr=seed, ids_ptr=ids,
        batch=batch, size=size, levels=table.shape[0], t_stride=stride_of(t),
        loss_scale=loss_scale, grad_scale=grad_scale, delta=delta,
        RHO=rho, STREAM=stream, FAST=on_nvidia(written), **constants,
    )  # fmt: skip
    reduce(partial, out)
    if grad is not None and written is not grad:
        grad.copy_(written)


def scale_(grad: Tensor, incoming: Tensor, factor: float) -> None:
    """grad *= incoming factor in place, incoming (1,) or (B,) float32; nothing is moved if that is 1.

    grad has no gaps, and the samples are outermost.
    """
    batch, size = sizes_of(grad)
    constants = block_of(size, 1, False, grad)
    block, warps = constants["BLOCK"], constants["num_warps"]
    launch(
        scale_kernel, grid_of(batch, size, block), grad_ptr=grad, incoming_ptr=incoming,
        batch=batch, size=size, incoming_stride=stride_of(incoming), factor=factor,
        BLOCK=block, num_warps=warps, **FUSED,
    )  # fmt: skip
