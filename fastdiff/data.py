"""Training data, under a short name: all of fastdiff.training.data."""

from fastdiff.training.data import *  # noqa: F403
from fastdiff.training.data import __all__ as __all__
