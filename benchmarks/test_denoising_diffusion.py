"""GaussianDiffusion of denoising-diffusion-pytorch around a network that costs nothing: fused and stock.

A call is a loss with its gradient, four ancestral steps, or four DDIM steps. All draw from PyTorch's generator. Each
row agrees with the stock class before it is timed. extra_info holds us_per_call, and aten_ops, the number of operations
that the call dispatches.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from benchmarks.suite import DEVICE, CountOperations, full, name, on_device, time_call
from benchmarks.torchvision_standin import stock as import_stock
from benchmarks.workloads import LARGE, SMALL
from fastdiff.interop import denoising_diffusion as fused

stock = import_stock()


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


@pytest.mark.parametrize("row", ["fused", "denoising-diffusion-pytorch"])
@pytest.mark.parametrize("shape", [SMALL, pytest.param(LARGE, marks=full)], ids=name)
@pytest.mark.parametrize("part", ["loss", "ancestral", "ddim"])
@on_device
def test_gaussian_diffusion(
    benchmark: BenchmarkFixture, part: str, shape: tuple[int, ...], row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark.group = f"GaussianDiffusion {part} {name(shape)}"
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
    with CountOperations() as count:
        call()
    benchmark.extra_info |= {"aten_ops": count.calls, "row": row, "us_per_call": 1e6 * time_call(benchmark, call)}
