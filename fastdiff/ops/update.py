"""One step of any sampler: `update`, and `combine` for the steps of other libraries.

An operand more touches six places: `_OPERANDS` and `update` here, reference.update, kernels/update.py, and for CPU
tensors kernels/cpu.py and kernels/cpu_compiled.py.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..rows import MAX_SLOTS, WIDE, WIDTH
from ..support import transforms
from .checks import (
    as_clip,
    as_index,
    as_sample_ids,
    check_choice,
    check_device,
    check_floating,
    check_levels,
    check_like,
    check_out,
    check_range,
    check_shape,
    check_table,
    noise_source,
    wants_gradient,
)
from .dispatch import launcher
from .memory import in_huge_pages
from .noise import REVERSE
from .overlap import check_memory
from .quick import quick
from .registry import NOISE, Op, names_of

NEW = ("new mix", "new x0hat")  # hist is written only
KEEPS = ("none", "x0hat", "x", "mix", *NEW)
# What follows x in the schema of every form of the op.
_OPERANDS = (
    f"Tensor pred, Tensor rows, Tensor step, {NOISE}, Tensor? uncond, Tensor? raw, Tensor? noise, "
    "Tensor(b!)? hist, float? clip, str keep, int stream"
)
# Inductor cannot take an op that both returns a tensor and overwrites an optional one: `update_` does that.
_WITHOUT_HISTORY = _OPERANDS.replace("Tensor(b!)? hist, ", "").replace("str keep, ", "")
_NAMES, _NAMES_WITHOUT_HISTORY = names_of(_OPERANDS), names_of(_WITHOUT_HISTORY)


@quick(on_cpu=True)
def update(
    x: Tensor,
    pred: Tensor,
    rows: Tensor,
    step: int | Tensor,
    *,
    seed: int | Tensor | None = None,
    sample_ids: Tensor | None = None,
    noise: Tensor | None = None,
    uncond: Tensor | None = None,
    raw_variance: Tensor | None = None,
    hist: Tensor | None = None,
    clip: float | None = None,
    keep: str = "none",
    noisy: bool = True,
    inplace: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """One step of any sampler: the row says which.

        x0hat = clip(x0_from_x x + x0_from_pred pred)
        x'    = from_x0 x0hat + from_x x + from_pred pred + noise z + from_hist hist

    Without `noise`, z is the noise of stream REVERSE at `step`. If a gradient by x, pred, uncond, raw_variance, noise
    or rows is wanted, the differentiable reference runs instead of a kernel.

    Args:
        x, pred: (B, ...), the state and the output of the model.
        rows: (steps, WIDTH) float32 rows, see `fastdiff.rows`; (steps, WIDE) with several slots or a mix.
        step: the row, an int or an int64 tensor () or (B,); outside of `rows` as a level for `noising`.
        seed, sample_ids, noise, out: see `fastdiff.ops`.
        uncond: the output without condition; pred becomes uncond + guidance (pred - uncond).
        raw_variance: `noise` of the row becomes exp(noise + (raw + 1)/2 (noise_high - noise)).
        hist: read, then overwritten with what `keep` names. Or (K, B, ...), 2 or 3 slots: all are read, and the one
            that the row names is overwritten.
        clip: x0hat is kept in [-clip, clip].
        keep: "x0hat", "x" or "mix" (kept_from_x0 x0hat + kept_from_x x) with hist, else "none". With "new mix"
            and "new x0hat" it is a second output: one tensor like x of any floating type, which is not read.
        noisy: False leaves noise z out.
        inplace: x becomes x', and nothing is allocated.

    Returns: x', shaped and typed like x.
    Raises: TypeError or ValueError that names the argument.
    Reference: guidance is eq. 6 of Ho & Salimans 2022, arXiv:2207.12598; the variance eq. 15 of Nichol & Dhariwal 2021,
        arXiv:2102.09672.
    """
    check_floating("x", x)
    check_like("pred", pred, x)
    several = hist is not None and isinstance(hist, Tensor) and hist.ndim > x.ndim
    wide = several or keep in ("mix", "new mix") or (isinstance(rows, Tensor) and rows.shape[-1:] == (WIDE,))
    check_table("rows", rows, WIDE if wide else WIDTH, x)
    step = as_index("step", step, x)
    for name, given in (("uncond", uncond), ("raw_variance", raw_variance)):
        if given is not None:
            check_like(name, given, x)
    check_choice("keep", keep, KEEPS)
    _check_history(hist, keep, x)
    clip = as_clip(clip)
    inputs = (x, pred, uncond, raw_variance, noise)
    with_grad = wants_gradient(*inputs, rows)
    if with_grad and (inplace or hist is not None):
        raise ValueError("inplace, hist: a tensor would be overwritten that the gradient needs")
    ids = as_sample_ids(sample_ids, x.shape[0], x.device, strict=True)
    if out is not None:
        if inplace:
            raise ValueError("out: expected None with inplace=True")
        check_out(out, x, *inputs, rows)
    written = x if inplace else out
    if written is not None or hist is not None:
        _check_memory(
            x, written, hist,
            {"pred": pred, "uncond": uncond, "raw_variance": raw_variance, "noise": noise},
            {"rows": rows, "step": step, "seed": seed, "sample_ids": ids},
        )  # fmt: skip
    if noisy or noise is not None:
        seed = noise_source(x, seed, noise)
    elif seed is not None:
        raise ValueError("seed: expected None with noisy=False")
    clip = None if clip == math.inf else clip  # the kernel multiplies the bound by from_x0, which may be 0
    operands: dict[str, Any] = {  # in the order of _OPERANDS
        "pred": pred, "rows": rows, "step": step, "seed": seed, "ids": ids, "uncond": uncond, "raw": raw_variance,
        "noise": noise, "hist": hist, "clip": clip, "keep": keep, "stream": REVERSE,
    }  # fmt: skip
    if with_grad or transforms.active():
        return _by_reference("x" if inplace else "out", written, x, operands)
    if inplace:
        _IN_PLACE(x, *operands.values())
        return x
    if hist is not None and out is None:
        out = in_huge_pages(torch.empty_like(x))
    if out is not None:
        _OUT(out, x, *operands.values())
        return out
    return _OP(x, *[operands[name] for name in _NAMES_WITHOUT_HISTORY])


def _check_history(hist: Tensor | None, keep: str, x: Tensor) -> None:
    """hist is what `keep` asks for: shaped like x, or several slots of that shape."""
    if (hist is None) != (keep == "none"):
        raise ValueError(f"hist: expected exactly where keep is not 'none', got keep = {keep!r}")
    if hist is None:
        return
    several = isinstance(hist, Tensor) and hist.ndim > x.ndim
    slots = (len(hist),) if several and 2 <= len(hist) <= MAX_SLOTS and keep not in NEW else ()
    check_shape("hist", hist, (*slots, *x.shape))
    check_device("hist", hist, x.device)
    if keep in NEW:
        check_floating("hist", hist)
    elif hist.dtype != x.dtype:
        raise TypeError(f"hist: expected the dtype of x, {x.dtype}, got {hist.dtype}")


def _check_memory(
    x: Tensor, written: Tensor | None, hist: Tensor | None, data: dict[str, Any], others: dict[str, Any]
) -> None:
    """What becomes x', and hist, share no memory that is read later. In place, an operand may be x itself."""
    if written is x:
        check_memory("x", x, data, {"hist": hist, **others})
    elif written is not None:
        check_memory("out", written, {}, {"x": x, "hist": hist, **data, **others})
    if hist is not None:
        check_memory("hist", hist, data if written is x else {"x": x, **data}, others)


