"""The data that a name means: a set that is known, a file of arrays, shards, a Hugging Face dataset, or a folder."""

from pathlib import Path

from torch import Tensor

from fastdiff.training.data.decode import is_image, listed
from fastdiff.training.data.packed import HuggingFace, Shards, is_hugging_face, shard_paths
from fastdiff.training.data.sources import Arrays, Folder, Images, Source, array_file, digits, mnist

# The sets that are known by name: the shape of an image.
SETS: dict[str, tuple[int, int, int]] = {"digits": (1, 8, 8), "mnist": (1, 28, 28)}
KINDS = "digits, mnist, a folder of images, a .npy or .npz file, shards in .tar files, or hf:NAME"
ARRAYS = (".npy", ".npz")
HUGGING_FACE = "hf:"


def known_set(data: str) -> tuple[Images, Tensor, Images, Tensor]:
    """The halves of a set that is known, as `digits` gives them."""
    return digits() if data == "digits" else mnist()


def is_path(data: str) -> bool:
    """Whether `data` names files rather than a set that is known, or one on a hub."""
    return data not in SETS and not data.startswith(HUGGING_FACE)


def is_missing(data: str) -> bool:
    """Whether `data` names files that are not there."""
    return is_path(data) and not Path(data).exists() and not shard_paths(data)


def array_shape(data: str) -> tuple[int, ...] | None:
    """The shape of one item, if `data` says it itself: a set that is known, or a file of arrays.

    Raises: as `open_source`.
    """
    if data in SETS:
        return SETS[data]
    return array_file(Path(data)).shape if Path(data).suffix in ARRAYS else None


def open_source(data: str, size: int | tuple[int, int], channels: int, classes: bool = False) -> Source:
    """The source that `data` names.

    Args:
        data: "digits" or "mnist", whose train half it is; "hf:NAME" or a folder of save_to_disk; a .npy or .npz file; a
            .tar file, a pattern of them, or a folder of them and no image files; or a folder of image files.
        size, channels: of the images, a side or (H, W), and 1 to 4; arrays have their own.
        classes: read labels too.

    Raises: OSError or ValueError naming what cannot be read, or has no labels; TypeError or ValueError naming `size` or
        `channels`; ImportError without the extra [data].
    """
    path = Path(data)
    if data in SETS:
        images, labels, _, _ = known_set(data)
        return Arrays(images.pixels, labels if classes else None, white=images.white)
    if data.startswith(HUGGING_FACE):
        return HuggingFace(data.removeprefix(HUGGING_FACE), size, channels, classes)
    if path.suffix in ARRAYS:
        arrays = array_file(path)
        if classes and arrays.labels is None:
            where = f"in {path.with_suffix('.labels.npy')}" if path.suffix == ".npy" else "as its array 'labels'"
            raise ValueError(f"classes: expected the labels of {path} {where}")
        if not classes:
            arrays.labels = arrays.classes = None
        return arrays
    if shards := shard_paths(data):
        if path.is_dir() and (image := next((file for file in listed(path)[0] if is_image(file)), None)):
            raise ValueError(
                f"data: expected shards or images in {path}, got both, {shards[0].name} and {image}; "
                f"name the shards as '{path}/*.tar', or move them"
            )
        return Shards(shards, size, channels, classes)
    if is_hugging_face(path):
        return HuggingFace(data, size, channels, classes)
    if path.is_file():
        raise ValueError(f"data: expected {KINDS}, got the file {path}")
    return Folder(path, size, channels, classes)
