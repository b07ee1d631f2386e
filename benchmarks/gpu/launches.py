"""Launches of the kernels of one operation, for compute-sanitizer to watch.

`python -m benchmarks.gpu.launches NAME DEVICE` makes them.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff import ops

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((3, 5, 7, 11), (2, 3, 64, 64))
# A group in one part, and one that no program holds, in several.
NORM_SHAPES = ((2, 4, 5, 7), (1, 4, 97, 101))
# Rows whose threads are of several warps: only these meet in shared memory.
WIDE_ROW, WIDE_HEAD = 1600, 512


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(x with a gradient, timesteps)."""
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    return x, torch.zeros(shape[0], dtype=torch.int64, device=device)


def normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    ops.normal(shape, 1, dtype=dtype, device=device)


def noising(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x, t = draw(shape, dtype, device)
    ops.noising(x, t, torch.ones(1, 2, device=device))


def loss(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x, t = draw(shape, dtype, device)
    (3 * ops.loss(x, t, torch.ones(1, 3, device=device), seed=1)).backward()


def vlb(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x, t = draw(shape, dtype, device)
    for decoder in (0.0, 1.0):
        rows = torch.tensor([[1.0, 1.0, 1.0, 0.0, 1.0, decoder]], device=device)
        (3 * ops.vlb(x, x.detach(), x.detach(), t, rows, raw_variance=x, clip=1.0).sum()).backward()


def update(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x, t = draw(shape, dtype, device)
    ops.update(x.detach(), x.detach(), torch.ones(1, 9, device=device), t, clip=1.0, inplace=True)


def inner(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x, _ = draw(shape, dtype, device)
    for centred in (False, True):
        ops.inner(x.detach(), x.detach() + 1, guidance=torch.ones(1, device=device), centred=centred)


def gated_gelu(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    for width in (shape[-1] // 2, 300):
        x, _ = draw((2, 2 * width), dtype, device)
        ops.gated_gelu(x.detach())


def group_norm(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    one, rows = torch.ones(shape[1], device=device), torch.ones(2, *shape[:2], device=device)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(shape, device=device).to(dtype, memory_format=layout).requires_grad_()
        for scale, shift in ((None, None), rows):
            ops.group_norm_silu(x, 1, one, one, 1e-5, scale, shift).sum().backward()


def layer_norm(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    for size in (shape, (2, 3, WIDE_ROW)):
        x = draw(size, dtype, device)[0].detach()
        row = x.flatten(1, -2)[:, 0] + 1
        ops.layer_norm(x, row[0], row[0])
        ops.add_layer_norm(x, x + 1, gate=row, scale=row, shift=row)


def rotate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    for size in (shape, (2, 3, 2, WIDE_HEAD)):
        x = draw(size, dtype, device)[0].detach()[..., : size[-1] // 2 * 2]
        table = torch.ones(x.shape[1], x.shape[3], device=device)
        ops.rotate(x, table, table)
        ops.rotate(x, table[:, ::2], table[:, ::2])
        ops.rotate(x, table, table, table[0])


LAUNCHES: dict[str, Callable[[tuple[int, ...], torch.dtype, torch.device], None]] = {
    "normal": normal,
    "noising": noising,
    "loss": loss,
    "vlb": vlb,
    "update": update,
    "inner": inner,
    "gated_gelu": gated_gelu,
    "group_norm": group_norm,
    "layer_norm": layer_norm,
    "rotate": rotate,
}


def launch(name: str, device: torch.device) -> None:
    for dtype in DTYPES:
        for shape in NORM_SHAPES if name == "group_norm" else SHAPES:
            LAUNCHES[name](shape, dtype, device)


if __name__ == "__main__":
    launch(sys.argv[1], torch.device(sys.argv[2]))
