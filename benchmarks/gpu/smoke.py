"""Is everything right? Each kernel against the float64 reference, and what is captured against what is not."""

import copy
from collections.abc import Callable

import torch

from benchmarks.kernel_workloads import KERNELS
from benchmarks.workloads import OPERATIONS, SEED
from fastdiff import DDPM, accelerate
from fastdiff.training import TrainingStep

from .networks import cifar10, stock_cifar10
from .norms import LAYOUTS, Case, fused
from .rows import Figures, NotAvailable, Row, Setup

# Calls that are compared. A call is captured at the third, a training step at the fourth.
CALLS = 6
# Between weights, of their way: gradients are summed in any order, and Adam makes a step of every sign of rounding.
LARGEST_DISTANCE = 0.1
DTYPES = (torch.float32, torch.bfloat16)


def operation(name: str, setup: Setup) -> Figures:
    shapes = setup.size([(3, 5, 12, 20), (2, 3, 64, 64), (64, 3, 64, 64)], [(3, 5, 4, 8), (1, 3, 8, 8), (2, 3, 8, 8)])
    for shape in shapes:
        for dtype in DTYPES:
            (OPERATIONS | KERNELS)[name](shape, dtype, setup.device)["fused"].check()
    return {"checked": len(shapes) * len(DTYPES)}


def norm(layout: str, setup: Setup) -> Figures:
    shapes = setup.size([(2, 96, 7, 9), (3, 64, 32, 32), (2, 128, 128, 128)], [(2, 32, 3, 5), (1, 64, 4, 4)])
    for shape in shapes:
        for dtype in DTYPES:
            for scaled in (False, True):
                Case(shape, dtype, layout, setup.device, scaled=scaled).check(fused)
    return {"checked": 2 * len(shapes) * len(DTYPES)}


def graph(setup: Setup) -> Figures:
    """A sample of a captured step has the bits of one that is not captured."""
    ddpm = DDPM(cifar10(setup).eval()).to(setup.device)
    captured, plain = (ddpm.sample(2, steps=5, sampler="ddpm", seed=SEED, graph=graph) for graph in (True, False))
    if not torch.equal(captured, plain):
        raise RuntimeError(f"the captured sample is {(captured - plain).abs().max().item():.1e} off")
    return {"equal_bits": True}


@torch.no_grad()
def network(setup: Setup) -> Figures:
    """The U-Net of diffusers replayed by `accelerate` has the bits of the one that is not."""
    plain = stock_cifar10(setup).eval()
    accelerate(plain)
    replayed = copy.deepcopy(plain)
    left = accelerate(replayed, graph=True).left
    x = torch.randn(2, 3, plain.config.sample_size, plain.config.sample_size, device=setup.device)
    for call in range(CALLS):
        got, want = (net(x + call, 10 * call).sample for net in (replayed, plain))
        if not torch.equal(got, want):
            raise RuntimeError(f"call {call} is {(got - want).abs().max().item():.1e} off")
    if "forward" in left:
        raise NotAvailable(left["forward"])
    return {"equal_bits": True}


def training_step(setup: Setup) -> Figures:
    """Weights after captured steps are those after plain ones."""
    ddpm, size = DDPM(cifar10(setup).train()).to(setup.device), setup.size(32, 8)
    models = [copy.deepcopy(ddpm) for _ in range(2)]
    for model, graph in zip(models, (True, False), strict=True):
        torch.manual_seed(SEED)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        step = TrainingStep(model, optimizer, clip_grad=1.0, autocast=torch.bfloat16, graph=graph)
        for _ in range(CALLS):
            step(torch.rand(2, 3, size, size, device=setup.device))
    start, captured, plain = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (ddpm, *models))
    off = ((captured - plain).norm() / (plain - start).norm()).item()
    if not off < LARGEST_DISTANCE:
        raise RuntimeError(f"the weights are {off:.1e} of their way off")
    return {"off": off}


def rows(setup: Setup) -> list[Row]:
    def row(case: str, run: Callable[[], Figures]) -> Row:
        return Row(case, "against float64", run, seconds=15)

    checks = [row(name, lambda name=name: operation(name, setup)) for name in OPERATIONS | KERNELS]  # type: ignore[misc]
    checks += [row(f"norm {layout}", lambda layout=layout: norm(layout, setup)) for layout in LAYOUTS]  # type: ignore[misc]
    captured = {"sample": graph, "network": network, "training step": training_step}
    return checks + [
        Row(case, "captured and not", lambda run=run: run(setup), seconds=15)  # type: ignore[misc]
        for case, run in captured.items()
    ]
