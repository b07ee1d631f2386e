"""The kernels for CPU tensors, compiled by numba: the functions of the Triton kernels on the same uniforms.

A sample is walked in chunks of 4,096 elements. A chunk goes through short stages over buffers that stay in the
first-level cache: Philox words, Box-Muller, the arithmetic. Each stage converts from and to the storage type if that is
not float32. A stage is a plain loop over arrays that start at 0, the form that LLVM vectorises. What varies (types,
layout, which operands there are) is decided once per chunk, so that each op is compiled once.

Every thread of a team runs the kernel: it claims blocks of chunks from a shared counter until none is left. No result
depends on which thread took which block. The bytes moved are those of the Triton kernel of the same name.

All compiled code stands in this one file. numba's cache watches the file of the function that is called, and no
other: a change elsewhere would go unnoticed. (So a change of coefficients.py takes effect once __pycache__ is deleted.)
"""

import ctypes
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import carray, types
from numba.core import cgutils, config
from numba.extending import intrinsic

from .coefficients import COS, LOG, SIN
from .compiler import can_cache, njit

CHUNK = 4096
# Samples of at most so many elements are generated many at a time.
SHORT = 256
F32, BF16, F16 = 0, 1, 2
MSE, L1, HUBER = 0, 1, 2
KEEP_NONE, KEEP_X0, KEEP_X, KEEP_MIX, KEEP_NEW_MIX, KEEP_NEW_X0 = range(6)
# The place of each column in a row of `update`, and their number.
(
    X0_FROM_X, X0_FROM_PRED, FROM_X0, FROM_X, FROM_PRED, NOISE, FROM_HIST, NOISE_HIGH, GUIDANCE, WIDTH
) = range(10)  # fmt: skip
# With several slots of history, or a mix that is kept, there are more.
FROM_HIST2, FROM_HIST3, SLOT, KEPT_FROM_X0, KEPT_FROM_X, WIDE = range(9, 15)
# Where things lie in a thread's scratch memory, in bytes. Its owner fills NOTHING with 0 and OUTSIDE with NaN.
WORDS, Z, X, PRED, OTHER, GUIDED, X0, RESULT, RAW, NOTHING, OUTSIDE, SCRATCH = (4 * CHUNK * i for i in range(12))

SIN32, COS32 = (tuple(np.float32(c) for c in given) for given in (SIN, COS))
LOG32 = tuple(np.float32(-2 * c) for c in LOG)
MINUS_2_LN2 = np.float32(-1.3862943611198906)
U_SCALE, U_SHIFT, X_SCALE = np.float32(2.0**-32), np.float32(2.0**-33), np.float32(2.0**-31)
ZERO, QUARTER, HALF, ONE, TWO, MINUS_4 = (np.float32(c) for c in (0, 0.25, 0.5, 1, 2, -4))
NO_NOISE = np.float32(-0.0)  # times 0 it is -0, which changes nothing that it is added to
BITS_OF_SQRT_HALF, MANTISSA = np.int32(0x3F3504F3), np.int32(23)
MASK, SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
M0, M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
W0, W1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)

# Processors convert float16 themselves. x86 before 2012 does not; there LLVM would call a function that is missing.
_known = binding.get_host_cpu_features()
_used = _known.flatten() if config.CPU_FEATURES is None else config.CPU_FEATURES
CONVERTS_F16 = "f16c" not in _known or "+f16c" in _used
# So with fused multiply-adds, and x86 before 2013: there LLVM would call a slow function.
FUSES = "fma" not in _known or "+fma" in _used


# LLVM may relax nothing. With "contract" it fused multiply-adds in the scalar remainder of a loop, and not in all of
# its vectors (Intel, AVX-512). Then the bits of an element depend on its place. `fused` asks for a multiply-add.
KERNEL: dict[str, Any] = {"cache": can_cache()}
STAGE = KERNEL | {"no_cfunc_wrapper": True, "no_cpython_wrapper": True}
# For sums only: they run over chunks whose length is given, and so is their order.
SUM = STAGE | {"fastmath": {"contract", "reassoc", "nsz"}}


# --- memory and bits --------------------------------------------------------------------------------------------


@intrinsic
def pointer(typing_context, address):
    """An address, given as an integer, as a void pointer."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(address), codegen


@intrinsic
def add_atomically(typing_context, address, many):
    """The int64 at the address; `many` is added to it in the same atomic step."""

    def codegen(context, builder, signature, args):
        counter = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, args[1], "monotonic")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def bits_of(typing_context, value):
    """The bits of a float32 as an int32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@intrinsic
