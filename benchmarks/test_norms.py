"""GroupNorm and SiLU of a resnet block, forward and backward: fused, as in PyTorch, and that compiled.

extra_info["aten_ops"] counts the operations that forward and backward dispatch (not of the compiled one), and
extra_info["speedup"] is the median time of stock over the row's, of interleaved calls. On a CPU the library runs
PyTorch's own operations, and the rows differ in nothing.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import timing
from benchmarks.rounds import BUDGET, DEVICE, name, on_device, time_call
from fastdiff import ops

GROUPS, EPS = 32, 1e-5
SHAPES = [(2, 64, 16, 16), (8, 128, 32, 32)]
if DEVICE.type == "cuda":
    SHAPES += [(16, 320, 64, 64), (1, 128, 512, 512)]
DTYPES = [torch.float32, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float32]


class Count(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def stock(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    h = F.group_norm(x, GROUPS, weight, bias, EPS)
    return F.silu(h if scale is None else h * (1 + scale[:, :, None, None]) + shift[:, :, None, None])


def fused(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    return ops.group_norm_silu(x, GROUPS, weight, bias, EPS, scale, shift)


@pytest.mark.parametrize("row", ["fused", "stock", "compile"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", ["default", "scale_shift"])
@on_device
def test_norm(
    benchmark: BenchmarkFixture, kind: str, layout: str, shape: tuple[int, ...], dtype: torch.dtype, row: str
) -> None:
    benchmark.group = f"group_norm_silu {kind}"
    torch.compiler.reset()
    random = torch.Generator(DEVICE).manual_seed(0)
    last = torch.channels_last if layout == "channels_last" else torch.contiguous_format

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=DEVICE, generator=random).to(dtype)

    x, grad = (drawn(*shape).to(memory_format=last) for _ in range(2))
    leaves = [x.requires_grad_(), *(drawn(shape[1]).requires_grad_() for _ in range(2))]
    both = drawn(shape[0], 2 * shape[1]).requires_grad_() if kind == "scale_shift" else None
    inputs = leaves if both is None else [*leaves, both]

    def run(function: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            y = function(*leaves, *((None, None) if both is None else both.chunk(2, 1)))
            return y.detach(), *torch.autograd.grad(y, inputs, grad)

        return call

    theirs, mine = run(stock), run({"fused": fused, "stock": stock, "compile": torch.compile(stock)}[row])
    near = 2e-4 if dtype == torch.float32 else 3e-2
    for a, b in zip(mine(), theirs(), strict=True):
        assert (a - b).norm() <= near * b.norm()
    if row != "compile":
        with Count() as count:
            mine()
        benchmark.extra_info["aten_ops"] = count.calls
    time_call(benchmark, mine)
    a, b = timing.medians([mine, theirs], DEVICE, 2 * BUDGET)
    benchmark.extra_info["speedup"] = b / a
