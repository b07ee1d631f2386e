"""torch.func and forward-mode AD through every op: what the differentiable reference gives, in float64 and float32."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from strategies import BACKENDS, DEVICE, tensor
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import fastdiff
from fastdiff import DDPM, UNet, ops
from fastdiff.interop import diffusers as ours

SHAPE = (2, 4, 4)
every = pytest.mark.parametrize("backend", BACKENDS)


def table(columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linspace(0.2, 1.0, 4 * columns, dtype=dtype, device=DEVICE).reshape(4, columns)


# Made before any transform is active.
DATA = {(salt, n): tensor(SHAPE, salt=salt).clamp(-2, 2) / 3 for salt in range(6) for n in (3,)}
DATA |= {(salt, 1): tensor((4,), salt=salt) / 3 for salt in (1, 2)}


def data(salt: int, dtype: torch.dtype = torch.float64, ndim: int = 3) -> Tensor:
    return DATA[salt, ndim].to(dtype)


def vlb_rows(decoder: float) -> Tensor:
    rows = table(6).clone()
    rows[:, 3], rows[:, 4], rows[:, 5] = -2.0, -1.0, decoder
    return rows


T = torch.tensor([1, 3], device=DEVICE)
IDS = torch.tensor([7, 5], device=DEVICE)


def cast(rows: Tensor, x: Tensor) -> Tensor:
    return rows.to(x.dtype)


# Each is a function of one tensor (2, 4, 4), by the name of the op and of the operand.
FUNCTIONS = {
    "noising by x0": lambda x: ops.noising(x, T, cast(table(2), x), seed=3, sample_ids=IDS),
    "noising by noise": lambda x: ops.noising(data(1, x.dtype), T, cast(table(2), x), noise=x),
    "loss mse": lambda x: ops.loss(x, T, cast(table(3), x), x0=data(1, x.dtype), seed=3),
    "loss huber by x0": lambda x: ops.loss(
        data(1, x.dtype), 2, cast(table(3), x), x0=x, noise=data(2, x.dtype), kind="huber", delta=0.3, reduction="none"
    ),
    "loss l1 by noise": lambda x: ops.loss(data(1, x.dtype), T, cast(table(3), x), noise=x, kind="l1"),
    "vlb by pred": lambda x: ops.vlb(x, data(1, x.dtype), data(2, x.dtype), T, cast(vlb_rows(0.0), x)),
    "vlb by raw": lambda x: ops.vlb(
        data(1, x.dtype), data(2, x.dtype), data(3, x.dtype), T, cast(vlb_rows(0.0), x), raw_variance=x
    ),
    "vlb decoder": lambda x: ops.vlb(x, data(1, x.dtype), data(2, x.dtype) * 9, 1, cast(vlb_rows(1.0), x), clip=5.0),
    "update by x": lambda x: ops.update(x, data(1, x.dtype), cast(table(9), x), T, seed=3, clip=0.6),
    "update by raw": lambda x: ops.update(
        data(1, x.dtype), data(2, x.dtype), cast(table(9), x), T, seed=3, raw_variance=x, uncond=data(3, x.dtype)
    ),
    "combine": lambda x: ops.combine(data(1, x.dtype), x, cast(table(9), x), 1, z=data(2, x.dtype)),
    "inner": lambda x: ops.inner(x, data(1, x.dtype), guidance=data(1, x.dtype, 1)[:1], centred=True),
    "gate": lambda x: ops.gated_gelu(x),
    "norm": lambda x: ops.group_norm_silu(x, 2, data(1, x.dtype, 1), data(2, x.dtype, 1), 1e-3),
    "norm by scale": lambda x: ops.group_norm_silu(
        data(1, x.dtype), 2, data(1, x.dtype, 1), data(2, x.dtype, 1), 1e-3, x[..., 0], x[..., 1], x[..., 2]
    ),
    "layer norm": lambda x: ops.add_layer_norm(data(1, x.dtype), x, eps=1e-3, gate=x[:, 0], scale=x[:, 1])[1],
}
functions = pytest.mark.parametrize("name", FUNCTIONS)


def differences(f, x: Tensor, v: Tensor, step: float = 1e-5) -> Tensor:
    return (f(x + step * v) - f(x - step * v)).double() / (2 * step)


def tolerance(name: str) -> dict[str, float]:
    """A loss is float32 whatever its operands are, and a difference of two loses 2^-24 / step of its value."""
    return {"rtol": 1e-2, "atol": 2e-2} if name.startswith("loss") else {"rtol": 1e-6, "atol": 1e-7}


@functions
def test_jvp_is_the_limit_of_differences(name):
    f, x, v = FUNCTIONS[name], data(4), data(5)
    value, tangent = jvp(f, (x,), (v,))
    torch.testing.assert_close(value, f(x))
    torch.testing.assert_close(tangent.double(), differences(f, x, v), **tolerance(name))
    assert tangent.abs().max() > 1e-4  # not the zeros of a rule that is missing
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(f(forward_ad.make_dual(x, v)))
    torch.testing.assert_close(dual.tangent, tangent)


@every
@functions
def test_float32_tangents_of_every_backend(name, backend):
    f, x, v = FUNCTIONS[name], data(4), data(5)
    right = jvp(f, (x,), (v,))[1].float()
    with fastdiff.backend(backend):
        got = jvp(f, (x.float(),), (v.float(),))[1]
    torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-4)


@every
@functions
def test_grad_is_backward(name, backend):
    f, x = FUNCTIONS[name], data(4, torch.float32)
    with fastdiff.backend(backend):
        leaf = x.clone().requires_grad_()
        f(leaf).sum().backward()
        got = grad(lambda x: f(x).sum())(x)
    torch.testing.assert_close(got, leaf.grad, rtol=1e-4, atol=1e-5)


@every
@functions
def test_vmap_is_a_loop(name, backend):
    f, many = FUNCTIONS[name], torch.stack([data(k, torch.float32) for k in range(3)])
    with fastdiff.backend(backend):
        torch.testing.assert_close(vmap(f)(many), torch.stack([f(x) for x in many]), rtol=1e-4, atol=1e-5)
        each = grad(lambda x: f(x).sum())
        torch.testing.assert_close(vmap(each)(many), torch.stack([each(x) for x in many]), rtol=1e-4, atol=1e-5)


@functions
def test_forward_and_reverse_jacobians_are_equal(name):
    f, x = FUNCTIONS[name], data(4)
    torch.testing.assert_close(jacfwd(f)(x).double(), jacrev(f)(x).double(), rtol=1e-5, atol=1e-7)


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


@pytest.mark.parametrize("name", ["loss mse", "vlb by pred", "vlb decoder", "norm"])
def test_hessian_is_the_jacobian_of_the_gradient(name):
    f, x = FUNCTIONS[name], data(4)
    total = lambda x: f(x).sum()  # noqa: E731
    by_differences = differences(grad(total), x, data(5))
    got = torch.einsum("ijkabc,abc->ijk", hessian(total)(x), data(5)).double()
    assert not got.isnan().any()
    torch.testing.assert_close(got, by_differences, rtol=1e-2, atol=1e-2 if name == "loss mse" else 1e-6)


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
    f, x, v = FUNCTIONS["noising by x0"], data(4), data(5)
    for made in (lambda x: jvp(f, (x,), (v,))[1], lambda x: vmap(grad(lambda x: f(x).sum()))(x[None])):
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


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_schedulers(kind):
    twin = getattr(ours, kind.__name__)
    x, v, output = (tensor(IMAGES, salt=k).cpu() for k in range(3))

    def step(kind):
        scheduler = kind()
        scheduler.set_timesteps(10)
        t = scheduler.timesteps[3]
        return lambda x: scheduler.step(output, t, x).prev_sample

    def tangent(kind):
        torch.manual_seed(1)
        return jvp(step(kind), (x,), (v,))[1]

    torch.testing.assert_close(tangent(twin), tangent(kind), rtol=1e-4, atol=1e-5)
