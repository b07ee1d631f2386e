"""The networks of diffusers (0.42.1) whose resnet blocks take a time embedding: see ahead.py."""

import functools
from typing import Any

import diffusers
import torch

from ....support import walk
from .ahead import called, text_layers
from .attention import Attention
from .modulated import wrapped
from .resnet import ResnetBlock2D


class EqualsStock(type):
    """The class of a class that equals its base: `from_pipe` of diffusers takes over a network by its exact type."""

    def __eq__(cls, other: object) -> bool:
        return cls is other or cls.__base__ is other

    __hash__ = type.__hash__


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
    """Lists of layers that take one input: the time embedding, and a text."""
    parts = walk.modules(network)
    blocks = [part for part in parts if isinstance(part, ResnetBlock2D) and part.time_emb_proj is not None]
    attentions = [part for part in parts if isinstance(part, Attention)]
    return [[block.time_emb_proj for block in blocks], text_layers(attentions)]


@makes_ahead
class UNet2DModel(diffusers.UNet2DModel, metaclass=EqualsStock):
    """diffusers' network with the same parameters. `accelerate` turns one into it by its class."""


@makes_ahead
class UNet2DConditionModel(diffusers.UNet2DConditionModel, metaclass=EqualsStock):
    """As UNet2DModel."""


@makes_ahead
class ControlNetModel(diffusers.ControlNetModel, metaclass=EqualsStock):
    """As UNet2DModel."""


@makes_ahead
class UNetMotionModel(diffusers.UNetMotionModel, metaclass=EqualsStock):
    """As UNet2DModel."""


NETWORKS = [UNet2DModel, UNet2DConditionModel, ControlNetModel, UNetMotionModel]
