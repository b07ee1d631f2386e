"""The step table, and the columns and checks that samplers share.

A sampler makes the columns of its rows by name (see fastdiff.rows) and hands them to `make_table`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..objective import conversion_rows, needs_signal, x0_rows
from ..rows import LOG_ZERO, columns, make_rows
from ..schedule import NoiseSchedule

# Beyond this gain an unclipped x_0 from a prediction of the noise has no digit left in float32.
MAX_GAIN = 1e5


@dataclass(frozen=True, eq=False)
class StepTable:
    """The rows of n steps: step k asks the model at levels[k] and leaves the state at levels[k + 1].

    Args:
        levels: (n + 1,) int64, or times of an SDE, float64.
        rows: (n, WIDTH or WIDE) float64, see fastdiff.rows.
        noisy: whether any step adds noise.
        keep: what a step leaves in hist for later ones, as in ops.update.
        slots: how many of them hist holds, 1 to 3.
        start: standard deviation of the state to start from.
        kinds: of each step. "predict" is one call of the model and one update. "add" scales the state and adds noise,
            without the model. "correct" is a Langevin step sized by norms (Song et al. 2021b, algorithms 4 and 5): its
            row gives the score, and its `noise` is 2 alpha snr^2.
        learned: whether the model says how much noise, between `noise` and `noise_high`.

    Raises: ValueError if a row is beyond float32.
    """

    levels: Tensor
    rows: Tensor
    noisy: bool
    keep: str = "none"
    start: float = 1.0
    kinds: Sequence[str] = ()
    learned: bool = False
    slots: int = 1

    def __len__(self) -> int:
        return len(self.rows)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", tuple(self.kinds) or ("predict",) * len(self))
        if not bool(self.rows.float().isfinite().all()):
            step = int((~self.rows.float().isfinite()).any(1).nonzero()[0])
            raise ValueError(
                f"steps: the step from level {self.levels[step].item():g} to {self.levels[step + 1].item():g} "
                f"has coefficients beyond float32: {self.rows[step].tolist()}"
            )


def make_table(
    schedule: NoiseSchedule,
    levels: Tensor,
    rows: Tensor | None = None,
    *,
    keep: str = "none",
    slots: int = 1,
    kinds: Sequence[str] = (),
    learned: bool = False,
    **values: Tensor | float,
) -> StepTable:
    """A StepTable that visits the levels (n + 1,) of a schedule in turn.

    Args:
        rows: (n, WIDTH or WIDE); or None, to make them of `values`, columns by name (n,), with guidance 1.
        keep, slots, kinds, learned: as in StepTable.

    Raises: TypeError or ValueError that names a column, if there is none of that name or it has another length.
    """
    if rows is None:
        for name, value in values.items():
            if isinstance(value, Tensor) and value.numel() != 1 and value.shape != levels[:-1].shape:
                got = tuple(value.shape)
                raise ValueError(f"{name}: expected a number for each of {len(levels) - 1} steps, got {got}")
        rows = make_rows(levels[:-1], torch.float64, guidance=1.0, **values)
    noisy = bool((columns(rows).noise > (LOG_ZERO if learned else 0.0)).any())
    start = schedule.prior_std(int(levels[0]))
    return StepTable(schedule.times(levels), rows, noisy, keep, start, kinds, learned, slots)


def x0_columns(schedule: NoiseSchedule, t: Tensor, s: Tensor, objective: str, clip: float | None) -> dict[str, Any]:
    """The columns of x0hat = x0_from_x x + x0_from_pred pred, for steps from the levels t to s.

    Raises: ValueError if the prediction does not determine x_0, or loses it unclipped to rounding.
    """
    check_signal(schedule, t, objective)
    if clip is None and needs_signal(objective):
        gain = (schedule.log_alpha[s] - schedule.log_alpha[t]).exp()
        if bool((gain > MAX_GAIN).any()):
            k = int((gain > MAX_GAIN).nonzero()[0])
            raise ValueError(
                f"objective: {objective!r} without clip loses x_0 from level {int(t[k])} to {int(s[k])}, where "
                f"alpha_s / alpha_t = {gain[k].item():.3g} (at most {MAX_GAIN:g}); set clip, or use 'x0' or 'v'"
            )
    from_x, from_pred = x0_rows(schedule, objective)
    return {"x0_from_x": from_x[t], "x0_from_pred": from_pred[t]}


def score_columns(
    schedule: NoiseSchedule, t: Tensor, s: Tensor, objective: str, clip: float | None, gain: Tensor | float = 1.0
) -> dict[str, Any]:
    """The columns of gain times the score at the levels t: straight from the prediction, or if clipped through x0hat,
    score = (alpha x0hat - x) / sigma^2.

    Raises: ValueError as x0_columns.
    """
    if clip is None:
        check_signal(schedule, t, objective)
        from_x, from_pred = conversion_rows(schedule, objective, "score")
        return {"from_x": gain * from_x[t], "from_pred": gain * from_pred[t]}
    scaled = gain / schedule.sigma[t] ** 2
    through_x0 = x0_columns(schedule, t, s, objective, clip)
    return {**through_x0, "from_x0": scaled * schedule.alpha[t], "from_x": -scaled}


def denoise_rows(schedule: NoiseSchedule, objective: str) -> Tensor:
    """Rows (levels, WIDTH) that turn x_t into x0hat, one for each level; NaN where the prediction leaves x_0 open."""
    from_x, from_pred = x0_rows(schedule, objective)
    rows = make_rows(from_x, x0_from_x=from_x, x0_from_pred=from_pred, from_x0=1.0, guidance=1.0)
    known = rows.float().isfinite().all(1, keepdim=True)
    return torch.where(known, rows, math.nan)


def check_signal(schedule: NoiseSchedule, t: Tensor, objective: str) -> None:
    """ValueError if alpha is 0 in float32 at one of the levels t and the objective leaves x_0 open there."""
    if not needs_signal(objective):
        return
    lost = schedule.alpha[t].float() < torch.finfo(torch.float32).tiny
    if bool(lost.any()):
        level = int(t[lost].min())
        raise ValueError(
            f"objective: {objective!r} cannot determine x_0 at level {level}, where alpha = "
            f"{schedule.alpha[level].item():.3g}; use 'x0' or 'v', or a schedule that keeps some signal"
        )


def check_finite_ratio(sampler: str, schedule: NoiseSchedule, t: Tensor) -> None:
    """ValueError if sigma / alpha is infinite at one of the levels t."""
    if bool((schedule.alpha[t] == 0).any()):
        raise ValueError(
            f"sampler: {sampler!r} expected a finite sigma / alpha, got alpha = 0 at level "
            f"{int(t[schedule.alpha[t] == 0].max())}; start below it, or use 'ddpm', 'ddim' or 'dpm++2m'"
        )


def check_learned(table: StepTable, learns: bool) -> None:
    """ValueError if the table leaves its noise to a model that says nothing of it."""
    if table.learned and not learns:
        raise ValueError("variance: expected 'posterior' or 'beta' for a model that learns none, got 'learned'")


def check_decreasing(sampler: str, levels: Tensor) -> None:
    """ValueError unless each of the levels has less noise than the one before."""
    if bool((levels.diff() >= 0).any()):
        raise ValueError(f"sampler: {sampler!r} expected decreasing levels, got {levels.tolist()}")
