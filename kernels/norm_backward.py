"""The backward kernels of the group norm. With u = f xhat + o in each channel (norm_forward.py) and slope = dL/du,
which is the gradient by y itself if there is no SiLU:

    dL/dx = rstd (f slope - m_1 - xhat m_2),   m_1 = mean(f slope), m_2 = mean(f slope xhat) over the group

The gradients of weight, bias, scale and shift follow from the sums of slope and of slope xhat over the pixels of each
channel, and with the sums of xhat that of add:

    dL/dadd = sum(dL/dx) = rstd (f sum(slope) - pixels m_1 - sum(xhat) m_2)

Moves, per element: norm_grad_kernel reads x and the gradient by y, and writes the gradient by x. Groups that do not fit
a program are read twice, once before that by norm_sums_kernel. parameters_kernel reads nothing but sums.
"""

import triton
import triton.language as tl

from .launch import kernel
from .norm_tile import (
    MINUS_LN_2,
    MINUS_LOG2_E,
    RECENT,
    affine,
    by_channel,
    by_group,
    group_row,
    load_row,
    load_tiles,
    owned,
    pixel_sums,
    plus,
    product,
    rounded,
    row_sums,
    silu_slope,
    store_row,
    tile_masks,
    tile_places,
    tile_pointers,
    times,
    zeros,
)
from .tile import float32_anew, to_float32


