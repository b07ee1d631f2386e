"""The forward kernels of the group norm, for each group of a sample:

    y = silu(u) or u,   u = (xhat w + b) (1 + scale) + shift,   xhat = (x + add - mean) / sqrt(var + eps)

mean and var are those of x + add over the group; var is the mean of squared deviations from the mean, so that nothing
cancels however far the mean is from 0. The channels of x may lie in two tensors, x and skip.

Moves, per element: norm_kernel reads x and writes y. Groups that do not fit a program are read twice, once before that
by moments_kernel. In norm_tile.py: what a program owns.
"""

import triton
import triton.language as tl

from .launch import kernel
from .norm_tile import (
    MINUS_LOG2_E,
    affine,
    by_channel,
    by_group,
    load_row,
    load_tiles,
    owned,
    silu,
    tile_masks,
    tile_places,
    tile_pointers,
)
from .tile import to_float32


@triton.jit
def moments(
    tiles, masks, add, channels, pixel,
    PIXELS: tl.constexpr, DEPTH: tl.constexpr, GROUPS: tl.constexpr, SLOTS: tl.constexpr,
    BLOCKS: tl.constexpr, LANES: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(count, mean, sum of squared deviations from it) of x + add of each group, [SLOTS]; x is the tiles, from `pixel`
    on, and add a row or None."""
    pixels = tl.minimum(PIXELS - pixel, TILES * TILE)
    count = ((channels if GROUPS == 1 else DEPTH) * pixels).to(tl.float32)
    sums = ()
    for k in tl.static_range(BLOCKS):
        total = to_float32(tiles[k * TILES])
        if add is not None:  # a share of it in every column
            total += add[k][:, None] * (pixels * (1.0 / TILE))
        for t in tl.static_range(1, TILES):
            total += to_float32(tiles[k * TILES + t])
        sums = sums + (total,)
    mean = by_group(sums, DEPTH, GROUPS, SLOTS, BLOCKS, LANES, TILE)
    mean = mean / count
    center = by_channel(mean, DEPTH, GROUPS, SLOTS, BLOCKS, LANES)
    squares = ()
    for k in tl.static_range(BLOCKS):
        middle = center[k]
        if add is not None:
            middle -= add[k]
        square = tl.zeros([LANES, TILE], tl.float32)
        for t in tl.static_range(TILES):
            deviation = to_float32(tiles[k * TILES + t]) - middle[:, None]
            deviation = tl.where(masks[k * TILES + t], deviation, 0.0)
            square += deviation * deviation
        squares = squares + (square,)
    return count, mean, by_group(squares, DEPTH, GROUPS, SLOTS, BLOCKS, LANES, TILE)


@kernel
def moments_kernel(
    x_ptr, skip_ptr,  # (B, FIRST, pixels) and (B, C - FIRST, pixels), any floating type; or (B, C, pixels) and None
    add_ptr,  # (B, C) or (C,), any floating type; or None
    partial_ptr,  # (B, groups, CHUNKS SPANS, 2) float32, written: mean and sum of squared deviations of a part
    first, add_stride,
    CHANNELS: tl.constexpr, FIRST: tl.constexpr, PIXELS: tl.constexpr, DEPTH: tl.constexpr, GROUPS: tl.constexpr,
    SLOTS: tl.constexpr, CHUNKS: tl.constexpr, SPANS: tl.constexpr, SPAN: tl.constexpr,
    BLOCKS: tl.constexpr, LANES: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    FULL: tl.constexpr = GROUPS * DEPTH == CHUNKS * BLOCKS * LANES
    sample, group, channel, channels, span = owned(first, CHANNELS, DEPTH, GROUPS, CHUNKS, SPANS, BLOCKS * LANES)
    add = None
    if add_ptr is not None:
        add = load_row(add_ptr, sample * add_stride + channel, channels, BLOCKS, LANES)
    # The blocks of tiles are merged as in Chan, Golub & LeVeque 1983.
    count = tl.full((), 0.0, tl.float32)
    mean = tl.zeros([SLOTS], tl.float32)
    square = tl.zeros([SLOTS], tl.float32)
    for pixel in range(span * SPAN, tl.minimum(span * SPAN + SPAN, PIXELS), TILES * TILE):
        masks = tile_masks(channels, pixel, FULL, PIXELS, BLOCKS, LANES, TILES, TILE)
        pointers, places = tile_places(
            x_ptr, skip_ptr, masks, sample, channel, pixel, GROUPS * DEPTH, CHANNELS, FIRST, PIXELS, BLOCKS, LANES,
            TILES, TILE, LAST,
        )  # fmt: skip
        tiles = load_tiles(pointers, places, BLOCKS * TILES)
        n, m, s = moments(tiles, masks, add, channels, pixel, PIXELS, DEPTH, GROUPS, SLOTS, BLOCKS, LANES, TILES, TILE)
        share = n / (count + n)
        square += s + (m - mean) * (m - mean) * (count * share)
        mean += (m - mean) * share
        count += n
    slot = tl.arange(0, SLOTS)
    at = partial_ptr + ((sample * (CHANNELS // DEPTH) + group + slot) * (CHUNKS * SPANS) + tl.program_id(1)) * 2
    tl.store(at, mean, mask=slot < GROUPS)
    tl.store(at + 1, square, mask=slot < GROUPS)


@triton.jit
def merged(
    partial_ptr, at,
    PIXELS: tl.constexpr, DEPTH: tl.constexpr, GROUPS: tl.constexpr, SLOTS: tl.constexpr, CHUNKS: tl.constexpr,
    SPANS: tl.constexpr, SPAN: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """(mean, sum of squared deviations) of each group, [SLOTS], from those of its parts; PARTS >= CHUNKS SPANS."""
    slot, part = tl.arange(0, SLOTS)[:, None], tl.arange(0, PARTS)[None, :]
    mask = (slot < GROUPS) & (part < CHUNKS * SPANS)
    pointers = partial_ptr + ((at + slot) * (CHUNKS * SPANS) + part) * 2
    means = tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_last")
    squares = tl.load(pointers + 1, mask=mask, other=0.0, eviction_policy="evict_last")
    channels = tl.minimum(DEPTH - part // SPANS * WIDTH, WIDTH if CHUNKS > 1 else DEPTH).to(tl.float32)
    counts = channels * tl.minimum(PIXELS - part % SPANS * SPAN, SPAN)
    # Every warp merges all parts. The mask comes after the products: a product that goes straight into a sum among
    # threads is fused with its first addition, and then threads, and warps, disagree about the last bits.
    mean = tl.sum(tl.where(mask, means * counts, 0.0), 1) / (DEPTH * PIXELS)
    deviations = means - mean[:, None]
    return mean, tl.sum(squares, 1) + tl.sum(tl.where(mask, deviations * deviations * counts, 0.0), 1)


@triton.jit
def store_normed(
    pointers, tiles, masks, factor, offset, SILU: tl.constexpr, QUICK: tl.constexpr,
    BLOCKS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Stores v = x factor + offset of the tiles, or, if SILU, its silu."""
    for k in tl.static_range(BLOCKS):
        for t in tl.static_range(TILES):
            v = to_float32(tiles[k * TILES + t]) * factor[k][:, None] + offset[k][:, None]
            tl.store(pointers[k * TILES + t], silu(v, QUICK) if SILU else v, mask=masks[k * TILES + t])


@kernel
def norm_kernel(
    out_ptr,  # (B, C, pixels), the type of x, written: y
    mean_ptr, rstd_ptr,  # (B, groups) float32, written: mean and 1 / sqrt(var + eps)
    x_ptr, skip_ptr,  # as in moments_kernel, laid out as out
    add_ptr,  # (B, C) or (C,), any floating type; or None
    weight_ptr, bias_ptr,  # (C,), any floating type
    scale_ptr, shift_ptr,  # (B, C), any floating type, channels adjacent; or None
    partial_ptr,  # of moments_kernel; or None: the slab is whole groups
    first, add_stride, scale_stride, shift_stride, eps,
    CHANNELS: tl.constexpr, FIRST: tl.constexpr, PIXELS: tl.constexpr, DEPTH: tl.constexpr, GROUPS: tl.constexpr,
    SLOTS: tl.constexpr, CHUNKS: tl.constexpr, SPANS: tl.constexpr, SPAN: tl.constexpr, PARTS: tl.constexpr,
    BLOCKS: tl.constexpr, LANES: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, LAST: tl.constexpr,
    SILU: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    FULL: tl.constexpr = GROUPS * DEPTH == CHUNKS * BLOCKS * LANES
    VECTOR: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth  # elements of an access
    QUICK: tl.constexpr = (SILU and FAST) and VECTOR == 8
    UNIT: tl.constexpr = MINUS_LOG2_E if QUICK else 1.0  # of u, see silu
    sample, group, channel, channels, span = owned(first, CHANNELS, DEPTH, GROUPS, CHUNKS, SPANS, BLOCKS * LANES)
    groups = sample * (CHANNELS // DEPTH) + group
    add = None
    if add_ptr is not None:
        add = load_row(add_ptr, sample * add_stride + channel, channels, BLOCKS, LANES)
    if partial_ptr is None:
        masks = tile_masks(channels, 0, FULL, PIXELS, BLOCKS, LANES, TILES, TILE)
        pointers, places = tile_places(
            x_ptr, skip_ptr, masks, sample, channel, 0, GROUPS * DEPTH, CHANNELS, FIRST, PIXELS, BLOCKS, LANES, TILES,
            TILE, LAST,
        )  # fmt: skip
        tiles = load_tiles(pointers, places, BLOCKS * TILES)
        _, mean, square = moments(
            tiles, masks, add, channels, 0, PIXELS, DEPTH, GROUPS, SLOTS, BLOCKS, LANES, TILES, TILE
        )
    else:
        mean, square = merged(
            partial_ptr, groups, PIXELS, DEPTH, GROUPS, SLOTS, CHUNKS, SPANS, SPAN, BLOCKS * LANES, PARTS
        )
    rstd = tl.rsqrt(square * (1.0 / (DEPTH * PIXELS)) + eps)
    if tl.program_id(1) == 0:
        slot = tl.arange(0, SLOTS)
        tl.store(mean_ptr + groups + slot, mean, mask=slot < GROUPS)
        tl.store(rstd_ptr + groups + slot, rstd, mask=slot < GROUPS)

    weight, bias = affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, sample, channel, channels, scale_stride, shift_stride, BLOCKS, LANES
    )
    centers = by_channel(mean, DEPTH, GROUPS, SLOTS, BLOCKS, LANES)
    rstds = by_channel(rstd * UNIT, DEPTH, GROUPS, SLOTS, BLOCKS, LANES)
    factor, offset = (), ()
    for k in tl.static_range(BLOCKS):
        center = centers[k]
        if add is not None:
            center -= add[k]
        factor = factor + (weight[k] * rstds[k],)
        offset = offset + (bias[k] * UNIT - center * (weight[k] * rstds[k]),)
    if partial_ptr is None:
        pointers = tile_pointers(
            out_ptr, None, sample, channel, 0, CHANNELS, CHANNELS, PIXELS, BLOCKS, LANES, TILES, TILE, LAST
        )
        store_normed(pointers, tiles, masks, factor, offset, SILU, QUICK, BLOCKS, TILES)
    else:
        for pixel in range(span * SPAN, tl.minimum(span * SPAN + SPAN, PIXELS), TILES * TILE):
            masks = tile_masks(channels, pixel, FULL, PIXELS, BLOCKS, LANES, TILES, TILE)
            pointers, places = tile_places(
                x_ptr, skip_ptr, masks, sample, channel, pixel, GROUPS * DEPTH, CHANNELS, FIRST, PIXELS, BLOCKS, LANES,
                TILES, TILE, LAST,
            )  # fmt: skip
            tiles = load_tiles(pointers, places, BLOCKS * TILES)
            pointers = tile_pointers(
                out_ptr, None, sample, channel, pixel, CHANNELS, CHANNELS, PIXELS, BLOCKS, LANES, TILES, TILE, LAST
            )
            store_normed(pointers, tiles, masks, factor, offset, SILU, QUICK, BLOCKS, TILES)
