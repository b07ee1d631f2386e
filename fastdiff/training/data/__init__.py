"""Training data: where it comes from, in which order, how it is decoded; and grids of images."""

from fastdiff.training.data.decode import eight_bits
from fastdiff.training.data.grid import save_grid
from fastdiff.training.data.opening import open_source
from fastdiff.training.data.packed import HuggingFace, Shards
from fastdiff.training.data.sources import Arrays, Folder, Images, Source, digits, folder, mnist
from fastdiff.training.data.stream import Batch, Stream

__all__ = [
    "Arrays",
    "Batch",
    "Folder",
    "HuggingFace",
    "Images",
    "Shards",
    "Source",
    "Stream",
    "digits",
    "eight_bits",
    "folder",
    "mnist",
    "open_source",
    "save_grid",
]
