"""What the files test_*.py share: the device, the timing of a row, and the figures that are kept of it."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.timing import calibrate, clock
from benchmarks.workloads import Row

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Seconds of timed rounds.
BUDGET = 1.0 if DEVICE.type == "cuda" else 0.2

# pytest-benchmark reads its clock before and after a round: this clock waits for the device first.
on_device = pytest.mark.benchmark(timer=functools.partial(clock, DEVICE))
full = pytest.mark.full


def name(value: object) -> str | None:
    """What a parameter is called in the name of a benchmark and in its group."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return "x".join(map(str, value)) if isinstance(value, tuple) else None


class CountOperations(TorchDispatchMode):
    """Counts the operations that PyTorch dispatches inside the block."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def time_row(benchmark: BenchmarkFixture, row: Row) -> float:
    """Check the row, then time it. Returns the median in seconds."""
    row.check()
    return time_call(benchmark, row.run)


def time_call(benchmark: BenchmarkFixture, call: Callable[[], object]) -> float:
    """The median in seconds, or NaN if pytest-benchmark is disabled."""
    calls, length = calibrate(call, DEVICE)
    benchmark.pedantic(call, rounds=max(3, min(50, round(BUDGET / length))), iterations=calls)
    return float("nan") if benchmark.stats is None else benchmark.stats.stats.median
