"""The kernels for CPU tensors, compiled by numba: the functions of the Triton kernels on the same uniforms.

A sample is walked in chunks of 2,048 elements. A chunk goes through short stages over buffers that stay in the
first-level cache: conversion from the storage type, Philox words, Box-Muller, the arithmetic, conversion back. A stage
is a plain loop over arrays that start at 0, the form that LLVM vectorises, and what varies (types, layout, which
operands there are) is decided once a chunk, so that each op is compiled once.

Chunks are dealt out to Python threads (compiled code holds no interpreter lock). That is safe beside OpenMP, after
fork and under concurrent calls, and no result depends on the number of threads.
"""

import os
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from .coefficients import COS, LOG, SIN
from .layout import laid_like, lay_out, sliced_like

CHUNK = 2048
# Below this many elements a call stays on its thread: waking another costs more than it saves.
PARALLEL_FROM = 65536
F32, BF16, F16 = 0, 1, 2
CODES = {torch.float32: F32, torch.bfloat16: BF16, torch.float16: F16}
RHOS = {"mse": 0, "l1": 1, "huber": 2}
KEEPS = {"none": 0, "x0hat": 1, "x": 2}

S0, S1, S2, S3, S4 = (np.float32(c) for c in SIN)
C0, C1, C2, C3, C4, C5 = (np.float32(c) for c in COS)
L0, L1, L2, L3, L4, L5, L6, L7 = (np.float32(-2 * c) for c in LOG)
MINUS_2_LN2 = np.float32(-1.3862943611198906)
U_SCALE, U_SHIFT, X_SCALE = np.float32(2.0**-32), np.float32(2.0**-33), np.float32(2.0**-31)
ZERO, HALF, ONE, TWO, FOUR = (np.float32(c) for c in (0, 0.5, 1, 2, 4))
REBIAS = np.float32(2.0**112)
BITS_OF_SQRT_HALF = np.int32(0x3F3504F3)
MASK, SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
M0, M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
W0, W1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)

# Multiply-adds may be fused, as on a GPU. Nothing that could change NaN or infinity is relaxed.
ENTRY: dict[str, Any] = {"nogil": True, "cache": True, "fastmath": {"contract"}, "no_cfunc_wrapper": True}
STAGE = ENTRY | {"no_cpython_wrapper": True}
# The arithmetic of noising and update rounds where plain PyTorch does, and gives its bits.
EXACT = STAGE | {"fastmath": False}
SUM = STAGE | {"fastmath": {"contract", "reassoc", "nsz"}}


