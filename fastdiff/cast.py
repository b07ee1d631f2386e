"""Weights in another floating type: a copy of a network, made once and refreshed, or for one step of training."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .support import walk
from .support.plain import is_plain

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


def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Write the second of each pair into the first."""
    for alike in (True, False):  # on a GPU they are copied in one kernel if all strides are the same
        some = [pair for pair in pairs if (pair[0].stride() == pair[1].stride()) is alike]
        if some:
            torch._foreach_copy_([mine for mine, _ in some], [t for _, t in some])


class _Cast(torch.autograd.Function):
    """Tensors in another type. Their gradients are cast back together, when the last of them is there."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        made = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        _copy([*zip(made, weights, strict=True)])
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        made = [None if grad is None else torch.empty_like(grad, dtype=torch.float32) for grad in grads]
        _copy([(mine, grad) for mine, grad in zip(made, grads, strict=True) if mine is not None and grad is not None])
        return None, *made


@contextmanager
def weights_cast(network: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Give convolutions and linear layers their float32 weights in the type to which autocast would cast them.

    All are cast in one pass, and so are their gradients, where autocast launches a kernel for each. Within the block
    these layers have tensors in place of their parameters. A backward pass that computes parts of the forward again
    has to be in it too.
    """
    places = [
        (module._parameters, name, parameter)
        for module in walk.modules(network)
        if is_plain(module, nn.Conv2d) or is_plain(module, nn.Linear)
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad and parameter.dtype == torch.float32
    ]
    known: dict[int, Any] = {id(parameter): parameter for *_, parameter in places}
    known = dict(zip(known, _Cast.apply(dtype, *known.values()), strict=True))  # type: ignore[no-untyped-call]
    try:
        for parameters, name, parameter in places:
            parameters[name] = known[id(parameter)]
        yield
    finally:
        for parameters, name, parameter in places:
            parameters[name] = parameter


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
            with torch.no_grad():
                _copy([*zip(cast, (t.detach() for t in tensors), strict=True)])
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
