"""One step of the diffusers schedulers, with the noise of PyTorch's generator: stock, fused, and stock compiled.

extra_info["aten_ops"] counts the operations that the step dispatches (not of the compiled one), and
extra_info["speedup"] is the median time of stock over the row's, of interleaved calls.
--benchmark-group-by=group,param:shape puts the three rows of one size together.
"""

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import timing
from benchmarks.rounds import BUDGET, DEVICE, name, on_device, time_call
from fastdiff.interop import diffusers as fused

SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "ScoreSdeVeScheduler")


class Count(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


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
    multistep = isinstance(scheduler, diffusers.DPMSolverMultistepScheduler)

    def call() -> tuple[Tensor, ...]:
        if multistep:  # back to the fifth step
            scheduler._step_index, scheduler.lower_order_nums, scheduler.model_outputs = 4, 1, [None, before]
        return step(output, t, x, return_dict=False)

    return call


@pytest.mark.parametrize("row", ["fused", "stock", "compile"])
@pytest.mark.parametrize("shape", [bench.SMALL, bench.LARGE], ids=name)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@on_device
def test_scheduler(benchmark: BenchmarkFixture, scheduler: str, shape: tuple[int, ...], row: str) -> None:
    benchmark.group = scheduler
    torch.compiler.reset()
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
        with Count() as count:
            call()
        benchmark.extra_info["aten_ops"] = count.calls
    time_call(benchmark, call)
    mine, theirs = timing.medians([call, stock], DEVICE, 2 * BUDGET)
    benchmark.extra_info["speedup"] = theirs / mine
