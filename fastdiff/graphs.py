"""Functions captured as CUDA graphs: a replay is one launch, and runs no Python of the function.

    Captured        a function of nothing: it runs, is recorded, and is replayed from then on
    CapturedCalls   a function of tensors, captured for each kind of arguments that it gets
    WatchedCalls    the same, captured anew whenever an object changes that the function reads

A Recorder makes the graphs. Whatever cannot be captured runs as it is, and the reason is told.
"""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._C import _len_torch_dispatch_stack
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from .ops.dispatch import forced
from .ops.plan import capturing
from .support import walk
from .support.footprint import Footprint
from .support.plain import has_global_hooks, is_wrapped

# Captures are kept for this many kinds of call; each holds the memory of one call.
MOST_CAPTURES = 4
# Calls of each kind that run before one is captured: kernels are compiled, libraries set up.
WARM_UP = 2
# A function is not captured any more if what it reads changes between this many calls in a row.
MOST_CHANGES = 8
# What PyTorch warns of, if it is told to, where the host waits for the device.
WAIT = "called a synchronizing CUDA operation"
# What an argument may be beside a tensor; a graph has its value as a constant.
PLAIN = (bool, int, float, str, type(None))

# Networks whose forward may talk to other devices or processes.
PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)

Function = Callable[[], None]
Refuse = Callable[[RuntimeError], None]


# One thread at a time is watched or records: to begin a capture waits for the device, which another capture forbids.
_turn = threading.Lock()


class Recorder(Protocol):
    """Records what a function does on the device, so that it can be done again without Python."""

    def follow(self) -> None:
        """Let this stream wait for the earlier calls, which may have been on other streams."""

    def warm_up(self, function: Function, watched: bool = False) -> str | None:
        """Run it as it will be recorded. watched: returns what in it waits for the device, or None."""

    def record(self, function: Function) -> Function:
        """Record it, without running it, and return what replays it."""


class CudaGraphs:
    """A Recorder that makes CUDA graphs, which share their memory: one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool: Any = None  # the memory of the graphs that live
        self.graphs: WeakSet[Any] = WeakSet()
        self.last: Any = None  # the stream of the calls before

    def follow(self) -> None:
        current = torch.cuda.current_stream(self.device)
        if self.last is not None and self.last != current:
            current.wait_stream(self.last)
        self.last = current

    def warm_up(self, function: Function, watched: bool = False) -> str | None:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        block: AbstractContextManager[list[str]] = watching() if watched else nullcontext([])
        try:
            with block as waits, torch.cuda.stream(self.stream):
                function()
        finally:
            current.wait_stream(self.stream)
        return waits[0] if waits else None

    def record(self, function: Function) -> Function:
        with torch.cuda.device(self.device):
            graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            if not self.graphs:  # PyTorch lets no graph into a pool of dead graphs while a tensor of theirs lives
                self.pool = torch.cuda.graph_pool_handle()
            # cuBLAS takes its workspace from the graph's own memory: PyTorch may free the one outside.
            torch._C._cuda_clearCublasWorkspaces()
            try:
                # Other threads, such as those that pin memory for a DataLoader, go on meanwhile.
                with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                    function()
            except RuntimeError:
                torch.cuda.set_stream(current)  # a failed capture leaves its own
                self._end_failed_capture()
                raise
            finally:
                torch._C._cuda_clearCublasWorkspaces()
                torch.cuda.set_stream(current)
        self.graphs.add(graph)
        replay: Function = graph.replay
        return replay

    def _end_failed_capture(self) -> None:
        """PyTorch's allocator and generator take a failed capture for one that goes on. The end of another ends it."""
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self.pool)
            torch._C._cuda_releasePool(torch.cuda.current_device(), self.pool)
        self.pool, self.graphs = None, WeakSet()
        another = torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self.stream, capture_error_mode="thread_local")
        with suppress(RuntimeError), another:
            torch.zeros(1, device=self.device)


