"""Gradients that a loss computes in its forward pass and scales in its backward pass."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..support import transforms
from .dispatch import launcher
from .quick import quick
from .registry import Op


def stored_scale(dtype: torch.dtype, count: int) -> float:
    """The power of two that a stored gradient carries: in float16 a gradient of 1/count would underflow."""
    return 2.0 ** (count.bit_length() - 1) if dtype == torch.float16 else 1.0


def take(ctx: Any, incoming: Tensor) -> Any:
    """What the forward pass stored in ctx.stored, once: it is overwritten, and has no graph of its own.

    None if this walk is a second one, records a graph, or belongs to a transform. Then the gradient is computed again,
    by the differentiable reference. It is not among ctx.saved_tensors, which must not change in place.
    """
    if torch.is_grad_enabled() or transforms.has_rules(incoming):
        return None
    stored, ctx.stored = ctx.stored, None
    return stored


@quick(on_cpu=True)
def scaled(grad: Tensor, incoming: Tensor) -> Tensor:
    """The stored gradient of `incoming.numel()` values, overwritten with its product by incoming, () or (B,)."""
    factor = 1.0
    if grad.dtype == torch.float16:
        factor /= stored_scale(grad.dtype, grad.numel() // max(1, incoming.numel()))
    if type(grad) is Tensor:
        _SCALE(grad, incoming.contiguous(), factor)
        return grad
    # A traced graph may not change what its forward returned; there the product is one fused pass.
    by = (incoming * factor).reshape(-1, *[1] * (grad.ndim - 1))
    return (grad * by).to(grad.dtype)


def _scale_(grad: Tensor, incoming: Tensor, factor: float) -> None:
    if grad.numel() == 0:
        return
    whole = incoming.numel() == 1 or grad.stride(0) == grad[0].numel()
    launch = launcher("scale_", grad)
    if launch and whole:
        launch(grad=grad, incoming=incoming, factor=factor)
    else:
        grad.mul_((incoming * factor).to(reference.work_dtype(grad)).reshape(-1, *[1] * (grad.ndim - 1)))


_SCALE = Op("scale_", "(Tensor(a!) grad, Tensor incoming, float factor) -> ()", _scale_)
