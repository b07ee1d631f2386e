"""The networks of diffusers (0.42.1) whose resnet blocks take a time embedding: see ahead.py."""

import functools
from typing import Any

import diffusers
import torch
from diffusers.models.resnet import ResnetBlock2D

from ....support import walk
from .ahead import called
from .modulated import wrapped


def makes_ahead(kind: Any) -> Any:
    """A decorator of a class: its forward is stock's, within which blocks have what is made ahead."""
    stock = kind.__base__

    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, kind):  # `restore` has changed it since, but somebody holds this method
            return type(self).forward(self, *args, **kwargs)
        run = functools.partial(stock.forward, self)
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return run(*args, **kwargs)
        return called(self, run, args, kwargs)

    kind.forward, kind.misfit, kind.projections = forward, staticmethod(misfit), projections
    return kind


def misfit(module: Any) -> str | None:
    """See `accelerate`: within a wrapper of its forward a network stays stock's, as it is, and nothing is said."""
    return None if wrapped(module) is None else ""


def projections(network: Any) -> list[list[Any]]:
    """The layers that take one input: those of the time embedding."""
    blocks = [part for part in walk.modules(network) if isinstance(part, ResnetBlock2D)]
    return [[block.time_emb_proj for block in blocks if block.time_emb_proj is not None]]


@makes_ahead
class UNet2DModel(diffusers.UNet2DModel):
    """diffusers' network with the same parameters. `accelerate` turns one into it by its class."""


@makes_ahead
class UNet2DConditionModel(diffusers.UNet2DConditionModel):
    """As UNet2DModel."""


@makes_ahead
class ControlNetModel(diffusers.ControlNetModel):
    """As UNet2DModel."""


@makes_ahead
class UNetMotionModel(diffusers.UNetMotionModel):
    """As UNet2DModel."""


NETWORKS = [UNet2DModel, UNet2DConditionModel, ControlNetModel, UNetMotionModel]
