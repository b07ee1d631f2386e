"""Models whose weights FSDP2 splits over processes: torch.distributed.fsdp.fully_shard."""

import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from . import walk

P = ParamSpec("P")
R = TypeVar("R")


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP splits the weights of a module or of a part of it."""
    fsdp = _fsdp()
    return fsdp is not None and any(isinstance(part, fsdp.FSDPModule) for part in walk.modules(module))


def as_forward(module: nn.Module, function: Callable[P, R]) -> Callable[P, R]:
    """The function, which calls the module's parts, with what FSDP does around a forward of the module.

    FSDP gathers the weights that the root holds itself when the root's forward begins. Without that, a part that is
    called alone meets a piece of its weights. FSDP splits them again in the backward pass. Without one it is done here:
    else an optimizer would meet whole weights.
    """
    fsdp = None if torch.compiler.is_compiling() else _fsdp()
    if fsdp is None or not is_sharded(module):
        return function
    wrapped = function
    if isinstance(module, fsdp.FSDPModule):
        # FSDP wraps a method of the module by its name.
        module.__dict__["_as_forward"] = function
        fsdp.register_fsdp_forward_method(module, "_as_forward")
        wrapped = module.__dict__.pop("_as_forward")

    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        result = wrapped(*args, **kwargs)
        if not getattr(result, "requires_grad", False):
            for part in module.modules():
                if isinstance(part, fsdp.FSDPModule):
                    part.reshard()
        return result

    return called


def _fsdp() -> Any:
    """torch.distributed.fsdp if anything has imported it, or None."""
    return sys.modules.get("torch.distributed.fsdp")