def _by_reference(name: str, written: Tensor | None, x: Tensor, operands: dict[str, Any]) -> Tensor:
    """x' with gradients and transforms, in `written`, the argument of that name, unless it is None."""
    check_levels("step", operands["step"], operands["rows"].shape[0], operands["ids"])
    result, kept = reference.update(x, **operands)
    if operands["hist"] is not None and kept is not None:
        transforms.overwrite("hist", operands["hist"], kept)
    return result if written is None else transforms.overwrite(name, written, result)


@quick(on_cpu=True)
def combine(
    x: Tensor,
    y: Tensor,
    rows: Tensor,
    index: int | Tensor,
    *,
    z: Tensor | None = None,
    clip: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """from_x0 clip(x0_from_x x + x0_from_pred y) + from_x x + from_pred y + noise z, typed like x.

    An affine map of two or three tensors by one row of numbers: what a step of a scheduler is.

    Args:
        x, y, z: (B, ...) tensors of one shape; z may be left out.
        rows: (n, WIDTH) float32 rows, see `fastdiff.rows`.
        index: the row, an int or an int64 tensor () or (B,).
        clip: the bracket is kept in [-clip, clip].
        out: see `fastdiff.ops`.

    Returns: a tensor shaped and typed like x.
    Raises: TypeError or ValueError that names the argument.
    """
    return update(x, y, rows, index, noise=z, noisy=False, clip=clip, out=out)


def _update(x: Tensor, *operands: Any) -> Tensor:
    out = in_huge_pages(torch.empty_like(x))
    _run(out, x, hist=None, keep="none", **dict(zip(_NAMES_WITHOUT_HISTORY, operands, strict=True)))
    return out


def _update_(x: Tensor, *operands: Any) -> None:
    _run(x, x, **dict(zip(_NAMES, operands, strict=True)))


def _update_out(out: Tensor, x: Tensor, *operands: Any) -> None:
    _run(out, x, **dict(zip(_NAMES, operands, strict=True)))


def _run(out: Tensor, x: Tensor, **operands: Any) -> None:
    """Write x' into out, which may be x."""
    if x.numel() == 0:
        return
    check_range("step", operands["step"], operands["rows"].shape[0])
    check_range("sample_ids", operands["ids"], 2**32)
    if launch := launcher("update", x):
        launch(out=out, x=x, **operands)
        return
    result, kept = reference.update(x, **operands)
    hist = operands["hist"]
    if hist is not None and kept is not None:
        hist.copy_(kept)  # first: what is kept may be x itself, and out too
    out.copy_(result)


_OP = Op("update", f"(Tensor x, {_WITHOUT_HISTORY}) -> Tensor", _update, lambda x, *operands: torch.empty_like(x))
_IN_PLACE = Op("update_", f"(Tensor(a!) x, {_OPERANDS}) -> ()", _update_)
_OUT = Op("update_out", f"(Tensor(a!) out, Tensor x, {_OPERANDS}) -> ()", _update_out)
