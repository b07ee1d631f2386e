"""Launchers of the kernels for CPU tensors: layout, addresses, and threads."""

import ctypes
import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import cfunc, types
from torch import Tensor

from . import cpu_compiled as compiled
from . import openmp
from .cpu_compiled import BF16, CHUNK, F16, F32, HUBER, KEEP_NONE, KEEP_X, KEEP_X0, L1, MSE, OUTSIDE, SCRATCH
from .layout import laid_like, lay_out, sliced_like

# Below this many elements a call stays on its thread, as PyTorch's do (at::internal::GRAIN_SIZE).
PARALLEL_FROM = 32768
# Claims to a thread: one that starts late, or is held up, leaves its share to the others.
CLAIMS = 8
CODES = {torch.float32: F32, torch.bfloat16: BF16} | ({torch.float16: F16} if compiled.CONVERTS_F16 else {})
RHOS = {"mse": MSE, "l1": L1, "huber": HUBER}
KEEPS = {"none": KEEP_NONE, "x0hat": KEEP_X0, "x": KEEP_X}

_local = threading.local()


@functools.cache
def _entry(kernel: Callable[[int], None]) -> Any:
    """The kernel, compiled, as a function of C."""
    return cfunc(types.void(types.intp), **compiled.KERNEL)(kernel)


def _scratch(threads: int) -> int:
    """The address of scratch memory for a team that this thread leads, at the start of a cache line, as is best for
    vectors."""
    if getattr(_local, "threads", 0) < threads:
        _local.threads, _local.memory = threads, np.zeros(threads * SCRATCH // 4 + 16, np.float32)
        start = -_local.memory.ctypes.data % 64 // 4
        _local.address = _local.memory.ctypes.data + 4 * start
        members = _local.memory[start : start + threads * SCRATCH // 4].reshape(threads, -1)
        members[:, OUTSIDE // 4 : OUTSIDE // 4 + CHUNK] = np.nan
    return _local.address


def _run(kernel: Callable[[int], None], operands: Callable[..., Any], laid: Tensor, channels: int, *args: Any) -> None:
    """Run a kernel over all chunks of all samples, on torch.get_num_threads() threads where that pays."""
    elements, batch = laid.numel(), laid.shape[0]
    n = elements // batch
    chunks = -(-n // CHUNK)
    count = batch * chunks
    threads = openmp.team_size() if elements >= PARALLEL_FROM else 1
    block = count if threads == 1 else -(-count // (threads * CLAIMS))
    entry, given = _entry(kernel), operands(0, 0, _scratch(threads), block, count, chunks, n, channels, *args)
    if threads == 1:
        entry.ctypes(ctypes.addressof(given))
    else:
        openmp.run(entry.address, ctypes.addressof(given), threads)


def _address(t: Tensor | None) -> tuple[int, int]:
    """(address, type code); address 0 stands for no operand."""
    return (0, 0) if t is None else (t.data_ptr(), CODES[t.dtype])


def _storable(t: Tensor | None) -> Tensor | None:
    """Operands of other floating types are converted first."""
    return t if t is None or t.dtype in CODES else t.float()


def _table(rows: Tensor) -> tuple[int, int]:
    """(address, number of rows)."""
    return rows.data_ptr(), rows.shape[0]


def _noise_key(seed: Tensor | None, ids: Tensor | None, index: Tensor, stream: int) -> tuple[int, ...]:
    """(seed, ids, index, stride of index, stream) as kernels take them."""
    return (
        0 if seed is None else seed.data_ptr(), 0 if ids is None else ids.data_ptr(),
        index.data_ptr(), int(index.numel() > 1), stream,
    )  # fmt: skip


def normal_(out: Tensor, seed: Tensor, ids: Tensor | None, step: Tensor, stream: int) -> None:
    """Fill out (B, ...) with z(seed, stream, ids[i], step, element)."""
    channels, (laid,) = lay_out(out, generated=True)
    _run(compiled.normal_chunks, compiled.Normal, laid, channels, *_noise_key(seed, ids, step, stream), *_address(laid))
    if laid is not out:
        out.copy_(laid)


def noising(
    out: Tensor, x0: Tensor, t: Tensor, table: Tensor,
    seed: Tensor | None, ids: Tensor | None, noise: Tensor | None, stream: int,
) -> None:  # fmt: skip
    """Write x_t into out (B, ...), shaped like x0."""
    channels, (laid, x0, noise) = lay_out(out, x0, _storable(noise), generated=noise is None)
    _run(
        compiled.noising_chunks, compiled.Noising, laid, channels, *_noise_key(seed, ids, t, stream), *_table(table),
        *_address(x0), *_address(noise), *_address(laid),
    )  # fmt: skip
    if laid is not out:
        out.copy_(laid)


def loss(
    out: Tensor, grad: Tensor | None, pred: Tensor, x0: Tensor | None, t: Tensor, table: Tensor,
    seed: Tensor | None, ids: Tensor | None, noise: Tensor | None, stream: int,
    rho: str, delta: float, scale: float, grad_scale: float,
) -> None:  # fmt: skip
    """Write scale w_t sum(rho) of each sample into out (B,), or of the whole batch into out (), float32; and
    grad_scale w_t rho' into grad, shaped like pred, if it is given."""
    generated = noise is None and seed is not None
    lead = pred if grad is None else grad
    channels, (laid, pred, x0, noise) = lay_out(lead, pred, _storable(x0), _storable(noise), generated=generated)
    chunks = -(-(laid.numel() // laid.shape[0]) // CHUNK)
    partial = torch.empty(laid.shape[0] * chunks, dtype=torch.float64)
    _run(
        compiled.loss_chunks, compiled.Loss, laid, channels, *_noise_key(seed, ids, t, stream), *_table(table),
        *_address(pred), *_address(x0), *_address(noise), *_address(None if grad is None else laid),
        partial.data_ptr(), RHOS[rho], delta, scale, grad_scale,
    )  # fmt: skip
    compiled.reduce_rows(partial.data_ptr(), out.numel(), partial.numel() // out.numel(), out.data_ptr())
    if grad is not None and laid is not grad:
        grad.copy_(laid)


def scale_(grad: Tensor, incoming: Tensor, factor: float) -> None:
    """Gapless grad *= incoming * factor in place, incoming (1,) or (B,) float32; returns at once where that is 1."""
    stride = int(incoming.numel() > 1)
    _run(compiled.scale_chunks, compiled.Scale, grad, 1, *_address(grad), incoming.data_ptr(), stride, factor)


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
        compiled.update_chunks, compiled.Update, laid, channels, *_noise_key(seed, ids, step, stream), *_table(rows),
        *_address(x), *_address(pred), pred.stride(0), *_address(uncond), *_address(raw),
        *_address(noise), *_address(past), *_address(laid),
        KEEPS[keep], math.inf if clip is None else clip,
    )  # fmt: skip
    if past is not hist:
        hist.copy_(past)
    if laid is not out:
        out.copy_(laid)
