"""GroupNorm and SiLU of a resnet block, forward and backward: fused, as in PyTorch, and that compiled.

Each row agrees with PyTorch's before it is timed. extra_info holds us_per_call, and in rows that are not compiled
aten_ops, the number of operations that forward and backward dispatch.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.suite import DEVICE, CountOperations, full, name, on_device, time_call
from fastdiff import ops

GROUPS, EPS = 32, 1e-5
SHAPES: list[Any] = [(8, 128, 32, 32), pytest.param((2, 64, 16, 16), marks=full)]
if DEVICE.type == "cuda":
    SHAPES += [(16, 320, 64, 64), pytest.param((1, 128, 512, 512), marks=full)]
DTYPES = [torch.float32, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float32]


def stock(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    h = F.group_norm(x, GROUPS, weight, bias, EPS)
    if scale is not None and shift is not None:
        h = h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return F.silu(h)


def fused(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    return ops.group_norm_silu(x, GROUPS, weight, bias, EPS, scale, shift)


@pytest.mark.parametrize("row", ["fused", "reference", pytest.param("compile", marks=full)])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", ["default", "scale_shift"])
@on_device
def test_norm(
    benchmark: BenchmarkFixture, kind: str, layout: str, shape: tuple[int, ...], dtype: torch.dtype, row: str
) -> None:
    with_scale, last = kind == "scale_shift", layout == "channels_last"
    benchmark.group = f"{'norm scale SiLU' if with_scale else 'norm SiLU'} {name(dtype)} {name(shape)}{' last' * last}"
    random = torch.Generator(DEVICE).manual_seed(0)
    memory_format = torch.channels_last if last else torch.contiguous_format

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=DEVICE, generator=random).to(dtype)

    x, grad = (drawn(*shape).to(memory_format=memory_format) for _ in range(2))
    leaves = [x.requires_grad_(), *(drawn(shape[1]).requires_grad_() for _ in range(2))]
    both = drawn(shape[0], 2 * shape[1]).requires_grad_() if with_scale else None
    inputs = leaves if both is None else [*leaves, both]

    def run(function: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            y = function(*leaves, *((None, None) if both is None else both.chunk(2, 1)))
            return y.detach(), *torch.autograd.grad(y, inputs, grad)

        return call

    theirs, mine = run(stock), run({"fused": fused, "reference": stock, "compile": torch.compile(stock)}[row])
    near = 2e-4 if dtype == torch.float32 else 3e-2
    for a, b in zip(mine(), theirs(), strict=True):
        assert (a - b).norm() <= near * b.norm()
    if row != "compile":
        with CountOperations() as count:
            mine()
        benchmark.extra_info["aten_ops"] = count.calls
    benchmark.extra_info |= {"row": row, "us_per_call": 1e6 * time_call(benchmark, mine)}
