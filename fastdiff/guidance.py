"""Guidance: two predictions of a step, with and without the condition, become one.

    pred = uncond + w (cond - uncond)        w = 1 is the condition alone, 0 none, below 0 leads away from it

`sample(guidance=)` takes w: a number, one for each step, or a function of the step. This sum is a part of the update.
A rule, `sample(guidance_rule=)`, makes the prediction in another way. It takes its sums over each sample from one
operation, `ops.inner`, and the rest from a few of PyTorch, with no wait for the device:

    Rescaled        keeps the spread of cond
    ZeroStar        scales uncond to fit cond
    Projected       leaves out what only makes the estimate larger
    Thresholded     brings an estimate that left [-1, 1] back into it (dynamic thresholding)
"""

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .denoiser import TOLD, Denoiser, prediction_of
from .estimates import estimating, is_direct
from .ops import inner
from .process import Process
from .reference import work_dtype
from .rows import Row, columns
from .steps import StepTable
from .support.scalars import as_number, as_share, integer
from .support.shapes import flat

Guidance = float | Sequence[float] | Callable[[int, float], float]


class Rule(Protocol):
    """How two predictions become one. Equal rules are one rule, and a rule can be hashed, as frozen dataclasses can.

    A rule whose attribute `remembers` is true is also given memory=, (B, ...), which it may overwrite: 0 in the first
    step of a run, and then as the step before left it.
    """

    def __call__(self, x: Tensor, cond: Tensor, uncond: Tensor, row: Row) -> Tensor:
        """The prediction (B, ...) from the state, both predictions and the step's row, numbers (1, ...) each. The row
        makes x0hat, whether the sampler uses it or not."""


@dataclass(frozen=True)
class Rescaled:
    """Guidance whose result has the spread of cond, in part.

        p    = uncond + w (cond - uncond)
        pred = share std(cond) / std(p) p + (1 - share) p        std of each sample

    Args:
        share: 0 is plain guidance, 1 rescales in full; 0.7 is published.

    Raises: ValueError for a share outside of [0, 1].
    Reference: Lin et al. 2023, arXiv:2305.08891, eq. 15 and 16.
    """

    share: float = 0.7

    def __post_init__(self) -> None:
        as_share("share", self.share)

    def __call__(self, x: Tensor, cond: Tensor, uncond: Tensor, row: Row) -> Tensor:
        p = torch.lerp(uncond, cond, row.guidance)
        wanted, _, found = inner(cond, uncond, guidance=row.guidance, centred=True).unbind(1)
        least = torch.finfo(p.dtype).tiny  # at 0 the slope of the root is infinite
        factor = torch.where(found > 0, _ratio(wanted, found), 1.0).clamp(min=least).sqrt()
        return p * _for_each(self.share * factor + (1 - self.share), p)


@dataclass(frozen=True)
class ZeroStar:
    """CFG-Zero*: uncond is scaled to be nearest to cond, and the first steps may stand still.

        s    = <cond, uncond> / |uncond|^2        of each sample
        pred = s uncond + w (cond - s uncond)

    Args:
        zero_start: rows of the table, from its start, in which the velocity is 0 whatever is predicted. For
            `FlowMatching`, with a sampler through x0hat. Published is a share of 0.04 of the steps.

    Raises: ValueError for a zero_start below 0; `sample` raises it for one that its process or sampler cannot take.
    Reference: Fan et al. 2025, arXiv:2503.18886, eq. 9 and algorithm 1.
    """

    zero_start: int = 0

    def __post_init__(self) -> None:
        if (integer(self.zero_start) or 0) != self.zero_start or self.zero_start < 0:
            raise ValueError(f"zero_start: expected an integer of at least 0, got {self.zero_start!r}")

    def __call__(self, x: Tensor, cond: Tensor, uncond: Tensor, row: Row) -> Tensor:
        _, along, size = inner(cond, uncond).unbind(1)
        return torch.lerp(uncond * _for_each(_ratio(along, size), uncond), cond, row.guidance)


