"""A stage of stand-in rows for tests of the GPU kit: one that works, and one for each way to go wrong."""

import os
import signal
import subprocess
import threading
from pathlib import Path

from benchmarks.gpu.rows import Figures, NotAvailable, Row, Setup


def works() -> Figures:
    return {"process": os.getpid()}


def fails() -> Figures:
    raise RuntimeError("3 is not 4")


def lacks() -> Figures:
    raise NotAvailable("no such tool")


def older(*, seed: int = 0) -> Figures:
    return {}


def hangs() -> Figures:
    """With a child that hangs too, whose number stands in a file."""
    child = subprocess.Popen(["tail", "-f", "/dev/null"])
    Path(os.environ["CHILD_FILE"]).write_text(str(child.pid))
    threading.Event().wait()
    return {}


def dies() -> Figures:
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def rows(setup: Setup) -> list[Row]:
    return [
        Row("first", "works", works, 30),
        Row("fails", "works", fails, 30),
        Row("lacks", "works", lacks, 30),
        Row("option", "works", lambda: older(graph=True), 30),  # type: ignore[call-arg]
        Row("second", "works", works, 30),
        Row("hangs", "works", hangs, 2),
        Row("third", "works", works, 30),
        Row("dies", "works", dies, 30),
        Row("last", "works", works, 30),
    ]
