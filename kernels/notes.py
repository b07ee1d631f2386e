"""Launches are noted while a call is recorded, so that a plan (fastdiff/ops/plan.py) can repeat them.

A noted launch has

    parameters  numbers, and tensors whose addresses the kernel gets
    repeatable  whether it can be launched again
    aligned     whether another kernel serves addresses that are not multiples of 16
    written(launches, parameter, constant)
                (what must hold, beside the kind of the call, the lines of a function that makes these launches again on
                `stream`), of the text of each parameter and the name of any other value
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Text = Callable[[Any], str]
_thread = threading.local()


def note(launch: Any) -> None:
    """Note a launch, if this thread records."""
    notes = getattr(_thread, "notes", None)
    if notes is not None:
        notes.append(launch)


def noting() -> bool:
    """Whether this thread records."""
    return getattr(_thread, "notes", None) is not None


@contextmanager
def noted() -> Iterator[list[Any]]:
    """The launches that this thread makes inside the block."""
    before, _thread.notes = getattr(_thread, "notes", None), []
    try:
        yield _thread.notes
    finally:
        _thread.notes = before
