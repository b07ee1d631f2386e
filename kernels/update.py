"""The reverse update of every sampler: x' = c x0hat + d x + e pred + f z + g hist, x0hat = clip(a x + b pred).

One row of the step table holds the numbers. Its columns, with the names that the rest of the package uses:

    a, b        x0_from_x, x0_from_pred
    c, d, e     from_x0, from_x, from_pred
    f, h        noise, noise_high: with a learned variance, exp(f + r (h - f)) replaces f, r = (raw + 1) / 2
    g           from_hist
    w           guidance: pred becomes uncond + w (pred - uncond)

With several slots of history, or a mix that is kept, a row has more of them:

    g2, g3      from_hist2, from_hist3: of the slots hist[1] and hist[2]
    s           slot: the one that is overwritten
    p, q        kept_from_x0, kept_from_x: the mix that is kept, p x0hat + q x

With KEEP = "new mix" or "new x0hat" hist is a second output: it is written, and nothing is read.

Moves, per element: reads x and pred (and uncond, raw, noise and all slots of hist if they are given); writes x', and
one slot of hist if it is given.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import block_of, grid_of, kernel, launch, on_nvidia
from .layout import lay_out, sizes_of, slices_like, slots_like, stride_of
from .noise import tile_normals
from .tile import load_float32, owner, table_row, tile

# The place of each column in a row, and their number.
A, B, C, D, E, F, G, H, W, WIDTH = (tl.constexpr(i) for i in range(10))
G2, G3, S, P, Q = (tl.constexpr(i) for i in range(9, 14))


@triton.jit
def clamp(x, bound, BLOCK: tl.constexpr):
    """x [BLOCK] kept in [-bound, bound], a scalar of at least 0; NaN stays NaN, as in torch.clamp.

    Opposite bounds take one instruction from sm_90 on. Triton 3.7 sees that they are opposite only where it cannot tell
    that all their elements are one scalar.
    """
    half = tl.zeros([BLOCK // 2], tl.float32) + bound
    bounds = tl.reshape(tl.join(half, half), [BLOCK])
    return tl.clamp(x, -bounds, bounds, propagate_nan=tl.PropagateNan.ALL)


@kernel
def update_kernel(
    x_ptr,  # (batch, size)               any floating type
    pred_ptr,  # (batch, size)            any floating type, pred_stride between samples: often half of an output
    uncond_ptr,  # (batch, size) or None  like pred; None: no guidance
    raw_ptr,  # (batch, size) or None     like pred; None: the variance is in the row
    noise_ptr,  # (batch, size) or None   any floating type
    hist_ptr,  # (batch, size) or None    the type of x, read and then written: what KEEP names; or (SLOTS, batch, size)
    out_ptr,  # (batch, size)             the type of x, written: x'; may be x
    rows_ptr,  # (steps, COLUMNS)         float32
    step_ptr,  # (1,) or (batch,)         int64
    seed_ptr,  # (1,) or None             int64; None: noise is given, or there is none
    ids_ptr,  # (batch,) or None          int64: the number of each sample; None: sample i is number i
    batch, size, steps, pred_stride, step_stride, clip,
    CLIP: tl.constexpr, KEEP: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr,
    STREAM: tl.constexpr, FAST: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    sample, block = owner()
    if sample >= batch:
        return
    step, index, poison = table_row(step_ptr, step_stride, sample, steps)
    row = rows_ptr + index * COLUMNS
    a, b, c = tl.load(row + A) + poison, tl.load(row + B), tl.load(row + C)
    d, e = tl.load(row + D), tl.load(row + E)

    start, offsets, mask = tile(block, size, CHANNELS, BLOCK)
    at = sample.to(tl.int64) * pred_stride + start
    start += sample.to(tl.int64) * size
    x = load_float32(x_ptr + start + offsets, mask)
    pred = load_float32(pred_ptr + at + offsets, mask)
    if uncond_ptr is not None:
        w = tl.load(row + W)
        uncond = load_float32(uncond_ptr + at + offsets, mask)
        pred = uncond + w * (pred - uncond)

    if KEEP == "new x0hat":  # x' has the same bits as with "none"
        kept = a * x + b * pred
        if CLIP:
            kept = clamp(kept, clip, BLOCK)
    # Where only c x0hat is needed, c goes into a, b and the bound, once per program.
    if (KEEP == "none" or KEEP == "x") or KEEP == "new x0hat":
        a, b, clip, c = c * a, c * b, tl.abs(c) * clip, 1.0
    x0 = a * x + b * pred
    if CLIP:
        x0 = clamp(x0, clip, BLOCK)
    out = c * x0 + e * pred + d * x  # in this order ptxas unpacks bfloat16 once

    if noise_ptr is not None or seed_ptr is not None:
        f = tl.load(row + F)
        if noise_ptr is not None:
            z = load_float32(noise_ptr + start + offsets, mask)
        else:
            number = sample if ids_ptr is None else tl.load(ids_ptr + sample)
            z = tile_normals(seed_ptr, number, step, block, size, STREAM, CHANNELS, BLOCK, VEC, FAST)
        if raw_ptr is not None:
            h = tl.load(row + H)
            raw = load_float32(raw_ptr + at + offsets, mask)
            out += tl.exp(f + (0.5 * raw + 0.5) * (h - f)) * z
        else:
            out += f * z
    if hist_ptr is not None:
        hist = hist_ptr + start + offsets
        if KEEP != "new mix" and KEEP != "new x0hat":
            g = tl.load(row + G)
            out += g * load_float32(hist, mask)
        if KEEP == "x0hat":
            kept = x0
        if KEEP == "x":
            kept = x
        if KEEP == "mix" or KEEP == "new mix":
            kept = tl.load(row + P) * x0 + tl.load(row + Q) * x
        if SLOTS == 1:
            tl.store(hist, kept, mask=mask)
        else:
            slot, apart = tl.load(row + S) + poison, batch.to(tl.int64) * size
            for other in tl.static_range(1, SLOTS):
                out += tl.load(row + G2 + (other - 1)) * load_float32(hist + other * apart, mask)
            place = tl.where((slot >= 0) & (slot < SLOTS), slot, -1.0).to(tl.int32)
            tl.store(hist + place * apart, kept, mask=mask & (place + 0 * offsets >= 0))
    tl.store(out_ptr + start + offsets, out, mask=mask)


def update(
    out: Tensor, x: Tensor, pred: Tensor, rows: Tensor, step: Tensor, seed: Tensor | None, ids: Tensor | None,
    uncond: Tensor | None, raw: Tensor | None, noise: Tensor | None, hist: Tensor | None,
    clip: float | None, keep: str, stream: int,
) -> None:  # fmt: skip
    """Write x' into out (B, ...), which may be x; hist, if given, or one of its slots, becomes what `keep` names."""
    generated = noise is None and seed is not None
    channels, (written, x, noise) = lay_out(out, x, noise, generated=generated)
    slots, past = slots_like(written, hist)
    pred, uncond, raw = slices_like(written, pred, uncond, raw)
    batch, size = sizes_of(written)
    constants = block_of(size, channels, generated, written, pred, noise)
    launch(
        update_kernel, grid_of(batch, size, constants["BLOCK"]),
        x_ptr=x, pred_ptr=pred, uncond_ptr=uncond, raw_ptr=raw, noise_ptr=noise, hist_ptr=past, out_ptr=written,
        rows_ptr=rows, step_ptr=step, seed_ptr=seed, ids_ptr=ids,
        batch=batch, size=size, steps=rows.shape[0], pred_stride=pred.stride(0), step_stride=stride_of(step),
        clip=0.0 if clip is None else clip,
        CLIP=clip is not None, KEEP=keep, SLOTS=slots, COLUMNS=rows.shape[1],
        STREAM=stream, FAST=on_nvidia(written), **constants,
    )  # fmt: skip
    if hist is not None and past is not None and past is not hist:
        hist.copy_(past)
    if written is not out:
        out.copy_(written)
