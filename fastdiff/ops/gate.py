"""Gated activations."""

from torch import Tensor

from .. import reference
from .checks import check_floating, runs_kernel
from .dispatch import launcher
from .quick import quick
from .registry import Op


@quick(on_cpu=False)
def gated_gelu(x: Tensor) -> Tensor:
    """hidden gelu(gate), of the first and the second half of the last dimension.

        gelu(g) = g Phi(g) = g (1 + erf(g / sqrt(2))) / 2

    It is computed in float32 and rounded once. If a gradient is wanted, and within torch.compile, which fuses it, plain
    PyTorch runs instead of a kernel.

    Args:
        x: (..., 2 C).

    Returns: (..., C), typed like x.
    Raises: TypeError or ValueError that names the argument.
    Reference: Shazeer 2020, arXiv:2002.05202, eq. 6: GEGLU without its projection.
    """
    check_floating("x", x)
    if x.shape[-1] % 2:
        raise ValueError(f"x: expected a last dimension of an even size, got shape {tuple(x.shape)}")
    if not runs_kernel(x):
        return reference.gated_gelu(x)
    return _OP(x)


def _empty(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _gated_gelu(x: Tensor) -> Tensor:
    out = _empty(x)
    if x.numel() == 0:
        return out
    if launch := launcher("gated_gelu", x):
        launch(out=out, x=x)
        return out
    return out.copy_(reference.gated_gelu(x))


_OP = Op("gated_gelu", "(Tensor x) -> Tensor", _gated_gelu, _empty)
