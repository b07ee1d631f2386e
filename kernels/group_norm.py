"""silu(GroupNorm(x)), with a scale and shift of each channel where given, and its gradients.

A group is walked in tiles of CHANNELS x PIXELS elements, so that one kernel serves contiguous and channels-last images.
Where there are enough groups to fill a GPU, one program owns a group: it reads it for the statistics and again, from
the cache, to normalise it. A few large groups are cut into parts of `span` pixels instead, whose statistics a launch
before leaves in `partial`; every program then merges those of its group.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import FUSED, grid_of, kernel, launch
from .layout import channels_of, is_dense, laid_like
from .norm_parameters import norm_parameters
from .tile import load_float32, owner

BLOCK = 4096  # elements of a tile at most
CHANNELS = 1024  # channels of a tile at most
PIXELS = 1024  # pixels of a tile at most, where the pixels of a channel are neighbours
ENOUGH_GROUPS = 256  # to fill a GPU
MAX_PARTS = 16


@triton.jit
def tile_at(
    c, p, last, channel_stride, pixel_stride, DEPTH: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr
):  # fmt: skip
    """(int64 offsets from a group's first element, mask) of CHANNELS channels from c on and pixels from p to last."""
    channel, pixel = c + tl.arange(0, CHANNELS), p + tl.arange(0, PIXELS)
    offsets = channel.to(tl.int64)[:, None] * channel_stride + pixel.to(tl.int64)[None, :] * pixel_stride
    return offsets, (channel < DEPTH)[:, None] & (pixel < last)[None, :]


@triton.jit
def affine_of(
    c, group, sample, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride,
    DEPTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """(factor, offset) [CHANNELS] of the normalised channels from c of a group on, w (1 + scale) and
    b (1 + scale) + shift; 0 beyond the group."""
    channel = c + tl.arange(0, CHANNELS)
    mask = channel < DEPTH
    at = group * DEPTH + channel
    factor = tl.load(weight_ptr + at, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
    offset = tl.load(bias_ptr + at, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
    if scale_ptr is not None:
        scale_ptr += sample.to(tl.int64) * scale_stride
        shift_ptr += sample.to(tl.int64) * shift_stride
        scale = tl.load(scale_ptr + at, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        shift = tl.load(shift_ptr + at, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        offset += offset * scale + shift
        factor += factor * scale
    return factor, offset


@triton.jit
def moments(
    x_ptr, first, last, channel_stride, pixel_stride,
    DEPTH: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """(mean, sum of squared deviations from it) of a group's pixels from first to last; tiles are merged as in Chan,
    Golub & LeVeque 1983, so that nothing cancels however far the mean is from 0."""
    count = tl.full((), 0.0, tl.float32)
    mean = tl.full((), 0.0, tl.float32)
    square = tl.full((), 0.0, tl.float32)
    for c in range(0, DEPTH, CHANNELS):
        for p in range(first, last, PIXELS):
            offsets, mask = tile_at(c, p, last, channel_stride, pixel_stride, DEPTH, CHANNELS, PIXELS)
            x = load_float32(x_ptr + offsets, mask)
            n = (tl.minimum(DEPTH - c, CHANNELS) * tl.minimum(last - p, PIXELS)).to(tl.float32)
            m = tl.sum(tl.where(mask, x, 0.0)) / n
            deviation = tl.where(mask, x - m, 0.0)
            shift = m - mean
            share = n / (count + n)
            mean += shift * share
            square += tl.sum(deviation * deviation) + shift * shift * (count * share)
            count += n
    return mean, square


@kernel
def moments_kernel(
    x_ptr,  # (B, C, pixels), any floating type
    partial_ptr,  # (B, groups, parts, 2) float32: mean, sum of squared deviations
    batch, groups, parts, pixels, span, channel_stride, pixel_stride,
    DEPTH: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, block = owner()
    if sample >= batch:
        return
    group, first = block % groups, (block // groups).to(tl.int32) * span
    x_ptr += sample.to(tl.int64) * groups * DEPTH * pixels + group * DEPTH * channel_stride
    last = tl.minimum(first + span, pixels)
    tl.assume(first < last)
    mean, square = moments(
        x_ptr, first, last, channel_stride, pixel_stride, DEPTH, CHANNELS, PIXELS
    )
    partial_ptr += ((sample.to(tl.int64) * groups + group) * parts + block // groups) * 2
    tl.store(partial_ptr, mean)
    tl.store(partial_ptr + 1, square)


@triton.jit
def merged(partial_ptr, parts, pixels, span, DEPTH: tl.constexpr, PARTS: tl.constexpr):
    """(mean, sum of squared deviations) of a group from those of its parts."""
    part = tl.arange(0, PARTS)
    mask = part < parts
    means = tl.load(partial_ptr + 2 * part, mask=mask, other=0.0, eviction_policy="evict_last")
    squares = tl.load(partial_ptr + 2 * part + 1, mask=mask, other=0.0, eviction_policy="evict_last")
    counts = tl.where(mask, tl.minimum(pixels - part * span, span), 0).to(tl.float32)
    mean = tl.sum(means * counts) / pixels
    deviations = tl.where(mask, means - mean, 0.0)
    return mean, tl.sum(squares) + tl.sum(deviations * deviations * counts) * DEPTH


@kernel
def norm_kernel(
    out_ptr,  # (B, C, pixels), any floating type
    x_ptr,  # (B, C, pixels), any floating type, laid out as out
    weight_ptr, bias_ptr,  # (C,), any floating type
    scale_ptr, shift_ptr,  # (B, C), any floating type, channels adjacent; or None
    mean_ptr, rstd_ptr,  # (B, groups) float32, written
    partial_ptr,  # of moments_kernel, or None: one program owns a group
    batch, groups, parts, pixels, span, channel_stride, pixel_stride, scale_stride, shift_stride, inverse_count, eps,
    PARTS: tl.constexpr, DEPTH: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, block = owner()
    if sample >= batch:
        return
    group, first = block % groups, (block // groups).to(tl.int32) * span
    last = tl.minimum(first + span, pixels)
    tl.assume(first < last)
    start = sample.to(tl.int64) * groups * DEPTH * pixels + group * DEPTH * channel_stride
    number = sample.to(tl.int64) * groups + group
    if partial_ptr is None:
        mean, square = moments(x_ptr + start, first, last, channel_stride, pixel_stride, DEPTH, CHANNELS, PIXELS)
    else:
        mean, square = merged(partial_ptr + number * parts * 2, parts, pixels, span, DEPTH, PARTS)
    rstd = 1.0 / tl.sqrt(square * inverse_count + eps)
    if first == 0:
        tl.store(mean_ptr + number, mean)
        tl.store(rstd_ptr + number, rstd)

    for c in range(0, DEPTH, CHANNELS):
        factor, offset = affine_of(
            c, group, sample, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, DEPTH, CHANNELS
        )
        factor *= rstd
        for p in range(first, last, PIXELS):
            offsets, mask = tile_at(c, p, last, channel_stride, pixel_stride, DEPTH, CHANNELS, PIXELS)
            x = load_float32(x_ptr + start + offsets, mask)
            u = (x - mean) * factor[:, None] + offset[:, None]
            tl.store(out_ptr + start + offsets, u * tl.sigmoid(u), mask=mask)


@triton.jit
def slope_at(grad_ptr, x_ptr, offsets, mask, mean, rstd, factor, offset):
    """(dL/du, normalised x) of a tile, u what SiLU is taken of; 0 beyond the mask."""
    x = (load_float32(x_ptr + offsets, mask) - mean) * rstd
    u = x * factor[:, None] + offset[:, None]
    s = tl.sigmoid(u)
    slope = load_float32(grad_ptr + offsets, mask) * (s + u * s * (1.0 - s))
    return tl.where(mask, slope, 0.0), tl.where(mask, x, 0.0)


@triton.jit
def sums(
    sums_ptr, grad_ptr, x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean, rstd,
    sample, group, first, last, stride, channel_stride, pixel_stride, scale_stride, shift_stride,
    DEPTH: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Stores sum(dL/du) and sum(dL/du normalised x) over some pixels of each channel of a group, `stride` apart;
    returns the sums over channels of both, times the factor of the channel."""
    by_mean = tl.full((), 0.0, tl.float32)
    by_rstd = tl.full((), 0.0, tl.float32)
    for c in range(0, DEPTH, CHANNELS):
        factor, offset = affine_of(
            c, group, sample, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, DEPTH, CHANNELS
        )
        one = tl.zeros([CHANNELS, PIXELS], tl.float32)
        other = tl.zeros([CHANNELS, PIXELS], tl.float32)
        for p in range(first, last, PIXELS):
            offsets, mask = tile_at(c, p, last, channel_stride, pixel_stride, DEPTH, CHANNELS, PIXELS)
            slope, x = slope_at(grad_ptr, x_ptr, offsets, mask, mean, rstd, factor, offset)
            one += slope
            other += slope * x
        ones, others = tl.sum(one, 1), tl.sum(other, 1)
        channel = c + tl.arange(0, CHANNELS)
        tl.store(sums_ptr + channel, ones, mask=channel < DEPTH)
        tl.store(sums_ptr + stride + channel, others, mask=channel < DEPTH)
        by_mean += tl.sum(factor * ones)
        by_rstd += tl.sum(factor * others)
    return by_mean, by_rstd


@kernel
def norm_sums_kernel(
    sums_ptr,  # (parts, 2, B, C) float32: sums of dL/du and of dL/du normalised x over the pixels of a part
    grad_ptr, x_ptr,  # (B, C, pixels), any floating type
    weight_ptr, bias_ptr,  # (C,), any floating type
    scale_ptr, shift_ptr,  # (B, C), any floating type, channels adjacent; or None
    mean_ptr, rstd_ptr,  # (B, groups) float32
    batch, groups, parts, pixels, span, channel_stride, pixel_stride, scale_stride, shift_stride,
    stride,  # of sums: B C
    DEPTH: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, block = owner()
    if sample >= batch:
        return
    group, first = block % groups, (block // groups).to(tl.int32) * span
    start = sample.to(tl.int64) * groups * DEPTH * pixels + group * DEPTH * channel_stride
    number = sample.to(tl.int64) * groups + group
    last = tl.minimum(first + span, pixels)
    tl.assume(first < last)
    sums(
        sums_ptr + (block // groups) * 2 * stride + number * DEPTH, grad_ptr + start, x_ptr + start,
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, tl.load(mean_ptr + number), tl.load(rstd_ptr + number),
        sample, group, first, last, stride, channel_stride, pixel_stride, scale_stride, shift_stride,
        DEPTH, CHANNELS, PIXELS,
    )  # fmt: skip


@triton.jit
def merged_sums(
    sums_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, sample, group, parts, stride, scale_stride, shift_stride,
    PARTS: tl.constexpr, DEPTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """What `sums` returns, of a whole group, from the sums that norm_sums_kernel left."""
    by_mean = tl.full((), 0.0, tl.float32)
    by_rstd = tl.full((), 0.0, tl.float32)
    part = tl.arange(0, PARTS)
    for c in range(0, DEPTH, CHANNELS):
        factor, _ = affine_of(
            c, group, sample, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, DEPTH, CHANNELS
        )
        channel = c + tl.arange(0, CHANNELS)
        at = channel[:, None] + part.to(tl.int64)[None, :] * 2 * stride
        mask = (channel < DEPTH)[:, None] & (part < parts)[None, :]
        ones = tl.load(sums_ptr + at, mask=mask, other=0.0, eviction_policy="evict_last")
        others = tl.load(sums_ptr + stride + at, mask=mask, other=0.0, eviction_policy="evict_last")
        by_mean += tl.sum(factor[:, None] * ones)
        by_rstd += tl.sum(factor[:, None] * others)
    return by_mean, by_rstd


@kernel
def norm_grad_kernel(
    x_grad_ptr,  # (B, C, pixels), any floating type
    sums_ptr,  # as in norm_sums_kernel
    grad_ptr, x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr,  # as in norm_sums_kernel
    batch, groups, parts, pixels, span, channel_stride, pixel_stride, scale_stride, shift_stride, stride, inverse_count,
    PARTS: tl.constexpr, DEPTH: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
    SUMMED: tl.constexpr,  # whether the sums are there, or written here: one program owns a group
):  # fmt: skip
    sample, block = owner()
    if sample >= batch:
        return
    group, first = block % groups, (block // groups).to(tl.int32) * span
    last = tl.minimum(first + span, pixels)
    tl.assume(first < last)
    start = sample.to(tl.int64) * groups * DEPTH * pixels + group * DEPTH * channel_stride
    number = sample.to(tl.int64) * groups + group
    mean, rstd = tl.load(mean_ptr + number), tl.load(rstd_ptr + number)
    sums_ptr += number * DEPTH
    if SUMMED:
        by_mean, by_rstd = merged_sums(
            sums_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, sample, group, parts, stride, scale_stride,
            shift_stride, PARTS, DEPTH, CHANNELS,
        )  # fmt: skip
    else:
        by_mean, by_rstd = sums(
            sums_ptr, grad_ptr + start, x_ptr + start, weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean, rstd,
            sample, group, first, last, stride, channel_stride, pixel_stride, scale_stride, shift_stride,
            DEPTH, CHANNELS, PIXELS,
        )  # fmt: skip
    by_mean *= inverse_count
    by_rstd *= inverse_count
    for c in range(0, DEPTH, CHANNELS):
        factor, offset = affine_of(
            c, group, sample, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, DEPTH, CHANNELS
        )
        for p in range(first, last, PIXELS):
            offsets, mask = tile_at(c, p, last, channel_stride, pixel_stride, DEPTH, CHANNELS, PIXELS)
            slope, x = slope_at(grad_ptr + start, x_ptr + start, offsets, mask, mean, rstd, factor, offset)
            by_x = (slope * factor[:, None] - by_mean - x * by_rstd) * rstd
            tl.store(x_grad_ptr + start + offsets, by_x, mask=mask)


def _lay_out(x: Tensor) -> Tensor:
    """x contiguous or channels last and gapless; a copy where it is neither."""
    return x if channels_of(x) and is_dense(x) else x.contiguous()


def _walk(x: Tensor, groups: int) -> tuple[tuple[int, int, int], tuple[int, ...], dict[str, Any]]:
    """(grid, numbers, constants) of a launch over laid out x (B, C, ...); the numbers are batch, groups, parts, pixels,
    span, channel_stride and pixel_stride."""
    batch, channels = x.shape[:2]
    depth, pixels = channels // groups, x.numel() // (batch * channels)
    last = not x.is_contiguous()
    wide = triton.next_power_of_2(depth)
    if last:
        tile_channels = min(wide, CHANNELS)
        tile_pixels = min(triton.next_power_of_2(pixels), BLOCK // tile_channels)
    else:
        tile_pixels = min(triton.next_power_of_2(pixels), PIXELS)
        tile_channels = min(wide, BLOCK // tile_pixels)
    tiles = triton.cdiv(pixels, tile_pixels)
    most = 1 if batch * groups >= ENOUGH_GROUPS else min(tiles, MAX_PARTS)
    span = triton.cdiv(tiles, most) * tile_pixels
    parts = triton.cdiv(pixels, span)
    block = tile_channels * tile_pixels
    strides = (1, channels) if last else (pixels, 1)
    numbers = (batch, groups, parts, pixels, span, *strides)
    constants = {"DEPTH": depth, "CHANNELS": tile_channels, "PIXELS": tile_pixels, "BLOCK": block}
    constants |= {"num_warps": min(8, max(1, block // 512))} | FUSED
    return grid_of(batch, groups * parts, 1), numbers, constants


def named(kernel: Any, *operands: Any) -> dict[str, Any]:
    """The first parameters of a kernel, by name."""
    return dict(zip(kernel.arg_names, operands, strict=False))


def _rows(scale: Tensor | None, shift: Tensor | None) -> tuple[list[Tensor | None], list[int]]:
    """Scale and shift with adjacent channels, and the strides between their samples."""
    rows = [t if t is None or t.stride(1) == 1 else t.contiguous() for t in (scale, shift)]
    return rows, [0 if t is None else t.stride(0) for t in rows]


def norm(
    out: Tensor, mean: Tensor, rstd: Tensor,
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float,
) -> None:  # fmt: skip
    """Write silu(GroupNorm(x) (1 + scale) + shift) into out, shaped like x (B, C, ...), and the statistics of the
    groups into mean and rstd, (B, groups) float32."""
    x = _lay_out(x)
    laid = laid_like(x, out)
    grid, numbers, constants = _walk(x, groups)
    partial, parts = None, numbers[2]
    if parts > 1:
        partial = torch.empty(*mean.shape, parts, 2, dtype=torch.float32, device=x.device)
        launch(moments_kernel, grid, **named(moments_kernel, x, partial, *numbers), **constants)
    rows, strides = _rows(scale, shift)
    launch(
        norm_kernel, grid,
        **named(
            norm_kernel, laid, x, weight.contiguous(), bias.contiguous(), *rows, mean, rstd, partial,
            *numbers, *strides, groups * x.shape[0] / x.numel(), eps,
        ),
        PARTS=triton.next_power_of_2(parts), **constants,
    )  # fmt: skip
    if laid is not out:
        out.copy_(laid)


def norm_grad(
    x_grad: Tensor, weight_grad: Tensor | None, bias_grad: Tensor | None,
    scale_grad: Tensor | None, shift_grad: Tensor | None,
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor,
    groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None,
) -> None:  # fmt: skip
    """Write the gradients by x, weight, bias, scale and shift. The last four are contiguous, or None: those by weight
    and bias if none of them is wanted, those by scale and shift also if there is no scale."""
    x = _lay_out(x)
    laid, grad = laid_like(x, x_grad), laid_like(x, grad)
    grid, numbers, constants = _walk(x, groups)
    parts = numbers[2]
    sums = torch.empty(parts, 2, *x.shape[:2], dtype=torch.float32, device=x.device)
    rows, strides = _rows(scale, shift)
    operands = (sums, grad, x, weight.contiguous(), bias.contiguous(), *rows, mean, rstd)
    numbers = (*numbers, *strides, sums.stride(1))
    if parts > 1:
        launch(norm_sums_kernel, grid, **named(norm_sums_kernel, *operands, *numbers), **constants)
    launch(
        norm_grad_kernel, grid,
        **named(norm_grad_kernel, laid, *operands, *numbers, groups * x.shape[0] / x.numel()),
        PARTS=triton.next_power_of_2(parts), SUMMED=parts > 1, **constants,
    )  # fmt: skip
    if laid is not x_grad:
        x_grad.copy_(laid)
    if weight_grad is not None and bias_grad is not None:
        norm_parameters(
            weight_grad, bias_grad, scale_grad, shift_grad, sums, weight.contiguous(), bias.contiguous(), rows[0]
        )
