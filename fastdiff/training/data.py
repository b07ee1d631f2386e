"""Training images: the digits that scikit-learn ships, or a folder of image files; and image grids."""

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.files import need, replacing
from fastdiff.support.scalars import as_integer

# White in the image modes of PIL that have more than 8 bits.
DEEP = {"I;16": 65535, "I;16L": 65535, "I;16B": 65535, "I;16N": 65535, "I": 65535, "F": 1}
# Files that a warning names.
NAMED = 3


@dataclass(frozen=True)
class Images:
    """Images in memory; indexing gives them as float32 in [-1, 1], x = 2 pixel / white - 1.

    Args:
        pixels: uint8 (N, C, H, W).
        white: the largest pixel; 0 is black.
    """

    pixels: Tensor
    white: int = 255

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        return self.pixels[index].float() * (2 / self.white) - 1


def digits() -> tuple[Images, Tensor, Images, Tensor]:
    """The 1,797 8x8 handwritten digits of scikit-learn in two halves, of 898 and 899 images.

    The halves are disjoint, have the same share of each class, and never change.

    Returns: train images, their labels, held-out images, their labels.
    Reference: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, 1998.
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
    return digits()[0] if source == "digits" else folder(source, size, gray)


def folder(path: str | Path, size: int, gray: bool = False) -> Images:
    """Every image file under a folder, centre-cropped to a square and resized.

    `eight_bits` says how a file's numbers become 8 bits. Files that it cannot read, and links to folders, are left out;
    a line on stderr counts and names them.

    Args:
        path: the folder, whose folders are read too.
        size: side of the images in pixels.
        gray: one channel instead of RGB.

    Returns: images (N, 1 or 3, size, size), in the order of their names.
    Raises: OSError if `path` is no folder that can be read; ValueError if no image is left, or for a size below 1.
    """
    size, path = as_integer("size", size, 1, 2**15), Path(path)
    next(path.iterdir(), None)  # a missing folder is reported in the system's own words
    files, skipped = _files(path)
    found, count = len(files) + len(skipped), 0
    pixels = torch.empty(len(files), 1 if gray else 3, size, size, dtype=torch.uint8)
    for file in need("tqdm").tqdm(files, desc=f"reading {path}", unit="file", leave=False, delay=1):
        try:
            pixels[count] = _read(file, size, gray)
        except Exception as error:  # decoders of broken files raise whatever they meet
            skipped[file] = " ".join(str(error).split()) or type(error).__name__
        else:
            count += 1
    if skipped:
        names = "; ".join(f"{file}: {reason}" for file, reason in list(skipped.items())[:NAMED])
        more = ", ..." if len(skipped) > NAMED else ""
        print(f"fastdiff: warning: left out {len(skipped)} of {found} files: {names}{more}", file=sys.stderr)
    if not count:
        raise ValueError(f"data: no readable image among the {found} files under {path}")
    return Images(pixels[:count])


def _files(path: Path) -> tuple[list[Path], dict[Path, str]]:
    """(the files under a folder, what is left out and why), each in the order of names."""
    files, skipped = [], {}

    def unreadable(error: OSError) -> None:
        skipped[Path(error.filename)] = str(error.strerror)

    for root, folders, names in os.walk(path, onerror=unreadable):
        for entry in (Path(root, name) for name in (*folders, *names)):
            if os.path.isfile(entry):
                files.append(entry)
            elif os.path.islink(entry):
                skipped[entry] = "a link to a folder" if os.path.isdir(entry) else "a link to nothing"
            elif not os.path.isdir(entry):
                skipped[entry] = "neither a file nor a folder"
    return sorted(files), dict(sorted(skipped.items()))


def _read(file: Path, size: int, gray: bool) -> Tensor:
    """One image, uint8 (1 or 3, size, size). Raises anything if it is not readable."""
    image_module, ops = need("PIL.Image"), need("PIL.ImageOps")
    with image_module.open(file) as image:
        upright = eight_bits(ops.exif_transpose(image)).convert("L" if gray else "RGB")
    fitted = ops.fit(upright, (size, size), image_module.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted).reshape(size, size, -1)).permute(2, 0, 1)


def eight_bits(image: Any) -> Any:
    """A PIL image of 8 bits, "L" or "RGB", that looks like `image`.

    Each mode has its own range of black to white:

        1, L, P, RGB, CMYK, YCbCr, ...   8 bits or fewer
        I;16                             0 to 65535
        I (32 bits)                      0 to 65535, which is how 16-bit images are widened
        F                                0 to 1

    Transparent images (LA, PA, RGBA, and those that name a transparent colour) are laid on white.

    Raises: ValueError for I or F with values outside their range, or in I with none above 255, which may be 8 bits.
    """
    image_module = need("PIL.Image")
    if image.mode not in DEEP:
        if not image.has_transparency_data:
            return image.convert("L" if image.mode in ("1", "L") else "RGB")
        colours = image.convert("RGBA")
        return image_module.alpha_composite(image_module.new("RGBA", colours.size, "white"), colours).convert("RGB")
    values, white = np.asarray(image), DEEP[image.mode]
    low, high = values.min(), values.max()
    if not 0 <= low <= high <= white:
        raise ValueError(f"mode {image.mode}: expected values from 0 to {white}, got {low} to {high}")
    if image.mode == "I" and 0 < high <= 255:
        raise ValueError(f"mode I: expected 16 bits, got values of at most {high}, which may be 8 bits")
    clear = image.info.get("transparency")
    shades = np.where(values == clear, white, values) if isinstance(clear, int) else values
    return image_module.fromarray((shades.astype(np.float64) * (255 / white)).round().astype(np.uint8))


def save_grid(path: str | Path, images: Tensor, columns: int | None = None) -> None:
    """Write images as one PNG, in reading order. Images below 48 pixels are magnified.

    Args:
        path: the file.
        images: (N, C, H, W) in [-1, 1], C 1 or 3.
        columns: how many beside each other; None makes the picture nearly square.

    Raises: TypeError or ValueError for anything else.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a tensor, got {type(images).__name__}")
    if columns is not None:
        columns = as_integer("columns", columns, 1, 2**15)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.numel():
        raise ValueError(f"images: expected (N, 1 or 3, H, W) with N, H and W of at least 1, got {tuple(images.shape)}")
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
