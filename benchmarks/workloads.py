"""What the benchmarks time: the library, and the same arithmetic in eager PyTorch.

A workload is a dict of rows, all with the same inputs and the same network: "fused" is the library as it runs on the
device, "reference" is eager PyTorch, and "compile" is torch.compile of "reference". The network is eager in all three,
so that they differ in the arithmetic around it alone.
"""

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import ops, reference
from fastdiff.ddpm import DDPM
from fastdiff.forward_noise import kept_noise
from fastdiff.schedule import grid, linear
from fastdiff.steps import ancestral
from fastdiff.unet import UNet

from .eager import CLIP, Eager
from .networks import network

TIMESTEPS = 1000
SEED = 1
# Largest distance from the float64 reference, relative, root mean square. float32: a few roundings of the largest
# intermediate value. bfloat16: the roundings of eager PyTorch, one after each operation.
BOUND = {torch.float32: 3e-6, torch.bfloat16: 2**-7}
# A check takes whole samples, of so many elements together or one sample.
CHECKED = 2**19
# The tables of the library's ops: linear betas, the eps loss, the ancestral sampler.
NOISING = torch.stack((linear(TIMESTEPS).alpha, linear(TIMESTEPS).sigma), 1).float()
LOSS = torch.tensor([0.0, 1.0, 1.0]).repeat(TIMESTEPS + 1, 1)
UPDATE = ancestral(linear(TIMESTEPS), grid(TIMESTEPS, None), "eps", CLIP).rows.float()
SMALL, LARGE, HUGE = (64, 3, 64, 64), (64, 3, 256, 256), (256, 3, 256, 256)


@dataclass(frozen=True)
class Row:
    """run: one call of what is timed; it draws its own noise.

    check: RuntimeError unless the same code, with given noise, agrees with the float64 reference.
    """

    run: Callable[[], object]
    check: Callable[[], None]


Rows = dict[str, Row]


def refuse_interpreter() -> None:
    """ValueError if TRITON_INTERPRET is set: the interpreter's time says nothing about the kernels."""
    value = os.environ.get("TRITON_INTERPRET", "")
    if value not in ("", "0"):
        raise ValueError(f"TRITON_INTERPRET: expected it unset, as the interpreter is not to be timed, got {value!r}")


def agree(name: str, got: Sequence[Tensor], want: Sequence[Tensor], bound: float) -> None:
    """RuntimeError unless ||got - want|| <= bound ||want|| for each pair. `want` is float64."""
    for part, (g, w) in enumerate(zip(got, want, strict=True)):
        if g.shape != w.shape:
            raise RuntimeError(f"{name}: part {part} has shape {tuple(g.shape)}, the reference {tuple(w.shape)}")
        error = ((g.detach().double() - w).norm() / w.norm()).item()
        if not error <= bound:
            raise RuntimeError(f"{name}: part {part} is {error:.1e} off the float64 reference, allowed {bound:.1e}")


Case = tuple[torch.dtype, tuple[int, ...]]


def cases(device: torch.device, size: str) -> list[Case]:
    """The data types and shapes to measure; size is "quick" or "full". A CPU, which takes longer, has fewer."""
    single, half = torch.float32, torch.bfloat16
    if device.type == "cpu" and size == "quick":
        return [(single, SMALL), (single, LARGE), (half, SMALL)]
    shapes = [SMALL, LARGE] if device.type == "cpu" else [SMALL, HUGE]
    if device.type != "cpu" and size == "full":
        shapes.insert(1, LARGE)
    return [(dtype, shape) for dtype in (single, half) for shape in shapes]