@dataclass(frozen=True)
class Projected:
    """Adaptive projected guidance: of the change, what is parallel to the estimate counts less.

        x0   = x0_from_x x + x0_from_pred cond
        d    = x0_from_pred (cond - uncond) + momentum d_before,    then shortened to the norm `radius`
        x0'  = x0 + (w - 1) (d - (1 - parallel) <d, x0> / |x0|^2 x0)
        pred = that of x0'

    Args:
        parallel: the weight of the parallel part; 1 is plain guidance, 0 is published.
        radius: the largest norm of d, of each sample; None for none.
        momentum: the share of the last step's d (before it was shortened); below 0 as published, -0.75 or -0.5.

    Raises: ValueError for parallel outside of [0, 1], for a radius that is not above 0, and for a momentum outside of
        (-1, 1).
    Reference: Sadat et al. 2024, arXiv:2410.02416, eq. 4 to 8 and algorithm 1.
    """

    parallel: float = 0.0
    radius: float | None = None
    momentum: float = 0.0

    def __post_init__(self) -> None:
        as_share("parallel", self.parallel)
        if self.radius is not None and not as_number("radius", self.radius) > 0:
            raise ValueError(f"radius: expected a number above 0 or None, got {self.radius}")
        if not -1 < as_number("momentum", self.momentum) < 1:
            raise ValueError(f"momentum: expected a number between -1 and 1, got {self.momentum}")

    @property
    def remembers(self) -> bool:
        """Whether d of a step is needed in the next one."""
        return self.momentum != 0

    def __call__(self, x: Tensor, cond: Tensor, uncond: Tensor, row: Row, memory: Tensor | None = None) -> Tensor:
        x0, d = torch.addcmul(row.x0_from_x * x, row.x0_from_pred, cond), cond - uncond
        if memory is not None:
            memory.mul_(self.momentum).addcmul_(row.x0_from_pred, d)
            d = torch.where(row.x0_from_pred != 0, memory / row.x0_from_pred, d)
        dd, along, size = inner(d, x0).unbind(1)
        weight = row.guidance.flatten() - 1
        if self.radius is not None:  # the clamp comes before the root, whose slope at 0 is infinite
            weight = weight * ((row.x0_from_pred.flatten() / self.radius).square() * dd).clamp(min=1.0).rsqrt()
        part = (self.parallel - 1) * weight * _ratio(along, size)
        return torch.addcmul(torch.addcmul(cond, _for_each(weight, d), d), _for_each(part, x0), x0)


@dataclass(frozen=True)
class Thresholded:
    """Dynamic thresholding: an estimate of x_0 with large values is clipped and divided, not only clipped.

        x0   = x0_from_x x + x0_from_pred (uncond + w (cond - uncond))
        s    = max(1, the share-quantile of |x0|)        of each sample
        pred = that of clamp(x0, -s, s) / s

    Args:
        share: of the elements that are not clipped, above 0 to 1; 0.995 is published.

    The quantile is PyTorch's (`torch.kthvalue`).
    Raises: ValueError for a share outside of (0, 1].
    Reference: Saharia et al. 2022, arXiv:2205.11487, section 2.3.
    """

    share: float = 0.995

    def __post_init__(self) -> None:
        if not 0 < as_number("share", self.share) <= 1:
            raise ValueError(f"share: expected a number above 0 and up to 1, got {self.share}")

    def __call__(self, x: Tensor, cond: Tensor, uncond: Tensor, row: Row) -> Tensor:
        p = torch.lerp(uncond, cond, row.guidance)
        x0 = torch.addcmul(row.x0_from_x * x, row.x0_from_pred, p)
        size = flat(x0).abs()
        if not size.shape[1]:
            return p
        s = _for_each(size.kthvalue(max(1, math.ceil(self.share * size.shape[1])), 1).values.clamp(min=1.0), x0)
        change = x0.clamp(-s, s) / s - x0
        return p + torch.where(row.x0_from_pred != 0, change / row.x0_from_pred, 0.0)


def remembers(rule: Rule | None) -> bool:
    """Whether a rule has a memory."""
    return bool(getattr(rule, "remembers", False))