@contextmanager
def watching() -> Iterator[list[str]]:
    """A list of the places where this thread waits for the device in the block, as far as PyTorch knows of it.

    PyTorch warns of them, in all threads. Those of others are not shown.
    """
    waits: list[str] = []
    mode, thread = torch.cuda.get_sync_debug_mode(), threading.get_ident()
    with warnings.catch_warnings():
        show = warnings.showwarning

        def note(message: Any, category: type[Warning], filename: str, lineno: int, *more: Any) -> None:
            if WAIT not in str(message):
                show(message, category, filename, lineno, *more)
            elif threading.get_ident() == thread:
                waits.append(f"it waits for the device in {filename}, line {lineno}")

        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        warnings.filterwarnings("always", WAIT)
        warnings.showwarning = note  # type: ignore[assignment]
        try:
            torch.cuda.set_sync_debug_mode("warn")
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(mode)


class Captured:
    """A function that is recorded after WARM_UP calls, and replayed from then on. It keeps no function alive."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.calls = 0
        self.watched = self.refused = False
        self.replay: Function | None = None

    def __call__(self, function: Function, refuse: Refuse) -> None:
        """Do what the function does.

        Args:
            function: the same at every call.
            refuse: gets the error if the function cannot be captured, and may raise it; else it runs as it is.
        """
        if self.replay is not None:
            self.replay()
            return
        self.calls += 1
        if self.refused or self.calls < WARM_UP or not _turn.acquire(blocking=False):
            self.recorder.warm_up(function)
            return
        try:
            if not self.watched:
                self.watched = True
                if waits := self.recorder.warm_up(function, watched=True):
                    self._refuse(RuntimeError(waits), refuse)
                return
            try:
                self.replay = self.recorder.record(function)
            except RuntimeError as error:
                self._refuse(error, refuse)
        finally:
            _turn.release()
        self(function, refuse)

    def _refuse(self, error: RuntimeError, refuse: Refuse) -> None:
        self.refused = True
        refuse(error)


class CapturedCall:
    """A function captured for one kind of arguments, which it reads from tensors of its own."""

    def __init__(
        self, function: Callable[..., Any], values: list[Any], spec: Any, recorder: Recorder, refuse: Refuse
    ) -> None:
        self.function, self.spec, self.refuse = function, spec, refuse
        self.own = [torch.empty_like(value) if isinstance(value, Tensor) else value for value in values]
        self.captured = Captured(recorder)
        self.out: Any = None

    def __call__(self, values: list[Any]) -> Any:
        self.captured.recorder.follow()
        pairs = [(own, value) for own, value in zip(self.own, values, strict=True) if isinstance(own, Tensor)]
        for own, value in pairs:
            own.copy_(value)
        versions = [own._version for own, _ in pairs]
        self.captured(self._run, self.refuse)
        if self.captured.replay is None and versions != [own._version for own, _ in pairs]:
            self.refuse(RuntimeError("it writes into its arguments"))
            for own, value in pairs:
                value.copy_(own)
        others = {type(value).__name__ for value in tree_leaves(self.out) if not isinstance(value, (Tensor, *PLAIN))}
        if others:  # the next call would overwrite tensors inside of them
            self.refuse(RuntimeError(f"its result is of {', '.join(sorted(others))}"))
        return tree_map_only(Tensor, torch.clone, self.out)

    def _run(self) -> None:
        # The function gets new containers each time: it may take elements out of a list.
        args, kwargs = tree_unflatten(self.own, self.spec)
        self.out = self.function(*args, **kwargs)


class CapturedCalls:
    """A function captured for the most recent kinds of its arguments, tensors and plain values in any containers.

    The tensors of a result are the caller's own; its other values are those of the capture.
    """

    def __init__(self, function: Callable[..., Any], recorder: Recorder, refuse: Refuse) -> None:
        self.function, self.recorder, self.refuse = function, recorder, refuse
        self.kept: OrderedDict[Any, CapturedCall] = OrderedDict()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        values, spec = tree_flatten((args, kwargs))
        kind = (repr(spec), tuple(map(kind_of_value, values)), settings())
        if kind not in self.kept:
            self.kept[kind] = CapturedCall(self.function, values, spec, self.recorder, self.refuse)
        self.kept.move_to_end(kind)
        while len(self.kept) > MOST_CAPTURES:
            self.kept.popitem(last=False)
        return self.kept[kind](values)


class WatchedCalls:
    """A function captured as long as the objects that it reads stay what they are, see `Footprint`.

    Args:
        function: what to capture, as in CapturedCalls.
        reads: those objects.
        networks: the modules among them that it calls.
        recorder: makes a recorder for a device.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        reads: object,
        networks: list[nn.Module],
        recorder: Callable[[torch.device], Recorder],
    ) -> None:
        self.function, self.reads, self.networks, self.recorder = function, reads, networks, recorder
        self.footprint: Footprint | None = None
        self.calls: CapturedCalls | None = None
        self.forbidden: str | None = None
        self.changes = 0

    def what_forbids(self, arguments: Any, device: torch.device) -> str | None:
        """Why a call cannot be captured, as what it needs; None if it can. Outdated captures are dropped."""
        if has_global_hooks():
            return "no hooks on all modules"
        reason = what_forbids_here(device) or what_forbids_arguments(arguments, device)
        if reason is None and self.changes < MOST_CHANGES:
            if self.footprint is None or not self.footprint.holds():
                self._look(device)
            else:
                self.changes = 0
        return reason or self.forbidden

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's result, if nothing forbids the call. `forbidden` says afterwards what forbids the next."""
        assert self.calls is not None
        return self.calls(*args, **kwargs)

    def _look(self, device: torch.device) -> None:
        self.changes += 1
        self.footprint = Footprint(self.reads)
        self.calls = CapturedCalls(self.function, self.recorder(device), self._refuse)
        reasons = [what_forbids_model(network, device) for network in self.networks]
        self.forbidden = next((reason for reason in reasons if reason), None)
        if any(is_wrapped(part) for network in self.networks for part in walk.modules(network)[1:]):
            self.forbidden = "layers whose forward is not wrapped, as offloading does"
        if self.changes == MOST_CHANGES:
            self.forbidden = "a network that does not change at every call"

    def _refuse(self, error: RuntimeError) -> None:
        self.forbidden = f"a network that can be captured ({str(error).splitlines()[0]})"