# --- operations -------------------------------------------------------------------------------------------------


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(data in [-1, 1], a prediction, levels (B,) in 1..T)."""
    random = torch.Generator(device).manual_seed(0)
    data = torch.rand(shape, generator=random, device=device).mul_(2).sub_(1).to(dtype)
    pred = torch.randn(shape, generator=random, device=device).to(dtype)
    t = torch.randint(1, TIMESTEPS + 1, shape[:1], generator=random, device=device)
    return data, pred, t


def few(x: Tensor) -> Tensor:
    """The first samples of x: few enough that the float64 reference takes no longer than the timing."""
    return x[: max(1, CHECKED // x[0].numel())]


def check_noising(name: str, x0: Tensor, t: Tensor, x_t: Tensor, noise: Tensor, bound: float) -> None:
    want = reference.noising(x0.double(), t, NOISING.to(x0.device), None, None, noise.double(), ops.FORWARD)
    agree(f"forward_noising {name}", [x_t], [want], bound)


def check_loss(name: str, pred: Tensor, value_and_gradient: Sequence[Tensor], noise: Tensor, bound: float) -> None:
    t, wide = torch.zeros(1, dtype=torch.int64, device=pred.device), pred.detach().double()
    want, slope = reference.loss(wide, None, t, LOSS.to(pred.device), None, None, noise.double(), 0, "mse", 1.0)
    agree(f"loss_forward_backward {name}", value_and_gradient, [want.mean(), slope / slope.numel()], bound)


def check_update(name: str, x: Tensor, pred: Tensor, result: Tensor, noise: Tensor, bound: float) -> None:
    """The ancestral step from level T/2."""
    step = torch.full((1,), TIMESTEPS // 2, device=x.device)
    wide = x.double(), pred.double(), UPDATE.to(x.device), step
    want = reference.update(*wide, None, None, None, None, noise.double(), None, CLIP, "none", ops.REVERSE)[0]
    agree(f"reverse_update {name}", [result], [want], bound)


def with_gradient(value: Tensor, pred: Tensor) -> tuple[Tensor, Tensor]:
    return value.detach(), torch.autograd.grad(value, pred)[0]


def _noise(x: Tensor, seed: Tensor, step: Tensor, stream: int) -> Tensor:
    """The noise of the library's ops, float64."""
    return reference.normal(x.shape, seed, None, step, stream, torch.float64)


def _three(fused: Row, eager: Callable[[str, Eager], Row], device: torch.device) -> Rows:
    rows = {name: eager(name, Eager(TIMESTEPS, device, name == "compile")) for name in ("reference", "compile")}
    return {"fused": fused, **rows}