@intrinsic
def pointer(typing_context, address):
    """An address, given as an integer, as a void pointer."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(address), codegen


# --- storage ----------------------------------------------------------------------------------------------------


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
def scatter(values, first, channels, plane, target):
    done = 0
    while done < len(values):
        channel, pixel = divmod(first + done, plane)
        run = min(len(values) - done, plane - pixel)
        for i in range(run):
            target[(pixel + i) * channels + channel] = values[done + i]
        done += run


@njit(**STAGE)
def copy(source, out):
    for i in range(len(out)):
        out[i] = source[i]


@njit(**STAGE)
def widen_bf16(source, bits):
    for i in range(len(bits)):
        bits[i] = np.uint32(source[i]) << np.uint32(16)


@njit(**STAGE)
def narrow_bf16(bits, out):
    """Round to nearest even; NaN stays NaN."""
    for i in range(len(out)):
        b = bits[i]
        rounded = np.uint32(b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        quiet = (b >> np.uint32(16)) | np.uint32(0x40)
        out[i] = np.uint16(quiet if (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000) else rounded)


@njit(**STAGE)
def widen_f16(source, bits):
    """Exponent and mantissa moved into place, the full exponent for infinity and NaN; `rebias_f16` does the rest."""
    for i in range(len(bits)):
        h = np.uint32(source[i])
        full = np.uint32(0x70000000) if (h & np.uint32(0x7C00)) == np.uint32(0x7C00) else np.uint32(0)
        bits[i] = ((h & np.uint32(0x8000)) << np.uint32(16)) | ((h & np.uint32(0x7FFF)) << np.uint32(13)) | full


@njit(**STAGE)
def rebias_f16(source, values):
    for i in range(len(values)):  # 2^112 is the difference of the exponents' biases; infinity and NaN have theirs
        full = (source[i] & np.uint16(0x7C00)) == np.uint16(0x7C00)
        values[i] = values[i] if full else values[i] * REBIAS


@njit(**STAGE)
def half_plus(values, moved):
    """|value| + 1/2 rounds a float16 subnormal to its place among the low mantissa bits."""
    for i in range(len(moved)):
        moved[i] = np.abs(values[i]) + HALF


@njit(**STAGE)
def narrow_f16(bits, moved, out):
    """Round to nearest even; from 65520 on infinity; NaN stays NaN."""
    for i in range(len(out)):
        b = bits[i] & np.uint32(0x7FFFFFFF)
        normal = np.uint32(b + np.uint32(0xC8000FFF) + ((b >> np.uint32(13)) & np.uint32(1))) >> np.uint32(13)
        small = np.uint32(moved[i] - np.uint32(0x3F000000))
        h = small if b < np.uint32(0x38800000) else normal
        h = np.uint32(0x7C00) if b >= np.uint32(0x477FF000) else h
        h = np.uint32(0x7E00) if b > np.uint32(0x7F800000) else h
        out[i] = np.uint16(h | ((bits[i] >> np.uint32(16)) & np.uint32(0x8000)))


@njit(**STAGE)
def read(address, code, at, first, channels, plane, buffer, raw):
    """float32 of elements first.. of the sample that starts `at` elements behind the address: where they lie, if that
    is what lies there, else in the buffer."""
    m = len(buffer)
    if code == F32:
        if channels == 1:
            return carray(pointer(address + 4 * (at + first)), m, np.float32)
        gather(carray(pointer(address + 4 * at), channels * plane, np.float32), first, channels, plane, buffer)
        return buffer
    if channels == 1:
        copy(carray(pointer(address + 2 * (at + first)), m, np.uint16), raw[:m])
    else:
        gather(carray(pointer(address + 2 * at), channels * plane, np.uint16), first, channels, plane, raw[:m])
    if code == BF16:
        widen_bf16(raw[:m], buffer.view(np.uint32))
    else:
        widen_f16(raw[:m], buffer.view(np.uint32))
        rebias_f16(raw[:m], buffer)
    return buffer


@njit(**STAGE)
def target(address, code, at, first, channels, buffer, shared):
    """Where to write elements first.. in float32: in place, if that is their storage, else the buffer. Not in place
    where an operand is `shared` with the output: a loop over overlapping arrays is not vectorised."""
    if code == F32 and channels == 1 and not shared:
        return carray(pointer(address + 4 * (at + first)), len(buffer), np.float32)
    return buffer


@njit(**STAGE)
def store(values, address, code, at, first, channels, plane, raw, moved):
    """Bring what was written to `target` into storage."""
    m = len(values)
    if code == F32:
        if channels == 1:
            if values.ctypes.data == address + 4 * (at + first):
                return
            copy(values, carray(pointer(address + 4 * (at + first)), m, np.float32))
        else:
            scatter(values, first, channels, plane, carray(pointer(address + 4 * at), channels * plane, np.float32))
        return
    if code == BF16:
        narrow_bf16(values.view(np.uint32), raw[:m])
    else:
        half_plus(values, moved[:m])
        narrow_f16(values.view(np.uint32), moved[:m].view(np.uint32), raw[:m])
    if channels == 1:
        copy(raw[:m], carray(pointer(address + 2 * (at + first)), m, np.uint16))
    else:
        scatter(raw[:m], first, channels, plane, carray(pointer(address + 2 * at), channels * plane, np.uint16))


# --- noise ------------------------------------------------------------------------------------------------------


@njit(inline="always")
def philox_round(c0, c1, c2, c3, k0, k1):
    """On 32-bit words in 64-bit lanes, whose upper halves may hold anything: so no lane is ever moved."""
    p0, p1 = (c0 & MASK) * M0, (c2 & MASK) * M1
    return (p1 >> SHIFT) ^ c1 ^ np.uint64(k0), p1, (p0 >> SHIFT) ^ c3 ^ np.uint64(k1), p0


@njit(**STAGE)
def philox(first, sample, step, stream, key0, key1, w0, w1, w2, w3):
    """The words of blocks first.. of a sample (Philox4x32-10, Salmon et al. 2011)."""
    for i in range(len(w0)):
        c0, c1, c2, c3 = np.uint64(first) + np.uint64(i), np.uint64(sample), np.uint64(step), np.uint64(stream)
        k0, k1 = key0, key1
        for _ in range(10):
            c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0, k1)
            k0, k1 = np.uint32(k0 + W0), np.uint32(k1 + W1)
        w0[i], w1[i], w2[i], w3[i] = np.uint32(c0), np.uint32(c1), np.uint32(c2), np.uint32(c3)


@njit(**STAGE)
def uniform(words, u):
    for i in range(len(u)):
        u[i] = np.float32(words[i]) * U_SCALE + U_SHIFT


@njit(**STAGE)
def exponent_mantissa(bits, exponent, mantissa):
    for i in range(len(exponent)):
        e = np.int32(np.int32(bits[i] - BITS_OF_SQRT_HALF) >> np.int32(23))
        exponent[i] = np.float32(e)
        mantissa[i] = np.int32(bits[i] - np.int32(e << np.int32(23)))


@njit(**STAGE)
def radius(exponent, mantissa, r):
    for i in range(len(r)):
        f = mantissa[i] - ONE
        log_m = ((((((L7 * f + L6) * f + L5) * f + L4) * f + L3) * f + L2) * f + L1) * f + L0
        r[i] = np.sqrt(max(exponent[i] * MINUS_2_LN2 + f * log_m, ZERO))


@njit(**STAGE)
def polar(angle, r, cos, sin):
    for i in range(len(r)):
        x = np.float32(angle[i]) * X_SCALE
        y = x * x
        sin[i] = r[i] * (((((S4 * y + S3) * y + S2) * y + S1) * y + S0) * (x - x * y))
        cos[i] = r[i] * ((((((C5 * y + C4) * y + C3) * y + C2) * y + C1) * y + C0) * (ONE - FOUR * y))


@njit(**STAGE)
def interleave(z0, z1, z2, z3, z):
    for i in range(len(z0)):
        z[4 * i], z[4 * i + 1], z[4 * i + 2], z[4 * i + 3] = z0[i], z1[i], z2[i], z3[i]


@njit(**STAGE)
def normals(seed, sample, step, stream, first, z, words, parts):
    """z = normals of elements first.. (a multiple of 4) of a sample; z has room for whole blocks."""
    blocks = len(z) // 4
    w0, w1, w2, w3 = words[0, :blocks], words[1, :blocks], words[2, :blocks], words[3, :blocks]
    key = np.uint64(carray(pointer(seed), 1, np.int64)[0])
    philox(
        np.uint32(first // 4), np.uint32(sample), np.uint32(step), np.uint32(stream),
        np.uint32(key), np.uint32(key >> np.uint64(32)), w0, w1, w2, w3,
    )  # fmt: skip
    u, exponent, mantissa, r = parts[0, :blocks], parts[1, :blocks], parts[2, :blocks], parts[3, :blocks]
    for half in range(2):
        uniform(w0 if half == 0 else w2, u)
        exponent_mantissa(u.view(np.int32), exponent, mantissa.view(np.int32))
        radius(exponent, mantissa, r)
        angle = (w1 if half == 0 else w3).view(np.int32)
        polar(angle, r, parts[4 + 2 * half, :blocks], parts[5 + 2 * half, :blocks])
    interleave(parts[4, :blocks], parts[5, :blocks], parts[6, :blocks], parts[7, :blocks], z)


@njit(**STAGE)
def number_of(ids, sample):
    return sample if ids == 0 else carray(pointer(ids + 8 * sample), 1, np.int64)[0]


@njit(**STAGE)
def row_of(index, stride, sample, table, rows, columns):
    """(index, its row of the table): a row of NaN where the index is outside."""
    i = carray(pointer(index + 8 * stride * sample), 1, np.int64)[0]
    row = np.full(columns, np.nan, np.float32)
    if 0 <= i < rows:
        copy(carray(pointer(table + 4 * columns * i), columns, np.float32), row)
    return i, row


@njit(**STAGE)
def scratch():
    """(words, parts of Box-Muller, normals, 16-bit buffer, float buffer for rounding)."""
    return (
        np.empty((4, CHUNK // 4), np.uint32),
        np.empty((8, CHUNK // 4), np.float32),
        np.empty(CHUNK, np.float32),
        np.empty(CHUNK, np.uint16),
        np.empty(CHUNK, np.float32),
    )


# --- ops: chunks lo to hi of a call -----------------------------------------------------------------------------


@njit(**ENTRY)
def normal_chunks(lo, hi, chunks, n, channels, seed, ids, step, step_stride, stream, out, out_code):
    words, parts, z, raw, moved = scratch()
    for k in range(lo, hi):
        sample, first = k // chunks, (k % chunks) * CHUNK
        m = min(CHUNK, n - first)
        index = carray(pointer(step + 8 * step_stride * sample), 1, np.int64)[0]
        normals(seed, number_of(ids, sample), index, stream, first, z[: (m + 3) // 4 * 4], words, parts)
        store(z[:m], out, out_code, sample * n, first, channels, n // channels, raw, moved)


@njit(**EXACT)
def mix(alpha, x, sigma, z, out):
    for i in range(len(out)):
        out[i] = alpha * x[i] + sigma * z[i]


@njit(**ENTRY)
def noising_chunks(
    lo, hi, chunks, n, channels, seed, ids, t, t_stride, stream, table, levels,
    x0, x0_code, noise, noise_code, out, out_code,
):  # fmt: skip
    words, parts, z, raw, moved = scratch()
    buffers = np.empty((2, CHUNK), np.float32)
    for k in range(lo, hi):
        sample, first = k // chunks, (k % chunks) * CHUNK
        m, at, plane = min(CHUNK, n - first), sample * n, n // channels
        level, row = row_of(t, t_stride, sample, table, levels, 2)
        if noise == 0:
            normals(seed, number_of(ids, sample), level, stream, first, z[: (m + 3) // 4 * 4], words, parts)
            eps = z[:m]
        else:
            eps = read(noise, noise_code, at, first, channels, plane, z[:m], raw)
        x = read(x0, x0_code, at, first, channels, plane, buffers[0, :m], raw)
        x_t = target(out, out_code, at, first, channels, buffers[1, :m], False)
        mix(row[0], x, row[1], eps, x_t)
        store(x_t, out, out_code, at, first, channels, plane, raw, moved)


@njit(**STAGE)
def subtract(r, by, x):
    for i in range(len(r)):
        r[i] -= by * x[i]


@njit(**STAGE)
def rho_slope(kind, delta, r, value):
    """value = rho(r), r = rho'(r)."""
    if kind == 0:
        for i in range(len(r)):
            value[i] = r[i] * r[i]
            r[i] = TWO * r[i]
    elif kind == 1:
        for i in range(len(r)):
            value[i] = np.abs(r[i])
            r[i] = ONE if r[i] > ZERO else (-ONE if r[i] < ZERO else r[i])
    else:
        for i in range(len(r)):
            size = np.abs(r[i])
            value[i] = HALF * r[i] * r[i] if size <= delta else delta * (size - HALF * delta)
            # Not by the sign of r: NaN stays NaN.
            r[i] = delta if r[i] > delta else (-delta if r[i] < -delta else r[i])


