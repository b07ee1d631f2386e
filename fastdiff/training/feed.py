"""The batches of a run, as its options describe them, and what is measured and noted of its data."""

import hashlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastdiff.training.data import Arrays, HuggingFace, Source, Stream, open_source
from fastdiff.training.data.cache import Cached
from fastdiff.training.data.opening import is_path
from fastdiff.training.options import Options
from fastdiff.training.ranks import leads

# Images whose numbers say how far the data spread, and how many of them are in memory at a time.
MEASURED, CHUNK = 256, 16
# The largest standard deviation that data around [-1, 1], or latents, may have.
WIDE = 10.0


def open_stream(options: Options, folder: Path) -> Stream:
    """The data of a run.

    Args:
        options: of the run.
        folder: of the run, where a cache of decoded images is.

    Raises: OSError or ValueError naming what cannot be read, or has another shape than the options say. ValueError for
        the run's own folder, whose grids are no data.
    """
    if is_path(options.data) and Path(options.data).resolve() == folder.resolve():
        raise ValueError(f"data: expected another folder than that of the run, got {options.data}")
    source = open_source(options.data, options.sides, options.shape[0], options.classes)
    if tuple(source.shape) != options.shape:
        raise ValueError(f"data: expected images of {options.shape} in {options.data}, got {tuple(source.shape)}")
    if isinstance(source, Arrays) and leads():
        warn_if_wide(source)
    if options.cache and not isinstance(source, Arrays):  # arrays are decoded
        source = Cached(source, folder)
    return Stream(
        source,
        options.batch_size,
        options.seed,
        flip=options.flip,
        label_dropout=options.label_dropout,
        workers=0 if isinstance(source, Arrays) else options.workers,
    )


def noted(source: Source, data: str) -> dict[str, Any]:
    """What a checkpoint says of its data: how many, and a hash of their names and of their labels.

    Names are those below the folder `data`, which may be moved. No image is opened, so new pixels go unseen.
    """
    names, folder = hashlib.sha256(), str(Path(data))
    for index in () if isinstance(source, Arrays | HuggingFace) else range(len(source)):  # whose names are numbers
        names.update(source.name(index).removeprefix(folder).encode("utf-8", "surrogateescape") + b"\0")
    labels = "" if source.labels is None else hashlib.sha256(source.labels.tobytes()).hexdigest()
    return {"images": len(source), "names": names.hexdigest(), "labels": labels}


def changed(before: dict[str, Any], now: dict[str, Any], step: int) -> str:
    """How the data differ from those until a step, in words; "" if they do not, or if that was not noted."""
    if before == now or before.keys() != now.keys():
        return ""
    if before["images"] != now["images"]:
        return f"{before['images']} images until step {step}, {now['images']} now; they come in another order"
    if before["names"] != now["names"]:
        return f"the images have other names than until step {step}; they come in another order"
    return f"the images have other labels than until step {step}"


def warn_if_wide(source: Source) -> None:
    """Say on stderr that floating numbers are far from [-1, 1]: those of 0 to 255 would train nothing of use."""
    if source.read(0).is_floating_point() and (deviation := spread(source, CHUNK)) > WIDE:
        wide = f"expected floating numbers around [-1, 1], got a standard deviation of {deviation:g}"
        print(f"fastdiff: warning: data: {wide}; only uint8 is scaled", file=sys.stderr)


def measured(options: Options, source: Source) -> Options:
    """The options; edm's sigma_data is measured on the data if it is 0. All processes find the same."""
    if options.formulation != "edm" or options.sigma_data:
        return options
    sigma_data = spread(source)
    if not sigma_data:
        raise ValueError("sigma_data: expected images that differ, to measure it; got one number in all of them")
    return replace(options, sigma_data=sigma_data)


def spread(source: Source, images: int = MEASURED) -> float:
    """The standard deviation of the numbers of some images, to two digits: more do not hold for other images."""
    stream = Stream(source, min(CHUNK, len(source)))
    steps = range(min(images, len(source)) // stream.batch_size)
    parts = [torch.var_mean(stream.batch(step).images.double(), correction=0) for step in steps]
    variances, means = map(torch.stack, zip(*parts, strict=True))  # of parts of one size
    return float(f"{(variances.mean() + means.var(correction=0)).sqrt().item():.2g}")
