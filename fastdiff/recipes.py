"""Recipes of training around the loss of any formulation; each is a few lines to read."""

from typing import Any

import torch
from torch import Tensor

from . import ops
from .diffusion import Diffusion
from .ops.checks import as_seed, check_floating
from .reference import work_dtype
from .support.scalars import as_number


def offset_noise(
    x0: Tensor, strength: float = 0.1, *, seed: int | Tensor | None = None, sample_ids: Tensor | None = None
) -> Tensor:
    """z + strength z_c with z ~ N(0, I) and z_c ~ N(0, 1) of each channel: images may become darker or brighter.

        loss = ddpm(x0, noise=offset_noise(x0))

    Args:
        x0: (B, C, ...), data.
        strength: finite, at least 0.
        seed: of the noise; drawn if None.
        sample_ids: (B,), the number of each sample in the noise of the seed; 0..B-1 if None.

    Returns: (B, C, ...), float32 or float64.
    Reference: Guttenberg 2023, "Diffusion with offset noise".
    """
    check_floating("x0", x0)
    if x0.ndim < 2:
        raise ValueError(f"x0: expected channels, (B, C, ...), got shape {tuple(x0.shape)}")
    if not 0 <= as_number("strength", strength) < float("inf"):
        raise ValueError(f"strength: expected a finite number of at least 0, got {strength}")
    same: dict[str, Any] = {"stream": ops.FORWARD, "sample_ids": sample_ids, "device": x0.device}
    same |= {"seed": as_seed(seed, x0.device), "dtype": work_dtype(x0.dtype)}
    z, offset = ops.normal(x0.shape, **same), ops.normal(x0.shape[:2], step=1, **same)
    return z.add_(offset.reshape(*offset.shape, *[1] * (x0.ndim - 2)), alpha=strength)


def drop_labels(labels: Tensor, none: int, share: float = 0.1) -> Tensor:
    """Labels (B,), of which some at random become `none`, the class without a condition, for guidance.

        loss = ddpm(x0, class_labels=drop_labels(labels, none=10))

    Args:
        labels: (B,), integers.
        none: the label that stands for no condition.
        share: the probability of each label to be dropped, in [0, 1].

    Raises: TypeError or ValueError, naming the argument.
    Reference: Ho & Salimans 2022, arXiv:2207.12598, algorithm 1.
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels: expected a tensor of integers, got {got}")
    _check_share(share)
    dropped = torch.rand(labels.shape, device=labels.device) < share
    return labels.masked_fill(dropped, none)


def self_conditioned(
    diffusion: Diffusion,
    x0: Tensor,
    *,
    name: str = "x_self_cond",
    share: float = 0.5,
    t: float | Tensor | None = None,
    seed: int | Tensor | None = None,
    noise: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The training loss of a network that is told its own estimate of x_0, or zeros.

        x0hat = predict_x0(x_t, t, zeros), without a gradient
        loss  = of model(x_t, t, x0hat) for a share of the samples, of model(x_t, t, zeros) for the others

    Args:
        diffusion: the formulation.
        x0: (B, ...), data.
        name: of the model's argument, (B, ...).
        share: the probability of each sample to be told, in [0, 1].
        t, seed, noise, options: as in Diffusion.forward.

    Reference: Chen et al. 2023, arXiv:2208.04202, algorithm 1.
    """
    _check_share(share)
    t = diffusion.checked_times("x0", x0, t)
    seed = as_seed(seed, x0.device) if noise is None else None
    table, row = diffusion.noising_rows(t, x0.dtype)
    x_t = ops.noising(x0, row, table, seed=seed, noise=noise)
    shared = {key: value for key, value in options.items() if key not in ("mask", "reduction")}
    with torch.no_grad():
        estimate = diffusion.predict_x0(x_t, t, **{**shared, name: torch.zeros_like(x_t)})
    told = torch.rand(len(x0), device=x0.device) < share
    estimate = torch.where(told.reshape(-1, *[1] * (x0.ndim - 1)), estimate, 0.0)
    loss: Tensor = diffusion(x0, t=t, seed=seed, noise=noise, **options, **{name: estimate})
    return loss


def _check_share(share: float) -> None:
    if not 0 <= as_number("share", share) <= 1:
        raise ValueError(f"share: expected a number from 0 to 1, got {share}")
