"""The threads of PyTorch's own loops, for our loops.

They stay awake for a while after a loop, so a team of them gathers in a microsecond. Threads of another pool would have
to be woken, and would share the cores with those that wait.
"""

import ctypes
import functools
import os
from typing import Any

import torch

_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


# A forked child inherits its parent's team without the threads: OpenMP would wait for them forever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


@functools.cache
def _parallel() -> Any:
    """The entry point of libgomp, which LLVM's and Intel's libraries have too; None if PyTorch uses another library."""
    entry = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if os.name == "posix" else None
    if entry is not None:
        entry.argtypes, entry.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return entry


def team_size() -> int:
    """torch.get_num_threads(); 1 in a forked child and without OpenMP, which have no team."""
    return 1 if _forked or _parallel() is None else torch.get_num_threads()


def run(function: int, argument: Any, threads: int) -> None:
    """Call the C function at an address, with a pointer of ctypes, on each of `threads` threads.

    `threads` must be `team_size()`. In a smaller team OpenMP would end the other threads, and create them again later.
    """
    _parallel()(function, argument, threads, 0)
