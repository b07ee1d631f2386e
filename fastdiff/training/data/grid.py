"""Grids of images, as PNG."""

import math
from pathlib import Path

import torch
from torch import Tensor

from fastdiff.files import need, replacing
from fastdiff.support.scalars import as_integer
from fastdiff.training.data.pictures import as_bytes


def save_grid(path: str | Path, images: Tensor, columns: int | None = None) -> None:
    """Write images as one PNG, in reading order. Images below 48 pixels are magnified.

    Args:
        path: the file.
        images: (N, C, H, W) in [-1, 1], C 1 or 3.
        columns: how many stand side by side; None makes the picture nearly square.

    Raises: TypeError or ValueError for anything else.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a tensor, got {type(images).__name__}")
    if columns is not None:
        columns = as_integer("columns", columns, 1, 2**15)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.numel():
        raise ValueError(f"images: expected (N, 1 or 3, H, W) with N, H and W of at least 1, got {tuple(images.shape)}")
    count, channels, height, width = images.shape
    pixels = as_bytes(images)
    zoom = max(1, 48 // max(height, width))
    pixels = pixels.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    pixels = torch.nn.functional.pad(pixels, (1, 1, 1, 1), value=64)  # a thin frame tells neighbours apart
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = pixels.new_full((rows * columns, *pixels.shape[1:]), 64)
    grid[:count] = pixels
    grid = grid.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2)
    picture = grid.reshape(rows * pixels.shape[2], columns * pixels.shape[3], channels).numpy()
    image = need("PIL.Image").fromarray(picture[:, :, 0] if channels == 1 else picture)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")