def float_of(typing_context, bits):
    """The float32 that has these bits, int32 or uint32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(bits), codegen


def _fused(builder, a, b, c):
    return builder.fma(a, b, c) if FUSES else builder.fadd(builder.fmul(a, b), c)


@intrinsic
def fused(typing_context, a, b, c):
    """a b + c of float32, rounded once where the processor can, else twice."""

    def codegen(context, builder, signature, args):
        return _fused(builder, *args)

    return types.float32(types.float32, types.float32, types.float32), codegen


@intrinsic
def polynomial(typing_context, coefficients, x):
    """The polynomial of these coefficients, lowest power first, in fused steps."""

    def codegen(context, builder, signature, args):
        *lower, value = cgutils.unpack_tuple(builder, args[0])
        for c in reversed(lower):
            value = _fused(builder, value, args[1], c)
        return value

    return types.float32(coefficients, types.float32), codegen


@njit(**STAGE)
def floats(address, m):
    """m float32 at the address. Slices of arrays would count references, in atomic steps."""
    return carray(pointer(address), m, np.float32)


@njit(**STAGE)
def halves(address, m):
    return carray(pointer(address), m, np.uint16)


@njit(**STAGE)
def integer(address):
    return carray(pointer(address), 1, np.int64)[0]


@njit(**STAGE)
def gather(source, first, channels, plane, out):
    """out = elements first.. of a sample stored channels last: e lies at (e % plane) channels + e // plane."""
    done = 0
    while done < len(out):
        channel, pixel = divmod(first + done, plane)
        run = min(len(out) - done, plane - pixel)
        for i in range(run):
            out[done + i] = source[(pixel + i) * channels + channel]
        done += run


@njit(**STAGE)
def scatter(values, first, channels, plane, out):
    """The inverse of `gather`: values become elements first.. of a sample stored channels last, out."""
    done = 0
    while done < len(values):
        channel, pixel = divmod(first + done, plane)
        run = min(len(values) - done, plane - pixel)
        for i in range(run):
            out[(pixel + i) * channels + channel] = values[done + i]
        done += run


@njit(**STAGE)
def copy_to(source, out):
    for i in range(len(out)):
        out[i] = source[i]


@njit(**STAGE)
def widen_bf16(source, out):
    for i in range(len(out)):
        out[i] = float_of(np.uint32(np.uint32(source[i]) << np.uint32(16)))


@njit(**STAGE)
def narrow_bf16(values, out):
    """Round to nearest even; NaN stays NaN. Each step is cut to 32 bits, as numba would go on in 64."""
    for i in range(len(out)):
        b = np.uint32(bits_of(values[i]))
        high = np.uint32(b >> np.uint32(16))
        odd = np.uint32(high & np.uint32(1))
        rounded = np.uint32(np.uint32(b + np.uint32(0x7FFF) + odd) >> np.uint32(16))
        quiet = np.uint32(high | np.uint32(0x40))
        out[i] = np.uint16(quiet if values[i] != values[i] else rounded)


@intrinsic
def float_of_half(typing_context, bits):
    """The float32 of these bits of a float16, uint16."""

    def codegen(context, builder, signature, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), codegen


