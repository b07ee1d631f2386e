"""Launches of the kernels of one operation, for compute-sanitizer to watch.

`python -m benchmarks.gpu.launches NAME DEVICE` makes them.
"""

import itertools
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.calls import CALLS, Source

DTYPES = (torch.float32, torch.bfloat16)
# One part and several, of a sample. Fewer shapes are fewer kernels to compile, which is what takes time.
SHAPES = ((3, 5, 7, 11), (2, 3, 64, 64))
# No program holds a group of the norm's second. Only rows and heads as wide as these have threads of several warps,
# which meet in shared memory.
WIDE_ROW, WIDE_HEAD = 1600, 512
SHAPES_OF = {
    "group_norm_silu": (SHAPES[0], (1, 2, 97, 202)),
    "layer_norm": (SHAPES[0], (2, 3, 1, WIDE_ROW)),
    "add_layer_norm": (SHAPES[0], (2, 3, 1, WIDE_ROW)),
    "rotate": (SHAPES[0], (2, 3, 2, WIDE_HEAD // 2)),
}
OPERATIONS = list(dict.fromkeys(name.partition(",")[0] for name in CALLS))
LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x,
    lambda x: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x,
)


def shapes_of(operation: str) -> tuple[tuple[int, ...], ...]:
    return SHAPES_OF.get(operation, SHAPES)


def launch(
    operation: str, device: torch.device, shape: tuple[int, ...], dtypes: Sequence[torch.dtype] = DTYPES
) -> None:
    """Every call of the operation, with gradients if these have a kernel."""
    makers = [make for name, make in CALLS.items() if name.partition(",")[0] == operation]
    for dtype, lay, make in itertools.product(dtypes, LAYOUTS, makers):
        call = make(Source(shape, dtype, device, lay))
        call.whole(call.op)()


if __name__ == "__main__":
    for shape in shapes_of(sys.argv[1]):
        launch(sys.argv[1], torch.device(sys.argv[2]), shape)
