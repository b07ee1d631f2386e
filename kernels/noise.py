"""Normal noise as a function: z(seed, stream, sample, step, element), Philox4x32-10 and Box-Muller.

Key: the 64-bit seed. Counter: (element // 4, sample, step, stream). Element j of a sample takes output j % 4 of its
block, so four neighbouring elements share one block and a thread's normals lie beside its loads.

Moves, per element: writes z.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox); Box & Muller 1958.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from .coefficients import COS, LOG, SIN
from .launch import block_of, grid_of, kernel, launch, on_nvidia
from .layout import lay_out, sizes_of, stride_of
from .tile import owner, tile

M0 = tl.constexpr(0xD2511F53)
M1 = tl.constexpr(0xCD9E8D57)
W0 = tl.constexpr(0x9E3779B9)
W1 = tl.constexpr(0xBB67AE85)
S0, S1, S2, S3, S4 = (tl.constexpr(c) for c in SIN)
C0, C1, C2, C3, C4, C5 = (tl.constexpr(c) for c in COS)
# The radius wants -2 log u: the factor goes into the coefficients.
L0, L1, L2, L3, L4, L5, L6, L7 = (tl.constexpr(-2 * c) for c in LOG)
MINUS_2_LN2 = tl.constexpr(-1.3862943611198906)
PI = tl.constexpr(3.141592653589793)
BITS_OF_SQRT_HALF = tl.constexpr(0x3F3504F3)


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Ten rounds; counters and key are uint32 (tensors or scalars). Returns four uint32 words."""
    for _ in tl.static_range(10):
        # One 64-bit product gives the high and the low word in one instruction on NVIDIA and AMD.
        p0 = c0.to(tl.uint64) * M0
        p1 = c2.to(tl.uint64) * M1
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = k0 + W0
        k1 = k1 + W1
    return c0, c1, c2, c3


@triton.jit
def box_muller(radius_bits, angle_bits, FAST: tl.constexpr):
    """Two normals from two uint32 words: r cos(pi x), r sin(pi x) with r = sqrt(-2 log u).

    u = (bits + 1/2) 2^-32 rounded to float32, in [2^-33, 1]; x = int32(bits) 2^-31, in [-1, 1].
    FAST takes NVIDIA's approximate log2, sin and cos in place of the polynomials.
    """
    u = radius_bits.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    x = angle_bits.to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077393e-10
    if FAST:
        # abs, not max(., 0): log2 may come out as +1e-8 at u = 1, and abs is a free operand modifier.
        r = tl.sqrt(tl.abs(libdevice.fast_log2f(u) * MINUS_2_LN2))
        return r * libdevice.fast_cosf(x * PI), r * libdevice.fast_sinf(x * PI)
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - BITS_OF_SQRT_HALF) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    log_m = L7
    log_m = log_m * f + L6
    log_m = log_m * f + L5
    log_m = log_m * f + L4
    log_m = log_m * f + L3
    log_m = log_m * f + L2
    log_m = log_m * f + L1
    log_m = log_m * f + L0
    r = tl.sqrt(tl.maximum(exponent.to(tl.float32) * MINUS_2_LN2 + f * log_m, 0.0))
    y = x * x
    sin = ((((S4 * y + S3) * y + S2) * y + S1) * y + S0) * (x - x * y)
    cos = (((((C5 * y + C4) * y + C3) * y + C2) * y + C1) * y + C0) * (1.0 - 4.0 * y)
    return r * cos, r * sin


@triton.jit
def normal4(c0, sample, step, STREAM: tl.constexpr, k0, k1, FAST: tl.constexpr):
    """The four normals of each Philox block c0."""
    stream = tl.full((), STREAM, tl.uint32)
    b0, b1, b2, b3 = philox4x32(c0, sample.to(tl.uint32), step.to(tl.uint32), stream, k0, k1)
    z0, z1 = box_muller(b0, b1, FAST)
    z2, z3 = box_muller(b2, b3, FAST)
    return z0, z1, z2, z3


@triton.jit
def tile_normals(
    seed_ptr, sample, step, block, size,
    STREAM: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The normals of the elements of `tile`, in its order, float32 [BLOCK].

    A thread holds VEC = 4 or 8 neighbours, one or two Philox blocks: 16 bytes of the storage type. So the result has
    the layout of the loads, and nothing passes through shared memory.
    """
    seed = tl.load(seed_ptr).to(tl.uint64, bitcast=True)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    group = (block * (BLOCK // 4)).to(tl.uint32) + (VEC // 4) * tl.arange(0, BLOCK // VEC).to(tl.uint32)
    if CHANNELS > 1:
        group = (group % CHANNELS) * (size // (4 * CHANNELS)).to(tl.uint32) + group // CHANNELS
    z0, z1, z2, z3 = normal4(group, sample, step, STREAM, k0, k1, FAST)
    if VEC == 4:
        z = tl.join(tl.join(z0, z2), tl.join(z1, z3))
    else:
        z4, z5, z6, z7 = normal4(group + 1, sample, step, STREAM, k0, k1, FAST)
        even = tl.join(tl.join(z0, z4), tl.join(z2, z6))
        odd = tl.join(tl.join(z1, z5), tl.join(z3, z7))
        z = tl.join(even, odd)
    return tl.reshape(z, [BLOCK])


@kernel
def normal_kernel(
    out_ptr,  # (batch, size)           any floating type, written: z
    seed_ptr,  # (1,)                   int64
    ids_ptr,  # (batch,) or None        int64: the number of each sample; None: sample i is number i
    step_ptr,  # (1,) or (batch,)       int64
    batch, size, step_stride,
    STREAM: tl.constexpr, FAST: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    sample, block = owner()
    if sample >= batch:
        return
    number = sample if ids_ptr is None else tl.load(ids_ptr + sample)
    step = tl.load(step_ptr + sample.to(tl.int64) * step_stride)
    start, offsets, mask = tile(block, size, CHANNELS, BLOCK)
    z = tile_normals(seed_ptr, number, step, block, size, STREAM, CHANNELS, BLOCK, VEC, FAST)
    tl.store(out_ptr + sample.to(tl.int64) * size + start + offsets, z, mask=mask)


def normal_(out: Tensor, seed: Tensor, ids: Tensor | None, step: Tensor, stream: int) -> None:
    """Fill out (B, ...) with z(seed, stream, ids[i], step, element)."""
    channels, (written,) = lay_out(out, generated=True)
    batch, size = sizes_of(written)
    constants = block_of(size, channels, True, written)
    launch(
        normal_kernel, grid_of(batch, size, constants["BLOCK"]),
        out_ptr=written, seed_ptr=seed, ids_ptr=ids, step_ptr=step,
        batch=batch, size=size, step_stride=stride_of(step),
        STREAM=stream, FAST=on_nvidia(written), **constants,
    )  # fmt: skip
    if written is not out:
        out.copy_(written)
