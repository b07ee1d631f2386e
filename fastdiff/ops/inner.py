"""Inner products of the samples of two tensors, for rules of guidance."""

from typing import Any

from torch import Tensor

from .. import reference
from ..support import transforms
from .checks import check_device, check_floating, check_like, wants_gradient
from .dispatch import launcher
from .quick import quick
from .registry import Op


@quick(on_cpu=False)
def inner(a: Tensor, b: Tensor, *, guidance: Tensor | None = None, centred: bool = False) -> Tensor:
    """<a, a>, <a, p> and <p, p> of each sample, p = b + guidance (a - b), or b without guidance.

    p is formed in registers. The sums are taken in a fixed order, so that equal inputs give equal bits. If a gradient
    is wanted, the differentiable reference runs instead of a kernel.

    Args:
        a, b: (B, ...) tensors of one shape.
        guidance: a floating tensor of one number, on their device.
        centred: take a and p less their means over the sample, which gives n times variances and covariance.

    Returns: (B, 3) float32, or float64 for float64 data; 0 for samples of no elements.
    Raises: TypeError or ValueError that names the argument.
    Reference: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", for the merge of blocks.
    """
    check_floating("a", a)
    check_like("b", b, a)
    if isinstance(guidance, Tensor) and guidance.ndim == 0:
        guidance = guidance[None]
    if guidance is not None:
        check_floating("guidance", guidance)
        check_device("guidance", guidance, a.device)
        if guidance.numel() != 1:
            raise ValueError(f"guidance: expected one number, got shape {tuple(guidance.shape)}")
        guidance = guidance.reshape(1)
    if not isinstance(centred, bool):
        raise TypeError(f"centred: expected a bool, got {centred!r}")
    if wants_gradient(a, b, guidance) or transforms.active():
        return reference.inner(a, b, guidance, centred)
    return _OP(a, b, guidance, centred)


def _empty(a: Tensor, *operands: Any) -> Tensor:
    return a.new_empty((a.shape[0], 3), dtype=reference.work_dtype(a))


def _inner(a: Tensor, b: Tensor, guidance: Tensor | None, centred: bool) -> Tensor:
    out = _empty(a)
    if a.numel() == 0:
        return out.zero_()
    if launch := launcher("inner", a):
        launch(out=out, a=a, b=b, guidance=guidance, centred=centred)
        return out
    return out.copy_(reference.inner(a, b, guidance, centred))


_OP = Op("inner", "(Tensor a, Tensor b, Tensor? guidance, bool centred) -> Tensor", _inner, _empty)
