"""What a program of the group norm owns, and the pieces that its kernels share.

A program owns a slab: neighbouring channels and neighbouring pixels of one sample. It keeps them in registers as they
were stored, so that nothing is read twice. One kernel serves both layouts: contiguous images, whose pixels are
neighbours in memory, and channels last (LAST), whose channels are. A slab is BLOCKS x TILES tiles [LANES, TILE]:
BLOCKS x LANES channels by TILES x TILE pixels. A tuple holds the tiles; tile (k, t) is its element k TILES + t.

    GROUPS > 1    the slab holds GROUPS whole groups of DEPTH channels; channel c belongs to group c // DEPTH
    GROUPS = 1    the slab holds one group, or, if the group is deeper, one of CHUNKS chunks of it
    SPANS > 1     the pixels are cut into spans of SPAN; a program walks one span, TILES x TILE pixels at a time

The grid is (slabs, CHUNKS x SPANS). A row is a tuple of BLOCKS tensors [LANES]: one number of every channel.
"""

import triton
import triton.language as tl

MINUS_LOG2_E, MINUS_LN_2 = tl.constexpr(-1.4426950408889634), tl.constexpr(-0.6931471805599453)
# Triton 3.8 forgets the alignment of pointers that are chosen element by element. The assemblers that come with it
# spill registers where those before find room. What is done about it costs Triton 3.7 instructions.
RECENT = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8))


