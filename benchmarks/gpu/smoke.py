"""Is everything right? Each kernel against the float64 reference, and what is captured against what is not."""

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kernel_workloads import KERNELS
from benchmarks.workloads import OPERATIONS, SEED
from fastdiff import DDPM, accelerate
from fastdiff.cast import channels_last_convolutions
from fastdiff.guidance import Projected
from fastdiff.training import TrainingStep, update_ema

from .networks import cifar10
from .norms import LAYOUTS, Case, fused
from .rows import Figures, NotAvailable, Row, Setup
from .small import NETWORKS, cast, made

# Calls that are compared. A call is captured at the third, a training step at the fourth.
CALLS = 6
# Between weights, of their way: gradients are summed in any order, and Adam makes a step of every sign of rounding.
LARGEST_DISTANCE = 0.1
# Powers of two, as a captured step has them in float32.
RATE, DECAY = 2**-10, 1 - 2**-2
# Roundings of results in another order: how much further than stock's they may be from those in float64.
FURTHER = 1.5
DTYPES = (torch.float32, torch.bfloat16)
# Of the first and the last two the rows of a norm have 48, 192 and 3072 channels, and the heads of a rotation 16, 64
# and 128 elements.
SHAPES = [(3, 5, 12, 20), (2, 3, 64, 64), (64, 3, 64, 64), (2, 15, 8, 8), (2, 24, 64, 128)]

# What a norm has beside its weights, in the layouts in which networks have it.
PLAIN: list[dict[str, bool]] = [{}, {"scaled": True}]
MORE = {"nchw": PLAIN, "channels_last": [*PLAIN, {"halves": True}]}


def operation(name: str, setup: Setup) -> Figures:
    shapes = setup.size(SHAPES, [(3, 5, 4, 8), (1, 3, 8, 8), (2, 3, 8, 8)])
    for shape in shapes:
        for dtype in DTYPES:
            twice((OPERATIONS | KERNELS)[name](shape, dtype, setup.device)["fused"].check)
    return {"checked": len(shapes) * len(DTYPES)}


def norm(layout: str, setup: Setup) -> Figures:
    shapes = setup.size([(2, 96, 7, 9), (3, 64, 32, 32), (2, 128, 128, 128)], [(2, 32, 3, 5), (1, 64, 4, 4)])
    for shape in shapes:
        for dtype in DTYPES:
            for more in MORE[layout]:
                twice(functools.partial(Case(shape, dtype, layout, setup.device, **more).check, fused))
    return {"checked": len(MORE[layout]) * len(shapes) * len(DTYPES)}


def twice(check: Callable[[], None]) -> None:
    """The second call of a kind repeats the launches of the first. Memory that neither wrote holds NaN."""
    with in_one_order():
        for _ in range(2):
            check()


@contextmanager
def in_one_order() -> Iterator[None]:
    """Let PyTorch take kernels that sum in one order, where it has them, and fill new memory with NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def graph(setup: Setup) -> Figures:
    """Samples of a captured step have the bits of those that are not captured, with other noise and weights too."""
    ddpm = DDPM(cifar10(small(setup)).eval()).to(setup.device)
    guided = {"guidance": 2.0, "guidance_rule": Projected(momentum=-0.5), "uncond": copy.deepcopy(ddpm.model)}
    cases: list[dict[str, Any]] = [
        {"sampler": "ddpm"},
        {"sampler": "dpm++2m", "dtype": torch.bfloat16},
        {"sampler": "ddim", **guided},
    ]
    pairs = []
    for how in cases:
        for run in range(2):
            with another_stream(setup.device):
                both = [ddpm.sample(2, steps=5, seed=SEED + run, graph=graph, **how) for graph in (True, False)]
            pairs.append(both)
            change(ddpm)
    same(pairs)
    return {"equal_bits": True}


@contextmanager
def another_stream(device: torch.device) -> Iterator[None]:
    """Work on another stream of a GPU than the calls before, in the same order."""
    if device.type != "cuda":
        yield
        return
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


class Waiting(nn.Module):
    """A network that waits for the GPU. PyTorch does not tell of this wait: its capture has to fail."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor) -> Any:
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        else:
            x.sum().item()
        return self.network(x, t)


def refused(setup: Setup) -> Figures:
    """A step whose capture fails runs without one. Random numbers and other captures are right after it."""
    network, shape = cifar10(small(setup)).eval(), (2, 3, 8, 8)
    bad, good = (DDPM(model).to(setup.device) for model in (Waiting(network), network))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        pairs = [[bad.sample(shape, steps=5, seed=SEED, graph=graph) for graph in (None, False)] for _ in range(2)]
    if not any("cannot be captured" in str(warning.message) for warning in told):
        raise NotAvailable("no graph was asked for, or its capture did not fail")
    if not torch.rand(8, device=setup.device).std() > 0:
        raise RuntimeError("random numbers are equal after a failed capture")
    pairs.append([good.sample(shape, steps=5, seed=SEED, graph=graph) for graph in (True, False)])
    same(pairs)
    return {"equal_bits": True}


