"""What the boundary of an op costs: a call on one element, with given noise.

direct: the implementation itself
op: torch.ops.fastdiff, without the checks of its arguments
public: fastdiff.ops, with the checks
custom_op: the same implementation and schema, registered by torch.library.custom_op

extra_info holds us_per_element, the time of a call, and overhead_us, by how much single calls exceed "direct".
"""

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import timing
from benchmarks.suite import DEVICE, on_device, time_call
from fastdiff import ops
from fastdiff.ops.registry import OPS

Calls = dict[str, Callable[[], Any]]


def custom(name: str, implementation: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Any:
    return torch.library.custom_op(
        f"fastdiff_benchmark::{name}", implementation, mutates_args=mutates, schema=OPS[name].schema
    )


NOISING = custom("noising", OPS["noising"].implementation)
UPDATE = custom("update_", OPS["update_"].implementation, ("x", "hist"))
LOSS = custom("loss", OPS["loss"].implementation)
LOSS.register_autograd(
    lambda ctx, *grads: (ctx.saved_tensors[0] * grads[0], *[None] * 12),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output[1]),
)


def noising() -> Calls:
    x, t, table = one(), index(), torch.ones(3, 2, device=DEVICE)
    args = (x, t, table, None, None, one(), ops.FORWARD)
    return {
        "direct": lambda: OPS["noising"].implementation(*args),
        "op": lambda: torch.ops.fastdiff.noising(*args),
        "public": lambda: ops.noising(x, t, table, noise=args[5]),
        "custom_op": lambda: NOISING(*args),
    }


def update() -> Calls:
    """In place."""
    x, pred, rows, step = one(), one(), torch.ones(3, 9, device=DEVICE) / 4, index()
    noise = one()
    args = (x, pred, rows, step, None, None, None, None, noise, None, 1.0, "none", ops.REVERSE)

    def updated(function: Callable[..., None]) -> torch.Tensor:
        function(*args)
        return x

    return {
        "direct": lambda: updated(OPS["update_"].implementation),
        "op": lambda: updated(torch.ops.fastdiff.update_),
        "public": lambda: ops.update(x, pred, rows, step, noise=noise, clip=1.0, inplace=True),
        "custom_op": lambda: updated(UPDATE),
    }


def loss() -> Calls:
    """The forward call, with its gradient kept for the backward."""
    pred, t, table = one().requires_grad_(), index(), torch.ones(3, 3, device=DEVICE)
    noise = one()
    args = (pred, None, t, table, None, None, noise, None, ops.FORWARD, "mse", 1.0, False, True)
    detached = (pred.detach(), *args[1:])
    return {
        "direct": lambda: OPS["loss"].implementation(*detached),
        "op": lambda: torch.ops.fastdiff.loss(*args),
        "public": lambda: ops.loss(pred, t, table, noise=noise),
        "custom_op": lambda: LOSS(*args),
    }


def one() -> torch.Tensor:
    return torch.full((1, 1), 0.5, device=DEVICE)


def index() -> torch.Tensor:
    return torch.ones(1, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize("row", ["direct", "op", "public", "custom_op"])
@pytest.mark.parametrize("calls", [noising, update, loss], ids=lambda calls: calls.__name__)
@on_device
def test_dispatch(benchmark: BenchmarkFixture, calls: Callable[[], Calls], row: str) -> None:
    benchmark.group = f"boundary of {calls.__name__}"
    # Each row has arguments of its own, because an update changes them.
    assert torch.equal(first(calls()[row]()), first(calls()["direct"]()))
    own = calls()
    benchmark.extra_info |= {"row": row, "us_per_element": 1e6 * time_call(benchmark, own[row])}
    benchmark.extra_info["overhead_us"] = overhead(own[row], own["direct"]) * 1e6


def overhead(call: Callable[[], Any], direct: Callable[[], Any], rounds: int = 1000) -> float:
    """Difference of the medians in seconds. One call is timed at a time, so that few are interrupted by other work."""
    taken: dict[Callable[[], Any], list[float]] = {call: [], direct: []}
    for _ in range(rounds):
        for function, times in taken.items():
            start = timing.clock(DEVICE)
            function()
            times.append(timing.clock(DEVICE) - start)
    return statistics.median(taken[call]) - statistics.median(taken[direct])


def first(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result
