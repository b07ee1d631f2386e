"""torch.func and forward-mode AD through every op: what the differentiable reference gives, in float64 and float32."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LTXEulerAncestralRFScheduler,
)
from strategies import BACKENDS, DEVICE, tensor
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils._pytree import tree_map

import fastdiff
from benchmarks.calls import CALLS, Call, Source, last
from fastdiff import DDPM, UNet, ops
from fastdiff.fused import norm_silu
from fastdiff.interop import diffusers as ours
from fastdiff.nn import Attention
from fastdiff.support import transforms

SHAPE = (2, 4, 4)
every = pytest.mark.parametrize("backend", BACKENDS)


def table(columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linspace(0.2, 1.0, 4 * columns, dtype=dtype, device=DEVICE).reshape(4, columns)


# Made before any transform is active.
DATA = [tensor(SHAPE, salt=salt).clamp(-2, 2) / 3 for salt in range(6)]


def data(salt: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return DATA[salt].to(dtype)


T = torch.tensor([1, 3], device=DEVICE)
IDS = torch.tensor([7, 5], device=DEVICE)


# Which have no operand and no rule that another call of the operation has not.
WITHIN = ("loss", "vlb, learned", "group_norm_silu, scale and shift")


def examples() -> dict[str, Call]:
    """The other calls that have a gradient, in float64."""
    found = {}
    for name, make in ((name, make) for name, make in CALLS.items() if name not in WITHIN):
        call = make(Source(SHAPE, torch.float64, DEVICE, lambda x: x.clamp(-2, 2) / 3))
        if call.by:
            found[name] = replace(call, operands={k: v for k, v in call.operands.items() if k != "out"})
    return found


EXAMPLES = examples()
functions = pytest.mark.parametrize("name", EXAMPLES)
Function = Callable[[dict[str, Tensor]], Tensor]


def function(name: str, dtype: torch.dtype = torch.float64) -> tuple[Function, dict[str, Tensor], dict[str, Tensor]]:
    """(A function of the operands that have a gradient, by their names; these operands; a direction)."""
    call = EXAMPLES[name].to(dtype)
    x = {name: call.operands[name] for name in call.by}
    v = {name: tensor(tuple(t.shape), salt=salt).to(dtype) / 3 for salt, (name, t) in enumerate(x.items(), start=5)}
    return (lambda x: last(call.op(**call.operands | x))), x, v


def differences(f, x, v, step: float = 1e-5) -> Tensor:
    forth, back = (f(tree_map(lambda x, v: x + sign * step * v, x, v)) for sign in (1, -1))  # noqa: B023
    return (forth - back).double() / (2 * step)


def tolerance(name: str) -> dict[str, float]:
    """A loss is float32 whatever its operands are, and a difference of two loses 2^-24 / step of its value."""
    return {"rtol": 1e-2, "atol": 2e-2} if name.startswith("loss") else {"rtol": 1e-6, "atol": 1e-7}


@functions
def test_jvp_is_the_limit_of_differences(name):
    f, x, v = function(name)
    value, tangent = jvp(f, (x,), (v,))
    torch.testing.assert_close(value, f(x))
    torch.testing.assert_close(tangent.double(), differences(f, x, v), **tolerance(name))
    assert tangent.abs().max() > 1e-4  # not the zeros of a rule that is missing
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(f(tree_map(forward_ad.make_dual, x, v)))
    torch.testing.assert_close(dual.tangent, tangent)


@every
@functions
def test_float32_tangents_of_every_backend(name, backend):
    f, x, v = function(name)
    right = jvp(f, (x,), (v,))[1].float()
    f, x, v = function(name, torch.float32)
    with fastdiff.backend(backend):
        got = jvp(f, (x,), (v,))[1]
    torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-4)


@every
@functions
def test_grad_is_backward(name, backend):
    f, x, _ = function(name, torch.float32)
    with fastdiff.backend(backend):
        leaves = {name: t.clone().requires_grad_() for name, t in x.items()}
        f(leaves).sum().backward()
        got = grad(lambda x: f(x).sum())(x)
    torch.testing.assert_close(got, {name: t.grad for name, t in leaves.items()}, rtol=1e-4, atol=1e-5)


@every
@functions
def test_vmap_is_a_loop(name, backend):
    f, x, v = function(name, torch.float32)
    each = [tree_map(lambda x, v: x + k * v, x, v) for k in range(3)]  # noqa: B023
    many = tree_map(lambda *parts: torch.stack(parts), *each)
    with fastdiff.backend(backend):
        torch.testing.assert_close(vmap(f)(many), torch.stack([f(x) for x in each]), rtol=1e-4, atol=1e-5)
        slope = grad(lambda x: f(x).sum())
        right = tree_map(lambda *parts: torch.stack(parts), *map(slope, each))
        torch.testing.assert_close(vmap(slope)(many), right, rtol=1e-4, atol=1e-5)


@functions
def test_forward_and_reverse_jacobians_are_equal(name):
    f, x, _ = function(name)
    forward, reverse = (tree_map(Tensor.double, jacobian(f)(x)) for jacobian in (jacfwd, jacrev))
    torch.testing.assert_close(forward, reverse, rtol=1e-5, atol=1e-7)


BY_NUMBERS = {
    "noising": (2, lambda rows: ops.noising(data(1, rows.dtype), T, rows, seed=3)),
    "loss": (3, lambda rows: ops.loss(data(1, rows.dtype), T, rows, x0=data(2, rows.dtype), seed=3, kind="huber")),
    "vlb": (6, lambda rows: ops.vlb(data(1, rows.dtype), data(2, rows.dtype), data(3, rows.dtype), T, rows)),
    "update": (9, lambda rows: ops.update(data(1, rows.dtype), data(2, rows.dtype), rows, T, seed=3, clip=0.6)),
}


@every
@pytest.mark.parametrize("name", BY_NUMBERS)
def test_gradients_by_the_numbers_of_a_table(name, backend):
    """Learned weights, times and schedules."""
    columns, f = BY_NUMBERS[name]
    right = grad(lambda rows: f(rows).sum())(table(columns))
    with fastdiff.backend(backend):
        rows = table(columns, torch.float32).requires_grad_()
        f(rows).sum().backward()
    torch.testing.assert_close(rows.grad, right.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["loss, x0", "vlb", "vlb, decoder", "group_norm_silu"])
def test_hessian_is_the_jacobian_of_the_gradient(name):
    f, operands, directions = function(name)
    first, x = next(iter(operands.items()))
    total = lambda x: f(operands | {first: x}).sum()  # noqa: E731
    by_differences = differences(grad(total), x, directions[first])
    got = torch.einsum("ijkabc,abc->ijk", hessian(total)(x), directions[first]).double()
    assert not got.isnan().any()
    torch.testing.assert_close(got, by_differences, rtol=1e-2, atol=1e-2 if name == "loss, x0" else 1e-6)


@every
def test_noise_under_vmap_is_that_of_each_call(backend):
    seeds, ids = torch.arange(3, device=DEVICE), torch.arange(6, device=DEVICE).reshape(3, 2)
    x, rows, t = data(1, torch.float32), table(2, torch.float32), torch.tensor([[0, 1], [2, 3], [1, 1]], device=DEVICE)

    def one(seed, ids, t):
        drawn = ops.normal(SHAPE, seed, sample_ids=ids, device=DEVICE)
        return drawn, ops.noising(x, t, rows, seed=seed, sample_ids=ids)

    with fastdiff.backend(backend):
        for got, *right in zip(vmap(one)(seeds, ids, t), *map(one, seeds, ids, t), strict=True):
            torch.testing.assert_close(got, torch.stack(right), rtol=1e-5, atol=1e-6)
        with pytest.raises(RuntimeError, match="randomness"):
            vmap(lambda x: ops.noising(x, 1, rows))(torch.stack((x, x)))
        different = vmap(lambda x: ops.noising(x, 1, rows), randomness="different")(torch.stack((x, x)))
        assert not torch.equal(different[0], different[1])


def test_indices_are_checked_under_transforms():
    x, rows = data(1), table(2)
    wrong = torch.tensor([[0, 1], [2, 9]], device=DEVICE)
    if DEVICE.type == "cpu":
        with pytest.raises(ValueError, match=r"t: expected values in \[0, 4\), got 9"):
            vmap(lambda t: ops.noising(x, t, rows, seed=1))(wrong)
        with pytest.raises(ValueError, match="sample_ids"):
            jvp(lambda x: ops.noising(x, 1, rows, seed=1, sample_ids=-IDS), (x,), (x,))


def test_what_is_overwritten_under_transforms():
    x, v, rows = data(1), data(2), table(9)
    right = jvp(lambda x: ops.update(x, v, rows, 1, noisy=False), (x,), (v,))[1]
    got = jvp(lambda x: ops.update(x.clone(), v, rows, 1, noisy=False, inplace=True), (x,), (v,))[1]
    torch.testing.assert_close(got, right)

    def with_history(x):
        hist = x.clone()
        return ops.update(x, v, rows, 1, noisy=False, hist=hist, keep="x0hat"), hist

    same, kept = jvp(with_history, (x,), (v,))[1]
    assert not torch.equal(same, right) and kept.abs().sum() > 0  # hist has a part in x'
    outside = torch.empty_like(x)
    for call in (
        lambda x: ops.update(x, v, rows, 1, noisy=False, out=outside),
        lambda x: ops.noising(x, 1, table(2), seed=1, out=outside),
    ):
        with pytest.raises(ValueError, match=r"out: expected a tensor that the torch\.func transform"):
            vmap(call)(torch.stack((x, v)))
        with pytest.raises(ValueError, match=r"out: expected a tensor that the torch\.func transform"):
            jvp(call, (x,), (v,))
        with pytest.raises(ValueError, match="out: expected no gradient"):
            grad(lambda x, call=call: call(x).sum())(x)


def test_the_bare_op_refuses_what_it_cannot_do():
    x, args = data(1), (T, table(2), torch.tensor([1], device=DEVICE), None, None, ops.FORWARD)
    with pytest.raises(RuntimeError, match=r"torch\.ops\.fastdiff\.noising has no rule"):
        jvp(lambda x: torch.ops.fastdiff.noising(x, *args), (x,), (x,))


@pytest.mark.slow
def test_compiled_transforms():
    f, x, v = function("noising, ids")
    slopes = lambda x: vmap(grad(lambda x: f(x).sum()))(tree_map(lambda t: t[None], x))  # noqa: E731
    for made in (lambda x: jvp(f, (x,), (v,))[1], slopes):
        torch.testing.assert_close(torch.compile(made, backend="aot_eager")(x), made(x))


# --- modules ------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv(x) * (1 + t.reshape(-1, 1, 1, 1) / 1000)


def ddpm() -> DDPM:
    torch.manual_seed(0)
    return DDPM(Net(), "cosine", 20, "v").double()


IMAGES = (2, 3, 4, 4)
LEVELS = torch.tensor([3, 11])
METHODS = {
    "q_sample": lambda m, x: m.q_sample(x, LEVELS, seed=1),
    "q_step": lambda m, x: m.q_step(x, LEVELS, seed=1),
    "predict": lambda m, x: m.predict(x, LEVELS, "x0"),
    "predict_x0": lambda m, x: m.predict_x0(x, LEVELS),
    "p_sample": lambda m, x: m.p_sample(x, LEVELS, seed=1),
    "q_posterior": lambda m, x: m.q_posterior(x, 0.5 * x, LEVELS)[0],
}


@pytest.mark.parametrize("name", METHODS)
def test_methods(name):
    m, x, v = ddpm(), tensor(IMAGES, salt=1).double().cpu() / 9, tensor(IMAGES, salt=2).double().cpu() / 9
    f = lambda x: METHODS[name](m, x)  # noqa: E731
    tangent = jvp(f, (x,), (v,))[1]
    torch.testing.assert_close(tangent, differences(f, x, v), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(vmap(f)(torch.stack((x, v))), torch.stack((f(x), f(v))))
    assert f(x).data_ptr()  # no table was kept that belongs to the transform


def test_per_sample_gradients_of_the_training_loss():
    m, x = ddpm(), tensor((4, 3, 4, 4), salt=1).double().cpu()
    parameters = {name: p.detach() for name, p in m.named_parameters()}
    t, seeds = torch.tensor([1, 5, 9, 20]), torch.arange(4)

    def loss(parameters, x, t, seed):
        return functional_call(m, parameters, (x[None],), {"t": t[None], "seed": seed})

    got = vmap(grad(loss), in_dims=(None, 0, 0, 0))(parameters, x, t, seeds)
    for i in range(4):
        m.zero_grad()
        m(x[i : i + 1], t=t[i : i + 1], seed=seeds[i]).backward()
        for name, p in m.named_parameters():
            torch.testing.assert_close(got[name][i], p.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@every
def test_unet(backend):
    torch.manual_seed(0)
    unet = UNet(
        sample_size=8, block_out_channels=(8, 8), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=4, layers_per_block=1,
    ).to(DEVICE)  # fmt: skip
    x, v = tensor((1, 3, 8, 8), salt=1), tensor((1, 3, 8, 8), salt=2)
    exact = copy.deepcopy(unet).double()
    right = jvp(lambda x: exact(x, 5), (x.double(),), (v.double(),))[1]
    with fastdiff.backend(backend):
        torch.testing.assert_close(jvp(lambda x: unet(x, 5), (x,), (v,))[1].double(), right, rtol=1e-3, atol=1e-3)
        many = torch.stack((x, v))
        torch.testing.assert_close(
            vmap(lambda x: unet(x, 5))(many), torch.stack((unet(x, 5), unet(v, 5))), rtol=1e-3, atol=1e-4
        )


def test_norms_of_channels_last_maps():
    """For them PyTorch's norm has no rule of forward-mode AD or vmap."""
    norm, attention = nn.GroupNorm(2, 4, device=DEVICE), Attention(4, 2, 2, 1e-5).to(DEVICE)
    x, v = (tensor((2, 4, 2, 3), salt=k).to(memory_format=torch.channels_last) for k in (1, 2))

    def f(x, norm=norm, attention=attention):
        return norm_silu(norm, attention(x))

    exact = [part.double() for part in copy.deepcopy((norm, attention))]
    right = jvp(lambda x: f(x.contiguous(), *exact), (x.double(),), (v.double(),))[1]
    torch.testing.assert_close(jvp(f, (x,), (v,))[1].double(), right, rtol=1e-3, atol=1e-4)
    want, many = torch.stack([f(part.contiguous()) for part in (x, v)]), torch.stack((x, v), -1).movedim(-1, 0)
    torch.testing.assert_close(vmap(f)(many), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (DDPMScheduler, {}), (DDIMScheduler, {}), (DPMSolverMultistepScheduler, {}),
        (FlowMatchEulerDiscreteScheduler, {}), (LTXEulerAncestralRFScheduler, {}),
        (EulerDiscreteScheduler, {"s_churn": 1.0}),
    ],
)  # fmt: skip
def test_schedulers(monkeypatch, kind, options):
    twin = getattr(ours, kind.__name__)
    x, v, output = (tensor(IMAGES, salt=k).cpu() for k in range(3))

    def step(kind):
        scheduler = kind()
        scheduler.set_timesteps(10)
        t = scheduler.timesteps[3]
        return lambda x: scheduler.step(output, t, x, **options).prev_sample

    def tangent(kind):
        torch.manual_seed(1)
        return jvp(step(kind), (x,), (v,))[1]

    want, tolist = tangent(kind), torch.Tensor.tolist
    refused = partial(pytest.fail, "PyTorch 2.7 has no tolist within a transform")
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: refused() if transforms.active() else tolist(t))
    torch.testing.assert_close(tangent(twin), want, rtol=1e-4, atol=1e-5)