@torch.no_grad()
def network(name: str, setup: Setup) -> Figures:
    """A network of diffusers by `accelerate`, in bfloat16: its results are as near to those in float64 as stock's, and
    replayed it has the bits of the one that is not."""
    stock, given = made(name, setup.device)
    exact = copy.deepcopy(stock).double()(**cast(given, torch.float64), return_dict=False)[0]
    stock.to(torch.bfloat16)
    plain = copy.deepcopy(stock)
    accelerate(plain)
    replayed = copy.deepcopy(plain)
    left = accelerate(replayed, graph=True).left
    results = [net(**cast(given, torch.bfloat16), return_dict=False)[0].double() for net in (plain, stock)]
    ours, theirs = ((result - exact).norm().item() for result in results)
    if not ours <= FURTHER * theirs:
        raise RuntimeError(f"the results are {ours / theirs:.1f} times as far from float64 as stock's")
    pairs = []
    for call in range(CALLS):
        pairs.append([net(**cast(given, torch.bfloat16, call), return_dict=False)[0] for net in (replayed, plain)])
        for net in (replayed, plain):
            change(net)
    same(pairs)
    if "forward" in left:
        raise NotAvailable(left["forward"])
    return {"of_stock": ours / theirs, "equal_bits": True}


@torch.no_grad()
def change(net: torch.nn.Module) -> None:
    """Other weights, where they lie: a graph has to read them."""
    for parameter in net.parameters():
        parameter.mul_(1.1)


def same(pairs: list[list[torch.Tensor]]) -> None:
    """Compare results of captured and plain calls after the last: a graph must not write into what it gave before."""
    for call, (captured, plain) in enumerate(pairs):
        if not torch.equal(captured, plain):
            raise RuntimeError(f"call {call} is {(captured - plain).abs().max().item():.1e} off")


def training_step(setup: Setup) -> Figures:
    """Losses, weights and averages of captured steps are those of plain ones. The loss grows with the images.

    equal_bits: whether they have the same bits, as they do where each of PyTorch's kernels sums in one order."""
    ddpm = DDPM(cifar10(small(setup)).train(), objective="x0").to(setup.device)
    channels_last_convolutions(ddpm.model)
    models = [copy.deepcopy(ddpm) for _ in range(2)]
    averages = [copy.deepcopy(ddpm.model) for _ in models]
    losses = []
    for model, ema, graph in zip(models, averages, (True, False), strict=True):
        torch.manual_seed(SEED)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
        average = functools.partial(update_ema, ema, model.model)
        how: dict[str, Any] = {"average": average, "clip_grad": 1.0, "autocast": torch.bfloat16}
        step = TrainingStep(model, optimizer, **how, graph=graph)
        images = (call + torch.rand(2, 3, 8, 8, device=setup.device) for call in range(CALLS))
        with in_one_order():
            losses.append(torch.stack([step(batch, decay=DECAY) for batch in images]))
    torch.testing.assert_close(*losses, rtol=LARGEST_DISTANCE, atol=0.0)
    figures: Figures = {"equal_bits": torch.equal(*losses)}
    start = weights(ddpm.model)
    for name, nets in {"weights": [model.model for model in models], "averages": averages}.items():
        captured, plain = map(weights, nets)
        off = figures[f"{name}_off"] = ((captured - plain).norm() / (plain - start).norm()).item()
        figures["equal_bits"] &= torch.equal(captured, plain)
        if not off < LARGEST_DISTANCE:
            raise RuntimeError(f"the {name} are {off:.1e} of their way off")
    return figures


def weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def required(run: Callable[[Setup], Figures], setup: Setup) -> Figures:
    """A row of captures. On an NVIDIA GPU it is an error if one is not made."""
    try:
        return run(setup)
    except (NotAvailable, ValueError) as error:
        if setup.device.type == "cuda" and torch.version.hip is None and "graph" in str(error):
            raise RuntimeError(str(error)) from error
        raise


def small(setup: Setup) -> Setup:
    """A network of a few layers: what a graph does wrong shows in any, and each shape of a norm has to be compiled."""
    return Setup(setup.device, toy=True)


def rows(setup: Setup) -> list[Row]:
    """First what no GPU has run yet."""
    captured = {"sample": graph, "training step": training_step, "failed capture": refused}
    captured |= {f"accelerate, {name}": functools.partial(network, name) for name in NETWORKS}
    found = [
        Row(case, "captured and not", functools.partial(required, run, setup), seconds=60)
        for case, run in captured.items()
    ]
    for layout in LAYOUTS:
        found.append(Row(f"norm {layout}", "against float64", functools.partial(norm, layout, setup), seconds=40))
    for name in OPERATIONS | KERNELS:
        found.append(Row(name, "against float64", functools.partial(operation, name, setup), seconds=20))
    return found
