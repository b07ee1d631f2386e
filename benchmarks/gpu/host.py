"""How long each operation holds up the program, beside eager PyTorch: microseconds a call, the GPU working on."""

import functools

import torch

from benchmarks.kernel_workloads import KERNELS
from benchmarks.workloads import OPERATIONS

from .measure import host_microseconds
from .norms import Case, fused, stock
from .operations import size_name
from .rows import Figures, Row, Setup

DTYPES = (torch.float32, torch.bfloat16)
# So small that the GPU has done a call before the host has made the next.
SHAPE, NORM_SHAPE = (64, 3, 64, 64), (2, 128, 32, 32)


def operation(name: str, dtype: torch.dtype, shape: tuple[int, ...], setup: Setup) -> Figures:
    rows = (OPERATIONS | KERNELS)[name](shape, dtype, setup.device)
    return {way: host_microseconds(row.run, setup.device) for way, row in rows.items() if way != "compile"}


def norm(shape: tuple[int, ...], dtype: torch.dtype, gradients: bool, scaled: bool, setup: Setup) -> Figures:
    case = Case(shape, dtype, "nchw", setup.device, scaled=scaled)
    call = case.with_gradients if gradients else case.forward
    ways = {"fused": fused, "reference": stock}
    return {name: host_microseconds(functools.partial(call, way), setup.device) for name, way in ways.items()}


def rows(setup: Setup) -> list[Row]:
    found = []
    for name in OPERATIONS | KERNELS:
        for dtype in DTYPES:
            shape = setup.size(SHAPE, (2, 3, 4, 4))
            run = functools.partial(operation, name, dtype, shape, setup)
            found.append(Row(name, size_name(dtype, shape), run, seconds=20))
    for scaled in (False, True):
        for gradients in (False, True):
            for dtype in DTYPES:
                shape = setup.size(NORM_SHAPE, (2, 32, 4, 4))
                run = functools.partial(norm, shape, dtype, gradients, scaled, setup)
                what = "norm" + " with scale and shift" * scaled + " with gradients" * gradients
                found.append(Row(what, size_name(dtype, shape), run, seconds=20))
    return found
