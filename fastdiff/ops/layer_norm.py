"""Layer normalisation with scale and shift, alone or of a gated sum, in one pass."""

from typing import Any

from torch import Tensor

from .. import reference
from ..support.scalars import as_number
from .checks import check_floating, check_like, check_vector, runs_kernel
from .dispatch import launcher
from .quick import quick
from .registry import Op

LARGEST = 24576  # channels that the kernel holds


@quick(on_cpu=False)
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift.

        LayerNorm(x) = weight (x - mean) / sqrt(var + eps) + bias

    mean and var are those of each row of C numbers. Everything is computed in float32, whatever the types. If a
    gradient is wanted, the differentiable reference runs instead of a kernel. So it does within torch.compile, which
    fuses it, and for rows of more than 24,576 numbers.

    Args:
        x: (..., C).
        weight, bias: (C,); bias only with weight.
        eps: at least 0.
        scale, shift: (B, C), one row for all of x[i], where x is (B, ..., C). They may be parts of one tensor.

    Returns: a contiguous tensor shaped and typed like x.
    Raises: TypeError or ValueError that names the argument.
    Reference: Ba, Kiros & Hinton 2016, arXiv:1607.06450, eq. 4; scale and shift: Peebles & Xie 2023, arXiv:2212.09748,
        section 3.2.
    """
    eps = _checked(x, weight, bias, eps, scale=scale, shift=shift)
    if not is_fused(x, weight, bias, scale, shift):
        return reference.layer_norm(x, weight, bias, eps, scale, shift)
    normed: Tensor = _OP(x, weight, bias, eps, scale, shift)
    return normed


@quick(on_cpu=False)
def add_layer_norm(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """s = x + gate y and LayerNorm(s) (1 + scale) + shift: what follows a layer of a transformer, and the norm before
    the next one.

    The norm is that of s before it is rounded to the type of x. Otherwise as in `layer_norm`.

    Args:
        x: (..., C).
        y: shaped like x, of any floating type.
        weight, bias, eps, scale, shift: as in `layer_norm`.
        gate: (B, C), as scale; None is 1.

    Returns: (s, the norm), contiguous tensors shaped and typed like x.
    Raises: TypeError or ValueError that names the argument.
    Reference: Peebles & Xie 2023, arXiv:2212.09748, figure 3.
    """
    eps = _checked(x, weight, bias, eps, gate=gate, scale=scale, shift=shift)
    check_like("y", y, x)
    if not is_fused(x, y, weight, bias, gate, scale, shift):
        return reference.add_layer_norm(x, y, weight, bias, eps, gate, scale, shift)
    both: tuple[Tensor, Tensor] = _ADD(x, y, weight, bias, eps, gate, scale, shift)
    return both


def is_fused(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the norm of x with these operands is a kernel of its own."""
    return x.shape[-1] <= LARGEST and runs_kernel(x, *others)


def _checked(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, **rows: Tensor | None) -> float:
    """eps as a float.

    Raises: TypeError or ValueError for an argument that does not fit x.
    """
    check_floating("x", x)
    channels, eps = (x.shape[-1],), as_number("eps", eps)
    if not eps >= 0:
        raise ValueError(f"eps: expected a number of at least 0, got {eps}")
    if weight is not None:
        check_vector("weight", weight, channels, x)
    if bias is not None:
        if weight is None:
            raise ValueError("bias: expected None without weight")
        check_vector("bias", bias, channels, x)
    for name, row in rows.items():
        if row is not None:
            if x.ndim < 2:
                raise ValueError(f"x: expected shape (B, ..., C) where {name} is given, got {tuple(x.shape)}")
            check_vector(name, row, (x.shape[0], *channels), x)
    return eps


def _empty(x: Tensor, *operands: Any) -> Tensor:
    return x.new_empty(x.shape)


def _layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    out = _empty(x)
    if x.numel() == 0:
        return out
    if launch := launcher("layer_norm", x):
        launch(out=out, total=None, x=x, y=None, weight=weight, bias=bias, eps=eps, gate=None, scale=scale, shift=shift)
        return out
    return out.copy_(reference.layer_norm(x, weight, bias, eps, scale, shift))


def _empty_pair(x: Tensor, *operands: Any) -> tuple[Tensor, Tensor]:
    return _empty(x), _empty(x)


def _add_layer_norm(
    x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    gate: Tensor | None, scale: Tensor | None, shift: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    total, out = _empty_pair(x)
    if x.numel() == 0:
        return total, out
    if launch := launcher("layer_norm", x):
        launch(out=out, total=total, x=x, y=y, weight=weight, bias=bias, eps=eps, gate=gate, scale=scale, shift=shift)
        return total, out
    both = reference.add_layer_norm(x, y, weight, bias, eps, gate, scale, shift)
    return total.copy_(both[0]), out.copy_(both[1])


_OP = Op(
    "layer_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? scale, Tensor? shift) -> Tensor",
    _layer_norm,
    _empty,
)
_ADD = Op(
    "add_layer_norm",
    "(Tensor x, Tensor y, Tensor? weight, Tensor? bias, float eps, Tensor? gate, Tensor? scale, Tensor? shift) -> "
    "(Tensor, Tensor)",
    _add_layer_norm,
    _empty_pair,
)
