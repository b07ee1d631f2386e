"""Numbers as arguments: those of Python and of NumPy, as Python numbers."""

import math
import operator
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def as_number(name: str, value: Any) -> float:
    """A Python number of a number of Python or NumPy."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, Real | torch.SymFloat | torch.SymInt):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    return value if isinstance(value, torch.SymFloat | torch.SymInt) else float(value)  # type: ignore[return-value]


def as_positive(name: str, value: Any) -> float:
    """A finite Python number above 0 of a number of Python or NumPy."""
    number = as_number(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")
    return number


def as_not_negative(name: str, value: Any) -> float:
    """A finite Python number of at least 0 of a number of Python or NumPy."""
    number = as_number(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
    return number


def as_share(name: str, value: Any) -> float:
    """A Python number from 0 to 1 of a number of Python or NumPy."""
    number = as_number(name, value)
    if not 0 <= number <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {value}")
    return number


def as_integer(name: str, value: Any, low: int, high: int) -> int:
    """A Python integer in [low, high] of an integer of Python or NumPy."""
    number = integer(value)
    if number is None:
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if not low <= number <= high:
        raise ValueError(f"{name}: expected an integer from {low} to {high}, got {number}")
    return number


def as_count(name: str, value: Any) -> int:
    """A Python integer of at least 1 of an integer of Python or NumPy. ValueError for anything else."""
    number = integer(value)
    if number is None or number < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
    return number


def integer(value: Any) -> int | None:
    """The integer that a number of Python or NumPy is; None for anything else, and for a bool."""
    if type(value) is int:
        return value
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if isinstance(value, bool | Tensor) or not hasattr(value, "__index__"):
        return None
    try:
        return operator.index(value)
    except TypeError:  # an array
        return None


def plain_number(value: Any) -> Any:
    """The value with NumPy's numbers as Python's, also those in a list or tuple."""
    if isinstance(value, list | tuple):
        return type(value)(plain_number(v) for v in value)
    if type(value) in (bool, int, float) or not isinstance(value, Real):
        return value
    number = integer(value)
    return float(value) if number is None else number
