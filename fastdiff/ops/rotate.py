"""Rotary position embedding of queries and keys."""

from typing import Any

from torch import Tensor

from .. import reference
from ..support.scalars import as_number
from .checks import check_device, check_floating, check_vector, runs_kernel
from .dispatch import launcher
from .quick import quick
from .registry import Op

LARGEST = 512  # elements of a head whose norm the kernel takes


@quick(on_cpu=False)
def rotate(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """x with each pair of neighbours in a head turned by an angle of its token.

        (a, b)  ->  (a cos - b sin, b cos + a sin)

    With a weight, heads have a norm first: weight x / sqrt(mean(x^2) + eps), the mean that of a head.

    It is computed in float32 and rounded once. If a gradient is wanted, and within torch.compile, which fuses it, plain
    PyTorch runs instead of a kernel.

    Args:
        x: (B, N, heads, D), D even.
        cos, sin: (N, D), of each element of a head; or (N, D / 2), of each pair.
        weight: (D,), or None for no norm. For a D that is no power of 2 up to 512 plain PyTorch runs.
        eps: at least 0.

    Returns: a tensor shaped and typed like x.
    Raises: TypeError or ValueError that names the argument.
    Reference: Su et al. 2021, arXiv:2104.09864, eq. 34; the norm: Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.
    """
    check_floating("x", x)
    eps = as_number("eps", eps)
    if not eps >= 0:
        raise ValueError(f"eps: expected a number of at least 0, got {eps}")
    if x.ndim != 4 or x.shape[-1] % 2:
        raise ValueError(f"x: expected shape (B, N, heads, D) with an even D, got {tuple(x.shape)}")
    _, tokens, _, depth = x.shape
    for name, table in (("cos", cos), ("sin", sin)):
        check_floating(name, table)
        check_device(name, table, x.device)
        if table.shape not in ((tokens, depth), (tokens, depth // 2)):
            raise ValueError(
                f"{name}: expected shape {(tokens, depth)} or {(tokens, depth // 2)}, got {tuple(table.shape)}"
            )
    if cos.shape != sin.shape:
        raise ValueError(f"sin: expected shape {tuple(cos.shape)} as cos has, got {tuple(sin.shape)}")
    if weight is not None:
        check_vector("weight", weight, (depth,), x)
    whole = weight is None or (depth & (depth - 1) == 0 and depth <= LARGEST)
    if not (whole and runs_kernel(x, cos, sin, weight)):
        return reference.rotate(x, cos, sin, weight, eps)
    return _OP(x, cos, sin, weight, eps)


def _empty(x: Tensor, *operands: Any) -> Tensor:
    return x.new_empty(x.shape)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    out = _empty(x)
    if x.numel() == 0:
        return out
    if launch := launcher("rotate", x):
        launch(out=out, x=x, cos=cos, sin=sin, weight=weight, eps=eps)
        return out
    return out.copy_(reference.rotate(x, cos, sin, weight, eps))


_OP = Op("rotate", "(Tensor x, Tensor cos, Tensor sin, Tensor? weight, float eps) -> Tensor", _rotate, _empty)
