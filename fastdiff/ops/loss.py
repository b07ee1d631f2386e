"""The weighted regression loss, with its gradient in the same pass."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..support import transforms
from ..support.scalars import as_number
from .checks import (
    as_index,
    as_mask,
    as_sample_ids,
    check_choice,
    check_floating,
    check_levels,
    check_like,
    check_range,
    check_reduction,
    check_table,
    noise_source,
    wants_gradient,
)
from .dispatch import launcher
from .memory import in_huge_pages
from .noise import FORWARD
from .quick import quick
from .registry import NOISE, Op
from .stored import scaled, stored_scale, take

LOSSES = ("mse", "l1", "huber")


@quick(on_cpu=True)
def loss(
    pred: Tensor,
    t: int | Tensor,
    table: Tensor,
    *,
    x0: Tensor | None = None,
    seed: int | Tensor | None = None,
    sample_ids: Tensor | None = None,
    noise: Tensor | None = None,
    mask: Tensor | None = None,
    kind: str = "mse",
    delta: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """L = w_t mean(m rho(pred - y)) with y = p_t x_0 + q_t z, and m = 1 or the mask.

    With the seed of `noising` the noise is drawn again, not read. The gradient by pred is computed in the same pass. A
    second backward, or one with create_graph, computes it again. Differentiable by pred, x0 and noise; if a gradient by
    the table is wanted too, the differentiable reference runs instead of a kernel.

    Args:
        pred: (B, ...) output of the model.
        t: the level, as for `noising`.
        table: (levels, 3) float32 rows (p, q, w).
        x0: shaped like pred; may be left out if p = 0.
        seed, sample_ids, noise: see `fastdiff.ops`; seed and noise may be left out if q = 0.
        mask: (B, ...) or a shape that expands to it, a weight of each element, floating or bool: 0 where data is padded
            or missing. The mean is over all elements; that over kept ones is the loss of mask / mask.float().mean().
            It has no gradient.
        kind: rho(r) = "mse" r^2, "l1" |r|, or "huber" r^2/2 up to delta and delta (|r| - delta/2) beyond.
        delta: of "huber", above 0.
        reduction: "mean" over the batch, or "none".

    Returns: float32, () for reduction "mean" and (B,) for "none".
    Raises: TypeError or ValueError that names the argument.
    Reference: Ho et al. 2020, arXiv:2006.11239, eq. 14.
    """
    check_floating("pred", pred)
    t = as_index("t", t, pred)
    check_table("table", table, 3, pred)
    if x0 is not None:
        check_like("x0", x0, pred)
    if noise is not None or seed is not None:
        seed = noise_source(pred, seed, noise)
    mask = None if mask is None else as_mask(mask, pred)
    check_choice("kind", kind, LOSSES)
    delta = as_number("delta", delta)
    if not delta > 0:
        raise ValueError(f"delta: expected a number above 0, got {delta}")
    check_reduction(reduction)
    with_grad = wants_gradient(pred, x0, noise)
    ids = as_sample_ids(sample_ids, pred.shape[0], pred.device, strict=True)
    per_sample = reduction == "none"
    if transforms.active() or wants_gradient(table):
        check_levels("t", t, table.shape[0], ids)
        terms, _ = reference.loss(pred, x0, t, table, seed, ids, noise, FORWARD, kind, delta, mask)
        return (reference.mean_of_samples(terms) if per_sample else terms.mean()).float()
    return _OP(pred, x0, t, table, seed, ids, noise, mask, FORWARD, kind, delta, per_sample, with_grad)[0]


def _empty(pred: Tensor, *operands: Any) -> tuple[Tensor, Tensor]:
    """(value, gradient by pred), neither written; a gradient that is not wanted is empty."""
    per_sample, with_grad = operands[-2:]
    value = torch.empty(pred.shape[:1] if per_sample else (), dtype=torch.float32, device=pred.device)
    return value, torch.empty_like(pred) if with_grad else pred.new_empty(0)


def _loss(
    pred: Tensor, x0: Tensor | None, t: Tensor, table: Tensor,
    seed: Tensor | None, ids: Tensor | None, noise: Tensor | None, mask: Tensor | None, stream: int,
    kind: str, delta: float, per_sample: bool, with_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    value, grad = _empty(pred, per_sample, with_grad)
    if pred.numel() == 0:
        return value.fill_(torch.nan), grad
    check_range("t", t, table.shape[0])
    check_range("sample_ids", ids, 2**32)
    count = _elements(pred, per_sample)
    loss_scale, grad_scale = 1.0 / count, stored_scale(pred.dtype, count) / count
    if launch := launcher("loss", in_huge_pages(grad) if with_grad else pred):
        launch(
            out=value, grad=grad if with_grad else None, pred=pred, x0=x0, t=t, table=table,
            seed=seed, ids=ids, noise=noise, mask=mask, stream=stream, rho=kind, delta=delta,
            loss_scale=loss_scale, grad_scale=grad_scale,
        )  # fmt: skip
    else:
        terms, slope = reference.loss(pred, x0, t, table, seed, ids, noise, stream, kind, delta, mask)
        value.copy_((terms.reshape(len(pred), -1).sum(1) if per_sample else terms.sum()).mul(loss_scale))
        if with_grad:
            grad.copy_(slope * grad_scale)
    return value, grad


def _elements(pred: Tensor, per_sample: bool) -> int:
    """The number of elements that a mean is taken of."""
    return pred.numel() // len(pred) if per_sample and len(pred) else pred.numel()


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pred: Tensor, x0: Tensor | None, noise: Tensor | None, results: Any, args: Any) -> Tensor:
        value, grad = results
        ctx.stored = grad if args[-1] else None
        ctx.save_for_backward(*args[:8])
        ctx.options = args[8:11]
        return value

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        grad, (_, by_x0, by_noise, _, _) = take(ctx, incoming), ctx.needs_input_grad
        if grad is not None and not (by_x0 or by_noise):  # the common walk: what was saved is not unpacked
            return scaled(grad, incoming), None, None, None, None
        operands: tuple[Any, ...] = ctx.saved_tensors  # once at most, as a checkpoint demands
        pred, x0, t, table, seed, ids, noise, mask = operands
        if grad is not None:
            grad = scaled(grad, incoming)
        else:
            stream, kind, delta = ctx.options
            slope = reference.loss(pred, x0, t, table, seed, ids, noise, stream, kind, delta, mask)[1]
            slope = slope / (pred.numel() // max(1, incoming.numel()))
            grad = (slope * incoming.reshape(-1, *[1] * (pred.ndim - 1))).to(pred.dtype)
        p, q, _w = reference.coefficients(table, t, grad)
        to_x0 = (-p * grad).to(x0.dtype) if by_x0 else None
        to_noise = (-q * grad).to(noise.dtype) if by_noise else None
        return grad, to_x0, to_noise, None, None


_OP = Op(
    "loss",
    f"(Tensor pred, Tensor? x0, Tensor t, Tensor table, {NOISE}, Tensor? noise, Tensor? mask, int stream, str kind, "
    "float delta, bool per_sample, bool with_grad) -> (Tensor, Tensor)",
    _loss,
    _empty,
)
_OP.differentiate(_Loss, 0, 1, 6)
