"""Sampling steps captured as CUDA graphs.

A captured step has tensors of its own: the state, what the sampler remembers, the tables of all steps, and a counter on
the device. It reads the rows of the step that the counter names, overwrites the state and counts on. A replay is one
launch: it runs no Python of the model and copies no inputs. It does what the plain loop does, bit for bit.

    captures.steps(run)     the steps of a run, for sampling.walk: replayed, or captured by their first run
    is_captured(...)        whether steps are captured
"""

import functools
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .denoiser import Denoiser
from .graphs import (
    MOST_CAPTURES,
    PLAIN,
    Captured,
    CudaGraphs,
    Recorder,
    settings,
    what_forbids_here,
    what_forbids_model,
)
from .guidance import Pair
from .sampling import Operands, Run, Steps, advance, conditions, given_noise
from .support import walk
from .support.footprint import Footprint
from .support.sharded import is_sharded


class CapturedSteps:
    """The steps of all runs of one kind, see `kind_of`: tensors of their own, and a graph for each kind of step."""

    def __init__(self, run: Run, recorder: Recorder) -> None:
        self.recorder, self.required = recorder, False
        self.busy = False  # a run goes on, or was broken off
        self.weights = weights_of(run.denoiser.model)
        self.graphs: dict[str, Captured] = {}
        self.reads: dict[str, Footprint] = {}
        self.run = run
        self.x = torch.empty_like(run.x)
        first = Steps(run)
        self.rows, self.condition, self.hist, self.memory = first.rows, first.condition, first.hist, first.memory
        self.own_estimate, rows = first.own_estimate, first.own_estimate_rows
        self.own_estimate_rows = None if rows is None else rows.clone()
        self.counter = torch.zeros(1, dtype=torch.int64, device=run.x.device)
        self.noise = torch.empty_like(self.x) if run.noise is not None else None
        self.seed = None if run.seed is None else run.seed.clone()
        self.sample_ids = None if run.sample_ids is None else run.sample_ids.clone()
        self.model_kwargs = {
            name: value.clone() if isinstance(value, Tensor) else value for name, value in run.model_kwargs.items()
        }
        self.time_arguments: dict[str, Tensor] | None = None

    def begin(self, run: Run, required: bool) -> "CapturedSteps":
        """Take the inputs of a run of the same kind. required: whether a step that cannot be captured is an error."""
        self.recorder.follow()
        self.run, self.required = run, required
        self.x.copy_(run.x)
        self.rows.copy_(run.table.rows)
        self.condition.copy_(conditions(run))
        self.counter.zero_()
        if self.own_estimate_rows is not None and run.own_estimate_rows is not None:
            self.own_estimate_rows.copy_(run.own_estimate_rows)
        for kept in (self.hist, self.memory, self.own_estimate):
            if kept is not None:
                kept.zero_()
        if self.seed is not None and run.seed is not None:
            self.seed.copy_(run.seed)
        if self.sample_ids is not None and run.sample_ids is not None:
            self.sample_ids.copy_(run.sample_ids)
        for name, value in self.model_kwargs.items():
            if isinstance(value, Tensor):
                value.copy_(run.model_kwargs[name])
        return self

    def start(self) -> None:
        computed = self.run.denoiser.time_arguments(self.condition[:, 0])
        if self.time_arguments is None:
            with torch.inference_mode(False), torch.no_grad():
                self.time_arguments = {name: rows.clone() for name, rows in computed.items()}
        else:
            for name, rows in self.time_arguments.items():
                rows.copy_(computed[name])

    def take(self, k: int) -> None:
        kind, given = self.run.table.kinds[k], given_noise(self.run, k)
        if self.noise is not None and given is not None:
            self.noise.copy_(given)
        if kind not in self.graphs:
            self.graphs[kind] = Captured(self.recorder)
        captured = self.graphs[kind]
        captured(functools.partial(self._advance, kind), self._refuse)
        if captured.replay is not None and kind not in self.reads:
            # The network may drop what it keeps of a shape, such as positions; the graph goes on to read it.
            self.reads[kind] = Footprint(self.run.denoiser.model)

    def finish(self) -> Tensor:
        x = self.run.x.copy_(self.x)
        self.run = replace(self.run, x=self.x, noise=None, model_kwargs={})  # not to keep what the caller owns
        self.busy = False
        return x

    def _refuse(self, error: RuntimeError) -> None:
        """A step cannot be captured: say so, or raise the error if a graph is required."""
        if self.required:
            raise error
        reason = str(error).splitlines()[0]
        warnings.warn(f"graph: the step cannot be captured and runs without ({reason})", stacklevel=2)

    def _advance(self, kind: str) -> None:
        """The step that the counter names, with nothing that depends on the run but by these tensors."""
        run, at = self.run, self.counter
        seed = self.seed if self.noise is None and run.options.noisy else None
        ahead = {name: rows.index_select(0, at) for name, rows in (self.time_arguments or {}).items()}
        asked = (self.condition.index_select(0, at)[0], {**ahead, **self.model_kwargs})
        kept = (self.hist, self.memory, self.own_estimate, self.own_estimate_rows)
        operands = Operands(*asked, self.rows, at, seed, self.sample_ids, self.noise, *kept)
        advance(kind, run.denoiser, self.x, operands, run.options)
        at.add_(1)


