"""The one loop of the kit: every row of the stages once, within a budget of seconds."""

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

from .results import Results
from .rows import Row, Setup, Stage
from .worker import START, Worker


def run(
    stages: Sequence[Stage], setup: Setup, budget: float, results: Results, say: Callable[[str], object] = print
) -> list[dict[str, Any]]:
    """Measure what `results` has not, and write each row as soon as it is there. Returns the outcomes of this run.

    A row is recorded as not run if less than half of its limit is left of the budget, or of its stage; or if what was
    left was not enough.
    """
    end = time.monotonic() + budget
    outcomes: list[dict[str, Any]] = []
    listed = []
    with contextlib.ExitStack() as stack:
        for stage in stages:
            try:
                rows = [row for row in stage.rows(setup) if not results.has(f"{stage.name} / {row.name}")]
            except Exception as error:  # something that it imports is not there: the other stages go on
                outcomes.append({"error": f"the stage has no rows: {type(error).__name__}: {error}"})
                say(f"{stage.name}: {_short(outcomes[-1])}")
            else:
                worker = stack.enter_context(Worker(stage, setup))  # for all turns: to start one takes seconds
                turns = {row.turn for row in rows}
                listed += [(turn, stage, worker, [row for row in rows if row.turn == turn]) for turn in turns]
        for _, stage, worker, rows in sorted(listed, key=lambda part: part[0]):
            last = end if setup.toy else min(end, time.monotonic() + stage.seconds)
            for row in rows:
                key, outcome = f"{stage.name} / {row.name}", _outcome(worker, row, last, setup)
                results.put(key, outcome)
                outcomes.append(outcome)
                say(f"{key}: {_short(outcome)}")
    return outcomes


def _outcome(worker: Worker, row: Row, last: float, setup: Setup) -> dict[str, Any]:
    """What a worker makes of a row until the time `last`.

    A rehearsal shares its processors with who knows what: all that is left is its row's.
    """
    needed = 0.0 if setup.toy else row.seconds / 2
    for step, limit in ((worker.start, START), (functools.partial(worker.run, row.name), row.seconds)):
        left = last - time.monotonic()
        if left <= 0 or left < needed:
            return {"not_run": f"its limit is {row.seconds:.0f} s and {max(0, left):.0f} s were left"}
        try:
            outcome = step(left if setup.toy else min(left, limit))
        except TimeoutError as error:
            if left < limit:
                return {"not_run": f"{left:.0f} s were left and not enough"}
            return {"error": str(error)}
        if outcome:
            return outcome
    raise AssertionError("a row has an outcome")


def _short(outcome: dict[str, Any]) -> str:
    """One line for the eye."""
    if "figures" not in outcome:
        return ", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in outcome.items() if key != "seconds")
    return str({k: round(v, 4) if isinstance(v, float) else v for k, v in outcome["figures"].items()})
