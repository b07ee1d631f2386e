"""The one loop over a step table.

A `Run` says what to do, `Steps` takes its steps one by one, and `walk` is the loop around them.

A network may do part of its work before the loop. It then has the method

    time_arguments(t) -> dict of tensors (N, ...)

It returns keyword arguments of its forward that follow from t (N,) alone, such as embeddings. The loop calls it once
for all steps, with what the model sees of the times, and passes row k, (1, ...), at step k.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import ops
from .denoiser import Denoiser, Prediction, own_rows
from .estimates import Callback, own_estimate_rows, takes_own_estimate
from .guidance import Rule, guided, remembers
from .reference import work_dtype
from .rows import columns, history_columns, make_rows
from .steps import StepTable
from .support import transforms
from .support.progress import bar
from .support.shapes import flat

Noise = Tensor | Callable[[int], Tensor] | None


class StepOptions(NamedTuple):
    """What all steps of a run have in common; constants of a compiled step.

    clip, keep, noisy: as in ops.update. learned: whether the model says how much noise. guided: whether the model is
    asked without the condition too. rule: how both predictions become one, None for ops.update's way.
    """

    clip: float | None
    keep: str
    noisy: bool
    learned: bool = False
    guided: bool = False
    rule: Rule | None = None

    @classmethod
    def of(
        cls, table: StepTable, clip: float | None, noise: Noise = None, guided: bool = False, rule: Rule | None = None
    ) -> "StepOptions":
        """Those of the steps of a table, with noise that is given or None."""
        return cls(clip, table.keep, table.noisy or noise is not None, table.learned, guided, rule)


class Operands(NamedTuple):
    """What one step reads beside the state.

    condition, model_kwargs: as in Denoiser.call_model.
    rows, step, seed, sample_ids, noise, hist: as in ops.update, the rows of all steps and the number (1,) of this one.
    memory: that of the rule, or None.
    own_estimate: of x_0, that the network is told, or None. It may be hist.
    own_estimate_rows: what makes the next one, if hist is another; or None.
    """

    condition: Tensor
    model_kwargs: dict[str, Any]
    rows: Tensor
    step: Tensor
    seed: Tensor | None = None
    sample_ids: Tensor | None = None
    noise: Tensor | None = None
    hist: Tensor | None = None
    memory: Tensor | None = None
    own_estimate: Tensor | None = None
    own_estimate_rows: Tensor | None = None

    def kept(self) -> tuple[Tensor, ...]:
        """What a step overwrites for the next one."""
        apart = None if self.own_estimate_rows is None else self.own_estimate
        return tuple(t for t in (self.hist, self.memory, apart) if t is not None)


@dataclass(frozen=True)
class Run:
    """A walk along a step table.

    Args:
        denoiser: what predicts.
        table: its steps.
        x: (B, ...), the state to start from; every step overwrites it.
        options: what the steps have in common.
        seed: of the noise, an int64 tensor.
        sample_ids: (B,), the number of each sample in the seed's noise, or None for 0..B-1.
        noise: (n, B, ...), or a function from the step's number to (B, ...), in place of the seed's noise.
        model_kwargs: the model's further arguments.
        compiled: `step`, compiled, or None to run it as it is.
        estimates: whether the callback is told x0hat, see with_estimates.
    """

    denoiser: Denoiser
    table: StepTable
    x: Tensor
    options: StepOptions
    seed: Tensor | None = None
    sample_ids: Tensor | None = None
    noise: Noise = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    compiled: Callable[..., tuple[Tensor, ...]] | None = None
    estimates: bool = False

    @functools.cached_property
    def own_estimate_rows(self) -> Tensor | None:
        """The rows of estimates.own_estimate_rows, on the state's device."""
        with transforms.with_values():
            rows = own_estimate_rows(self.denoiser, self.table, self.model_kwargs)
        return None if rows is None else numbers_for(self.x, rows)


class Steps:
    """The steps of a run, one after another, with all that they read on its device."""

    def __init__(self, run: Run) -> None:
        self.run, self.x = run, run.x
        n, device = len(run.table), run.x.device
        self.rows = numbers_for(run.x, run.table.rows)
        self.index = torch.arange(n, device=device)[:, None]
        self.hist = no_history(run)
        self.memory = torch.zeros_like(run.x) if remembers(run.options.rule) else None
        self.own_estimate_rows = run.own_estimate_rows
        self.own_estimate = self.hist if takes_own_estimate(run.denoiser, run.model_kwargs) else None
        if self.own_estimate_rows is not None:
            self.own_estimate = torch.zeros_like(run.x)
        self.condition = conditions(run)
        self.time_arguments: dict[str, Tensor] = {}

    def start(self) -> None:
        """Before the first step."""
        self.time_arguments = self.run.denoiser.time_arguments(self.condition[:, 0]) if len(self.x) else {}

    def operands(self, k: int) -> Operands:
        """What step k reads."""
        run, noise = self.run, given_noise(self.run, k)
        seed = run.seed if noise is None and run.options.noisy else None
        ahead = {name: rows[k : k + 1] for name, rows in self.time_arguments.items()}
        kept = (self.hist, self.memory, self.own_estimate, self.own_estimate_rows)
        asked = (self.condition[k], {**ahead, **run.model_kwargs})
        return Operands(*asked, self.rows, self.index[k], seed, run.sample_ids, noise, *kept)

    def take(self, k: int) -> None:
        """Step k, from the state that step k - 1 left."""
        run, operands = self.run, self.operands(k)
        if run.compiled is None or run.table.kinds[k] != "predict":
            advance(run.table.kinds[k], run.denoiser, run.x, operands, run.options)
            return
        # The graph's outputs live in its own memory until the next replay.
        torch.compiler.cudagraph_mark_step_begin()
        new, *kept = run.compiled(run.denoiser, run.x, operands, run.options)
        for place, value in zip((run.x, *operands.kept()), (new, *kept), strict=True):
            place.copy_(value)

    def finish(self) -> Tensor:
        """After the last step: the state."""
        return self.x


