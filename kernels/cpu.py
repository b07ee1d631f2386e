"""Launchers of the kernels for CPU tensors: layout, addresses, and threads.

Each launcher has the operands of the Triton launcher of the same name. The compiled kernel gets them as one C
structure, built by name.
"""

import ctypes
import functools
import math
import struct
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import types
from torch import Tensor

from . import cpu_compiled as compiled
from . import openmp
from .compiler import cfunc
from .cpu_compiled import (
    BF16,
    CHUNK,
    F16,
    F32,
    HUBER,
    KEEP_MIX,
    KEEP_NEW_MIX,
    KEEP_NEW_X0,
    KEEP_NONE,
    KEEP_X,
    KEEP_X0,
    L1,
    MSE,
    OUTSIDE,
    SCRATCH,
)
from .layout import lay_out, slices_like, slots_like
from .notes import Text, note
from .uninterrupted import uninterrupted

# A call on fewer elements stays on its thread, as PyTorch's do (at::internal::GRAIN_SIZE).
PARALLEL_FROM = 32768
# Claims per thread: one that starts late, or is held up, leaves its share to the others.
CLAIMS = 8
CODES = {torch.float32: F32, torch.bfloat16: BF16} | ({torch.float16: F16} if compiled.CONVERTS_F16 else {})
RHOS = {"mse": MSE, "l1": L1, "huber": HUBER}
KEEPS = {
    "none": KEEP_NONE, "x0hat": KEEP_X0, "x": KEEP_X, "mix": KEEP_MIX, "new mix": KEEP_NEW_MIX, "new x0hat": KEEP_NEW_X0
}  # fmt: skip

_local = threading.local()


class _Kernel:
    """A kernel, compiled, and how its operands become the C structure that it gets."""

    def __init__(self, kernel: Callable[[int], None], structure: type[ctypes.Structure]) -> None:
        self.compiled = uninterrupted(lambda: cfunc(types.void(types.intp), kernel, **compiled.KERNEL))
        self.address = self.compiled.address
        self.run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.address)
        kinds = {name: kind for name, kind, *_ in structure._fields_}
        self.names = [*kinds][3:]
        self.pack = struct.Struct("".join("d" if kind is ctypes.c_double else "q" for kind in kinds.values())).pack
        self.copy = structure.from_buffer_copy

    def __call__(self, threads: int, *operands: float) -> None:
        """Run on a team. The operands are those in `names`; before them are two counters, which the kernel writes."""
        given = ctypes.byref(self.copy(self.pack(0, 0, _scratch(threads), *operands)))
        if threads == 1:
            self.run(given)
        else:
            openmp.run(self.address, given, threads)


@functools.cache
def _entry(kernel: Callable[[int], None], structure: type[ctypes.Structure]) -> _Kernel:
    return _Kernel(kernel, structure)


