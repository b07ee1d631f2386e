"""Eval and training mode of networks that threads share.

The mode belongs to a module, and all threads see it. So threads take turns at a network: no call in the mode that its
owner gave it runs while another thread is `evaluating` it.

An interrupt (Ctrl-C) may come after any call, at the head of any function and at the end of any turn of a loop. So what
belongs together is changed by plain assignments, and `evaluating` can leave from wherever it was interrupted.
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
        self.mine: dict[_Turns, int] = {}  # of the networks that this thread evaluates or calls, and how often


_lock = threading.RLock()  # guards what follows; a Condition's own `with` could be interrupted while it has the lock
_changed = threading.Condition(_lock)
_held: dict[int, int] = {}  # modules kept in eval mode, by id, and by how many blocks; the blocks keep them alive
_turns: WeakKeyDictionary[nn.Module, _Turns] = WeakKeyDictionary()
_thread = _Thread()


def _turns_of(network: nn.Module) -> _Turns:
    found = _turns.get(network)
    if found is None:
        with _lock:
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

    inside = False  # also where an interrupt ended __init__

    def __init__(self, network: nn.Module, around: nn.Module | None = None) -> None:
        self.turns = _turns_of(network)
        self.modules = walk.modules(network if around is None else around)
        # nn.Module's __setattr__ looks at every parameter and costs more than all else here.
        own = [vars(m) if "training" in vars(m) else _Attributes(m) for m in self.modules]
        self.own: list[tuple[int, Any]] = [*zip(map(id, self.modules), own, strict=True)]
        self.parts: list[tuple[int, Any]] = []
        self.mine: dict[_Turns, int] = {}  # of the thread that is inside
        self.done = 0  # how many of the parts are set

    def __enter__(self) -> None:
        turns, mine = self.turns, _thread.mine
        try:
            with _lock:
                if (turns.calls or turns.waiting) and turns not in mine:
                    # Those that wait go first: walks may follow each other without end.
                    _changed.wait_for(lambda: not (turns.calls or turns.waiting))
                self.parts = [part for part in self.own if part[1]["training"] or part[0] in _held]
                often = mine.get(turns, 0) + 1
                self.mine, self.inside, mine[turns] = mine, True, often
                turns.evaluating += 1
                for key, attributes in self.parts:
                    count = _held.get(key, 0) + 1
                    _held[key], attributes["training"] = count, False
                    self.done += 1
        except BaseException:
            self._leave()
            raise

    def __exit__(self, *error: object) -> None:
        self._leave()

    def __del__(self) -> None:
        if self.inside:  # an interrupt came at the head of __exit__
            self._leave()

    def _leave(self) -> None:
        """Undo what was done."""
        with _lock:
            while self.done:
                key, attributes = self.parts[self.done - 1]
                count = _held[key] - 1
                if count:
                    _held[key] = count
                else:
                    del _held[key]
                    attributes["training"] = True
                self.done -= 1
            if self.inside:
                often = self.mine[self.turns] - 1
                if often:
                    self.mine[self.turns] = often
                else:
                    del self.mine[self.turns]
                self.turns.evaluating -= 1
                self.inside = False
            _changed.notify_all()


def call(network: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    """network(*args, **kwargs), while no other thread is evaluating it. A call that is compiled does not wait."""
    if torch.compiler.is_compiling():
        return network(*args, **kwargs)
    turns, mine = _turns_of(network), _thread.mine
    if turns in mine:
        return network(*args, **kwargs)
    counted = False
    try:
        with _lock:
            if turns.evaluating:
                turns.waiting += 1
                try:
                    _changed.wait_for(lambda: not turns.evaluating)
                finally:
                    turns.waiting -= 1
            turns.calls += 1
            mine[turns] = 1
            counted = True
        return network(*args, **kwargs)
    finally:
        with _lock:
            if counted:
                often = mine[turns] - 1
                if often:  # a walk that began in the call goes on
                    mine[turns] = often
                else:
                    del mine[turns]
                turns.calls -= 1
            _changed.notify_all()
