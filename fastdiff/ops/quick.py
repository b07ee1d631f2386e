"""The quick way of a call on a GPU: a kind of call that was made before is repeated.

A public op checks its arguments, allocates, and launches kernels. All of that depends on the kind of call alone: the
shapes, strides, types, device and alignment of its tensors, whether gradients are wanted, and every other argument. The
first call of a kind is recorded. Later calls allocate and launch the same again, with their own addresses, on the
current stream. Checks, layouts, grids and PyTorch's dispatcher cost them nothing.

A call is not repeatable if it does anything else: copies an operand into another layout, draws a seed, moves a number
to the device, or runs the reference. Then every call of its kind goes the full way, as does all that `unwatched`
excludes.
"""

import functools
import importlib
import operator
import threading
from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards
from torch.utils._python_dispatch import TorchDispatchMode

from .dispatch import forced, unwatched
from .memory import span

MAX_KEYS = 4096  # remembered for each form of call; the next one drops them all
MAX_ALIKE = 16  # kinds of one key; the same
PATIENCE = 64  # kinds in a row that are recorded though none was repeated; from then on, one in so many is
_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_OPTIONS = frozenset({type(None), bool, int, float, str, torch.Size, tuple, torch.dtype, torch.device})
_thread = threading.local()
_all_forms: list[dict[Any, Any]] = []
Function = TypeVar("Function", bound=Callable[..., Any])


def on_gpu(x: Tensor) -> bool:
    """Whether x lies on the current device, an NVIDIA GPU: on others Triton also looks at the sizes of tensors."""
    return x.is_cuda and torch.version.hip is None and x.get_device() == torch._C._cuda_getDevice()


def current_stream(device: int) -> int:
    """The address of PyTorch's current stream of a device."""
    return torch._C._cuda_getCurrentRawStream(device)


def quick(function: Function) -> Function:
    """A function that checks its arguments and calls one op, with the quick way."""
    forms: dict[tuple[Any, ...], Form] = {}
    _all_forms.append(forms)

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if not unwatched():
            return function(*args, **options)
        values = (*args, *options.values())
        types = (*map(type, values), *options)
        form = forms.get(types)
        if form is None:
            if _TENSORS.isdisjoint(types) or not (_TENSORS | _OPTIONS).issuperset(types[: len(values)]):
                return function(*args, **options)
            form = forms[types] = Form(types[: len(values)])
        tensors = [*compress(values, form.tensors)]
        first = tensors[0]
        if not on_gpu(first):
            return function(*args, **options)
        addresses: list[int | None] = [t.data_ptr() for t in tensors]
        unaligned = functools.reduce(operator.or_, addresses) & 15  # type: ignore
        stream = current_stream(first.get_device())
        key = (
            forced(), torch.is_grad_enabled(), stream, first.shape,
            unaligned and tuple([a & 15 for a in addresses]), *compress(values, form.options),  # type: ignore
        )  # fmt: skip
        for same, plan in form.kinds.get(key, ()):
            if same(*tensors):
                if plan is None or (plan.numbers and capturing()) or (plan.written and not plan.apart(addresses)):
                    return function(*args, **options)
                if plan.fresh:
                    form.wasted, plan.fresh = 0, False
                return plan.repeat(tensors, addresses, stream)
        # To record a call, tensors are told apart by their addresses.
        if len({*addresses}) < len(addresses) or capturing() or not form.worth_recording():
            return function(*args, **options)
        with Recorder(tensors) as recorder:
            result = function(*args, **options)
        form.remember(key, tensors, recorder.plan(result))
        return result

    return call  # type: ignore


class Form:
    """The calls of a function whose arguments have the same names and types, and their kinds.

    A kind is a key, and what the tensors of a call have to be like: type, shape, strides, device, whether a gradient is
    wanted, and the state of PyTorch's dispatcher. PyTorch's own guards compare these, faster than a key of them would.
    """

    def __init__(self, types: tuple[Any, ...]) -> None:
        self.tensors = [t in _TENSORS for t in types]  # which of the arguments are
        self.options = [not is_tensor for is_tensor in self.tensors]
        self.kinds: dict[Any, list[tuple[Callable[..., bool], Plan | None]]] = {}
        self.wasted = -1  # kinds since a plan was repeated for the first time

    def worth_recording(self) -> bool:
        """Whether to record one more kind. There may be a new one in every call, such as a seed."""
        self.wasted += 1
        return self.wasted < PATIENCE or self.wasted % PATIENCE == 0

    def remember(self, key: Any, tensors: list[Tensor], plan: "Plan | None") -> None:
        """Keep the plan of a kind; None: it is not repeatable."""
        if len(self.kinds) >= MAX_KEYS:
            self.kinds.clear()
        alike = self.kinds.setdefault(key, [])
        if len(alike) >= MAX_ALIKE:
            alike.clear()
        sizes, strides = [[*t.shape] for t in tensors], [[*t.stride()] for t in tensors]
        guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        alike.append((guards.check, plan))


def forget() -> None:
    """Forget every plan: for tests that change what a plan depends on."""
    for forms in _all_forms:
        forms.clear()


def recording() -> "Recorder | None":
    """What records this call, if anything does."""
    return None if torch.compiler.is_compiling() else getattr(_thread, "recorder", None)


