"""The one loop over a step table.

A `Run` says what to do, `Steps` takes its steps one by one, and `walk` is the loop around them.

A network may do part of its work before the loop. It then has the method

    time_arguments(t) -> dict of tensors (N, ...)

It returns keyword arguments of its forward that follow from t (N,) alone, such as embeddings. The loop calls it once
for all steps, with what the model sees of the times, and passes row k, (1, ...), at step k.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import ops
from .denoiser import Denoiser, Prediction, own_rows
from .guidance import Rule, guided, remembers
from .objective import conversion_rows
from .process import Process
from .reference import work_dtype
from .rows import columns, history_columns, make_rows
from .steps import StepTable
from .support.progress import bar
from .support.shapes import flat

Noise = Tensor | Callable[[int], Tensor] | None
Callback = Callable[..., Tensor | None]


def with_estimates(table: StepTable, process: Process, objective: str) -> StepTable:
    """The table whose steps leave x0hat in hist, for a callback that asks for it.

    Raises: ValueError for samplers that keep something else there.
    """
    if table.keep not in ("none", "x0hat"):
        raise ValueError("callback: expected one of (k, level, x) with this sampler, which keeps no estimate of x_0")
    rows = table.rows.clone()
    row = columns(rows)
    direct = (row.x0_from_x == 0) & (row.x0_from_pred == 0)  # steps that take no way through x0hat
    if bool(direct.any()):
        levels = process.at(table.levels[:-1][direct].double())
        row.x0_from_x[direct], row.x0_from_pred[direct] = conversion_rows(levels, objective, "x0")
    return replace(table, rows=rows, keep="x0hat")


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


class Operands(NamedTuple):
    """The tensors of one step beside the state, as in ops.update: the rows of all steps, the number (1,) of
    this one, and seed, sample_ids, noise and hist, each of them or None. memory: that of the rule, or None."""

    rows: Tensor
    step: Tensor
    seed: Tensor | None = None
    sample_ids: Tensor | None = None
    noise: Tensor | None = None
    hist: Tensor | None = None
    memory: Tensor | None = None

    def kept(self) -> tuple[Tensor, ...]:
        """What a step overwrites for the next one."""
        return tuple(t for t in (self.hist, self.memory) if t is not None)


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


class Steps:
    """The steps of a run, one after another, with all that they read on its device."""

    def __init__(self, run: Run) -> None:
        self.run, self.x = run, run.x
        n, device = len(run.table), run.x.device
        self.rows = run.table.rows.to(device, work_dtype(run.x.dtype))
        self.index = torch.arange(n, device=device)[:, None]
        self.hist = no_history(run)
        self.memory = torch.zeros_like(run.x) if remembers(run.options.rule) else None
        self.condition = conditions(run)
        self.time_arguments: dict[str, Tensor] = {}

    def start(self) -> None:
        """Before the first step."""
        self.time_arguments = self.run.denoiser.time_arguments(self.condition[:, 0]) if len(self.x) else {}

    def given(self, k: int) -> tuple[Operands, dict[str, Any]]:
        """The operands of step k, and the arguments of the model."""
        run, given = self.run, given_noise(self.run, k)
        seed = run.seed if given is None and run.options.noisy else None
        operands = Operands(self.rows, self.index[k], seed, run.sample_ids, given, self.hist, self.memory)
        ahead = {name: rows[k : k + 1] for name, rows in self.time_arguments.items()}
        return operands, {**ahead, **run.model_kwargs}

    def take(self, k: int) -> None:
        """Step k, from the state that step k - 1 left."""
        run, (operands, model_kwargs) = self.run, self.given(k)
        if run.compiled is None or run.table.kinds[k] != "predict":
            advance(run.table.kinds[k], run.denoiser, run.x, self.condition[k], operands, run.options, model_kwargs)
            return
        # The graph's outputs live in its own memory until the next replay.
        torch.compiler.cudagraph_mark_step_begin()
        new, *kept = run.compiled(run.denoiser, run.x, self.condition[k], operands, run.options, model_kwargs)
        for place, value in zip((run.x, *operands.kept()), (new, *kept), strict=True):
            place.copy_(value)

    def finish(self) -> Tensor:
        """After the last step: the state."""
        return self.x


class StepsWithGradient(Steps):
    """The steps of a run that remembers none, of which the last `count` leave new states, with a gradient."""

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
        with torch.enable_grad():
            operands, model_kwargs = self.given(k)
            run, x = self.run, self.x
            if run.table.kinds[k] == "add":
                self.x = update(x, Prediction(x), operands, run.options)
            else:
                self.x, *kept = step(run.denoiser, x, self.condition[k], operands, run.options, model_kwargs)
                self.memory = kept[0] if kept else None  # no sampler with hist has gradients


class Walker(Protocol):
    """How the steps of a run are taken: one by one (Steps), or as captured graphs (fastdiff.capture)."""

    run: Run
    x: Tensor  # the state; each step overwrites it
    hist: Tensor | None

    def start(self) -> None: ...

    def take(self, k: int) -> None: ...

    def finish(self) -> Tensor: ...


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
    with torch.no_grad():
        with eval_mode:
            steps.start()
        for k in bar(n, progress):
            with eval_mode:
                steps.take(k)
                if callback is not None:
                    told = (estimate(steps, k),) if run.estimates else ()
                    replace_state(steps.x, callback(k, run.table.levels[k + 1].item(), steps.x, *told))
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


def conditions(run: Run) -> Tensor:
    """(n, B): what the model sees of the time at every step; (n, 2 B) if it is asked for both branches."""
    condition = run.denoiser.condition(run.table.levels[:-1]).to(run.x.device)
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


def advance(
    kind: str,
    denoiser: Denoiser,
    x: Tensor,
    condition: Tensor,
    operands: Operands,
    options: StepOptions,
    model_kwargs: dict[str, Any],
) -> None:
    """One step of a kind, see StepTable, in place."""
    if kind == "add":
        update(x, Prediction(x), operands, options, inplace=True)
    elif kind == "correct":
        correct(denoiser, x, condition, operands, options, model_kwargs)
    else:
        step(denoiser, x, condition, operands, options, model_kwargs, inplace=True)


def step(
    denoiser: Denoiser,
    x: Tensor,
    condition: Tensor,
    operands: Operands,
    options: StepOptions,
    model_kwargs: dict[str, Any],
    inplace: bool = False,
) -> tuple[Tensor, ...]:
    """One prediction and one update: x', then hist' and memory' if there are such.

    inplace: overwrite x, hist and memory. A CUDA graph must leave its inputs as they are, so it is made without.
    """
    predicted = denoiser.call_model(x, condition, model_kwargs, options.guided)
    if not inplace:
        hist, memory = (None if t is None else t.clone() for t in (operands.hist, operands.memory))
        operands = operands._replace(hist=hist, memory=memory)
    return update(x, predicted, operands, options, inplace), *operands.kept()


def update(x: Tensor, predicted: Prediction, operands: Operands, options: StepOptions, inplace: bool = False) -> Tensor:
    """ops.update with the operands and options of a run; hist and memory are overwritten."""
    pred, uncond = _by_rule(x, predicted, operands, options)
    return ops.update(
        x,
        pred,
        operands.rows,
        operands.step,
        seed=operands.seed,
        sample_ids=operands.sample_ids,
        noise=operands.noise,
        uncond=uncond,
        raw_variance=predicted.raw_variance if options.learned else None,
        hist=operands.hist,
        clip=options.clip,
        keep=options.keep,
        noisy=options.noisy,
        inplace=inplace,
    )


def _by_rule(
    x: Tensor, predicted: Prediction, operands: Operands, options: StepOptions
) -> tuple[Tensor, Tensor | None]:
    """(pred, uncond) for ops.update: a rule makes one prediction of both."""
    pred, uncond, rule = predicted.pred, predicted.uncond, options.rule
    if rule is None or uncond is None:
        return pred, uncond
    return guided(rule, x, pred, uncond, operands.rows, operands.step, operands.memory), None


def correct(
    denoiser: Denoiser,
    x: Tensor,
    condition: Tensor,
    operands: Operands,
    options: StepOptions,
    model_kwargs: dict[str, Any],
) -> None:
    """A step of Langevin dynamics in place, sized on the device by norms of each sample:

        e = 2 alpha (snr |z| / |score|)^2
        x = x + e score + sqrt(2 e) z

    The row gives the score, and 2 alpha snr^2 as its `noise`.
    Reference: Song et al. 2021, arXiv:2011.13456, algorithms 4 and 5.
    """
    rows, number, noise = operands.rows, operands.step, operands.noise
    predicted = denoiser.call_model(x, condition, model_kwargs, options.guided)
    pred, uncond = _by_rule(x, predicted, operands, options)
    score = ops.update(x, pred, rows, number, uncond=uncond, clip=options.clip, noisy=False)
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
