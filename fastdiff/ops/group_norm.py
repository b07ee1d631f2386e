"""Group normalisation, scale and shift, and SiLU in one pass."""

import importlib
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

strides_of = importlib.import_module("..kernels.layout", __package__).strides_of


@quick(on_cpu=False)
def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    add: Tensor | None = None,
    skip: Tensor | None = None,
    *,
    silu: bool = True,
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
        skip: (B, C', ...), further channels, of the type of x: the norm is that of torch.cat((x, skip), 1), which is
            not made. C above is then C + C'.
        silu: whether SiLU is taken.

    Returns: a tensor shaped and typed like x, with the channels of skip behind its own.
    Raises: TypeError or ValueError that names the argument.
    Reference: Wu & He 2018, arXiv:1803.08494, eq. 7; scale and shift: Dhariwal & Nichol 2021, arXiv:2105.05233,
        section 4.3.
    """
    (channels, num_groups), eps = check_channels(x, skip, num_groups), as_number("eps", eps)
    if not isinstance(silu, bool):
        raise TypeError(f"silu: expected a bool, got {type(silu).__name__}")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number of at least 0, got {eps}")
    if (scale is None) != (shift is None):
        raise ValueError(f"{'scale' if scale is None else 'shift'}: expected both scale and shift, or neither")
    rows = x.shape[0], channels
    check_vector("weight", weight, rows[1:], x)
    check_vector("bias", bias, rows[1:], x)
    if scale is not None and shift is not None:
        check_vector("scale", scale, rows, x)
        check_vector("shift", shift, rows, x)
    if add is not None:
        check_vector("add", add, rows[1:] if isinstance(add, Tensor) and add.ndim == 1 else rows, x)
    if not is_fused(x):
        # PyTorch's own operations are differentiable any number of times, and torch.compile fuses them.
        return reference.group_norm_silu(x, num_groups, weight, bias, scale, shift, add, eps, skip, silu)
    return _OP(x, num_groups, weight, bias, scale, shift, add, eps, skip, silu)[0]


def is_fused(x: Tensor) -> bool:
    """Whether the norm of tensors like x is a kernel of its own."""
    return backend_of(x) == "triton" and not transforms.active()


def _empty(x: Tensor, groups: int, *operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean of each group, reciprocal standard deviation), none of them written."""
    *_, skip, _ = operands
    mean, rstd = (x.new_empty((x.shape[0], groups), dtype=reference.work_dtype(x)) for _ in range(2))
    if skip is None:
        return torch.empty_like(x), mean, rstd
    channels = x.shape[1] + skip.shape[1]
    out = x.new_empty_strided((x.shape[0], channels, *x.shape[2:]), strides_of(x, channels))
    return out, mean, rstd


def _group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None,
    add: Tensor | None, eps: float, skip: Tensor | None, silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out, mean, rstd = _empty(x, groups, skip, silu)
    if x.numel() == 0:
        return out, mean, rstd
    if launch := launcher("norm", x):
        launch(
            out=out, mean=mean, rstd=rstd,
            x=x, groups=groups, weight=weight, bias=bias, scale=scale, shift=shift, add=add, eps=eps,
            skip=skip, silu=silu,
        )  # fmt: skip
    else:
        out.copy_(reference.group_norm_silu(x, groups, weight, bias, scale, shift, add, eps, skip, silu))
        x = x if skip is None else torch.cat((x, skip), 1)
        grouped = reference.with_channels(x, add).to(mean.dtype).reshape(len(x), groups, -1)
        mean.copy_(grouped.mean(2))
        rstd.copy_((grouped.var(2, correction=0) + eps).rsqrt())
    return out, mean, rstd


def _empty_grads(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, groups: int, *operands: Any
) -> tuple[Tensor, ...]:
    """Gradients by x, by the parameters and by skip, not written; those that are not there or not wanted have no
    element."""
    *parameters, skip, _, wanted = operands
    grads = (
        torch.empty_like(p, memory_format=torch.contiguous_format) if wanted and p is not None else x.new_empty(0)
        for p in parameters
    )
    return torch.empty_like(x), *grads, x.new_empty(0) if skip is None else torch.empty_like(skip)


def _group_norm_silu_grad(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, groups: int,
    weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, add: Tensor | None,
    skip: Tensor | None, silu: bool, parameters: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    operands = (weight, bias, scale, shift, add)
    by_x, *grads, by_skip = _empty_grads(grad, x, mean, rstd, groups, *operands, skip, silu, parameters)
    wanted = [g if parameters and p is not None else None for g, p in zip(grads, operands, strict=True)]
    if x.numel() == 0:
        return by_x, *(g.zero_() for g in grads), by_skip
    if launch := launcher("norm_grad", x):
        by_weight, by_bias, by_scale, by_shift, by_add = wanted
        launch(
            x_grad=by_x, weight_grad=by_weight, bias_grad=by_bias, scale_grad=by_scale, shift_grad=by_shift,
            add_grad=by_add, skip_grad=None if skip is None else by_skip, grad=grad, x=x, mean=mean, rstd=rstd,
            groups=groups, weight=weight, bias=bias, scale=scale, shift=shift, add=add, skip=skip, silu=silu,
        )  # fmt: skip
        return by_x, *grads, by_skip
    exact = reference.group_norm_silu_grad(grad, x, mean, rstd, groups, *operands, skip, silu)
    for result, value in zip((by_x, *wanted, by_skip), exact, strict=True):
        if result is not None and value is not None:
            result.copy_(value)
    return by_x, *grads, by_skip


@quick(on_cpu=False)
def _gradients(*args: Any) -> tuple[Tensor, ...]:
    return _GRAD(*args)


def _differentiable_gradients(ctx: Any, grad: Tensor, *operands: Any) -> list[Tensor | None]:
    """The gradients that are wanted of x, weight, bias, scale, shift, add and skip, through the reference."""
    graph = torch.is_grad_enabled()
    with torch.enable_grad():  # views, of which none is made of another: the gradient ends at them
        operands = tuple(None if t is None else t.view_as(t) for t in operands)
        x, weight, bias, scale, shift, add, skip = operands
        y = reference.group_norm_silu(x, ctx.groups, weight, bias, scale, shift, add, ctx.eps, skip, ctx.silu)
    wanted = [t for t, want in zip(operands, ctx.needs_input_grad, strict=False) if want]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=graph))
    return [next(found) if want else None for want in ctx.needs_input_grad[: len(operands)]]


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None,
        add: Tensor | None, skip: Tensor | None, results: Any, args: Any,
    ) -> Tensor:  # fmt: skip
        y, mean, rstd = results
        ctx.groups, ctx.eps, ctx.silu = args[1], args[7], args[9]
        ctx.save_for_backward(x, mean, rstd, weight, bias, scale, shift, add, skip)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, *operands = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if torch.is_grad_enabled() or transforms.has_rules(grad):
            return *_differentiable_gradients(ctx, grad, x, *operands), None, None
        gradients = _gradients(grad, x, mean, rstd, ctx.groups, *operands, ctx.silu, any(wanted[1:6]))
        return *[by if want else None for by, want in zip(gradients, wanted[:7], strict=True)], None, None


_OP = Op(
    "group_norm_silu",
    "(Tensor x, int groups, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, Tensor? add, float eps, "
    "Tensor? skip, bool silu) -> (Tensor, Tensor, Tensor)",
    _group_norm_silu,
    _empty,
)
_OP.differentiate(_GroupNormSiLU, 0, 2, 3, 4, 5, 6, 8)
_GRAD = Op(
    "group_norm_silu_grad",
    "(Tensor grad, Tensor x, Tensor mean, Tensor rstd, int groups, Tensor weight, Tensor bias, Tensor? scale, "
    "Tensor? shift, Tensor? add, Tensor? skip, bool silu, bool parameters) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _group_norm_silu_grad,
    _empty_grads,
)
