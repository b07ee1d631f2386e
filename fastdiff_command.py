"""The command `fastdiff` until its package is imported.

Importing fastdiff imports PyTorch, which takes seconds. This module is outside of the package so that an interrupt in
that time is caught too. Nothing has to be saved then, so the process ends at once.
"""

import os
import signal


def leave(*_: object) -> None:
    """End the process, as the command does after an interrupt."""
    os.write(2, b"fastdiff: interrupted\n")
    os._exit(130)


def main() -> int:
    """Import the command and run it. Returns its exit status."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else the process was started with interrupts off
        signal.signal(signal.SIGINT, leave)
    from fastdiff.cli import main as run

    signal.signal(signal.SIGINT, before)
    return run()