@triton.jit
def owned(
    first, CHANNELS: tl.constexpr, DEPTH: tl.constexpr, GROUPS: tl.constexpr, CHUNKS: tl.constexpr,
    SPANS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """(int64 sample, first group, first channel, number of channels, span) of this program; WIDTH: BLOCKS x LANES."""
    SLABS: tl.constexpr = CHANNELS // (GROUPS * DEPTH)
    slab = first + tl.program_id(0)
    sample, slab = (slab // SLABS).to(tl.int64), slab % SLABS
    channel, part = slab * (GROUPS * DEPTH), tl.program_id(1)
    channels = GROUPS * DEPTH
    if CHUNKS > 1:
        chunk = part // SPANS * WIDTH
        channel += chunk
        channels = tl.minimum(DEPTH - chunk, WIDTH)
    return sample, slab * GROUPS, channel, channels, part % SPANS


@triton.jit
def either(first, here, there, WHOLE: tl.constexpr):
    """here where `first` is true, there elsewhere. WHOLE: each of the three is one number."""
    if WHOLE:
        chosen = there
        if first:
            chosen = here
    else:
        chosen = tl.where(first, here, there)
    return chosen


@triton.jit
def tile_pointers(
    ptr, skip_ptr, sample, channel, pixel,
    CHANNELS: tl.constexpr, FIRST: tl.constexpr, PIXELS: tl.constexpr,
    BLOCKS: tl.constexpr, LANES: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Pointers [LANES, TILE] of the slab's tiles from `pixel` on. With skip_ptr the first FIRST channels lie at ptr,
    the others at skip_ptr, as tensors of their own; see tile_places."""
    lane = channel + tl.arange(0, LANES).to(tl.int64)[:, None]
    column = tl.arange(0, TILE).to(tl.int64)[None, :]
    pointers = ()
    if skip_ptr is None:
        start = sample * (CHANNELS * PIXELS)
        offsets = start + (lane + column * CHANNELS if LAST else lane * PIXELS + column)
        at = ptr + offsets + tl.cast(pixel, tl.int64) * (CHANNELS if LAST else 1)
        ACROSS: tl.constexpr = LANES if LAST else LANES * PIXELS
        ALONG: tl.constexpr = TILE * CHANNELS if LAST else TILE
        for k in tl.static_range(BLOCKS):
            for t in tl.static_range(TILES):
                pointers = pointers + (at + (k * ACROSS + t * ALONG),)
    else:
        REST: tl.constexpr = CHANNELS - FIRST
        WHOLE: tl.constexpr = RECENT and LAST  # what is chosen is where the first element of a tile lies
        p = column + tl.cast(pixel, tl.int64)
        for k in tl.static_range(BLOCKS):
            c, q = (channel + k * LANES, 0) if WHOLE else (lane + k * LANES, p)
            first = c < FIRST
            here = ptr + (sample * (FIRST * PIXELS) + (c + q * FIRST if LAST else c * PIXELS + q))
            c -= FIRST
            there = skip_ptr + (sample * (REST * PIXELS) + (c + q * REST if LAST else c * PIXELS + q))
            at = either(first, here, there, WHOLE)
            along = either(first, FIRST, REST, WHOLE).to(tl.int64) if LAST else 1  # from pixel to pixel
            if WHOLE:
                at += lane - channel + p * along
            for t in tl.static_range(TILES):
                pointers = pointers + (at + along * (t * TILE),)
    return pointers


@triton.jit
def tile_places(
    ptr, skip_ptr, masks, sample, channel, pixel,
    SLAB: tl.constexpr, CHANNELS: tl.constexpr, FIRST: tl.constexpr, PIXELS: tl.constexpr,
    BLOCKS: tl.constexpr, LANES: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """(pointers of the slab's tiles from `pixel` on, masks). SLAB: the channels of a slab.

    If tiles may have channels of both tensors, those at skip_ptr can follow, with masks of their own."""
    APART: tl.constexpr = FIRST % SLAB == 0 or (FIRST % LANES == 0 and SLAB % LANES == 0)
    if (RECENT and LAST) and not APART:
        REST: tl.constexpr = CHANNELS - FIRST
        pointers = tile_pointers(
            ptr, None, sample, channel, pixel, FIRST, FIRST, PIXELS, BLOCKS, LANES, TILES, TILE, LAST
        ) + tile_pointers(
            skip_ptr, None, sample, channel - FIRST, pixel, REST, REST, PIXELS, BLOCKS, LANES, TILES, TILE, LAST
        )  # fmt: skip
        here, there = (), ()
        for k in tl.static_range(BLOCKS):
            lane = (channel + k * LANES + tl.arange(0, LANES))[:, None]
            for t in tl.static_range(TILES):
                here = here + (masks[k * TILES + t] & (lane < FIRST),)
                there = there + (masks[k * TILES + t] & (lane >= FIRST),)
        masks = here + there
    else:
        pointers = tile_pointers(
            ptr, skip_ptr, sample, channel, pixel, CHANNELS, FIRST, PIXELS, BLOCKS, LANES, TILES, TILE, LAST
        )
    return pointers, masks


@triton.jit
def tile_masks(
    channels, pixel, FULL: tl.constexpr, PIXELS: tl.constexpr,
    BLOCKS: tl.constexpr, LANES: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """bool [LANES, TILE] for each tile from `pixel` on: which elements exist. FULL: all channels do."""
    masks = ()
    for k in tl.static_range(BLOCKS):
        for t in tl.static_range(TILES):
            mask = tl.full([LANES, TILE], True, tl.int1)
            if not FULL:
                mask = mask & (k * LANES + tl.arange(0, LANES) < channels)[:, None]
            if PIXELS % (TILE * TILES) != 0:
                mask = mask & (pixel + t * TILE + tl.arange(0, TILE) < PIXELS)[None, :]
            masks = masks + (mask,)
    return masks


@triton.jit
def load_tiles(pointers, masks, COUNT: tl.constexpr):
    """The slab's COUNT tiles as they are stored, 0 beyond it; see tile_places."""
    tiles = ()
    for i in tl.static_range(COUNT):
        tile = tl.load(pointers[i], mask=masks[i], other=0.0)
        for j in tl.static_range(COUNT + i, len(pointers), COUNT):
            tile = tl.load(pointers[j], mask=masks[j], other=tile)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def load_row(ptr, at, channels, BLOCKS: tl.constexpr, LANES: tl.constexpr):
    """The row that starts at ptr + at, in float32; 0 beyond the slab."""
    row = ()
    for k in tl.static_range(BLOCKS):
        c = k * LANES + tl.arange(0, LANES)
        x = tl.load(ptr + at + c, mask=c < channels, other=0.0, eviction_policy="evict_last")
        row = row + (x.to(tl.float32),)
    return row


@triton.jit
def group_row(
    ptr, groups, channels, DEPTH: tl.constexpr, GROUPS: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr
):
    """The row that holds, for every channel, the number of its group at ptr + groups."""
    row = ()
    for k in tl.static_range(BLOCKS):
        c = k * LANES + tl.arange(0, LANES)
        at = groups + (c // DEPTH if GROUPS > 1 else 0 * c)
        row = row + (tl.load(ptr + at, mask=c < channels, other=0.0, eviction_policy="evict_last"),)
    return row


@triton.jit
def store_row(ptr, row, channels, BLOCKS: tl.constexpr, LANES: tl.constexpr):
    for k in tl.static_range(BLOCKS):
        c = k * LANES + tl.arange(0, LANES)
        tl.store(ptr + c, row[k], mask=c < channels)


@triton.jit
def affine(
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, sample, channel, channels, scale_stride, shift_stride,
    BLOCKS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """(factor, offset) rows of the normalised channels: w (1 + scale) and b (1 + scale) + shift."""
    factor = load_row(weight_ptr, channel, channels, BLOCKS, LANES)
    offset = load_row(bias_ptr, channel, channels, BLOCKS, LANES)
    if scale_ptr is not None:
        scale = load_row(scale_ptr, sample * scale_stride + channel, channels, BLOCKS, LANES)
        shift = load_row(shift_ptr, sample * shift_stride + channel, channels, BLOCKS, LANES)
        factors, offsets = (), ()
        for k in tl.static_range(BLOCKS):
            factors = factors + (factor[k] + factor[k] * scale[k],)
            offsets = offsets + (offset[k] + offset[k] * scale[k] + shift[k],)
        factor, offset = factors, offsets
    return factor, offset


@triton.jit
def by_group(
    rows, DEPTH: tl.constexpr, GROUPS: tl.constexpr, SLOTS: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """[SLOTS >= GROUPS]: the sums over each group of BLOCKS tensors [LANES, WIDE], which are 0 beyond the slab."""
    if GROUPS == 1:
        total = rows[0]
        for k in tl.static_range(1, BLOCKS):
            total += rows[k]
        sums = tl.sum(tl.reshape(total, [1, LANES * WIDE]), 1)
    elif GROUPS * DEPTH == LANES:
        sums = tl.sum(tl.reshape(rows[0], [GROUPS, DEPTH * WIDE]), 1)
    else:
        total = tl.zeros([SLOTS, WIDE], tl.float32)
        for k in tl.static_range(BLOCKS):
            belongs = tl.arange(0, SLOTS)[:, None] == ((k * LANES + tl.arange(0, LANES)) // DEPTH)[None, :]
            total += tl.sum(tl.where(belongs[:, :, None], tl.reshape(rows[k], [1, LANES, WIDE]), 0.0), 1)
        sums = tl.sum(total, 1)
    return sums


@triton.jit
def by_channel(
    values, DEPTH: tl.constexpr, GROUPS: tl.constexpr, SLOTS: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr
):
    """The row that holds, for every channel, the value of its group; values [SLOTS]."""
    row = ()
    for k in tl.static_range(BLOCKS):
        if GROUPS == 1:
            row = row + (tl.zeros([LANES], tl.float32) + tl.sum(values, 0),)
        elif GROUPS * DEPTH == LANES:
            row = row + (tl.reshape(tl.broadcast_to(values[:, None], [GROUPS, DEPTH]), [LANES]),)
        else:
            belongs = tl.arange(0, SLOTS)[:, None] == ((k * LANES + tl.arange(0, LANES)) // DEPTH)[None, :]
            row = row + (tl.sum(tl.where(belongs, values[:, None], 0.0), 0),)
    return row


@triton.jit
def times(row, factor, BLOCKS: tl.constexpr):
    """The row with every number multiplied by factor."""
    product = ()
    for k in tl.static_range(BLOCKS):
        product = product + (row[k] * factor,)
    return product


@triton.jit
def product(a, b, BLOCKS: tl.constexpr):
    """The product of two rows."""
    row = ()
    for k in tl.static_range(BLOCKS):
        row = row + (a[k] * b[k],)
    return row


@triton.jit
def rounded(product):
    """A product, rounded; fused with the 0, it costs nothing.

    A product that goes straight into a sum among threads is fused with the first addition. Then each thread rounds only
    what others send, and threads disagree about the last bits of the sum."""
    return product + 0.0


@triton.jit
def zeros(BLOCKS: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr):
    """BLOCKS tensors [LANES, WIDE]."""
    row = ()
    for _ in tl.static_range(BLOCKS):
        row = row + (tl.zeros([LANES, WIDE], tl.float32),)
    return row


@triton.jit
def plus(total, tile):
    """total [LANES, WIDE] and the sums of neighbouring pixels of a tile [LANES, TILE]. Without a total, the tile."""
    if total is not None:
        WIDE: tl.constexpr = total.shape[1]
        if tile.shape[1] > WIDE:
            tile = tl.sum(tl.reshape(tile, [tile.shape[0], WIDE, tile.shape[1] // WIDE]), 2)
        tile += total
    return tile


@triton.jit
def pixel_sums(tile, SPLIT: tl.constexpr):
    """[LANES]: the sums of a tile [LANES, TILE] over its pixels.

    With channels last a thread holds several channels of a pixel, and a sum among threads passes on all of them at each
    step. SPLIT: a split moves both of its parts, which are neighbouring pixels, into one thread first."""
    if SPLIT and tile.shape[1] % 8 == 0:
        tile = tl.reshape(tile, [tile.shape[0], tile.shape[1] // 8, 2, 2, 2])
        for _ in tl.static_range(3):
            even, odd = tl.split(tile)
            tile = even + odd
    return tl.sum(tile, 1)


@triton.jit
def row_sums(row, SPLIT: tl.constexpr, BLOCKS: tl.constexpr):
    """The row of the sums over the pixels of BLOCKS tensors [LANES, WIDE]."""
    sums = ()
    for k in tl.static_range(BLOCKS):
        sums = sums + (pixel_sums(row[k], SPLIT),)
    return sums


@triton.jit
def quick_sigmoid(v):
    """-ln(2) / (1 + 2^v), which is -ln(2) sigmoid(u) of v = -log2(e) u.

    By NVIDIA's approximate power of two and reciprocal, for 16-bit results alone: its error, below 2^-20 for |u| < 8,
    is far below their rounding."""
    e = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [v], dtype=tl.float32, is_pure=True, pack=1)
    below = e * MINUS_LOG2_E + MINUS_LOG2_E
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=r,r", [below], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def silu(v, QUICK: tl.constexpr):
    """u sigmoid(u) of v = u, or, if QUICK, of v = -log2(e) u."""
    return v * (quick_sigmoid(v) if QUICK else tl.sigmoid(v))


@triton.jit
def silu_slope(v, QUICK: tl.constexpr):
    """The derivative of silu by its v: s (u (1 - s) + 1) with s = sigmoid(u), times -ln(2) if QUICK."""
    if QUICK:
        s = quick_sigmoid(v)
        return s * (v * (MINUS_LN_2 - s) + 1.0)
    s = tl.sigmoid(v)
    return s * (v * (1.0 - s) + 1.0)
