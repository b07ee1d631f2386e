"""Images per second of a training step and of whole sampling with a U-Net: fastdiff and what users would do instead.

The network is eager in every row but those called compiled. In "compile" the eager arithmetic around it is compiled.
Each row agrees with the float64 reference before it is timed, with a network of its own of the same weights.
extra_info holds images_per_s, batch, steps, and peak_bytes, what a call allocates.
"""

import functools

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import timing
from benchmarks.peers import diffusers_sampling, diffusers_training_step, missing
from benchmarks.suite import DEVICE, full, name, on_device, time_row
from benchmarks.workloads import Row, sampling, training_step

CUDA = DEVICE.type == "cuda"
BATCH = 64 if CUDA else 4
TRAINING = [(torch.float32, row) for row in ("fused", "reference", "compile", "diffusers")]
if CUDA:
    TRAINING += [(torch.bfloat16, row) for row in ("fused", "reference", "compile")]
# diffusers is timed by its DDPMPipeline.
OWN = ("fused", "channels_last", "compiled", "bfloat16", "reference", "compile")
SAMPLERS = {"ddpm": (*OWN, "diffusers", "diffusers compiled"), "ddim": OWN}
# Network: (batch, steps). With so many steps, what is done once weighs no more than in a whole run.
RUNS = {"small": [(4, 8)], "digits": [(64, 20)], "cifar10": [(1, 4), (8, 2), (32, 2)]}
if CUDA:
    RUNS = {"small": [(64, 50)], "digits": [(64, 50)], "cifar10": [(1, 50), (64, 20)]}
# What runs without --full. Compiling a U-Net takes minutes on a CPU.
QUICK = {
    ("small", "ddpm"): ("fused", "channels_last", "reference", "compile", "diffusers"),
    ("small", "ddim"): ("fused", "channels_last", "reference", "compile"),
    ("digits", "ddpm"): ("fused", "reference", "diffusers"),
}
SAMPLING = [
    pytest.param(
        network, batch, steps, sampler, row,
        id=f"{network}-{batch}-{sampler}-{row}",
        marks=[] if row in QUICK.get((network, sampler), ()) else full,
    )
    for network, runs in RUNS.items()
    for batch, steps in runs
    for sampler, rows in SAMPLERS.items()
    for row in rows
]  # fmt: skip

training_rows = functools.lru_cache(maxsize=1)(training_step)
sampling_rows = functools.lru_cache(maxsize=1)(sampling)


def time_images(benchmark: BenchmarkFixture, row: str, timed: Row, batch: int) -> None:
    seconds = time_row(benchmark, timed)
    benchmark.extra_info |= {"row": row, "images_per_s": batch / seconds, "batch": batch}
    benchmark.extra_info["peak_bytes"] = timing.peak_memory(timed.run, DEVICE)


@pytest.mark.parametrize(("dtype", "row"), TRAINING, ids=name)
@on_device
def test_training_step(benchmark: BenchmarkFixture, dtype: torch.dtype, row: str) -> None:
    if reason := missing(row):
        pytest.skip(reason)
    benchmark.group = f"training step {name(dtype)} small, batch {BATCH}"
    timed = diffusers_training_step(BATCH, DEVICE) if row == "diffusers" else training_rows(BATCH, dtype, DEVICE)[row]
    time_images(benchmark, row, timed, BATCH)


@pytest.mark.parametrize(("network", "batch", "steps", "sampler", "row"), SAMPLING)
@on_device
def test_sampling(benchmark: BenchmarkFixture, network: str, batch: int, steps: int, sampler: str, row: str) -> None:
    library, *compiled = row.split()
    if reason := missing(library):
        pytest.skip(reason)
    benchmark.group = f"sampling {sampler} {network}, batch {batch}, {steps} steps"
    if library == "diffusers":
        timed = diffusers_sampling(batch, steps, DEVICE, network, bool(compiled))
    else:
        timed = sampling_rows(batch, sampler, steps, DEVICE, network)[row]
    benchmark.extra_info["steps"] = steps
    time_images(benchmark, row, timed, batch)
