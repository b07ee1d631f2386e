"""One term of the variational bound per sample, with its gradients in the same pass   (Ho et al. 2020, eq. 5).

    x0hat = clip(a x_t + b pred),  v = low, or low + (raw + 1) / 2 (high - low)
    nats  = KL(posterior || reverse step) = (v + exp(-v) - 1 + w (x_0 - x0hat)^2 exp(-v)) / 2,
            or the discretised Gaussian decoder -log p(x_0 | x_t) if the row says so (eq. 13)

A program serves one sample, so it takes one of the two branches.
Moves, per element: reads pred, x_t, x_0 (and raw if it is given); writes the gradients that are wanted.
Row of the table: (a, b, w, low, high, decoder) of each level.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .coefficients import KL, MILLS
from .launch import block_of, grid_of, kernel, launch, sizes_of, stride_of
from .layout import laid_like, lay_out, slices_like
from .reduce import reduce
from .tile import load_float32, owner, table_row, tile

M0, M1, M2, M3, M4, M5, M6, M7, M8, M9 = (tl.constexpr(c) for c in MILLS)
K0, K1, K2, K3, K4, K5, K6 = (tl.constexpr(c) for c in KL)
HALF_BIN = tl.constexpr(1 / 255)
HALF_LOG_2PI = tl.constexpr(0.9189385332046727)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def mills(x):
    """(1 - Phi(x)) / phi(x) for x >= 0."""
    i = 1.0 / (x + 3.0)
    t = 1.0 - 6.0 * i
    p = M9 * t + M8
    p = p * t + M7
    p = p * t + M6
    p = p * t + M5
    p = p * t + M4
    p = p * t + M3
    p = p * t + M2
    p = p * t + M1
    p = p * t + M0
    return p * i


@triton.jit
def gaussian_kl(error, w, delta):
    """(KL, its derivative by the mean of x_0, by delta) with 2 KL = delta + expm1(-delta) + w error^2 exp(-delta)."""
    e = tl.exp(-delta)
    k = K6 * delta + K5
    k = k * delta + K4
    k = k * delta + K3
    k = k * delta + K2
    k = k * delta + K1
    k = (k * delta + K0) * delta * delta
    near = tl.abs(delta) < 1.0
    pull = w * e * error
    spread = pull * error
    value = 0.5 * (tl.where(near, k, delta - 1.0 + e) + spread)
    return value, -pull, 0.5 * (tl.where(near, delta - k, 1.0 - e) - spread)


@triton.jit
def decoder_nats(x0, error, log_var):
    """(-log p, its derivative by the mean, by log_var), p = Phi(far) - Phi(near), the probability of the bin of x_0.

    By symmetry the bin's centre c, in standard deviations, is right of the mean (that of an open bin is on the side
    where it opens); it reaches from near = c - h to far = c + h. Everything is relative to phi(near), so that nothing
    underflows: p = phi(near) (mills(near) - decay mills(far)), decay = phi(far) / phi(near) = exp(-2 c h). Two cases
    are better otherwise. near < 0: p = 1 - (1 - Phi(-near)) - (1 - Phi(far)). A bin much smaller than the standard
    deviation: the integral of the density's series around c.
    """
    inverse = tl.exp(-0.5 * log_var)
    c = error * inverse
    h = HALF_BIN * inverse
    is_open = tl.abs(x0) > 0.999
    sign = tl.where(tl.where(is_open, x0, c) < 0.0, -1.0, 1.0)
    c = sign * c
    near = c - h
    far = c + h
    y = c * h
    decay = tl.where(is_open, 0.0, tl.exp(-2.0 * y))
    mills_near = mills(tl.abs(near))
    mills_far = decay * mills(tl.abs(far))
    inside = near < 0.0
    narrow = tl.where(is_open, 1.0, tl.maximum(10.0 * h, y)) < 0.5

    density = INV_SQRT_2PI * tl.exp(-0.5 * near * near)
    part = tl.where(inside, 1.0 - density * (mills_near + mills_far), mills_near - mills_far)
    ratio = tl.where(inside, density, 1.0) / part  # phi(near) / p
    by_c = (decay - 1.0) * ratio
    by_scale = ratio * (decay * far - near)  # c d/dc + h d/dh of log p
    offset = tl.where(inside, 0.0, 0.5 * near * near + HALF_LOG_2PI)

    # log p = log(2 h phi(c)) + log(sinh(y) / y) - h^2 / 6 + O(h^2 y^2 + h^4)
    y2 = y * y
    by_y = y * (0.33333334 - y2 * (0.022222222 - y2 * 0.0021164021))
    series = y2 * (0.16666667 - y2 * (0.0055555556 - y2 * 0.00035273369)) - 0.16666667 * h * h
    part = tl.where(narrow, 2.0 * h, part)
    offset = tl.where(narrow, 0.5 * c * c + HALF_LOG_2PI - series, offset)
    by_c = tl.where(narrow, h * by_y - c, by_c)
    by_scale = tl.where(narrow, 1.0 - c * c + 2.0 * y * by_y - 0.33333334 * h * h, by_scale)
    return offset - tl.log(part), by_c * sign * inverse, 0.5 * by_scale


@kernel
def vlb_kernel(
    pred_ptr,  # (batch, size)               any floating type, pred_stride between samples: often half of an output
    raw_ptr,  # (batch, size) or None        like pred; None: the variance is in the row
    x_t_ptr,  # (batch, size)                any floating type
    x0_ptr,  # (batch, size)                 any floating type
    partial_ptr,  # (batch, blocks)          float32, written: scale sum(nats)
    pred_grad_ptr,  # (batch, size) or None  any floating type, written: scale d nats / d pred
    raw_grad_ptr,  # (batch, size) or None   any floating type, written: scale d nats / d raw
    t_ptr,  # (1,) or (batch,)               int64
    rows_ptr,  # (levels, 6)                 float32: a, b, w, low, high, decoder
    batch, size, levels, pred_stride, t_stride, clip, scale,
    CLIP: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, block = owner()
    if sample >= batch:
        return
    _, index, poison = table_row(t_ptr, t_stride, sample, levels)
    row = rows_ptr + index * 6
    a, b, w = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    low, decoder = tl.load(row + 3), tl.load(row + 5)

    start, offsets, mask = tile(block, size, CHANNELS, BLOCK)
    at = sample.to(tl.int64) * pred_stride + start
    start += sample.to(tl.int64) * size
    x_t = load_float32(x_t_ptr + start + offsets, mask)
    x0 = load_float32(x0_ptr + start + offsets, mask)
    mean = a * x_t + b * load_float32(pred_ptr + at + offsets, mask)
    clipped = mean
    if CLIP:  # NaN stays NaN, as in torch.clamp
        clipped = tl.clamp(mean, -clip, clip, propagate_nan=tl.PropagateNan.ALL)
    error = x0 - clipped
    log_var, spread = low, 0.0
    if raw_ptr is not None:
        spread = tl.load(row + 4) - low
        log_var = low + (0.5 * load_float32(raw_ptr + at + offsets, mask) + 0.5) * spread

    if decoder != 0.0:
        value, by_mean, by_log_var = decoder_nats(x0, error, log_var)
    else:
        value, by_mean, by_log_var = gaussian_kl(error, w, log_var)

    total = tl.sum(tl.where(mask, value, 0.0))
    tl.store(partial_ptr + sample.to(tl.int64) * tl.num_programs(0) + block, total * (scale + poison))
    if pred_grad_ptr is not None:
        if CLIP:
            by_mean = tl.where(tl.abs(mean) > clip, 0.0, by_mean)
        tl.store(pred_grad_ptr + start + offsets, by_mean * (b * scale) + poison, mask=mask)
    if raw_grad_ptr is not None:
        tl.store(raw_grad_ptr + start + offsets, by_log_var * (0.5 * spread * scale) + poison, mask=mask)


def vlb(
    out: Tensor, pred_grad: Tensor | None, raw_grad: Tensor | None,
    pred: Tensor, raw: Tensor | None, x_t: Tensor, x0: Tensor, t: Tensor, rows: Tensor,
    clip: float | None, scale: float,
) -> None:  # fmt: skip
    """Write scale times the sum of each sample's nats into out (B,), or of the whole batch into out (1,), float32; and
    scale times the derivatives into the gradients, shaped like pred, that are given."""
    channels, (x_t, x0) = lay_out(x_t, x0, generated=False)
    pred, raw = slices_like(x_t, pred, raw)
    grads: list[Any] = [None if g is None else laid_like(x_t, g) for g in (pred_grad, raw_grad)]
    batch, size = sizes_of(x_t)
    constants = {k: v for k, v in block_of(size, channels, True, x_t, x0, pred, raw).items() if k != "VEC"}
    grid = grid_of(batch, size, constants["BLOCK"])
    partial = torch.empty(batch, grid[0], dtype=torch.float32, device=x_t.device)
    launch(
        vlb_kernel, grid,
        pred_ptr=pred, raw_ptr=raw, x_t_ptr=x_t, x0_ptr=x0, partial_ptr=partial,
        pred_grad_ptr=grads[0], raw_grad_ptr=grads[1], t_ptr=t, rows_ptr=rows,
        batch=batch, size=size, levels=rows.shape[0], pred_stride=pred.stride(0), t_stride=stride_of(t),
        clip=0.0 if clip is None else clip, scale=scale,
        CLIP=clip is not None, **constants,
    )  # fmt: skip
    reduce(partial, out)
    for grad, written in zip((pred_grad, raw_grad), grads, strict=True):
        if grad is not None and written is not grad:
            grad.copy_(written)
