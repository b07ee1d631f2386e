"""Samplers as step tables: a sampler is a function from a schedule and the levels to visit to the rows of its steps.

    x0hat = clip(x0_from_x x + x0_from_pred pred)
    x'    = from_x0 x0hat + from_x x + from_pred pred + noise z + from_hist hist

One loop, fastdiff.sampling, runs every table. All samplers take every objective, and chains as well as SDEs:

    through_x0      ancestral, ddim, euler_ancestral, heun; ddim_inversion from data to noise
    multistep       dpm_solver_pp_2m, dpm_solver_pp_2m_sde, dpm_solver_pp_3m_sde, unipc
    adams           deis, lms, plms
    singlestep      dpm2, dpm2_ancestral, dpm_solver_pp_2s, dpm_solver_pp_2s_ancestral, dpm_solver_pp_sde
    consistency     consistency, lcm, tcd
    through_score   euler_maruyama, reverse_diffusion, probability_flow, predictor_corrector, annealed_langevin

Their common arguments:

- schedule: the noise levels.
- levels: (n + 1,) int64, decreasing, to visit in turn; 0 is data. `make_steps` counts them, and adds the middles that
  the samplers of singlestep need: t, m, s, m, ...
- objective: what the model predicts, a name of fastdiff.objective.OBJECTIVES.
- clip: the estimate of x_0 is kept in [-clip, clip]; None leaves it free.
- eta: of those with noise; 0 is the ODE, 1 has all the noise of the reverse SDE.
- denoise: of through_score; whether the step to level 0 gives the estimate of x_0. Else it is left out.

All raise ValueError if the prediction does not determine x_0, or the score, at a level.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from ..grids import with_middles
from ..objective import OBJECTIVES
from ..process import Grid, Process
from ..rows import LOG_ZERO, columns
from ..schedule import NoiseSchedule
from ..support.scalars import as_number, integer
from .adams import deis, lms, plms
from .consistency import consistency, lcm, tcd
from .multistep import dpm_solver_pp_2m, dpm_solver_pp_2m_sde, dpm_solver_pp_3m_sde, unipc
from .names import OTHER_NAMES as OTHER_NAMES
from .names import name_to_use
from .singlestep import (
    dpm2,
    dpm2_ancestral,
    dpm_solver_pp_2s,
    dpm_solver_pp_2s_ancestral,
    dpm_solver_pp_sde,
    middles,
)
from .table import (
    MAX_GAIN,
    StepTable,
    check_decreasing,
    check_finite_ratio,
    check_learned,
    check_signal,
    denoise_rows,
    make_table,
    score_columns,
    x0_columns,
)
from .through_score import (
    PREDICTORS,
    annealed_langevin,
    euler_maruyama,
    predictor_corrector,
    probability_flow,
    reverse_diffusion,
)
from .through_x0 import VARIANCES, ancestral, ddim, ddim_inversion, euler_ancestral, heun

__all__ = [
    "LOG_ZERO",
    "MAX_GAIN",
    "PREDICTORS",
    "SAMPLERS",
    "VARIANCES",
    "Sampler",
    "StepTable",
    "ancestral",
    "annealed_langevin",
    "check_learned",
    "check_signal",
    "consistency",
    "ddim",
    "ddim_inversion",
    "decreasing",
    "deis",
    "denoise_rows",
    "dpm2",
    "dpm2_ancestral",
    "dpm_solver_pp_2m",
    "dpm_solver_pp_2m_sde",
    "dpm_solver_pp_2s",
    "dpm_solver_pp_2s_ancestral",
    "dpm_solver_pp_3m_sde",
    "dpm_solver_pp_sde",
    "euler_ancestral",
    "euler_maruyama",
    "heun",
    "lcm",
    "lms",
    "make_steps",
    "make_table",
    "part_of",
    "plms",
    "predictor_corrector",
    "probability_flow",
    "reverse_diffusion",
    "score_columns",
    "tcd",
    "unipc",
    "x0_columns",
]

Sampler = Callable[..., StepTable]
SAMPLERS: dict[str, Sampler] = {
    "ddpm": ancestral,
    "ddim": ddim,
    "euler_ancestral": euler_ancestral,
    "dpm++2m": dpm_solver_pp_2m,
    "dpm++2m_sde": dpm_solver_pp_2m_sde,
    "dpm++3m_sde": dpm_solver_pp_3m_sde,
    "unipc": unipc,
    "deis": deis,
    "lms": lms,
    "plms": plms,
    "heun": heun,
    "dpm2": dpm2,
    "dpm2_ancestral": dpm2_ancestral,
    "dpm++2s": dpm_solver_pp_2s,
    "dpm++2s_ancestral": dpm_solver_pp_2s_ancestral,
    "dpm++sde": dpm_solver_pp_sde,
    "consistency": consistency,
    "lcm": lcm,
    "tcd": tcd,
    "euler_maruyama": euler_maruyama,
    "reverse_diffusion": reverse_diffusion,
    "probability_flow": probability_flow,
    "predictor_corrector": predictor_corrector,
    "annealed_langevin": annealed_langevin,
}
# Those that look between levels: the eta by which they choose where, unless it is given; None if they go by none.
LOOKS_BETWEEN: dict[Any, float | None] = {
    dpm2: 0.0,
    dpm2_ancestral: 1.0,
    dpm_solver_pp_2s: 0.0,
    dpm_solver_pp_2s_ancestral: 1.0,
    dpm_solver_pp_sde: None,
}
# Those that may go to a level of more noise, as the levels of churn do.
RISING: tuple[Sampler, ...] = (heun, dpm_solver_pp_2m, consistency, lcm, tcd)


def make_steps(
    process: Process,
    sampler: str | Sampler,
    steps: int | Iterable[float] | Grid | None,
    objective: str,
    clip: float | None,
    **options: Any,
) -> StepTable:
    """The table of a sampler.

    Args:
        process: where the levels come from.
        sampler: a name of SAMPLERS, or such a function; functools.partial sets its options.
        steps: how many (the process's own number if None), the decreasing levels or times to visit, or a grid of the
            process. "heun" counts the levels of Process.karras, "annealed_langevin" the steps at each level.
        objective: what the model predicts.
        clip: x0hat is kept in [-clip, clip]; None leaves it free.
        options: of the sampler.

    Raises: ValueError or TypeError for an unknown sampler or objective, and what the sampler raises.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {objective!r}")
    sampler = _by_name(sampler)
    function, keywords = _unwrapped(sampler)
    given = {**keywords, **options}
    schedule, levels = _grid(process, function, steps)
    name = next((name for name, known in SAMPLERS.items() if known is function), None)
    if name and bool((levels.diff() > 0).any()) and not any(function is one for one in RISING):
        check_decreasing(name, levels)
    if name and any(function is one for one in LOOKS_BETWEEN):
        check_signal(schedule, levels[:-1], objective)
        check_finite_ratio(name, schedule, levels[:-1])
        eta = LOOKS_BETWEEN[function]
        between = middles(schedule, levels, 0.0 if eta is None else as_number("eta", given.get("eta", eta)))
        schedule, levels = with_middles(process, (schedule, levels), between)
    if function is probability_flow and "denoise" not in given:
        small = len(levels) > 2 and bool(schedule.times(levels[-2]) <= process.first * (1 + 1e-9))
        options["denoise"] = int(levels[-1]) == 0 and not small
    table = sampler(schedule, levels, objective, clip, **options)
    if not isinstance(table, StepTable):
        raise TypeError(f"sampler: expected a function that returns a StepTable, got {type(table).__name__}")
    left_out = int(levels[-1]) == 0 and bool(table.levels[-1] != 0)  # the step to data
    return _ending_at_data(table, process) if left_out else table


def _ending_at_data(table: StepTable, process: Process) -> StepTable:
    """The table whose last state counts as data: the last step also undoes the scale of states."""
    rows, levels = table.rows.clone(), table.levels.clone()
    if process.first_scale != 1:
        last, alpha = columns(rows[-1]), process.at(levels[-1:]).alpha[0]
        for column in (last.from_x0, last.from_x, last.from_pred, last.noise, last.from_hist):
            column.div_(alpha)
    levels[-1] = 0
    return replace(table, rows=rows, levels=levels)


def part_of(
    process: Process,
    sampler: str | Sampler,
    steps: int | Iterable[float] | Grid | None,
    share: float = 1.0,
    stop_at: float | None = None,
) -> Grid:
    """A part of the levels that a sampler visits, see make_steps.

    Args:
        share: of the steps, those at the end: the last round(share n) of n, at least one.
        stop_at: a level or time. The first visited one that is not above it is the last.

    Raises: ValueError unless stop_at is below the first of the levels and not below the last.
    """
    schedule, levels = _grid(process, _unwrapped(_by_name(sampler))[0], steps)
    n = len(levels) - 1
    levels = levels[n - max(1, round(share * n)) :]
    if stop_at is None:
        return schedule, levels
    times = schedule.times(levels)
    reached = (times <= as_number("stop_at", stop_at)).nonzero().flatten().tolist()
    if not reached or reached[0] == 0:
        raise ValueError(
            f"stop_at: expected a level from {times[-1].item():g} to below {times[0].item():g}, got {stop_at}"
        )
    return schedule, levels[: reached[0] + 1]


def decreasing(process: Process, steps: int | Iterable[float] | Grid | None) -> Grid:
    """The levels of `steps`, see make_steps, for what cannot go up on the way. ValueError if they do not decrease."""
    schedule, levels = _grid(process, ddim, steps)
    if bool((levels.diff() >= 0).any()):
        raise ValueError(f"steps: expected decreasing levels, got {schedule.times(levels).tolist()}")
    return schedule, levels


def _by_name(sampler: str | Sampler) -> Sampler:
    """A sampler by its name, or as it is. ValueError or TypeError for anything else."""
    if isinstance(sampler, str):
        if sampler not in SAMPLERS:
            raise ValueError(
                f"sampler: expected one of {', '.join(SAMPLERS)} or a function, got {sampler!r}"
                + name_to_use(sampler, SAMPLERS)
            )
        return SAMPLERS[sampler]
    if not callable(sampler):
        raise TypeError(f"sampler: expected a name or a function, got {type(sampler).__name__}")
    return sampler


def _unwrapped(sampler: Any) -> tuple[Any, dict[str, Any]]:
    """(the function that functools.partial wraps, the options that it sets)."""
    given: dict[str, Any] = {}
    while isinstance(sampler, functools.partial):
        given = {**sampler.keywords, **given}
        sampler = sampler.func
    return sampler, given


def _grid(process: Process, sampler: Sampler, steps: int | Iterable[float] | Grid | None) -> Grid:
    """The levels to visit: given as a grid, or counted as the sampler counts its steps."""
    if isinstance(steps, tuple) and len(steps) == 2 and isinstance(steps[0], NoiseSchedule):
        return steps
    number = integer(steps)
    if steps is None or number is not None:
        if sampler is heun:
            return process.karras(number)
        if sampler is annealed_langevin:
            return process.ladder(number)
    return process.grid(steps)