@intrinsic
def half_of(typing_context, value):
    """The bits of the float16 nearest to a float32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), codegen


@njit(**STAGE)
def widen_f16(source, out):
    for i in range(len(out)):
        out[i] = float_of_half(source[i])


@njit(**STAGE)
def narrow_f16(values, out):
    for i in range(len(out)):
        out[i] = half_of(values[i])


@njit(**STAGE)
def read(address, code, at, first, m, channels, plane, scratch, buffer):
    """m float32: elements first.. of the sample that starts `at` elements behind the address.

    They stay where they lie if they lie there as float32, else they go into that buffer of the scratch memory.
    """
    out = floats(scratch + buffer, m)
    if code == F32:
        if channels == 1:
            return floats(address + 4 * (at + first), m)
        gather(floats(address + 4 * at, channels * plane), first, channels, plane, out)
        return out
    source = halves(address + 2 * (at + first), m)
    if channels != 1:
        source = halves(scratch + RAW, m)
        gather(halves(address + 2 * at, channels * plane), first, channels, plane, source)
    if code == BF16:
        widen_bf16(source, out)
    elif CONVERTS_F16:
        widen_f16(source, out)
    return out


@njit(**STAGE)
def destination(address, code, at, first, m, channels, shared, scratch, buffer):
    """Where to write elements first.. in float32: in place if their storage is float32, else the buffer.

    Never in place if the output is `shared` with an operand: a loop over overlapping arrays is not vectorised.
    """
    if code == F32 and channels == 1 and not shared:
        return floats(address + 4 * (at + first), m)
    return floats(scratch + buffer, m)


@njit(**STAGE)
def store(values, address, code, at, first, channels, plane, scratch):
    """Bring what was written to `destination` into storage."""
    m = len(values)
    if code == F32:
        if channels != 1:
            scatter(values, first, channels, plane, floats(address + 4 * at, channels * plane))
        elif values.ctypes.data != address + 4 * (at + first):
            copy_to(values, floats(address + 4 * (at + first), m))
        return
    stored = halves(address + 2 * (at + first) if channels == 1 else scratch + RAW, m)
    if code == BF16:
        narrow_bf16(values, stored)
    elif CONVERTS_F16:
        narrow_f16(values, stored)
    if channels != 1:
        scatter(stored, first, channels, plane, halves(address + 2 * at, channels * plane))


# --- noise ------------------------------------------------------------------------------------------------------


@njit(inline="always")
def philox_round(c0, c1, c2, c3, k0, k1):
    """On 32-bit words in 64-bit lanes. The upper halves may hold anything, so no lane is ever moved."""
    p0, p1 = (c0 & MASK) * M0, (c2 & MASK) * M1
    return (p1 >> SHIFT) ^ c1 ^ np.uint64(k0), p1, (p0 >> SHIFT) ^ c3 ^ np.uint64(k1), p0


@njit(**STAGE)
def philox(first, sample, step, stream, key0, key1, w0, w1, w2, w3):
    """The words of blocks first.. of a sample (Philox4x32-10, Salmon et al. 2011), an even number of blocks.

    Both halves at once: ten rounds are one long chain, and two chains keep the multipliers busy.
    """
    half = len(w0) // 2
    for i in range(half):
        a0, b0 = np.uint64(first) + np.uint64(i), np.uint64(first) + np.uint64(half + i)
        a1, a2, a3 = np.uint64(sample), np.uint64(step), np.uint64(stream)
        b1, b2, b3 = a1, a2, a3
        k0, k1 = key0, key1
        for _ in range(10):
            a0, a1, a2, a3 = philox_round(a0, a1, a2, a3, k0, k1)
            b0, b1, b2, b3 = philox_round(b0, b1, b2, b3, k0, k1)
            k0, k1 = np.uint32(k0 + W0), np.uint32(k1 + W1)
        w0[i], w1[i], w2[i], w3[i] = np.uint32(a0), np.uint32(a1), np.uint32(a2), np.uint32(a3)
        j = half + i
        w0[j], w1[j], w2[j], w3[j] = np.uint32(b0), np.uint32(b1), np.uint32(b2), np.uint32(b3)


@njit(inline="always")
def box_muller(radius_word, angle_word):
    """(r cos(pi x), r sin(pi x)), r = sqrt(-2 log u): see docs/noise.md."""
    bits = bits_of(fused(np.float32(radius_word), U_SCALE, U_SHIFT))
    exponent = np.int32(np.int32(bits - BITS_OF_SQRT_HALF) >> MANTISSA)
    f = float_of(np.int32(bits - np.int32(exponent << MANTISSA))) - ONE
    r = np.sqrt(max(fused(f, polynomial(LOG32, f), np.float32(exponent) * MINUS_2_LN2), ZERO))
    x = np.float32(np.int32(angle_word)) * X_SCALE
    y = x * x
    sin = r * (polynomial(SIN32, y) * fused(-x, y, x))
    cos = r * (polynomial(COS32, y) * fused(MINUS_4, y, ONE))
    return cos, sin


@njit(**STAGE)
def normals_of(w0, w1, w2, w3, z):
    for i in range(len(w0)):
        z0, z1 = box_muller(w0[i], w1[i])
        z2, z3 = box_muller(w2[i], w3[i])
        z[4 * i], z[4 * i + 1], z[4 * i + 2], z[4 * i + 3] = z0, z1, z2, z3


@njit(**STAGE)
def words(scratch, i, blocks):
    return carray(pointer(scratch + WORDS + CHUNK * i), blocks, np.uint32)


@njit(**STAGE)
def normals(seed, ids, row, step, stream, first, z, scratch):
    """z = normals of elements first.. (a multiple of 4) of sample number ids[row], or row; len(z) a multiple of 8."""
    blocks = len(z) // 4
    w0, w1 = words(scratch, 0, blocks), words(scratch, 1, blocks)
    w2, w3 = words(scratch, 2, blocks), words(scratch, 3, blocks)
    sample = row if ids == 0 else integer(ids + 8 * row)
    key = np.uint64(integer(seed))
    philox(
        np.uint32(first // 4), np.uint32(sample), np.uint32(step), np.uint32(stream),
        np.uint32(key), np.uint32(key >> SHIFT), w0, w1, w2, w3,
    )  # fmt: skip
    normals_of(w0, w1, w2, w3, z)


@njit(**STAGE)
def philox_of(w0, w1, w2, w3, stream, key0, key1):
    """The words of the counters (w0, w1, w2, stream), in their place."""
    for i in range(len(w0)):
        a0, a1, a2, a3 = np.uint64(w0[i]), np.uint64(w1[i]), np.uint64(w2[i]), np.uint64(stream)
        k0, k1 = key0, key1
        for _ in range(10):
            a0, a1, a2, a3 = philox_round(a0, a1, a2, a3, k0, k1)
            k0, k1 = np.uint32(k0 + W0), np.uint32(k1 + W1)
        w0[i], w1[i], w2[i], w3[i] = np.uint32(a0), np.uint32(a1), np.uint32(a2), np.uint32(a3)


@njit(**STAGE)
def normals_of_samples(seed, ids, index, index_stride, stream, row, samples, each, z, scratch):
    """z = normals of samples row.., `each` blocks of each."""
    w0, w1 = words(scratch, 0, samples * each), words(scratch, 1, samples * each)
    w2, w3 = words(scratch, 2, samples * each), words(scratch, 3, samples * each)
    for i in range(samples):
        sample = row + i if ids == 0 else integer(ids + 8 * (row + i))
        step = integer(index + 8 * index_stride * (row + i))
        for block in range(each):
            w0[i * each + block] = np.uint32(block)
            w1[i * each + block], w2[i * each + block] = np.uint32(sample), np.uint32(step)
    key = np.uint64(integer(seed))
    philox_of(w0, w1, w2, w3, np.uint32(stream), np.uint32(key), np.uint32(key >> SHIFT))
    normals_of(w0, w1, w2, w3, z)


@njit(**STAGE)
def whole(m):
    """m elements rounded up to what Philox's loop computes at once: no remainder is left to a slower one."""
    return (m + 127) // 128 * 128


