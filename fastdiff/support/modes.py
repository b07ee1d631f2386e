"""Eval and training mode of networks that threads share.

The mode belongs to a module, and all threads see it. So threads take turns at a network: no call in the mode that its
owner gave it runs while another thread is `evaluating` it.
"""

import threading
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from . import walk


class _Turns:
    """Counts for a network: `evaluating` blocks that run, other calls that run, and calls that wait."""

    __slots__ = ("calls", "evaluating", "waiting")

    def __init__(self) -> None:
        self.calls = self.evaluating = self.waiting = 0


class _Thread(threading.local):
    def __init__(self) -> None:
        self.mine: list[_Turns] = []  # of the networks that this thread is evaluating or calling


_changed = threading.Condition()  # guards what follows
_held: dict[int, int] = {}  # modules kept in eval mode, by id, and by how many blocks; the blocks keep them alive
_turns: WeakKeyDictionary[nn.Module, _Turns] = WeakKeyDictionary()
_thread = _Thread()


def _turns_of(network: nn.Module) -> _Turns:
    found = _turns.get(network)
    if found is None:
        with _changed:
            found = _turns.setdefault(network, _Turns())
    return found


class _Attributes:
    """The attributes of a scripted module, which are not in its __dict__."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __getitem__(self, name: str) -> Any:
        return getattr(self.module, name)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self.module, name, value)


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
        self.turns = _turns_of(network)
        self.modules = walk.modules(network if around is None else around)
        # nn.Module's __setattr__ looks at every parameter and costs more than all else here.
        own = [vars(m) if "training" in vars(m) else _Attributes(m) for m in self.modules]
        self.own: list[tuple[int, Any]] = [*zip(map(id, self.modules), own, strict=True)]
        self.parts: list[tuple[int, Any]] = []

    def __enter__(self) -> None:
        turns, mine = self.turns, _thread.mine
        with _changed:
            if (turns.calls or turns.waiting) and turns not in mine:
                # Those that wait go first: walks may follow each other without end.
                _changed.wait_for(lambda: not (turns.calls or turns.waiting))
            turns.evaluating += 1
            self.parts = [part for part in self.own if part[1]["training"] or part[0] in _held]
            for key, attributes in self.parts:
                _held[key] = _held.get(key, 0) + 1
                attributes["training"] = False
        mine.append(turns)

    def __exit__(self, *error: object) -> None:
        _thread.mine.remove(self.turns)
        with _changed:
            for key, attributes in self.parts:
                count = _held.pop(key) - 1
                if count:
                    _held[key] = count
                else:
                    attributes["training"] = True
            self.turns.evaluating -= 1
            _changed.notify_all()


def call(network: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    """network(*args, **kwargs), while no other thread is evaluating it. A call that is compiled does not wait."""
    if torch.compiler.is_compiling():
        return network(*args, **kwargs)
    turns, mine = _turns_of(network), _thread.mine
    if turns in mine:
        return network(*args, **kwargs)
    with _changed:
        if turns.evaluating:
            turns.waiting += 1
            try:
                _changed.wait_for(lambda: not turns.evaluating)
            finally:
                turns.waiting -= 1
        turns.calls += 1
    mine.append(turns)
    try:
        return network(*args, **kwargs)
    finally:
        mine.remove(turns)
        with _changed:
            turns.calls -= 1
            _changed.notify_all()
