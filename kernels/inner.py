"""Inner products <a, a>, <a, p> and <p, p> of each sample, p = b or b + w (a - b).

Centred, they are those of a and p less their means over the sample. A block is centred by its own mean, and blocks are
merged as in Chan, Golub & LeVeque 1983. So nothing cancels however far a mean is from 0.

Moves, per element: reads a and b.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import FUSED, block_of, grid_of, kernel, launch
from .layout import channels_of, lay_out, sizes_of
from .reduce import reduce
from .tile import load_float32, owner, tile, to_float32

BLOCK_MERGED = 256  # blocks of a sample that a warp merges at a time


@kernel
def inner_kernel(
    a_ptr,  # (batch, size)          any floating type, sample_stride between samples: often half of an output
    b_ptr,  # (batch, size)          any floating type, laid out as a
    guidance_ptr,  # (1,) or None    any floating type: w; None: p = b
    partial_ptr,  # (batch, 3 or 5, blocks) float32, written: the products of a block; CENTRED: and the means of a and p
    batch, size, sample_stride,
    CENTRED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, block = owner()
    if sample >= batch:
        return
    start, offsets, mask = tile(block, size, 1, BLOCK)
    count = tl.minimum(size - start, BLOCK).to(tl.float32)
    start += sample.to(tl.int64) * sample_stride
    a = load_float32(a_ptr + start + offsets, mask)
    p = load_float32(b_ptr + start + offsets, mask)
    if guidance_ptr is not None:
        p += to_float32(tl.load(guidance_ptr)) * (a - p)
    a = tl.where(mask, a, 0.0)
    p = tl.where(mask, p, 0.0)

    blocks = tl.num_programs(0)
    at = partial_ptr + sample.to(tl.int64) * ((5 if CENTRED else 3) * blocks) + block
    if CENTRED:
        a_mean = tl.sum(a) / count
        p_mean = tl.sum(p) / count
        a = tl.where(mask, a - a_mean, 0.0)
        p = tl.where(mask, p - p_mean, 0.0)
        tl.store(at + 3 * blocks, a_mean)
        tl.store(at + 4 * blocks, p_mean)
    tl.store(at, tl.sum(a * a))
    tl.store(at + blocks, tl.sum(a * p))
    tl.store(at + 2 * blocks, tl.sum(p * p))


@triton.jit
def merge_kernel(
    partial_ptr,  # (batch, 5, blocks) float32: of inner_kernel
    out_ptr,  # (batch, 3) float32, written
    size, blocks,
    OWNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The products of a sample from those of its blocks of OWNED elements: first lane by lane, then over all lanes."""
    sample = tl.program_id(0).to(tl.int64)
    partial = partial_ptr + sample * 5 * blocks
    count = tl.zeros([BLOCK], tl.float32)
    a_mean, p_mean, aa, ap, pp = count, count, count, count, count
    for first in range(0, blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        mask = block < blocks
        n = tl.where(mask, tl.minimum(size - block.to(tl.int64) * OWNED, OWNED), 0).to(tl.float32)
        share = n / tl.maximum(count + n, 1.0)
        a = tl.load(partial + 3 * blocks + block, mask=mask, other=0.0) - a_mean
        p = tl.load(partial + 4 * blocks + block, mask=mask, other=0.0) - p_mean
        aa += tl.load(partial + block, mask=mask, other=0.0) + a * a * (count * share)
        ap += tl.load(partial + blocks + block, mask=mask, other=0.0) + a * p * (count * share)
        pp += tl.load(partial + 2 * blocks + block, mask=mask, other=0.0) + p * p * (count * share)
        a_mean += a * share
        p_mean += p * share
        count += n
    a_mean -= tl.sum(count * a_mean) / size
    p_mean -= tl.sum(count * p_mean) / size
    tl.store(out_ptr + sample * 3, tl.sum(aa + count * a_mean * a_mean))
    tl.store(out_ptr + sample * 3 + 1, tl.sum(ap + count * a_mean * p_mean))
    tl.store(out_ptr + sample * 3 + 2, tl.sum(pp + count * p_mean * p_mean))


def inner(out: Tensor, a: Tensor, b: Tensor, guidance: Tensor | None, centred: bool) -> None:
    """Write the products of each sample into out (B, 3), float32."""
    if channels_of(a) == 0 or a.stride() != b.stride():
        _, (a, b) = lay_out(a, b, generated=False)
    batch, size = sizes_of(a)
    constants = block_of(size, 1, False, a, b)
    block, warps = constants["BLOCK"], constants["num_warps"]
    grid = grid_of(batch, size, block)
    partial = torch.empty(batch, 5 if centred else 3, grid[0], dtype=torch.float32, device=a.device)
    launch(
        inner_kernel, grid, a_ptr=a, b_ptr=b, guidance_ptr=guidance, partial_ptr=partial,
        batch=batch, size=size, sample_stride=a.stride(0), CENTRED=centred, BLOCK=block, num_warps=warps, **FUSED,
    )  # fmt: skip
    if not centred:
        reduce(partial, out)
        return
    launch(
        merge_kernel, (batch, 1, 1), partial_ptr=partial, out_ptr=out,
        size=size, blocks=grid[0], OWNED=block, BLOCK=BLOCK_MERGED, num_warps=1, **FUSED,
    )  # fmt: skip
