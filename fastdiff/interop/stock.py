"""What keeps a drop-in true to the class of another library that it stands for, here called stock.

A drop-in computes in one pass what stock computes by methods that call each other. If a subclass or an object overrides
one of those methods, the drop-in must call it (`overridden`). It keeps tables, and must see every change of what they
are made of (`stamp`). It takes the types and shapes that stock's arithmetic takes (`combine`, `noising`).
"""

import ctypes
import functools
import inspect
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import ops
from ..support.cache import by_version

T = TypeVar("T")


def reached(kind: type, name: str) -> dict[str, Any]:
    """The methods and properties that the method `name` of `kind` uses on its object, directly or through others.

    They are found by the names in its code, so a later version of the library needs no new list.
    """
    found: dict[str, Any] = {}
    todo = [name]
    while todo:
        member: Any = inspect.getattr_static(kind, todo.pop())
        function = inspect.unwrap(getattr(member, "fget", member))
        for used in set(_names(function.__code__)) - {name, *found}:
            member = inspect.getattr_static(kind, used, None)
            if isinstance(member, (FunctionType, property)):
                found[used] = member
                todo.append(used)
    return found


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:  # comprehensions and inner functions
        if isinstance(constant, CodeType):
            yield from _names(constant)


def overridden(this: Any, originals: Mapping[str, Any]) -> bool:
    """Whether `this` has another method in the place of one of the originals: by a subclass, a patch of the class, or
    on the object alone."""
    kind, own = type(this), this.__dict__
    for name, original in originals.items():  # noqa: SIM110, a generator costs more, at every step
        if name in own or getattr(kind, name) is not original:
            return True
    return False


def remembered(kind: type[T]) -> type[T]:
    """A decorator of a class: `kind.originals` are the methods that it has now, by name, for `overridden`."""
    members = ((name, getattr(kind, name)) for name in dir(kind))
    kind.originals = {name: member for name, member in members if isinstance(member, FunctionType)}  # type: ignore[attr-defined]
    return kind


def stamp(tensor: Tensor) -> Any:
    """For `Tables`: the bytes of a CPU tensor, which show changes through `.data` and NumPy too.

    Reading a tensor of another device would wait: there it is `by_version`.
    """
    if type(tensor) is not Tensor or not tensor.is_cpu:
        return by_version(tensor)
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)  # without a call that the dispatcher would see


def promoted(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the type that torch's arithmetic would give their sum."""
    if all(t.dtype == tensors[0].dtype for t in tensors):
        return tensors
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    return tuple(t.to(dtype) for t in tensors)


def combine(
    x: Tensor, y: Tensor, rows: Tensor, index: Tensor | int, *, z: Tensor | None = None, clip: float | None = None
) -> Tensor:
    """ops.combine with the promotion and broadcasting of torch's arithmetic."""
    x = x.to(torch.promote_types(x.dtype, y.dtype))
    x, y, *rest = broadcast(index, x, y, *(() if z is None else (z,)))
    return ops.combine(x, y, rows, index, z=rest[0] if rest else None, clip=clip)


def noising(x: Tensor, noise: Tensor, index: Tensor, table: Tensor) -> Tensor:
    """alpha x + sigma noise with the promotion and broadcasting of torch's arithmetic."""
    x = x.to(torch.promote_types(x.dtype, noise.dtype))
    x, noise = broadcast(index, x, noise)
    return ops.noising(x, index, table, noise=noise)


def broadcast(index: Tensor | int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as views of one shape, which has a batch of len(index) if there is more than one row."""
    first = tensors[0].shape
    rows = len(index) if isinstance(index, Tensor) and index.ndim else 1
    if all(t.shape == first for t in tensors) and rows in (1, *first[:1]):
        return tensors
    shape = torch.broadcast_shapes(*(t.shape for t in tensors), (rows, *[1] * (max(t.ndim for t in tensors) - 1)))
    return tuple(t.expand(shape) for t in tensors)
