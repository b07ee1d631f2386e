"""Timing of functions side by side, and the plain copy that they are compared with."""

import ctypes
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fastdiff.ops import dispatch

# Seconds of the shortest round, long beside the clock and the wait for the device.
ROUND = 0.005


def clock(device: torch.device) -> float:
    """The time in seconds, read when the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def calibrate(
    function: Callable[[], object], device: torch.device, now: Callable[[torch.device], float] = clock
) -> tuple[int, float]:
    """(calls in a round, seconds of a round). A call before that may compile."""
    function()
    start = now(device)
    function()
    once = now(device) - start
    calls = max(1, round(ROUND / once))
    return calls, calls * once


def medians(
    functions: Sequence[Callable[[], object]],
    device: torch.device,
    seconds: float,
    now: Callable[[torch.device], float] = clock,
) -> list[float]:
    """Median seconds of a call of each function, by the clock `now`.

    The functions take turns, in at least three rounds and for about `seconds` in all.
    """
    calls, lengths = zip(*(calibrate(function, device, now) for function in functions), strict=True)
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(max(3, min(50, round(seconds / sum(lengths))))):
        for function, n, taken in zip(functions, calls, times, strict=True):
            start = now(device)
            for _ in range(n):
                function()
            taken.append((now(device) - start) / n)
    return [statistics.median(taken) for taken in times]


def copier(traffic: int, device: torch.device) -> Callable[[], object]:
    """A copy into a tensor that exists. It reads and writes `traffic` bytes together."""
    source = torch.ones(traffic // 8, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def peak_memory(function: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that a call allocates at most at one time, with what it returns.

    On a CPU this is exact to a megabyte. Returns None if the system does not count them.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None

    def kilobytes(field: str) -> int:
        return int(re.search(rf"{field}:\s+(\d+) kB", status.read_text())[1])  # type: ignore[index]

    if hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)  # memory that is free in the process would not be counted
    reset.write_text("5")  # the high-water mark starts again from here (proc(5))
    before = kilobytes("VmRSS")
    function()
    return 1024 * (kilobytes("VmHWM") - before)


def describe(device: torch.device) -> dict[str, str]:
    """The machine, and the implementation that "fused" stands for."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads"
    backend = dispatch.forced() or ("triton" if cuda else "cpu" if dispatch.has_numba() else "reference")
    return {"device": f"{device} ({name})", "torch": torch.__version__, "backend": backend}