def _scratch(threads: int) -> int:
    """The address of scratch memory for a team that this thread leads.

    It starts at a cache line, as is best for vectors.
    """
    if getattr(_local, "threads", 0) < threads:
        _local.threads, _local.memory = threads, np.zeros(threads * SCRATCH // 4 + 16, np.float32)
        start = -_local.memory.ctypes.data % 64 // 4
        _local.address = _local.memory.ctypes.data + 4 * start
        members = _local.memory[start : start + threads * SCRATCH // 4].reshape(threads, -1)
        members[:, OUTSIDE // 4 : OUTSIDE // 4 + CHUNK] = np.nan
    return _local.address


class _Noted(NamedTuple):
    """A call of a compiled function; see notes."""

    function: Callable[..., None]
    parameters: tuple[Any, ...]
    team: int  # the size of the team that it was made for; 0 if it is too small for one
    repeatable: bool = True
    aligned: bool = False

    @staticmethod
    def written(launches: "list[_Noted]", parameter: Text, constant: Text) -> tuple[list[str], list[str]]:
        conditions = [f"{constant(openmp.team_size)}() == {n}" for n in {launch.team for launch in launches} - {0}]
        return conditions, [_written(made.function, [*map(parameter, made.parameters)], constant) for made in launches]


def _written(function: Any, parameters: list[str], constant: Text) -> str:
    """The text of a call. For a kernel on one thread all is written out: to pass on so many arguments takes time."""
    if not isinstance(function, _Kernel) or parameters[0] != "1":
        return f"{constant(function)}({', '.join(parameters)})"
    packed = f"{constant(function.pack)}(0, 0, {constant(_scratch)}(1), {', '.join(parameters[1:])})"
    return f"{constant(function.run)}({constant(ctypes.byref)}({constant(function.copy)}({packed})))"


def _call(function: Callable[..., None], *parameters: Any, team: int = 0) -> None:
    """Call a compiled function, with addresses in place of tensors."""
    function(*(p.data_ptr() if isinstance(p, Tensor) else p for p in parameters))
    note(_Noted(function, parameters, team))


def _launch(
    kernel: Callable[[int], None], structure: type[ctypes.Structure], like: Tensor, channels: int, **operands: Any
) -> None:
    """Run a kernel over all chunks of all samples, on torch.get_num_threads() threads if that pays.

    Tensors stand for their addresses.
    """
    elements, batch = like.numel(), like.shape[0]
    size = elements // batch
    chunks = -(-size // CHUNK)
    count = batch * chunks
    team = openmp.team_size() if elements >= PARALLEL_FROM else 0
    entry, threads = _entry(kernel, structure), max(team, 1)
    operands |= {
        "block": count if threads == 1 else -(-count // (threads * CLAIMS)),
        "count": count, "chunks": chunks, "n": size, "channels": channels,
    }  # fmt: skip
    _call(entry, threads, *[operands.get(name, 0) for name in entry.names], team=team)


def _tensors(**tensors: Tensor | None) -> dict[str, Any]:
    """Each tensor and its type code, by name; those of None are left out, and become 0, which stands for no operand."""
    fields: dict[str, Any] = {}
    for name, t in tensors.items():
        if t is not None:
            fields[name], fields[f"{name}_code"] = t, CODES[t.dtype]
    return fields


def _noise_key(seed: Tensor | None, ids: Tensor | None, index: Tensor, stream: int) -> dict[str, Any]:
    """What noise is a function of, beside the element; also the index of the row of each sample."""
    return {
        "seed": 0 if seed is None else seed,
        "ids": 0 if ids is None else ids,
        "index": index,
        "index_stride": int(index.numel() > 1),
        "stream": stream,
    }


def _storable(t: Tensor | None) -> Tensor | None:
    """t, converted if the kernels do not read its type."""
    return t if t is None or t.dtype in CODES else t.float()


def normal_(out: Tensor, seed: Tensor, ids: Tensor | None, step: Tensor, stream: int) -> None:
    """Fill out (B, ...) with z(seed, stream, ids[i], step, element)."""
    channels, (written,) = lay_out(out, generated=True)
    _launch(
        compiled.normal_chunks, compiled.Normal, written, channels,
        **_noise_key(seed, ids, step, stream), **_tensors(out=written),
    )  # fmt: skip
    if written is not out:
        out.copy_(written)


def noising(
    out: Tensor, x0: Tensor, t: Tensor, table: Tensor,
    seed: Tensor | None, ids: Tensor | None, noise: Tensor | None, stream: int,
) -> None:  # fmt: skip
    """Write x_t into out (B, ...), shaped like x0."""
    channels, (written, x0, noise) = lay_out(out, x0, _storable(noise), generated=noise is None)
    _launch(
        compiled.noising_chunks, compiled.Noising, written, channels,
        **_noise_key(seed, ids, t, stream), table=table, levels=len(table),
        **_tensors(x0=x0, noise=noise, out=written),
    )  # fmt: skip
    if written is not out:
        out.copy_(written)


def loss(
    out: Tensor, grad: Tensor | None, pred: Tensor, x0: Tensor | None, t: Tensor, table: Tensor,
    seed: Tensor | None, ids: Tensor | None, noise: Tensor | None, mask: Tensor | None, stream: int,
    rho: str, delta: float, loss_scale: float, grad_scale: float,
) -> None:  # fmt: skip
    """Write loss_scale w_t sum(m rho) of each sample into out (B,), or of the whole batch into out (), float32; and
    grad_scale w_t m rho' into grad, shaped like pred, if it is given."""
    generated = noise is None and seed is not None
    lead = pred if grad is None else grad
    others = (_storable(t) for t in (x0, noise, mask))
    channels, (written, pred, x0, noise, mask) = lay_out(lead, pred, *others, generated=generated)
    chunks = -(-(written.numel() // written.shape[0]) // CHUNK)
    partial = torch.empty(written.shape[0] * chunks, dtype=torch.float64)
    _launch(
        compiled.loss_chunks, compiled.Loss, written, channels,
        **_noise_key(seed, ids, t, stream), table=table, levels=len(table),
        **_tensors(pred=pred, x0=x0, noise=noise, mask=mask, grad=None if grad is None else written),
        partial=partial, kind=RHOS[rho], delta=delta, loss_scale=loss_scale, grad_scale=grad_scale,
    )  # fmt: skip
    _call(compiled.reduce_rows, partial, out.numel(), partial.numel() // out.numel(), out)
    if grad is not None and written is not grad:
        grad.copy_(written)


def scale_(grad: Tensor, incoming: Tensor, factor: float) -> None:
    """grad *= incoming factor in place, incoming (1,) or (B,) float32; nothing is moved if that is 1.

    grad has no gaps, and the samples are outermost.
    """
    _launch(
        compiled.scale_chunks, compiled.Scale, grad, 1, **_tensors(grad=grad),
        incoming=incoming, incoming_stride=int(incoming.numel() > 1), factor=factor,
    )  # fmt: skip


def update(
    out: Tensor, x: Tensor, pred: Tensor, rows: Tensor, step: Tensor, seed: Tensor | None, ids: Tensor | None,
    uncond: Tensor | None, raw: Tensor | None, noise: Tensor | None, hist: Tensor | None,
    clip: float | None, keep: str, stream: int,
) -> None:  # fmt: skip
    """Write x' into out (B, ...), which may be x; hist, if given, or one of its slots, becomes what `keep` names."""
    generated = noise is None and seed is not None
    channels, (written, x, noise) = lay_out(out, x, _storable(noise), generated=generated)
    slots, past = slots_like(written, hist)
    pred, uncond, raw = slices_like(written, *map(_storable, (pred, uncond, raw)))  # type: ignore[arg-type]
    _launch(
        compiled.update_chunks, compiled.Update, written, channels,
        **_noise_key(seed, ids, step, stream), rows=rows, steps=len(rows), columns=rows.shape[1],
        pred_stride=pred.stride(0),
        **_tensors(x=x, pred=pred, uncond=uncond, variance=raw, noise=noise, hist=past, out=written),
        keep=KEEPS[keep], slots=slots, clip=math.inf if clip is None else clip,
    )  # fmt: skip
    if hist is not None and past is not None and past is not hist:
        hist.copy_(past)
    if written is not out:
        out.copy_(written)