@triton.jit
def lines_of(
    mean_ptr, rstd_ptr, add_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, groups, sample, channel, channels,
    add_stride, scale_stride, shift_stride,
    DEPTH: tl.constexpr, GROUPS: tl.constexpr, QUICK: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Rows (center, slant, offset, rstd): xhat = (x - center) rstd and u = (x - center) slant + offset; or, if QUICK,
    -log2(e) times that, which the last three rows then contain."""
    UNIT: tl.constexpr = MINUS_LOG2_E if QUICK else 1.0
    rstd = group_row(rstd_ptr, groups, channels, DEPTH, GROUPS, BLOCKS, LANES)
    rstd = times(rstd, UNIT, BLOCKS)
    center = group_row(mean_ptr, groups, channels, DEPTH, GROUPS, BLOCKS, LANES)
    factor, offset = affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, sample, channel, channels, scale_stride, shift_stride, BLOCKS, LANES
    )
    slant = ()
    for k in tl.static_range(BLOCKS):
        slant = slant + (factor[k] * rstd[k],)
    if add_ptr is not None:
        add = load_row(add_ptr, sample * add_stride + channel, channels, BLOCKS, LANES)
        less = ()
        for k in tl.static_range(BLOCKS):
            less = less + (center[k] - add[k],)
        center = less
    return center, slant, times(offset, UNIT, BLOCKS), rstd


@triton.jit
def load_both(
    x_ptr, skip_ptr, grad_ptr, masks, sample, channel, pixel,
    SLAB: tl.constexpr, CHANNELS: tl.constexpr, FIRST: tl.constexpr, PIXELS: tl.constexpr,
    BLOCKS: tl.constexpr, LANES: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """The slab's tiles of x, or of x and skip, and those of the gradient by y, from `pixel` on."""
    at, places = tile_places(
        x_ptr, skip_ptr, masks, sample, channel, pixel, SLAB, CHANNELS, FIRST, PIXELS, BLOCKS, LANES, TILES, TILE, LAST
    )
    x = load_tiles(at, places, BLOCKS * TILES)
    at = tile_pointers(
        grad_ptr, None, sample, channel, pixel, CHANNELS, CHANNELS, PIXELS, BLOCKS, LANES, TILES, TILE, LAST
    )
    return x, load_tiles(at, masks, BLOCKS * TILES)


@triton.jit
def slope_of(grad, x, slant, offset, SILU: tl.constexpr, QUICK: tl.constexpr):
    """The slopes of a tile by u, or -log2(e) u if QUICK, = slant x + offset; 0 where grad is, so beyond the slab."""
    slope = to_float32(grad)
    if SILU:
        slope *= silu_slope(x * slant[:, None] + offset[:, None], QUICK)
    return slope


@triton.jit
def sums_of(
    sums, grads, tiles, masks, center, slant, offset, SILU: tl.constexpr, QUICK: tl.constexpr, ADD: tl.constexpr,
    BLOCKS: tl.constexpr, TILES: tl.constexpr, SPLIT: tl.constexpr, ONE_PIXEL: tl.constexpr,
):  # fmt: skip
    """(slopes of the tiles, their x - center, rows of the sums of slope, of slope (x - center) and, if ADD, of
    x - center over their pixels).

    sums: None, or three rows of [LANES, WIDE]: what further tiles are added to, and not yet summed among threads.
    ONE_PIXEL: a thread holds one pixel of a tile. Then, if there is nothing to add it to, see rounded."""
    ROUND: tl.constexpr = (ONE_PIXEL and TILES == 1) and sums is None
    slopes, centered, ones, others, aways = (), (), (), (), ()
    for k in tl.static_range(BLOCKS):
        one = None  # Triton 3.3 takes no tuple of these
        other = None
        away = None
        if sums is not None:
            one, other, away = sums[0][k], sums[1][k], sums[2][k]
        for t in tl.static_range(TILES):
            x = to_float32(tiles[k * TILES + t]) - center[k][:, None]
            slope = slope_of(grads[k * TILES + t], x, slant[k], offset[k], SILU, QUICK)
            moment = slope * x
            if ROUND:
                slope, moment = rounded(slope) if SILU else slope, rounded(moment)
            one, other = plus(one, slope), plus(other, moment)
            if ADD:
                away = plus(away, tl.where(masks[k * TILES + t], x, 0.0))
            slopes, centered = slopes + (slope,), centered + (x,)
        if sums is None:
            # What comes second is still being added up while threads meet. Then it had better need no x of 32 bits.
            if BLOCKS == 1 and 128 // tiles[0].dtype.primitive_bitwidth == 4:  # Triton 3.3 cannot ask for 32 bits
                other = pixel_sums(other, SPLIT)
                one = pixel_sums(one, SPLIT)
            else:
                one = pixel_sums(one, SPLIT)
                other = pixel_sums(other, SPLIT)
            away = pixel_sums(away, SPLIT) if ADD else 0.0
        ones, others, aways = ones + (one,), others + (other,), aways + (away,)
    return slopes, centered, ones, others, aways


@triton.jit
def weighed(
    slant, rows, DEPTH: tl.constexpr, GROUPS: tl.constexpr, SLOTS: tl.constexpr, BLOCKS: tl.constexpr,
    LANES: tl.constexpr, ONE_LANE: tl.constexpr,
):  # fmt: skip
    """[SLOTS]: sums of slant times a row over each group. ONE_LANE: a thread holds one channel of a block."""
    columns = ()
    for k in tl.static_range(BLOCKS):
        column = slant[k] * rows[k]
        columns = columns + ((rounded(column) if ONE_LANE and BLOCKS == 1 else column)[:, None],)
    return by_group(columns, DEPTH, GROUPS, SLOTS, BLOCKS, LANES, 1)


@kernel
def norm_sums_kernel(
    sums_ptr,  # (SPANS, 2 or, with add, 4, B, C) float32; written, but the third: sums of slope, slope xhat, dL/dx and
    # x - center over a span
    partial_ptr,  # (B, groups, CHUNKS SPANS, 2) float32, written: sums of f slope and of f slope xhat of a part
    grad_ptr,  # (B, C, pixels), any floating type
    x_ptr, skip_ptr,  # (B, FIRST, pixels) and (B, C - FIRST, pixels), any floating type; or (B, C, pixels) and None
    add_ptr,  # (B, C) or (C,), any floating type; or None
    weight_ptr, bias_ptr,  # (C,), any floating type
    scale_ptr, shift_ptr,  # (B, C), any floating type, channels adjacent; or None
    mean_ptr, rstd_ptr,  # (B, groups) float32
    batch, first, add_stride, scale_stride, shift_stride,
    CHANNELS: tl.constexpr, FIRST: tl.constexpr, PIXELS: tl.constexpr, DEPTH: tl.constexpr, GROUPS: tl.constexpr,
    SLOTS: tl.constexpr, CHUNKS: tl.constexpr, SPANS: tl.constexpr, SPAN: tl.constexpr,
    BLOCKS: tl.constexpr, LANES: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, LAST: tl.constexpr,
    SILU: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    FULL: tl.constexpr = GROUPS * DEPTH == CHUNKS * BLOCKS * LANES
    VECTOR: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth  # elements of an access
    QUICK: tl.constexpr = (SILU and FAST) and VECTOR == 8
    ADD: tl.constexpr = add_ptr is not None
    sample, group, channel, channels, span = owned(first, CHANNELS, DEPTH, GROUPS, CHUNKS, SPANS, BLOCKS * LANES)
    groups = sample * (CHANNELS // DEPTH) + group
    center, slant, offset, rstd = lines_of(
        mean_ptr, rstd_ptr, add_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, groups, sample, channel, channels,
        add_stride, scale_stride, shift_stride, DEPTH, GROUPS, QUICK, BLOCKS, LANES,
    )  # fmt: skip
    SPLIT: tl.constexpr = LAST and BLOCKS * VECTOR >= 8  # channels of a thread
    ONE_LANE: tl.constexpr = (SPLIT or not LAST) or (CHANNELS | FIRST) % 2 != 0  # an odd number has narrow accesses
    # Threads are summed after the loop. Eight neighbouring pixels of a thread are summed at once, to spare registers.
    WIDE: tl.constexpr = TILE if (LAST or VECTOR < 8) or PIXELS % VECTOR != 0 else TILE // VECTOR
    ones = zeros(BLOCKS, LANES, WIDE)
    others = zeros(BLOCKS, LANES, WIDE)
    aways = zeros(BLOCKS, LANES, WIDE)
    for pixel in range(span * SPAN, tl.minimum(span * SPAN + SPAN, PIXELS), TILES * TILE):
        masks = tile_masks(channels, pixel, FULL, PIXELS, BLOCKS, LANES, TILES, TILE)
        x, grad = load_both(
            x_ptr, skip_ptr, grad_ptr, masks, sample, channel, pixel, GROUPS * DEPTH, CHANNELS, FIRST, PIXELS, BLOCKS,
            LANES, TILES, TILE, LAST,
        )  # fmt: skip
        _, _, ones, others, aways = sums_of(
            (ones, others, aways), grad, x, masks, center, slant, offset, SILU, QUICK, ADD, BLOCKS, TILES, SPLIT, False
        )  # fmt: skip
    ones, others = row_sums(ones, SPLIT, BLOCKS), row_sums(others, SPLIT, BLOCKS)
    row = sums_ptr + (tl.cast(span, tl.int64) * (4 if ADD else 2) * batch + sample) * CHANNELS + channel
    stride = tl.cast(batch, tl.int64) * CHANNELS
    store_sums(row, stride, ones, others, rstd, channels, QUICK, BLOCKS, LANES)
    if ADD:
        store_row(row + 3 * stride, row_sums(aways, SPLIT, BLOCKS), channels, BLOCKS, LANES)
    slot = tl.arange(0, SLOTS)
    at = partial_ptr + ((groups + slot) * (CHUNKS * SPANS) + tl.program_id(1)) * 2
    tl.store(at, weighed(slant, ones, DEPTH, GROUPS, SLOTS, BLOCKS, LANES, ONE_LANE), mask=slot < GROUPS)
    tl.store(at + 1, weighed(slant, others, DEPTH, GROUPS, SLOTS, BLOCKS, LANES, ONE_LANE), mask=slot < GROUPS)


@triton.jit
def store_sums(
    row, stride, ones, others, rstd, channels, QUICK: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr
):
    """Stores the sums of slope and of slope xhat as the first two rows; ones and others as in sums_of, rstd as in
    lines_of."""
    UNIT: tl.constexpr = MINUS_LOG2_E if QUICK else 1.0
    store_row(row, times(ones, UNIT, BLOCKS), channels, BLOCKS, LANES)
    store_row(row + stride, product(rstd, others, BLOCKS), channels, BLOCKS, LANES)


@triton.jit
def merged_sums(
    partial_ptr, groups, GROUPS: tl.constexpr, SLOTS: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr
):
    """Two [SLOTS]: the sums of norm_sums_kernel over the PARTS parts of each group; WIDE >= PARTS."""
    slot, part = tl.arange(0, SLOTS)[:, None], tl.arange(0, WIDE)[None, :]
    pointers = partial_ptr + ((groups + slot) * PARTS + part) * 2
    mask = (slot < GROUPS) & (part < PARTS)
    ones = tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_last")
    others = tl.load(pointers + 1, mask=mask, other=0.0, eviction_policy="evict_last")
    return tl.sum(ones, 1), tl.sum(others, 1)


@triton.jit
def slopes_of(
    grads, tiles, slant, offset, SILU: tl.constexpr, QUICK: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """The slopes of all tiles; see slope_of."""
    slopes = ()
    for k in tl.static_range(BLOCKS):
        for t in tl.static_range(TILES):
            x = to_float32(tiles[k * TILES + t])
            slopes = slopes + (slope_of(grads[k * TILES + t], x, slant[k], offset[k], SILU, QUICK),)
    return slopes


@triton.jit
def store_gradient(
    pointers, slopes, tiles, masks, slant, by_x, constant, ANEW: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """Stores slant slope + by_x x + constant of the tiles; ANEW: see float32_anew."""
    for k in tl.static_range(BLOCKS):
        for t in tl.static_range(TILES):
            x = tiles[k * TILES + t]
            rest = (float32_anew(x) if ANEW else to_float32(x)) * by_x[k][:, None] + constant[k][:, None]
            gradient = slopes[k * TILES + t] * slant[k][:, None] + rest
            for i in tl.static_range(k * TILES + t, len(pointers), BLOCKS * TILES):
                tl.store(pointers[i], gradient, mask=masks[i])


@kernel
def norm_grad_kernel(
    x_grad_ptr, skip_grad_ptr,  # like x_ptr and skip_ptr, written
    sums_ptr,  # as in norm_sums_kernel; the first three rows are written, but for what that left there
    partial_ptr,  # of norm_sums_kernel; or None: the slab is whole groups
    grad_ptr, x_ptr, skip_ptr, add_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr,  # as there
    batch, first, add_stride, scale_stride, shift_stride,
    CHANNELS: tl.constexpr, FIRST: tl.constexpr, PIXELS: tl.constexpr, DEPTH: tl.constexpr, GROUPS: tl.constexpr,
    SLOTS: tl.constexpr, CHUNKS: tl.constexpr, SPANS: tl.constexpr, SPAN: tl.constexpr, PARTS: tl.constexpr,
    BLOCKS: tl.constexpr, LANES: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, LAST: tl.constexpr,
    SILU: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    FULL: tl.constexpr = GROUPS * DEPTH == CHUNKS * BLOCKS * LANES
    VECTOR: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth  # elements of an access
    QUICK: tl.constexpr = (SILU and FAST) and VECTOR == 8
    PER_UNIT: tl.constexpr = MINUS_LN_2 if QUICK else 1.0  # see lines_of
    ADD: tl.constexpr = add_ptr is not None
    # Few registers are to spare in 16-bit threads with the most elements, and in AMD's of float32. The latter need x no
    # more once they have x - center.
    ANEW: tl.constexpr = ((RECENT and FAST) and LAST) and (VECTOR == 8 and BLOCKS > 1)
    CENTERED: tl.constexpr = (RECENT and not FAST) and (VECTOR == 4 and partial_ptr is None)
    sample, group, channel, channels, span = owned(first, CHANNELS, DEPTH, GROUPS, CHUNKS, SPANS, BLOCKS * LANES)
    groups = sample * (CHANNELS // DEPTH) + group
    row = sums_ptr + (tl.cast(span, tl.int64) * (4 if ADD else 2) * batch + sample) * CHANNELS + channel
    stride = tl.cast(batch, tl.int64) * CHANNELS
    SPLIT: tl.constexpr = LAST and BLOCKS * VECTOR >= 8  # as there
    ONE_LANE: tl.constexpr = (SPLIT or not LAST) or (CHANNELS | FIRST) % 2 != 0
    ONE_PIXEL: tl.constexpr = LAST or PIXELS % 2 != 0
    if partial_ptr is None:
        masks = tile_masks(channels, 0, FULL, PIXELS, BLOCKS, LANES, TILES, TILE)
        x, grad = load_both(
            x_ptr, skip_ptr, grad_ptr, masks, sample, channel, 0, GROUPS * DEPTH, CHANNELS, FIRST, PIXELS, BLOCKS,
            LANES, TILES, TILE, LAST,
        )  # fmt: skip
    center, slant, offset, rstd = lines_of(
        mean_ptr, rstd_ptr, add_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, groups, sample, channel, channels,
        add_stride, scale_stride, shift_stride, DEPTH, GROUPS, QUICK, BLOCKS, LANES,
    )  # fmt: skip
    if partial_ptr is None:
        slopes, centered, ones, others, aways = sums_of(
            None, grad, x, masks, center, slant, offset, SILU, QUICK, ADD, BLOCKS, TILES, SPLIT, ONE_PIXEL
        )  # fmt: skip
        store_sums(row, stride, ones, others, rstd, channels, QUICK, BLOCKS, LANES)
        one = weighed(slant, ones, DEPTH, GROUPS, SLOTS, BLOCKS, LANES, ONE_LANE)
        other = weighed(slant, others, DEPTH, GROUPS, SLOTS, BLOCKS, LANES, ONE_LANE)
    else:
        one, other = merged_sums(partial_ptr, groups, GROUPS, SLOTS, CHUNKS * SPANS, PARTS)
        if ADD:
            ones = times(load_row(row, 0, channels, BLOCKS, LANES), PER_UNIT, BLOCKS)
            aways = load_row(row, 3 * stride, channels, BLOCKS, LANES)
    m_1 = by_channel(one * (1.0 / (DEPTH * PIXELS)), DEPTH, GROUPS, SLOTS, BLOCKS, LANES)
    m_2 = by_channel(other * (PER_UNIT * PER_UNIT / (DEPTH * PIXELS)), DEPTH, GROUPS, SLOTS, BLOCKS, LANES)
    # dL/dx = slant slope - m_1 - (x - center) rstd^2 m_2, m_1 with its rstd
    by_x, constant = (), ()
    for k in tl.static_range(BLOCKS):
        by_x = by_x + (-m_2[k] * rstd[k] * rstd[k],)
        constant = constant + (-m_1[k] if CENTERED else m_2[k] * rstd[k] * rstd[k] * center[k] - m_1[k],)
    if ADD:
        pixels = tl.minimum(PIXELS - span * SPAN, SPAN)
        totals = ()
        for k in tl.static_range(BLOCKS):
            totals = totals + (slant[k] * ones[k] + by_x[k] * aways[k] - pixels * m_1[k],)
        store_row(row + 2 * stride, totals, channels, BLOCKS, LANES)
    if partial_ptr is None:
        pointers, places = tile_places(
            x_grad_ptr, skip_grad_ptr, masks, sample, channel, 0, GROUPS * DEPTH, CHANNELS, FIRST, PIXELS, BLOCKS,
            LANES, TILES, TILE, LAST,
        )  # fmt: skip
        x = centered if CENTERED else x
        store_gradient(pointers, slopes, x, places, slant, by_x, constant, ANEW, BLOCKS, TILES)
    else:
        offsets = ()  # as in the forward pass: u = slant x + offset
        for k in tl.static_range(BLOCKS):
            offsets = offsets + (offset[k] - center[k] * slant[k],)
        for pixel in range(span * SPAN, tl.minimum(span * SPAN + SPAN, PIXELS), TILES * TILE):
            masks = tile_masks(channels, pixel, FULL, PIXELS, BLOCKS, LANES, TILES, TILE)
            x, grad = load_both(
                x_ptr, skip_ptr, grad_ptr, masks, sample, channel, pixel, GROUPS * DEPTH, CHANNELS, FIRST, PIXELS,
                BLOCKS, LANES, TILES, TILE, LAST,
            )  # fmt: skip
            slopes = slopes_of(grad, x, slant, offsets, SILU, QUICK, BLOCKS, TILES)
            pointers, places = tile_places(
                x_grad_ptr, skip_grad_ptr, masks, sample, channel, pixel, GROUPS * DEPTH, CHANNELS, FIRST, PIXELS,
                BLOCKS, LANES, TILES, TILE, LAST,
            )  # fmt: skip
            store_gradient(pointers, slopes, x, places, slant, by_x, constant, False, BLOCKS, TILES)


@kernel
def parameters_kernel(
    weight_grad_ptr, bias_grad_ptr,  # (C,), the types of weight and bias, written
    scale_grad_ptr, shift_grad_ptr,  # (B, C), the types of scale and shift, written; or None
    add_grad_ptr,  # (B, C) or, if add is SHARED by the batch, (C,), the type of add, written; or None
    sums_ptr,  # (spans, 2 or, with add, 4, B, C) float32, of norm_grad_kernel
    weight_ptr, bias_ptr,  # (C,), any floating type
    scale_ptr,  # (B, C), any floating type, channels adjacent; or None
    batch, spans, channels, scale_stride,
    SHARED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of BLOCK channels' parameters, ROWS samples at a time: sums over the batch in a fixed order."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = channel < channels
    weight = tl.load(weight_ptr + channel, mask=exists, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=exists, other=0.0).to(tl.float32)
    by_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    by_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    by_add = tl.zeros([ROWS, BLOCK], tl.float32)
    KINDS: tl.constexpr = 2 if add_grad_ptr is None else 4
    stride = tl.cast(batch, tl.int64) * channels
    for sample in range(0, batch, ROWS):
        row = (sample + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (row < batch) & exists[None, :]
        at = row * channels + channel[None, :]
        one = tl.zeros([ROWS, BLOCK], tl.float32)
        other = tl.zeros([ROWS, BLOCK], tl.float32)
        shared = tl.zeros([ROWS, BLOCK], tl.float32)
        for span in range(0, spans):
            sums = sums_ptr + span * (KINDS * stride) + at
            one += tl.load(sums, mask=mask, other=0.0)
            other += tl.load(sums + stride, mask=mask, other=0.0)
            if add_grad_ptr is not None:
                shared += tl.load(sums + 2 * stride, mask=mask, other=0.0)
        if add_grad_ptr is not None:
            by_add += shared
            if not SHARED:
                tl.store(add_grad_ptr + at, shared, mask=mask)
        if scale_ptr is not None:
            tl.store(scale_grad_ptr + at, weight[None, :] * other + bias[None, :] * one, mask=mask)
            tl.store(shift_grad_ptr + at, one, mask=mask)
            scale = tl.load(scale_ptr + row * scale_stride + channel[None, :], mask=mask, other=0.0).to(tl.float32)
            one += one * scale
            other += other * scale
        by_weight += other
        by_bias += one
    tl.store(weight_grad_ptr + channel, tl.sum(by_weight, 0), mask=exists)
    tl.store(bias_grad_ptr + channel, tl.sum(by_bias, 0), mask=exists)
    if SHARED:
        tl.store(add_grad_ptr + channel, tl.sum(by_add, 0), mask=exists)
