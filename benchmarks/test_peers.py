"""fastdiff beside what users would do instead, in one run: the operations, a training step, and whole sampling.

Rows: fastdiff; eager PyTorch; eager PyTorch that writes into buffers it has; torch.compile; diffusers' DDPMScheduler;
denoising-diffusion-pytorch's GaussianDiffusion. Each agrees with the float64 reference before it is timed, side by side
with fastdiff and a plain copy. extra_info: ratio (its time over fastdiff's), ns_per_element, copy_fraction (a copy's
time over its own, by the bytes that must move at least), peak_bytes (beyond the operands).

pip install -e '.[peers]'; --benchmark-group-by=group,param:shape puts the rows of one size together.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from timing import BUDGET, DEVICE, name, on_device, time_row

from fastdiff import bench
from fastdiff._peers import NAMES, all_rows, missing
from fastdiff._workloads import OPERATIONS, TENSORS

ROWS = ("fused", "reference", "compile", *NAMES)
SHAPES = [bench.SMALL, bench.LARGE]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("operation", OPERATIONS)
@on_device
def test_operation(benchmark: BenchmarkFixture, operation: str, shape: tuple[int, ...], row: str) -> None:
    if reason := missing(row):
        pytest.skip(reason)
    rows = all_rows(operation, shape, torch.float32, DEVICE)
    if row not in rows:
        pytest.skip(f"{row} has no {operation} of its own")
    benchmark.group = operation
    elements = torch.Size(shape).numel()
    time_row(benchmark, rows[row])
    rows["fused"].check()
    traffic = TENSORS[operation] * 4 * elements
    runs = [rows[row].run, rows["fused"].run, bench.copier(traffic, DEVICE)]
    seconds, fused, copy = bench.medians(runs, DEVICE, 5 * BUDGET)
    benchmark.extra_info |= {
        "ratio": seconds / fused,
        "ns_per_element": 1e9 * seconds / elements,
        "copy_fraction": copy / seconds,
        "peak_bytes": bench.peak_memory(rows[row].run, DEVICE),
    }
