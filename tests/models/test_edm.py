"""Edm: loss and gradient in EDM's own terms, levels that are drawn, the sampler and churn, Gaussian data, errors."""

import functools
import itertools
import math

import pytest
import recursions
import torch
from counting import count_calls
from gaussian import exact, moments
from mpmath import mpf
from torch import Tensor, nn

from fastdiff import Edm, ScoreSDE, steps
from fastdiff.edm import Preconditioned
from fastdiff.process import VE, VP

SHAPE = (4, 2, 3)


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=dtype)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        self.condition = c
        return self.linear(x) + 0.1 * torch.sin(3 * c).view(-1, *[1] * (x.ndim - 1))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def published(net: nn.Module, x: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """D(x; sigma) of Karras et al. 2022, eq. 7 with table 1; sigma is (B,)."""
    s, column = sigma.view(-1, *[1] * (x.ndim - 1)), (sigma.log() / 4).to(x.dtype)
    c_skip = sigma_data**2 / (s**2 + sigma_data**2)
    c_out = s * sigma_data / (s**2 + sigma_data**2).sqrt()
    c_in = 1 / (s**2 + sigma_data**2).sqrt()
    return c_skip * x + c_out * net(c_in * x, column)


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_loss_and_gradient_are_those_of_the_denoiser(sigma_data):
    """lambda(sigma) |D(x_0 + sigma z; sigma) - x_0|^2 with lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2."""
    net, x0, z = Net(torch.float64), torch.rand(SHAPE).double() * 2 - 1, torch.randn(SHAPE).double()
    sigma = torch.tensor([0.002, 0.1, 1.0, 80.0], dtype=torch.float64)
    edm, s = Edm(net, sigma_data), sigma.view(-1, 1, 1)
    weight = (s**2 + sigma_data**2) / (s * sigma_data) ** 2
    want = (weight * (published(net, x0 + s * z, sigma, sigma_data) - x0) ** 2).mean((1, 2))
    gradient = torch.autograd.grad(want.mean(), net.parameters())
    got = edm(x0, t=sigma, noise=z)
    torch.testing.assert_close(got.double(), want.mean(), rtol=1e-6, atol=0)
    for g, e in zip(torch.autograd.grad(got, net.parameters()), gradient, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(edm(x0, t=sigma, noise=z, reduction="none").double(), want, rtol=1e-6, atol=0)


def test_the_network_sees_and_predicts_unit_variance():
    """Data of the standard deviation sigma_data; within 5 standard errors."""
    edm, n = Edm(Net(), 0.7), 200_000
    x0, z = 0.7 * torch.randn(1, n), torch.randn(1, n)
    for sigma in (0.01, 0.5, 20.0):
        x = edm.q_sample(x0, sigma, noise=z)
        made = edm.process.at(torch.tensor([sigma]))
        p, q = made.sigma / 0.7, -0.7 * made.alpha
        for values in (x, p * x0 + q * z):
            assert values.var().item() == pytest.approx(1, abs=5 * math.sqrt(2 / n))
        assert (x * (p * x0 + q * z)).mean().abs() < 5 / math.sqrt(n)


def test_training_draws_log_normal_levels():
    edm, n = Edm(Net(), P_mean=-0.4, P_std=1.7), 8000
    edm(torch.zeros(n, 1, 3))
    log_sigma = 4 * edm.model.condition
    assert abs(log_sigma.mean().item() + 0.4) < 5 * 1.7 / math.sqrt(n)
    assert log_sigma.std().item() == pytest.approx(1.7, rel=5 / math.sqrt(2 * n))
    default = Edm(Net())
    default(torch.zeros(n, 1, 3))
    assert abs(4 * default.model.condition.mean().item() + 1.2) < 5 * 1.2 / math.sqrt(n)


def test_predict_x0_is_the_denoiser():
    net, sigma = Net(torch.float64), torch.tensor([0.01, 0.3, 5.0, 80.0], dtype=torch.float64)
    edm, x = Edm(net, 0.6), torch.randn(SHAPE, dtype=torch.float64)
    state = x / (sigma.view(-1, 1, 1) ** 2 + 0.36).sqrt()
    want = published(net, x, sigma, 0.6)
    torch.testing.assert_close(edm.predict_x0(state, sigma), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(edm.predict(state, sigma, "x0"), want, rtol=1e-12, atol=1e-12)


# --- sampling -----------------------------------------------------------------------------------------------------


def edm_sampler(denoise: nn.Module, x: Tensor, n: int, noise: list[Tensor], churn: float, noise_scale: float) -> Tensor:
    """Karras et al. 2022, algorithm 2, on the levels of eq. 5; churn between 0.05 and 50."""
    ends = 80.0 ** (1 / 7), 0.002 ** (1 / 7)
    sigmas = [(ends[0] + i / (n - 1) * (ends[1] - ends[0])) ** 7 for i in range(n)] + [0.0]
    for sigma, after in itertools.pairwise(sigmas):
        gamma = min(churn / n, math.sqrt(2) - 1) if 0.05 <= sigma <= 50 else 0.0
        hat = sigma * (1 + gamma)
        if gamma:
            x = x + math.sqrt(hat**2 - sigma**2) * noise_scale * noise.pop(0)
        slope = (x - denoise(x, hat)) / hat
        end = x + (after - hat) * slope
        x = x + (after - hat) * (slope + (end - denoise(end, after)) / after) / 2 if after else end
    return x


@pytest.mark.parametrize("churn", [0.0, 40.0])
def test_the_sampler_of_edm(churn):
    net, n, sigma_data = Net(torch.float64), 12, 0.6
    edm, z = Edm(net, sigma_data), torch.randn(SHAPE, dtype=torch.float64)
    grid = edm.process.karras(n, churn=churn, churn_min=0.05, churn_max=50)
    heun = functools.partial(steps.heun, noise_scale=1.003)
    table = edm.step_table(heun, grid)
    adds = [k for k, kind in enumerate(table.kinds) if kind == "add"]
    drawn = {k: torch.randn(SHAPE, dtype=torch.float64) for k in adds}
    assert bool(adds) == (churn > 0)
    with torch.no_grad():

        def denoise(x: Tensor, sigma: float) -> Tensor:
            return published(net, x, torch.full((4,), sigma, dtype=torch.float64), sigma_data)

        want = edm_sampler(denoise, 80 * z, n, [drawn[k] for k in adds], churn, 1.003)
    got = edm.sample(
        SHAPE, sampler=heun, steps=grid, x_T=table.start * z, noise=lambda k: drawn.get(k, torch.zeros_like(z))
    )
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    if not churn:
        assert torch.equal(edm.sample(SHAPE, steps=n, x_T=table.start * z), got)


def scaled(ratios: list[mpf]) -> list[tuple[mpf, mpf]]:
    """Levels of those sigma / alpha, for sigma_data = 1/2."""
    return [(1 / (r**2 + mpf(0.25)) ** 0.5, r / (r**2 + mpf(0.25)) ** 0.5) for r in ratios] + [(mpf(1), mpf(0))]


def karras(n: int) -> list[mpf]:
    ends = mpf(80.0) ** (mpf(1) / 7), mpf(0.002) ** (mpf(1) / 7)
    return [(ends[0] + mpf(i) / (n - 1) * (ends[1] - ends[0])) ** 7 for i in range(n)]


RUNS = {
    "ddim": (recursions.ddim, 20),
    "dpm++2m": (recursions.two_m, 20),
    "ddpm": (recursions.ancestral, 50),
    "heun": (recursions.heun, 18),
}


@pytest.mark.parametrize("objective", ["edm", "x0", "eps"])
@pytest.mark.parametrize("sampler", RUNS)
def test_gaussian_data(sampler, objective):
    rule, n = RUNS[sampler]
    mean, std = moments(exact(Edm, objective=objective), sampler, n)
    want_mean, want_std = rule(scaled(karras(n)))
    assert std.tolist() == pytest.approx(want_std, rel=1e-9)
    assert mean.tolist() == pytest.approx(want_mean, rel=1e-9, abs=1e-12)
    if sampler == "heun" and objective == "edm":
        _, std = moments(exact(Edm, dtype=torch.float32), sampler, n)
        assert std.tolist() == pytest.approx(want_std, rel=1e-4)


def test_samplers_that_leave_out_the_step_to_data_end_in_units_of_data():
    """Where they stop early by themselves, not where they are stopped."""
    edm = exact(Edm)
    how = {"sampler": "probability_flow", "steps": edm.process.karras(100), "seed": 1}
    x = edm.sample((3, 4), **how)
    torch.testing.assert_close(x, edm.sample((3, 4), **how | {"sampler": "ddim"}), rtol=0.05, atol=0.02)
    state = edm.sample((3, 4), **how, stop_at=0.0023)  # twice x: alpha is 1 / sigma_data
    torch.testing.assert_close(state, 2 * x, rtol=0.01, atol=0.01)
    _, std = moments(edm, functools.partial(steps.euler_maruyama, denoise=False), edm.process.karras(100))
    torch.testing.assert_close(std, edm.model.var.sqrt(), rtol=0.1, atol=0.01)


@pytest.mark.parametrize("sigma_data", [0.5, 2.0])
def test_edm_is_ve_in_other_coordinates(sigma_data):
    """The same denoiser under every deterministic sampler, with the state scaled by c_in."""
    net, z = Net(torch.float64), torch.randn(SHAPE, dtype=torch.float64)
    edm = Edm(net, sigma_data)

    class D(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            return published(net, x, sigma, sigma_data)

    ve = ScoreSDE(D(), VE(0.002, 80.0), "x0")
    for sampler in ("ddim", "dpm++2m", "heun"):
        want = ve.sample(SHAPE, sampler=sampler, steps=ve.process.karras(9), x_T=80 * z)
        got = edm.sample(SHAPE, sampler=sampler, steps=9, x_T=edm.prior_std() * z)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert edm.prior_std() == pytest.approx(80 / math.sqrt(6400 + sigma_data**2), rel=1e-12)


def test_edm_is_v_of_scaled_data():
    """F = -v of x_0 / sigma_data under VP at the same sigma / alpha."""
    x0, z = torch.randn(2, 5, dtype=torch.float64)
    made = Edm(Net(), 0.7).process.at(torch.tensor([0.01, 1.0, 30.0], dtype=torch.float64))
    for alpha, sigma in zip(made.alpha.tolist(), made.sigma.tolist(), strict=True):
        assert (0.7 * alpha) ** 2 + sigma**2 == pytest.approx(1, rel=1e-12)
        r = sigma / alpha
        n = math.sqrt(r**2 + 0.49)
        F = (x0 - 0.49 / n**2 * (x0 + r * z)) * n / (0.7 * r)
        torch.testing.assert_close(F, -(0.7 * alpha * z - sigma * x0 / 0.7), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_the_ode_and_the_inversion_start_and_end_at_data():
    """Of data with the noise of the first level, 0.002: all is in units of data, not of the scaled state."""
    edm = exact(Edm)
    mean, var = edm.model.mean, edm.model.var + 0.002**2
    last = edm.process.at(torch.tensor([80.0]))
    last_std = (last.alpha**2 * edm.model.var + last.sigma**2).sqrt()
    x = mean + var.sqrt() * torch.randn(3, 4, dtype=torch.float64)
    x_T = last.alpha * mean + last_std * (x - mean) / var.sqrt()
    torch.testing.assert_close(edm.sample((3, 4), sampler="ode", x_T=x_T), x, rtol=1e-4, atol=1e-4)
    # The prior stands for the distribution at the last level.
    normals = (mean, var.sqrt(), x), (0 * mean, last.sigma.expand(4), x_T), (last.alpha * mean, last_std, x_T)
    density, prior, at_last = (torch.distributions.Normal(m, s).log_prob(v).sum(1) for m, s, v in normals)
    got = edm.log_likelihood(x, trace="exact", tolerance=1e-7)
    torch.testing.assert_close(got, density + prior - at_last, rtol=0, atol=1e-5)
    torch.testing.assert_close(edm.encode(x, steps=200), x_T, rtol=0, atol=5e-2)
    torch.testing.assert_close(edm.sample((3, 4), sampler="ddim", steps=200, x_T=x_T), x, rtol=0, atol=5e-2)


@pytest.mark.slow
def test_samplers_run_or_say_why_not():
    edm = Edm(Net())
    for name in steps.SAMPLERS:
        if name == "annealed_langevin":
            with pytest.raises(ValueError, match="'annealed_langevin' expected the levels of a ladder"):
                edm.sample(SHAPE, sampler=name, steps=5)
            continue
        assert edm.sample(SHAPE, sampler=name, steps=5).isfinite().all(), name
    assert edm.bits_per_dim(torch.rand(SHAPE), steps=5).total.isfinite().all()


def test_one_launch_beside_the_model(monkeypatch):
    """Also of noise added by churn, which has no call of the model."""
    net = Net()
    calls = count_calls(monkeypatch, net)
    edm = Edm(net)
    for sampler in ("ddim", "dpm++2m", "heun", "ddpm"):
        edm.sample(SHAPE, sampler=sampler, steps=4)
    assert calls == {"model": 19, "update": 19}
    edm.sample(SHAPE, steps=edm.process.karras(4, churn=2))
    assert calls == {"model": 19 + 7, "update": 19 + 7 + 4}


# --- configuration and errors -------------------------------------------------------------------------------------


def test_config_round_trip():
    net = Net()
    for edm in (Edm(net), Edm(net, 0.7, -0.8, 1.6, "x0", "huber", "min_snr", 2.0)):
        again = Edm(net, **edm.config)
        assert again.config == edm.config
        assert torch.equal(again.sample(SHAPE, steps=3, seed=1), edm.sample(SHAPE, steps=3, seed=1))


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: Edm(Net(), sigma_data=0.0), ValueError, "sigma_data: expected a finite number above 0, got 0.0"),
        (lambda: Edm(Net(), sigma_data="1"), TypeError, "sigma_data: expected a number, got str"),
        (lambda: Edm(Net(), P_std=0.0), ValueError, "P_std: expected a finite number above 0, got 0.0"),
        (lambda: Edm(Net(), P_mean=math.nan), ValueError, "P_mean: expected a finite number, got nan"),
        (lambda: setattr(Edm(Net()), "P_std", -1), ValueError, "P_std: expected a finite number above 0"),
        (lambda: Edm(Net(), objective="F"), ValueError, "objective: expected one of"),
        (lambda: Edm(Net(), weighting="vlb"), ValueError, "weighting: expected one of simple, min_snr, got 'vlb'"),
        (lambda: setattr(Edm(Net()), "process", VP()), TypeError, "process: expected a Preconditioned, got VP"),
        (lambda: Edm(Net()).q_sample(torch.zeros(SHAPE), 81.0), ValueError, r"t: expected times in \(0, 80\], got 81"),
    ],
)
def test_errors(make, error, said):
    with pytest.raises(error, match=said):
        make()


def test_each_quarter_of_the_way_to_noise_is_trained():
    """A log has the loss of each. Of sigma / 80, all of these would be in the first."""
    edm = Edm(Net())
    way = edm.process.noisiness(edm.times_at(torch.arange(1000) / 1000))
    assert torch.histc(way, 4, 0, 1).min() > 100 and (way[1:] > way[:-1]).all()


def test_another_process_sets_sigma_data():
    edm = Edm(Net())
    edm.process = Preconditioned(0.9)
    assert edm.config["sigma_data"] == 0.9
    x = torch.randn(SHAPE)
    torch.testing.assert_close(edm.predict_x0(x, 0.5), Edm(edm.model, 0.9).predict_x0(x, 0.5))
