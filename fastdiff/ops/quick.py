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
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .dispatch import forced, unwatched
from .memory import span

MAX_KINDS = 4096  # remembered for each function; the next one drops them all
PATIENCE = 64  # kinds in a row that are recorded though none was repeated; from then on, one in so many is
_OPTIONS = frozenset({type(None), bool, int, float, str, torch.Size, tuple, torch.dtype, torch.device})
_thread = threading.local()
_all_plans: list[dict[Any, Any]] = []
Function = TypeVar("Function", bound=Callable[..., Any])


def on_gpu(x: Tensor) -> bool:
    """Whether x lies on the current device, an NVIDIA GPU: on others Triton also looks at the sizes of tensors."""
    return x.is_cuda and torch.version.hip is None and x.get_device() == torch._C._cuda_getDevice()


def current_stream(device: int) -> int:
    """The address of PyTorch's current stream of a device."""
    return torch._C._cuda_getCurrentRawStream(device)


def quick(function: Function) -> Function:
    """A function that checks its arguments and calls one op, with the quick way."""
    plans: dict[Any, Plan | None] = {}
    wasted: dict[Any, int] = {}  # kinds since the last repetition, by the types of the arguments
    _all_plans.append(plans)

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if not unwatched():
            return function(*args, **options)
        tensors: list[Tensor] = []
        addresses: list[int | None] = []
        kind: list[Any] = [forced(), torch.is_grad_enabled(), *options]
        for a in (*args, *options.values()):
            type_ = a.__class__
            if type_ is Tensor or type_ is torch.nn.Parameter:
                if not tensors:
                    if not on_gpu(a):
                        return function(*args, **options)
                    kind.append(current_stream(a.get_device()))
                address = a.data_ptr()
                tensors.append(a)
                addresses.append(address)
                kind += a.shape, a.stride(), a.dtype, a.get_device(), address & 15, a.is_neg(), a.requires_grad
            elif type_ in _OPTIONS:
                kind += type_, a
            else:
                return function(*args, **options)
        if not tensors or len({*addresses}) < len(addresses):  # a plan tells tensors apart by their addresses
            return function(*args, **options)
        key = tuple(kind)
        plan = plans.get(key)
        if plan is not None and not (plan.kept and capturing()) and plan.apart(addresses):
            if plan.types is not None:
                wasted[plan.types], plan.types = 0, None
            return plan.repeat(tensors, addresses)
        if key in plans or capturing():  # it is not repeatable, or not with these addresses
            return function(*args, **options)
        types = tuple(map(type, (*args, *options.values())))
        wasted[types] = count = wasted.get(types, -1) + 1
        if count >= PATIENCE and count % PATIENCE:  # such as a new seed in every call
            return function(*args, **options)
        if len(plans) >= MAX_KINDS:
            plans.clear()
        with Recorder(tensors) as recorder:
            result = function(*args, **options)
        plan = plans[key] = recorder.plan(result)
        if plan is not None:
            plan.types = types
        return result

    return call  # type: ignore


def forget() -> None:
    """Forget every plan: for tests that change what a plan depends on."""
    for plans in _all_plans:
        plans.clear()


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
        self.made: list[tuple[Tensor, Tensor | None]] = []  # what was allocated, and like what
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
        if name in ("empty", "new_empty", "new_empty_strided"):
            self.made.append((result, None))
        elif name == "empty_like":
            self.made.append((result, args[0]))
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

    Tensors are known by their place: the given, then kept numbers, then the made. While recording, all of them live, so
    that their addresses tell them apart.
    """

    def __init__(self, recorder: Recorder, result: Any) -> None:
        launch = importlib.import_module("..kernels.launch", __package__)
        self.types: Any = None  # of the arguments, until it is repeated
        self.kept, self.given_count = recorder.kept, len(recorder.tensors)
        self.kept_addresses = [t.data_ptr() for t in self.kept]
        call = recorder.calls[0]
        shown = call.results if call.with_gradient else result
        needed = [*shown] if isinstance(shown, tuple) else [shown]
        needed += [p for noted in recorder.launches for p in noted.parameters if isinstance(p, Tensor)]
        addresses = {t.data_ptr() for t in needed}
        made = [(t, like) for t, like in recorder.made if t.data_ptr() in addresses]
        self.known = [*recorder.tensors, *self.kept, *[t for t, _ in made]]
        self.make = [self._allocation(t, like) for t, like in made]
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
            self.args = [None if isinstance(a, Tensor) else a for a in call.args]
            self.given = [(i, self._place(a)) for i, a in enumerate(call.args) if isinstance(a, Tensor)]
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

    def _allocation(self, made: Tensor, like: Tensor | None) -> tuple[Callable[[Tensor], Tensor], int]:
        """A function that allocates a tensor like the one that was made, and the place of its argument."""
        if like is not None and like.dtype == made.dtype and like.stride() == made.stride():
            return torch.empty_like, self._place(like)
        if not made.is_contiguous():
            size, stride, dtype, device = made.shape, made.stride(), made.dtype, made.device
            return lambda _: torch.empty_strided(size, stride, dtype=dtype, device=device), 0
        # empty_like of one element that is shown in every place is the cheapest allocation of a shape.
        pattern = torch.empty((), dtype=made.dtype, device=made.device).expand(made.shape)
        return lambda _: torch.empty_like(pattern, memory_format=torch.contiguous_format), 0

    def apart(self, addresses: list[Any]) -> bool:
        """Whether what is written lies outside of all else that is given."""
        for w in self.written:
            start = addresses[w]
            end = start + self.bytes[w]
            for i, address in enumerate(addresses):
                if i != w and address < end and start < address + self.bytes[i]:
                    return False
        return True

    def repeat(self, tensors: list[Tensor], addresses: list[int | None]) -> Any:
        """The results for these tensors and their addresses."""
        if self.apply is None:
            return self._launch(tensors, addresses)
        args, known = self.args.copy(), [*tensors, *self.kept]
        for i, at in self.given:
            args[i] = known[at]
        call = Call(lambda *_: self._launch(tensors, addresses), args)
        return self.apply(*[args[i] for i in self.inputs], call)

    def _launch(self, tensors: list[Tensor], addresses: list[int | None]) -> Any:
        known = [*tensors, *self.kept]
        addresses += self.kept_addresses
        for make, like in self.make:
            made = make(known[like])
            known.append(made)
            addresses.append(made.data_ptr())
        addresses.append(None)
        stream = current_stream(tensors[0].get_device())
        for launch in self.launches:
            launch.repeat(addresses, stream)
        returned = self.returned
        return known[returned] if type(returned) is int else tuple([known[i] for i in returned])


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
