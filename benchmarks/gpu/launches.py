"""Launches of the kernels of one operation, for compute-sanitizer to watch.

`python -m benchmarks.gpu.launches NAME DEVICE` makes them.
"""

import itertools
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.calls import CALLS, Shape, Source

DTYPES = (torch.float32, torch.bfloat16)
# Rows whose threads are of several warps: only these meet in shared memory.
WIDE_ROW, WIDE_HEAD = 1600, 512
# A group of a norm is in one part in the first, and in several of the third, as no program holds it.
SHAPES = ((3, 5, 7, 11), (2, 3, 64, 64), (1, 2, 97, 202), (2, 3, 1, WIDE_ROW), (2, 3, 2, WIDE_HEAD // 2))
OPERATIONS = list(dict.fromkeys(name.partition(",")[0] for name in CALLS))
LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x,
    lambda x: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x,
)


def launch(
    operation: str, device: torch.device, dtypes: Sequence[torch.dtype] = DTYPES, shapes: Sequence[Shape] = SHAPES
) -> None:
    """Every call of the operation, with gradients if these have a kernel."""
    makers = [make for name, make in CALLS.items() if name.partition(",")[0] == operation]
    for dtype, shape, lay, make in itertools.product(dtypes, shapes, LAYOUTS, makers):
        call = make(Source(shape, dtype, device, lay))
        call.whole(call.op)()


if __name__ == "__main__":
    launch(sys.argv[1], torch.device(sys.argv[2]))
