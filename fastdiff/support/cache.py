"""Tables that are kept while they are valid, for calls that come once a step."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import transforms

T = TypeVar("T")
_FAKE = torch._C._TorchDispatchModeKey.FAKE


class Tables:
    """Tables, each kept until a tensor it is made of is replaced or changed in place; copies and pickles are empty."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[Any, ...]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Tables, ()

    def get(self, name: str, build: Callable[[], T], sources: tuple[Tensor, ...], *key: Any) -> T:
        """build(), kept while the sources are the same, unchanged, and the key is equal."""
        # What is made within a compiler, a transform or the mode of fake tensors is of no use after it.
        if torch.compiler.is_compiling() or transforms.active() or torch._C._get_dispatch_mode(_FAKE) is not None:
            return build()
        if sources:
            key = (*key, *map(_stamp, sources), *map(id, sources))  # the entry keeps them, so no other has their ids
        entry = self._entries.get(name)
        if entry is None or entry[1] != key:
            with torch.inference_mode(False), torch.no_grad():
                entry = self._entries[name] = (build(), key, sources)
        kept: T = entry[0]
        return kept


def _stamp(tensor: Tensor) -> Any:
    """What differs after a change in place: the version, or on the CPU the values of a tensor of inference mode."""
    if not tensor.is_inference():
        return tensor._version
    return tensor.tolist() if tensor.device.type == "cpu" else None
