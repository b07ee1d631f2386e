"""numba's decorators, with a cache that may fail.

numba stops with an error if a file of its cache was cut short, or if the disk is full. The kernels can be compiled
without it. So the first such error is a warning here. A damaged index is written anew.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any

import numba
from numba.core import sigutils
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc


class Cache(FunctionCache):
    """numba's cache of a function; an error is a warning."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # whatever a damaged pickle raises
            _warn(f"{self.cache_path}: {type(error).__name__}: {error}")
            with contextlib.suppress(Exception):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:
            _warn(f"{self.cache_path}: {type(error).__name__}: {error}")


@functools.cache
def _warn_once() -> None:
    """Says by its cache that a warning was given."""


def _warn(reason: str) -> None:
    if not _warn_once.cache_info().currsize:
        _warn_once()
        warnings.warn(
            f"numba's cache cannot be used; the kernels for CPU tensors are compiled again ({reason})", stacklevel=2
        )


@functools.cache
def can_cache() -> bool:
    """Whether numba finds a folder for its cache: it raises if it cannot write to any."""
    try:
        numba.njit(cache=True)(lambda: None)
    except RuntimeError as error:
        _warn(str(error))
        return False
    return True


def njit(*, cache: bool = False, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba.njit."""

    def decorate(function: Callable[..., Any]) -> Any:
        compiled = numba.njit(**options)(function)
        if cache:
            compiled._cache = Cache(function)
        return compiled

    return decorate


def cfunc(signature: Any, function: Callable[..., Any], *, cache: bool = False, **options: Any) -> Any:
    """numba.cfunc(signature, ...)(function)."""
    compiled = CFunc(function, sigutils.normalize_signature(signature), locals={}, options=options)
    if cache:
        compiled._cache = Cache(function)
    compiled.compile()
    return compiled
