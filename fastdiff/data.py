"""Training images live in fastdiff.training.data; this old path keeps working."""

from fastdiff.training.data import Images, digits, folder, save_grid

__all__ = ["Images", "digits", "folder", "save_grid"]
