"""Rotary embedding: each pair (a, b) of neighbours in a head becomes (a cos - b sin, b cos + a sin).

Rows are tokens of samples, (batch, tokens, heads D). cos and sin are those of a token, the same for all its heads: one
for each element of a head, or for each pair. With a weight each head is first divided by its root mean square, and
multiplied by the weight. A program owns BLOCK elements of one token, then whole heads. It computes in float32 and
rounds once.

Moves, per element: reads x, writes out. The tables stay in the cache: all heads and samples share them.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import FUSED, grid_of, kernel, launch, warps_of
from .tile import load_float32, owner, to_float32

HELD = 8  # elements of a thread
BLOCKS = 512, 1024  # elements of a program


@triton.jit
def load_shared(ptr, column, stride, mask):
    """Cosines, sines or weights of elements as float32; few numbers, read by many programs."""
    return to_float32(tl.load(ptr + column * stride, mask=mask, other=0.0, eviction_policy="evict_last"))


@kernel
def rotate_kernel(
    out_ptr,  # (batch, tokens, WIDTH), the type of x, written
    x_ptr,  # (batch, tokens, WIDTH), any floating type, the elements of a token adjacent
    cos_ptr, sin_ptr,  # (tokens, DEPTH or DEPTH / 2), any floating type
    weight_ptr,  # (DEPTH,), any floating type, and DEPTH is a power of 2; or None: no norm
    rows, tokens, x_sample, x_token, cos_token, cos_column, sin_token, sin_column, eps,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, block = owner()
    if row >= rows:
        return
    sample, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    column = block.to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    x = load_float32(x_ptr + (sample * x_sample + token * x_token) + column, mask)
    if weight_ptr is not None:
        heads = tl.reshape(x, [BLOCK // DEPTH, DEPTH])
        rstd = tl.rsqrt(tl.sum(heads * heads, 1)[:, None] * (1.0 / DEPTH) + eps)
        x = tl.reshape(heads * rstd, [BLOCK]) * load_shared(weight_ptr, column % DEPTH, 1, mask)
    angle = column % DEPTH // 2 if PAIRS else column % DEPTH
    cos = load_shared(cos_ptr + token * cos_token, angle, cos_column, mask)
    sin = load_shared(sin_ptr + token * sin_token, angle, sin_column, mask)
    first, second = tl.split(tl.reshape(x, [BLOCK // 2, 2]))
    turned = tl.reshape(tl.join(-second, first), [BLOCK])
    tl.store(out_ptr + row.to(tl.int64) * WIDTH + column, x * cos + turned * sin, mask=mask)


def rotate(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float) -> None:
    """Write x (batch, tokens, heads, D), rotated, into out, which is contiguous."""
    batch, tokens, heads, depth = x.shape
    if x.stride(3) != 1 or (heads > 1 and x.stride(2) != depth):
        x = x.contiguous()
    rows, width, pairs = batch * tokens, heads * depth, cos.shape[1] != depth
    block = min(BLOCKS, key=lambda size: (-(-width // size) * size, -size))  # the fewest idle lanes
    launch(
        rotate_kernel, grid_of(rows, width, block), out_ptr=out, x_ptr=x, cos_ptr=cos, sin_ptr=sin,
        weight_ptr=None if weight is None else weight.contiguous(), rows=rows, tokens=tokens, eps=eps,
        x_sample=x.stride(0), x_token=x.stride(1),
        cos_token=cos.stride(0), cos_column=cos.stride(1), sin_token=sin.stride(0), sin_column=sin.stride(1),
        WIDTH=width, DEPTH=depth, PAIRS=pairs, BLOCK=block, num_warps=warps_of(block, HELD), **FUSED,
    )  # fmt: skip
