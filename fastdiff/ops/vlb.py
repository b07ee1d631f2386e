"""The terms of the variational bound, with their gradients in the same pass."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..support import transforms
from .checks import (
    as_clip,
    as_index,
    check_floating,
    check_levels,
    check_like,
    check_range,
    check_reduction,
    check_table,
    wants_gradient,
)
from .dispatch import launcher
from .quick import quick
from .registry import Op
from .stored import scaled, take


@quick(on_cpu=False)
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
    """The term of level t of the variational bound, in nats per dimension.

        x0hat = clip(a x_t + b pred)
        delta = low, or with raw_variance low + (raw + 1)/2 (high - low)
        KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) = 1/2 (delta + exp(-delta) - 1 + w (x_0 - x0hat)^2 exp(-delta))

    If the row says decoder, it is -log p(x_0 | x_t) of images in 256 steps over [-1, 1] instead: the probability of
    x_0's bin under N(x0hat, exp(delta)). A bin reaches 1/255 to each side; the first and the last are open.

    The gradients by pred and raw_variance are computed in the same pass. A second backward, or one with create_graph,
    computes them again. If a gradient by x_t, x0 or rows is wanted too, the differentiable reference runs instead.

    Args:
        pred, x_t, x0: (B, ...).
        t: the level, as for `noising`.
        rows: (levels, 6) float32 rows (a, b, w, low, high, decoder), see `bound.vlb_rows`.
        raw_variance: shaped like pred, the model's output for the variance.
        clip: x0hat is kept in [-clip, clip].
        detach_mean: no gradient by pred, as in the hybrid loss of Nichol & Dhariwal.
        reduction: "mean" over the batch, or "none".

    Returns: (B,) for reduction "none", () for "mean"; float32, or float64 for float64 data.
    Raises: TypeError or ValueError that names the argument.
    Reference: Ho et al. 2020, arXiv:2006.11239, eq. 5 and 13; Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 15.
    """
    check_floating("pred", pred)
    check_like("x_t", x_t, pred)
    check_like("x0", x0, pred)
    if raw_variance is not None:
        check_like("raw_variance", raw_variance, pred)
    t = as_index("t", t, pred)
    check_table("rows", rows, 6, pred)
    clip = as_clip(clip)
    check_reduction(reduction)
    pred = pred.detach() if detach_mean else pred
    with_grad = torch.is_grad_enabled()
    if wants_gradient(x_t, x0, rows) or transforms.active():
        check_levels("t", t, rows.shape[0])
        value = reference.vlb(pred, raw_variance, x_t, x0, t, rows, clip)[0]
        return value.mean() if reduction == "mean" else reference.mean_of_samples(value)
    by_pred, by_raw = (with_grad and i is not None and i.requires_grad for i in (pred, raw_variance))
    per_sample = reduction == "none"
    return _OP(pred, raw_variance, x_t, x0, t, rows, clip, per_sample, by_pred, by_raw)[0]


def _empty(pred: Tensor, raw: Tensor | None, *operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(nats, gradient by pred, by raw), none of them written; a gradient that is not wanted is empty.

    The gradients of float16 tensors may exceed what float16 holds, so they are kept in float32.
    """
    per_sample, by_pred, by_raw = operands[-3:]
    value = pred.new_empty(pred.shape[:1] if per_sample else (), dtype=reference.work_dtype(pred))
    pred_grad, raw_grad = (
        torch.empty_like(x, dtype=torch.float32 if x.dtype == torch.float16 else x.dtype)
        if x is not None and wanted
        else pred.new_empty(0)
        for x, wanted in ((pred, by_pred), (raw, by_raw))
    )
    return value, pred_grad, raw_grad


def _vlb(
    pred: Tensor, raw: Tensor | None, x_t: Tensor, x0: Tensor, t: Tensor, rows: Tensor,
    clip: float | None, per_sample: bool, by_pred: bool, by_raw: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    value, *grads = _empty(pred, raw, per_sample, by_pred, by_raw)
    if pred.numel() == 0:
        return value.fill_(torch.nan), grads[0], grads[1]
    check_range("t", t, len(rows))
    scale = 1.0 / (pred.numel() // len(pred) if per_sample else pred.numel())
    pred_grad, raw_grad = grads[0] if by_pred else None, grads[1] if by_raw else None
    if launch := launcher("vlb", pred):
        launch(
            out=value.reshape(-1), pred_grad=pred_grad, raw_grad=raw_grad,
            pred=pred, raw=raw, x_t=x_t, x0=x0, t=t, rows=rows, clip=clip, scale=scale,
        )  # fmt: skip
    else:
        nats, *slopes = reference.vlb(pred, raw, x_t, x0, t, rows, clip)
        value.copy_(nats.reshape(len(pred), -1).mean(1) if per_sample else nats.mean())
        for grad, slope in zip((pred_grad, raw_grad), slopes, strict=True):
            if grad is not None:
                grad.copy_(slope * scale)
    return value, grads[0], grads[1]


class _Vlb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pred: Tensor, raw: Tensor | None, x_t: Tensor, x0: Tensor, results: Any, args: Any) -> Tensor:
        value, *grads = results
        ctx.stored = grads if args[8:] == ctx.needs_input_grad[:2] else None
        ctx.save_for_backward(*args[:6])
        ctx.clip, ctx.dtypes = args[6], (pred.dtype, raw if raw is None else raw.dtype)
        return value

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        grads, wanted = take(ctx, incoming), ctx.needs_input_grad[:2]
        if grads is not None:
            found = [scaled(grad, incoming) if want else None for grad, want in zip(grads, wanted, strict=True)]
        else:
            pred, raw, x_t, x0, t, rows = ctx.saved_tensors
            by = incoming.reshape(-1, *[1] * (pred.ndim - 1)) / (pred.numel() // max(1, incoming.numel()))
            found = [slope * by for slope in reference.vlb(pred, raw, x_t, x0, t, rows, ctx.clip)[1:]]
        triples = zip(found, ctx.dtypes, wanted, strict=True)
        by_pred, by_raw = (grad.to(dtype) if want and grad is not None else None for grad, dtype, want in triples)
        return by_pred, by_raw, None, None, None, None


_OP = Op(
    "vlb",
    "(Tensor pred, Tensor? raw, Tensor x_t, Tensor x0, Tensor t, Tensor rows, float? clip, bool per_sample, "
    "bool by_pred, bool by_raw) -> (Tensor, Tensor, Tensor)",
    _vlb,
    _empty,
)
_OP.differentiate(_Vlb, 0, 1, 2, 3)
