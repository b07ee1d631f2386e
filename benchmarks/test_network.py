"""A training step and sampling with a small U-Net, the same network in every row, and eager in every row."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.rounds import DEVICE, ROWS, name, on_device, time_row
from benchmarks.workloads import sampling, training_step

CUDA = DEVICE.type == "cuda"
BATCH = 64 if CUDA else 4
STEPS = 50 if CUDA else 8
DTYPES = [torch.float32, torch.bfloat16] if CUDA else [torch.float32]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@on_device
def test_training_step(benchmark: BenchmarkFixture, dtype: torch.dtype, row: str) -> None:
    benchmark.group = "training_step"
    seconds = time_row(benchmark, training_step(BATCH, dtype, DEVICE)[row])
    benchmark.extra_info |= {"batch": BATCH, "images_per_s": BATCH / seconds}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@on_device
def test_sampling(benchmark: BenchmarkFixture, sampler: str, row: str) -> None:
    benchmark.group = "sampling"
    seconds = time_row(benchmark, sampling(BATCH, sampler, STEPS, DEVICE)[row])
    benchmark.extra_info |= {"batch": BATCH, "steps": STEPS, "images_per_s": BATCH / seconds}
