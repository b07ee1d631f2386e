"""What flags of the command mean: labels, and where the data are."""

from pathlib import Path
from typing import Any

from fastdiff.support.run_file import RunFile
from fastdiff.training.data.opening import array_shape, is_missing, is_path
from fastdiff.training.ranks import leads


def of_arrays(data: str) -> dict[str, Any]:
    """The options that a file of arrays decides. Raises ValueError if they are no images."""
    shape = array_shape(data)
    if shape is None or not is_path(data):
        return {}
    if len(shape) != 3:
        raise ValueError(
            f"data: expected images (N, C, H, W) in {data}, got items of {shape}; see fastdiff.data.Stream"
        )
    if shape[2] <= 4 < min(shape[:2]):
        raise ValueError(
            f"data: expected images (N, C, H, W) in {data}, got items of {shape}, whose channels come last"
        )
    return {"image_channels": shape[0], "size": list(shape[1:])}


def report_data(data: str, before: str) -> None:
    """Say that a run goes on with other images. Raises ValueError if they are missing."""
    if is_missing(data):
        raise ValueError(f"data: {data} is missing; say with --data where the images are now")
    if data != before and leads():
        print(f"fastdiff: the run was started with the images of {before} and goes on with those of {data}")


def label_of(label: str | None, checkpoint: Path) -> int | None:
    """The number that --label gives, or the number of the class that it names."""
    if label is None:
        return None
    classes = RunFile.open(checkpoint).classes
    if label in classes:
        return classes.index(label)
    if not label.isdecimal():
        raise ValueError(f"--label: expected a number or one of {', '.join(classes)}, got {label!r}")
    return int(label)