@njit(**STAGE)
def table_row(index, stride, sample, table, rows, columns, scratch):
    """The row of the table that belongs to a sample; a row of NaN if the index is outside."""
    i = integer(index + 8 * stride * sample)
    return floats(table + 4 * columns * i if 0 <= i < rows else scratch + OUTSIDE, columns)


# --- kernels: functions of C of the address of their operands, compiled by their launcher -----------------------------


def _operands(integers: str, reals: str = "") -> type[ctypes.Structure]:
    """The operands of a kernel as a C structure: those that every kernel has, then its own.

    Addresses, sizes and type codes are int64; address 0 stands for no operand. `claimed` counts chunks and `members`
    counts threads; both start at 0.
    """
    common = "claimed members scratch block count chunks n channels"
    fields = [(name, ctypes.c_int64) for name in f"{common} {integers}".split()]
    fields += [(name, ctypes.c_double) for name in reals.split()]
    return type("Operands", (ctypes.Structure,), {"_fields_": fields})


_KEY = "seed ids index index_stride stream"
Normal = _operands(f"{_KEY} out out_code")
Noising = _operands(f"{_KEY} table levels x0 x0_code noise noise_code out out_code")
Loss = _operands(
    f"{_KEY} table levels pred pred_code x0 x0_code noise noise_code mask mask_code grad grad_code partial kind",
    "delta loss_scale grad_scale",
)
Scale = _operands("grad grad_code incoming incoming_stride", "factor")
Update = _operands(
    f"{_KEY} rows steps x x_code pred pred_code pred_stride uncond uncond_code variance variance_code "
    "noise noise_code hist hist_code out out_code keep slots columns",
    "clip",
)
NORMAL, NOISING, LOSS, SCALE, UPDATE = (np.dtype(operands) for operands in (Normal, Noising, Loss, Scale, Update))


