"""The device that is measured, and the timing of a row."""

import functools
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.timing import calibrate, clock
from benchmarks.workloads import Row

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = ("fused", "reference", "compile")
# Seconds of timed rounds.
BUDGET = 1.0 if DEVICE.type == "cuda" else 0.2

# pytest-benchmark reads its clock before and after all calls of a round: this one waits for the device first.
on_device = pytest.mark.benchmark(timer=functools.partial(clock, DEVICE))


def name(value: object) -> str | None:
    """What a parameter is called in the name of a benchmark."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return "x".join(map(str, value)) if isinstance(value, tuple) else None


def time_row(benchmark: BenchmarkFixture, row: Row) -> float:
    """Check the row, then time it: the median, in seconds."""
    torch.compiler.reset()
    row.check()
    return time_call(benchmark, row.run)


def time_call(benchmark: BenchmarkFixture, call: Callable[[], object]) -> float:
    """The median, in seconds; NaN where benchmarks are disabled."""
    calls, length = calibrate(call, DEVICE)
    benchmark.pedantic(call, rounds=max(3, min(50, round(BUDGET / length))), iterations=calls)
    return float("nan") if benchmark.stats is None else benchmark.stats.stats.median