class Call:
    """A call of an op, on its way through an autograd.Function."""

    __slots__ = ("args", "rest", "run")

    def __init__(self, run: Callable[..., Any], args: Sequence[Any]) -> None:
        self.run, self.args = run, args
        self.rest: tuple[Tensor, ...] | None = None  # results after the first: no gradient passes through them


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
        self.kept: list[Tensor] = []  # numbers, see `number`
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

    def plan(self, result: Any) -> "Plan | None":
        """None if the call cannot be repeated."""
        if not self.repeatable or len(self.calls) != 1 or any(n.compiled is None for n in self.launches):
            return None
        try:
            return Plan(self, result)
        except KeyError:  # a tensor is neither given nor allocated
            return None


class Plan:
    """What a call allocates, launches and returns.

    Tensors are known by their place: the given, then the kept, then the made. While recording, all of them live, so that
    their addresses tell them apart.
    """

    def __init__(self, recorder: Recorder, result: Any) -> None:
        launch = importlib.import_module("..kernels.launch", __package__)
        self.fresh = True  # until it is repeated
        self.given_count = len(recorder.tensors)
        call = recorder.calls[0]
        shown = call.results if call.with_gradient else result
        needed = [*shown] if isinstance(shown, tuple) else [shown]
        needed += [p for noted in recorder.launches for p in noted.parameters if isinstance(p, Tensor)]
        addresses = {t.data_ptr() for t in needed}
        made = [t for t in recorder.made if t.data_ptr() in addresses]
        self.numbers = bool(recorder.kept)
        self.kept = recorder.kept + [t for t in made if t.numel() == 0]  # there is nothing to write into an empty one
        self.kept_addresses = [t.data_ptr() for t in self.kept]
        made = [t for t in made if t.numel()]
        self.patterns = [_pattern(t) for t in made]
        self.known = [*recorder.tensors, *self.kept, *made]
        place = {t.data_ptr(): i for i, t in enumerate(self.known)}
        self.launches = [launch.Launch(noted, place) for noted in recorder.launches]
        # Which of the given tensors are written, and the bytes that each spans: the addresses may come to overlap.
        marked = [a for a, text in zip(call.args, call.op.arguments, strict=True) if "!" in text]
        self.written = [i for i, t in enumerate(recorder.tensors) if any(a is t for a in marked)]
        self.bytes = [span(t) for t in recorder.tensors]
        self.apply: Any = None
        if call.with_gradient:
            if result is not call.first:
                raise KeyError("the result is not that of the op")
            self.others = [a for a in call.args if not isinstance(a, Tensor)]
            behind = iter(range(len(recorder.tensors) + len(self.kept), len(self.known) + len(call.args)))
            self.args = [self._place(a) if isinstance(a, Tensor) else next(behind) for a in call.args]
            self.inputs = call.op.inputs
            # The work of Function.apply beside this one is for functorch, which is not active.
            function: Any = call.op.function
            self.apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]
        self.returned: Any = tuple(map(self._place, shown)) if isinstance(shown, tuple) else self._place(shown)
        del self.known

    def _place(self, t: Tensor) -> int:
        """The place of a known tensor; of an empty one, that of any that is like it."""
        for i, known in enumerate(self.known):
            same = known.data_ptr() == t.data_ptr() and known.dtype == t.dtype
            if same and known.shape == t.shape and known.stride() == t.stride():
                if i < self.given_count and known.requires_grad != t.requires_grad:
                    break  # detached
                return i
        raise KeyError("a tensor is neither given nor made")

    def apart(self, addresses: list[Any]) -> bool:
        """Whether what is written lies outside of all else that is given."""
        for w in self.written:
            start = addresses[w]
            end = start + self.bytes[w]
            for i, address in enumerate(addresses):
                if i != w and address < end and start < address + self.bytes[i]:
                    return False
        return True

    def repeat(self, tensors: list[Tensor], addresses: list[int | None], stream: int) -> Any:
        """The results for these tensors and their addresses."""
        known = tensors + self.kept
        if self.apply is None:
            return self._launch(known, addresses, stream)
        args = tuple(map((known + self.others).__getitem__, self.args))
        call = Call(lambda *_: self._launch(known, addresses, stream), args)
        return self.apply(*[args[i] for i in self.inputs], call)

    def _launch(self, known: list[Tensor], addresses: list[int | None], stream: int) -> Any:
        addresses += self.kept_addresses
        for pattern in self.patterns:
            made = torch.empty_like(pattern)
            known.append(made)
            addresses.append(made.data_ptr())
        addresses.append(None)
        for launch in self.launches:
            launch.repeat(addresses, stream)
        returned = self.returned
        return known[returned] if type(returned) is int else tuple([known[i] for i in returned])


def _pattern(made: Tensor) -> Tensor:
    """A tensor without memory. empty_like of it allocates one like the given."""
    pattern = torch.empty_like(made)
    pattern.untyped_storage().resize_(0)
    return pattern


# --- numbers ----------------------------------------------------------------------------------------------------


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
        recorder.kept.append(torch.full((1,), value, dtype=torch.int64, device=device))
    recorder.paused = False
    return recorder.kept[-1]
