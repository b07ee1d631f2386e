"""The quick way of a call: a kind of call that was made before is repeated.

A public op checks its arguments, allocates, and launches kernels. All of that depends on the kind of call alone: the
shapes, strides, types, device and alignment of its tensors, whether gradients are wanted, and every other argument. The
first call of a kind is recorded. Later calls allocate and launch the same again, with their own addresses, on the
current stream. Checks, layouts, grids and PyTorch's dispatcher cost them nothing.

A call is not repeatable if it does anything else: copies an operand into another layout, moves a number to the device,
or runs the reference. Then every call of its kind goes the full way, as does all that `unwatched` excludes.

On the CPU the compiled kernels are launched so too. There a step or seed that is a number becomes a tensor first, so
that calls with other numbers are of one kind.

plan.py: how a call is recorded, and what repeats it. Here: which plan serves a call.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

from .dispatch import compiled_for_cpu, forced, unwatched
from .plan import FULL, Plan, Recorder, capturing

MAX_KEYS = 4096  # remembered for each form of call; the next one drops them all
MAX_ALIKE = 16  # kinds of one key; the same
NUMBERS = frozenset({"t", "step", "index", "seed"})  # arguments that may be int64 tensors too
MAX_NUMBERS = 4096  # that are kept as tensors
PATIENCE = 64  # after so many kinds in a row that were recorded and never repeated, one in so many is recorded
_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_OPTIONS = frozenset({type(None), bool, int, float, str, torch.Size, tuple, torch.dtype, torch.device})
_NVIDIA = torch.version.hip is None  # on others Triton also looks at the sizes of tensors
_all_forms: list[dict[Any, Any]] = []
Function = TypeVar("Function", bound=Callable[..., Any])


def on_gpu(x: Tensor) -> bool:
    """Whether x lies on an NVIDIA GPU."""
    return x.is_cuda and _NVIDIA


def stream_of(x: Tensor) -> int | None:
    """The address of PyTorch's current stream, if x lies on the current device, an NVIDIA GPU; else None."""
    if not on_gpu(x):
        return None
    device = x.get_device()
    return torch._C._cuda_getCurrentRawStream(device) if device == torch._C._cuda_getDevice() else None


@functools.lru_cache(MAX_NUMBERS)
def _number(value: int) -> Tensor:
    """(1,) int64 on the CPU, for every call with this number; nobody may write to it."""
    with torch.inference_mode(False):
        return torch.full((1,), value, dtype=torch.int64, device="cpu")


def _split(n: int, tensors: list[int]) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Functions of n arguments: those at the places of tensors, and the others. In C, as every call comes here."""

    def at(places: list[int]) -> Callable[[Any], Any]:
        if len(places) > 1:
            return itemgetter(*places)
        return (lambda values: (values[places[0]],)) if places else lambda values: ()

    return at(tensors), at([i for i in range(n) if i not in tensors])


def quick(*, on_cpu: bool) -> Callable[[Function], Function]:
    """A decorator of a function that checks its arguments and calls one op: it gets the quick way.

    on_cpu: whether the op has a compiled kernel for CPU tensors.
    """

    def decorate(function: Function) -> Function:
        forms: dict[tuple[Any, ...], Form] = {}
        _all_forms.append(forms)
        parameters = [*inspect.signature(function).parameters]

        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            if not on_cpu and args and isinstance(args[0], Tensor) and not on_gpu(args[0]):
                return function(*args, **options)
            if not unwatched():  # torch.compile cannot trace what comes after it on a GPU
                return function(*args, **options)
            values: Any = (*args, *options.values()) if options else args
            types = (*map(type, values), *options)
            form = forms.get(types)
            if form is None:
                if _TENSORS.isdisjoint(types) or not (_TENSORS | _OPTIONS).issuperset(types[: len(values)]):
                    return function(*args, **options)
                names = (*parameters, *[""] * len(args))[: len(args)]  # those of *args have none
                form = forms[types] = Form(types[: len(values)], (*names, *options))
            # In a key 2.0 and True are equal to integers.
            if form.tuples and not all(type(n) is int for i in form.tuples for n in values[i]):
                return function(*args, **options)
            first = values[form.first]
            stream = stream_of(first)
            if stream is None:
                if not (on_cpu and first.is_cpu) or first.is_nested:  # that has no shape, and is refused
                    return function(*args, **options)
                if form.numbers and (values := form.with_numbers(values)) is None:
                    return function(*args, **options)
                tensors, others = form.on_cpu
            else:
                tensors, others = form.on_gpu
            tensors = tensors(values)
            key = (forced(), torch.is_grad_enabled(), stream, first.shape, others(values))
            for plan in form.plans.get(key, ()):
                result = plan.repeat(stream, *tensors)
                if result is FULL:
                    return function(*args, **options)
                if result is not NotImplemented:
                    if plan.fresh:
                        form.wasted, plan.fresh = 0, False
                    return result
            if stream is None and not compiled_for_cpu(first):
                return function(*args, **options)
            if not tellable(tensors) or capturing() or not form.worth_recording():
                return function(*args, **options)
            options = dict(zip(options, values[len(args) :], strict=True))
            dense = [values[i] for i in (form.first, *form.numbers)]
            with Recorder(tensors, dense) as recorder:
                result = function(*values[: len(args)], **options)
            form.remember(key, recorder.plan(result))
            return result

        return call  # type: ignore

    return decorate


def tellable(tensors: Sequence[Tensor]) -> bool:
    """Whether a call can be recorded: its tensors are told apart by their addresses, where their values are."""
    if any(t.layout is not torch.strided or t.is_neg() or t._is_zerotensor() for t in tensors):
        return False
    return len({t.data_ptr() for t in tensors}) == len(tensors)


class Form:
    """The calls of a function whose arguments have the same names and types, and their plans."""

    def __init__(self, types: tuple[Any, ...], names: tuple[Any, ...]) -> None:
        tensors = [i for i, t in enumerate(types) if t in _TENSORS]
        self.first = tensors[0]
        self.tuples = [i for i, t in enumerate(types) if t is tuple]
        # The places of numbers that become tensors on the CPU.
        self.numbers = [i for i, name in enumerate(names) if types[i] is int and name in NUMBERS]
        self.on_gpu, self.on_cpu = _split(len(types), tensors), _split(len(types), sorted(tensors + self.numbers))
        self.plans: dict[Any, list[Plan]] = {}
        self.wasted = -1  # kinds since a plan was repeated for the first time

    def with_numbers(self, values: Any) -> Any:
        """The arguments with tensors for numbers; None if one takes more than 64 bits."""
        given = [*values]
        for i in self.numbers:
            if not -(2**63) <= given[i] < 2**63:
                return None
            given[i] = _number(given[i])
        return given

    def worth_recording(self) -> bool:
        """Whether to record one more kind. There may be a new one in every call, such as a seed."""
        self.wasted += 1
        return self.wasted < PATIENCE or self.wasted % PATIENCE == 0

    def remember(self, key: Any, plan: Plan) -> None:
        """Keep a plan. A key tells most kinds of call apart, and each plan the rest."""
        if len(self.plans) >= MAX_KEYS:
            self.plans.clear()
        alike = self.plans.setdefault(key, [])
        if len(alike) >= MAX_ALIKE:
            alike.clear()
        alike.append(plan)


def forget() -> None:
    """Forget every plan: for tests that change what a plan depends on."""
    for forms in _all_forms:
        forms.clear()
