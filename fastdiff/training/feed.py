"""The batches of a run, as its options describe them."""

from pathlib import Path

from fastdiff.training.data import Arrays, Stream, open_source
from fastdiff.training.data.cache import Cached
from fastdiff.training.options import Options


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
