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
    x, _ = draw(shape, dtype, device)
    for width in (x.shape[-1] // 2, 300):
        ops.gated_gelu(x.detach().flatten()[: 4 * width].view(2, 2 * width))


def group_norm(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    one, rows = torch.ones(shape[1], device=device), torch.ones(2, *shape[:2], device=device)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(shape, device=device).to(dtype, memory_format=layout).requires_grad_()
        for scale, shift in ((None, None), rows):
            ops.group_norm_silu(x, 1, one, one, 1e-5, scale, shift).sum().backward()


def layer_norm(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x, _ = draw(shape, dtype, device)
    x, row = x.detach(), x.detach()[:, 0, 0] + 1
    ops.layer_norm(x, row[0], row[0])
    ops.add_layer_norm(x, x + 1, gate=row, scale=row, shift=row)


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
}


def launch(name: str, device: torch.device) -> None:
    for dtype in DTYPES:
        for shape in NORM_SHAPES if name == "group_norm" else SHAPES:
            LAUNCHES[name](shape, dtype, device)


if __name__ == "__main__":
    launch(sys.argv[1], torch.device(sys.argv[2]))
