"""The operations: argument checks, torch.library ops (schema, fake, autograd) and the choice of implementation.

Public functions `normal`, `noising`, `loss`, `vlb`, `update`, `group_norm_silu` check their arguments and call
torch.ops.fastdiff.*.
The ops are defined on a bare torch.library.Library: its dispatch costs a few microseconds, where custom_op and
register_autograd cost tens (README has the measurement).

Common arguments:
    seed: the 64-bit key of the noise; an int, an int64 tensor of one element, or None to draw one on the device from
        PyTorch's default generator.
    sample_ids: (B,) int64 in [0, 2^32): the number of each sample in the noise; 0..B-1 if None.
    noise: a floating tensor shaped like the data that takes the place of generated noise.
"""

import functools
import importlib
import importlib.util
import math
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import _backend, reference
from ._check import (
    FLOATING,
    as_ids,
    as_index,
    as_seed,
    check_floating,
    check_group_norm,
    check_like,
    check_table,
    names,
    noise_source,
)
from ._pages import in_huge_pages

# Streams keep draws with the same seed, sample and step apart.
PRIOR, FORWARD, REVERSE = 0, 1, 2
LOSSES = ("mse", "l1", "huber")
KEEPS = ("none", "x0hat", "x")


# --- public functions -------------------------------------------------------------------------------------------


