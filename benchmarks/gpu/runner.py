"""The one loop of the kit: every row of the stages once, within a budget of seconds."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from .results import Results
from .rows import Row, Setup, Stage
from .worker import Worker


def run(
    stages: Sequence[Stage], setup: Setup, budget: float, results: Results, say: Callable[[str], object] = print
) -> list[dict[str, Any]]:
    """Measure what `results` has not, and write each row as soon as it is there. Returns the outcomes of this run.

    A row whose time limit is longer than what is left of the budget, or of its stage, is recorded as not run.
    """
    end = time.monotonic() + budget
    outcomes = []
    for stage in stages:
        last = end if setup.toy else min(end, time.monotonic() + stage.seconds)
        try:
            rows = stage.rows(setup)
        except Exception as error:  # something that it imports is not there: the other stages go on
            outcomes.append({"error": f"the stage has no rows: {type(error).__name__}: {error}"})
            say(f"{stage.name}: {_short(outcomes[-1])}")
            continue
        with Worker(stage, setup) as worker:
            for row in rows:
                key = f"{stage.name} / {row.name}"
                if results.has(key):
                    continue
                left = last - time.monotonic()
                outcome = worker.start(left) if _limit(row, left, setup) else None
                left = last - time.monotonic()
                limit = _limit(row, left, setup)
                if outcome is None and limit:
                    outcome = worker.run(row.name, limit)
                elif outcome is None:
                    reason = f"its limit is {row.seconds:.0f} s and {max(0, left):.0f} s were left"
                    outcome = {"not_run": reason}
                results.put(key, outcome)
                outcomes.append(outcome)
                say(f"{key}: {_short(outcome)}")
    return outcomes


def _limit(row: Row, left: float, setup: Setup) -> float | None:
    """Seconds that a row may take, or None if too few are left.

    A rehearsal shares its processors with who knows what: all that is left is its row's.
    """
    if setup.toy:
        return max(row.seconds, left) if left > 0 else None
    return row.seconds if row.seconds <= left else None


def _short(outcome: dict[str, Any]) -> str:
    """One line for the eye."""
    if "figures" not in outcome:
        return ", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in outcome.items() if key != "seconds")
    return str({k: round(v, 4) if isinstance(v, float) else v for k, v in outcome["figures"].items()})
