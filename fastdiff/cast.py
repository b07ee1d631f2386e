"""A copy of a network in another floating type, made once and refreshed."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .support import walk

TYPES = (torch.bfloat16, torch.float16)


def channels_last_convolutions(model: nn.Module) -> list[nn.Conv2d]:
    """Lay out the weights of 2d convolutions channels last, in place.

    It is the layout that fast convolutions read, on GPUs and CPUs alike; they convert any other at every call. Their
    outputs follow it, so that a whole network runs channels last. The layout of a 1x1 convolution is in its
    strides alone, and its output follows them too. The adapters of PEFT keep their layout: they are in a ModuleDict,
    and it reads their weights as matrices, which must be contiguous.

    Returns: the convolutions whose weights had another layout.
    """
    changed, modules = [], walk.modules(model)
    adapters = {id(part) for module in modules if isinstance(module, nn.ModuleDict) for part in module.children()}
    for module in modules:
        if isinstance(module, nn.Conv2d) and id(module) not in adapters:
            weight = module.weight.data.to(memory_format=torch.channels_last)
            if weight.stride() != module.weight.stride():
                module.weight.data = weight
                changed.append(module)
    return changed


class Casts:
    """The copy of a model in another type. Its memory stays the same while the model's modules and tensors do.

    Every `get` copies the weights again, in one pass: a change through `.data` would leave no other trace. Copies and
    pickles are empty.
    """

    def __init__(self) -> None:
        self._copies: dict[torch.dtype, tuple[nn.Module, tuple[Any, ...], list[Tensor], list[Tensor]]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Casts, ()

    def get(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """The model with all floating parameters and buffers in that type, and channels_last 2d convolutions."""
        tensors = [t for t in walk.tensors(model) if t.is_floating_point()]
        modules = tuple((id(m), type(m)) for m in walk.modules(model))
        made, of_modules, of_tensors, cast = self._copies.get(dtype, (None, (), [], []))
        same = of_modules == modules and len(tensors) == len(of_tensors)
        if made is None or not (same and all(a is b for a, b in zip(tensors, of_tensors, strict=True))):
            with torch.inference_mode(False), torch.no_grad():
                made = _cast_copy(model, tensors, dtype)
            cast = [t for t in walk.tensors(made) if t.is_floating_point()]
            self._copies = {dtype: (made, modules, tensors, cast)}
        else:
            pairs = [(mine, t.detach()) for mine, t in zip(cast, tensors, strict=True)]
            for alike in (True, False):  # on a GPU they are copied in one kernel if all strides are the same
                some = [pair for pair in pairs if (pair[0].stride() == pair[1].stride()) is alike]
                if some:
                    with torch.no_grad():
                        torch._foreach_copy_([mine for mine, _ in some], [t for _, t in some])
        return made


def _cast_copy(model: nn.Module, tensors: list[Tensor], dtype: torch.dtype) -> nn.Module:
    """A deep copy whose floating tensors are made in the other type at once, so that none is copied in its own."""
    known: dict[int, Any] = {}
    for tensor in tensors:
        cast = tensor.detach().to(dtype, copy=True)
        known[id(tensor)] = nn.Parameter(cast, requires_grad=False) if isinstance(tensor, nn.Parameter) else cast
    for module in model.modules():  # weights that a hook makes anew before each call, as of pruning and weight norm
        for made in vars(module).values():
            if isinstance(made, Tensor) and not made.is_leaf:
                known[id(made)] = made.detach().to(dtype, copy=True)
    result = copy.deepcopy(model, known)
    channels_last_convolutions(result)
    return result
