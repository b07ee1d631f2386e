"""A plan: what one kind of call allocates, launches and returns.

A call is recorded, and the plan is a function that is written for it, in Python. That of `ops.noising`:

    def repeat(stream, t0, t1, t2, t3):
        if not same(t0, t1, t2, t3):         # shapes, strides, types, device, gradients: another kind of call
            return NotImplemented
        a0, a1, a2, a3 = t0.data_ptr(), t1.data_ptr(), t2.data_ptr(), t3.data_ptr()
        if (a0 & 15, a1 & 15, a2 & 15, a3 & 15) != c0:
            return NotImplemented
        m0 = empty_like(c1)
        x0 = (m0.data_ptr(), a0, None, a1, ...)
        if hooked():
            c2(x0, stream)
        else:
            c3(1, 4, 1, stream, ..., x0)
        return m0
"""

import importlib
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards
from torch.utils._python_dispatch import TorchDispatchMode

from .memory import span

FULL = object()  # a plan's answer: this call has to go the full way
_thread = threading.local()


def recording() -> "Recorder | None":
    """What records this call, if anything does."""
    return None if torch.compiler.is_compiling() else getattr(_thread, "recorder", None)


def capturing() -> bool:
    """Whether a CUDA graph is being captured: it would read a kept number again after we dropped it."""
    return torch.backends.cuda.is_built() and torch.cuda.is_current_stream_capturing()


def number(value: int, device: torch.device) -> Tensor:
    """(1,) int64 on a device. It may be kept for later calls, so nobody may write to it."""
    recorder = recording()
    if recorder is None or capturing():
        return torch.full((1,), value, dtype=torch.int64, device=device)
    recorder.paused = True
    with torch.inference_mode(False):
        recorder.numbers.append(torch.full((1,), value, dtype=torch.int64, device=device))
    recorder.paused = False
    return recorder.numbers[-1]


class Recorded(NamedTuple):
    """A call of an op that was recorded."""

    op: Any
    args: tuple[Any, ...]
    results: Any  # of the implementation
    first: Any  # result of the op
    with_gradient: bool


