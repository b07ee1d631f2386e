"""Group normalisation, scale and shift, and SiLU in one pass."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import dispatch
from .checks import check_channels, check_vector
from .quick import Call, quick
from .registry import Op


@quick
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
    return _OP(x, num_groups, weight, bias, scale, shift, float(eps))[0]


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


def _empty_grad(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor,
    groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, parameters: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients by x, weight, bias, scale and shift, none of them written; one that is not wanted is empty."""
    rest = [
        torch.empty_like(t, memory_format=torch.contiguous_format) if parameters and t is not None else x.new_empty(0)
        for t in (weight, bias, scale, shift)
    ]
    return torch.empty_like(x), *rest


def _group_norm_silu_grad(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor,
    groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, parameters: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    made = _empty_grad(grad, x, mean, rstd, groups, weight, bias, scale, shift, parameters)
    if x.numel() == 0:
        return made[0], *[t.zero_() for t in made[1:]]
    by_weight, by_bias, by_scale, by_shift = [t if t.numel() else None for t in made[1:]]
    if launch := dispatch.launcher("norm_grad", x):
        launch(
            x_grad=made[0], weight_grad=by_weight, bias_grad=by_bias, scale_grad=by_scale, shift_grad=by_shift,
            grad=grad, x=x, mean=mean, rstd=rstd, groups=groups, weight=weight, bias=bias, scale=scale, shift=shift,
        )  # fmt: skip
        return made
    found = reference.group_norm_silu_grad(grad, x, mean, rstd, groups, weight, bias, scale, shift)
    for out, by in zip(made, found, strict=True):
        if by is not None and out.numel():
            out.copy_(by)
    return made


@quick
def _gradients(*args: Any) -> tuple[Tensor, ...]:
    return _GRAD(*args)


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, call: Call
    ) -> Tensor:
        y, mean, rstd = call.run(*call.args)
        call.rest = mean, rstd
        ctx.groups = call.args[1]
        ctx.save_for_backward(x, mean, rstd, weight, bias, scale, shift)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fastdiff.ops.group_norm_silu is differentiable once: backward with create_graph=True is not "
                'supported; use fastdiff.backend("reference") for second derivatives'
            )
        x, mean, rstd, weight, bias, scale, shift = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        gradients = _gradients(grad, x, mean, rstd, ctx.groups, weight, bias, scale, shift, any(wanted[1:]))
        return *[by if want else None for by, want in zip(gradients, wanted[:5], strict=True)], None


_OP = Op(
    "group_norm_silu",
    "(Tensor x, int groups, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, float eps) -> "
    "(Tensor, Tensor, Tensor)",
    _group_norm_silu,
    _empty,
)
_OP.differentiate(_GroupNormSiLU, 0, 2, 3, 4, 5)
_GRAD = Op(
    "group_norm_silu_grad",
    "(Tensor grad, Tensor x, Tensor mean, Tensor rstd, int groups, Tensor weight, Tensor bias, Tensor? scale, "
    "Tensor? shift, bool parameters) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _group_norm_silu_grad,
    _empty_grad,
)
