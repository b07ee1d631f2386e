"""The threads of PyTorch's own loops, for loops of others.

Between two loops they stay awake for a while. So a team of them is gathered in a microsecond, where threads of another
pool would have to be woken, and would share the cores with those that wait.
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


# A forked child has its parent's team, but not its threads: OpenMP would wait for them forever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


@functools.cache
def _parallel() -> Any:
    """libgomp's entry, which LLVM's and Intel's libraries have too; None where PyTorch came with another."""
    entry = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if os.name == "posix" else None
    if entry is not None:
        entry.argtypes, entry.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return entry


def team_size() -> int:
    """torch.get_num_threads(), or 1 where a team cannot be had: in a forked child, and without OpenMP."""
    return 1 if _forked or _parallel() is None else torch.get_num_threads()


def run(function: int, argument: int, threads: int) -> None:
    """Call the C function at an address, with a pointer, on each of `threads` threads: `team_size()` of them.

    A smaller team is not to be had: OpenMP ends the threads that it would leave out, and makes them anew.
    """
    _parallel()(function, argument, threads, 0)
