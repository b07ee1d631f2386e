"""s = x + gate y, or x itself, and n = ((s - mean) / sqrt(var + eps) weight + bias) (1 + scale) + shift.

mean and var are those of each row of C channels; var is the mean of squared deviations from the mean, so that nothing
cancels however far the mean is from 0. n is computed of s before it is rounded.

Rows are tokens of samples, (batch, tokens, C). A program owns ROWS tokens of one sample and keeps them in registers, as
CHUNKS tiles [ROWS, CHUNK]. gate, scale and shift are one row for all tokens of a sample.

Moves, per element: reads x, and y if it is there; writes n, and with y also s.
"""

import functools

import triton
import triton.language as tl
from torch import Tensor

from .launch import FUSED, grid_of, kernel, launch, warps_of
from .tile import owner, to_float32

HELD = 8  # elements of a tile that a thread holds
CHUNK_SIZES, MOST_CHUNKS = [64 << i for i in range(7)], 6  # channels of a tile, and tiles of a row, unless it is longer
PROGRAM = 1024  # elements of a tile of several rows


@triton.jit
def load_columns(ptr, k: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Chunk k of a row of C numbers, as float32 [ROWS, CHUNK]: laid out as the data, so that nothing is exchanged."""
    column = tl.broadcast_to(k * CHUNK + tl.arange(0, CHUNK)[None, :], [ROWS, CHUNK])
    return to_float32(tl.load(ptr + column, mask=column < CHANNELS, other=0.0, eviction_policy="evict_last"))


@kernel
def layer_norm_kernel(
    out_ptr,  # (batch, tokens, C), the type of x, written: n
    sum_ptr,  # the same, written: s; or None
    x_ptr,  # (batch, tokens, C), any floating type, channels adjacent
    y_ptr,  # as x; or None: s = x, and there is no gate
    weight_ptr, bias_ptr,  # (C,), any floating type; or None
    gate_ptr, scale_ptr, shift_ptr,  # (batch, C), any floating type, channels adjacent; or None
    batch, tokens, x_sample, x_token, y_sample, y_token, gate_stride, scale_stride, shift_stride, eps,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    sample, block = owner()
    if sample >= batch:
        return
    sample = sample.to(tl.int64)
    row = block * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, CHUNK)[None, :]
    inside = column < CHUNK
    if ROWS > 1:
        inside = inside & (row < tokens)
    last = inside & (column < CHANNELS - (CHUNKS - 1) * CHUNK)
    x_at = x_ptr + (sample * x_sample + row * x_token + column)
    if y_ptr is not None:
        y_at = y_ptr + (sample * y_sample + row * y_token + column)

    values = ()
    total = tl.zeros([ROWS, CHUNK], tl.float32)
    for k in tl.static_range(CHUNKS):
        mask = last if k == CHUNKS - 1 else inside
        value = to_float32(tl.load(x_at + k * CHUNK, mask=mask, other=0.0))
        if y_ptr is not None:
            more = to_float32(tl.load(y_at + k * CHUNK, mask=mask, other=0.0))
            if gate_ptr is not None:
                more *= load_columns(gate_ptr + sample * gate_stride, k, CHANNELS, ROWS, CHUNK)
            value += more
        total += value
        values = values + (value,)
    mean = tl.sum(total, 1)[:, None] * (1.0 / CHANNELS)

    square = tl.zeros([ROWS, CHUNK], tl.float32)
    for k in tl.static_range(CHUNKS):
        deviation = values[k] - mean
        if k == CHUNKS - 1 and CHANNELS % CHUNK:
            deviation = tl.where(last, deviation, 0.0)
        square += deviation * deviation
    rstd = tl.rsqrt(tl.sum(square, 1)[:, None] * (1.0 / CHANNELS) + eps)

    at = (sample * tokens + row) * CHANNELS + column
    for k in tl.static_range(CHUNKS):
        mask = last if k == CHUNKS - 1 else inside
        if y_ptr is not None:
            tl.store(sum_ptr + at + k * CHUNK, values[k], mask=mask)
        n = (values[k] - mean) * rstd
        if weight_ptr is not None:
            n *= load_columns(weight_ptr, k, CHANNELS, ROWS, CHUNK)
        if bias_ptr is not None:
            n += load_columns(bias_ptr, k, CHANNELS, ROWS, CHUNK)
        if scale_ptr is not None:
            n *= 1.0 + load_columns(scale_ptr + sample * scale_stride, k, CHANNELS, ROWS, CHUNK)
        if shift_ptr is not None:
            n += load_columns(shift_ptr + sample * shift_stride, k, CHANNELS, ROWS, CHUNK)
        tl.store(out_ptr + at + k * CHUNK, n, mask=mask)


def layer_norm(
    *, out: Tensor, total: Tensor | None, x: Tensor, y: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    eps: float, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None,
) -> None:  # fmt: skip
    """Write the norm of s = x + gate y, or of x without y, into out, and s into total: contiguous, shaped like x."""
    gate, scale, shift = _adjacent(gate), _adjacent(scale), _adjacent(shift)
    by_sample = not (gate is None and scale is None and shift is None)
    channels, (first, x, y) = x.shape[-1], _even(x, y, by_sample)
    batch = x.shape[0] if first else 1
    tokens = x.numel() // (batch * channels)
    shape = shape_of(channels, tokens)
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    launch(
        layer_norm_kernel, grid_of(batch, tokens, shape["ROWS"]), out_ptr=out, sum_ptr=total, x_ptr=x, y_ptr=y,
        weight_ptr=weight, bias_ptr=bias, gate_ptr=gate, scale_ptr=scale, shift_ptr=shift, batch=batch, tokens=tokens,
        x_sample=_from_sample(x, first), x_token=_from_row(x, first),
        y_sample=_from_sample(y, first), y_token=_from_row(y, first),
        gate_stride=_stride(gate), scale_stride=_stride(scale), shift_stride=_stride(shift), eps=eps, **shape,
        num_warps=warps_of(shape["ROWS"] * shape["CHUNK"], HELD), **FUSED,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def shape_of(channels: int, tokens: int) -> dict[str, int]:
    """The constants for rows of so many channels: tiles with the fewest idle lanes, and of these the narrowest."""
    fits = [(c, -(-channels // c)) for c in CHUNK_SIZES]
    chunk, chunks = min(
        (fit for fit in fits if fit[1] <= MOST_CHUNKS or fit[0] == CHUNK_SIZES[-1]), key=lambda fit: fit[0] * fit[1]
    )
    rows = max(1, min(PROGRAM // chunk, triton.next_power_of_2(tokens)))
    return {"CHANNELS": channels, "ROWS": rows, "CHUNKS": chunks, "CHUNK": chunk}


def _even(x: Tensor, y: Tensor | None, by_sample: bool) -> tuple[int, Tensor, Tensor | None]:
    """(first, x, y). first: 1 if a sample is x[i], 0 if it is all of x. x and y: copies, unless their rows are equally
    far apart in a sample."""
    for first in (1,) if by_sample else (0, 1):
        if _from_row(x, first) is not None and _from_row(y, first) is not None:
            return first, x, y
    return int(by_sample), x.contiguous(), None if y is None else y.contiguous()


def _from_row(x: Tensor | None, first: int) -> int | None:
    """How far apart the rows of x are in a sample, which has the dimensions from `first` on; None if they are not
    equally far apart, or channels are not adjacent."""
    if x is None:
        return 0
    shape, stride = x.shape, x.stride()
    if shape[-1] > 1 and stride[-1] != 1:
        return None
    distance = end = None
    for i in range(x.ndim - 2, first - 1, -1):
        if shape[i] > 1:
            if end is not None and stride[i] != end:
                return None
            distance, end = stride[i] if end is None else distance, stride[i] * shape[i]
    return distance or 0


def _from_sample(x: Tensor | None, first: int) -> int:
    return 0 if x is None or not first else x.stride(0)


def _adjacent(row: Tensor | None) -> Tensor | None:
    """A row of each sample whose channels are adjacent."""
    return row if row is None or row.stride(1) == 1 else row.contiguous()


def _stride(row: Tensor | None) -> int:
    return 0 if row is None else row.stride(0)