def forward_noising(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Rows:
    """Forward noising. A fourth row, "fused_out", writes into a given tensor."""
    x0, given, t = inputs(shape, dtype, device)
    table, seed, bound = NOISING.to(device), torch.full((1,), SEED, device=device), BOUND[dtype]
    part, index = few(x0), t - 1

    def fused(name: str, out: Tensor | None) -> Row:
        def check() -> None:
            n, x_t = len(part), ops.noising(x0, t, table, seed=seed, out=out)
            check_noising(name, part, t[:n], x_t[:n], _noise(part, seed, t[:n], ops.FORWARD), bound)

        return Row(lambda: ops.noising(x0, t, table, out=out), check)

    def eager(name: str, model: Eager) -> Row:
        def check() -> None:
            n, x_t = len(part), model.q_sample(x0, index, given)
            check_noising(name, part, t[:n], x_t[:n], given[:n], bound)

        return Row(lambda: model.q_sample(x0, index), check)

    return _three(fused("fused", None), eager, device) | {"fused_out": fused("fused_out", torch.empty_like(x0))}


def loss_forward_backward(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Rows:
    """The eps loss and its gradient. The library draws the noise again; eager PyTorch reads it."""
    noise, pred, t = inputs(shape, dtype, device)
    table, seed, bound = LOSS.to(device), torch.full((1,), SEED, device=device), BOUND[dtype]
    part = few(pred).clone().requires_grad_()
    pred.requires_grad_()
    n = len(part)

    def fused(pred: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return with_gradient(ops.loss(pred, t, table, seed=seed), pred)

    def check() -> None:
        check_loss("fused", part, fused(part, t[:n]), _noise(part, seed, t[:n], ops.FORWARD), bound)

    def eager(name: str, model: Eager) -> Row:
        def run(pred: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
            return with_gradient(model.mse(pred, noise), pred)

        return Row(lambda: run(pred, noise), lambda: check_loss(name, part, run(part, noise[:n]), noise[:n], bound))

    return _three(Row(lambda: fused(pred, t), check), eager, device)


def noising_and_loss(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Rows:
    """All that a training step does beside its model: noising, and the eps loss with its gradient."""
    x0, pred, t = inputs(shape, dtype, device)
    noising, table, bound = NOISING.to(device), LOSS.to(device), BOUND[dtype]
    part = few(pred).clone().requires_grad_()
    pred.requires_grad_()
    n, index = len(part), t - 1

    def fused(x0: Tensor, pred: Tensor, t: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        noise = kept_noise(x0, t, seed)
        key: dict[str, Any] = {"seed": seed} if noise is None else {"noise": noise}
        return ops.noising(x0, t, noising, **key), *with_gradient(ops.loss(pred, t, table, **key), pred)

    def check(name: str, result: Sequence[Tensor], noise: Tensor) -> None:
        check_noising(name, x0[:n], t[:n], result[0], noise, bound)
        check_loss(name, part, result[1:], noise, bound)

    def run() -> object:
        return fused(x0, pred, t, torch.randint(2**62, (1,), device=device))

    def check_fused() -> None:
        seed = torch.full((1,), SEED, device=device)
        check("fused", fused(x0[:n], part, t[:n], seed), _noise(part, seed, t[:n], ops.FORWARD))

    def eager(name: str, model: Eager) -> Row:
        def run(x0: Tensor, pred: Tensor, index: Tensor, noise: Tensor | None = None) -> tuple[Tensor, ...]:
            x_t, noise = model.corrupt(x0, index, noise)
            return x_t, *with_gradient(model.mse(pred, noise), pred)

        given = pred.detach()[:n].flip(0)
        return Row(lambda: run(x0, pred, index), lambda: check(name, run(x0[:n], part, index[:n], given), given))

    return _three(Row(run, check_fused), eager, device)


def reverse_update(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Rows:
    """The ancestral step at t = T/2. The library works in place, as in its sampling loop."""
    x, pred, _ = inputs(shape, dtype, device)
    rows, seed, bound = UPDATE.to(device), torch.full((1,), SEED, device=device), BOUND[dtype]
    step = torch.full((1,), TIMESTEPS // 2, device=device)
    n = len(few(x))
    given = pred.flip(0)

    def fused(state: Tensor) -> Tensor:
        return ops.update(state, pred, rows, step, seed=seed, clip=CLIP, inplace=True)

    def check(name: str, result: Tensor, noise: Tensor) -> None:
        check_update(name, x[:n], pred[:n], result[:n], noise[:n], bound)

    def eager(name: str, model: Eager) -> Row:
        row = model.rows["ddpm"][TIMESTEPS // 2 - 1]  # the step from level T/2
        return Row(
            lambda: model.step(x, pred, row, True),
            lambda: check(name, model.step(x, pred, row, True, given), given),
        )

    state = x.clone()
    fused_row = Row(
        lambda: fused(state), lambda: check("fused", fused(x.clone()), _noise(x[:n], seed, step, ops.REVERSE))
    )
    return _three(fused_row, eager, device)


OPERATIONS: dict[str, Callable[[tuple[int, ...], torch.dtype, torch.device], Rows]] = {
    "forward_noising": forward_noising,
    "loss_forward_backward": loss_forward_backward,
    "noising_and_loss": noising_and_loss,
    "reverse_update": reverse_update,
}
# The fewest tensors that have to be read or written: (x_0, x_t), (pred, gradient), both, (x, pred, x').
TENSORS = {"forward_noising": 2, "loss_forward_backward": 2, "noising_and_loss": 4, "reverse_update": 3}


# --- whole steps ------------------------------------------------------------------------------------------------


def network_bound(dtype: torch.dtype, device: torch.device) -> float:
    """BOUND for what went through a network. On a GPU, convolutions of float32 may use TF32."""
    if dtype != torch.float32:
        return 1e-1
    return 1e-2 if device.type == "cuda" else 3e-5


def training_row(
    name: str,
    net: nn.Module,
    loss: Callable[[Tensor, Tensor | None, Tensor | None], Tensor],
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Row:
    """Loss, backward and AdamW step of a network with the weights of `network`.

    Args:
        loss: a function of (data, t, noise), t (B,) in 1..T; it draws t and noise if they are None.
        dtype: the step runs under autocast to this type unless it is float32.
    """
    reference = network(device)
    data, given, t = inputs((batch, *(reference.sample_shape or ())), torch.float32, device)
    cast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)

    def run() -> None:
        optimizer.zero_grad()
        with cast:
            value = loss(data, None, None)
        value.backward()
        optimizer.step()

    def check() -> None:
        wide = reference.double()
        want = _with_gradient(DDPM(wide).to(device)(data.double(), t=t, noise=given.double()), wide)
        with cast:
            value = loss(data, t, given)
        agree(f"training_step {name}", _with_gradient(value, net), want, network_bound(dtype, device))

    return Row(run, check)


def training_step(batch: int, dtype: torch.dtype, device: torch.device) -> Rows:
    own = network(device)
    ddpm = DDPM(own).to(device)

    def eager(name: str, compiled: bool) -> Row:
        net, model = network(device), Eager(TIMESTEPS, device, compiled)

        def loss(data: Tensor, t: Tensor | None, noise: Tensor | None) -> Tensor:
            return model.loss(net, data, None if t is None else t - 1, noise)

        return training_row(name, net, loss, batch, dtype, device)

    return {
        "fused": training_row("fused", own, lambda data, t, noise: ddpm(data, t=t, noise=noise), batch, dtype, device),
        "reference": eager("reference", False),
        "compile": eager("compile", True),
    }


def _with_gradient(value: Tensor, net: nn.Module) -> tuple[Tensor, Tensor]:
    """(value, its gradient by all parameters, sorted by name, as one vector)."""
    gradient = torch.autograd.grad(value, [p for _, p in sorted(net.named_parameters())])
    return value.detach(), torch.cat([g.flatten() for g in gradient])


def sampling(batch: int, sampler: str, steps: int, device: torch.device, name: str = "small") -> Rows:
    """Images from a U-Net in `steps` steps with T = steps; the sampler is "ddpm" or "ddim".

    Three more rows are the library's: "channels_last", by the layout of its network, "compiled" by DDPM.compile, and
    "bfloat16" by sample(dtype=).
    """
    net = network(device, name).eval()
    wide = copy.deepcopy(net).double()
    shape = (batch, *(net.sample_shape or ()))
    random = torch.Generator(device).manual_seed(0)
    x_T = torch.randn(shape, generator=random, device=device)
    noise = torch.randn((steps, *shape), generator=random, device=device)

    def check(row: str, got: Tensor, dtype: torch.dtype = torch.float32) -> None:
        """Check the first sample alone: a network in float64 is slow."""
        oracle = DDPM(wide, timesteps=steps).to(device)
        given = noise[:, :1].double() if sampler == "ddpm" else None
        want = oracle.sample((1, *shape[1:]), sampler=sampler, x_T=x_T[:1].double(), noise=given)
        agree(f"sampling {sampler} {row}", [got[:1]], [want], network_bound(dtype, device))

    def own(row: str, net: UNet, dtype: torch.dtype | None = None) -> Row:
        ddpm = DDPM(net, timesteps=steps).to(device)
        if row == "compiled":
            ddpm.compile()
        given = noise if sampler == "ddpm" else None
        return Row(
            lambda: ddpm.sample(shape, sampler=sampler, dtype=dtype),
            lambda: check(
                row, ddpm.sample(shape, sampler=sampler, x_T=x_T, noise=given, dtype=dtype), dtype or x_T.dtype
            ),
        )

    def eager(row: str) -> Row:
        model = Eager(steps, device, row == "compile")
        return Row(
            lambda: model.sample(net, sampler, torch.randn(shape, device=device)),
            lambda: check(row, model.sample(net, sampler, x_T, noise)),
        )

    laid = copy.deepcopy(net).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    rows = {"fused": own("fused", net), "channels_last": own("channels_last", laid)}
    rows["compiled"] = own("compiled", copy.deepcopy(net))
    rows["bfloat16"] = own("bfloat16", net, torch.bfloat16)
    return rows | {row: eager(row) for row in ("reference", "compile")}
