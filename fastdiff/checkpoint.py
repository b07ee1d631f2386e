"""Checkpoints of training runs live in fastdiff.training.checkpoint; this old path keeps working."""

from fastdiff.training.checkpoint import State, load, load_model, save

__all__ = ["State", "load", "load_model", "save"]
