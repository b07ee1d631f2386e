"""Times in rounds long enough for the clock, side by side, and what they are measured against: a plain copy."""

import ctypes
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fastdiff.ops import dispatch

# Shortest round, so that the clock and the wait for the device do not count.
ROUND = 0.005


def clock(device: torch.device) -> float:
    """Seconds, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def calibrate(function: Callable[[], object], device: torch.device) -> tuple[int, float]:
    """(calls to a round, seconds of a round), after a call that may compile."""
    function()
    start = clock(device)
    function()
    once = clock(device) - start
    calls = max(1, round(ROUND / once))
    return calls, calls * once


def medians(functions: Sequence[Callable[[], object]], device: torch.device, seconds: float) -> list[float]:
    """Median seconds of a call of each function, over at least three interleaved rounds and about `seconds` in all."""
    calls, lengths = zip(*(calibrate(function, device) for function in functions), strict=True)
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(max(3, min(50, round(seconds / sum(lengths))))):
        for function, n, taken in zip(functions, calls, times, strict=True):
            start = clock(device)
            for _ in range(n):
                function()
            taken.append((clock(device) - start) / n)
    return [statistics.median(taken) for taken in times]


def copier(traffic: int, device: torch.device) -> Callable[[], object]:
    """A copy into an existing buffer that reads and writes `traffic` bytes in all."""
    source = torch.ones(traffic // 8, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def peak_memory(function: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that a call needs beyond what was there before it, what it returns included; None where no one counts. On a
    CPU within a megabyte."""
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
        library.malloc_trim(0)  # what lies free in the process would not be counted
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