class Recorder(TorchDispatchMode):
    """Watches one call, to make a plan of it. It sees PyTorch's operations, the launches, and the op itself."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tensors = tensors
        self.made: list[Tensor] = []  # what was allocated
        self.numbers: list[Tensor] = []  # see `number`
        self.calls: list[Recorded] = []
        self.repeatable, self.paused = True, False

    def __enter__(self) -> "Recorder":
        _thread.recorder = self
        self.noted = importlib.import_module("..kernels.launch", __package__).noted()
        self.launches = self.noted.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.noted.__exit__(*error)
        _thread.recorder = None

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("empty", "new_empty", "empty_like"):
            self.made.append(result)
        elif name not in ("detach", "view", "alias", "select") and not self.paused:
            self.repeatable = False
        return result

    def plan(self, result: Any) -> "Plan":
        """The plan of the call, which had this result."""
        plan = Plan(self.tensors)
        if self.repeatable and len(self.calls) == 1 and all(n.compiled is not None for n in self.launches):
            try:
                plan.write(self, result)
            except KeyError:  # a tensor is neither given nor allocated
                plan.lines = []
        plan.compile()
        return plan


class Plan:
    """The plan of a kind of call. Every call of the kind takes the full way if nothing is written.

    Tensors are known by their names: those given are t0, t1, ... at addresses a0, a1, ..., those made m0, m1, ... at b0,
    b1, ..., and constants c0, c1, ... While recording, all of them live, so that their addresses tell them apart.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.fresh = True  # until it is repeated
        self.repeatable = False
        self.given = tensors
        self.lines: list[str] = []
        self.names: dict[str, Any] = {"FULL": FULL, "empty_like": torch.empty_like, "capturing": capturing}
        self.known: list[tuple[Tensor, str, str]] = []  # tensors with their names and those of their addresses
        self.repeat: Callable[..., Any]

    def compile(self) -> None:
        """Make `repeat` of the lines: a function of the stream and the tensors.

        It returns NotImplemented if the tensors are of another kind, and FULL if the call has to go the full way.
        """
        tensors = self.given
        sizes, strides = [[*t.shape] for t in tensors], [[*t.stride()] for t in tensors]
        # PyTorch's own guards compare faster than Python could.
        self.names["same"] = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        given, numbers = ", ".join(f"t{i}" for i in range(len(tensors))), range(len(tensors))
        aligned = tuple([t.data_ptr() & 15 for t in tensors])
        lines = [
            f"def repeat(stream, {given}):",
            f" if not same({given}): return NotImplemented",
            *[f" a{i} = t{i}.data_ptr()" for i in numbers],
            f" if ({' | '.join(f'a{i}' for i in numbers)}) & 15: return NotImplemented"
            if not any(aligned)
            else f" if ({''.join(f'a{i} & 15, ' for i in numbers)}) != {aligned}: return NotImplemented",
            *(self.lines or [" return FULL"]),
        ]
        exec("\n".join(lines), self.names)
        self.repeat = self.names["repeat"]
        del self.given, self.known

    def write(self, recorder: Recorder, result: Any) -> None:
        """Write the lines that allocate, launch and return.

        Raises: KeyError if a tensor is neither given nor made.
        """
        launching = importlib.import_module("..kernels.launch", __package__)
        call = recorder.calls[0]
        shown = call.results if call.with_gradient else result
        needed = [*shown] if isinstance(shown, tuple) else [shown]
        needed += [p for noted in recorder.launches for p in noted.parameters if isinstance(p, Tensor)]
        addresses = {t.data_ptr() for t in needed}
        self.known += [(t, f"t{i}", f"a{i}") for i, t in enumerate(recorder.tensors)]
        self.known += [(t, self._constant(t), str(t.data_ptr())) for t in recorder.numbers]
        body = []
        for i, t in enumerate(t for t in recorder.made if t.data_ptr() in addresses):
            if t.numel() == 0:  # nothing is ever written into it
                self.known.append((t, self._constant(t), "0"))
            else:
                self.known.append((t, f"m{i}", f"b{i}"))
                body += [f"m{i} = empty_like({self._constant(_pattern(t))})", f"b{i} = m{i}.data_ptr()"]
        addresses_by_value = {t.data_ptr(): address for t, _, address in self.known}
        launches = [launching.Launch(noted) for noted in recorder.launches]
        for i, noted in enumerate(recorder.launches):
            named = [addresses_by_value[p.data_ptr()] if isinstance(p, Tensor) else self._constant(p) for p in noted.parameters]
            body.append(f"x{i} = ({', '.join(named)},)")
        self.names["hooked"] = launching.hooked
        body.append("if hooked():")
        body += [f" {self._constant(launch.with_hooks)}(x{i}, stream)" for i, launch in enumerate(launches)] + [" pass"]
        body.append("else:")
        for i, launch in enumerate(launches):
            before, between = (", ".join(map(self._constant, part)) for part in (launch.before, launch.between))
            body.append(f" {self._constant(launch.run)}({before}, stream, {between}, {'' if launch.packed else '*'}x{i})")
        body.append(" pass")
        body.append(f"return {', '.join(map(self._name, shown)) + ',' if isinstance(shown, tuple) else self._name(shown)}")
        self.lines = self._refusals(call, recorder)
        if call.with_gradient:
            if result is not call.first:
                raise KeyError("the result is not that of the op")
            # The work of Function.apply beside this one is for functorch, which is not active.
            function: Any = call.op.function
            apply = self._constant(super(torch.autograd.Function, function).apply)  # type: ignore[misc]
            args = [self._name(a) if isinstance(a, Tensor) else self._constant(a) for a in call.args]
            self.lines += [" def run(*_):", *[f"  {line}" for line in body]]
            inputs = "".join(f"{args[i]}, " for i in call.op.inputs)
            self.lines.append(f" return {apply}({inputs}run, ({', '.join(args)},))")
        else:
            self.lines += [f" {line}" for line in body]
        self.repeatable = True

    def _refusals(self, call: Recorded, recorder: Recorder) -> list[str]:
        """Lines for what goes the full way, though it is of this kind."""
        lines = [" if capturing(): return FULL"] if recorder.numbers else []
        # Which of the given tensors are written, and the bytes that each spans: the addresses may come to overlap.
        marked = [a for a, text in zip(call.args, call.op.arguments, strict=True) if "!" in text]
        for i, t in enumerate(recorder.tensors):
            if any(a is t for a in marked):
                lines += [
                    f" if a{j} < a{i} + {span(t)} and a{i} < a{j} + {span(other)}: return FULL"
                    for j, other in enumerate(recorder.tensors)
                    if j != i
                ]
        return lines

    def _constant(self, value: Any) -> str:
        """The name of a constant."""
        if value is None or type(value) in (int, bool):
            return repr(value)
        name = f"c{len(self.names)}"
        self.names[name] = value
        return name

    def _name(self, t: Tensor) -> str:
        """The name of a known tensor; of an empty one, that of any that is like it."""
        for known, name, _ in self.known:
            same = known.data_ptr() == t.data_ptr() and known.dtype == t.dtype
            if same and known.shape == t.shape and known.stride() == t.stride():
                if name[0] == "t" and known.requires_grad != t.requires_grad:
                    break  # detached
                return name
        raise KeyError("a tensor is neither given nor made")


def _pattern(made: Tensor) -> Tensor:
    """A tensor without memory. empty_like of it allocates one like the given."""
    pattern = torch.empty_like(made)
    pattern.untyped_storage().resize_(0)
    return pattern