def guided(
    rule: Rule, x: Tensor, cond: Tensor, uncond: Tensor, rows: Tensor, step: Tensor, memory: Tensor | None = None
) -> Tensor:
    """The prediction of a rule in step `step` (1,) of the rows, in the type of the state's arithmetic."""
    work = work_dtype(x.dtype)
    row = Row(*(c.reshape(1, *[1] * (x.ndim - 1)) for c in columns(rows.index_select(0, step).to(work))))
    given = {} if memory is None else {"memory": memory}
    return rule(x.to(work), cond.to(work), uncond.to(work), row, **given)


def with_guidance(
    table: StepTable, guidance: Guidance | None, rule: Rule | None, process: Process, objective: str
) -> StepTable:
    """A copy of the table with the weight w of each step, and for a rule its zero start and x0hat in every row; itself
    without guidance.

    Args:
        guidance: None, a finite number, or a list or tuple with one for each row. Or a function of the row's number
            and the level at which the model is asked.
        rule: how two predictions become one.
        process, objective: of the table.

    Raises: ValueError for anything else; TypeError for a rule that is none.
    """
    if guidance is None:
        return table
    if rule is not None and (not callable(rule) or isinstance(rule, type)):
        raise TypeError(f"guidance_rule: expected a rule, such as Rescaled(), got {rule!r}")
    levels = table.levels[:-1].tolist()
    numbers: list[Any]
    if callable(guidance):
        numbers = [guidance(k, level) for k, level in enumerate(levels)]
    elif isinstance(guidance, list | tuple) or getattr(guidance, "ndim", 0) == 1:
        given: Any = guidance
        numbers = given.tolist() if isinstance(given, Tensor) else list(given)
        if len(numbers) != len(levels):
            raise ValueError(f"guidance: expected a number for each of {len(levels)} steps, got {len(numbers)} of them")
    else:
        numbers = [guidance] * len(levels)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, Real) or not math.isfinite(number):
            raise ValueError(f"guidance: expected a finite number, got {number!r}")
    rows = table.rows.clone()
    weights = [float(number) for number in numbers]
    columns(rows).guidance.copy_(torch.tensor(weights, dtype=rows.dtype, device=rows.device))
    if isinstance(rule, ZeroStar) and rule.zero_start:
        _stand_still(rows[: rule.zero_start], table.kinds, process)
    table = replace(table, rows=rows)
    return table if rule is None else estimating(table, process, objective)


def _stand_still(rows: Tensor, kinds: Sequence[str], process: Process) -> None:
    """Let rows take the velocity for 0, in place: x_0 = eps = x where x_t = (1 - t) x_0 + t eps. Rows that only add
    noise do not change."""
    row = columns(rows)
    if not process.straight:
        raise ValueError(f"zero_start: expected 0 but for FlowMatching, got one with {type(process).__name__}")
    if any(direct and kind != "add" for direct, kind in zip(is_direct(row).tolist(), kinds, strict=False)):
        raise ValueError("zero_start: expected 0 with this sampler, whose steps take no way through x0hat")
    row.x0_from_x.fill_(1.0)
    row.x0_from_pred.zero_()


