"""Is everything right? Each kernel against the float64 reference, and a captured sample against one that is not."""

from collections.abc import Callable

import torch

from benchmarks.kernel_workloads import KERNELS
from benchmarks.workloads import OPERATIONS, SEED
from fastdiff import DDPM

from .networks import cifar10
from .norms import LAYOUTS, Case, fused
from .rows import Figures, Row, Setup

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


def rows(setup: Setup) -> list[Row]:
    def row(case: str, run: Callable[[], Figures]) -> Row:
        return Row(case, "against float64", run, seconds=15)

    checks = [row(name, lambda name=name: operation(name, setup)) for name in OPERATIONS | KERNELS]  # type: ignore[misc]
    checks += [row(f"norm {layout}", lambda layout=layout: norm(layout, setup)) for layout in LAYOUTS]  # type: ignore[misc]
    return [*checks, Row("sample", "captured and not", lambda: graph(setup), seconds=15)]