@njit(**SUM)
def total(values):
    s = ZERO
    for i in range(len(values)):
        s += values[i]
    return s


@njit(**STAGE)
def scale(by, x):
    for i in range(len(x)):
        x[i] *= by


@njit(**ENTRY)
def loss_chunks(
    lo, hi, chunks, n, channels, seed, ids, t, t_stride, stream, table, levels,
    pred, pred_code, x0, x0_code, noise, noise_code, grad, grad_code, partial, kind, delta, loss_scale, grad_scale,
):  # fmt: skip
    words, parts, z, raw, moved = scratch()
    residual, value = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    for k in range(lo, hi):
        sample, first = k // chunks, (k % chunks) * CHUNK
        m, at, plane = min(CHUNK, n - first), sample * n, n // channels
        level, row = row_of(t, t_stride, sample, table, levels, 3)
        r = residual[:m]
        copy(read(pred, pred_code, at, first, channels, plane, r, raw), r)
        if x0 != 0:
            subtract(r, row[0], read(x0, x0_code, at, first, channels, plane, z[:m], raw))
        if noise != 0:
            subtract(r, row[1], read(noise, noise_code, at, first, channels, plane, z[:m], raw))
        elif seed != 0:
            normals(seed, number_of(ids, sample), level, stream, first, z[: (m + 3) // 4 * 4], words, parts)
            subtract(r, row[1], z[:m])
        rho_slope(kind, delta, r, value[:m])
        carray(pointer(partial + 8 * k), 1, np.float64)[0] = np.float64(total(value[:m])) * (row[2] * loss_scale)
        if grad != 0:
            scale(np.float32(row[2] * grad_scale), r)
            store(r, grad, grad_code, at, first, channels, plane, raw, moved)


@njit(**ENTRY)
def reduce_rows(partial, out):
    """out[row] = sum of partial[row, :], in float64 and in order."""
    for row in range(len(out)):
        s = 0.0
        for column in range(partial.shape[1]):
            s += partial[row, column]
        out[row] = s


@njit(**ENTRY)
def scale_chunks(lo, hi, chunks, n, channels, grad, grad_code, incoming, incoming_stride, factor):
    _, _, values, raw, moved = scratch()
    for k in range(lo, hi):
        sample, first = k // chunks, (k % chunks) * CHUNK
        by = np.float32(carray(pointer(incoming + 4 * incoming_stride * sample), 1, np.float32)[0] * factor)
        if by != ONE:
            x = values[: min(CHUNK, n - first)]
            x = read(grad, grad_code, sample * n, first, channels, n // channels, x, raw)
            scale(by, x)
            store(x, grad, grad_code, sample * n, first, channels, n // channels, raw, moved)


@njit(**STAGE)
def guide(pred, uncond, w, out):
    for i in range(len(out)):
        out[i] = uncond[i] + w * (pred[i] - uncond[i])


@njit(**EXACT)
def estimate(a, x, b, pred, clip, x0):
    """x0 = clip(a x + b pred); NaN stays NaN, and clip = inf leaves the rest."""
    for i in range(len(x0)):
        v = a * x[i] + b * pred[i]
        v = clip if v > clip else v
        x0[i] = -clip if v < -clip else v


@njit(**EXACT)
def combine(c, x0, d, x, e, pred, out):
    for i in range(len(out)):
        out[i] = c * x0[i] + d * x[i] + e * pred[i]


@njit(**EXACT)
def add(by, x, out):
    for i in range(len(out)):
        out[i] += by * x[i]


@njit(**STAGE)
def add_learned(f, h, raw_variance, z, out):
    for i in range(len(out)):
        out[i] += np.exp(f + (HALF * raw_variance[i] + HALF) * (h - f)) * z[i]


@njit(**ENTRY)
def update_chunks(
    lo, hi, chunks, n, channels, seed, ids, step, step_stride, stream, rows, steps,
    x, x_code, pred, pred_code, pred_stride, uncond, uncond_code, variance, variance_code,
    noise, noise_code, hist, hist_code, out, out_code, clip, keep,
):  # fmt: skip
    words, parts, z, raw, moved = scratch()
    buffers = np.empty((5, CHUNK), np.float32)
    for k in range(lo, hi):
        sample, first = k // chunks, (k % chunks) * CHUNK
        m, at, plane = min(CHUNK, n - first), sample * n, n // channels
        index, row = row_of(step, step_stride, sample, rows, steps, 9)
        x0, result = buffers[0, :m], target(out, out_code, at, first, channels, buffers[1, :m], out == x)
        state = read(x, x_code, at, first, channels, plane, buffers[2, :m], raw)
        p = read(pred, pred_code, sample * pred_stride, first, channels, plane, buffers[3, :m], raw)
        if uncond != 0:
            other = read(uncond, uncond_code, sample * pred_stride, first, channels, plane, buffers[4, :m], raw)
            guide(p, other, row[8], buffers[3, :m])
            p = buffers[3, :m]
        estimate(row[0], state, row[1], p, clip, x0)
        combine(row[2], x0, row[3], state, row[4], p, result)
        eps = z[:m]
        if noise != 0:
            eps = read(noise, noise_code, at, first, channels, plane, eps, raw)
        elif seed != 0:
            normals(seed, number_of(ids, sample), index, stream, first, z[: (m + 3) // 4 * 4], words, parts)
        if noise != 0 or seed != 0:
            if variance != 0:
                v = read(variance, variance_code, sample * pred_stride, first, channels, plane, buffers[4, :m], raw)
                add_learned(row[5], row[7], v, eps, result)
            else:
                add(row[5], eps, result)
        if hist != 0:
            add(row[6], read(hist, hist_code, at, first, channels, plane, buffers[4, :m], raw), result)
            store(x0 if keep == 1 else state, hist, hist_code, at, first, channels, plane, raw, moved)
        store(result, out, out_code, at, first, channels, plane, raw, moved)


# --- launchers --------------------------------------------------------------------------------------------------

_pools: dict[int, ThreadPoolExecutor] = {}


def _pool() -> ThreadPoolExecutor:
    """This process's threads; a forked child has none of its parent's and makes its own."""
    pid = os.getpid()
    if pid not in _pools:
        _pools.clear()
        _pools[pid] = ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="fastdiff")
    return _pools[pid]


def _run(kernel: Any, laid: Tensor, channels: int, *args: Any) -> None:
    """Run a kernel over all chunks of all samples, on torch.get_num_threads() threads where that pays."""
    batch, n = len(laid), laid.numel() // len(laid)
    chunks = -(-n // CHUNK)
    count = batch * chunks
    threads = min(torch.get_num_threads(), count) if laid.numel() >= PARALLEL_FROM else 1
    bounds = [count * i // threads for i in range(threads + 1)]
    parts = list(pairwise(bounds))
    futures = [_pool().submit(kernel, lo, hi, chunks, n, channels, *args) for lo, hi in parts[1:]]
    kernel(*parts[0], chunks, n, channels, *args)
    wait(futures)
    for future in futures:
        future.result()


def _address(t: Tensor | None) -> tuple[int, int]:
    """(address, type code); address 0 stands for no operand."""
    return (0, 0) if t is None else (t.data_ptr(), CODES[t.dtype])


def _storable(t: Tensor | None) -> Tensor | None:
    """Operands of other floating types are converted first."""
    return t if t is None or t.dtype in CODES else t.float()


def _noise_key(seed: Tensor | None, ids: Tensor | None, index: Tensor, stream: int) -> tuple[int, ...]:
    """(seed, ids, index, stride of index, stream) as kernels take them."""
    addresses = (0 if t is None else t.data_ptr() for t in (seed, ids))
    return *addresses, index.data_ptr(), int(index.numel() > 1), stream


def normal_(out: Tensor, seed: Tensor, ids: Tensor | None, step: Tensor, stream: int) -> None:
    """Fill out (B, ...) with z(seed, stream, ids[i], step, element)."""
    channels, (laid,) = lay_out(out, generated=True)
    _run(normal_chunks, laid, channels, *_noise_key(seed, ids, step, stream), *_address(laid))
    if laid is not out:
        out.copy_(laid)


def noising(
    out: Tensor, x0: Tensor, t: Tensor, table: Tensor,
    seed: Tensor | None, ids: Tensor | None, noise: Tensor | None, stream: int,
) -> None:  # fmt: skip
    """Write x_t into out (B, ...), shaped like x0."""
    channels, (laid, x0, noise) = lay_out(out, x0, _storable(noise), generated=noise is None)
    _run(
        noising_chunks, laid, channels, *_noise_key(seed, ids, t, stream), table.data_ptr(), len(table),
        *_address(x0), *_address(noise), *_address(laid),
    )  # fmt: skip
    if laid is not out:
        out.copy_(laid)


def loss(
    out: Tensor, grad: Tensor | None, pred: Tensor, x0: Tensor | None, t: Tensor, table: Tensor,
    seed: Tensor | None, ids: Tensor | None, noise: Tensor | None, stream: int,
    rho: str, delta: float, scale: float, grad_scale: float,
) -> None:  # fmt: skip
    """Write scale w_t sum(rho) of each sample into out (B,), or of the whole batch into out (1,), float32; and
    grad_scale w_t rho' into grad, shaped like pred, if it is given."""
    generated = noise is None and seed is not None
    lead = pred if grad is None else grad
    channels, (laid, pred, x0, noise) = lay_out(lead, pred, _storable(x0), _storable(noise), generated=generated)
    partial = np.empty(len(laid) * -(-laid[0].numel() // CHUNK))
    _run(
        loss_chunks, laid, channels, *_noise_key(seed, ids, t, stream), table.data_ptr(), len(table),
        *_address(pred), *_address(x0), *_address(noise), *_address(None if grad is None else laid),
        partial.ctypes.data, RHOS[rho], np.float32(delta), scale, grad_scale,
    )  # fmt: skip
    reduce_rows(partial.reshape(len(out), -1), out.numpy())
    if grad is not None and laid is not grad:
        grad.copy_(laid)


def scale_(grad: Tensor, incoming: Tensor, factor: float) -> None:
    """Gapless grad *= incoming * factor in place, incoming (1,) or (B,) float32; returns at once where that is 1."""
    _run(scale_chunks, grad, 1, *_address(grad), incoming.data_ptr(), int(incoming.numel() > 1), factor)


def update(
    out: Tensor, x: Tensor, pred: Tensor, rows: Tensor, step: Tensor, seed: Tensor | None, ids: Tensor | None,
    uncond: Tensor | None, raw: Tensor | None, noise: Tensor | None, hist: Tensor | None,
    clip: float | None, keep: str, stream: int,
) -> None:  # fmt: skip
    """Write x' into out (B, ...), which may be x; hist, if given, is overwritten with what `keep` names."""
    generated = noise is None and seed is not None
    channels, (laid, x, noise, past) = lay_out(out, x, _storable(noise), hist, generated=generated)
    slices = [_storable(t) for t in (pred, uncond, raw)]
    if any(t is not None and not sliced_like(laid, t, slices[0].stride(0)) for t in slices):
        slices = [None if t is None else laid_like(laid, t) for t in slices]
    pred, uncond, raw = slices
    _run(
        update_chunks, laid, channels, *_noise_key(seed, ids, step, stream), rows.data_ptr(), len(rows),
        *_address(x), *_address(pred), pred.stride(0), *_address(uncond), *_address(raw),
        *_address(noise), *_address(past), *_address(laid),
        np.float32(np.inf if clip is None else clip), KEEPS[keep],
    )  # fmt: skip
    if past is not hist:
        hist.copy_(past)
    if laid is not out:
        out.copy_(laid)
