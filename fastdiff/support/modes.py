"""Eval and training mode of networks that threads share.

The mode belongs to a module, and all threads see it. So threads take turns at a network: no call in the mode that its
owner gave it runs while another thread is `evaluating` it.
"""

import threading
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn


class _Turns:
    """How many blocks `evaluating` a network, and how many other calls of it, run now; and how many calls wait."""

    __slots__ = ("calls", "evaluating", "waiting")

    def __init__(self) -> None:
        self.calls = self.evaluating = self.waiting = 0


_changed = threading.Condition()  # guards what follows
_held: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # modules kept in eval mode, and by how many blocks
_turns: WeakKeyDictionary[nn.Module, _Turns] = WeakKeyDictionary()
_thread = threading.local()


def _mine() -> list[nn.Module]:
    """The networks whose turn this thread has."""
    networks: list[nn.Module] = _thread.__dict__.setdefault("networks", [])
    return networks


def _has_turn(network: nn.Module) -> bool:
    return any(one is network for one in _mine())


def _turns_of(network: nn.Module) -> _Turns:
    found = _turns.get(network)
    if found is None:
        found = _turns[network] = _Turns()
    return found


class evaluating:
    """A block in which a network is in eval mode; afterwards each of its modules is as it was.

    Blocks of several threads count together: the first sets a module's mode, the last gives it back. A module in eval
    mode is left alone. `call` in other threads waits for the end of the block, so a walk has a block for every step.

    `network.eval()` is not called, since an override may do more (LoRA merges its weights there).

    Args:
        network: what threads take turns at.
        around: a module that holds the network; all of it is in eval mode. None for the network alone.
    """

    def __init__(self, network: nn.Module, around: nn.Module | None = None) -> None:
        self.network = network
        self.modules = [*(network if around is None else around).modules()]
        self.parts: list[nn.Module] = []

    def __enter__(self) -> None:
        with _changed:
            turns = _turns_of(self.network)
            if not _has_turn(self.network):  # those that wait go first: walks may follow each other without end
                _changed.wait_for(lambda: not (turns.calls or turns.waiting))
            turns.evaluating += 1
            self.parts = [part for part in self.modules if part.training or (_held and part in _held)]
            for part in self.parts:
                _held[part] = _held.get(part, 0) + 1
                part.training = False
        _mine().append(self.network)

    def __exit__(self, *error: object) -> None:
        _mine().remove(self.network)
        with _changed:
            for part in self.parts:
                _held[part] -= 1
                if not _held[part]:
                    del _held[part]
                    part.training = True
            _turns_of(self.network).evaluating -= 1
            _changed.notify_all()


def call(network: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    """network(*args, **kwargs), while no other thread is evaluating it. A call that is compiled does not wait."""
    if torch.compiler.is_compiling() or _has_turn(network):
        return network(*args, **kwargs)
    with _changed:
        turns = _turns_of(network)
        turns.waiting += 1
        try:
            _changed.wait_for(lambda: not turns.evaluating)
        finally:
            turns.waiting -= 1
        turns.calls += 1
    _mine().append(network)
    try:
        return network(*args, **kwargs)
    finally:
        _mine().remove(network)
        with _changed:
            turns.calls -= 1
            _changed.notify_all()
