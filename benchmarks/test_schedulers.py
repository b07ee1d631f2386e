"""One step of the diffusers schedulers with the noise of PyTorch's generator: fused, stock, and stock compiled.

Each row agrees with the stock step before it is timed. extra_info holds us_per_call, and in rows that are not compiled
aten_ops, the number of operations that the step dispatches.
"""

import itertools
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.suite import DEVICE, CountOperations, full, name, on_device, time_call
from benchmarks.workloads import LARGE, SMALL
from fastdiff.interop import diffusers as fused

SCHEDULERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "ScoreSdeVeScheduler",
)


def step_of(scheduler: Any, shape: tuple[int, ...], compiled: bool = False) -> Callable[[], tuple[Tensor, ...]]:
    """The fifth of ten steps from fixed tensors: (prev_sample, and the prediction of x_0 or the mean if any)."""
    scheduler.set_timesteps(10, device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    x, output, before = (torch.randn(shape, device=DEVICE, generator=generator) for _ in range(3))
    t = scheduler.timesteps[4]
    if isinstance(scheduler, diffusers.ScoreSdeVeScheduler):
        scheduler.set_sigmas(10)
    step = scheduler.step_pred if hasattr(scheduler, "step_pred") else scheduler.step
    step = torch.compile(step) if compiled else step
    multistep = hasattr(scheduler, "model_outputs")
    places = itertools.cycle((4, 5))  # the fifth step and the sixth, as each remembers the other
    if multistep:
        scheduler.lower_order_nums, scheduler.model_outputs = 1, [None, before]

    def call() -> tuple[Tensor, ...]:
        if multistep:
            scheduler._step_index = next(places)
        return step(output, t, x, return_dict=False)

    return call


@pytest.mark.parametrize("row", ["fused", "diffusers", pytest.param("compile", marks=full)])
@pytest.mark.parametrize("shape", [SMALL, pytest.param(LARGE, marks=full)], ids=name)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@on_device
def test_scheduler(benchmark: BenchmarkFixture, scheduler: str, shape: tuple[int, ...], row: str) -> None:
    benchmark.group = f"{scheduler}.step {name(shape)}"
    stock = step_of(getattr(diffusers, scheduler)(), shape)
    library = fused if row == "fused" else diffusers
    call = step_of(getattr(library, scheduler)(), shape, compiled=row == "compile")
    torch.manual_seed(0)
    want = stock()
    torch.manual_seed(0)
    got = call()
    for a, b in list(zip(got, want, strict=True))[-1 if row == "compile" else 0 :]:  # compiled noise differs
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-4)
    if row != "compile":
        with CountOperations() as count:
            call()
        benchmark.extra_info["aten_ops"] = count.calls
    benchmark.extra_info |= {"row": row, "us_per_call": 1e6 * time_call(benchmark, call)}
