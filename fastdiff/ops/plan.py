"""A plan: what one kind of call allocates, launches and returns.

A call is recorded, and a function is written for it that repeats it with other tensors. That of `normal(out=...)`:

    def repeat(stream, t0, t1):                        # seed, out
     try: a0 = t0.data_ptr(); a1 = t1.data_ptr()
     except RuntimeError: return FULL                  # a sparse tensor
     if not same(t0, t1): return NotImplemented        # another shape, stride, type or device: another kind of call
     if (a0 | a1) & 15: return NotImplemented          # a kernel may need addresses that are multiples of 16
     if capturing(): return FULL                       # the step, an int, became a tensor that the plan keeps
     if a1 < a0 + 8 and a0 < a1 + 3072: return FULL
     c4((t1, ))                                        # its version, for gradients that saved it
     x0 = (a1, a0, None, 93939058879360, ...)
     if c5():                                          # a profiler's hooks
      c6(x0, stream)
     else:
      c10(1, 4, 1, stream, 93939058745728, ..., x0)
     return t1

That of CPU tensors also looks at the values that a check looked at. Loops over tensors, launches and arguments would
take twice as long as what this does.
"""

import importlib
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards
from torch.utils._python_dispatch import TorchDispatchMode

from .memory import PAGE, in_huge_pages, span

notes = importlib.import_module("..kernels.notes", __package__)

FULL = object()  # a plan's answer: this call has to go the full way
_thread = threading.local()


def recording() -> "Recorder | None":
    """What records this call, if anything does."""
    return None if torch.compiler.is_compiling() else getattr(_thread, "recorder", None)


def capturing() -> bool:
    """Whether a CUDA graph is being captured: it would read a kept number again after we dropped it."""
    # Without a driver PyTorch's function may raise.
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def number(value: int, device: torch.device) -> Tensor:
    """(1,) int64 on a device. It may be kept for later calls, so nobody may write to it."""
    recorder = recording()
    if recorder is None or capturing():
        return torch.full((1,), value, dtype=torch.int64, device=device)
    with torch.inference_mode(False):
        recorder.numbers.append(recorder.unseen(torch.full, (1,), value, dtype=torch.int64, device=device))
    return recorder.numbers[-1]


def draw(device: torch.device) -> Tensor:
    """(1,) int64 from PyTorch's default generator, without a host sync. Every call draws another one."""
    recorder = recording()
    if recorder is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), device=device)  # torch.compile cannot trace random_
    recorder.draws.append(recorder.unseen(torch.randint, -(2**63), 2**63 - 1, (1,), device=device))
    return recorder.draws[-1]


class Recorded(NamedTuple):
    """A call of an op that was recorded."""

    op: Any
    args: tuple[Any, ...]
    results: Any  # of the implementation
    first: Any  # result of the op
    with_gradient: bool


