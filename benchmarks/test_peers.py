"""fastdiff beside what users would do instead, in one run: the operations, a training step, and whole sampling.

Rows: fastdiff; eager PyTorch; eager PyTorch that writes into buffers it has; torch.compile; diffusers' DDPMScheduler;
denoising-diffusion-pytorch's GaussianDiffusion. Of sampling: fastdiff as it is, laid out channels_last, and compiled;
eager PyTorch; diffusers' DDPMPipeline, and with its U-Net compiled. Each agrees with the float64 reference before it is
timed, side by side with fastdiff and a plain copy. extra_info: ratio (its time over fastdiff's), ns_per_element,
copy_fraction (a copy's time over its own, by the bytes that must move at least), peak_bytes (beyond the operands).

pip install -e '.[peers]'; -k operation --benchmark-group-by=group,param:shape puts the rows of one size together.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import timing
from benchmarks.peers import NAMES, all_rows, diffusers_sampling, diffusers_training_step, missing
from benchmarks.rounds import BUDGET, DEVICE, name, on_device, time_row
from benchmarks.workloads import OPERATIONS, TENSORS, Row, sampling, training_step

ROWS = ("fused", "reference", "compile", *NAMES)
TRAINING = ("fused", "reference", "compile", "diffusers")
SAMPLING = ("fused", "channels_last", "compiled", "reference", "diffusers", "diffusers compiled")
SHAPES = [bench.SMALL, bench.LARGE]
BATCH = 64 if DEVICE.type == "cuda" else 4
# (network, batch, steps): enough steps for what is done once to weigh no more than it does in a whole run.
RUNS = [("small", 4, 8), ("digits", 64, 20), ("cifar10", 1, 4), ("cifar10", 8, 2), ("cifar10", 32, 2)]
if DEVICE.type == "cuda":
    RUNS = [("small", 64, 50), ("digits", 64, 50), ("cifar10", 1, 50), ("cifar10", 64, 20)]


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
    runs = [rows[row].run, rows["fused"].run, timing.copier(traffic, DEVICE)]
    seconds, fused, copy = timing.medians(runs, DEVICE, 5 * BUDGET)
    benchmark.extra_info |= {
        "ratio": seconds / fused,
        "ns_per_element": 1e9 * seconds / elements,
        "copy_fraction": copy / seconds,
        "peak_bytes": timing.peak_memory(rows[row].run, DEVICE),
    }


def whole(row: Row, fused: Row, benchmark: BenchmarkFixture, batch: int) -> None:
    """Time a row beside fastdiff's, each with its own network of the same weights."""
    fused.check()  # before a step changes the weights
    time_row(benchmark, row)
    seconds, own = timing.medians([row.run, fused.run], DEVICE, 5 * BUDGET)
    peak = timing.peak_memory(row.run, DEVICE)
    benchmark.extra_info |= {"ratio": seconds / own, "images_per_s": batch / seconds, "peak_bytes": peak}


@pytest.mark.parametrize("row", TRAINING)
def test_training_step(benchmark: BenchmarkFixture, row: str) -> None:
    if reason := missing(row):
        pytest.skip(reason)
    benchmark.group = "training step"
    rows = training_step(BATCH, torch.float32, DEVICE)
    timed = diffusers_training_step(BATCH, DEVICE) if row == "diffusers" else rows[row]
    whole(timed, rows["fused"], benchmark, BATCH)


@pytest.mark.parametrize("row", SAMPLING)
@pytest.mark.parametrize(("name", "batch", "steps"), RUNS)
def test_sampling(benchmark: BenchmarkFixture, name: str, batch: int, steps: int, row: str) -> None:
    """The ancestral sampler; diffusers by its DDPMPipeline."""
    library, *compiled = row.split()
    if reason := missing(library):
        pytest.skip(reason)
    benchmark.group = f"sampling {name} {batch}"
    rows = sampling(batch, "ddpm", steps, DEVICE, name)
    timed = diffusers_sampling(batch, steps, DEVICE, name, bool(compiled)) if library == "diffusers" else rows[row]
    whole(timed, rows["fused"], benchmark, batch)
