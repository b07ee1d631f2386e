"""Group normalisation, scale and shift, and SiLU in one pass."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import dispatch
from .checks import check_channels, check_vector
from .registry import define, differentiate


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """silu(GroupNorm(x) (1 + scale) + shift).

        GroupNorm(x) = weight (x - mean) / sqrt(var + eps) + bias

    mean and var are those of each group of neighbouring channels of a sample. Everything is computed in float32,
    whatever the types. Differentiable by every tensor; second derivatives need `backend("reference")`.

    Args:
        x: (B, C, ...).
        num_groups: a divisor of C.
        weight, bias: (C,).
        eps: at least 0.
        scale, shift: (B, C), both or neither.

    Returns: a tensor shaped and typed like x.
    Raises: TypeError or ValueError that names the argument.
    Reference: Wu & He 2018, arXiv:1803.08494, eq. 7; scale and shift: Dhariwal & Nichol 2021, arXiv:2105.05233,
        section 4.3.
    """
    check_channels(x, num_groups)
    if not eps >= 0:
        raise ValueError(f"eps: expected a number of at least 0, got {eps}")
    if (scale is None) != (shift is None):
        raise ValueError(f"{'scale' if scale is None else 'shift'}: expected both scale and shift, or neither")
    check_vector("weight", weight, x.shape[1:2], x)
    check_vector("bias", bias, x.shape[1:2], x)
    if scale is not None and shift is not None:
        check_vector("scale", scale, x.shape[:2], x)
        check_vector("shift", shift, x.shape[:2], x)
    if dispatch.backend_of(x) != "triton":
        # PyTorch's own operations are differentiable any number of times, and torch.compile fuses them.
        return reference.group_norm_silu(x, num_groups, weight, bias, scale, shift, eps)
    return torch.ops.fastdiff.group_norm_silu(x, num_groups, weight, bias, scale, shift, eps)[0]


def _empty(x: Tensor, groups: int, *operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean of each group, reciprocal standard deviation), none of them written."""
    mean, rstd = (x.new_empty((x.shape[0], groups), dtype=reference.work_dtype(x)) for _ in range(2))
    return torch.empty_like(x), mean, rstd


def _group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    out, mean, rstd = _empty(x, groups)
    if x.numel() == 0:
        return out, mean, rstd
    if launch := dispatch.launcher("norm", x):
        launch(
            out=out, mean=mean, rstd=rstd,
            x=x, groups=groups, weight=weight, bias=bias, scale=scale, shift=shift, eps=eps,
        )  # fmt: skip
    else:
        out.copy_(reference.group_norm_silu(x, groups, weight, bias, scale, shift, eps))
        grouped = x.to(mean.dtype).reshape(len(x), groups, -1)
        mean.copy_(grouped.mean(2))
        rstd.copy_((grouped.var(2, correction=0) + eps).rsqrt())
    return out, mean, rstd


def _empty_grad(grad: Tensor, x: Tensor, *operands: Any) -> tuple[Tensor, Tensor]:
    """(gradient by x, sums over pixels of the slope and of the slope times the normalised x), neither written."""
    return torch.empty_like(x), x.new_empty((2, *x.shape[:2]), dtype=reference.work_dtype(x))


def _group_norm_silu_grad(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor,
    groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, sums = _empty_grad(grad, x)
    if x.numel() == 0:
        return out, sums.zero_()
    if launch := dispatch.launcher("norm_grad", x):
        return out, launch(
            x_grad=out, grad=grad, x=x, mean=mean, rstd=rstd,
            groups=groups, weight=weight, bias=bias, scale=scale, shift=shift,
        )  # fmt: skip
    by_x, sums = reference.group_norm_silu_grad(grad, x, mean, rstd, groups, weight, bias, scale, shift)
    # The op promises the strides of empty_like.
    return by_x if by_x.stride() == out.stride() else out.copy_(by_x), sums


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, ctx.groups, weight, bias, scale, shift, _eps = args
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


define(
    "group_norm_silu",
    "(Tensor x, int groups, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, float eps) -> "
    "(Tensor, Tensor, Tensor)",
    _group_norm_silu,
    _empty,
)
define(
    "group_norm_silu_grad",
    "(Tensor grad, Tensor x, Tensor mean, Tensor rstd, int groups, Tensor weight, Tensor bias, Tensor? scale, "
    "Tensor? shift) -> (Tensor, Tensor)",
    _group_norm_silu_grad,
    _empty_grad,
)
differentiate("group_norm_silu", _GroupNormSiLU, 0, 2, 3, 4, 5)