class Recorder(TorchDispatchMode):
    """Watches one call, to make a plan of it. It sees PyTorch's operations, the launches, and the op itself.

    dense: the tensors whose places never hold a nested one.
    """

    def __init__(self, tensors: list[Tensor], dense: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tensors = tensors
        self.maybe_nested = [i for i, t in enumerate(tensors) if not any(t is known for known in dense)]
        self.made: list[Tensor] = []  # what was allocated
        self.numbers: list[Tensor] = []  # see `number`
        self.draws: list[Tensor] = []  # see `draw`
        self.calls: list[Recorded] = []
        self.checks: list[tuple[Callable[..., None], tuple[Any, ...]]] = []  # see `check`
        self.repeatable, self.paused = True, False

    def __enter__(self) -> "Recorder":
        _thread.recorder = self
        self.noted = notes.noted()
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
        if name in ("empty", "new_empty", "new_empty_strided", "empty_like"):
            self.made.append(result)
        elif name not in ("detach", "view", "alias", "select") and not self.paused:
            self.repeatable = False
        return result

    def unseen(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """The result of a function that a plan repeats by other means."""
        self.paused = True
        result = function(*args, **options)
        self.paused = False
        return result

    def check(self, function: Callable[..., None], *args: Any) -> None:
        """Call a function that looks at the values of a tensor, as a plan does again."""
        self.unseen(function, *args)
        self.checks.append((function, args))

    def plan(self, result: Any) -> "Plan":
        """The plan of the call, which had this result."""
        return Plan(self, result)


class Plan:
    """The plan of a kind of call.

    repeat: a function of the stream and the tensors. It returns NotImplemented if the call is of another kind, and FULL
    if the call has to go the full way. A kind that cannot be repeated always gives FULL.
    """

    def __init__(self, recorder: Recorder, result: Any) -> None:
        self.fresh = True  # until it is repeated
        self.names: dict[str, Any] = {"FULL": FULL, "empty_like": torch.empty_like, "capturing": capturing}
        # Tensors, their names and those of their addresses: t0, a0, ... are given, m0, b0, ... made, and d0, e0, ...
        # drawn; c0, ... are constants. While recording, all of them live, so that addresses tell them apart.
        self.known = [(t, f"t{i}", f"a{i}") for i, t in enumerate(recorder.tensors)]
        self.known += [(t, self._constant(t), repr(t.data_ptr())) for t in recorder.numbers]
        self.known += [(t, f"d{i}", f"e{i}") for i, t in enumerate(recorder.draws)]
        lines = ["return FULL"]
        if recorder.repeatable and len(recorder.calls) == 1 and all(n.repeatable for n in recorder.launches):
            with suppress(KeyError):  # a tensor is neither given nor allocated
                lines = self._refusals(recorder) + self._body(recorder, result)
        exec("\n ".join(self._head(recorder) + lines), self.names)
        del self.known
        self.repeat: Callable[..., Any] = self.names["repeat"]

    def _head(self, recorder: Recorder) -> list[str]:
        """The lines that find out whether a call is of this kind."""
        tensors = recorder.tensors
        sizes, strides = [[*t.shape] for t in tensors], [[*t.stride()] for t in tensors]
        # PyTorch's own guards compare in C. They look at the state of the dispatcher too.
        guards: Any = TensorGuards
        self.names["same"] = guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        given, numbers = ", ".join(f"t{i}" for i in range(len(tensors))), range(len(tensors))
        # The guards end the process where a tensor has no strides: a nested one, or a sparse one, without an address.
        nested = " or ".join(f"t{i}.is_nested" for i in recorder.maybe_nested)
        lines = [
            f"def repeat(stream, {given}):",
            "try: " + "; ".join(f"a{i} = t{i}.data_ptr()" for i in numbers),
            "except RuntimeError: return FULL",
            *([f"if {nested}: return FULL"] if nested else []),
            f"if not same({given}): return NotImplemented",
        ]
        aligned = tuple([t.data_ptr() & 15 for t in tensors])
        if not all(n.aligned for n in recorder.launches):
            return lines
        if any(aligned):
            unlike = f"({''.join(f'a{i} & 15, ' for i in numbers)}) != {aligned}"
        else:
            unlike = f"({' | '.join(f'a{i}' for i in numbers)}) & 15"
        return [*lines, f"if {unlike}: return NotImplemented"]

    def _refusals(self, recorder: Recorder) -> list[str]:
        """The lines for what goes the full way, or is an error, though it is of this kind."""
        lines = ["if capturing(): return FULL"] if recorder.numbers and recorder.numbers[0].is_cuda else []
        # Which of the given tensors are written, and the bytes that each spans: the addresses may come to overlap.
        call = recorder.calls[0]
        marked = [call.args[i] for i in call.op.written]
        written_before: set[int] = set()
        for i, written in enumerate(recorder.tensors):
            if any(a is written for a in marked):
                written_before.add(i)
                for j, other in enumerate(recorder.tensors):
                    if j not in written_before:
                        lines.append(f"if a{i} < a{j} + {span(other)} and a{j} < a{i} + {span(written)}: return FULL")
        for function, (name, values, end) in recorder.checks:
            if not any(values is number for number in recorder.numbers):
                given = next((text for t, text, _ in self.known if _values_of(t) == _values_of(values)), None)
                if given is None:
                    raise KeyError("values that are not given were looked at")
                if values.numel() == 1:  # the full way says what is wrong
                    lines.append(f"if not 0 <= {given}.item() < {end}: return FULL")
                else:
                    lines.append(f"{self._constant(function)}({self._constant(name)}, {given}, {end})")
        return lines

    def _body(self, recorder: Recorder, result: Any) -> list[str]:
        """The lines that allocate, launch and return.

        Raises: KeyError if a tensor is neither given nor made.
        """
        call = recorder.calls[0]
        shown = call.results if call.with_gradient else result
        results = shown if isinstance(shown, tuple) else (shown,)
        if not results[0].numel():
            raise KeyError("no address tells an empty result apart")
        allocations = self._allocations(recorder, results)  # first: launches have them too
        conditions, launches = self._launches(recorder)
        written = [f"t{i}, " for i, t in enumerate(recorder.tensors) if any(call.args[j] is t for j in call.op.written)]
        noted = [f"{self._constant(torch._C._increment_version)}(({''.join(written)}))"] if written else []
        lines = conditions + noted + allocations + launches
        names = [self._name(t) for t in results]
        text = f"({', '.join(names)},)" if isinstance(shown, tuple) else names[0]
        if not call.with_gradient:
            return [*lines, f"return {text}"]
        if result is not call.first:
            raise KeyError("the result is not that of the op")
        # The work of Function.apply beside this one is for functorch, which is not active.
        function: Any = call.op.function
        apply = self._constant(super(torch.autograd.Function, function).apply)  # type: ignore[misc]
        args = [self._name(a) if isinstance(a, Tensor) else self._constant(a) for a in call.args]
        inputs = [args[i] for i in call.op.inputs]
        return [*lines, f"return {apply}({', '.join(inputs)}, {text}, ({', '.join(args)},))"]

    def _allocations(self, recorder: Recorder, results: Sequence[Tensor]) -> list[str]:
        """The lines that make what is returned, or what a kernel gets."""
        needed = {p.data_ptr() for n in recorder.launches for p in n.parameters if isinstance(p, Tensor)}
        needed |= {t.data_ptr() for t in results}
        lines = []
        for i, t in enumerate(recorder.draws):
            lines += [f"d{i} = {self._constant(draw)}({self._constant(t.device)})", f"e{i} = d{i}.data_ptr()"]
        for i, t in enumerate(t for t in recorder.made if t.data_ptr() in needed):
            if t.numel():
                self.known.append((t, f"m{i}", f"b{i}"))
                fresh = f"empty_like({self._constant(_pattern(t))})"
                if t.is_cpu and t.nbytes >= PAGE:
                    fresh = f"{self._constant(in_huge_pages)}({fresh})"
                lines += [f"m{i} = {fresh}", f"b{i} = m{i}.data_ptr()"]
            else:  # nobody can write into it, so one is enough
                self.known.append((t, self._constant(t), "0"))
        return lines

    def _launches(self, recorder: Recorder) -> tuple[list[str], list[str]]:
        """(the lines that check again, those that launch)."""
        addresses = {t.data_ptr(): address for t, _, address in self.known}

        def parameter(value: Any) -> str:
            return addresses[value.data_ptr()] if isinstance(value, Tensor) else self._constant(value)

        if not recorder.launches:
            return [], []
        conditions, lines = recorder.launches[0].written(recorder.launches, parameter, self._constant)
        return [f"if not {condition}: return NotImplemented" for condition in conditions], lines

    def _constant(self, value: Any) -> str:
        """The name of a constant."""
        if value is None or type(value) in (int, bool):
            return repr(value)
        name = f"c{len(self.names)}"
        self.names[name] = value
        return name

    def _name(self, t: Tensor) -> str:
        """The name of a known tensor. Any tensor like it gives an empty one its name."""
        for known, name, _ in self.known:
            same = known.data_ptr() == t.data_ptr() and known.dtype == t.dtype
            if same and known.shape == t.shape and known.stride() == t.stride():
                if name[0] == "t" and known.requires_grad != t.requires_grad:
                    break  # detached
                return name
        raise KeyError("a tensor is neither given nor made")


def _values_of(t: Tensor) -> tuple[int, int]:
    """What a tensor and a view of it in another shape have in common."""
    return t.data_ptr(), t.numel()


def _pattern(made: Tensor) -> Tensor:
    """A tensor without memory. empty_like of it allocates one like the given."""
    pattern = torch.empty_like(made)
    pattern.untyped_storage().resize_(0)
    return pattern
