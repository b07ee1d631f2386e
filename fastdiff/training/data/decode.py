"""Image files: which there are under a folder, and how their numbers become 8 bits."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastdiff.files import need
from fastdiff.support.scalars import as_integer
from fastdiff.training.data.pictures import MODES

# How the names of image files end.
ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "ppm", "pgm", "tif", "tiff")
# What the folder of a run holds. Its samples are no data.
RUN = {"config.json", "log.csv"}
# The largest side of an image.
LARGEST = 2**15
# White in the image modes of PIL that have more than 8 bits.
DEEP = {"I;16": 65535, "I;16L": 65535, "I;16B": 65535, "I;16N": 65535, "I": 65535, "F": 1}


def is_image(path: Path) -> bool:
    """Whether a file has the name of an image."""
    return path.suffix[1:].lower() in ENDINGS


def listed(path: Path) -> tuple[list[Path], dict[Path, str]]:
    """(the files under a folder, what is left out and why), each in the order of names; without what is hidden.

    A file that is named after an image beside it, as a caption is, is left out: a.txt or a.png.json beside a.png.
    """
    files, skipped = [], {}

    def unreadable(error: OSError) -> None:
        skipped[Path(error.filename)] = str(error.strerror)

    for root, folders, names in os.walk(path, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if RUN.issubset(names) and Path(root) != path:
            skipped[Path(root)] = "the folder of a run"
            folders.clear()
            continue
        images = {owner for name in names if is_image(Path(name)) for owner in (name, os.path.splitext(name)[0])}
        for entry in (Path(root, name) for name in (*folders, *names) if not name.startswith(".")):
            if entry.stem in images and not is_image(entry) and os.path.isfile(entry):
                skipped[entry] = "goes with the image of its name"
            elif os.path.isfile(entry):
                files.append(entry)
            elif os.path.islink(entry):
                skipped[entry] = "a link to a folder" if os.path.isdir(entry) else "a link to nothing"
            elif not os.path.isdir(entry):
                skipped[entry] = "neither a file nor a folder"
    return sorted(files), dict(sorted(skipped.items()))


def image_shape(size: int | Sequence[int], channels: int) -> tuple[int, int, int]:
    """(channels, H, W) of images whose `size` is a side or (H, W). Raises TypeError or ValueError naming either."""
    sides = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(sides) != 2:
        raise ValueError(f"size: expected a side or (H, W), got {size!r}")
    height, width = (as_integer("size", side, 1, LARGEST) for side in sides)
    return as_integer("channels", channels, 1, len(MODES)), height, width


def decoded(source: str | Path | bytes | Any, size: tuple[int, int], channels: int) -> np.ndarray:
    """One image, centre-cropped to the shape of `size` and resized.

    Args:
        source: a file, its bytes, or an image of PIL.
        size: (H, W).
        channels: 1 gray, 2 gray and alpha, 3 RGB, 4 RGB and alpha.

    Returns: uint8 (channels, H, W).
    Raises: anything if it is not readable.
    """
    image_module, ops = need("PIL.Image"), need("PIL.ImageOps")
    if isinstance(source, str | Path | bytes):
        with image_module.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            upright = ops.exif_transpose(image)
    else:
        upright = ops.exif_transpose(source)
    upright = eight_bits(upright) if channels in (1, 3) else shallow(upright)
    fitted = ops.fit(upright.convert(MODES[channels]), size[::-1], image_module.Resampling.LANCZOS)
    return np.ascontiguousarray(np.array(fitted).reshape(*size, channels).transpose(2, 0, 1))


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
    image_module, image = need("PIL.Image"), shallow(image)
    if not image.has_transparency_data:
        return image.convert("L" if image.mode in ("1", "L") else "RGB")
    colours = image.convert("RGBA")
    return image_module.alpha_composite(image_module.new("RGBA", colours.size, "white"), colours).convert("RGB")


def shallow(image: Any) -> Any:
    """A PIL image as it is, or of 8 bits, "L" or "LA", for one of more: convert() would cut those off at 255.

    Raises: as `eight_bits`.
    """
    if image.mode not in DEEP:
        return image
    values, white = np.asarray(image), DEEP[image.mode]
    low, high = values.min(), values.max()
    if not 0 <= low <= high <= white:
        raise ValueError(f"mode {image.mode}: expected values from 0 to {white}, got {low} to {high}")
    if image.mode == "I" and 0 < high <= 255:
        raise ValueError(f"mode I: expected 16 bits, got values of at most {high}, which may be 8 bits")
    clear = image.info.get("transparency")
    made = need("PIL.Image").fromarray((values.astype(np.float64) * (255 / white)).round().astype(np.uint8))
    if isinstance(clear, int):
        made.putalpha(need("PIL.Image").fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return made
