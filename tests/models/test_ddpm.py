"""The DDPM module: its loss against a few plain lines, and the sampling loop against its parts."""

import copy
import json
import math
import pickle
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from fastdiff import DDPM, NoiseSchedule, UNet, diffusion, ops
from fastdiff.objective import OBJECTIVES, WEIGHTINGS
from fastdiff.ops import LOSSES
from fastdiff.schedule import make_schedule

SHAPE = (4, 2, 4, 4)
# Chains as short as most of these keep some signal at the end.
pytestmark = pytest.mark.filterwarnings("ignore:schedule. alpha_bar_T")


class Net(nn.Module):
    """A convolution with a bias per timestep; what it was called with stays in `calls`."""

    def __init__(self, channels: int = 2, dropout: float = 0.0):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bias = nn.Embedding(1000, channels)
        self.dropout = nn.Dropout(dropout)
        self.calls: list[tuple[Tensor, Tensor, bool]] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.calls.append((x.clone(), t, self.training))
        return self.dropout(self.conv(x) + self.bias(t)[:, :, None, None])


class Pointwise(nn.Module):
    """Each output depends on its own input alone, in the same arithmetic whatever the batch."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.3 * x - 0.01 * t.view(-1, *[1] * (x.ndim - 1))


class Fixed(nn.Module):
    """Predicts one given tensor, whatever the input."""

    def __init__(self, out: object):
        super().__init__()
        self.out = out

    def forward(self, x: Tensor, t: Tensor) -> object:
        return self.out


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def data(*shape: int) -> Tensor:
    return torch.rand(*(shape or SHAPE)) * 2 - 1


# --- the training loss ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradient(objective, kind, weighting):
    net, x0, z = Net(), data(), 2 * torch.randn(SHAPE)
    t = torch.tensor([1, 20, 40, 50])  # SNR from 1e4 to 1.5, on both sides of 5
    ddpm = DDPM(net, "linear", 50, objective, kind, weighting)

    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 50, dtype=torch.float64)).cumprod(0)[t - 1].view(-1, 1, 1, 1)
    alpha, sigma, snr = (r.float() for r in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), alpha_bar / (1 - alpha_bar)))
    pred = net(alpha * x0 + sigma * z, t - 1)
    y = {"eps": z, "x0": x0, "v": alpha * z - sigma * x0, "score": -z / sigma}[objective]
    rho = {"mse": nn.MSELoss, "l1": nn.L1Loss, "huber": nn.HuberLoss}[kind](reduction="none")
    least = snr.clamp(max=5)
    before = torch.cat((torch.ones(1), (1 - torch.linspace(1e-4, 0.02, 50, dtype=torch.float64)).cumprod(0)))[t - 1]
    before = before.view(-1, 1, 1, 1)
    gained = before / (1 - before) - alpha_bar / (1 - alpha_bar)
    fall = torch.where(before == 1, 1 / (1 - alpha_bar), gained).float() / 2
    on_x0 = {"simple": snr if objective in ("eps", "score") else 1.0, "min_snr": least, "vlb": fall}[weighting]
    # The error of the prediction is that of x_0 times the square root of this.
    per_error = {"eps": snr, "x0": 1.0, "v": snr + 1, "score": snr / sigma**2}[objective]
    w = 1.0 if weighting == "simple" and objective in ("x0", "v") else on_x0 / per_error
    expected = (w * rho(pred, y)).mean((1, 2, 3))
    gradient = torch.autograd.grad(expected.mean(), net.parameters())

    got = ddpm(x0, t=t, noise=z)
    assert got.shape == () and got.dtype == torch.float32
    torch.testing.assert_close(got, expected.mean(), rtol=2e-5, atol=1e-7)
    for g, e in zip(torch.autograd.grad(got, net.parameters()), gradient, strict=True):
        torch.testing.assert_close(g, e, rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(ddpm(x0, t=t, noise=z, reduction="none"), expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_of_a_seed_is_the_loss_of_its_noise(objective):
    ddpm, x0, t = DDPM(Net(), timesteps=50, objective=objective), data(), torch.tensor([3, 50, 1, 20])
    z = ops.normal(SHAPE, 7, step=t, stream=ops.FORWARD)
    torch.testing.assert_close(ddpm(x0, t=t, seed=7), ddpm(x0, t=t, noise=z), rtol=1e-6, atol=0)
    assert ddpm(x0, t=t, seed=7) == ddpm(x0, t=t, seed=torch.tensor(7)) != ddpm(x0, t=t, seed=8)


def test_manual_seed_rules_the_loss():
    ddpm, x0 = DDPM(Net(), timesteps=50), data()
    first, second = ddpm(x0), ddpm(x0)
    assert first != second
    torch.manual_seed(0)
    ddpm_again, x0 = DDPM(Net(), timesteps=50), data()
    assert ddpm_again(x0) == first and ddpm_again(x0) == second


def test_levels_are_uniform_and_the_model_sees_them_from_0():
    net = Net()
    ddpm = DDPM(net, timesteps=4)
    ddpm(torch.zeros(4000, 2, 1, 1))
    t = net.calls[-1][1]
    assert t.dtype == torch.int64 and t.shape == (4000,)
    counts = t.bincount()
    assert len(counts) == 4 and ((counts - 1000).abs() < 120).all()  # 4 standard deviations
    for given in (3, torch.tensor(3), torch.tensor([3]), torch.tensor([3, 3])):
        ddpm(data(2, 2, 4, 4), t=given)
        assert net.calls[-1][1].tolist() == [2, 2]


def test_model_arguments_pass_through():
    class Shifted(nn.Module):
        def forward(self, x: Tensor, t: Tensor, shift: float = 0.0) -> Tensor:
            return 0 * x + shift

    ddpm, z = DDPM(Shifted(), timesteps=10, clip=None, objective="x0"), torch.zeros(SHAPE)
    assert ddpm(z, noise=z, shift=3.0) == 9
    assert (ddpm.predict_x0(z, 5, shift=3.0) == 3).all()
    assert (ddpm.p_sample(z, 1, shift=3.0) == 3).all()
    assert (ddpm.sample(SHAPE, shift=3.0) == 3).all()
    assert (ddpm.interpolate(z, z, t=2, shift=3.0) == 3).all()


# --- q_sample, predict_x0, p_sample, interpolate ----------------------------------------------------------------


def test_q_sample():
    ddpm, x0, z = DDPM(Net(), "cosine", 100), data(), torch.randn(SHAPE)
    t = torch.tensor([0, 1, 50, 100])
    alpha, sigma = (row[t].view(-1, 1, 1, 1) for row in (ddpm.schedule.alpha, ddpm.schedule.sigma))
    torch.testing.assert_close(ddpm.q_sample(x0, t, noise=z), (alpha * x0 + sigma * z).float())
    assert torch.equal(ddpm.q_sample(x0, 0, seed=1), x0)
    for level in (50, torch.tensor(50)):
        seeded = ddpm.q_sample(x0, level, seed=3)
        assert torch.equal(seeded, ddpm.q_sample(x0, 50, noise=ops.normal(SHAPE, 3, step=50, stream=ops.FORWARD)))
    assert ddpm.q_sample(x0.bfloat16(), 50).dtype == torch.bfloat16
    for wrong in (-1, 101):
        with pytest.raises(ValueError, match=f"t: expected values in .* got {wrong}"):
            ddpm.q_sample(x0, wrong)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_predict_x0_inverts_q_sample(objective):
    x0, z, t = 3 * data(), torch.randn(SHAPE), torch.tensor([1, 7, 20, 50])
    ddpm = DDPM(Fixed(None), "linear", 50, objective, clip=None)
    alpha, sigma = (row[t].view(-1, 1, 1, 1) for row in (ddpm.schedule.alpha, ddpm.schedule.sigma))
    out = {"eps": z, "x0": x0, "v": (alpha * z - sigma * x0).float(), "score": (-z / sigma).float()}
    ddpm.model.out = out[objective]
    x_t = ddpm.q_sample(x0, t, noise=z)
    torch.testing.assert_close(ddpm.predict_x0(x_t, t), x0, rtol=1e-5, atol=1e-5)
    ddpm.clip = 0.5
    torch.testing.assert_close(ddpm.predict_x0(x_t, t), x0.clamp(-0.5, 0.5), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variance", ["posterior", "beta"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_p_sample_is_one_step_of_sample(objective, variance):
    ddpm = DDPM(Pointwise(), "cosine", 8, objective, variance=variance)
    path = ddpm.sample(SHAPE, seed=5, return_trajectory=True)
    for k in range(8):
        assert torch.equal(ddpm.p_sample(path[k], 8 - k, seed=5), path[k + 1])
    # each sample at its own level
    x, t, z = data(), torch.tensor([8, 1, 3, 2]), torch.randn(SHAPE)
    together = ddpm.p_sample(x, t, noise=z)
    for i in range(4):
        alone = ddpm.p_sample(x[i : i + 1], t[i], noise=z[i : i + 1])
        assert torch.equal(together[i], alone[0])
    # the noise of a step has variance beta~ or beta; none goes into level 0
    beta, posterior = (
        rows.tolist() for rows in (ddpm.schedule.betas, ddpm.schedule.posterior(torch.arange(1, 9), torch.arange(8))[2])
    )
    for level in range(1, 9):
        added = ddpm.p_sample(x, level, noise=z) - ddpm.p_sample(x, level, noise=0 * z)
        var = 0.0 if level == 1 else (beta if variance == "beta" else posterior)[level - 1]
        torch.testing.assert_close(added, math.sqrt(var) * z, rtol=1e-4, atol=1e-6)


def test_tables_of_single_steps_are_built_once(monkeypatch):
    ddpm, x = DDPM(Pointwise(), "cosine", 8, "v"), data()
    built = []
    make, transition, posterior = ddpm.step_table, NoiseSchedule.transition, NoiseSchedule.posterior
    monkeypatch.setattr(ddpm, "step_table", lambda *args: built.append("p") or make(*args))
    monkeypatch.setattr(NoiseSchedule, "transition", lambda *args: built.append("t") or transition(*args))
    monkeypatch.setattr(NoiseSchedule, "posterior", lambda *args: built.append("q") or posterior(*args))

    def calls() -> list[Tensor]:
        return [ddpm.p_sample(x, 3, seed=1), ddpm.q_step(x, 3, seed=1), *ddpm.q_posterior(x, x, 3)]

    first, once = calls(), len(built)
    assert once > 0 and all(torch.equal(a, b) for a, b in zip(first, calls(), strict=True)) and len(built) == once
    ddpm.variance = "beta"
    assert not torch.equal(ddpm.p_sample(x, 3, seed=1), first[0])
    other = DDPM(Pointwise(), "cosine", 8, "v", variance="beta")
    assert torch.equal(ddpm.p_sample(x, 3, seed=1), other.p_sample(x, 3, seed=1))
    exact = ddpm.q_step(x.double(), 3, noise=x.double())
    assert exact.dtype == torch.float64 and torch.equal(calls()[1], first[1])
    assert torch.equal(copy.deepcopy(ddpm).q_step(x, 3, seed=1), first[1])


def test_interpolate_endpoints():
    net = Net()
    ddpm, x0, x1 = DDPM(net, "linear", 10), data(), data()
    for weight, end, step in ((0.0, x0, 0), (1.0, x1, 1), (torch.tensor([1.0, 0.0, 1.0, 0.0]), None, None)):
        net.calls.clear()
        ddpm.interpolate(x0, x1, weight, t=6, seed=3)
        x_t, t, _ = net.calls[0]
        if end is None:  # a weight for each sample
            noise = torch.stack([ops.normal(SHAPE, 3, step=1 - i % 2, stream=ops.FORWARD)[i] for i in range(4)])
            end = torch.stack([x1[0], x0[1], x1[2], x0[3]])
        else:
            noise = ops.normal(SHAPE, 3, step=step, stream=ops.FORWARD)
        torch.testing.assert_close(x_t, ddpm.q_sample(end, 6, noise=noise))
        assert [int(call[1][0]) + 1 for call in net.calls] == [6, 5, 4, 3, 2, 1]
        assert (t == 5).all()
    assert not torch.equal(ddpm.interpolate(x0, x1, seed=3), ddpm.interpolate(x0, x1, seed=4))
    assert torch.equal(ddpm.interpolate(x0, x1, seed=3), ddpm.interpolate(x0, x1, 0.5, t=5, seed=3))
    with pytest.raises(AssertionError):  # the ends draw different noise
        torch.testing.assert_close(*(ddpm.interpolate(x0, x0, w, seed=3) for w in (0.0, 1.0)))


def test_interpolate_mixes_data_and_keeps_the_noise_level():
    net = Net()
    ddpm, one = DDPM(net, "linear", 10), torch.ones(200, 2, 8, 8)
    for weight in (0.25, 0.5, 0.9):
        net.calls.clear()
        ddpm.interpolate(-one, one, weight, t=10, seed=0)
        x_t = net.calls[0][0]
        alpha, sigma = ddpm.schedule.alpha[10].item(), ddpm.schedule.sigma[10].item()
        # 25600 numbers: 5 standard errors
        assert x_t.std().item() == pytest.approx(sigma, rel=5 / math.sqrt(2 * 25600))
        assert x_t.mean().item() == pytest.approx(alpha * (2 * weight - 1), abs=5 * sigma / 160)


# --- sampling ---------------------------------------------------------------------------------------------------

ETAS = [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.7)]


@pytest.mark.parametrize(("sampler", "eta"), ETAS)
def test_a_seed_gives_its_samples_in_whatever_batch(sampler, eta):
    ddpm = DDPM(Pointwise(), timesteps=20)
    options = {"sampler": sampler, "eta": eta, "steps": 6}
    whole = ddpm.sample((6, 3, 5), seed=11, **options)
    assert torch.equal(ddpm.sample((6, 3, 5), seed=torch.tensor([11]), **options), whole)
    chosen = [2, 5, 0]
    for ids in (chosen, tuple(chosen), torch.tensor(chosen), iter(chosen)):
        assert torch.equal(ddpm.sample((3, 3, 5), seed=11, sample_ids=ids, **options), whole[chosen])
    assert not torch.equal(ddpm.sample((6, 3, 5), seed=12, **options), whole)
    assert not torch.equal(whole[0], whole[1])
    assert torch.equal(ddpm.sample((6, 3, 5), seed=-1, **options), ddpm.sample((6, 3, 5), seed=2**64 - 1, **options))


def test_manual_seed_rules_sampling():
    ddpm = DDPM(Pointwise(), timesteps=5)
    torch.manual_seed(1)
    first, second = ddpm.sample((2, 3)), ddpm.sample((2, 3))
    torch.manual_seed(1)
    assert torch.equal(ddpm.sample((2, 3)), first) and torch.equal(ddpm.sample((2, 3)), second)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    ddpm.sample((2, 3), seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_sampling_starts_from_the_prior():
    sigma = torch.tensor([0.1, 1.0, 30.0])
    made = NoiseSchedule.from_alpha_sigma(torch.ones(3), sigma)
    ddpm = DDPM(Pointwise(), made, 3, "x0", clip=None)
    path = ddpm.sample((4, 6), seed=2, return_trajectory=True)
    torch.testing.assert_close(path[0], 30 * ops.normal((4, 6), 2))
    # A chain that keeps its variance starts from N(0, 1), however much signal it leaves.
    short = DDPM(Pointwise(), torch.tensor([0.1, 0.2]), 2)
    assert torch.equal(short.sample((4, 6), seed=2, return_trajectory=True)[0], ops.normal((4, 6), 2))


@pytest.mark.parametrize(("sampler", "eta"), ETAS)
def test_given_start_and_noise(sampler, eta):
    ddpm = DDPM(Pointwise(), timesteps=20)
    options = {"sampler": sampler, "eta": eta, "steps": 7}
    expected = ddpm.sample(SHAPE, seed=3, **options)
    x_T = ops.normal(SHAPE, 3)
    noise = torch.stack([ops.normal(SHAPE, 3, step=k, stream=ops.REVERSE) for k in range(7)])
    before = x_T.clone()
    asked = []

    def draw(k: int) -> Tensor:
        asked.append(k)
        return noise[k]

    tensor = ddpm.sample(SHAPE, x_T=x_T, noise=noise, **options)
    function = ddpm.sample(SHAPE, x_T=x_T, noise=draw, **options)
    assert torch.equal(tensor, function) and asked == list(range(7))
    torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ddpm.sample(SHAPE, x_T=x_T, seed=3, **options), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(x_T, before)


def test_callback_and_trajectory():
    ddpm, seen = DDPM(Pointwise(), timesteps=10), []

    def watch(k: int, level: int, x: Tensor) -> None:
        seen.append((k, level, x.data_ptr(), x.clone()))

    x_T = data()
    result = ddpm.sample(SHAPE, steps=4, x_T=x_T, seed=1, callback=watch)
    assert [call[:2] for call in seen] == [(0, 8), (1, 5), (2, 2), (3, 0)]
    # the state is one tensor from the first step to the result
    assert {call[2] for call in seen} == {result.data_ptr()}
    path = ddpm.sample(SHAPE, steps=4, x_T=x_T, seed=1, return_trajectory=True)
    assert path.shape == (5, *SHAPE)
    assert torch.equal(path[0], x_T) and torch.equal(path[-1], result)
    for k, call in enumerate(seen):
        assert torch.equal(call[3], path[k + 1])


@pytest.mark.parametrize(("sampler", "eta"), ETAS)
def test_a_step_allocates_nothing_of_the_size_of_the_data(sampler, eta):
    shape = (4, 3, 32, 32)  # larger than any table
    known, new = set(), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, Tensor) and tensor.numel() >= math.prod(shape) and tensor.data_ptr() not in known:
                    known.add(tensor.data_ptr())
                    new.append(str(func))
            return out

    ddpm = DDPM(Fixed(torch.zeros(shape)), timesteps=40)
    with Watch():
        ddpm.sample(shape, sampler=sampler, eta=eta, seed=0)
    assert new == ["aten.empty.memory_format"]  # x_T


def test_progress(capsys, monkeypatch):
    ddpm = DDPM(Pointwise(), timesteps=12)
    quiet = ddpm.sample((2, 3), seed=0)
    assert capsys.readouterr().err == ""
    assert torch.equal(ddpm.sample((2, 3), seed=0, progress=True), quiet)
    assert "12/12" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"pip install 'fastdiff-kernels\[train\]'"):
        ddpm.sample((2, 3), seed=0, progress=True)


def test_samples_are_ordinary_tensors_without_a_graph():
    net = Net()
    ddpm = DDPM(net, timesteps=3)
    for x in (
        ddpm.sample(SHAPE),
        ddpm.sample(SHAPE, return_trajectory=True),
        ddpm.sample(SHAPE, x_T=data().requires_grad_()),
        ddpm.interpolate(data().requires_grad_(), data()),
    ):
        assert not x.is_inference() and not x.requires_grad and x.grad_fn is None
    ddpm(ddpm.sample(SHAPE)).backward()
    assert net.conv.weight.grad is not None
    x = ddpm.sample(SHAPE).requires_grad_()
    net(x, torch.zeros(4, dtype=torch.int64)).square().sum().backward()
    assert x.grad.shape == SHAPE


def test_sampling_in_eval_mode_leaves_the_training_mode_as_it_was():
    net = Net(dropout=0.5)
    ddpm = DDPM(net, timesteps=3)
    assert torch.equal(ddpm.sample(SHAPE, seed=1), ddpm.eval().sample(SHAPE, seed=1))
    assert not any(training for _, _, training in net.calls)
    for modes in ((True, True, True), (True, False, True), (True, True, False), (False, False, False)):
        for module, mode in zip((ddpm, net, net.dropout), modes, strict=True):
            module.training = mode
        ddpm.sample(SHAPE)
        ddpm.interpolate(data(), data())
        assert (ddpm.training, net.training, net.dropout.training) == modes

    def stop(k: int, level: int, x: Tensor) -> None:
        raise KeyboardInterrupt

    ddpm.train()
    with pytest.raises(KeyboardInterrupt):
        ddpm.sample(SHAPE, callback=stop)
    assert ddpm.training and net.training and net.dropout.training


def test_shape():
    ddpm = DDPM(Pointwise(), timesteps=3)
    for shape in ((3, 5), [3, 5], torch.Size((3, 5))):
        assert ddpm.sample(shape).shape == (3, 5)
    assert ddpm.sample((0, 5)).shape == (0, 5)
    with pytest.raises(ValueError, match=r"shape: expected \(B, \.\.\.\), since the model has no sample_shape"):
        ddpm.sample(3)
    ddpm.model.sample_shape = (2, 7)
    assert ddpm.sample(3).shape == (3, 2, 7)
    assert ddpm.sample((3, 5)).shape == (3, 5)
    for shape in ((), -1, (2, -1), (2.0, 3), 2.5, None, (True, 3), "ab"):
        with pytest.raises(ValueError, match="shape: expected a number of samples"):
            ddpm.sample(shape)
    with pytest.raises(TypeError, match=r"shape: .* got a bool"):
        ddpm.sample(True)


# --- types, devices, copies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_state_is_float32_around_a_model_of_another_type(dtype):
    net = Net()
    ddpm = DDPM(net, timesteps=20)
    expected, loss = ddpm.sample(SHAPE, seed=1, steps=5), ddpm(data(), t=5, seed=1)
    ddpm.to(dtype)
    net.calls.clear()
    got = ddpm.sample(SHAPE, seed=1, steps=5)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert {call[0].dtype for call in net.calls} == {dtype}
    # between the types lies the model's rounding, not the state's: it is not on the dtype's grid
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=0.05)
    assert not torch.equal(got, got.to(torch.bfloat16).to(got.dtype))
    torch.manual_seed(0)
    for x0 in (data(), data().to(dtype)):
        value = ddpm(x0, t=5, seed=1)
        assert value.dtype == torch.float32
        value.backward()
    assert net.conv.weight.grad.dtype == dtype
    assert math.isfinite(loss.item())


def test_autocast():
    net = Net()
    ddpm, x0 = DDPM(net, timesteps=20), data()
    expected, loss = ddpm.sample(SHAPE, seed=1, steps=5), ddpm(x0, t=5, seed=1)
    net.calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert net.conv(x0).dtype == torch.bfloat16
        got, value = ddpm.sample(SHAPE, seed=1, steps=5), ddpm(x0, t=5, seed=1)
        value.backward()
    assert got.dtype == value.dtype == net.calls[0][0].dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=0.05)
    torch.testing.assert_close(value, loss, rtol=0.02, atol=0)
    assert net.conv.weight.grad.abs().sum() > 0


def test_tables_stay_exact_in_any_type_and_out_of_the_state():
    ddpm, x0, z = DDPM(Net(), "cosine", 1000), data(), torch.randn(SHAPE)
    t = torch.tensor([1, 333, 777, 1000])
    expected = ddpm.q_sample(x0, t, noise=z)
    rows = torch.stack((ddpm.schedule.alpha, ddpm.schedule.sigma), 1).float()
    for change in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float):
        change(ddpm)
        assert torch.equal(ddpm.q_sample(x0, t, noise=z), expected)
        for level in (1, 333, 1000):
            got = ddpm.q_sample(torch.ones(1, 1), level, noise=torch.zeros(1, 1)).item()
            assert got == rows[level, 0].item()
            assert ddpm.q_sample(torch.zeros(1, 1), level, noise=torch.ones(1, 1)).item() == rows[level, 1].item()
    assert set(ddpm.state_dict()) == {f"model.{name}" for name in ddpm.model.state_dict()}
    other = DDPM(Net(), "linear", 10)
    other.load_state_dict(ddpm.state_dict())
    assert torch.equal(other.model.conv.weight, ddpm.model.conv.weight)


def test_tables_are_built_beside_the_model_whatever_the_default_device():
    net = Net()
    expected, data_on_cpu = DDPM(net, timesteps=10).sample(SHAPE, seed=1, steps=4), data()
    with torch.device("meta"):
        ddpm = DDPM(net, timesteps=10)
        assert torch.equal(ddpm.sample(SHAPE, seed=1, steps=4), expected)
        same = ddpm.sample(SHAPE, seed=1, steps=4, sampler="ddim", eta=1.0, sample_ids=range(4))
        torch.testing.assert_close(same, expected, rtol=1e-4, atol=1e-5)
        ddpm.interpolate(data_on_cpu, data_on_cpu, seed=1)
        ddpm(data_on_cpu).backward()
    loss = DDPM(Net().to("meta"))(data_on_cpu.to("meta"))  # where the data is, even without values
    assert loss.device.type == "meta" and loss.shape == () and not list(ddpm.buffers())


def test_deepcopy_and_pickle():
    ddpm = DDPM(Net(), "cosine", 10, "v")
    for other in (copy.deepcopy(ddpm), pickle.loads(pickle.dumps(ddpm))):
        assert torch.equal(other.sample(SHAPE, seed=1), ddpm.sample(SHAPE, seed=1))
        with torch.no_grad():
            other.model.conv.weight.mul_(2)
        assert not torch.equal(other.sample(SHAPE, seed=1), ddpm.sample(SHAPE, seed=1))


def test_config_round_trip():
    net = Net()
    chosen = {
        "schedule": "cosine", "timesteps": 12, "objective": "v", "loss": "huber", "weighting": "min_snr",
        "variance": "beta", "clip": None, "importance": False,
    }  # fmt: skip
    ddpm = DDPM(net, **chosen)
    assert ddpm.config == chosen
    again = DDPM(net, **json.loads(json.dumps(ddpm.config)))
    assert torch.equal(again.sample(SHAPE, seed=1), ddpm.sample(SHAPE, seed=1))
    x0 = data()
    assert again(x0, t=4, seed=1) == ddpm(x0, t=4, seed=1)
    assert DDPM(net, **DDPM(net).config).config == DDPM(net).config
    for given in (torch.full((5,), 0.1), ddpm.schedule):
        with pytest.raises(ValueError, match="config: expected a schedule given by name"):
            _ = DDPM(net, given, len(given) if isinstance(given, Tensor) else 12).config


def test_channels_last():
    ddpm, x0, t = DDPM(Net(3), timesteps=20), data(4, 3, 4, 4), torch.tensor([1, 5, 10, 20])
    last = x0.to(memory_format=torch.channels_last)
    torch.testing.assert_close(ddpm(last, t=t, seed=1), ddpm(x0, t=t, seed=1), rtol=1e-6, atol=0)
    x_t = ddpm.q_sample(last, t, seed=1)
    assert torch.equal(x_t, ddpm.q_sample(x0, t, seed=1)) and x_t.stride() == last.stride()
    x = ddpm.sample(last.shape, x_T=last, seed=1)
    assert x.stride() == last.stride()
    torch.testing.assert_close(x, ddpm.sample(last.shape, x_T=x0, seed=1), rtol=1e-5, atol=1e-6)


def test_models_may_return_an_object_with_sample():
    class Wrapped(Net):
        def forward(self, x: Tensor, t: Tensor) -> SimpleNamespace:
            return SimpleNamespace(sample=super().forward(x, t))

    plain, wrapped = Net(), Wrapped()
    wrapped.load_state_dict(plain.state_dict())
    x0 = data()
    assert DDPM(wrapped)(x0, t=5, seed=1) == DDPM(plain)(x0, t=5, seed=1)
    assert torch.equal(*(DDPM(net, timesteps=5).sample(SHAPE, seed=1) for net in (wrapped, plain)))


UNET = {
    "sample_size": 4,
    "block_out_channels": (4, 8),
    "down_block_types": ("DownBlock2D",) * 2,
    "up_block_types": ("UpBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 2,
}


@pytest.mark.parametrize("options", [{}, {"num_class_embeds": 3}])
def test_a_unet_is_sampled_as_any_model(options):
    """Its embeddings, taken for all steps at once, are those that it computes for itself."""

    class Hidden(nn.Module):
        def __init__(self, unet: UNet):
            super().__init__()
            self.unet = unet

        def forward(self, x: Tensor, t: Tensor, **kwargs: Tensor) -> Tensor:
            return self.unet(x, t, **kwargs)

    unet = UNet(**UNET, **options)
    given = {"class_labels": torch.tensor([0, 2])} if "num_class_embeds" in options else {}
    shape = (2, 3, 4, 4)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        unet.to(dtype)
        ddpm, plain = DDPM(unet, timesteps=50), DDPM(Hidden(unet), timesteps=50)
        for how in ({"steps": 5}, {"steps": 5, "sampler": "ddim"}):
            got, expected = ddpm.sample(2, seed=1, **how, **given), plain.sample(shape, seed=1, **how, **given)
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
        x = data(*shape)
        tail = {"t": 4, "seed": 1, **given}
        torch.testing.assert_close(
            ddpm.interpolate(x, -x, **tail), plain.interpolate(x, -x, **tail), rtol=tolerance, atol=tolerance
        )
    if not given:
        assert ddpm.sample(0).shape == (0, 3, 4, 4)


# --- training and sampling, whole -------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["x0", "v"])
def test_a_schedule_that_ends_in_pure_noise(objective):
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for weighting in WEIGHTINGS:
        ddpm = DDPM(net, "raised_cosine", 1000, objective, weighting=weighting, clip=None)
        for t in (None, 1000, 999, 500, 1):
            optimizer.zero_grad()
            loss = ddpm(data(), t=t)
            loss.backward()
            optimizer.step()
            assert loss.isfinite()
    assert all(p.isfinite().all() for p in net.parameters())
    for options in ({}, {"sampler": "ddim", "steps": 20}, {"sampler": "ddim", "steps": 20, "eta": 1.0}):
        assert ddpm.sample((2, 2, 4, 4), **options).isfinite().all()


def test_eps_is_refused_for_a_schedule_that_ends_in_pure_noise():
    with pytest.raises(ValueError, match="objective: 'eps' cannot determine x_0 at level"):
        DDPM(Net(), "raised_cosine", 1000, "eps")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_modes_are_learned(objective):
    """Data at (0.6, -0.6) and (-0.6, 0.6), each with standard deviation 0.05."""

    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            u = t[:, None] / 20
            out = self.net(torch.cat((x, u, (3 * u).sin()), 1))
            return out / sigma[t + 1] if objective == "score" else out  # as score networks do

    sigma = make_schedule("cosine", 20).sigma.float()[:, None]
    ddpm = DDPM(Mlp(), "cosine", 20, objective)
    optimizer = torch.optim.Adam(ddpm.parameters(), 0.02)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 400)
    mode, losses = torch.tensor([0.6, -0.6]), []
    for _ in range(400):
        sign = torch.randint(0, 2, (256, 1)) * 2 - 1
        optimizer.zero_grad()
        loss = ddpm(sign * mode + 0.05 * torch.randn(256, 2))
        loss.backward()
        optimizer.step()
        decay.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.85 * sum(losses[:20])
    for options, share in (({}, 0.8), ({"sampler": "ddim", "steps": 10}, 0.7)):
        x = ddpm.sample((512, 2), seed=0, **options)
        distance = torch.stack(((x - mode).norm(dim=1), (x + mode).norm(dim=1)))
        assert (distance.min(0).values < 0.25).float().mean() > share
        assert 0.3 < (distance[0] < distance[1]).float().mean() < 0.7


@pytest.mark.parametrize("objective", ["eps", "v", "x0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_kept_noise_is_the_noise_drawn_again(monkeypatch, objective, dtype, backend):
    """A CPU keeps that of small data; it is not rounded to their type."""
    net = Net().to(dtype)
    ddpm, x0, drawn, normal = DDPM(net, timesteps=20, objective=objective), data().to(dtype), [], ops.normal
    monkeypatch.setattr(ops, "normal", lambda *args, **options: drawn.append(1) or normal(*args, **options))
    results = []
    with fastdiff.backend(backend):
        for largest in (4 * x0.numel(), 4 * x0.numel() - 1):
            monkeypatch.setattr(diffusion, "LARGEST", largest)
            value = ddpm(x0, t=torch.tensor([1, 20, 7, 7]), seed=5)
            results.append((value, *torch.autograd.grad(value, net.parameters())))
            assert len(drawn) == (objective != "x0")  # whose loss has no use for it
    for kept, again in zip(*results, strict=True):
        assert torch.equal(kept, again)


# --- torch.compile ----------------------------------------------------------------------------------------------


def test_compiled_equals_eager_without_recompiling():
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import

    torch._dynamo.reset()
    net = Net()
    plain, compiled = DDPM(net, timesteps=20), DDPM(net, timesteps=20)
    counter = CompileCounterWithBackend("aot_eager")
    compiled.compile(backend=counter, fullgraph=True)
    x0, frames = data(), []
    for k in range(4):
        values = []
        for ddpm in (plain, compiled):
            torch.manual_seed(k)
            value = ddpm(x0)
            values.append((value, *torch.autograd.grad(value, net.parameters())))
        frames.append(counter.frame_count)
        for got, expected in zip(values[1], values[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    for t in ([1, 2, 3, 4], [20, 9, 9, 1]):
        options = {"t": torch.tensor(t), "seed": torch.tensor(t[0])}
        torch.testing.assert_close(compiled(x0, **options), plain(x0, **options), rtol=1e-6, atol=0)
    loss_frames = counter.frame_count
    assert frames == [1, 1, 1, 1]

    for seed in range(3):
        assert torch.equal(compiled.sample(SHAPE, seed=seed), plain.sample(SHAPE, seed=seed))
    assert counter.frame_count == loss_frames + 1
    path = compiled.sample(SHAPE, seed=0, sampler="ddim", steps=5, return_trajectory=True)
    assert torch.equal(path, plain.sample(SHAPE, seed=0, sampler="ddim", steps=5, return_trajectory=True))

    other = copy.deepcopy(compiled)
    with torch.no_grad():
        other.model.conv.weight.mul_(2)
    assert torch.equal(other.sample(SHAPE, seed=1), DDPM(other.model, timesteps=20).sample(SHAPE, seed=1))


def test_compile_lays_convolutions_out_as_inductor_wants_them():
    """On a CPU; else it converts the weights at every call."""
    torch._dynamo.reset()
    random = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1), nn.Module())
    net[2].volume, net[2].line = nn.Conv3d(3, 4, 3), nn.Conv1d(3, 4, 3)
    net.forward = lambda x, t: net[1](net[0](x))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x0 = torch.randn(2, 3, 8, 8, generator=random)
    ddpm = DDPM(net, timesteps=4)
    want = ddpm(x0, t=2, seed=1), ddpm.sample(x0.shape, seed=1)
    ddpm.compile(backend="eager")
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dim() != 4 or value.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ddpm(x0, t=2, seed=1), want[0])
    torch.testing.assert_close(ddpm.sample(x0.shape, seed=1), want[1])
    ddpm(x0, t=2, seed=1).backward()
    assert net[0].weight.grad.stride() == net[0].weight.stride()  # nor does an optimizer mix layouts


# --- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"objective": "epsilon"}, ValueError, "objective: expected one of eps, x0, v, score, got 'epsilon'"),
        ({"loss": "l2"}, ValueError, "loss: expected one of mse, l1, huber, hybrid, vlb, got 'l2'"),
        ({"weighting": "snr"}, ValueError, "weighting: expected one of simple, min_snr, vlb, got 'snr'"),
        ({"variance": "fixed"}, ValueError, "variance: expected one of posterior, beta, learned, got 'fixed'"),
        ({"clip": 0.0}, ValueError, "clip: expected a number above 0 or None, got 0.0"),
        ({"clip": -1.0}, ValueError, "clip: expected a number above 0 or None, got -1.0"),
        ({"clip": math.nan}, ValueError, "clip: expected a number above 0 or None, got nan"),
        ({"schedule": "cos"}, ValueError, "schedule: expected one of"),
        ({"schedule": None}, TypeError, "betas: expected numbers"),
        ({"schedule": torch.full((5,), 0.1)}, ValueError, "timesteps: expected 5"),
        ({"timesteps": 0}, ValueError, "timesteps: expected an integer of at least 1"),
        ({"model": None}, TypeError, "model: expected a torch.nn.Module, got NoneType"),
        ({"model": torch.sin}, TypeError, "model: expected a torch.nn.Module"),
    ],
)
def test_constructor_errors(options, error, said):
    with pytest.raises(error, match=said):
        DDPM(**{"model": Pointwise(), **options})


SAMPLE_ERRORS = [
    ({"steps": 0}, ValueError, "steps: expected an integer from 1 to 10, got 0"),
    ({"steps": 11}, ValueError, "steps: expected an integer from 1 to 10, got 11"),
    ({"sampler": "euler"}, ValueError, "sampler: expected one of ddpm, ddim, .* got 'euler'"),
    ({"eta": 0.5}, ValueError, "eta: expected 0 with sampler 'ddpm', got 0.5"),
    ({"eta": -0.5, "sampler": "ddim"}, ValueError, "eta: expected a finite number of at least 0"),
    ({"eta": 2.0, "sampler": "ddim"}, ValueError, "eta: 2.0 asks for more noise"),
    ({"seed": 2**64}, ValueError, "seed: expected 64 bits"),
    ({"seed": 1.0}, TypeError, "seed: expected an int"),
    ({"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, "seed: expected one int64 number"),
    ({"sample_ids": [0, 1]}, ValueError, r"sample_ids: expected shape \(4,\), got \(2,\)"),
    ({"sample_ids": [0, 1, 2, -1]}, ValueError, "sample_ids: expected values in"),
    ({"sample_ids": torch.tensor([0, 1, 2, 2**32])}, ValueError, "sample_ids: expected values in"),
    ({"sample_ids": [0.0, 1.0, 2.0, 3.0]}, TypeError, "sample_ids: expected int64, got torch.float32"),
    ({"x_T": torch.zeros(4, 2, 4)}, ValueError, "x_T: expected shape"),
    ({"x_T": torch.zeros(SHAPE, dtype=torch.int64)}, TypeError, "x_T: expected one of float32"),
    ({"x_T": [0.0]}, TypeError, "x_T: expected a tensor, got list"),
    ({"noise": torch.zeros(SHAPE)}, ValueError, r"noise: expected shape \(10, 4, 2, 4, 4\)"),
    ({"noise": torch.zeros(10, *SHAPE, dtype=torch.int64)}, TypeError, "noise: expected one of float32"),
    ({"noise": 0.0}, TypeError, "noise: expected a tensor, got float"),
    ({"callback": 1}, TypeError, "callback: expected a function, got int"),
]


@pytest.mark.parametrize(("options", "error", "said"), SAMPLE_ERRORS)
def test_sample_errors_come_before_any_work(options, error, said):
    net = Net()
    ddpm, state = DDPM(net, timesteps=10), torch.get_rng_state()
    state = torch.get_rng_state()
    with pytest.raises(error, match=said):
        ddpm.sample(SHAPE, **options)
    assert not net.calls and torch.equal(torch.get_rng_state(), state) and ddpm.training


def test_noise_function_of_the_wrong_shape():
    with pytest.raises(ValueError, match="noise: expected shape"):
        DDPM(Pointwise(), timesteps=10).sample(SHAPE, noise=lambda k: torch.zeros(3))


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"x0": [1.0]}, TypeError, "x0: expected a tensor, got list"),
        ({"x0": torch.zeros(SHAPE, dtype=torch.uint8)}, TypeError, "x0: expected one of float32, .* got torch.uint8"),
        ({"x0": torch.tensor(1.0)}, ValueError, "x0: expected a batch dimension"),
        ({"t": 0}, ValueError, "t: expected levels from 1 to 10, got 0"),
        ({"t": 11}, ValueError, "t: expected levels from 1 to 10, got 11"),
        ({"t": torch.tensor([1, 2, 3, 11])}, ValueError, "t: expected levels from 1 to 10, got tensor"),
        ({"t": torch.tensor([1, 2])}, ValueError, r"t: expected shape \(\) or \(4,\), got \(2,\)"),
        ({"t": 1.0}, TypeError, "t: expected an int or an int64 tensor, got float"),
        ({"t": True}, TypeError, "t: expected an int or an int64 tensor, got bool"),
        ({"t": torch.ones(4)}, TypeError, "t: expected int64, got torch.float32"),
        ({"noise": torch.zeros(1)}, ValueError, "noise: expected shape"),
        ({"noise": torch.zeros(SHAPE), "seed": 1}, ValueError, "seed: expected None where noise is given"),
        ({"seed": "1"}, TypeError, "seed: expected an int"),
        ({"reduction": "sum"}, ValueError, "reduction: expected 'mean' or 'none', got 'sum'"),
    ],
)
def test_loss_errors(options, error, said):
    with pytest.raises(error, match=said):
        DDPM(Pointwise(), timesteps=10)(**{"x0": torch.zeros(SHAPE), **options})


def test_single_step_errors():
    ddpm = DDPM(Pointwise(), timesteps=10)
    for step in (ddpm.p_sample, ddpm.predict_x0):
        with pytest.raises(TypeError, match="x_t: expected a tensor, got list"):
            step([1.0], 3)
        for t in (0, 11):
            with pytest.raises(ValueError, match=f"t: expected levels from 1 to 10, got {t}"):
                step(torch.zeros(SHAPE), t)
    with pytest.raises(ValueError, match="seed: expected None where noise is given"):
        ddpm.p_sample(torch.zeros(SHAPE), 3, seed=1, noise=torch.zeros(SHAPE))


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"x0": [1.0]}, TypeError, "x0: expected a tensor"),
        ({"x0": torch.zeros(SHAPE, dtype=torch.uint8)}, TypeError, "x0: expected one of float32"),
        ({"x1": torch.zeros(1)}, ValueError, "x1: expected shape"),
        ({"x1": None}, TypeError, "x1: expected a tensor"),
        ({"t": 0}, ValueError, "t: expected a level from 1 to 10, got 0"),
        ({"t": 11}, ValueError, "t: expected a level from 1 to 10, got 11"),
        ({"t": 5.0}, ValueError, "t: expected a level from 1 to 10, got 5.0"),
        ({"t": True}, ValueError, "t: expected a level from 1 to 10, got True"),
        ({"weight": 1.5}, ValueError, r"weight: expected one or 4 numbers in \[0, 1\], got 1.5"),
        ({"weight": -0.5}, ValueError, "weight: expected one or 4 numbers"),
        ({"weight": math.nan}, ValueError, "weight: expected one or 4 numbers"),
        ({"weight": torch.tensor([0.5, 0.5])}, ValueError, "weight: expected one or 4 numbers"),
    ],
)
def test_interpolate_errors(options, error, said):
    with pytest.raises(error, match=said):
        DDPM(Pointwise(), timesteps=10).interpolate(**{"x0": torch.zeros(SHAPE), "x1": torch.ones(SHAPE), **options})


def test_model_output_errors():
    x = torch.zeros(SHAPE)
    for out, error, said in (
        (torch.zeros(4, 1, 4, 4), ValueError, r"model: expected an output of shape \(4, 2, 4, 4\), got \(4, 1, 4, 4\)"),
        (None, TypeError, "model: expected a tensor or an object with a tensor `sample`, got NoneType"),
        (SimpleNamespace(sample=3), TypeError, "model: expected a tensor .* got SimpleNamespace"),
    ):
        ddpm = DDPM(Fixed(out), timesteps=10)
        for call in (
            lambda d: d(x),
            lambda d: d.sample(SHAPE),
            lambda d: d.p_sample(x, 2),
            lambda d: d.predict_x0(x, 2),
        ):
            with pytest.raises(error, match=said):
                call(ddpm)
