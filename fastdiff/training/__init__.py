"""Training: the options of a run, its images, the loop, checkpoints, and figures of the samples."""

from fastdiff.training.build import build
from fastdiff.training.checkpoint import State, load_model
from fastdiff.training.data import Images, digits, folder, save_grid
from fastdiff.training.ema import update_ema
from fastdiff.training.evaluate import Report, frechet_distance
from fastdiff.training.loop import train
from fastdiff.training.options import DIGITS, Options, digits_options, resumed_options
from fastdiff.training.step import TrainingStep

__all__ = [
    "DIGITS",
    "Images",
    "Options",
    "Report",
    "State",
    "TrainingStep",
    "build",
    "digits",
    "digits_options",
    "folder",
    "frechet_distance",
    "load_model",
    "resumed_options",
    "save_grid",
    "train",
    "update_ema",
]
