"""The batches of a run, as its options describe them, and what is measured of its data."""

from dataclasses import replace
from pathlib import Path

import torch

from fastdiff.training.data import Arrays, Source, Stream, open_source
from fastdiff.training.data.cache import Cached
from fastdiff.training.options import Options

# Images whose numbers say how far the data spread, and how many of them are in memory at a time.
MEASURED, CHUNK = 256, 16


def open_stream(options: Options, folder: Path) -> Stream:
    """The data of a run.

    Args:
        options: of the run.
        folder: of the run, where a cache of decoded images is.

    Raises: OSError or ValueError naming what cannot be read, or has another shape than the options say.
    """
    source = open_source(options.data, options.sides, options.shape[0], options.classes)
    if tuple(source.shape) != options.shape:
        raise ValueError(f"data: expected images of {options.shape} in {options.data}, got {tuple(source.shape)}")
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


def measured(options: Options, source: Source) -> Options:
    """The options with a sigma_data that was measured, where it is left to the data; all processes find the same."""
    if options.formulation != "edm" or options.sigma_data:
        return options
    sigma_data = spread(source)
    if not sigma_data:
        raise ValueError("sigma_data: expected images that differ, to measure it; got one number in all of them")
    return replace(options, sigma_data=sigma_data)


def spread(source: Source) -> float:
    """The standard deviation of the numbers of MEASURED images, to two digits: more do not hold for other images."""
    stream = Stream(source, min(CHUNK, len(source)))
    count, sums, shift = 0, torch.zeros(2, dtype=torch.float64), None
    for step in range(min(MEASURED, len(source)) // stream.batch_size):
        values = stream.batch(step).images.double()
        shift = values.flatten()[0] if shift is None else shift  # one number everywhere gives 0 exactly
        count, sums = count + values.numel(), sums + torch.stack([((values - shift) ** k).sum() for k in (1, 2)])
    mean, square = (sums / count).tolist()
    return float(f"{max(square - mean**2, 0) ** 0.5:.2g}")
