"""GaussianDiffusion of denoising-diffusion-pytorch around a network that costs nothing: stock and fused.

A loss with its gradient, four ancestral steps and four DDIM steps, all with their draws from PyTorch's generator.
extra_info["aten_ops"] counts the operations that are dispatched, and extra_info["speedup"] is the median time of stock
over the row's, of interleaved calls. --benchmark-group-by=group,param:shape puts the two rows of one size together.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision_standin import stock as import_stock

from benchmarks import timing
from benchmarks.rounds import BUDGET, DEVICE, name, on_device, time_call
from fastdiff.interop import denoising_diffusion as fused

stock = import_stock()


class Count(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


class Fixed(nn.Module):
    """Predicts the same whatever it is given."""

    self_condition = False

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.channels = self.out_dim = shape[1]
        torch.manual_seed(1)
        self.output = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None) -> Tensor:
        return self.output


def call_of(library: Any, part: str, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    diffusion = library.GaussianDiffusion(
        Fixed(shape), image_size=shape[2:], timesteps=4 if part == "ancestral" else 1000, sampling_timesteps=4,
        ddim_sampling_eta=0.5,
    ).to(DEVICE)  # fmt: skip
    images = torch.rand(shape, device=DEVICE)

    def loss() -> Tensor:
        value = diffusion(images)
        value.backward()
        return value.detach()

    return {
        "loss": loss,
        "ancestral": lambda: diffusion.p_sample_loop(shape),
        "ddim": lambda: diffusion.ddim_sample(shape),
    }[part]


def without_bar(steps: Iterable[Any], **kwargs: Any) -> Iterable[Any]:
    return steps


@pytest.mark.parametrize("row", ["fused", "stock"])
@pytest.mark.parametrize("shape", [bench.SMALL, bench.LARGE], ids=name)
@pytest.mark.parametrize("part", ["loss", "ancestral", "ddim"])
@on_device
def test_gaussian_diffusion(
    benchmark: BenchmarkFixture, part: str, shape: tuple[int, ...], row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark.group = f"GaussianDiffusion, {part}"
    for library in (stock, fused):
        monkeypatch.setattr(library, "tqdm", without_bar)
    torch.manual_seed(0)
    theirs = call_of(stock, part, shape)
    torch.manual_seed(0)
    call = call_of(fused if row == "fused" else stock, part, shape)
    torch.manual_seed(0)
    want = theirs()
    torch.manual_seed(0)
    torch.testing.assert_close(call(), want, rtol=2e-6, atol=2e-6)
    with Count() as count:
        call()
    benchmark.extra_info["aten_ops"] = count.calls
    time_call(benchmark, call)
    mine, other = timing.medians([call, theirs], DEVICE, 2 * BUDGET)
    benchmark.extra_info["speedup"] = other / mine
