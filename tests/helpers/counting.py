"""What a sampling run calls, and what it allocates."""

from typing import Any

import pytest
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff import ops


class Allocations(TorchDispatchMode):
    """`made`: the operators inside that make tensors of at least `size` elements where no such tensor was before."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.known: set[int] = set()
        self.made: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.numel() >= self.size and tensor.data_ptr() not in self.known:
                self.known.add(tensor.data_ptr())
                self.made.append(str(func))
        return out


def count_calls(monkeypatch: pytest.MonkeyPatch, net: nn.Module) -> dict[str, int]:
    """The calls of a network ("model") and of ops.update ("update") from here on."""
    calls, update = {"model": 0, "update": 0}, ops.update
    net.register_forward_hook(lambda *_: calls.update(model=calls["model"] + 1))

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls["update"] += 1
        return update(*args, **kwargs)

    monkeypatch.setattr(ops, "update", counted)
    return calls
