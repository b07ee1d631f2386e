"""Example calls of every operation. What times or watches all operations takes its calls from here.

The name of a call begins with that of its operation. After a comma it says what is special. In float64 an operation
runs the reference, so each call has its oracle.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff import ops
from fastdiff.rows import WIDTH

from .eager import Eager

ROWS = 6  # of a table
MIXED = [False, True] * (ROWS // 2)  # levels of the decoder
EPS = 1e-5
Shape = tuple[int, ...]


class Source:
    """What the operands of a call are made of; the same again for the same arguments.

    Args:
        shape: (B, ...), of the data.
        lay: what is done to data last: another memory layout, or other values.
    """

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        lay: Callable[[Tensor], Tensor] = lambda x: x,
        salt: int = 0,
    ) -> None:
        self.shape, self.dtype, self.device, self.lay = shape, dtype, device, lay
        self.random = torch.Generator(device).manual_seed(salt)
        self.t = (torch.arange(shape[0], device=device) + salt) % (ROWS - 1) + 1  # levels of their own
        self.step, self.seed = self.t[:1].clone(), torch.full((1,), salt, device=device)
        self.ids = torch.arange(10, 10 + shape[0], device=device)

    def row(self, *shape: int) -> Tensor:
        """Normal values, contiguous."""
        return torch.randn(shape, generator=self.random, device=self.device).to(self.dtype)

    def data(self, *shape: int) -> Tensor:
        """The same in the layout of data; without arguments, of its shape."""
        return self.lay(self.row(*shape or self.shape))

    def table(self, columns: int, rows: int = ROWS) -> Tensor:
        """(rows, columns) in [0, 1); float32, or float64 for float64 data."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return torch.rand(rows, columns, generator=self.random, device=self.device).to(wide)


@dataclass(frozen=True)
class Call:
    """op(**operands).

    eager: the same in eager PyTorch, for calls that are timed.
    by: the operands with a gradient.
    backward: whether the gradients have kernels of their own.
    launches: of Triton's kernels in `whole`.
    """

    op: Callable[..., Any]
    operands: dict[str, Any]
    eager: Callable[..., Any] | None = None
    by: Sequence[str] = ()
    launches: int = 1
    backward: bool = False

    def to(self, dtype: torch.dtype) -> "Call":
        """The call with floating operands of another type."""
        operands = {
            name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in self.operands.items()
        }
        return replace(self, operands=operands)

    def bound(self, function: Callable[..., Any]) -> Callable[[], Any]:
        """A call of the operation or its twin, with as many operands by position as it takes."""
        given = inspect.signature(function).bind(**self.operands)
        return functools.partial(function, *given.args, **given.kwargs)

    def whole(self, function: Callable[..., Any]) -> Callable[[], Any]:
        """A call with gradients if these have kernels."""
        return self.with_gradients(function) if self.backward else self.bound(function)

    def with_gradients(self, function: Callable[..., Any]) -> Callable[[], tuple[Tensor, ...]]:
        """A call of the operation or its twin that gives (the last result, its gradients)."""
        leaves = {name: self.operands[name].detach().requires_grad_() for name in self.by}
        run = replace(self, operands=self.operands | leaves).bound(function)
        incoming: list[Any] = []

        def call() -> tuple[Tensor, ...]:
            value = last(run())
            if value.ndim and not incoming:  # exact in every type, and in the layout of the result
                numbers = torch.arange(value.numel(), device=value.device) % 5 + 1
                incoming.append(torch.empty_like(value).copy_(numbers.view(value.shape)))
            return value.detach(), *torch.autograd.grad(value, list(leaves.values()), *incoming)

        return call


