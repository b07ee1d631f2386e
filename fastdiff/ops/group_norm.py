"""Group normalisation, scale and shift, and SiLU in one pass."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..support import transforms
from ..support.scalars import as_number
from .checks import check_channels, check_vector
from .dispatch import backend_of, launcher
from .quick import quick
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
    add: Tensor | None = None,
) -> Tensor:
    """silu(GroupNorm(x + add) (1 + scale) + shift).

        GroupNorm(x) = weight (x - mean) / sqrt(var + eps) + bias

    mean and var are those of each group of neighbouring channels of a sample. Everything is computed in float32,
    whatever the types. Differentiable by every tensor, any number of times.

    Args:
        x: (B, C, ...).
        num_groups: a divisor of C.
        weight, bias: (C,).
        eps: at least 0.
        scale, shift: (B, C), both or neither.
        add: (B, C), or (C,) for all samples: the bias of the convolution that made x, a time embedding, or their sum.

    Returns: a tensor shaped and typed like x.
    Raises: TypeError or ValueError that names the argument.
    Reference: Wu & He 2018, arXiv:1803.08494, eq. 7; scale and shift: Dhariwal & Nichol 2021, arXiv:2105.05233,
        section 4.3.
    """
    num_groups, eps = check_channels(x, num_groups), as_number("eps", eps)
    if not eps >= 0:
        raise ValueError(f"eps: expected a number of at least 0, got {eps}")
    if (scale is None) != (shift is None):
        raise ValueError(f"{'scale' if scale is None else 'shift'}: expected both scale and shift, or neither")
    check_vector("weight", weight, x.shape[1:2], x)
    check_vector("bias", bias, x.shape[1:2], x)
    if scale is not None and shift is not None:
        check_vector("scale", scale, x.shape[:2], x)
        check_vector("shift", shift, x.shape[:2], x)
    if add is not None:
        check_vector("add", add, x.shape[1:2] if isinstance(add, Tensor) and add.ndim == 1 else x.shape[:2], x)
    if backend_of(x) != "triton" or transforms.active():
        # PyTorch's own operations are differentiable any number of times, and torch.compile fuses them.
        return reference.group_norm_silu(x, num_groups, weight, bias, scale, shift, add, eps)
    return _OP(x, num_groups, weight, bias, scale, shift, add, eps)[0]


def _empty(x: Tensor, groups: int, *operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean of each group, reciprocal standard deviation), none of them written."""
    mean, rstd = (x.new_empty((x.shape[0], groups), dtype=reference.work_dtype(x)) for _ in range(2))
    return torch.empty_like(x), mean, rstd


def _group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None,
    add: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out, mean, rstd = _empty(x, groups)
    if x.numel() == 0:
        return out, mean, rstd
    if launch := launcher("norm", x):
        launch(
            out=out, mean=mean, rstd=rstd,
            x=x, groups=groups, weight=weight, bias=bias, scale=scale, shift=shift, add=add, eps=eps,
        )  # fmt: skip
    else:
        out.copy_(reference.group_norm_silu(x, groups, weight, bias, scale, shift, add, eps))
        grouped = reference.with_channels(x, add).to(mean.dtype).reshape(len(x), groups, -1)
        mean.copy_(grouped.mean(2))
        rstd.copy_((grouped.var(2, correction=0) + eps).rsqrt())
    return out, mean, rstd


def _empty_grads(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, groups: int, *operands: Any
) -> tuple[Tensor, ...]:
    """Gradients by x and by the parameters, not written; those that are not there or not wanted have no element."""
    *parameters, wanted = operands
    grads = (
        torch.empty_like(p, memory_format=torch.contiguous_format) if wanted and p is not None else x.new_empty(0)
        for p in parameters
    )
    return torch.empty_like(x), *grads


def _group_norm_silu_grad(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, groups: int,
    weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, add: Tensor | None, parameters: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    operands = (weight, bias, scale, shift, add)
    by_x, *grads = _empty_grads(grad, x, mean, rstd, groups, *operands, parameters)
    wanted = [g if parameters and p is not None else None for g, p in zip(grads, operands, strict=True)]
    if x.numel() == 0:
        return by_x, *(g.zero_() for g in grads)
    if launch := launcher("norm_grad", x):
        by_weight, by_bias, by_scale, by_shift, by_add = wanted
        launch(
            x_grad=by_x, weight_grad=by_weight, bias_grad=by_bias, scale_grad=by_scale, shift_grad=by_shift,
            add_grad=by_add, grad=grad, x=x, mean=mean, rstd=rstd, groups=groups,
            weight=weight, bias=bias, scale=scale, shift=shift, add=add,
        )  # fmt: skip
        return by_x, *grads
    exact = reference.group_norm_silu_grad(grad, x, mean, rstd, groups, *operands)
    for result, value in zip((by_x, *wanted), exact, strict=True):
        if result is not None and value is not None:
            result.copy_(value)
    return by_x, *grads


@quick
def _gradients(*args: Any) -> tuple[Tensor, ...]:
    return _GRAD(*args)


def _differentiable_gradients(ctx: Any, grad: Tensor, *operands: Any) -> list[Tensor | None]:
    """The gradients that are wanted of x, weight, bias, scale, shift and add, through the reference."""
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        x, weight, bias, scale, shift, add = operands
        y = reference.group_norm_silu(x, ctx.groups, weight, bias, scale, shift, add, ctx.eps)
    wanted = [t for t, want in zip(operands, ctx.needs_input_grad, strict=False) if want]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=graph))
    return [next(found) if want else None for want in ctx.needs_input_grad[: len(operands)]]


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None,
        add: Tensor | None, results: Any, args: Any,
    ) -> Tensor:  # fmt: skip
        y, mean, rstd = results
        ctx.groups, ctx.eps = args[1], args[-1]
        ctx.save_for_backward(x, mean, rstd, weight, bias, scale, shift, add)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, *operands = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if torch.is_grad_enabled() or transforms.has_rules(grad):
            return *_differentiable_gradients(ctx, grad, x, *operands), None, None
        gradients = _gradients(grad, x, mean, rstd, ctx.groups, *operands, any(wanted[1:6]))
        return *[by if want else None for by, want in zip(gradients, wanted[:6], strict=True)], None, None


_OP = Op(
    "group_norm_silu",
    "(Tensor x, int groups, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, Tensor? add, float eps) -> "
    "(Tensor, Tensor, Tensor)",
    _group_norm_silu,
    _empty,
)
_OP.differentiate(_GroupNormSiLU, 0, 2, 3, 4, 5, 6)
_GRAD = Op(
    "group_norm_silu_grad",
    "(Tensor grad, Tensor x, Tensor mean, Tensor rstd, int groups, Tensor weight, Tensor bias, Tensor? scale, "
    "Tensor? shift, Tensor? add, bool parameters) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _group_norm_silu_grad,
    _empty_grads,
)
