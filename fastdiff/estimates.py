"""The estimate of x_0 in the steps of a run: for a callback, and for a network that is told its own.

A self-conditioned network has the attribute `self_condition`, and is called with x_self_cond, (B, ...): x0hat of the
step before, or zeros in the first step (Chen et al. 2023, arXiv:2208.04202, algorithm 2).
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .denoiser import TOLD, Denoiser
from .process import Process
from .rows import Row, columns
from .steps import StepTable, denoise_rows

Callback = Callable[..., Tensor | None]


def wants_estimate(callback: Callback | None) -> bool:
    """Whether a callback is one of (k, level, x, x0hat) rather than of (k, level, x). TypeError if it is neither."""
    if callback is None:
        return False
    try:
        signature = inspect.signature(callback)
    except ValueError:  # a function of C
        return False
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    wanted = sum(p.kind in places and p.default is p.empty for p in signature.parameters.values()) > 3
    try:
        signature.bind(*range(4 if wanted else 3))
    except TypeError:
        raise TypeError(
            f"callback: expected a function of (k, level, x) or (k, level, x, x0hat), got one of {signature}"
        ) from None
    return wanted


def with_estimates(table: StepTable, process: Process, objective: str) -> StepTable:
    """The table whose steps leave x0hat in hist, for a callback that asks for it.

    Raises: ValueError for samplers that keep something else there.
    """
    if table.keep not in ("none", "x0hat"):
        raise ValueError("callback: expected one of (k, level, x) with this sampler, which keeps no estimate of x_0")
    return replace(estimating(table, process, objective), keep="x0hat" if table.keep == "x0hat" else "new x0hat")


def estimating(table: StepTable, process: Process, objective: str) -> StepTable:
    """The table whose rows all make x0hat, also those that do not use it."""
    rows = table.rows.clone()
    row = columns(rows)
    direct = is_direct(row)
    if bool(direct.any()):
        made = columns(_rows_at(table.levels[:-1][direct], process, objective))
        row.x0_from_x[direct], row.x0_from_pred[direct] = made.x0_from_x, made.x0_from_pred
    return replace(table, rows=rows)


def is_direct(row: Row) -> Tensor:
    """Which steps take no way through x0hat."""
    return (row.x0_from_x == 0) & (row.x0_from_pred == 0)


def _rows_at(times: Tensor, process: Process, objective: str) -> Tensor:
    """The rows that make x0hat at times (N,). Data, where an inversion starts, is its own estimate."""
    times, is_data = times.double(), times == 0
    rows = denoise_rows(process.at(times.where(~is_data, process.first)), objective)
    row = columns(rows)
    row.x0_from_x[is_data], row.x0_from_pred[is_data] = 1.0, 0.0
    return rows


def with_own_estimates(table: StepTable, denoiser: Denoiser, model_kwargs: dict[str, Any]) -> StepTable:
    """The table whose steps leave in hist what a self-conditioned network is told next, which costs no launch.

    The table itself if the network is told nothing, or if its sampler keeps something else or several estimates.
    """
    if not takes_own_estimate(denoiser, model_kwargs) or table.keep not in ("none", "x0hat") or table.slots > 1:
        return table
    made = with_estimates(table, denoiser.process, denoiser.objective)
    return made if own_estimate_rows(denoiser, made, model_kwargs) is None else table


def own_estimate_rows(denoiser: Denoiser, table: StepTable, model_kwargs: dict[str, Any]) -> Tensor | None:
    """The rows that make x0hat in the steps of a table, of guided predictions too, for the network to be told.

    Args:
        denoiser, table: of the run.
        model_kwargs: the model's further arguments. If they say what the network is told, that stays.

    Returns: as table.rows; None if the network is told nothing, or what the steps leave in hist.
    """
    if not takes_own_estimate(denoiser, model_kwargs):
        return None
    rows = _rows_at(table.levels[:-1], denoiser.process, denoiser.objective)
    own, kept = columns(rows), columns(table.rows)
    own.guidance.copy_(kept.guidance)
    if table.keep in ("x0hat", "new x0hat") and table.slots == 1 and "add" not in table.kinds:
        asked = torch.tensor([kind == "predict" for kind in table.kinds], device=table.rows.device)
        pairs = ((own.x0_from_x, kept.x0_from_x), (own.x0_from_pred, kept.x0_from_pred))
        if all(torch.equal(one[asked].float(), other[asked].float()) for one, other in pairs):
            return None
    return rows


def takes_own_estimate(denoiser: Denoiser, model_kwargs: dict[str, Any]) -> bool:
    """Whether the loop tells the network its own estimate."""
    return denoiser.self_conditioned and TOLD not in model_kwargs
