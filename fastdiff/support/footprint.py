"""Whether objects are still what they were when a graph that reads them was captured."""

from logging import Logger
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

# Values that are compared; all others are the same only if they are the same object.
VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
# What has attributes that no forward reads.
LEAVES = (type, FunctionType, MethodType, BuiltinFunctionType, ModuleType, Logger)
# Where a network keeps what `accelerate` made of its forward.
REPLAY = "_replay"
# Attributes of a module that are not followed: they do not matter to its forward, or belong to who wrapped it.
FOLLOWED = {"_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"}
SKIPPED = {*vars(nn.Module()), REPLAY, "forward", "_old_forward", "_hf_hook", "_diffusers_hook"} - FOLLOWED


class Same:
    """Equal to one object only. A tensor that is compared with another would give a tensor."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return other is self.value

    __hash__ = None  # type: ignore[assignment]


class Footprint:
    """Everything that the forward of a network may read: modules, where tensors lie, and attributes.

    Attributes are followed through modules, dictionaries, lists, tuples and plain objects: attention processors.
    A change of the values of a tensor in place is not one of these: a graph reads tensors where they lie.
    """

    def __init__(self, root: object) -> None:
        self.kinds: list[tuple[object, type]] = []
        self.empty: list[dict[Any, Any] | list[Any]] = []
        self.dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self.lists: list[tuple[list[Any], list[Any]]] = []
        self.tensors: list[Tensor] = []
        todo: list[object] = [root]
        known: dict[int, object] = {}
        while todo:
            one = todo.pop()
            if id(one) not in known:
                known[id(one)] = one
                todo += self._add(one)
        self.forwards = [(kind, getattr(kind, "forward", None)) for kind in {kind for _, kind in self.kinds}]
        self.places = [place(tensor) for tensor in self.tensors]

    def holds(self) -> bool:
        """Whether nothing has changed. About a microsecond for each module."""
        return (
            all(type(one) is kind for one, kind in self.kinds)
            and all(getattr(kind, "forward", None) is forward for kind, forward in self.forwards)
            and not any(self.empty)
            and all(dict.__eq__(saved, now) for now, saved in self.dicts)
            and all(saved == now for now, saved in self.lists)
            and [place(tensor) for tensor in self.tensors] == self.places
        )

    def _add(self, one: object) -> list[object]:
        """Note an object, and return those that it holds."""
        if isinstance(one, Tensor):
            self.tensors.append(one)
            return []
        if isinstance(one, (dict, list)) and not one:
            self.empty.append(one)
            return []
        if isinstance(one, dict):
            self.dicts.append((one, {key: mark(value) for key, value in one.items()}))
            return list(one.values())
        if isinstance(one, (list, tuple)):
            if isinstance(one, list):
                self.lists.append((one, [mark(value) for value in one]))
            return list(one)
        if isinstance(one, (*VALUES, *LEAVES)) or not hasattr(one, "__dict__"):
            return []
        self.kinds.append((one, type(one)))
        attributes = vars(one)
        self.dicts.append((attributes, {key: mark(value) for key, value in attributes.items()}))
        skipped = SKIPPED if isinstance(one, nn.Module) else ()
        return [value for name, value in attributes.items() if name not in skipped]


def mark(value: object) -> object:
    """What equals a value as long as it is the same."""
    by_identity = type(value).__eq__ is object.__eq__ or (isinstance(value, (dict, list)) and not value)
    return value if by_identity or isinstance(value, VALUES) else Same(value)


def place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies, and how it is read there."""
    return tensor.data_ptr(), tensor.dtype, tensor.stride()
