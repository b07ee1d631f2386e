"""Rotary position embedding of queries and keys."""

import torch
from torch import Tensor

from .. import reference
from ..support import transforms
from .checks import check_device, check_floating, wants_gradient
from .dispatch import backend_of, launcher
from .quick import quick
from .registry import Op


@quick(on_cpu=False)
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x with each pair of neighbours in a head turned by an angle of its token.

        (a, b)  ->  (a cos - b sin, b cos + a sin)

    It is computed in float32 and rounded once. If a gradient is wanted, and within torch.compile, which fuses it, plain
    PyTorch runs instead of a kernel.

    Args:
        x: (B, N, heads, D), D even.
        cos, sin: (N, D), of each element of a head; or (N, D / 2), of each pair.

    Returns: a tensor shaped and typed like x.
    Raises: TypeError or ValueError that names the argument.
    Reference: Su et al. 2021, arXiv:2104.09864, eq. 34.
    """
    check_floating("x", x)
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
    if wants_gradient(x, cos, sin) or not is_fused(x):
        return reference.rotate(x, cos, sin)
    return _OP(x, cos, sin)


def is_fused(x: Tensor) -> bool:
    """Whether the rotation of tensors like x is a kernel of its own, if no gradient is wanted."""
    return backend_of(x) == "triton" and not transforms.active() and not torch.compiler.is_compiling()


def _empty(x: Tensor, *tables: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = _empty(x)
    if x.numel() == 0:
        return out
    if launch := launcher("rotate", x):
        launch(out=out, x=x, cos=cos, sin=sin)
        return out
    return out.copy_(reference.rotate(x, cos, sin))


_OP = Op("rotate", "(Tensor x, Tensor cos, Tensor sin) -> Tensor", _rotate, _empty)