class Pair(nn.Module):
    """Two networks as one, for autoguidance: the first half of the batch goes to one, the second half to the other.

    If one of them takes its own estimate, both halves make it, and a network that takes none is told nothing.
    """

    def __init__(self, model: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.model, self.other = model, other
        self.self_condition = any(_takes_estimate(network) for network in (model, other))

    def forward(self, x: Tensor, condition: Tensor, **model_kwargs: Any) -> Tensor:
        outputs = []
        for half, network in enumerate((self.model, self.other)):

            def part(value: Any, half: int = half) -> Any:
                split = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == x.shape[0]
                return value.chunk(2)[half] if split else value

            given = {name: _of_leaves(part, value) for name, value in model_kwargs.items()}
            if self.self_condition and not _takes_estimate(network):
                given.pop(TOLD, None)
            outputs.append(prediction_of(network(part(x), part(condition), **given)))
        expected, got = (tuple(out.shape) for out in outputs)
        if got != expected:
            raise ValueError(f"uncond: expected a network whose output has shape {expected}, got {got}")
        return torch.cat(outputs)


def _takes_estimate(network: nn.Module) -> bool:
    return bool(getattr(network, "self_condition", False))


def beside(denoiser: Denoiser, uncond: dict[str, Any] | nn.Module | None, dtype: torch.dtype | None) -> Denoiser:
    """The denoiser with the network `uncond` beside its own, whose predictions are those without the condition; itself
    if that is no network.

    Raises: ValueError unless dtype is None: both run in their own. TypeError for a formulation in place of a network.
    Reference: Karras et al. 2024, arXiv:2406.02507 (autoguidance).
    """
    if not isinstance(uncond, nn.Module):
        return denoiser
    if dtype is not None:
        raise ValueError("dtype: expected None with another network as uncond")
    if isinstance(uncond, Denoiser):
        raise TypeError(f"uncond: expected a network, got {type(uncond).__name__}; give its `model`")
    made = copy.copy(denoiser)
    made.__dict__["_modules"] = {**denoiser._modules, "model": Pair(denoiser.model, uncond)}
    return made


def stack_branches(
    guidance: Any, rule: Rule | None, uncond: dict[str, Any] | nn.Module | None, cond: dict[str, Any], batch: int,
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """The model's arguments for both branches of guidance, stacked along the batch; `cond` itself without guidance.

    Args:
        guidance: None, or anything else.
        rule: how two predictions become one; None without guidance.
        uncond: the arguments of the branch without the condition, by the names of cond; or a network, asked with cond.
        cond: those of the branch with it.
        batch: B. Tensors of B samples are stacked, also in dicts, lists and tuples. Two numbers that differ become one
            for each sample, (2 B,), on the device. All others must be the same for both.

    Raises: ValueError, naming the argument.
    """
    if guidance is None:
        if uncond is not None:
            raise ValueError("uncond: expected None without guidance, got the arguments of a branch")
        if rule is not None:
            raise ValueError("guidance_rule: expected None without guidance")
        return cond
    if isinstance(uncond, nn.Module):
        uncond = dict(cond)
    elif not isinstance(uncond, dict) or uncond.keys() != cond.keys() or not cond:
        given = sorted(uncond) if isinstance(uncond, dict) else uncond
        hint = "" if cond else "; the condition is an argument of the model, as class_labels="
        raise ValueError(f"uncond: expected a dict of the model's arguments {sorted(cond)}, got {given}{hint}")

    def stacked(name: str, one: Any, other: Any) -> Any:
        if isinstance(one, Tensor) and isinstance(other, Tensor) and one.ndim and one.shape[0] == batch:
            if one.shape != other.shape:
                raise ValueError(f"uncond: expected {name} of shape {tuple(one.shape)}, got {tuple(other.shape)}")
            return torch.cat((one, other.to(one)))
        if one is other or _equal(one, other):
            return one
        if all(isinstance(value, Real) and not isinstance(value, bool) for value in (one, other)):
            return torch.tensor([one, other], device=device).repeat_interleave(batch)
        raise ValueError(f"uncond: expected {name} to be tensors of {batch} samples, or the same for both branches")

    return {name: _of_leaves(functools.partial(stacked, name), one, uncond[name]) for name, one in cond.items()}


def _of_leaves(function: Callable[..., Any], one: Any, *others: Any) -> Any:
    """The function of the leaves of dicts, lists and tuples that are alike, or of the values themselves."""
    same = all(type(other) is type(one) for other in others)
    if type(one) is dict and same and all(other.keys() == one.keys() for other in others):
        return {key: _of_leaves(function, value, *(other[key] for other in others)) for key, value in one.items()}
    if type(one) in (list, tuple) and same and all(len(other) == len(one) for other in others):
        return type(one)([_of_leaves(function, *values) for values in zip(one, *others, strict=True)])
    return function(one, *others)


def _equal(one: Any, other: Any) -> bool:
    """Whether two arguments are equal, and neither is a tensor."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return False
    try:
        return bool(one == other)
    except (ValueError, RuntimeError):  # arrays and tensors of several elements
        return False


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole of each sample, (B,); 0 with a gradient of 0 where both are 0."""
    return part / (whole + (whole == 0))


def _for_each(numbers: Tensor, like: Tensor) -> Tensor:
    """(B,) numbers, shaped to multiply samples."""
    return numbers.reshape(-1, *[1] * (like.ndim - 1))