class StepsWithGradient(Steps):
    """The steps of a run. The last `count` leave new states with a gradient, so no step may remember an earlier one."""

    def __init__(self, run: Run, count: int) -> None:
        super().__init__(run)
        self.first = len(run.table) - count

    def start(self) -> None:
        # What the model computes ahead has no gradient: from `first` on, each step computes it.
        if self.first:
            super().start()

    def take(self, k: int) -> None:
        if k < self.first:
            super().take(k)
            return
        self.time_arguments = {}
        with transforms.with_gradients():
            run, x, operands = self.run, self.x, self.operands(k)
            if run.table.kinds[k] == "add":
                self.x = update(x, Prediction(x), operands, run.options)
            else:
                self.x, *kept = step(run.denoiser, x, operands, run.options)
                self.own_estimate = None if self.own_estimate is None else kept.pop()
                self.memory = kept[0] if kept else None  # no sampler with hist has gradients


class Walker(Protocol):
    """How the steps of a run are taken: one by one (Steps), or as captured graphs (fastdiff.capture)."""

    run: Run
    x: Tensor  # the state; each step overwrites it
    hist: Tensor | None

    def start(self) -> None: ...

    def take(self, k: int) -> None: ...

    def finish(self) -> Tensor: ...


def steps_of(run: Run, grad_steps: int = 0) -> Steps:
    """The steps of a run, one by one. The last grad_steps have a gradient."""
    return StepsWithGradient(run, grad_steps) if grad_steps else Steps(run)


def walk(
    steps: Walker, *, progress: bool = False, callback: Callback | None = None, return_trajectory: bool = False
) -> Tensor:
    """Take all steps of a run, each in eval mode and without gradients.

    Gradients are off by `no_grad`, not by inference mode: what a model keeps from a call can be trained on later, and a
    callback may take gradients.

    Args:
        steps: of the run; its x is overwritten.
        progress: show a bar (needs tqdm).
        callback: called as callback(k, level, x) after step k, with the state at that level, and x0hat as a fourth
            argument if run.estimates. It may overwrite x, or return the state to go on from.
        return_trajectory: keep every state, as the callback leaves it.

    Returns: the run's x, or (n + 1, B, ...) from the start to the end.
    """
    run, n = steps.run, len(steps.run.table)
    path = torch.empty(n + 1, *run.x.shape, dtype=run.x.dtype, device=run.x.device) if return_trajectory else None
    if path is not None:
        path[0] = run.x
    eval_mode = run.denoiser.evaluating()
    with transforms.with_values():
        levels = transforms.as_list(run.table.levels)
    with transforms.without_gradients():
        with eval_mode:
            steps.start()
        for k in bar(n, progress):
            with eval_mode:
                steps.take(k)
                if callback is not None:
                    more = (estimate(steps, k),) if run.estimates else ()
                    replace_state(steps.x, callback(k, levels[k + 1], steps.x, *more))
            if path is not None:
                path[k + 1] = steps.x
        x = steps.finish()
    return x if path is None else path


def estimate(steps: Walker, k: int) -> Tensor | None:
    """The estimate of x_0 in step k; None if it made none."""
    table, hist = steps.run.table, steps.hist
    if hist is None or table.kinds[k] != "predict":
        return None
    if table.slots == 1:
        return hist
    with transforms.with_values():
        slot = int(history_columns(table.rows[k]).slot)
    return hist[slot] if 0 <= slot < table.slots else None


def replace_state(x: Tensor, new: Any) -> None:
    """Overwrite the state with what a callback returned. TypeError or ValueError unless it is None or such a tensor."""
    if new is None or new is x:
        return
    if not isinstance(new, Tensor):
        raise TypeError(f"callback: expected it to return None or a tensor, got {type(new).__name__}")
    if new.shape != x.shape:
        raise ValueError(f"callback: expected a state of shape {tuple(x.shape)}, got {tuple(new.shape)}")
    x.copy_(new.detach())


def no_history(run: Run) -> Tensor | None:
    """What the first step of a run remembers: zeros like x, or (slots, B, ...) that lie in memory as x does."""
    x, slots = run.x, run.table.slots
    if run.options.keep == "none":
        return None
    return torch.zeros_like(x if slots == 1 else x[None].expand(slots, *x.shape))


