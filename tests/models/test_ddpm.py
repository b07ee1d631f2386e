"""DDPM: the training loss, its single steps, and training and sampling as a whole."""

import copy
import math

import pytest
import torch
from objectives import CLASSIC, targets, x0_errors
from small_models import SHAPE, Fixed, Net, Pointwise, data
from torch import Tensor, nn

import fastdiff
from fastdiff import DDPM, NoiseSchedule, forward_noise, ops
from fastdiff.objective import OBJECTIVES, WEIGHTINGS
from fastdiff.ops import LOSSES
from fastdiff.schedule import make_schedule

# Chains as short as most of these keep some signal at the end.
pytestmark = pytest.mark.filterwarnings("ignore:schedule. alpha_bar_T")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# --- the training loss --------------------------------------------------------------------------------------------


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
    y = targets(alpha, sigma, x0, z)[objective]
    rho = {"mse": nn.MSELoss, "l1": nn.L1Loss, "huber": nn.HuberLoss}[kind](reduction="none")
    least = snr.clamp(max=5)
    before = torch.cat((torch.ones(1), (1 - torch.linspace(1e-4, 0.02, 50, dtype=torch.float64)).cumprod(0)))[t - 1]
    before = before.view(-1, 1, 1, 1)
    gained = before / (1 - before) - alpha_bar / (1 - alpha_bar)
    fall = torch.where(before == 1, 1 / (1 - alpha_bar), gained).float() / 2
    on_x0 = {"simple": snr if objective in ("eps", "score") else 1.0, "min_snr": least, "vlb": fall}[weighting]
    w = on_x0 * x0_errors(alpha, sigma)[objective] ** 2
    if weighting == "simple" and objective not in ("eps", "score"):
        w = 1.0
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


# --- q_sample, predict_x0, p_sample, interpolate ------------------------------------------------------------------


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
    ddpm.model.out = targets(alpha, sigma, x0, z)[objective].float()
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


# --- training and sampling, whole ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("cpu_kernels")
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


@pytest.mark.slow
@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("objective", CLASSIC)
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
            monkeypatch.setattr(forward_noise, "LARGEST", largest)
            value = ddpm(x0, t=torch.tensor([1, 20, 7, 7]), seed=5)
            results.append((value, *torch.autograd.grad(value, net.parameters())))
            assert len(drawn) == (objective != "x0")  # whose loss has no use for it
    for kept, again in zip(*results, strict=True):
        assert torch.equal(kept, again)
