"""Memory that an op writes: nothing of it may be read later in the same call."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..support import transforms
from .memory import span


def check_memory(name: str, written: Tensor, elementwise: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """No memory of `written` is read after it was written.

    Args:
        elementwise: operands that are read just before the same element is written. Each may be `written` itself.
        others: operands that share nothing with it. What is no tensor is left to other checks.

    Raises: ValueError that names the tensors.
    """
    if torch.compiler.is_compiling() or transforms.active():  # there, results are made first and then copied
        return
    if type(written) is not Tensor and type(written) is not torch.nn.Parameter:
        return
    if written.is_neg():
        raise ValueError(f"{name}: expected memory that holds the values, got a view that negates it")
    start, end = _extent(written)
    if start == end or start == 0:  # empty, or without memory
        return
    if not written.is_contiguous() and not _is_injective(written):
        raise ValueError(f"{name}: expected every element in a place of its own, got strides {written.stride()}")
    for may_be_same, operands in ((True, elementwise), (False, others)):
        for other, t in operands.items():
            if not isinstance(t, Tensor) or t.device != written.device:
                continue
            first, last = _extent(t)
            if first >= end or last <= start or (may_be_same and _is_same(written, t)):
                continue
            if _share(written, t):
                raise ValueError(f"{name}: expected memory that {other} does not use, got a tensor that overlaps it")


def _extent(t: Tensor) -> tuple[int, int]:
    """The addresses from the first byte of t to the one after its last."""
    start = t.data_ptr()
    return start, start + (t.nbytes if t.is_contiguous() else span(t))


def _is_injective(t: Tensor) -> bool:
    """Whether every stride reaches beyond all elements of the smaller ones, so that no two elements are one."""
    reach = 0
    for stride, n in sorted(zip(t.stride(), t.shape, strict=True)):
        if n > 1:
            if stride <= reach:
                return False
            reach += stride * (n - 1)
    return True


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.stride() == b.stride() and a.shape == b.shape


class _Bytes:
    """A tensor's memory as NumPy describes it; nothing reads it."""

    def __init__(self, t: Tensor) -> None:
        size = t.element_size()
        self.__array_interface__ = {
            "version": 3,
            "data": (t.data_ptr(), True),
            "typestr": f"|V{size}",
            "shape": tuple(t.shape),
            "strides": tuple(size * stride for stride in t.stride()),
        }


def _share(a: Tensor, b: Tensor) -> bool:
    """Whether an element of a lies where one of b lies; also True if that is too hard to find out."""
    try:
        return bool(np.shares_memory(np.asarray(_Bytes(a)), np.asarray(_Bytes(b)), max_work=10**6))  # type: ignore[arg-type]
    except RuntimeError:  # NumPy's TooHardError, which has moved
        return True
