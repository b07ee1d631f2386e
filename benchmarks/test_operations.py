"""The operations by data type and shape: fastdiff, eager PyTorch, torch.compile, and other libraries.

Each row agrees with the float64 reference before it is timed. extra_info holds ns_per_element; bytes, the least that
must be read and written; gb_per_s by it; copy_fraction, the time of a plain copy of as many bytes over the row's; and
peak_bytes, what a call allocates.
"""

import functools

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import timing
from benchmarks.peers import all_rows, missing, peer_names
from benchmarks.suite import BUDGET, DEVICE, full, name, on_device, time_row
from benchmarks.workloads import OPERATIONS, TENSORS, Rows, cases

ROWS = [
    pytest.param(
        operation, dtype, shape, row,
        id=f"{operation}-{name(dtype)}-{name(shape)}-{row}",
        marks=[] if (dtype, shape) in cases(DEVICE, "quick") else full,
    )
    for operation in OPERATIONS
    for dtype, shape in cases(DEVICE, "full")
    for row in ("fused", "reference", "compile", *peer_names(operation))
]  # fmt: skip


@functools.lru_cache(maxsize=1)
def rows_of_group(operation: str, shape: tuple[int, ...], dtype: torch.dtype) -> Rows:
    """Kept for the next row of the same group."""
    return all_rows(operation, shape, dtype, DEVICE)


@pytest.mark.parametrize(("operation", "dtype", "shape", "row"), ROWS)
@on_device
def test_operation(
    benchmark: BenchmarkFixture, operation: str, dtype: torch.dtype, shape: tuple[int, ...], row: str
) -> None:
    if reason := missing(row):
        pytest.skip(reason)
    rows = rows_of_group(operation, shape, dtype)
    benchmark.group = f"{operation} {name(dtype)} {name(shape)}"
    elements = torch.Size(shape).numel()
    traffic = TENSORS[operation] * dtype.itemsize * elements
    copy = timing.copier(traffic, DEVICE)
    before = timing.medians([copy], DEVICE, BUDGET / 4)[0]
    seconds = time_row(benchmark, rows[row])
    after = timing.medians([copy], DEVICE, BUDGET / 4)[0]
    benchmark.extra_info |= {
        "row": row,
        "ns_per_element": seconds / elements * 1e9,
        "bytes": traffic,
        "gb_per_s": traffic / seconds / 1e9,
        "copy_fraction": (before + after) / 2 / seconds,
        "peak_bytes": timing.peak_memory(rows[row].run, DEVICE),
    }