def numbers_for(x: Tensor, numbers: Tensor) -> Tensor:
    """Numbers of levels where the state is, in the type that it is computed in."""
    return transforms.admitted(numbers).to(x.device, work_dtype(x.dtype))


def conditions(run: Run) -> Tensor:
    """(n, B): what the model sees of the time at every step; (n, 2 B) if it is asked for both branches."""
    with transforms.with_values():
        condition = run.denoiser.condition(run.table.levels[:-1])
    condition = transforms.admitted(condition).to(run.x.device)
    return condition[:, None].expand(-1, len(run.x) * (2 if run.options.guided else 1)).contiguous()


def given_noise(run: Run, k: int) -> Tensor | None:
    """The noise that was given for step k; None to draw it from the seed."""
    if run.noise is None or isinstance(run.noise, Tensor):
        return None if run.noise is None else run.noise[k]
    given = run.noise(k)
    if not isinstance(given, Tensor):
        raise TypeError(f"noise: expected the function to return a tensor, got {type(given).__name__}")
    return given


# --- one step ---------------------------------------------------------------------------------------------------


def advance(kind: str, denoiser: Denoiser, x: Tensor, operands: Operands, options: StepOptions) -> None:
    """One step of a kind, see StepTable, in place."""
    if kind == "add":
        update(x, Prediction(x), operands, options, inplace=True)
    elif kind == "correct":
        correct(denoiser, x, operands, options)
    else:
        step(denoiser, x, operands, options, inplace=True)


def step(
    denoiser: Denoiser, x: Tensor, operands: Operands, options: StepOptions, inplace: bool = False
) -> tuple[Tensor, ...]:
    """One prediction and one update: x', then hist' and memory' if there are such.

    inplace: overwrite x, hist and memory. A CUDA graph must leave its inputs as they are, so it is made without.
    """
    if not inplace:
        hist, memory = (None if t is None else t.clone() for t in (operands.hist, operands.memory))
        operands = operands._replace(hist=hist, memory=memory)
    predicted = ask(denoiser, x, operands, options)
    if operands.own_estimate_rows is not None:
        own_estimate = ops.update(
            x,
            predicted.pred,
            operands.own_estimate_rows,
            operands.step,
            uncond=predicted.uncond,
            clip=options.clip,
            noisy=False,
            out=operands.own_estimate if inplace else None,
        )
        operands = operands._replace(own_estimate=own_estimate)
    return update(x, predicted, operands, options, inplace), *operands.kept()


def ask(denoiser: Denoiser, x: Tensor, operands: Operands, options: StepOptions) -> Prediction:
    """One prediction. A rule makes one of both branches."""
    predicted = denoiser.call_model(x, operands.condition, operands.model_kwargs, options.guided, operands.own_estimate)
    if options.rule is None or predicted.uncond is None:
        return predicted
    pred = guided(options.rule, x, predicted.pred, predicted.uncond, operands.rows, operands.step, operands.memory)
    return predicted._replace(pred=pred, uncond=None)


def update(x: Tensor, predicted: Prediction, operands: Operands, options: StepOptions, inplace: bool = False) -> Tensor:
    """ops.update with the operands and options of a run; hist is overwritten."""
    return ops.update(
        x,
        predicted.pred,
        operands.rows,
        operands.step,
        seed=operands.seed,
        sample_ids=operands.sample_ids,
        noise=operands.noise,
        uncond=predicted.uncond,
        raw_variance=predicted.raw_variance if options.learned else None,
        hist=operands.hist,
        clip=options.clip,
        keep=options.keep,
        noisy=options.noisy,
        inplace=inplace,
    )


def correct(denoiser: Denoiser, x: Tensor, operands: Operands, options: StepOptions) -> None:
    """A step of Langevin dynamics in place, sized on the device by norms of each sample:

        e = 2 alpha (snr |z| / |score|)^2
        x = x + e score + sqrt(2 e) z

    The row gives the score, and 2 alpha snr^2 as its `noise`.
    Reference: Song et al. 2021, arXiv:2011.13456, algorithms 4 and 5.
    """
    rows, number, noise = operands.rows, operands.step, operands.noise
    predicted = ask(denoiser, x, operands, options)
    score = ops.update(x, predicted.pred, rows, number, uncond=predicted.uncond, clip=options.clip, noisy=False)
    if noise is None:
        noise = ops.normal(
            x.shape,
            operands.seed,
            sample_ids=operands.sample_ids,
            step=number,
            stream=ops.REVERSE,
            dtype=x.dtype,
            device=x.device,
        )
    z_norm, score_norm = (torch.linalg.vector_norm(flat(v), dim=1, dtype=rows.dtype) for v in (noise, score))
    e = columns(rows[number]).noise * (z_norm / score_norm).square()
    own, index = own_rows(make_rows(e, from_x=1.0, from_pred=e, noise=(2 * e).sqrt()), x.dtype)
    ops.update(x, score, own, index, noise=noise, inplace=True)
