"""Ops: what is registered with PyTorch, and how one is called.

They are registered on bare torch.library.Library objects, whose dispatch costs a few microseconds, while custom_op and
register_autograd cost tens (`pytest benchmarks/test_dispatch.py` measures it). Plain tensors skip even that: see `Op`.
"""

import re
from collections.abc import Callable
from typing import Any

import torch

from ..support import transforms
from .dispatch import plain
from .plan import Recorded, Recorder, recording

NOISE = "Tensor? seed, Tensor? ids"  # in the schema of every op that may generate noise
OPS: dict[str, "Op"] = {}
# The library of each op by name. It is kept with PyTorch's ops: they outlive this module if it is imported again.
_libraries: dict[str, torch.library.Library] = vars(torch.ops.fastdiff).setdefault("_libraries", {})


class Op:
    """torch.ops.fastdiff.<name>, called with all arguments by position.

    Plain tensors go to the implementation at once. Everything else goes through PyTorch's dispatcher: subclasses,
    modes, functorch, tracing, compilation and the profiler. Both give the same bits.

    Args:
        schema: arguments and results in the language of torch.library, "(Tensor x) -> Tensor".
        implementation: what runs on any device.
        fake: what is traced: results of the right shape, type and layout, without values.

    An op of that name is replaced: it is that of an earlier import of the package in this process, or of a reload.
    """

    def __init__(
        self, name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any] | None = None
    ) -> None:
        OPS[name] = self
        self.name = name
        self.schema, self.implementation = schema, implementation
        self.arguments = schema[1 : schema.index(") ->")].split(", ")
        self.written = [i for i, argument in enumerate(self.arguments) if "!" in argument]
        self.function: type[torch.autograd.Function] | None = None
        self.inputs: tuple[int, ...] = ()
        if earlier := _libraries.pop(name, None):
            earlier._destroy()
        library = _libraries[name] = torch.library.Library("fastdiff", "FRAGMENT")
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastdiff::{name}", fake or _nothing, lib=library)

    @property
    def dispatched(self) -> Any:
        """The op as PyTorch's dispatcher knows it; not kept, as a later import may replace it."""
        return getattr(torch.ops.fastdiff, self.name).default

    def differentiate(self, function: type[torch.autograd.Function], *inputs: int) -> None:
        """Give the op a gradient by the arguments with these numbers.

        function: its forward takes these arguments, the results and all arguments, and returns the first result. Its
        backward returns the gradients, and None twice.
        """
        self.function, self.inputs = function, inputs
        _libraries[self.name].impl(self.name, self._autograd, "Autograd")

    def __call__(self, *args: Any) -> Any:
        if self.written and not torch.compiler.is_compiling():
            # Kernels write by address. A gradient that saved what they overwrite has to notice.
            torch._C._increment_version([args[i] for i in self.written if args[i] is not None])
        recorder = recording()
        if recorder is not None:
            return self._recorded(recorder, args)
        if not plain(args):
            return self.dispatched(*args)
        return self._run(self.implementation, args)

    def _run(self, run: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """The results of run(*args), with a gradient if one is wanted."""
        if not self._wants_gradient(args):
            return run(*args)
        assert self.function is not None
        with torch.no_grad():
            results = run(*args)
        first = self.function.apply(*[args[i] for i in self.inputs], results, args)
        # No gradient passes through the results after the first.
        return (first, *results[1:]) if isinstance(results, tuple) else first

    def _recorded(self, recorder: Recorder, args: tuple[Any, ...]) -> Any:
        seen: list[Any] = []

        def run(*args: Any) -> Any:
            seen.append(self.implementation(*args))
            return seen[0]

        results = self._run(run, args)
        first = results[0] if isinstance(results, tuple) else results
        recorder.calls.append(Recorded(self, args, seen[0], first, self._wants_gradient(args)))
        return results

    def _wants_gradient(self, args: tuple[Any, ...]) -> bool:
        """Whether a gradient by an argument is wanted that the op has one for."""
        if self.inputs and torch.is_grad_enabled():
            for i in self.inputs:
                if args[i] is not None and args[i].requires_grad:
                    return True
        return False

    def _autograd(self, *args: Any) -> Any:
        """What the dispatcher calls first."""
        if transforms.active():
            raise RuntimeError(
                f"torch.ops.fastdiff.{self.name} has no rule for transforms of torch.func and dual tensors; "
                f"call the function of fastdiff.ops"
            )
        return self._run(self._below, args)

    def _below(self, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return self.dispatched(*args)


def names_of(arguments: str) -> tuple[str, ...]:
    """The names in a list of arguments of a schema."""
    return tuple(re.findall(r"(\w+)(?:,|$)", arguments))


def _nothing(*args: Any) -> None:
    """The fake of an op that returns nothing."""
