"""Recipes of training around the loss of any formulation; each is a few lines to read."""

from typing import Any

import torch
from torch import Tensor

from . import ops
from .arguments import check_loss
from .denoiser import TOLD
from .diffusion import Diffusion
from .ops.checks import as_sample_ids, as_seed, check_dense, check_floating
from .reference import work_dtype
from .support import transforms
from .support.scalars import as_integer, as_not_negative, as_share

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


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
    Raises: TypeError or ValueError, naming the argument.
    Reference: Guttenberg 2023, "Diffusion with offset noise".
    """
    check_floating("x0", x0)
    if x0.ndim < 2:
        raise ValueError(f"x0: expected channels, (B, C, ...), got shape {tuple(x0.shape)}")
    as_not_negative("strength", strength)
    ids = as_sample_ids(sample_ids, x0.shape[0], x0.device)
    same: dict[str, Any] = {"stream": ops.FORWARD, "sample_ids": ids, "device": x0.device}
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
    as_share("share", share)
    if not isinstance(labels, Tensor) or labels.dtype not in INTEGERS:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels: expected a tensor of integers, got {got}")
    check_dense("labels", labels)
    limits = torch.iinfo(labels.dtype)
    none = as_integer("none", none, limits.min, limits.max)
    dropped = torch.rand(labels.shape, device=labels.device) < share
    return labels.masked_fill(dropped, none)


def own_estimate(
    diffusion: Diffusion,
    x0: Tensor,
    t: Tensor,
    *,
    name: str = TOLD,
    seed: int | Tensor | None = None,
    sample_ids: Tensor | None = None,
    noise: Tensor | None = None,
    **model_kwargs: Any,
) -> Tensor:
    """The network's estimate of x_0 that self-conditioned training tells it, (B, ...), without a gradient.

        x0hat = predict_x0(x_t, t, zeros),      x_t as in the loss of the same arguments

    Args: as of `self_conditioned`.

    Raises: TypeError or ValueError, naming the argument.
    """
    x_t = diffusion.noised(x0, t, *check_loss(x0, seed, sample_ids, noise), noise).x_t
    with transforms.without_gradients():
        return diffusion.predict_x0(x_t, t, **{**model_kwargs, name: torch.zeros_like(x_t)})


def self_conditioned(
    diffusion: Diffusion,
    x0: Tensor,
    *,
    name: str = TOLD,
    share: float = 0.5,
    t: float | Tensor | None = None,
    seed: int | Tensor | None = None,
    noise: Tensor | None = None,
    sample_ids: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The training loss of a network that is told its own estimate of x_0, or zeros.

        x0hat = predict_x0(x_t, t, zeros), without a gradient
        loss  = of model(x_t, t, x0hat) for a share of the samples, of model(x_t, t, zeros) for the others

    A network that has the attribute `self_condition`, as UNet(self_condition=True) has, is told the estimate of the
    step before in sampling too. Bounds, likelihoods and the sampler "ode" ask it with zeros.

    Args:
        diffusion: the formulation.
        x0: (B, ...), data.
        name: of the model's argument, (B, ...).
        share: the probability of each sample to get its estimate, in [0, 1].
        t, seed, noise, sample_ids, options: as in Diffusion.forward.

    Raises: TypeError or ValueError, naming the argument.
    Reference: Chen et al. 2023, arXiv:2208.04202, algorithm 1.
    """
    as_share("share", share)
    if not isinstance(diffusion, Diffusion):
        raise TypeError(f"diffusion: expected a fastdiff Diffusion, got {type(diffusion).__name__}")
    if t is None and diffusion.training and getattr(diffusion, "importance", None) is not None:
        raise ValueError("t: expected levels with importance sampling, which only the loss draws by, got None")
    checked = (options.get("mask"), options.get("reduction", "mean"))
    seed, sample_ids = check_loss(x0, seed, sample_ids, noise, *checked)
    t = diffusion.checked_times("x0", x0, t)
    seed = as_seed(seed, x0.device) if noise is None else None
    drawn: dict[str, Any] = {"seed": seed, "noise": noise, "sample_ids": sample_ids}
    shared = {key: value for key, value in options.items() if key not in ("mask", "reduction")}
    estimate = own_estimate(diffusion, x0, t, name=name, **drawn, **shared)
    given = torch.rand(x0.shape[0], device=x0.device) < share
    estimate = torch.where(given.reshape(-1, *[1] * (x0.ndim - 1)), estimate, 0.0)
    loss: Tensor = diffusion(x0, t=t, **drawn, **options, **{name: estimate})
    return loss
