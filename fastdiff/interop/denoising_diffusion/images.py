"""The ranges of images: [0, 1] outside, [-1, 1] inside."""

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
