"""The GPU's time of each operation: the norm at the shapes of networks, then all others.

Every row is checked against the float64 reference before it is timed. The figures are milliseconds of the GPU's work.
"""

import functools
import itertools

import torch

from benchmarks.kernel_workloads import KERNEL_TENSORS, KERNELS
from benchmarks.timing import copier
from benchmarks.workloads import OPERATIONS, TENSORS, cases

from .measure import milliseconds
from .norms import FORWARD_TENSORS, GRADIENT_TENSORS, LAYOUTS, Case, fused, stock
from .rows import Figures, Row, Setup

# Of the U-Net of ddpm-cifar10-32 at batch 256, then maps of 64x64 and 128x128 of larger networks.
NORM_SHAPES: list[tuple[int, ...]] = [
    (256, 128, 32, 32),
    (256, 256, 16, 16),
    (256, 384, 32, 32),
    (256, 512, 16, 16),
    (256, 512, 8, 8),
    (256, 256, 4, 4),
    (8, 320, 64, 64),
    (8, 256, 128, 128),
]
TOY_NORM_SHAPES: list[tuple[int, ...]] = [(2, 32, 4, 4)]
TOY_CASES: list[tuple[torch.dtype, tuple[int, ...]]] = [(torch.float32, (2, 3, 4, 4))]
SECONDS = 0.6
TURNS = {torch.bfloat16: 2, torch.float32: 3}
# A goal is about the norm. Beside torch.compile it comes late: each shape is compiled for seconds.
NORM_TURNS = {torch.bfloat16: (1, 4), torch.float32: (3, 5)}


def norm(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, gradients: bool, compiled: bool, setup: Setup
) -> Figures:
    """compiled: beside torch.compile instead of eager PyTorch."""
    case = Case(shape, dtype, layout, setup.device)
    call = case.with_gradients if gradients else case.forward
    ways = {"fused": fused} | ({"compile": torch.compile(stock)} if compiled else {"reference": stock})
    for way in ways.values():
        case.check(way)
    runs = [functools.partial(call, way) for way in ways.values()]
    copy = case.copy(GRADIENT_TENSORS if gradients else FORWARD_TENSORS)
    return dict(zip((*ways, "copy"), milliseconds([*runs, copy], setup.device, SECONDS), strict=True))


def operation(name: str, dtype: torch.dtype, shape: tuple[int, ...], setup: Setup) -> Figures:
    rows = (OPERATIONS | KERNELS)[name](shape, dtype, setup.device)
    for row in rows.values():
        row.check()
    copy = copier((TENSORS | KERNEL_TENSORS)[name] * dtype.itemsize * torch.Size(shape).numel(), setup.device)
    times = milliseconds([*(row.run for row in rows.values()), copy], setup.device, SECONDS)
    return dict(zip((*rows, "copy"), times, strict=True))


def size_name(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {'x'.join(map(str, shape))}"


def rows(setup: Setup) -> list[Row]:
    found = []
    shapes = setup.size(NORM_SHAPES, TOY_NORM_SHAPES)
    for compiled, dtype, shape, layout, gradients in itertools.product(
        (False, True), NORM_TURNS, shapes, LAYOUTS, (False, True)
    ):
        run = functools.partial(norm, shape, dtype, layout, gradients, compiled, setup)
        what = "norm" + " with gradients" * gradients + " and torch.compile" * compiled
        found.append(Row(f"{what}, {layout}", size_name(dtype, shape), run, 40, NORM_TURNS[dtype][compiled]))
    for name in OPERATIONS | KERNELS:
        for dtype, shape in setup.size(cases(setup.device, "quick"), TOY_CASES):
            run = functools.partial(operation, name, dtype, shape, setup)
            found.append(Row(name, size_name(dtype, shape), run, 60, TURNS[dtype]))
    return found
