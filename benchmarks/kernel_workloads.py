"""The workloads that `workloads.OPERATIONS` lacks, so that a report has every kernel. Each has the same three rows."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff import bound, ops, reference
from fastdiff.schedule import linear

from .workloads import BOUND, LOSS, SEED, TIMESTEPS, Row, Rows, agree, few, inputs

GROUPS, EPS = 8, 1e-5
BOUND_ROWS = bound.vlb_rows(linear(TIMESTEPS), "eps", "learned").float()


def _rows(row: Callable[..., Row], fused: Callable[..., Any], eager: Callable[..., Any]) -> Rows:
    functions = {"fused": fused, "reference": eager, "compile": torch.compile(eager)}
    return {name: row(name, function) for name, function in functions.items()}


def normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Rows:
    """Noise by itself. The library's is checked element by element, the others' by shape and standard deviation."""
    seed, step = torch.full((1,), SEED, device=device), torch.zeros(1, dtype=torch.int64, device=device)

    def fused() -> Tensor:
        return ops.normal(shape, seed, dtype=dtype, device=device)

    def eager() -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    def row(name: str, function: Callable[..., Tensor]) -> Row:
        def check() -> None:
            z = function()
            part, std = few(z), z.double().std().item()
            if name == "fused":
                want = reference.normal(part.shape, seed, None, step, ops.PRIOR, torch.float64)
                agree("normal fused", [part], [want], BOUND[dtype])
            elif not (z.shape == shape and abs(std - 1) < 5 / z.numel() ** 0.5 + BOUND[dtype]):
                raise RuntimeError(f"normal {name}: standard deviation {std:.3f}, shape {tuple(z.shape)}")

        return Row(function, check)

    return _rows(row, fused, eager)


def loss_without_gradient(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Rows:
    """The eps loss alone. The library draws the noise again; eager PyTorch reads it."""
    noise, pred, t = inputs(shape, dtype, device)
    table, seed = LOSS.to(device), torch.full((1,), SEED, device=device)
    n = len(few(pred))

    def fused(pred: Tensor = pred, t: Tensor = t, noise: Tensor = noise) -> Tensor:
        return ops.loss(pred, t, table, seed=seed)

    def eager(pred: Tensor = pred, t: Tensor = t, noise: Tensor = noise) -> Tensor:
        return F.mse_loss(pred.float(), noise.float())

    def row(name: str, function: Callable[..., Tensor]) -> Row:
        def check() -> None:
            z = noise[:n].double()
            if name == "fused":
                z = reference.normal(z.shape, seed, None, t[:n], ops.FORWARD, torch.float64)
            want = (pred[:n].double() - z).square().mean()
            agree(f"loss_without_gradient {name}", [function(pred[:n], t[:n], noise[:n])], [want], BOUND[dtype])

        return Row(function, check)

    return _rows(row, fused, eager)


def bound_forward_backward(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Rows:
    """A term of the variational bound with a learned variance, at t = T/2, and its gradients by both predictions."""
    x0, pred, _ = inputs(shape, dtype, device)
    x_t, raw = (0.5 * x0 + 0.8 * pred.flip(0)).to(dtype), pred.roll(1, -1).clamp(-1, 1)
    t = torch.full((len(x0),), TIMESTEPS // 2, device=device)
    table, n = BOUND_ROWS.to(device), len(few(x0))
    a, b, w, low, high, _ = BOUND_ROWS[TIMESTEPS // 2].tolist()
    tensors = (pred, raw, x_t, x0)

    def with_gradients(value: Tensor, pred: Tensor, raw: Tensor) -> tuple[Tensor, ...]:
        return value.detach(), *torch.autograd.grad(value, (pred, raw))

    def fused(pred: Tensor, raw: Tensor, x_t: Tensor, x0: Tensor) -> tuple[Tensor, ...]:
        value = ops.vlb(pred, x_t, x0, t[: len(x0)], table, raw_variance=raw, reduction="mean")
        return with_gradients(value, pred, raw)

    def nats(pred: Tensor, raw: Tensor, x_t: Tensor, x0: Tensor) -> Tensor:
        error = x0.float() - (a * x_t.float() + b * pred.float())
        delta = low + (raw.float() + 1) / 2 * (high - low)
        return 0.5 * (delta + torch.expm1(-delta) + w * error.square() * torch.exp(-delta)).mean()

    compiled = torch.compile(nats)

    def row(name: str, function: Callable[..., tuple[Tensor, ...]]) -> Row:
        leaves = [pred.detach().requires_grad_(), raw.detach().requires_grad_(), x_t, x0]
        parts = [v[:n].detach().requires_grad_(k < 2) for k, v in enumerate(tensors)]

        def check() -> None:
            p, r, state, data = (v.detach().double() for v in parts)
            value, *slopes = reference.vlb(p, r, state, data, t[:n], table, None)
            want = [value.mean(), *(s / s.numel() for s in slopes)]
            agree(f"bound_forward_backward {name}", function(*parts), want, BOUND[dtype])

        return Row(lambda: function(*leaves), check)

    return {
        "fused": row("fused", fused),
        "reference": row("reference", lambda *v: with_gradients(nats(*v), *v[:2])),
        "compile": row("compile", lambda *v: with_gradients(compiled(*v), *v[:2])),
    }


def inner_products(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Rows:
    """Sums of each sample for a rule of guidance: <cond, cond>, <cond, p> and <p, p> of p = uncond + w (cond - uncond),
    less their means."""
    uncond, cond, _ = inputs(shape, dtype, device)
    w, n = torch.full((1,), 4.0, device=device), len(few(cond))

    def fused(cond: Tensor = cond, uncond: Tensor = uncond) -> Tensor:
        return ops.inner(cond, uncond, guidance=w, centred=True)

    def eager(cond: Tensor = cond, uncond: Tensor = uncond) -> Tensor:
        a, b = cond.float().flatten(1), uncond.float().flatten(1)
        a, p = (v - v.mean(1, keepdim=True) for v in (a, b + w * (a - b)))
        return torch.stack([(a * a).sum(1), (a * p).sum(1), (p * p).sum(1)], 1)

    def row(name: str, function: Callable[..., Tensor]) -> Row:
        def check() -> None:
            want = reference.inner(cond[:n].double(), uncond[:n].double(), w, True)
            agree(f"inner_products {name}", [function(cond[:n], uncond[:n])], [want], BOUND[torch.float32])

        return Row(function, check)

    return _rows(row, fused, eager)


def gated_gelu(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Rows:
    """hidden gelu(gate) with as many elements in a result, in rows of 1024."""
    gate, hidden, _ = inputs(shape, dtype, device)
    width = math.gcd(gate.numel(), 1024)
    x = torch.cat([half.reshape(-1, width) for half in (hidden, gate)], 1)

    def eager(x: Tensor = x) -> Tensor:
        hidden, gate = x.chunk(2, -1)
        return hidden * F.gelu(gate)

    def fused(x: Tensor = x) -> Tensor:
        return ops.gated_gelu(x)

    def row(name: str, function: Callable[..., Tensor]) -> Row:
        def check() -> None:
            part = few(x)
            agree(f"gated_gelu {name}", [function(part)], [eager(part.double())], BOUND[dtype])

        return Row(function, check)

    return _rows(row, fused, eager)


def group_norm_silu(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Rows:
    """GroupNorm and SiLU of as many elements in 48 channels and 8 groups, forward and backward."""
    batch, channels, height, width = shape
    if height % 4 or width % 4:
        raise ValueError(f"shape: expected height and width in multiples of 4, got {shape}")
    _, x, _ = inputs((batch, 16 * channels, height // 4, width // 4), dtype, device)
    grad, weight = x.flip(0), torch.linspace(0.5, 1.5, x.shape[1], device=device).to(dtype)
    bias = weight.flip(0) - 1
    n = len(few(x))

    def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.group_norm_silu(x, GROUPS, weight, bias, EPS)

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, GROUPS, weight, bias, EPS))

    def row(name: str, function: Callable[..., Tensor]) -> Row:
        def run(x: Tensor, grad: Tensor, weight: Tensor = weight, bias: Tensor = bias) -> tuple[Tensor, ...]:
            leaves = [v.detach().requires_grad_() for v in (x, weight, bias)]
            y = function(*leaves)
            return y.detach(), *torch.autograd.grad(y, leaves, grad)

        def check() -> None:
            wide = [v[:n].double() for v in (x, grad)] + [weight.double(), bias.double()]
            leaves = [v.requires_grad_() for v in (wide[0], *wide[2:])]
            y = eager(*leaves)
            want = [y.detach(), *torch.autograd.grad(y, leaves, wide[1])]
            # The slope of SiLU adds a rounding, and the gradients by weight and bias are sums of them.
            agree(f"group_norm_silu {name}", run(x[:n], grad[:n]), want, 4 * BOUND[dtype])

        return Row(lambda: run(x, grad), check)

    return _rows(row, fused, eager)


def layer_norm(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Rows:
    """x + gate y and its modulated norm, of as many elements in tokens of 3072 channels, as those of Flux, or fewer."""
    size = math.prod(shape[1:])
    channels = math.gcd(size, 3072)
    x, y, _ = inputs((shape[0], size // channels, channels), dtype, device)
    parts = y.flip(0)[:, 0].repeat(1, 3).chunk(3, 1)
    n = len(few(x))

    def fused(x: Tensor = x, y: Tensor = y, *rows: Tensor) -> tuple[Tensor, Tensor]:
        gate, scale, shift = rows or parts
        return ops.add_layer_norm(x, y, gate=gate, scale=scale, shift=shift)

    def eager(x: Tensor = x, y: Tensor = y, *rows: Tensor) -> tuple[Tensor, Tensor]:
        gate, scale, shift = (row[:, None] for row in rows or parts)
        total = x + gate * y
        return total, F.layer_norm(total, x.shape[-1:]) * (1 + scale) + shift

    def row(name: str, function: Callable[..., tuple[Tensor, Tensor]]) -> Row:
        def check() -> None:
            some = [v[:n] for v in (x, y, *parts)]
            a, b, gate, scale, shift = (v.double() for v in some)
            want = reference.add_layer_norm(a, b, None, None, EPS, gate, scale, shift)
            agree(f"layer_norm {name}", function(*some), want, 4 * BOUND[dtype])

        return Row(function, check)

    return _rows(row, fused, eager)


def rotate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Rows:
    """Norm and rotary embedding of as many elements in tokens of 24 heads of 128, as those of Flux, or fewer."""
    size = math.prod(shape[1:])
    depth = math.gcd(size, 128)
    heads = math.gcd(size // depth, 24)
    x, _, _ = inputs((shape[0], size // (heads * depth), heads, depth), dtype, device)
    weight = torch.linspace(0.5, 1.5, depth, device=device).to(dtype)
    angles = torch.linspace(0, 9, x.shape[1] * (depth // 2), device=device).view(x.shape[1], -1)
    tables = [t.repeat_interleave(2, 1) for t in (angles.cos(), angles.sin())]
    n = len(few(x))

    def fused(x: Tensor = x) -> Tensor:
        return ops.rotate(x, tables[0], tables[1], weight, EPS)

    def eager(x: Tensor = x) -> Tensor:
        cos, sin = (t[:, None] for t in tables)
        x = F.rms_norm(x, weight.shape, weight, EPS)
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return (x.float() * cos + torch.stack([-b, a], -1).flatten(3).float() * sin).to(x.dtype)

    def row(name: str, function: Callable[..., Tensor]) -> Row:
        def check() -> None:
            cos, sin, factor = (t.double() for t in (*tables, weight))
            want = reference.rotate(x[:n].double(), cos, sin, factor, EPS)
            agree(f"rotate {name}", [function(x[:n])], [want], BOUND[dtype])

        return Row(function, check)

    return _rows(row, fused, eager)


KERNELS: dict[str, Callable[[tuple[int, ...], torch.dtype, torch.device], Rows]] = {
    "normal": normal,
    "loss_without_gradient": loss_without_gradient,
    "bound_forward_backward": bound_forward_backward,
    "inner_products": inner_products,
    "gated_gelu": gated_gelu,
    "group_norm_silu": group_norm_silu,
    "layer_norm": layer_norm,
    "rotate": rotate,
}
# The fewest tensors to read and write: z; pred; pred, raw, x_t, x_0 and two gradients; cond and uncond; hidden, gate
# and their product; x, y and dy, x, dx; x, y, their sum and its norm; x and its norm, rotated.
KERNEL_TENSORS = {
    "normal": 1,
    "loss_without_gradient": 1,
    "bound_forward_backward": 6,
    "inner_products": 2,
    "gated_gelu": 3,
    "group_norm_silu": 5,
    "layer_norm": 4,
    "rotate": 2,
}
