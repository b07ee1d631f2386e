"""The workloads that `workloads.OPERATIONS` lacks, so that a report has every kernel. Each has the same three rows.

Two are written out: their noise is drawn in one row and read in another.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff import ops, reference

from .calls import CALLS, MEASURED, Source
from .workloads import BOUND, LOSS, SEED, Row, Rows, agree, few, inputs


def _rows(row: Callable[..., Row], fused: Callable[..., Any], eager: Callable[..., Any]) -> Rows:
    functions = {"fused": fused, "reference": eager, "compile": torch.compile(eager)}
    return {name: row(name, function) for name, function in functions.items()}


def normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Rows:
    """Noise by itself. The library's is checked element by element, the others' by shape and standard deviation."""
    seed, step = torch.full((1,), SEED, device=device), torch.zeros(1, dtype=torch.int64, device=device)

    def fused() -> Tensor:
        return ops.normal(shape, seed, dtype=dtype, device=device)

    def eager() -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    def row(name: str, function: Callable[..., Tensor]) -> Row:
        def check() -> None:
            z = function()
            part, std = few(z), z.double().std().item()
            if name == "fused":
                want = reference.normal(part.shape, seed, None, step, ops.PRIOR, torch.float64)
                agree("normal fused", [part], [want], BOUND[dtype])
            elif not (z.shape == shape and abs(std - 1) < 5 / z.numel() ** 0.5 + BOUND[dtype]):
                raise RuntimeError(f"normal {name}: standard deviation {std:.3f}, shape {tuple(z.shape)}")

        return Row(function, check)

    return _rows(row, fused, eager)


def loss_without_gradient(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Rows:
    """The eps loss alone. The library draws the noise again; eager PyTorch reads it."""
    noise, pred, t = inputs(shape, dtype, device)
    table, seed = LOSS.to(device), torch.full((1,), SEED, device=device)
    n = len(few(pred))

    def fused(pred: Tensor = pred, t: Tensor = t, noise: Tensor = noise) -> Tensor:
        return ops.loss(pred, t, table, seed=seed)

    def eager(pred: Tensor = pred, t: Tensor = t, noise: Tensor = noise) -> Tensor:
        return F.mse_loss(pred.float(), noise.float())

    def row(name: str, function: Callable[..., Tensor]) -> Row:
        def check() -> None:
            z = noise[:n].double()
            if name == "fused":
                z = reference.normal(z.shape, seed, None, t[:n], ops.FORWARD, torch.float64)
            want = (pred[:n].double() - z).square().mean()
            agree(f"loss_without_gradient {name}", [function(pred[:n], t[:n], noise[:n])], [want], BOUND[dtype])

        return Row(function, check)

    return _rows(row, fused, eager)


def measured(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Rows:
    """A row of `MEASURED`, with gradients if they have a kernel."""
    what = MEASURED[name]
    make, own = CALLS[what.call], what.shape(shape)

    def row(name_of_row: str, function: Callable[..., Any]) -> Row:
        def check() -> None:
            part = make(Source((len(few(torch.empty(own, device="meta"))), *own[1:]), dtype, device))
            got, want = part.whole(function)(), part.to(torch.float64).whole(part.op)()
            got, want = ((t,) if isinstance(t, Tensor) else t for t in (got, want))
            agree(f"{name} {name_of_row}", got, want, what.roundings * max(BOUND[t.dtype] for t in got))

        return Row(call.whole(function), check)

    call = make(Source(own, dtype, device))
    assert call.eager is not None
    return _rows(row, call.op, call.eager)


KERNELS: dict[str, Callable[[tuple[int, ...], torch.dtype, torch.device], Rows]] = {
    "normal": normal,
    "loss_without_gradient": loss_without_gradient,
    **{name: functools.partial(measured, name) for name in MEASURED},
}
# The fewest tensors to read and write: z; pred; those of MEASURED.
KERNEL_TENSORS = {"normal": 1, "loss_without_gradient": 1} | {name: what.tensors for name, what in MEASURED.items()}
