"""A child process that measures the rows of one stage. Nothing that hangs in it can hang the kit."""

import contextlib
import gc
import multiprocessing
import os
import re
import signal
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

import torch

from .rows import NotAvailable, Row, Setup, Stage

# What a function says that does not know an option yet, or cannot follow it on this device.
UNKNOWN_OPTION = re.compile(r"unexpected keyword argument '(graph|compile|dtype)'|^(graph|compile|dtype): expected")
# Seconds that a process may take for its imports and for the device's context.
START = 120.0


def measure(row: Row) -> dict[str, Any]:
    """{"figures": ...}, {"not_available": why} or {"error": what}, and the seconds that it took."""
    start = time.perf_counter()
    try:
        outcome: dict[str, Any] = {"figures": row.run()}
    except NotAvailable as error:
        outcome = {"not_available": str(error)}
    except Exception as error:
        if isinstance(error, (TypeError, ValueError)) and UNKNOWN_OPTION.search(str(error)):
            outcome = {"not_available": str(error)}
        else:
            traceback.print_exc()
            outcome = {"error": f"{type(error).__name__}: {error}"[:2000]}
    return outcome | {"seconds": round(time.perf_counter() - start, 1)}


def forget(device: torch.device) -> bool:
    """Free what a row left: objects, compiled code and its CUDA graphs, cached memory. Returns whether the device is
    still of use: after some faults a process can do nothing more on a GPU."""
    try:
        torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
    except RuntimeError:
        traceback.print_exc()
        return False
    return True


def reusable(outcome: dict[str, Any], device: torch.device) -> bool:
    """Whether the process may run another row. On a GPU a failed one may leave more than can be seen, as a capture that
    did not end."""
    return not ("error" in outcome and device.type == "cuda") and forget(device)


def end_with_parent() -> None:
    """Kill this process and those that it started once the kit is gone: killed, it cannot."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.killpg(0, signal.SIGKILL)


def serve(pipe: Connection, stage: Stage, setup: Setup) -> None:
    """Answer each name of a row with its outcome, until the other end of the pipe closes."""
    os.setpgrp()  # so that the processes that a row starts die with this one
    threading.Thread(target=end_with_parent, daemon=True).start()
    rows = {row.name: row for row in stage.rows(setup)}
    torch.zeros(1, device=setup.device)
    pipe.send(({}, True))
    with contextlib.suppress(EOFError):
        while True:
            outcome = measure(rows[pipe.recv()])
            pipe.send((outcome, reusable(outcome, setup.device)))


class Worker:
    """One process of a stage. It starts at its first use, and again after it was killed or died."""

    def __init__(self, stage: Stage, setup: Setup) -> None:
        self.stage, self.setup = stage, setup
        self.process: Any = None
        self.pipe: Connection

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self, seconds: float) -> dict[str, Any]:
        """Be ready for a row within so many seconds, or raise TimeoutError. Returns {}, or an outcome if it cannot."""
        if self.process is not None:
            return {}
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(theirs, self.stage, self.setup))
        self.process.start()
        theirs.close()
        return self._answer(seconds)

    def run(self, name: str, seconds: float) -> dict[str, Any]:
        """The outcome of a row. TimeoutError if it has none after `seconds`: the process is killed then."""
        return self._answer(seconds, name)

    def _answer(self, seconds: float, name: str | None = None) -> dict[str, Any]:
        late = False
        try:
            if name is not None:
                self.pipe.send(name)  # fails if the process has died since its last row
            late = not self.pipe.poll(seconds)
            outcome, healthy = ({}, False) if late else self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(5)
            code = self.process.exitcode
            how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
            outcome, healthy = {"error": f"the process ended with {how}"}, False
        if not healthy:
            self.stop()
        if late:
            raise TimeoutError(f"killed after {seconds:.0f} s")
        return outcome

    def stop(self) -> None:
        """Kill the process and those that it started."""
        if self.process is None:
            return
        with contextlib.suppress(OSError):
            if os.getpgid(self.process.pid) == self.process.pid:  # it has made its group
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join(10)  # a process that waits within the driver does not end
        self.pipe.close()
        self.process = None
