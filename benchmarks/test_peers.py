"""fastdiff beside what users would do instead, in one run: the operations, a training step, and whole sampling.

Rows: fastdiff; eager PyTorch; eager PyTorch that writes into buffers it has; torch.compile; diffusers' DDPMScheduler;
denoising-diffusion-pytorch's GaussianDiffusion. Each agrees with the float64 reference before it is timed, side by side
with fastdiff and a plain copy. extra_info: ratio (its time over fastdiff's), ns_per_element, copy_fraction (a copy's
time over its own, by the bytes that must move at least), peak_bytes (beyond the operands).

pip install -e '.[peers]'; --benchmark-group-by=group,param:shape puts the rows of one size together.
"""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from timing import BUDGET, DEVICE, name, on_device, time_row

from fastdiff import bench
from fastdiff._peers import NAMES, all_rows, diffusers_sampling, diffusers_training_step, missing
from fastdiff._workloads import OPERATIONS, TENSORS, Row, Rows, sampling, training_step

ROWS = ("fused", "reference", "compile", *NAMES)
WHOLE = ("fused", "reference", "compile", "diffusers")
SHAPES = [bench.SMALL, bench.LARGE]
BATCH, STEPS = (64, 50) if DEVICE.type == "cuda" else (4, 8)


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


def whole(row: str, rows: Rows, peer: Callable[[], Row], benchmark: BenchmarkFixture, batch: int) -> None:
    """Time a row beside fastdiff's, each with its own network of the same weights."""
    timed = peer() if row == "diffusers" else rows[row]
    rows["fused"].check()  # before a step changes the weights
    time_row(benchmark, timed)
    seconds, fused = bench.medians([timed.run, rows["fused"].run], DEVICE, 5 * BUDGET)
    peak = bench.peak_memory(timed.run, DEVICE)
    benchmark.extra_info |= {"ratio": seconds / fused, "images_per_s": batch / seconds, "peak_bytes": peak}


@pytest.mark.parametrize("row", WHOLE)
def test_training_step(benchmark: BenchmarkFixture, row: str) -> None:
    if reason := missing(row):
        pytest.skip(reason)
    benchmark.group = "training step"
    rows = training_step(BATCH, torch.float32, DEVICE)
    whole(row, rows, lambda: diffusers_training_step(BATCH, DEVICE), benchmark, BATCH)


@pytest.mark.parametrize("row", WHOLE)
def test_sampling(benchmark: BenchmarkFixture, row: str) -> None:
    """The ancestral sampler; diffusers by its DDPMPipeline."""
    if reason := missing(row):
        pytest.skip(reason)
    benchmark.group = "sampling"
    rows = sampling(BATCH, "ddpm", STEPS, DEVICE)
    whole(row, rows, lambda: diffusers_sampling(BATCH, STEPS, DEVICE), benchmark, BATCH)
