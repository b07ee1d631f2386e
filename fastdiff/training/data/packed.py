"""Images that are packed: WebDataset shards, read at random by an index of their members, and Hugging Face datasets."""

import glob
import itertools
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.files import need
from fastdiff.training.data.decode import ENDINGS, decoded, image_shape
from fastdiff.training.data.sources import Names, numbered_classes, stamped


class Shards:
    """WebDataset shards, uncompressed tar files: KEY.jpg (or .png, ...) is an image and KEY.cls its label.

    The tar headers are read once. Then any image is read by its place, so that the order is that of every other source.

    Args:
        paths: the tar files.
        size: a side, or (H, W).
        channels: 1 gray, 2 gray and alpha, 3 RGB, 4 RGB and alpha.
        classes: read the labels too, integers from 0 in text.

    Raises: OSError if one cannot be read; ValueError naming it if it is no tar file, is compressed, holds no image or,
        with `classes`, an image without a label.
    """

    white = 255

    def __init__(self, paths: list[Path], size: int | tuple[int, int], channels: int, classes: bool = False) -> None:
        self.shape = image_shape(size, channels)
        self._size, self._channels = self.shape[1:], channels
        self._shards, names, places, labels = Names([str(path) for path in paths]), [], [], []
        for number, path in enumerate(paths):
            for key, (start, length, label) in _members(path, classes).items():
                names.append(f"{path}: {key}")
                places.append((number, start, length))
                labels.append(label)
        if not names:
            shown = ", ".join(map(str, paths[:3])) or "no shard"
            raise ValueError(f"data: expected shards with images, got none in {shown}")
        self._names, self._places = Names(names), np.array(places, np.int64)
        self._stamps: list[str] = [stamped(path) for path in paths]
        self.labels = np.array(labels, np.int64) if classes else None
        self.classes = numbered_classes(max(labels)) if classes else None

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> Tensor:
        number, start, length = self._places[index]
        with open(self._shards[number], "rb") as file:
            file.seek(start)
            return torch.from_numpy(decoded(file.read(length), self._size, self._channels))

    def name(self, index: int) -> str:
        return self._names[index]

    def stamp(self, index: int) -> str:
        return self._stamps[int(self._places[index][0])]


def _members(path: Path, classes: bool) -> dict[str, tuple[int, int, int]]:
    """(start, length, label) of the images of a shard by key; label -1 without `classes`."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                key, _, ending = member.name.rpartition(".")
                if member.isfile() and ending.lower() in ENDINGS:
                    images[key] = (member.offset_data, member.size)
                elif member.isfile() and ending == "cls" and classes:
                    content = shard.extractfile(member)
                    labels[key] = int(content.read()) if content else -1
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(f"{path} is not an uncompressed tar file of a WebDataset: {error}") from error
    # A key ends at the first dot of a name: KEY.mask.png is another part of KEY, unless there is no image KEY.png.
    parts = {key for key in images if (dot := key.find(".", key.rfind("/") + 1)) > 0 and key[:dot] in images}
    images = {key: place for key, place in images.items() if key not in parts}
    for key in images if classes else ():
        if labels.get(key, -1) < 0:
            raise ValueError(f"{path}: {key} has no label from 0 in {key}.cls")
    return {key: (*place, labels.get(key, -1)) for key, place in images.items()}


def shard_paths(data: str) -> list[Path]:
    """The shards that `data` names; none if it names something else.

    A tar file, a folder of them, or a pattern as in train-*.tar or train-{000..127}.tar.
    """
    path = Path(data)
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    if path.suffix != ".tar":
        return []
    if path.is_file():
        return [path]
    texts = re.split(r"\{(\d+)\.\.(\d+)\}", data)  # text, first, last, text, ...
    ranges = [
        [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
        for first, last in zip(texts[1::3], texts[2::3], strict=True)
    ]
    if not ranges:
        return sorted(map(Path, glob.glob(data)))
    texts = texts[::3]
    return [
        Path("".join(text + number for text, number in zip(texts, (*numbers, ""), strict=True)))
        for numbers in itertools.product(*ranges)
    ]


class HuggingFace:
    """The train split of a dataset of the library `datasets`: a column of images, and for classes one of labels.

    Args:
        data: a folder written by save_to_disk, or a name that load_dataset knows.
        size: a side, or (H, W).
        channels: 1 gray, 2 gray and alpha, 3 RGB, 4 RGB and alpha.
        classes: read the labels too, the first ClassLabel column.

    Raises: ImportError without the extra [data]; ValueError if it has no such column.
    """

    white = 255

    def __init__(self, data: str, size: int | tuple[int, int], channels: int, classes: bool = False) -> None:
        self.shape = image_shape(size, channels)
        datasets = need("datasets", "data")
        loaded = datasets.load_from_disk(data) if Path(data).is_dir() else datasets.load_dataset(data)
        if isinstance(loaded, dict) and "train" not in loaded:
            raise ValueError(f"data: {data} has no split train, it has {', '.join(loaded)}")
        rows: Any = loaded["train"] if isinstance(loaded, dict) else loaded
        columns = {type(feature).__name__: name for name, feature in reversed(rows.features.items())}
        for kind in ("Image", "ClassLabel")[: 1 + classes]:
            if kind not in columns:
                raise ValueError(f"data: {data} has no column of type {kind}, it has {', '.join(rows.features)}")
        self._size, self._channels, self._data = self.shape[1:], channels, data
        self._images = rows.select_columns(columns["Image"]).cast_column(columns["Image"], datasets.Image(decode=False))
        self._column = columns["Image"]
        self._stamp = " ".join(stamped(file["filename"]) for file in rows.cache_files)
        self.labels = np.array(rows[columns["ClassLabel"]], np.int64) if classes else None
        self.classes = list(rows.features[columns["ClassLabel"]].names) if classes else None
        if self.labels is not None and self.labels.min() < 0:
            raise ValueError(f"data: {data} has rows without a label")

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> Tensor:
        image = self._images[index][self._column]
        source = image["path"] if image["bytes"] is None else image["bytes"]
        return torch.from_numpy(decoded(source, self._size, self._channels))

    def name(self, index: int) -> str:
        return f"{self._data}: row {index}"

    def stamp(self, _: int) -> str:
        return self._stamp


def is_hugging_face(path: Path) -> bool:
    """Whether a folder was written by save_to_disk of `datasets`."""
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()