def kind_of_value(value: Any) -> Any:
    """What a graph takes from an argument when it is captured: all but the values of a tensor."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device
    return type(value), value


def settings() -> tuple[Any, ...]:
    """The settings of the process that a graph follows as they were when it was captured."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by PyTorch's newer names, beside which it does not know these
        precision = torch.backends.cuda.matmul.fp32_precision
    attention = (getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in ("flash", "mem_efficient", "cudnn"))
    exact = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    return forced(), precision, *exact, *attention


def what_forbids_here(device: torch.device) -> str | None:
    """Why no call on this device can be captured, as what it needs; None if it can."""
    if device.type != "cuda":
        return f"a model on CUDA, got one on {device.type}"
    if torch.version.hip is not None:  # there an error within a capture need not be told
        return "an NVIDIA GPU, got one of ROCm, on which no capture was ever tried"
    if torch.compiler.is_compiling() or capturing():
        return "a call that is not compiled or captured as a part of something else"
    if _len_torch_dispatch_stack():
        return "no mode of PyTorch's dispatcher, such as FlopCounterMode, which sees nothing of a replay"
    if torch.is_autocast_enabled(device.type):
        return "no autocast, whose copies of the weights do not outlive it; use dtype"
    return None


def what_forbids_model(model: nn.Module, device: torch.device) -> str | None:
    """Why calls of a model cannot be captured, as what they need; None if they can."""
    if any(p.device != device for p in walk.parameters(model)):
        return "all weights on one device, got several"
    parts = walk.modules(model)
    if any(isinstance(m, PARALLEL) for m in parts):
        return "a network on one GPU in one process"
    if any(m._forward_hooks or m._forward_pre_hooks for m in parts):
        return "a model without forward hooks, which a replay would not call"
    return None


def what_forbids_arguments(arguments: Any, device: torch.device) -> str | None:
    """Why a call with arguments, in containers of any kind, cannot be captured, as what it needs; None if it can."""
    for value in tree_flatten(arguments)[0]:
        if isinstance(value, Tensor):
            if value.device != device:
                return f"all tensors on {device}, got one on {value.device}"
            if value.requires_grad and torch.is_grad_enabled():
                return "arguments of which no gradient is wanted"
        elif not isinstance(value, PLAIN):
            return f"tensors and plain values as arguments, got {type(value).__name__}"
    return None
