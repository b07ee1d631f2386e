"""`Replay`: what `accelerate` puts in the place of a network's forward: CUDA graphs of it, or compiled code."""

import inspect
import threading
import types
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..graphs import CudaGraphs, WatchedCalls, what_forbids_here
from ..ops.plan import capturing
from ..support.footprint import REPLAY
from ..support.plain import is_wrapped


class Replay:
    """The forward of a network: replayed as a CUDA graph for each kind of arguments, or compiled, or both.

    It is an attribute `forward` of the network itself. So the network keeps its class, and hooks on it run as ever. A
    graph is replayed only while the network's `Footprint` holds. Copies and pickles begin without graphs.

    Args:
        network: whose forward it is.
        name: of this forward in `left`.
        left: gets the reason while calls run without a graph though they should.
    """

    def __init__(self, network: nn.Module, name: str, left: dict[str, str]) -> None:
        self.network, self.name, self.left = network, name, left
        self.set(graph=False, compile=False)

    def set(self, graph: bool, compile: bool) -> None:
        """Begin anew with these options."""
        self.graph, self.compile = graph, compile
        self.run = torch.compile(self.stock) if compile else self.stock
        self.lock = threading.RLock()
        self.calls = WatchedCalls(self.run, self.network, [self.network], CudaGraphs)
        names = list(self.__signature__.parameters)
        stock = any(base.__module__.startswith("diffusers.") for base in type(self.network).__mro__)
        self.time_at = names.index("timestep") if stock and "timestep" in names else None

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("network", "name", "left", "graph", "compile")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.network, self.name, self.left = state["network"], state["name"], state["left"]
        self.set(state["graph"], state["compile"])

    @property
    def __signature__(self) -> inspect.Signature:
        """The network's own: pipelines look which arguments it takes."""
        return inspect.signature(stock_forward(self.network))

    def stock(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.network).forward(self.network, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's result. A graph's is a copy, and the caller's own."""
        if self.graph and not within_another():
            with self.lock:
                args_on_device, kwargs_on_device = self._time_on_device(args, kwargs)
                reason = self._reason((args_on_device, kwargs_on_device))
                if reason is None:
                    # Tensors that were made in inference mode could not be written at a later call outside of it.
                    with torch.inference_mode(False), torch.no_grad():
                        out = self.calls(*args_on_device, **kwargs_on_device)
                self._say(reason or self.calls.forbidden)
                if reason is None:
                    return out
        return self.run(*args, **kwargs)

    def _reason(self, arguments: Any) -> str | None:
        """Why this call cannot be a replay, as what it needs; None if it can."""
        if torch.is_grad_enabled():
            return "a call without gradients"
        if self.network.training:
            return "a network in eval mode"
        return self.calls.what_forbids(arguments, self.device)

    def _say(self, reason: str | None) -> None:
        """Keep `left` up to date, and warn of each new reason."""
        if reason is None:
            self.left.pop(self.name, None)
        elif self.left.get(self.name) != needs(reason):
            self.left[self.name] = needs(reason)
            warnings.warn(f"accelerate: {self.name} runs without: {needs(reason)}", stacklevel=4)

    @property
    def device(self) -> torch.device:
        """Where the network is, or what is first of it."""
        parameter = next(self.network.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def _time_on_device(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with the time as a tensor on the device: a number would be a constant of the graph.

        The networks of diffusers take an integer for a tensor of it, and bring a tensor of the host to the device.
        """
        at = self.time_at
        if at is None or not ("timestep" in kwargs or at < len(args)):
            return args, kwargs
        time = kwargs["timestep"] if "timestep" in kwargs else args[at]
        if isinstance(time, Tensor) and time.device.type == "cpu" and time.numel() == 1:
            time = torch.full(time.shape, time.item(), dtype=time.dtype, device=self.device)
        elif isinstance(time, int) and not isinstance(time, bool):
            time = torch.full((), time, dtype=torch.int64, device=self.device)
        if "timestep" in kwargs:
            return args, {**kwargs, "timestep": time}
        return (*args[:at], time, *args[at + 1 :]), kwargs


def within_another() -> bool:
    """Whether this call is being compiled, or captured, as a part of something else."""
    return torch.compiler.is_compiling() or capturing()


def needs(reason: str) -> str:
    """What `left` says."""
    return f"a graph needs {reason}"


def stock_forward(network: nn.Module) -> Any:
    """The forward of the network's class, bound to it."""
    return types.MethodType(type(network).forward, network)


def replay_of(network: nn.Module) -> Replay | None:
    """The Replay in a network, also where something was wrapped around it."""
    replay: Replay | None = vars(network).get(REPLAY)
    return replay


def put_in(network: nn.Module, name: str, left: dict[str, str], graph: bool, compile: bool) -> bool:
    """Replay or compile the forward of a network from here on; in `left`, by name, what forbids it.

    Returns: whether that is new.
    """
    replay = replay_of(network)
    if replay is None and is_wrapped(network):
        left[name] = "it is wrapped, as offloading does"
        return False
    if replay is None and network._compiled_call_impl is not None:
        left[name] = "it is compiled already"
        return False
    if replay is None:
        replay = Replay(network, name, left)
        network.forward = replay
        setattr(network, REPLAY, replay)
    replay.name, replay.left = name, left  # the latest list is kept up to date
    reason = what_forbids_here(replay.device) or replay.calls.forbidden
    if reason is not None and (graph or replay.graph):
        left[name] = needs(reason)
    if (graph or replay.graph, compile or replay.compile) == (replay.graph, replay.compile):
        return False
    replay.set(graph or replay.graph, compile or replay.compile)
    return True


def take_out(network: nn.Module) -> bool:
    """Undo `put_in`. Returns whether there was something to undo."""
    replay = replay_of(network)
    if replay is None:
        return False
    delattr(network, REPLAY)
    replay.set(graph=False, compile=False)  # whoever wrapped it keeps it
    if vars(network).get("forward") is replay:
        del network.forward
    elif vars(network).get("_old_forward") is replay:  # what Accelerate puts back
        network._old_forward = stock_forward(network)
    return True
