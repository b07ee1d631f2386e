"""Normal noise as a function of its number: `normal`."""

import torch
from torch import Tensor

from .. import reference
from ..support import transforms
from ..support.scalars import integer
from .checks import (
    FLOATING,
    as_index,
    as_sample_ids,
    as_seed,
    as_shape,
    check_floating,
    check_levels,
    check_range,
    type_names,
)
from .dispatch import launcher
from .memory import in_huge_pages
from .overlap import check_memory
from .quick import quick
from .registry import Op

# Streams keep draws with the same seed, sample and step apart.
PRIOR, FORWARD, REVERSE = 0, 1, 2


@quick(on_cpu=True)
def normal(
    shape: tuple[int, ...] | torch.Size,
    seed: int | Tensor | None = None,
    *,
    sample_ids: Tensor | None = None,
    step: int | Tensor = 0,
    stream: int = PRIOR,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Standard normal noise z(seed, stream, sample, step, element).

    The numbers of a sample depend on its id and on the element's place in it. They do not depend on the batch, the
    device or the memory layout.

    Args:
        shape: (B, ...), at least one dimension.
        seed, sample_ids: see `fastdiff.ops`.
        step: an int or an int64 tensor () or (B,).
        stream: a number in [0, 2^32) that keeps draws apart: PRIOR, FORWARD, REVERSE or your own.
        dtype, device: of the result.
        out: the tensor to fill; then its type and device count.

    Returns: a tensor of that shape.
    Raises: TypeError or ValueError that names the argument.
    Reference: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox4x32-10); Box & Muller 1958.
    """
    if dtype not in FLOATING:
        raise TypeError(f"dtype: expected one of {type_names(FLOATING)}, got {dtype}")
    shape = as_shape(shape)
    if (number := integer(stream)) is None or not 0 <= number < 2**32:
        raise ValueError(f"stream: expected a number in [0, 2^32), got {stream}")
    given = out is not None
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=device)
    else:
        check_floating("out", out)
        if out.shape != shape or out.requires_grad:
            raise ValueError(f"out: expected shape {shape} without gradient, got {tuple(out.shape)}")
    step = as_index("step", step, out)
    ids = as_sample_ids(sample_ids, out.shape[0], out.device, strict=True)
    if given:
        check_memory("out", out, {}, {"seed": seed, "sample_ids": ids, "step": step})
    seed = as_seed(seed, out.device)
    if transforms.active():
        check_levels("step", step, 2**63, ids)
        value = reference.normal(shape, seed, ids, step, number, reference.work_dtype(out)).to(out.dtype)
        return transforms.overwrite("out", out, value) if given else value
    _OP(out, seed, ids, step, number)
    return out


def _normal_(out: Tensor, seed: Tensor, ids: Tensor | None, step: Tensor, stream: int) -> None:
    check_range("sample_ids", ids, 2**32)
    if out.numel() == 0:
        return
    if launch := launcher("normal_", in_huge_pages(out)):
        launch(out=out, seed=seed, ids=ids, step=step, stream=stream)
    else:
        out.copy_(reference.normal(out.shape, seed, ids, step, stream, reference.work_dtype(out)))


_OP = Op("normal_", "(Tensor(a!) out, Tensor seed, Tensor? ids, Tensor step, int stream) -> ()", _normal_)
