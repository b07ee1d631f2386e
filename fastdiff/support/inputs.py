"""What the reference networks take and check: images, timesteps, labels and estimates."""

from numbers import Real

import torch
from torch import Tensor

from .shapes import fits


def check_image(x: Tensor, channels: int, factor: int) -> None:
    """x is a floating tensor (B, C, H, W) of these channels, its sides multiples of a factor. Raises: ValueError."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() != 4:
        raise ValueError(f"x: expected a floating tensor (B, C, H, W), got {describe(x)}")
    _, c, h, w = x.shape
    if c != channels or h % factor or w % factor or not h * w:
        raise ValueError(f"x: expected C = {channels}, H and W multiples of {factor} above 0, got {describe(x)}")


def check_labels(labels: Tensor | None, batch: int) -> None:
    """Labels are an integer tensor (B,). Raises: ValueError."""
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int32, torch.int64) or labels.shape != (batch,):
        raise ValueError(f"class_labels: expected an integer tensor ({batch},), got {describe(labels)}")


def timesteps_of(t: Tensor | float | None, x: Tensor) -> Tensor:
    """t as a tensor (B,) or (1,) on x's device. Raises: ValueError for any other."""
    if isinstance(t, Tensor):
        if t.dim() > 1 or (t.dim() == 1 and not fits(t.shape[0], x.shape[0])):
            raise ValueError(f"t: expected shape ({x.shape[0]},), (1,) or (), got {describe(t)}")
        return t.to(x.device).reshape(-1)
    if not isinstance(t, Real):
        raise ValueError(f"t: expected a tensor or a number, got {t!r}")
    return torch.full((1,), float(t), dtype=torch.float32, device=x.device)  # a fill, not a copy from the host


def describe(value: object) -> str:
    """The type and shape of a tensor, for errors."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def with_estimate(x: Tensor, estimate: Tensor | None, taken: bool) -> Tensor:
    """x (B, C, ...) with an estimate of x_0, zeros if None, before it: (B, 2 C, ...). Just x if none is taken.

    Raises: ValueError for an estimate that is not taken, or of another shape than x.
    """
    if estimate is not None and not taken:
        raise ValueError("x_self_cond: expected None, as self_condition is False, got a tensor")
    if estimate is not None and (not isinstance(estimate, Tensor) or estimate.shape != x.shape):
        raise ValueError(f"x_self_cond: expected shape {tuple(x.shape)}, got {describe(estimate)}")
    return torch.cat((torch.zeros_like(x) if estimate is None else estimate.to(x.dtype), x), 1) if taken else x
