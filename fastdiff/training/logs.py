"""What a run says: what it trains, how long that will take, and a bar of its steps."""

import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch import Tensor

from fastdiff.files import need

# The bar's numbers are read from the device every so many steps, since each reading waits for it.
EVERY = 10
# The bar is drawn again after so many seconds.
BAR_SECONDS = 0.5
# The time is estimated from so many seconds, or EVERY steps, after as many that warm up.
PATIENCE = 5.0
# Items that cannot be read and are named one by one.
NAMED = 100


class Progress:
    """A bar of steps on stderr, and lines about the run on stdout.

    An output that is closed or full must not end a run: `lost` then holds the error, and nothing more is written.

    Args:
        start, steps: the first and the last step.
        batch_size: images a step.
    """

    def __init__(self, start: int, steps: int, batch_size: int) -> None:
        self.start, self.steps, self.batch_size = start, steps, batch_size
        self.lost: OSError | None = None
        self._marks: list[tuple[float, int]] = []  # (when, step): after the first step, and after the warm-up
        self._estimated = False
        self._tqdm = need("tqdm").tqdm
        self._bar = self._tqdm(total=steps, initial=start, unit="step", mininterval=BAR_SECONDS)

    def say(self, line: str) -> None:
        """Print a line, above the bar."""

        def write() -> None:
            self._tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

        self._show(write)

    def left_out(self, name: str, why: str, count: int) -> None:
        """Warn that an item of the data cannot be read, the `count`-th one."""
        if is_named(count):
            self.say(warning(name, why, count))

    def advance(self, step: int, loss: Tensor) -> None:
        """Show that `step` is done. loss: (), the mean of the last losses."""
        if step % EVERY == 0:
            rate = self.batch_size * (self._bar.format_dict["rate"] or 0)
            self._bar.set_postfix_str(f"loss {loss.item():.4f}, {rate:.0f} images/s", refresh=False)
        self._bar.set_description_str("", refresh=False)
        self._show(self._bar.update)
        if not self._estimated:
            self._estimate(step)

    def doing(self, what: str) -> None:
        """Show what holds up the steps, until the next one."""
        self._show(lambda: self._bar.set_description_str(what))

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.set_description_str("", refresh=False)
        self._show(self._bar.close)

    def _estimate(self, step: int) -> None:
        """Say once how long the run will take. The first step compiles, and some after it warm up: they do not count.

        A GPU is behind the host, but where a number was just read from it.
        """
        now, left = time.perf_counter(), self.steps - step
        begun, first = self._marks[-1] if self._marks else (-math.inf, step)
        if now - begun < PATIENCE and step % EVERY:
            return
        self._marks.append((now, step))
        self._estimated = len(self._marks) > 2
        if self._estimated and left:
            seconds = (now - begun) / (step - first) * left
            rest = "step that is" if left == 1 else "steps that are"
            self.say(f"fastdiff: about {duration(seconds)} for the {left} {rest} left")

    def _show(self, write: Callable[[], object]) -> None:
        """Write something, unless the output is lost."""
        if self.lost is None:
            try:
                write()
            except OSError as error:
                self.lost, self._bar.disable = error, True  # else the bar writes once more when it is closed


def duration(seconds: float) -> str:
    """A time in the unit that suits it: "40 s", "12 min", "3.5 h" or "13 days"."""
    for unit, length, limit in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48)):
        if seconds < limit * length:
            return f"{seconds / length:.{int(unit == 'h')}f} {unit}"
    return f"{seconds / 86400:.0f} days"


def is_named(count: int) -> bool:
    """Whether the `count`-th item that cannot be read is named: the first NAMED, and then every NAMED-th."""
    return count <= NAMED or count % NAMED == 0


def warning(name: str, why: str, count: int) -> str:
    """The line about an item that cannot be read."""
    return f"fastdiff: warning: left out {' '.join(name.splitlines())}: {why} ({count} so far)"


class Silent:
    """The progress of a process that prints nothing, but what it cannot read: no other process reads that."""

    lost = None

    def left_out(self, name: str, why: str, count: int) -> None:
        """As in Progress."""
        if is_named(count):
            with suppress(OSError):
                print(warning(name, why, count), flush=True)

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None
