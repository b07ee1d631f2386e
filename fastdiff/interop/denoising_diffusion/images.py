"""Images, [0, 1] outside and [-1, 1] inside, and the checks that several classes have."""

from typing import Any

from torch import Tensor


def normalize_to_neg_one_to_one(img: Tensor) -> Tensor:
    """[0, 1] to [-1, 1]."""
    return img * 2 - 1


def unnormalize_to_zero_to_one(t: Tensor) -> Tensor:
    """[-1, 1] to [0, 1]."""
    return (t + 1) * 0.5


def identity(t: Tensor) -> Tensor:
    """Images that need no other range."""
    return t


def check_images(img: Tensor, size: Any, channels: int | None = None) -> None:
    """img is (B, C, H, W) of this size, (H, W) or one number for both, and if given of this many channels."""
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    if img.ndim != 4 or tuple(img.shape[2:]) != (height, width):
        raise ValueError(f"img: expected (B, C, H, W), H and W {(height, width)}, got {tuple(img.shape)}")
    if channels is not None and img.shape[1] != channels:
        raise ValueError(f"img: expected {channels} channels, got {img.shape[1]}")


def check_reduction(loss_reduction: str) -> None:
    """loss_reduction is a name that stock knows."""
    if loss_reduction not in ("mean", "none"):
        raise ValueError(f"loss_reduction: expected 'mean' or 'none', got {loss_reduction!r}")
