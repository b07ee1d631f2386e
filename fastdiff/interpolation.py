"""Samples between two samples, by the noise that they come from."""

from typing import Any

import torch
from torch import Tensor, nn

from .diffusion import Diffusion
from .ops.checks import check_floating, check_like
from .schedule import as_float64
from .support import transforms
from .support.shapes import flat


def along_the_circle(
    diffusion: Diffusion, x0: Tensor, x1: Tensor, weight: float | Tensor, *, steps: Any = None, **model_kwargs: Any
) -> Tensor:
    """What comes from the noise between the noise of two samples: encodes both, mixes by slerp, and decodes.

    Args:
        diffusion: with which to encode and decode, by sampler "ddim". Nothing is drawn.
        x0, x1: (B, ...), the samples.
        weight: of x1, in [0, 1], a number or (B,).
        steps: as in Diffusion.sample.
        model_kwargs: the model's further arguments.

    Raises: ValueError or TypeError, naming the argument.
    Reference: Song et al. 2021, arXiv:2010.02502, section 5.3.
    """
    mix = mixing_weight(x0, x1, weight)
    z0, z1 = (diffusion.encode(x, steps=steps, **model_kwargs) for x in (x0, x1))
    x_T = slerp(z0, z1, mix.to(z0))
    return diffusion.sample(tuple(x0.shape), steps=steps, sampler="ddim", x_T=x_T, **model_kwargs)


def mixing_weight(x0: Tensor, x1: Tensor, weight: float | Tensor) -> Tensor:
    """The weight of x1 as float32 (1 or B, 1, ...). ValueError or TypeError if it is not in [0, 1], or x1 unlike x0."""
    check_floating("x0", x0)
    check_like("x1", x1, x0)
    given = weight if isinstance(weight, Tensor) else as_float64("weight", weight)
    mix = torch.as_tensor(given, dtype=torch.float32, device=x0.device).reshape(-1, *[1] * (x0.ndim - 1))
    seen = transforms.bare(mix)
    if len(mix) not in (1, len(x0)) or (seen is not None and not bool(((seen >= 0) & (seen <= 1)).all())):
        raise ValueError(f"weight: expected one or {len(x0)} numbers in [0, 1], got {weight}")
    return mix


def slerp(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """sin((1 - w) h) / sin h x + sin(w h) / sin h y, with h the angle between each pair of samples.

    Args:
        x, y: (B, ...).
        weight: w, (1 or B, 1, ...), of y.
    """
    cosine = nn.functional.cosine_similarity(flat(x), flat(y)).clamp(-1, 1)
    angle = cosine.acos().reshape(-1, *[1] * (x.ndim - 1))
    near = angle.sin() < 1e-4  # the same direction: the arc is its chord
    divisor = torch.where(near, 1.0, angle.sin())
    first = torch.where(near, 1 - weight, ((1 - weight) * angle).sin() / divisor)
    second = torch.where(near, weight, (weight * angle).sin() / divisor)
    return first * x + second * y
