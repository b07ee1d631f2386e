"""The reverse update of every sampler: x' = c x0hat + d x + e pred + f z + g hist, x0hat = clip(a x + b pred).

One row of the step table holds the numbers: (a, b, c, d, e, f, g, h, w). Guidance replaces pred by
uncond + w (pred - uncond); a learned variance replaces f by exp(f + r (h - f)), r = (raw + 1) / 2.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import block_of, grid_of, kernel, launch, load_float32, on_nvidia, owner, row_of, sizes_of, stride_of
from .layout import laid_like, lay_out, sliced_like
from .noise import tile, tile_normals


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
    x_ptr,  # (B, n), any floating type
    pred_ptr,  # (B, n), any floating type, pred_stride between samples: often a slice of a model's output
    uncond_ptr,  # (B, n) like pred, or None: no guidance
    raw_ptr,  # (B, n) like pred, or None: the variance is in the row
    noise_ptr,  # (B, n) or None
    hist_ptr,  # (B, n), the type of x, or None; KEEP is written back
    out_ptr,  # (B, n), the type of x; may be x
    rows_ptr,  # (steps, 9) float32
    step_ptr,  # (1,) or (B,) int64
    seed_ptr,  # (1,) int64, or None: given noise, or none
    ids_ptr,  # (B,) int64 or None: sample i is number i
    batch, n, steps, pred_stride, step_stride, clip,
    CLIP: tl.constexpr, KEEP: tl.constexpr,
    STREAM: tl.constexpr, FAST: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    sample, block = owner()
    if sample >= batch:
        return
    step, index, poison = row_of(step_ptr, step_stride, sample, steps)
    row = rows_ptr + index * 9
    a, b, c, d, e = tl.load(row) + poison, tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)

    start, offsets, mask = tile(block, n, CHANNELS, BLOCK)
    at = sample.to(tl.int64) * pred_stride + start
    start += sample.to(tl.int64) * n
    x = load_float32(x_ptr + start + offsets, mask)
    pred = load_float32(pred_ptr + at + offsets, mask)
    if uncond_ptr is not None:
        w = tl.load(row + 8)
        uncond = load_float32(uncond_ptr + at + offsets, mask)
        pred = uncond + w * (pred - uncond)

    if KEEP != "x0hat":  # Only c x0hat is needed: c goes into a, b and the bound, once per program.
        a, b, clip, c = c * a, c * b, tl.abs(c) * clip, 1.0
    x0 = a * x + b * pred
    if CLIP:
        x0 = clamp(x0, clip, BLOCK)
    out = c * x0 + e * pred + d * x  # in this order ptxas unpacks bfloat16 once

    if noise_ptr is not None or seed_ptr is not None:
        f = tl.load(row + 5)
        if noise_ptr is not None:
            z = load_float32(noise_ptr + start + offsets, mask)
        else:
            number = sample if ids_ptr is None else tl.load(ids_ptr + sample)
            z = tile_normals(seed_ptr, number, step, block, n, STREAM, CHANNELS, BLOCK, VEC, FAST)
        if raw_ptr is not None:
            h = tl.load(row + 7)
            raw = load_float32(raw_ptr + at + offsets, mask)
            out += tl.exp(f + (0.5 * raw + 0.5) * (h - f)) * z
        else:
            out += f * z
    if hist_ptr is not None:
        g = tl.load(row + 6)
        hist = hist_ptr + start + offsets
        out += g * load_float32(hist, mask)
        tl.store(hist, x0 if KEEP == "x0hat" else x, mask=mask)
    tl.store(out_ptr + start + offsets, out, mask=mask)


def update(
    out: Tensor, x: Tensor, pred: Tensor, rows: Tensor, step: Tensor, seed: Tensor | None, ids: Tensor | None,
    uncond: Tensor | None, raw: Tensor | None, noise: Tensor | None, hist: Tensor | None,
    clip: float | None, keep: str, stream: int,
) -> None:  # fmt: skip
    """Write x' into out (B, ...), which may be x; hist, if given, is overwritten with what `keep` names."""
    generated = noise is None and seed is not None
    channels, (laid, x, noise, past) = lay_out(out, x, noise, hist, generated=generated)
    slices = [pred, uncond, raw]
    if any(t is not None and not sliced_like(laid, t, pred.stride(0)) for t in slices):
        slices = [None if t is None else laid_like(laid, t) for t in slices]
    batch, n = sizes_of(laid)
    meta = block_of(n, channels, generated, laid, pred, noise)
    launch(
        update_kernel, grid_of(batch, n, meta["BLOCK"]), (x, *slices, noise, past, laid, rows, step, seed, ids),
        (batch, n, rows.shape[0], slices[0].stride(0), stride_of(step), 0.0 if clip is None else clip),
        {"CLIP": clip is not None, "KEEP": keep, "STREAM": stream, "FAST": on_nvidia(laid), **meta},
    )  # fmt: skip
    if past is not hist:
        hist.copy_(past)
    if laid is not out:
        out.copy_(laid)