def normal(
    shape: tuple[int, ...] | torch.Size,
    seed: int | Tensor | None = None,
    *,
    sample_ids: Tensor | None = None,
    step: int | Tensor = 0,
    stream: int = PRIOR,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """z(seed, stream, sample, step, element) ~ N(0, 1), shape (B, ...): Philox4x32-10 and Box-Muller.

    A sample's numbers depend on its id and the element's place in it, not on the batch, the device or the layout.
    step: an int or an int64 tensor () or (B,). Raises TypeError or ValueError, naming the argument.
    """
    if dtype not in FLOATING:
        raise TypeError(f"dtype: expected one of {names(FLOATING)}, got {dtype}")
    if len(shape) < 1:
        raise ValueError("shape: expected a batch dimension, got ()")
    if not 0 <= stream < 2**32:
        raise ValueError(f"stream: expected a number in [0, 2^32), got {stream}")
    out = torch.empty(shape, dtype=dtype, device=device)
    step = as_index("step", step, out)
    ids = as_ids(sample_ids, out)
    torch.ops.fastdiff.normal_(out, as_seed(seed, out.device), ids, step, stream)
    return out


def noising(
    x0: Tensor,
    t: int | Tensor,
    table: Tensor,
    *,
    seed: int | Tensor | None = None,
    sample_ids: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """x_t = alpha_t x_0 + sigma_t z (Ho et al. 2020, eq. 4), shaped and typed like x0 (B, ...).

    t: level, an int or an int64 tensor () or (B,), in [0, len(table)). table: (levels, 2) float32 rows (alpha, sigma).
    Without `noise`, z is the noise of stream FORWARD at step t. Differentiable by x0 and noise. A level outside the
    table is a ValueError on the CPU; on a GPU, where looking would wait for the device, its sample becomes NaN.
    """
    check_floating("x0", x0)
    t = as_index("t", t, x0)
    check_table("table", table, 2, x0)
    ids = as_ids(sample_ids, x0)
    return torch.ops.fastdiff.noising(x0, t, table, noise_source(x0, seed, noise), ids, noise, FORWARD)


def loss(
    pred: Tensor,
    t: int | Tensor,
    table: Tensor,
    *,
    x0: Tensor | None = None,
    seed: int | Tensor | None = None,
    sample_ids: Tensor | None = None,
    noise: Tensor | None = None,
    kind: str = "mse",
    delta: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """L = w_t mean(rho(pred - y)) with y = p_t x_0 + q_t z, float32: () for reduction "mean", (B,) for "none".

    table: (levels, 3) float32 rows (p, q, w). x0 may be left out where p = 0, and seed and noise where q = 0; with the
    seed of `noising` the noise is drawn again, not read. kind: rho(r) = "mse" r^2, "l1" |r|, "huber" r^2/2 up to delta
    and delta (|r| - delta/2) beyond. The gradient by pred is computed in the same pass; it can be walked backward once.
    Differentiable by pred, x0 and noise. Levels outside the table: as for `noising`.
    """
    check_floating("pred", pred)
    t = as_index("t", t, pred)
    check_table("table", table, 3, pred)
    if x0 is not None:
        check_like("x0", x0, pred)
    if noise is not None or seed is not None:
        seed = noise_source(pred, seed, noise)
    if kind not in LOSSES:
        raise ValueError(f"kind: expected one of {', '.join(LOSSES)}, got {kind!r}")
    if not delta > 0:
        raise ValueError(f"delta: expected a number above 0, got {delta}")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction: expected 'mean' or 'none', got {reduction!r}")
    inputs = (pred, x0, noise)
    with_grad = torch.is_grad_enabled() and any(i is not None and i.requires_grad for i in inputs)
    ids = as_ids(sample_ids, pred)
    per_sample = reduction == "none"
    return torch.ops.fastdiff.loss(
        pred, x0, t, table, seed, ids, noise, FORWARD, kind, float(delta), per_sample, with_grad
    )[0]


def vlb(
    pred: Tensor,
    x_t: Tensor,
    x0: Tensor,
    t: int | Tensor,
    rows: Tensor,
    *,
    raw_variance: Tensor | None = None,
    clip: float | None = None,
    detach_mean: bool = False,
    reduction: str = "none",
) -> Tensor:
    """The term of level t of the variational bound, in nats per dimension: (B,) for reduction "none", () for "mean";
    float32, or float64 for float64 data (Ho et al. 2020, eq. 5).

    With x0hat = clip(a x_t + b pred), KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) = 1/2 (delta + exp(-delta) - 1 +
    w (x_0 - x0hat)^2 exp(-delta)). Where the row says decoder, -log p(x_0 | x_t) of images in 256 steps over [-1, 1]:
    the probability of x_0's bin, 1/255 to each side and open at both ends, under N(x0hat, exp(delta)) (eq. 13).

    pred, x_t, x0: (B, ...). rows: (levels, 6) float32 rows (a, b, w, low, high, decoder), see `bound.vlb_rows`.
    delta = low, or with raw_variance low + (raw + 1)/2 (high - low) (Nichol & Dhariwal 2021, eq. 15).
    clip: x0hat is kept in [-clip, clip]. detach_mean: no gradient by pred, as in their hybrid loss.
    The gradients by pred and raw_variance are computed in the same pass; they can be walked backward once. Where one by
    x_t or x0 is wanted too, the differentiable reference runs instead. Levels outside the table: as for `noising`.
    """
    check_floating("pred", pred)
    check_like("x_t", x_t, pred)
    check_like("x0", x0, pred)
    if raw_variance is not None:
        check_like("raw_variance", raw_variance, pred)
    t = as_index("t", t, pred)
    check_table("rows", rows, 6, pred)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip: expected a number above 0 or None, got {clip}")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction: expected 'mean' or 'none', got {reduction!r}")
    pred = pred.detach() if detach_mean else pred
    with_grad = torch.is_grad_enabled()
    if with_grad and (x_t.requires_grad or x0.requires_grad):
        if not torch.compiler.is_compiling():
            _in_range("t", t, len(rows))
        value = reference.vlb(pred, raw_variance, x_t, x0, t, rows, clip)[0]
        return value.mean() if reduction == "mean" else value.reshape(len(value), -1).mean(1)
    wanted = [with_grad and i is not None and i.requires_grad for i in (pred, raw_variance)]
    return torch.ops.fastdiff.vlb(pred, raw_variance, x_t, x0, t, rows, clip, reduction == "none", *wanted)[0]


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
) -> Tensor:
    """x' = c x0hat + d x + e pred + f z + g hist, x0hat = clip(a x + b pred): one step of any sampler, typed like x.

    x, pred: (B, ...). rows: (steps, 9) float32 rows (a, b, c, d, e, f, g, h, w); step: the row, an int or an int64
    tensor () or (B,). Without `noise`, z is the noise of stream REVERSE at `step`; noisy=False leaves f z out.
    uncond: pred becomes uncond + w (pred - uncond). raw_variance: f becomes exp(f + (raw + 1)/2 (h - f)).
    hist: read, then overwritten with what `keep` names, "x0hat" or "x". clip: x0hat is kept in [-clip, clip].
    inplace: x becomes x' and nothing is allocated. Rows outside the table: as levels for `noising`.
    Where a gradient by x, pred, uncond, raw_variance or noise is wanted, the differentiable reference runs instead.
    """
    check_floating("x", x)
    check_like("pred", pred, x)
    check_table("rows", rows, 9, x)
    step = as_index("step", step, x)
    for name, given in (("uncond", uncond), ("raw_variance", raw_variance)):
        if given is not None:
            check_like(name, given, x)
    if keep not in KEEPS:
        raise ValueError(f"keep: expected one of {', '.join(KEEPS)}, got {keep!r}")
    if (hist is None) != (keep == "none"):
        raise ValueError(f"hist: expected exactly where keep is not 'none', got keep = {keep!r}")
    if hist is not None:
        check_like("hist", hist, x)
        if hist.dtype != x.dtype:
            raise TypeError(f"hist: expected the dtype of x, {x.dtype}, got {hist.dtype}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip: expected a number above 0 or None, got {clip}")
    clip = None if clip == math.inf else clip  # the kernel multiplies the bound by c, which may be 0
    ids = as_ids(sample_ids, x)
    inputs = (x, pred, uncond, raw_variance, noise)
    with_grad = torch.is_grad_enabled() and any(i is not None and i.requires_grad for i in inputs)
    if with_grad and (inplace or hist is not None):
        raise ValueError("inplace, hist: a tensor would be overwritten that the gradient needs")
    if noisy or noise is not None:
        seed = noise_source(x, seed, noise)
    elif seed is not None:
        raise ValueError("seed: expected None with noisy=False")
    args = (pred, rows, step, seed, ids, uncond, raw_variance, noise, hist, clip, keep, REVERSE)
    if with_grad:
        if type(step) is Tensor and not torch.compiler.is_compiling():
            _in_range("step", step, rows.shape[0])
            _ids_in_range(ids)
        return reference.update(x, *args)[0]
    if inplace or hist is not None:
        # Inductor cannot take an op that both returns a tensor and overwrites an optional one.
        x = x if inplace else x.clone()
        torch.ops.fastdiff.update_(x, *args)
        return x
    return torch.ops.fastdiff.update(x, *args[:8], clip, REVERSE)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """silu(GroupNorm(x) (1 + scale) + shift), shaped and typed like x (B, C, ...) (Wu & He 2018,
    arXiv:1803.08494, eq. 7; scale and shift as in Dhariwal & Nichol 2021, arXiv:2105.05233, section 4.3).

    GroupNorm: (x - mean) / sqrt(var + eps) of each of num_groups groups of neighbouring channels of a sample, times
    weight (C,) plus bias (C,). scale, shift: (B, C), both or neither. All of it in float32 whatever the types.
    Differentiable by every tensor; second derivatives need `backend("reference")`. Raises TypeError or ValueError.
    """
    check_group_norm(x, num_groups, weight, bias, eps, scale, shift)
    if not _has_norm_kernel(x):
        return reference.group_norm_silu(x, num_groups, weight, bias, scale, shift, eps)
    return torch.ops.fastdiff.group_norm_silu(x, num_groups, weight, bias, scale, shift, eps)[0]


# --- implementations --------------------------------------------------------------------------------------------


def _in_range(name: str, index: Tensor, rows: int) -> None:
    if index.is_cpu:
        low, high = (index.item(),) * 2 if index.numel() == 1 else (v.item() for v in index.aminmax())
        if low < 0 or high >= rows:
            raise ValueError(f"{name}: expected values in [0, {rows}), got {low if low < 0 else high}")


def _ids_in_range(ids: Tensor | None) -> None:
    if ids is not None:
        _in_range("sample_ids", ids, 2**32)


@functools.cache
def _launchers(name: str) -> Any:
    """The launchers normal_, noising, loss, scale_ and update of a backend, and vlb, norm and norm_grad but for "cpu",
    imported at first use."""
    if name == "cpu":
        return importlib.import_module(".kernels.cpu", __package__)
    noise, noising, loss, vlb, update, group_norm = (
        importlib.import_module(f".kernels.{file}", __package__)
        for file in ("noise", "noising", "loss", "vlb", "update", "group_norm")
    )
    return SimpleNamespace(
        normal_=noise.normal_,
        noising=noising.noising,
        loss=loss.loss,
        scale_=loss.scale_,
        vlb=vlb.vlb,
        update=update.update,
        norm=group_norm.norm,
        norm_grad=group_norm.norm_grad,
    )


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _has_numba() -> bool:
    found = importlib.util.find_spec("numba") is not None
    if not found:
        warnings.warn(
            "fastdiff runs CPU tensors in plain PyTorch; pip install fastdiff[cpu] adds compiled kernels", stacklevel=2
        )
    return found


def _kernels(x: Tensor) -> Any:
    """The launchers that serve x, or None for the reference."""
    name = _backend.forced()
    if x.dtype == torch.float64 or name == "reference":
        return None
    if name is None:
        if x.is_cuda or _interpreting():
            name = "triton"
        elif _has_numba():
            name = "cpu"
        else:
            return None
    if name == "triton" and not (x.is_cuda or _interpreting()):
        raise ValueError(f"backend: 'triton' expected a GPU tensor or TRITON_INTERPRET=1, got device {x.device}")
    if name == "cpu" and x.device.type != "cpu":
        raise ValueError(f"backend: 'cpu' expected a CPU tensor, got device {x.device}")
    return _launchers(name)


def _on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


def _laid_out(like: Tensor, result: Tensor) -> Tensor:
    """The result with the strides that the op promises, those of empty_like."""
    out = torch.empty_like(like)
    return result if result.stride() == out.stride() else out.copy_(result)


def _normal_(out: Tensor, seed: Tensor, ids: Tensor | None, step: Tensor, stream: int) -> None:
    _ids_in_range(ids)
    if out.numel() == 0:
        return
    if kernels := _kernels(out):
        with _on_device(in_huge_pages(out)):
            kernels.normal_(out, seed, ids, step, stream)
    else:
        out.copy_(reference.normal(out.shape, seed, ids, step, stream, reference.work_dtype(out)))


def _noising(
    x0: Tensor, t: Tensor, table: Tensor, seed: Tensor | None, ids: Tensor | None, noise: Tensor | None, stream: int
) -> Tensor:
    if x0.numel() == 0:
        return torch.empty_like(x0)
    _in_range("t", t, table.shape[0])
    _ids_in_range(ids)
    kernels = _kernels(x0)
    if kernels is None:
        return _laid_out(x0, reference.noising(x0, t, table, seed, ids, noise, stream))
    out = in_huge_pages(torch.empty_like(x0))
    with _on_device(x0):
        kernels.noising(out, x0, t, table, seed, ids, noise, stream)
    return out


def _loss(
    pred: Tensor, x0: Tensor | None, t: Tensor, table: Tensor,
    seed: Tensor | None, ids: Tensor | None, noise: Tensor | None, stream: int,
    kind: str, delta: float, per_sample: bool, with_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch = pred.shape[0]
    out = torch.empty((batch,) if per_sample else (), dtype=torch.float32, device=pred.device)
    grad = in_huge_pages(torch.empty_like(pred)) if with_grad else pred.new_empty(0)
    if pred.numel() == 0:
        return out.fill_(torch.nan), grad
    count = pred.numel() // batch if per_sample else pred.numel()
    _in_range("t", t, table.shape[0])
    _ids_in_range(ids)
    scale, grad_scale = 1.0 / count, _stored_scale(pred, count) / count
    if kernels := _kernels(pred):
        stored = grad if with_grad else None
        with _on_device(pred):
            kernels.loss(
                out, stored, pred, x0, t, table, seed, ids, noise, stream, kind, delta, scale, grad_scale
            )
    else:
        value, slope = reference.loss(pred, x0, t, table, seed, ids, noise, stream, kind, delta)
        out.copy_((value.reshape(batch, -1).sum(1) if per_sample else value.sum()).mul(scale))
        if with_grad:
            grad.copy_(slope * grad_scale)
    return out, grad


def _vlb(
    pred: Tensor, raw: Tensor | None, x_t: Tensor, x0: Tensor, t: Tensor, rows: Tensor,
    clip: float | None, per_sample: bool, by_pred: bool, by_raw: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, n = len(pred), pred.numel() // max(1, len(pred))
    out, *grads = _empty_vlb(pred, raw, per_sample, by_pred, by_raw)
    if pred.numel() == 0:
        return out.fill_(torch.nan), grads[0], grads[1]
    _in_range("t", t, len(rows))
    count = n if per_sample else batch * n
    scale = 1.0 / count
    stored = [grads[0] if by_pred else None, grads[1] if by_raw else None]
    if launch := getattr(_kernels(pred), "vlb", None):
        with _on_device(pred):
            launch(out.reshape(-1), *stored, pred, raw, x_t, x0, t, rows, clip, scale)
    else:
        value, *slopes = reference.vlb(pred, raw, x_t, x0, t, rows, clip)
        out.copy_(value.reshape(batch, -1).mean(1) if per_sample else value.mean())
        for grad, slope in zip(stored, slopes, strict=True):
            if grad is not None:
                grad.copy_(slope * scale)
    return out, grads[0], grads[1]


def _empty_vlb(
    pred: Tensor, raw: Tensor | None, per_sample: bool, by_pred: bool, by_raw: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(nats, gradient by pred, by raw); a gradient that is not wanted is empty. Those of float16 may exceed what it
    holds, and are kept in float32 there."""
    value = pred.new_empty(pred.shape[:1] if per_sample else (), dtype=reference.work_dtype(pred))
    pred_grad, raw_grad = (
        torch.empty_like(x, dtype=torch.float32 if x.dtype == torch.float16 else x.dtype)
        if x is not None and wanted
        else pred.new_empty(0)
        for x, wanted in ((pred, by_pred), (raw, by_raw))
    )
    return value, pred_grad, raw_grad


def _stored_scale(pred: Tensor, count: int) -> float:
    """The power of two that the stored gradient carries: in float16 a gradient of 1/count would underflow."""
    return 2.0 ** (count.bit_length() - 1) if pred.dtype == torch.float16 else 1.0


def _scale_(grad: Tensor, incoming: Tensor, factor: float) -> None:
    if grad.numel() == 0:
        return
    whole = incoming.numel() == 1 or grad.stride(0) == grad[0].numel()
    kernels = _kernels(grad)
    if kernels and whole:
        with _on_device(grad):
            kernels.scale_(grad, incoming, factor)
    else:
        grad.mul_((incoming * factor).to(reference.work_dtype(grad)).reshape(-1, *[1] * (grad.ndim - 1)))


def _update(x: Tensor, *args: Any) -> Tensor:
    *operands, clip, stream = args
    out = in_huge_pages(torch.empty_like(x))
    _update_into(out, x, *operands, None, clip, "none", stream)
    return out


def _update_(x: Tensor, *args: Any) -> None:
    _update_into(x, x, *args)


def _update_into(
    out: Tensor, x: Tensor, pred: Tensor, rows: Tensor, step: Tensor, seed: Tensor | None, ids: Tensor | None,
    uncond: Tensor | None, raw: Tensor | None, noise: Tensor | None, hist: Tensor | None, *args: Any,
) -> None:  # fmt: skip
    if x.numel() == 0:
        return
    _in_range("step", step, rows.shape[0])
    _ids_in_range(ids)
    if kernels := _kernels(x):
        with _on_device(x):
            kernels.update(out, x, pred, rows, step, seed, ids, uncond, raw, noise, hist, *args)
    else:
        result, kept = reference.update(x, pred, rows, step, seed, ids, uncond, raw, noise, hist, *args)
        if hist is not None and kept is not None:
            hist.copy_(kept)  # first: what is kept may be x itself, and out too
        out.copy_(result)


def _has_norm_kernel(x: Tensor) -> bool:
    """Whether Triton serves x. Else PyTorch's own operations do, which are differentiable any number of times and which
    torch.compile fuses; there is no kernel for CPU tensors."""
    forced = _backend.forced()
    if x.dtype == torch.float64 or forced == "reference":
        return False
    return x.is_cuda or forced == "triton" or (forced is None and _interpreting())


def _group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    out, mean, rstd = _empty_group_norm_silu(x, groups)
    if x.numel() == 0:
        return out, mean, rstd
    if launch := getattr(_kernels(x), "norm", None):
        with _on_device(x):
            launch(out, mean, rstd, x, groups, weight, bias, scale, shift, eps)
    else:
        out.copy_(reference.group_norm_silu(x, groups, weight, bias, scale, shift, eps))
        grouped = x.to(mean.dtype).reshape(len(x), groups, -1)
        mean.copy_(grouped.mean(2))
        rstd.copy_((grouped.var(2, correction=0) + eps).rsqrt())
    return out, mean, rstd


def _empty_group_norm_silu(x: Tensor, groups: int, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean of each group, reciprocal standard deviation)."""
    mean, rstd = (x.new_empty((x.shape[0], groups), dtype=reference.work_dtype(x)) for _ in range(2))
    return torch.empty_like(x), mean, rstd


def _group_norm_silu_grad(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    out, sums = _empty_group_norm_silu_grad(grad, x)
    if x.numel() == 0:
        return out, sums.zero_()
    if launch := getattr(_kernels(x), "norm_grad", None):
        with _on_device(x):
            return out, launch(out, grad, x, mean, rstd, *args)
    by_x, sums = reference.group_norm_silu_grad(grad, x, mean, rstd, *args)
    return _laid_out(x, by_x), sums


def _empty_group_norm_silu_grad(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """(gradient by x, sums over pixels of the slope and of the slope times the normalised x)."""
    return torch.empty_like(x), x.new_empty((2, *x.shape[:2]), dtype=reference.work_dtype(x))


# --- gradients --------------------------------------------------------------------------------------------------


class _Noising(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x0, t, table = args[:3]
        ctx.save_for_backward(t, table)
        ctx.dtypes = x0.dtype, None if args[5] is None else args[5].dtype
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.fastdiff.noising(*args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """d x_t / d x_0 = alpha_t, d x_t / d z = sigma_t."""
        alpha, sigma = reference.rows_of(ctx.saved_tensors[1], ctx.saved_tensors[0], grad)
        by_x0 = (alpha * grad).to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
        by_noise = (sigma * grad).to(ctx.dtypes[1]) if ctx.needs_input_grad[5] else None
        return by_x0, None, None, None, None, by_noise, None


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        pred, x0, t, table, _, _, noise = args[:7]
        with torch._C._AutoDispatchBelowAutograd():
            value, grad = torch.ops.fastdiff.loss(*args[:-1], True)
        ctx.save_for_backward(grad, t, table)
        ctx.mark_non_differentiable(grad)
        ctx.set_materialize_grads(False)  # of the stored gradient: a full tensor of zeros
        ctx.dtypes = [None if i is None else i.dtype for i in (x0, noise)]
        per_sample = args[-2]
        count = pred.numel() // len(pred) if per_sample and len(pred) else pred.numel()
        ctx.factor = 1.0 / _stored_scale(pred, count)
        ctx.used = False
        return value, grad

    @staticmethod
    def backward(ctx: Any, incoming: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        _take_once(ctx, "loss")
        grad, t, table = ctx.saved_tensors
        grad = _scaled(grad, incoming, ctx.factor)
        by_x0 = by_noise = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[6]:
            p, q, _w = reference.rows_of(table, t, grad)
            by_x0 = (-p * grad).to(ctx.dtypes[0]) if ctx.needs_input_grad[1] else None
            by_noise = (-q * grad).to(ctx.dtypes[1]) if ctx.needs_input_grad[6] else None
        return grad, by_x0, None, None, None, None, by_noise, None, None, None, None, None


class _Vlb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            value, *grads = torch.ops.fastdiff.vlb(*args[:8], *ctx.needs_input_grad[:2])
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(*grads)
        ctx.set_materialize_grads(False)
        ctx.dtypes = [None if i is None else i.dtype for i in args[:2]]
        ctx.used = False
        return value, grads[0], grads[1]

    @staticmethod
    def backward(ctx: Any, incoming: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        _take_once(ctx, "vlb")
        given = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
        by_pred, by_raw = (_scaled(g, incoming, 1.0).to(dtype) if wanted else None for g, dtype, wanted in given)
        return by_pred, by_raw, None, None, None, None, None, None, None, None


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, ctx.groups, weight, bias, scale, shift, _ = args
        with torch._C._AutoDispatchBelowAutograd():
            y, mean, rstd = torch.ops.fastdiff.group_norm_silu(*args)
        ctx.save_for_backward(x, mean, rstd, weight, bias, scale, shift)
        ctx.mark_non_differentiable(mean, rstd)
        return y, mean, rstd

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fastdiff.ops.group_norm_silu is differentiable once: backward with create_graph=True is not "
                'supported; use fastdiff.backend("reference") for second derivatives'
            )
        x, mean, rstd, weight, bias, scale, shift = ctx.saved_tensors
        by_x, sums = torch.ops.fastdiff.group_norm_silu_grad(
            grad, x, mean, rstd, ctx.groups, weight, bias, scale, shift
        )
        by_offset, by_factor = sums.unbind()  # u = factor xhat + offset in each channel of a sample
        by_scale = by_shift = None
        if scale is not None:
            by_scale = (weight * by_factor + bias * by_offset).to(scale.dtype) if ctx.needs_input_grad[4] else None
            by_shift = by_offset.to(shift.dtype) if ctx.needs_input_grad[5] else None
            by = 1 + scale.to(sums.dtype)
            by_offset, by_factor = by_offset * by, by_factor * by
        by_weight = by_factor.sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        by_bias = by_offset.sum(0).to(bias.dtype) if ctx.needs_input_grad[3] else None
        return by_x, None, by_weight, by_bias, by_scale, by_shift, None


def _take_once(ctx: Any, name: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"fastdiff.ops.{name} is differentiable once: backward with create_graph=True is not supported; "
            f"use fastdiff.reference.{name} for second derivatives"
        )
    if ctx.used:
        raise RuntimeError(f"the gradient of fastdiff.ops.{name} was already taken; compute the loss again")
    ctx.used = True


def _scaled(grad: Tensor, incoming: Tensor, factor: float) -> Tensor:
    """The stored gradient, overwritten with its product by incoming, () or (B,), and factor."""
    incoming = incoming.reshape(-1).contiguous()
    if type(grad) is Tensor:
        torch.ops.fastdiff.scale_(grad, incoming, factor)
        return grad
    # A traced graph may not change what its forward returned; there the product is one fused pass.
    by = (incoming * factor).reshape(-1, *[1] * (grad.ndim - 1))
    return (grad * by).to(grad.dtype)


def _with_gradient(function: type[torch.autograd.Function], op: Any, *inputs: int) -> Any:
    """The op with the gradient of `function`; inputs: the numbers of the arguments that it is differentiable by."""

    def autograd(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(args[i] is not None and args[i].requires_grad for i in inputs):
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return autograd


# --- registration -----------------------------------------------------------------------------------------------

_library = torch.library.Library("fastdiff", "DEF")
_NOISE = "Tensor? seed, Tensor? ids"
_SCHEMAS = {
    "normal_": "(Tensor(a!) out, Tensor seed, Tensor? ids, Tensor step, int stream) -> ()",
    "noising": f"(Tensor x0, Tensor t, Tensor table, {_NOISE}, Tensor? noise, int stream) -> Tensor",
    "loss": f"(Tensor pred, Tensor? x0, Tensor t, Tensor table, {_NOISE}, Tensor? noise, int stream, str kind, "
    "float delta, bool per_sample, bool with_grad) -> (Tensor, Tensor)",
    "vlb": "(Tensor pred, Tensor? raw, Tensor x_t, Tensor x0, Tensor t, Tensor rows, float? clip, bool per_sample, "
    "bool by_pred, bool by_raw) -> (Tensor, Tensor, Tensor)",
    "scale_": "(Tensor(a!) grad, Tensor incoming, float factor) -> ()",
    "group_norm_silu": "(Tensor x, int groups, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, float eps) -> "
    "(Tensor, Tensor, Tensor)",
    "group_norm_silu_grad": "(Tensor grad, Tensor x, Tensor mean, Tensor rstd, int groups, Tensor weight, Tensor bias, "
    "Tensor? scale, Tensor? shift) -> (Tensor, Tensor)",
    "update": f"(Tensor x, Tensor pred, Tensor rows, Tensor step, {_NOISE}, Tensor? uncond, Tensor? raw, "
    "Tensor? noise, float? clip, int stream) -> Tensor",
    "update_": f"(Tensor(a!) x, Tensor pred, Tensor rows, Tensor step, {_NOISE}, Tensor? uncond, Tensor? raw, "
    "Tensor? noise, Tensor(b!)? hist, float? clip, str keep, int stream) -> ()",
}


def _fake_loss(pred: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    per_sample, with_grad = args[-2:]
    value = pred.new_empty(pred.shape[:1] if per_sample else (), dtype=torch.float32)
    return value, torch.empty_like(pred) if with_grad else pred.new_empty(0)


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "normal_": (_normal_, lambda *args: None),
    "noising": (_noising, lambda x0, *args: torch.empty_like(x0)),
    "loss": (_loss, _fake_loss),
    "vlb": (_vlb, lambda pred, raw, *args: _empty_vlb(pred, raw, *args[-3:])),
    "scale_": (_scale_, lambda *args: None),
    "group_norm_silu": (_group_norm_silu, _empty_group_norm_silu),
    "group_norm_silu_grad": (_group_norm_silu_grad, _empty_group_norm_silu_grad),
    "update": (_update, lambda x, *args: torch.empty_like(x)),
    "update_": (_update_, lambda *args: None),
}
for _name, (_run, _fake) in _IMPLEMENTATIONS.items():
    _library.define(_name + _SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _run, "CPU")
    _library.impl(_name, _run, "CUDA")
    torch.library.register_fake(f"fastdiff::{_name}", _fake, lib=_library)
_library.impl("noising", _with_gradient(_Noising, torch.ops.fastdiff.noising.default, 0, 5), "Autograd")
_library.impl("loss", _with_gradient(_Loss, torch.ops.fastdiff.loss.default, 0, 1, 6), "Autograd")
_library.impl("vlb", _with_gradient(_Vlb, torch.ops.fastdiff.vlb.default, 0, 1, 2, 3), "Autograd")
_library.impl(
    "group_norm_silu",
    _with_gradient(_GroupNormSiLU, torch.ops.fastdiff.group_norm_silu.default, 0, 2, 3, 4, 5),
    "Autograd",
)
