"""Forward noising, the loss with its gradient, and the reverse update, by data type and size.

extra_info holds the least traffic in bytes, GB/s by it, its fraction of the rate of a plain copy in the same run, and
ns per element. --benchmark-group-by=group,param:dtype,param:shape puts the three rows of one size together.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import timing
from benchmarks.rounds import BUDGET, DEVICE, ROWS, name, on_device, time_row
from benchmarks.workloads import OPERATIONS, TENSORS


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(("dtype", "shape"), bench.cases(DEVICE, "quick"), ids=name)
@pytest.mark.parametrize("operation", OPERATIONS)
@on_device
def test_operation(
    benchmark: BenchmarkFixture, operation: str, dtype: torch.dtype, shape: tuple[int, ...], row: str
) -> None:
    benchmark.group = operation
    elements = torch.Size(shape).numel()
    traffic = TENSORS[operation] * dtype.itemsize * elements
    timed = OPERATIONS[operation](shape, dtype, DEVICE)[row]
    copy = timing.copier(traffic, DEVICE)
    before = timing.medians([copy], DEVICE, BUDGET / 4)[0]
    seconds = time_row(benchmark, timed)
    after = timing.medians([copy], DEVICE, BUDGET / 4)[0]
    benchmark.extra_info |= {
        "bytes": traffic,
        "gb_per_s": traffic / seconds / 1e9,
        "copy_fraction": (before + after) / 2 / seconds,
        "ns_per_element": seconds / elements * 1e9,
    }