@njit(**STAGE)
def claim(operands, block):
    """The first of the next `block` chunks that no thread has claimed."""
    return add_atomically(operands, block)


@njit(**STAGE)
def own_scratch(operands, scratch):
    """The scratch memory of this member of the team."""
    return scratch + SCRATCH * add_atomically(operands + 8, 1)


@njit(**STAGE)
def generated(a, k, low, high, scratch):
    """The normals of chunk k; this thread works on chunks low to high - 1.

    Short samples are generated many at a time: one alone would not fill the loops.
    """
    if a.n > SHORT:
        sample, first = k // a.chunks, (k % a.chunks) * CHUNK
        z = floats(scratch + Z, whole(min(CHUNK, a.n - first)))
        step = integer(a.index + 8 * a.index_stride * sample)
        normals(a.seed, a.ids, sample, step, a.stream, first, z, scratch)
        return z
    each = (a.n + 3) // 4
    together = CHUNK // (4 * each)
    place = (k - low) % together
    if place == 0:
        samples = min(together, high - k)
        z = floats(scratch + Z, 4 * each * samples)
        normals_of_samples(a.seed, a.ids, a.index, a.index_stride, a.stream, k, samples, each, z, scratch)
    return floats(scratch + Z + 16 * each * place, 4 * each)


