"""`accelerate` and `restore`: fused operations inside an existing pipeline or network, and back."""

import importlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn


def accelerate(target: Any) -> list[str]:
    """Put the fused operations into a pipeline of diffusers, or into a network, in place. Returns the dotted names of
    what was replaced; nothing is printed.

    - GroupNorm, the scale and shift of the time embedding, and SiLU of every ResnetBlock2D become one operation
      (`ops.group_norm_silu`): in UNet2DModel, UNet2DConditionModel, AutoencoderKL and whatever else is made of them.
      Parameters, their names and hooks on the blocks stay. Blocks with another activation or norm, or with hooks on
      their norms, which would not be called, are left as they are.
    - The scheduler of a pipeline becomes that of fastdiff.interop.diffusers with the same configuration and state,
      where there is one of its class. It is another object: take it from the pipeline.

    The Unet of denoising-diffusion-pytorch 2 has RMSNorm in its blocks and nothing is replaced in it. A call on what
    was accelerated already replaces nothing. TypeError for anything but a pipeline or an nn.Module.
    """
    done = []
    for name, network in _networks(target):
        for inner, block in network.named_modules():
            if _fits(block):
                block.__class__ = _fused().ResnetBlock2D
                done.append(".".join(filter(None, (name, inner))))
    scheduler = None if isinstance(target, nn.Module) else target.components.get("scheduler")
    if type(scheduler).__module__.startswith("diffusers."):  # otherwise it may not be installed
        ours = {kind.stock: kind for kind in importlib.import_module(".diffusers", __package__).SCHEDULERS}
        if type(scheduler) in ours:
            target.scheduler = _become(ours[type(scheduler)], scheduler)
            done.append("scheduler")
    return done


def restore(target: Any) -> list[str]:
    """Undo `accelerate`: blocks and scheduler are of their classes of diffusers again. Returns the dotted names of what
    was put back."""
    done = []
    for name, network in _networks(target):
        for inner, block in network.named_modules():
            if _diffusers_resnet() and type(block) is _fused().ResnetBlock2D:
                block.__class__ = _diffusers_resnet().ResnetBlock2D
                done.append(".".join(filter(None, (name, inner))))
    scheduler: Any = None if isinstance(target, nn.Module) else target.components.get("scheduler")
    if type(scheduler).__module__ == f"{__package__}.diffusers":
        target.scheduler = _become(type(scheduler).stock, scheduler)
        done.append("scheduler")
    return done


def _networks(target: Any) -> Iterator[tuple[str, nn.Module]]:
    """The networks of a pipeline with their names, or the one that is given."""
    if isinstance(target, nn.Module):
        yield "", target
    elif isinstance(getattr(target, "components", None), dict):
        yield from ((name, part) for name, part in target.components.items() if isinstance(part, nn.Module))
    else:
        raise TypeError(f"target: expected a pipeline of diffusers or an nn.Module, got {type(target).__name__}")


def _diffusers_resnet() -> Any:
    """The module of diffusers, if anything has imported it: without it no network has its blocks."""
    return sys.modules.get("diffusers.models.resnet")


def _fused() -> Any:
    return importlib.import_module(".diffusers.resnet", __package__)


def _fits(block: nn.Module) -> bool:
    """Whether the block is a ResnetBlock2D that does what the fused one does."""
    if _diffusers_resnet() is None or type(block) is not _diffusers_resnet().ResnetBlock2D:
        return False
    parts: Any = block
    norms = [parts.norm1, parts.norm2]
    return (
        type(parts.nonlinearity) is nn.SiLU
        and all(type(n) is nn.GroupNorm and n.affine for n in norms)
        and not any("forward" in m.__dict__ for m in (block, *norms))  # wrapped, as offloading does
        and not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in norms)
    )


def _become(kind: Any, scheduler: Any) -> Any:
    """A scheduler of another class, with the configuration and state of the given one."""
    new = kind.from_config(scheduler.config)
    new.__dict__.update({k: v for k, v in scheduler.__dict__.items() if k in new.__dict__ and k != "__module__"})
    return new
