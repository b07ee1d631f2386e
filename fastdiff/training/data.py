"""Training images: the digits that scikit-learn ships, or a folder of image files; and image grids."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdiff.files import need, replacing


@dataclass(frozen=True)
class Images:
    """N images in memory, `pixels` uint8 (N, C, H, W) from 0 to `white`; indexing gives float32 in [-1, 1].

    x = 2 pixel / white - 1
    """

    pixels: Tensor
    white: int = 255

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        return self.pixels[index].float() * (2 / self.white) - 1


def digits() -> tuple[Images, Tensor, Images, Tensor]:
    """The 1,797 8x8 handwritten digits of scikit-learn: train images, labels, held-out images, labels.

    The halves (898 and 899 images) are disjoint, have the same share of each class, and never change.
    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, 1998.
    """
    source = need("sklearn.datasets").load_digits()
    split = need("sklearn.model_selection").train_test_split
    every = np.arange(len(source.target))
    train, held_out = split(every, test_size=0.5, stratify=source.target, random_state=0)
    pixels = torch.from_numpy(source.images).to(torch.uint8)[:, None]
    labels = torch.from_numpy(source.target).long()
    return Images(pixels[train], 16), labels[train], Images(pixels[held_out], 16), labels[held_out]


def training_images(source: str, size: int, gray: bool) -> Images:
    """The train half of the digits for "digits", else the images of a folder."""
    return digits()[0] if source == "digits" else folder(Path(source), size, gray)


def folder(path: Path, size: int, gray: bool = False) -> Images:
    """Every image file under `path`, centre-cropped to a square and resized to (1 or 3, size, size).

    Files that are no readable images are left out, and counted in one line on stderr.
    Raises OSError where `path` is no folder that can be read, ValueError where no image is left.
    """
    image_module, ops = need("PIL.Image"), need("PIL.ImageOps")
    next(path.iterdir(), None)  # a missing folder is told in the system's own words
    files = sorted(file for file in path.rglob("*") if file.is_file())
    arrays, skipped = [], []
    for file in need("tqdm").tqdm(files, desc=f"reading {path}", unit="file", leave=False, delay=1):
        try:
            with image_module.open(file) as image:
                upright = ops.exif_transpose(image).convert("L" if gray else "RGB")
            fitted = ops.fit(upright, (size, size), image_module.Resampling.LANCZOS)
        except Exception:  # decoders of broken files raise whatever they meet
            skipped.append(file)
            continue
        arrays.append(np.asarray(fitted).reshape(size, size, -1).transpose(2, 0, 1))
    if not arrays:
        raise ValueError(f"data: no readable image among the {len(files)} files under {path}")
    if skipped:
        print(
            f"fastdiff: warning: left out {len(skipped)} of {len(files)} files that are no readable images, "
            f"the first is {skipped[0]}",
            file=sys.stderr,
        )
    return Images(torch.from_numpy(np.stack(arrays)))


def save_grid(path: Path, images: Tensor, columns: int | None = None) -> None:
    """Write images (N, C, H, W) in [-1, 1], C 1 or 3, as one PNG, near square unless `columns` says how wide; those
    below 48 pixels are magnified."""
    count, channels, height, width = images.shape
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
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
