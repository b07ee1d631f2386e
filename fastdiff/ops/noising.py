"""Forward noising: x_t = alpha_t x_0 + sigma_t z."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..support import transforms
from .checks import (
    as_index,
    as_sample_ids,
    check_floating,
    check_levels,
    check_out,
    check_range,
    check_table,
    noise_source,
    wants_gradient,
)
from .dispatch import launcher
from .memory import in_huge_pages
from .noise import FORWARD
from .overlap import check_memory
from .quick import quick
from .registry import NOISE, Op


@quick(on_cpu=True)
def noising(
    x0: Tensor,
    t: int | Tensor,
    table: Tensor,
    *,
    seed: int | Tensor | None = None,
    sample_ids: Tensor | None = None,
    noise: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x_t = alpha_t x_0 + sigma_t z.

    Without `noise`, z is the noise of stream FORWARD at step t. Differentiable by x0 and noise; if a gradient
    by the table is wanted too, the differentiable reference runs instead of a kernel.

    Args:
        x0: (B, ...) data.
        t: the level in [0, len(table)), an int or an int64 tensor () or (B,). A level outside is a ValueError on the
            CPU. On a GPU a check would wait for the device; there the sample becomes NaN.
        table: (levels, 2) float32 rows (alpha, sigma).
        seed, sample_ids, noise, out: see `fastdiff.ops`.

    Returns: x_t, shaped and typed like x0.
    Raises: TypeError or ValueError that names the argument.
    Reference: Ho et al. 2020, arXiv:2006.11239, eq. 4.
    """
    check_floating("x0", x0)
    t = as_index("t", t, x0)
    check_table("table", table, 2, x0)
    ids = as_sample_ids(sample_ids, x0.shape[0], x0.device, strict=True)
    if out is not None:
        check_out(out, x0, x0, noise, table)
        check_memory(
            "out", out, {}, {"x0": x0, "t": t, "table": table, "seed": seed, "sample_ids": ids, "noise": noise}
        )
    seed = noise_source(x0, seed, noise)
    if transforms.active() or wants_gradient(table):
        check_levels("t", t, table.shape[0], ids)
        value = reference.noising(x0, t, table, seed, ids, noise, FORWARD)
        return value if out is None else transforms.overwrite("out", out, value)
    if out is not None:
        _OUT(out, x0, t, table, seed, ids, noise, FORWARD)
        return out
    return _OP(x0, t, table, seed, ids, noise, FORWARD)


def _noising(x0: Tensor, *operands: Any) -> Tensor:
    out = in_huge_pages(torch.empty_like(x0))
    _noising_out(out, x0, *operands)
    return out


def _noising_out(
    out: Tensor, x0: Tensor, t: Tensor, table: Tensor,
    seed: Tensor | None, ids: Tensor | None, noise: Tensor | None, stream: int,
) -> None:  # fmt: skip
    if x0.numel() == 0:
        return
    check_range("t", t, table.shape[0])
    check_range("sample_ids", ids, 2**32)
    if launch := launcher("noising", x0):
        launch(out=out, x0=x0, t=t, table=table, seed=seed, ids=ids, noise=noise, stream=stream)
    else:
        out.copy_(reference.noising(x0, t, table, seed, ids, noise, stream))


class _Noising(torch.autograd.Function):
    """d x_t / d x_0 = alpha_t, d x_t / d z = sigma_t."""

    @staticmethod
    def forward(ctx: Any, x0: Tensor, noise: Tensor | None, results: Any, args: Any) -> Tensor:
        ctx.save_for_backward(*args[1:3])
        ctx.dtypes = x0.dtype, None if noise is None else noise.dtype
        return results

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        t, table = ctx.saved_tensors
        alpha, sigma = reference.coefficients(table, t, grad)
        by_x0 = (alpha * grad).to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
        by_noise = (sigma * grad).to(ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
        return by_x0, by_noise, None, None


_OPERANDS = f"Tensor x0, Tensor t, Tensor table, {NOISE}, Tensor? noise, int stream"
_OP = Op("noising", f"({_OPERANDS}) -> Tensor", _noising, lambda x0, *operands: torch.empty_like(x0))
_OP.differentiate(_Noising, 0, 5)
_OUT = Op("noising_out", f"(Tensor(a!) out, {_OPERANDS}) -> ()", _noising_out)