def last(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result[-1] if isinstance(result, tuple) else result


# --- noise, steps and losses ------------------------------------------------------------------------------------


def normal(s: Source, **more: Any) -> Call:
    def eager(shape: Shape, seed: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    operands = {"shape": s.shape, "seed": s.seed, "dtype": s.dtype, "device": s.device}
    return Call(ops.normal, operands | more, None if more else eager)


def noising(s: Source, *by: str, **more: Any) -> Call:
    model = Eager(ROWS, torch.device(s.device))

    def eager(x0: Tensor, t: Tensor, table: Tensor, seed: Tensor) -> Tensor:
        return model.q_sample(x0, t)

    operands = {"x0": s.data(), "t": s.t, "table": s.table(2)}
    return Call(ops.noising, operands | (more or {"seed": s.seed}), None if more else eager, by)


def update(s: Source, *by: str, **more: Any) -> Call:
    row = Eager(ROWS, torch.device(s.device)).rows["ddpm"][1]

    def eager(x: Tensor, pred: Tensor, rows: Tensor, step: Tensor, seed: Tensor, clip: float) -> Tensor:
        a, b, c, d, f = row.unbind()
        return c * (a * x + b * pred).clamp(-clip, clip) + d * x + f * torch.randn_like(x)

    operands = {"x": s.data(), "pred": s.data(), "rows": s.table(WIDTH), "step": s.step}
    return Call(ops.update, operands | (more or {"seed": s.seed}) | {"clip": 0.6}, None if more else eager, by)


def combine(s: Source, **more: Any) -> Call:
    row = Eager(ROWS, torch.device(s.device)).rows["ddpm"][1]

    def eager(x: Tensor, y: Tensor, rows: Tensor, index: Tensor, clip: float) -> Tensor:
        a, b, c, d, _ = row.unbind()
        return c * (a * x + b * y).clamp(-clip, clip) + d * x

    operands = {"x": s.data(), "y": s.data(), "rows": s.table(WIDTH), "index": s.step}
    return Call(ops.combine, operands | more | {"clip": 0.6}, None if more else eager, ["y"] * bool(more))


def loss(s: Source) -> Call:
    noise = s.data()

    def eager(pred: Tensor, t: Tensor, table: Tensor, seed: Tensor) -> Tensor:
        return F.mse_loss(pred.float(), noise.float())

    operands = {"pred": s.data(), "t": s.t, "table": s.table(3), "seed": s.seed}
    return Call(ops.loss, operands, eager, ["pred"], 3, True)


def loss_of_x0(s: Source, by: str = "pred", **more: Any) -> Call:
    operands = {"pred": s.data(), "x0": s.data(), "t": s.t, "table": s.table(3)}
    return Call(ops.loss, operands | more, None, [by], 3, True)


def vlb_rows(s: Source, decoder: bool | Sequence[bool] = False) -> Tensor:
    """The logarithms of the variances, and whether a level is that of the decoder, have a meaning."""
    rows = s.table(6)
    rows[:, 3], rows[:, 4], rows[:, 5] = -2.0, -1.0, torch.tensor(decoder)
    return rows


def vlb(s: Source, decoder: bool | Sequence[bool] = False, **more: Any) -> Call:
    operands = {name: s.data() for name in ("pred", "x_t", "x0")} | {"t": s.t, "rows": vlb_rows(s, decoder)}
    by = ["pred", *more.keys() & {"raw_variance"}]
    return Call(ops.vlb, operands | more, None, by, 2 + len(by), True)


def vlb_learned(s: Source) -> Call:
    """All samples are of one level, whose numbers eager PyTorch knows."""
    rows, t = vlb_rows(s), s.step.repeat(s.shape[0])
    a, b, w, low, high, _ = rows[int(s.step)].tolist()

    def eager(
        pred: Tensor, raw_variance: Tensor, x_t: Tensor, x0: Tensor, t: Tensor, rows: Tensor, reduction: str
    ) -> Tensor:
        error = x0.float() - (a * x_t.float() + b * pred.float())
        delta = low + (raw_variance.float() + 1) / 2 * (high - low)
        return 0.5 * (delta + torch.expm1(-delta) + w * error.square() * torch.exp(-delta)).mean()

    operands: dict[str, Any] = {name: s.data() for name in ("pred", "raw_variance", "x_t", "x0")}
    operands |= {"t": t, "rows": rows, "reduction": "mean"}
    return Call(ops.vlb, operands, eager, ["pred", "raw_variance"], 4, True)


# --- sums, gates and norms --------------------------------------------------------------------------------------


def inner(s: Source) -> Call:
    def eager(a: Tensor, b: Tensor, guidance: Tensor, centred: bool) -> Tensor:
        a, b = a.float().flatten(1), b.float().flatten(1)
        a, p = (v - v.mean(1, keepdim=True) for v in (a, b + guidance * (a - b)))
        return torch.stack([(a * a).sum(1), (a * p).sum(1), (p * p).sum(1)], 1)

    operands = {"a": s.data(), "b": s.data(), "guidance": 4 * s.table(1, 1)[0], "centred": True}
    return Call(ops.inner, operands, eager, ["a"], 2)


def gated_gelu(s: Source) -> Call:
    def eager(x: Tensor) -> Tensor:
        hidden, gate = x.chunk(2, -1)
        return hidden * F.gelu(gate)

    return Call(ops.gated_gelu, {"x": s.data(*s.shape[:-1], 2 * s.shape[-1])}, eager, ["x"])


def rotate(s: Source, step: int = 1, norm: bool = False) -> Call:
    """step: of the columns of the tables; 2 has one number for each pair."""

    def eager(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None = None, eps: float = EPS) -> Tensor:
        x = x if weight is None else F.rms_norm(x, weight.shape, weight, eps)
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return (x.float() * cos[:, None] + torch.stack([-b, a], -1).flatten(3).float() * sin[:, None]).to(x.dtype)

    # (B, N, H, D) of any shape.
    batch, *tokens, heads, pairs = (s.shape[0], *(1,) * (4 - len(s.shape)), *s.shape[1:])
    x = s.data(batch, math.prod(tokens), heads, 2 * pairs)
    cos, sin = (s.table(2 * pairs, x.shape[1])[:, ::step] for _ in range(2))
    operands = {"x": x, "cos": cos, "sin": sin} | ({"weight": s.row(2 * pairs), "eps": EPS} if norm else {})
    return Call(ops.rotate, operands, eager if step == 1 else None, ["x"] * (step == 1))


def group_norm_silu(s: Source, *names: str, skip: bool = False) -> Call:
    """names: of the rows that are given. skip: half of the channels again, in a tensor of its own; no SiLU."""

    def eager(
        x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float,
        scale: Tensor | None = None, shift: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        y = F.group_norm(x, num_groups, weight, bias, eps)
        if scale is not None and shift is not None:
            y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return F.silu(y)

    batch, first, *rest = shape = (*s.shape, 1)[: max(2, len(s.shape))]
    more = -(-first // 2) if skip else 0
    channels = first + more
    operands = {"x": s.data(*shape), "weight": s.row(channels), "bias": s.row(channels)}
    operands |= {name: s.row(batch, channels) for name in names} | (
        {"skip": s.data(batch, more, *rest)} if skip else {}
    )
    groups = max(1, math.gcd(channels, 16) // 2)
    options: dict[str, Any] = {"num_groups": groups, "eps": EPS} | ({"silu": False} if skip else {})
    return Call(ops.group_norm_silu, operands | options, None if "add" in names else eager, [*operands], 3, True)


def spread(rows: Tensor, x: Tensor) -> Tensor:
    """Rows (B, C) over x (B, ..., C)."""
    return rows.view(len(rows), *[1] * (x.ndim - 2), -1)


def layer_norm(s: Source, *names: str) -> Call:
    """names: of the rows that are given, for each sample or for all."""

    def eager(
        x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None,
        scale: Tensor | None = None, shift: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        y = F.layer_norm(x, x.shape[-1:], weight, bias)
        return y if scale is None or shift is None else y * (1 + spread(scale, x)) + spread(shift, x)

    batch, *_, channels = shape = (*s.shape, 1)[: max(2, len(s.shape))]
    sizes = {"weight": [channels], "bias": [channels]}
    operands = {"x": s.data(*shape)} | {name: s.row(*sizes.get(name, [batch, channels])) for name in names}
    return Call(ops.layer_norm, operands, eager, ["x"] * ("scale" in names))


def add_layer_norm(s: Source) -> Call:
    def eager(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        total = x + spread(gate, x) * y
        return total, F.layer_norm(total, x.shape[-1:]) * (1 + spread(scale, x)) + spread(shift, x)

    batch, *_, channels = shape = (*s.shape, 1)[: max(2, len(s.shape))]
    gate, scale, shift = s.row(batch, 3 * channels).chunk(3, 1)
    operands = {"x": s.data(*shape), "y": s.data(*shape), "gate": gate, "scale": scale, "shift": shift}
    return Call(ops.add_layer_norm, operands, eager, ["y", "gate", "scale"])


CALLS: dict[str, Callable[[Source], Call]] = {
    "normal": normal,
    "normal, out": lambda s: Call(ops.normal, {"shape": s.shape, "seed": s.seed, "out": s.data()}),
    "normal, step": lambda s: normal(s, step=s.t, sample_ids=s.ids),
    "noising": noising,
    "noising, ids": lambda s: noising(s, "x0", seed=s.seed, sample_ids=s.ids),
    "noising, given": lambda s: noising(s, "noise", noise=s.data(), out=s.data()),
    "update": lambda s: update(s, "x"),
    "update, learned": lambda s: update(
        s, "raw_variance", seed=s.seed, sample_ids=s.ids, uncond=s.data(), raw_variance=s.data()
    ),
    "update, in place": lambda s: update(s, seed=s.seed, inplace=True),
    "update, kept": lambda s: update(s, noisy=False, hist=s.data(), keep="x", inplace=True),
    "combine": combine,
    "combine, noise": lambda s: combine(s, z=s.data()),
    "loss": loss,
    "loss, x0": lambda s: loss_of_x0(s, seed=s.seed, sample_ids=s.ids),
    "loss, each": lambda s: loss_of_x0(s, seed=s.seed, reduction="none"),
    "loss, huber": lambda s: loss_of_x0(s, "x0", noise=s.data(), kind="huber", delta=0.3, reduction="none"),
    "loss, l1": lambda s: loss_of_x0(s, "noise", noise=s.data(), mask=s.data(), kind="l1"),
    "vlb": lambda s: vlb(s, reduction="mean"),
    "vlb, learned": vlb_learned,
    "vlb, each": lambda s: vlb(s, MIXED, raw_variance=s.data(), clip=1.0),
    "vlb, decoder": lambda s: vlb(s, True, clip=5.0),
    "inner": inner,
    "inner, not centred": lambda s: Call(
        ops.inner, {"a": s.data(), "b": s.data(), "guidance": s.seed + 2.0}, launches=2
    ),
    "gated_gelu": gated_gelu,
    "rotate": rotate,
    "rotate, pairs": lambda s: rotate(s, 2),
    "rotate, norm": lambda s: rotate(s, norm=True),
    "group_norm_silu": group_norm_silu,
    "group_norm_silu, scale and shift": lambda s: group_norm_silu(s, "scale", "shift"),
    "group_norm_silu, add and skip": lambda s: group_norm_silu(s, "scale", "shift", "add", skip=True),
    "layer_norm": lambda s: layer_norm(s, "weight", "bias"),
    "layer_norm, scale and shift": lambda s: layer_norm(s, "scale", "shift"),
    "add_layer_norm": add_layer_norm,
}


@dataclass(frozen=True)
class Measured:
    """A call that is timed for as many elements as images have.

    shape: that of its data, as networks have it, by that of the images.
    tensors: the fewest that have to be read or written, with those of the gradients.
    roundings: how many times as far as one from float64 its results may be.
    """

    call: str
    shape: Callable[[Shape], Shape]
    tensors: int
    roundings: int = 1


def rows_of_1024(shape: Shape) -> Shape:
    width = math.gcd(math.prod(shape), 1024)
    return math.prod(shape) // width, width


def maps_of_a_network(shape: Shape) -> Shape:
    """48 channels of images, in 8 groups."""
    batch, channels, height, width = shape
    if height % 4 or width % 4:
        raise ValueError(f"shape: expected height and width in multiples of 4, got {shape}")
    return batch, 16 * channels, height // 4, width // 4


def tokens_of_3072(shape: Shape) -> Shape:
    """As those of Flux, or of fewer channels."""
    channels = math.gcd(math.prod(shape[1:]), 3072)
    return shape[0], math.prod(shape[1:]) // channels, channels


def heads_of_128(shape: Shape) -> Shape:
    """24 in each token, as those of Flux, or fewer: (B, N, H, pairs)."""
    size = math.prod(shape[1:])
    depth = math.gcd(size, 128)
    heads = math.gcd(size // depth, 24)
    return shape[0], size // (heads * depth), heads, depth // 2


# By the name of a row. The tensors: pred, raw, x_t, x_0 and two gradients; a and b; hidden, gate and their product;
# x, y and dy, x, dx; x, y, their sum and its norm; x and its norm, rotated.
MEASURED = {
    "bound_forward_backward": Measured("vlb, learned", lambda shape: shape, 6),
    "inner_products": Measured("inner", lambda shape: shape, 2),
    "gated_gelu": Measured("gated_gelu", rows_of_1024, 3),
    # The slope of SiLU adds a rounding, and the gradients by weight and bias are sums of them.
    "group_norm_silu": Measured("group_norm_silu", maps_of_a_network, 5, 4),
    "layer_norm": Measured("add_layer_norm", tokens_of_3072, 4, 4),
    "rotate": Measured("rotate, norm", heads_of_128, 2),
}
