"""The ops of torch.library behind fastdiff.ops: implementations, gradients, schemas and fakes.

They are defined on a bare torch.library.Library: its dispatch costs a few microseconds, where custom_op and
register_autograd cost tens (`pytest benchmarks/test_dispatch.py` measures it).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .dispatch import forced, interpreting, kernels_of, on_device
from .memory import in_huge_pages


def in_range(name: str, index: Tensor, rows: int) -> None:
    if index.is_cpu:
        low, high = (index.item(),) * 2 if index.numel() == 1 else (v.item() for v in index.aminmax())
        if low < 0 or high >= rows:
            raise ValueError(f"{name}: expected values in [0, {rows}), got {low if low < 0 else high}")


def ids_in_range(ids: Tensor | None) -> None:
    if ids is not None:
        in_range("sample_ids", ids, 2**32)


def _laid_out(like: Tensor, result: Tensor) -> Tensor:
    """The result with the strides that the op promises, those of empty_like."""
    out = torch.empty_like(like)
    return result if result.stride() == out.stride() else out.copy_(result)


def _normal_(out: Tensor, seed: Tensor, ids: Tensor | None, step: Tensor, stream: int) -> None:
    ids_in_range(ids)
    if out.numel() == 0:
        return
    if kernels := kernels_of(out):
        with on_device(in_huge_pages(out)):
            kernels.normal_(out, seed, ids, step, stream)
    else:
        out.copy_(reference.normal(out.shape, seed, ids, step, stream, reference.work_dtype(out)))


def _noising(x0: Tensor, *args: Any) -> Tensor:
    out = in_huge_pages(torch.empty_like(x0))
    _noising_out(out, x0, *args)
    return out


def _noising_out(
    out: Tensor, x0: Tensor, t: Tensor, table: Tensor,
    seed: Tensor | None, ids: Tensor | None, noise: Tensor | None, stream: int,
) -> None:  # fmt: skip
    if x0.numel() == 0:
        return
    in_range("t", t, table.shape[0])
    ids_in_range(ids)
    if kernels := kernels_of(x0):
        with on_device(x0):
            kernels.noising(out, x0, t, table, seed, ids, noise, stream)
    else:
        out.copy_(reference.noising(x0, t, table, seed, ids, noise, stream))


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
    in_range("t", t, table.shape[0])
    ids_in_range(ids)
    scale, grad_scale = 1.0 / count, _stored_scale(pred, count) / count
    if kernels := kernels_of(pred):
        stored = grad if with_grad else None
        with on_device(pred):
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
    in_range("t", t, len(rows))
    count = n if per_sample else batch * n
    scale = 1.0 / count
    stored = [grads[0] if by_pred else None, grads[1] if by_raw else None]
    if launch := getattr(kernels_of(pred), "vlb", None):
        with on_device(pred):
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
    kernels = kernels_of(grad)
    if kernels and whole:
        with on_device(grad):
            kernels.scale_(grad, incoming, factor)
    else:
        grad.mul_((incoming * factor).to(reference.work_dtype(grad)).reshape(-1, *[1] * (grad.ndim - 1)))


def _update(x: Tensor, *args: Any) -> Tensor:
    *operands, clip, stream = args
    out = in_huge_pages(torch.empty_like(x))
    _update_out(out, x, *operands, None, clip, "none", stream)
    return out


def _update_(x: Tensor, *args: Any) -> None:
    _update_out(x, x, *args)


def _update_out(
    out: Tensor, x: Tensor, pred: Tensor, rows: Tensor, step: Tensor, seed: Tensor | None, ids: Tensor | None,
    uncond: Tensor | None, raw: Tensor | None, noise: Tensor | None, hist: Tensor | None, *args: Any,
) -> None:  # fmt: skip
    if x.numel() == 0:
        return
    in_range("step", step, rows.shape[0])
    ids_in_range(ids)
    if kernels := kernels_of(x):
        with on_device(x):
            kernels.update(out, x, pred, rows, step, seed, ids, uncond, raw, noise, hist, *args)
    else:
        result, kept = reference.update(x, pred, rows, step, seed, ids, uncond, raw, noise, hist, *args)
        if hist is not None and kept is not None:
            hist.copy_(kept)  # first: what is kept may be x itself, and out too
        out.copy_(result)


def has_norm_kernel(x: Tensor) -> bool:
    """Whether Triton serves x. Else PyTorch's own operations do, which are differentiable any number of times and which
    torch.compile fuses; there is no kernel for CPU tensors."""
    name = forced()
    if x.dtype == torch.float64 or name == "reference":
        return False
    return x.is_cuda or name == "triton" or (name is None and interpreting())


def _group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    out, mean, rstd = _empty_group_norm_silu(x, groups)
    if x.numel() == 0:
        return out, mean, rstd
    if launch := getattr(kernels_of(x), "norm", None):
        with on_device(x):
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
    if launch := getattr(kernels_of(x), "norm_grad", None):
        with on_device(x):
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
    "noising_out": f"(Tensor(a!) out, Tensor x0, Tensor t, Tensor table, {_NOISE}, Tensor? noise, int stream) -> ()",
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
    "update_out": f"(Tensor(a!) out, Tensor x, Tensor pred, Tensor rows, Tensor step, {_NOISE}, Tensor? uncond, "
    "Tensor? raw, Tensor? noise, Tensor(b!)? hist, float? clip, str keep, int stream) -> ()",
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
    "noising_out": (_noising_out, lambda *args: None),
    "update_": (_update_, lambda *args: None),
    "update_out": (_update_out, lambda *args: None),
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
