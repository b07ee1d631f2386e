"""Tables that are kept while they are valid, for calls that come once a step."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import transforms

T = TypeVar("T")


def by_version(tensor: Tensor) -> Any:
    """A stamp: which tensor it is, and its version. Inference tensors have no version; on the CPU values replace it."""
    if not tensor.is_inference():
        return id(tensor), tensor._version
    return id(tensor), tensor.tolist() if tensor.device.type == "cpu" else None


class Tables:
    """Tables, each kept until the stamp of a tensor that it is made of differs; copies and pickles are empty."""

    def __init__(self, stamp: Callable[[Tensor], Any] = by_version) -> None:
        self._stamp = stamp
        self._entries: dict[str, tuple[Any, ...]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Tables, (self._stamp,)

    def get(self, name: str, build: Callable[[], T], sources: tuple[Tensor, ...], *key: Any) -> T:
        """build(), kept while the stamps of the sources and the key are equal."""
        if is_compiling() or transforms.active() or transforms.stand_ins():
            return build()  # what is made there is of no use after it
        key = (*key, *map(self._stamp, sources))
        entry = self._entries.get(name)
        if entry is None or entry[1] != key:
            with torch.inference_mode(False), torch.no_grad():
                # An entry keeps the sources, so that no other tensor gets their ids.
                entry = self._entries[name] = (build(), key, sources)
        kept: T = entry[0]
        return kept