class Captures:
    """Captured steps by kind of run, the most recent ones, each until a weight of the model moves. Copies are empty."""

    def __init__(self, recorder: Callable[[torch.device], Recorder] = CudaGraphs) -> None:
        self.recorder = recorder
        self.kept: OrderedDict[Any, CapturedSteps] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Captures, ()

    def steps(self, run: Run, required: bool = False) -> CapturedSteps:
        """The steps of a run, captured before or to be captured by it.

        required: raise RuntimeError if a step cannot be captured; else it runs without, with a warning.
        """
        kind, weights = kind_of(run), weights_of(run.denoiser.model)
        with self._lock:
            steps = self.kept.get(kind)
            # A run of another thread, or around this one, goes on in its tensors.
            if steps is None or steps.busy or steps.weights != weights:
                with torch.inference_mode(False):  # whose tensors no later run outside of it could write
                    steps = CapturedSteps(run, self.recorder(run.x.device))
            steps.busy = True
            self.kept[kind] = steps
            self.kept.move_to_end(kind)
            while len(self.kept) > MOST_CAPTURES:
                self.kept.popitem(last=False)
        return steps.begin(run, required)


def is_captured(
    graph: bool | None, denoiser: Denoiser, model_kwargs: dict[str, Any], batch: int, compiled: bool
) -> bool:
    """Whether to capture the steps, as the option `graph` of `sample` says; ValueError if they have to be and cannot.

    compiled: whether the step is compiled.
    """
    if graph is False:
        return False
    reason = what_forbids(denoiser, model_kwargs, batch)
    if compiled:
        reason = "a model that is not compiled; its step is a graph already"
    if graph and reason is not None:
        raise ValueError(f"graph: expected {reason}")
    return reason is None


def what_forbids(denoiser: Denoiser, model_kwargs: dict[str, Any], batch: int) -> str | None:
    """Why a step cannot be captured, as what it needs, for an error that says "expected ...". None if it can."""
    wrong = [name for name, value in model_kwargs.items() if not isinstance(value, (Tensor, *PLAIN))]
    reason = what_forbids_here(denoiser.device) or what_forbids_model(denoiser.model, denoiser.device)
    if reason is None and not batch:
        return "at least one sample, got none"
    if reason is None and is_sharded(denoiser):
        return "a model that FSDP does not split"
    if reason is None and any(map(is_compiled, walk.modules(denoiser.model))):
        return "a network that is not compiled, as its code may be a graph already"
    if reason is None and wrong:
        return f"tensors and plain values as arguments of the model, got {wrong[0]}"
    return reason


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile was called on it."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def kind_of(run: Run) -> Any:
    """What a captured step has in common with the step of another run; all else is copied into its tensors."""
    arguments = tuple(
        (name, (tuple(v.shape), v.dtype, v.device) if isinstance(v, Tensor) else repr(v))
        for name, v in sorted(run.model_kwargs.items())
    )
    return (
        tuple(run.x.shape),
        run.x.stride(),
        run.x.dtype,
        run.x.device,
        tuple(run.table.rows.shape),
        run.table.slots,
        run.options,
        run.own_estimate_rows is None,
        run.denoiser.model.__class__,
        run.denoiser.parameter_dtype,
        run.noise is None,
        run.seed is None,
        run.sample_ids is None,
        arguments,
        settings(),
    )


def weights_of(model: nn.Module) -> tuple[Any, ...]:
    """Where the weights are, and which modules use them: a captured step stays valid while this stays the same."""
    return (
        tuple([(t.data_ptr(), t.dtype, t.stride()) for t in walk.tensors(model)]),
        tuple([(id(m), type(m)) for m in walk.modules(model) if not isinstance(m, Pair)]),
    )
