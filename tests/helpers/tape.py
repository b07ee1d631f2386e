"""A recorder of steps on the CPU, which does what a CUDA graph does: it runs operators again on the same tensors."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def tensors(*trees: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, Tensor)]


def waits(func: Any, args: Any) -> bool:
    """Whether an operator needs a value on the host: a number, or the size of its result."""
    if func is torch.ops.aten.index.Tensor:  # by numbers of elements it needs none
        return any(t.dtype in (torch.bool, torch.uint8) for t in tensors(args[1]))
    return bool(READS & set(func.tags))


class _Watch(TorchDispatchMode):
    """Notes the operators that run, what they made, and the first values of what they were given.

    waits: takes those that wait for the device; without it they are errors.
    """

    def __init__(self, waits: list[str] | None = None) -> None:
        super().__init__()
        self.waits = waits
        self.operators: list[tuple[Any, Any, Any, list[Tensor | None]]] = []
        self.own: set[int] = set()
        self.given: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if waits(func, args):
            if self.waits is None:
                raise RuntimeError(f"{func} reads a number")
            self.waits.append(f"{func} reads a number")
        for t in tensors(args, kwargs):
            storage = t.untyped_storage()  # whole: weights may be parts of one
            if storage.data_ptr() not in self.own and storage.data_ptr() not in self.given:
                self.given[storage.data_ptr()] = storage, storage.clone()
        before = {t.untyped_storage().data_ptr() for t in tensors(args, kwargs)}
        out = func(*args, **kwargs)
        made = [None if t.untyped_storage().data_ptr() in before else t for t in tensors(out)]
        self.own |= {t.untyped_storage().data_ptr() for t in made if t is not None}
        self.operators.append((func, args, kwargs, made))
        return out


class Tape:
    """See fastdiff.capture.Recorder. A replay runs no Python of the function, and freezes what it read on the host."""

    def __init__(self, device: torch.device) -> None:
        self.followed = self.warmed = self.recorded = self.replayed = 0

    def follow(self) -> None:
        self.followed += 1

    def warm_up(self, function: Callable[[], None], watched: bool = False) -> str | None:
        self.warmed += 1
        found: list[str] = []
        with _Watch(found) if watched else nullcontext():
            function()
        return found[0] if found else None

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        random = torch.get_rng_state()
        try:
            with _Watch() as watch:
                function()
        finally:
            torch.set_rng_state(random)
            for storage, values in watch.given.values():  # a capture runs nothing
                storage.copy_(values)
        self.recorded += 1
        # A graph does not know of such modes.
        mode = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad

        def replay() -> None:
            self.replayed += 1
            with mode():
                for func, args, kwargs, made in watch.operators:
                    for old, new in zip(made, tensors(func(*args, **kwargs)), strict=True):
                        if old is not None:
                            old.copy_(new)

        return replay


class Recorders(list):
    """Makes Tapes and keeps them."""

    def __call__(self, device: torch.device) -> Tape:
        self.append(Tape(device))
        return self[-1]

    @property
    def recorded(self) -> int:
        return sum(tape.recorded for tape in self)