def normal_chunks(operands):
    """out = z."""
    a = carray(pointer(operands), 1, NORMAL)[0]
    scratch = own_scratch(operands, a.scratch)
    low = claim(operands, a.block)
    while low < a.count:
        high = min(low + a.block, a.count)
        for k in range(low, high):
            sample, first = k // a.chunks, (k % a.chunks) * CHUNK
            m, at = min(CHUNK, a.n - first), sample * a.n
            if m == CHUNK and a.out_code == F32 and a.channels == 1:
                index = integer(a.index + 8 * a.index_stride * sample)
                normals(a.seed, a.ids, sample, index, a.stream, first, floats(a.out + 4 * (at + first), m), scratch)
            else:
                z = generated(a, k, low, high, scratch)
                store(z[:m], a.out, a.out_code, at, first, a.channels, a.n // a.channels, scratch)
        low = claim(operands, a.block)


@njit(**STAGE)
def mix(alpha, x, sigma, z, out):
    """Rounds where plain PyTorch rounds, so that the bits are the same; so do `advance` and `add`."""
    for i in range(len(out)):
        out[i] = alpha * x[i] + sigma * z[i]


def noising_chunks(operands):
    """out = alpha x0 + sigma z, with (alpha, sigma) of the table."""
    a = carray(pointer(operands), 1, NOISING)[0]
    scratch = own_scratch(operands, a.scratch)
    low = claim(operands, a.block)
    while low < a.count:
        high = min(low + a.block, a.count)
        for k in range(low, high):
            sample, first = k // a.chunks, (k % a.chunks) * CHUNK
            m, at, plane = min(CHUNK, a.n - first), sample * a.n, a.n // a.channels
            row = table_row(a.index, a.index_stride, sample, a.table, a.levels, 2, scratch)
            if a.noise == 0:
                eps = generated(a, k, low, high, scratch)
            else:
                eps = read(a.noise, a.noise_code, at, first, m, a.channels, plane, scratch, Z)
            x = read(a.x0, a.x0_code, at, first, m, a.channels, plane, scratch, X)
            x_t = destination(a.out, a.out_code, at, first, m, a.channels, a.out in (a.x0, a.noise), scratch, RESULT)
            mix(row[0], x, row[1], eps, x_t)
            store(x_t, a.out, a.out_code, at, first, a.channels, plane, scratch)
        low = claim(operands, a.block)


@njit(**STAGE)
def subtract(x, by, y, out):
    for i in range(len(out)):
        out[i] = fused(-by, y[i], x[i])


@njit(**SUM)
def rho_slope(kind, delta, r, by, slope):
    """The sum of rho(r), and slope = by rho'(r). NaN stays NaN: nothing depends on the sign of r alone."""
    s = ZERO
    if kind == MSE:
        twice = TWO * by
        for i in range(len(r)):
            s += r[i] * r[i]
            slope[i] = twice * r[i]
    elif kind == L1:
        for i in range(len(r)):
            s += np.abs(r[i])
            slope[i] = by * (ONE if r[i] > ZERO else (-ONE if r[i] < ZERO else r[i]))
    else:
        for i in range(len(r)):
            size = np.abs(r[i])
            s += HALF * r[i] * r[i] if size <= delta else delta * (size - HALF * delta)
            slope[i] = by * (delta if r[i] > delta else (-delta if r[i] < -delta else r[i]))
    return s


@njit(**SUM)
def weigh(kind, r, mask, by, slope):
    """The sum of mask rho(r) and slope = by mask rho'(r), from slope = rho'(r): rho = slope (r - part slope)."""
    part = QUARTER if kind == MSE else (ZERO if kind == L1 else HALF)
    s = ZERO
    for i in range(len(r)):
        s += mask[i] * (slope[i] * (r[i] - part * slope[i]))
        slope[i] *= by * mask[i]
    return s


def loss_chunks(operands):
    """partial = loss_scale w sum(m rho(r)) of a chunk and grad = grad_scale w m rho'(r), r = pred - p x0 - q z, with
    (p, q, w) of the table."""
    a = carray(pointer(operands), 1, LOSS)[0]
    scratch = own_scratch(operands, a.scratch)
    low = claim(operands, a.block)
    while low < a.count:
        high = min(low + a.block, a.count)
        for k in range(low, high):
            sample, first = k // a.chunks, (k % a.chunks) * CHUNK
            m, at, plane = min(CHUNK, a.n - first), sample * a.n, a.n // a.channels
            row = table_row(a.index, a.index_stride, sample, a.table, a.levels, 3, scratch)
            r = read(a.pred, a.pred_code, at, first, m, a.channels, plane, scratch, PRED)
            if a.noise != 0 or a.seed != 0:
                if a.noise != 0:
                    eps = read(a.noise, a.noise_code, at, first, m, a.channels, plane, scratch, Z)
                else:
                    eps = generated(a, k, low, high, scratch)
                without = floats(scratch + OTHER, m)
                subtract(r, row[1], eps, without)
                r = without
            if a.x0 != 0:
                without = floats(scratch + RESULT, m)
                subtract(r, row[0], read(a.x0, a.x0_code, at, first, m, a.channels, plane, scratch, X), without)
                r = without
            slope = destination(a.grad, a.grad_code, at, first, m, a.channels, a.grad == 0, scratch, GUIDED)
            by = np.float32(row[2] * a.grad_scale)
            s = rho_slope(a.kind, np.float32(a.delta), r, by if a.mask == 0 else ONE, slope)
            if a.mask != 0:
                mask = read(a.mask, a.mask_code, at, first, m, a.channels, plane, scratch, Z)
                s = weigh(a.kind, r, mask, by, slope)
            carray(pointer(a.partial), a.count, np.float64)[k] = np.float64(s) * (row[2] * a.loss_scale)
            if a.grad != 0:
                store(slope, a.grad, a.grad_code, at, first, a.channels, plane, scratch)
        low = claim(operands, a.block)


@njit(**KERNEL, nogil=True)
def reduce_rows(partial, rows, columns, out):
    """out[row] = the sum of a row of partial, in float64 and in order."""
    terms, sums = carray(pointer(partial), rows * columns, np.float64), floats(out, rows)
    for row in range(rows):
        s = 0.0
        for column in range(columns):
            s += terms[row * columns + column]
        sums[row] = s


@njit(**STAGE)
def multiply(by, x):
    for i in range(len(x)):
        x[i] *= by


def scale_chunks(operands):
    """grad *= incoming factor."""
    a = carray(pointer(operands), 1, SCALE)[0]
    scratch = own_scratch(operands, a.scratch)
    low = claim(operands, a.block)
    while low < a.count:
        high = min(low + a.block, a.count)
        for k in range(low, high):
            sample, first = k // a.chunks, (k % a.chunks) * CHUNK
            by = np.float32(floats(a.incoming + 4 * a.incoming_stride * sample, 1)[0] * a.factor)
            if by != ONE:
                m = min(CHUNK, a.n - first)
                x = read(a.grad, a.grad_code, sample * a.n, first, m, a.channels, a.n // a.channels, scratch, X)
                multiply(by, x)
                store(x, a.grad, a.grad_code, sample * a.n, first, a.channels, a.n // a.channels, scratch)
        low = claim(operands, a.block)


@njit(**STAGE)
def guide(pred, uncond, w, out):
    for i in range(len(out)):
        out[i] = fused(w, pred[i] - uncond[i], uncond[i])


@njit(**STAGE)
def advance(row, clip, x, pred, f, z, x0, out):
    """x0 = clip(a x + b pred), out = c x0 + d x + e pred + f z; NaN stays NaN, and clip = inf changes nothing."""
    a, b = row[X0_FROM_X], row[X0_FROM_PRED]
    c, d, e = row[FROM_X0], row[FROM_X], row[FROM_PRED]
    for i in range(len(out)):
        v = a * x[i] + b * pred[i]
        v = clip if v > clip else v
        v = -clip if v < -clip else v
        x0[i] = v
        out[i] = c * v + d * x[i] + e * pred[i] + f * z[i]


@njit(**STAGE)
def add(by, x, out):
    for i in range(len(out)):
        out[i] += by * x[i]


@njit(**STAGE)
def add_learned(f, h, raw_variance, z, out):
    for i in range(len(out)):
        out[i] = fused(np.exp(fused(fused(HALF, raw_variance[i], HALF), h - f, f)), z[i], out[i])


def update_chunks(operands):
    """out = c x0hat + d x + e pred + f z + g hist, with the numbers of the row: see kernels/update.py."""
    a = carray(pointer(operands), 1, UPDATE)[0]
    scratch = own_scratch(operands, a.scratch)
    noisy, clip = a.noise != 0 or a.seed != 0, np.float32(a.clip)
    low = claim(operands, a.block)
    while low < a.count:
        high = min(low + a.block, a.count)
        for k in range(low, high):
            sample, first = k // a.chunks, (k % a.chunks) * CHUNK
            m, at, plane = min(CHUNK, a.n - first), sample * a.n, a.n // a.channels
            row = table_row(a.index, a.index_stride, sample, a.rows, a.steps, a.columns, scratch)
            x0 = floats(scratch + X0, m)
            result = destination(a.out, a.out_code, at, first, m, a.channels, a.out == a.x, scratch, RESULT)
            state = read(a.x, a.x_code, at, first, m, a.channels, plane, scratch, X)
            p = read(a.pred, a.pred_code, sample * a.pred_stride, first, m, a.channels, plane, scratch, PRED)
            if a.uncond != 0:
                other = read(
                    a.uncond, a.uncond_code, sample * a.pred_stride, first, m, a.channels, plane, scratch, OTHER
                )
                guided = floats(scratch + GUIDED, m)
                guide(p, other, row[GUIDANCE], guided)
                p = guided
            eps = floats(scratch + NOTHING, m)
            if a.noise != 0:
                eps = read(a.noise, a.noise_code, at, first, m, a.channels, plane, scratch, Z)
            elif a.seed != 0:
                eps = generated(a, k, low, high, scratch)
            if noisy and a.variance != 0:
                v = read(
                    a.variance, a.variance_code, sample * a.pred_stride, first, m, a.channels, plane, scratch, OTHER
                )
                advance(row, clip, state, p, NO_NOISE, floats(scratch + NOTHING, m), x0, result)
                add_learned(row[NOISE], row[NOISE_HIGH], v, eps, result)
            else:
                advance(row, clip, state, p, row[NOISE] if noisy else NO_NOISE, eps, x0, result)
            if a.hist != 0:
                kept = x0 if a.keep == KEEP_X0 or a.keep == KEEP_NEW_X0 else state
                if a.keep == KEEP_MIX or a.keep == KEEP_NEW_MIX:
                    kept = floats(scratch + GUIDED, m)
                    mix(row[KEPT_FROM_X0], x0, row[KEPT_FROM_X], state, kept)
                for slot in range(a.slots):
                    there = at + slot * a.n * (a.count // a.chunks)
                    share = row[FROM_HIST] if slot == 0 else row[FROM_HIST2 + slot - 1]
                    if a.keep < KEEP_NEW_MIX:
                        past = read(a.hist, a.hist_code, there, first, m, a.channels, plane, scratch, OTHER)
                        add(share, past, result)
                    if a.slots == 1 or row[SLOT] == slot:
                        store(kept, a.hist, a.hist_code, there, first, a.channels, plane, scratch)
            store(result, a.out, a.out_code, at, first, a.channels, plane, scratch)
        low = claim(operands, a.block)
