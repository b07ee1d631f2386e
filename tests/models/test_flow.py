"""FlowMatching: loss and gradient, times that are drawn, links to Euler and VP, Gaussian data, coupling, errors."""

import functools
import itertools
import math
import sys

import pytest
import recursions
import torch
from counting import count_calls
from gaussian import exact, moments
from mpmath import mpf
from objectives import targets, x0_errors
from torch import Tensor, nn

from fastdiff import DDPM, FlowMatching, ScoreSDE, steps
from fastdiff.flow import Flow, cosmap, logit_normal, mode, optimal_coupling, resolution_shift, uniform
from fastdiff.process import VP

SHAPE = (4, 2, 3)
LEARNED = ("flow", "x0", "v")  # which need no signal


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=dtype)

    def forward(self, x: Tensor, c: Tensor, shift: float = 0.0) -> Tensor:
        self.condition = c
        return self.linear(x) + 0.1 * torch.sin(c / 300).view(-1, *[1] * (x.ndim - 1)) + shift


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["simple", "min_snr"])
@pytest.mark.parametrize("kind", ["mse", "l1", "huber"])
@pytest.mark.parametrize("objective", ["flow", "x0", "eps", "v"])
def test_loss_and_gradient(objective, kind, weighting):
    net, x0, z = Net(), torch.rand(SHAPE) * 2 - 1, torch.randn(SHAPE)
    t = torch.tensor([1e-3, 0.2, 0.7, 0.999], dtype=torch.float64)
    flow = FlowMatching(net, objective, kind, weighting)
    sigma = t.view(-1, 1, 1)
    alpha = 1 - sigma
    pred = net((alpha * x0 + sigma * z).float(), (1000 * t).float()).double()
    rho = {"mse": nn.MSELoss, "l1": nn.L1Loss, "huber": nn.HuberLoss}[kind](reduction="none")
    w = (alpha / sigma).square().clamp(max=5) * x0_errors(alpha, sigma)[objective] ** 2 if weighting == "min_snr" else 1
    want = (w * rho(pred, targets(alpha, sigma, x0.double(), z.double())[objective])).mean((1, 2))
    gradient = torch.autograd.grad(want.mean(), net.parameters())
    got = flow(x0, t=t, noise=z)
    torch.testing.assert_close(got.double(), want.mean(), rtol=2e-5, atol=1e-7)
    for g, e in zip(torch.autograd.grad(got, net.parameters()), gradient, strict=True):
        torch.testing.assert_close(g, e, rtol=2e-4, atol=1e-5 * e.abs().max().item())
    torch.testing.assert_close(flow(x0, t=t, noise=z, reduction="none").double(), want, rtol=2e-5, atol=1e-7)
    assert torch.equal(net.condition, (1000 * t).float())


def test_the_velocity_is_the_derivative_of_the_path():
    flow, x0, z = FlowMatching(Net()), torch.rand(SHAPE).double(), torch.randn(SHAPE).double()
    at = [flow.q_sample(x0, t, noise=z) for t in (0.25, 0.75)]
    torch.testing.assert_close((at[1] - at[0]) / 0.5, targets(0.5, 0.5, x0, z)["flow"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(flow.q_sample(x0, 1.0, noise=z), z)


def log_odds(t: Tensor) -> Tensor:
    return (t / (1 - t)).log()


@pytest.mark.parametrize(
    ("draw", "cdf"),
    [
        (uniform, lambda t: t),
        (logit_normal, lambda t: torch.special.ndtr(log_odds(t))),
        (functools.partial(logit_normal, mean=0.5, std=2.0), lambda t: torch.special.ndtr((log_odds(t) - 0.5) / 2)),
        (cosmap, lambda t: 2 / math.pi * torch.atan(t / (1 - t))),
    ],
)
def test_times_have_the_published_distributions(draw, cdf):
    """Each is the inverse of the distribution function. That of cosmap has the density 2 / (pi - 2 pi t + 2 pi t^2)."""
    u = torch.linspace(0.01, 0.99, 37, dtype=torch.float64)
    torch.testing.assert_close(cdf(draw(u)), u, rtol=1e-9, atol=1e-12)


def test_mode_falls_from_1_to_0():
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    for scale in (-1.0, 0.0, 1.29, 2 / (math.pi - 2)):
        t = mode(u, scale)
        assert (t.diff() < 0).all() and t[0].item() == pytest.approx(1) and t[-1].item() == pytest.approx(0, abs=1e-15)
        want = 1 - u - scale * ((math.pi / 2 * u).cos() ** 2 - 1 + u)
        torch.testing.assert_close(t, want, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(mode(u, 0.0), 1 - u)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("times", ["uniform", "logit_normal", "mode", "cosmap"])
def test_training_draws_these_times(times, shift):
    """Quartiles of u, shifted, part the draws in four; 5 standard deviations."""
    net, n = Net(), 4000
    flow = FlowMatching(net, times=times, shift=shift)
    flow(torch.zeros(n, 1, 3))
    t = net.condition.double() / 1000
    assert (t > 0).all() and (t <= 1).all()
    draw = {"uniform": uniform, "logit_normal": logit_normal, "mode": mode, "cosmap": cosmap}[times]
    ends = draw(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).sort().values
    ends = shift * ends / (1 + (shift - 1) * ends)
    counts = torch.bucketize(t, ends).bincount(minlength=4)
    assert ((counts - n / 4).abs() < 5 * math.sqrt(n * 3 / 16)).all(), counts


def test_times_may_be_a_function():
    net = Net()
    flow = FlowMatching(net, times=lambda u: 0 * u + 0.25)
    flow(torch.zeros(SHAPE))
    assert (net.condition == 250).all()
    flow.times = functools.partial(logit_normal, mean=20.0)
    flow(torch.zeros(SHAPE))
    assert (net.condition > 900).all()
    with pytest.raises(ValueError, match="config: expected times given by name, got a function"):
        _ = flow.config
    for result, got in ((lambda u: u[:1], r"\(1,\)"), (lambda u: 0.5, "float")):
        flow.times = result
        with pytest.raises(ValueError, match=rf"^times: expected shape \(4,\) of the function, got {got}$"):
            flow(torch.zeros(SHAPE))


def test_shift_by_resolution():
    assert resolution_shift(4 * 64 * 64, 64 * 64) == 2.0
    assert Flow(3.0).shifted(torch.tensor([0.5])).item() == pytest.approx(3 / 4)
    made, levels = Flow(3.0).grid(4)
    want = [3 * t / (1 + 2 * t) for t in (1, 0.75, 0.5, 0.25, 0)]
    assert made.times(levels).tolist() == pytest.approx(want, rel=1e-12, abs=0)
    for shift in (0.1, 0.3, 7.0):
        made, levels = Flow(shift).grid(9)
        assert made.time[levels[0]] == 1 and made.alpha[levels[0]] == 0
        made, levels = Flow(shift, last=0.9).grid(3)
        visited = made.time[levels]
        assert visited[0] == 0.9 and visited[-1] == 0 and len(visited) == 4 and (visited.diff() < 0).all()
    with pytest.raises(ValueError, match="base: expected an integer of at least 1, got 0"):
        resolution_shift(4, 0)


# --- sampling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_is_the_ddim_row(shift):
    """x + (s - t) v, from t = 1 to 0."""
    net = Net(torch.float64)
    flow = FlowMatching(net, shift=shift)
    x = x_T = torch.randn(SHAPE, dtype=torch.float64)
    u = torch.linspace(1, 0, 8, dtype=torch.float64)
    times = (shift * u / (1 + (shift - 1) * u)).tolist()
    with torch.no_grad():
        for t, s in itertools.pairwise(times):
            x = x + (s - t) * net(x, torch.full((4,), 1000 * t, dtype=torch.float64))
    torch.testing.assert_close(flow.sample(SHAPE, x_T=x_T, steps=7), x, rtol=1e-11, atol=1e-11)
    assert torch.equal(flow.sample(SHAPE, x_T=x_T, steps=7, sampler="ddim"), flow.sample(SHAPE, x_T=x_T, steps=7))


def straight(n: int) -> list[tuple[mpf, mpf]]:
    return [(mpf(k) / n, 1 - mpf(k) / n) for k in range(n + 1)]


def karras(low: float, high: float, n: int) -> list[tuple[mpf, mpf]]:
    ends = mpf(high) ** (mpf(1) / 7), mpf(low) ** (mpf(1) / 7)
    ratios = [(ends[0] + mpf(i) / (n - 1) * (ends[1] - ends[0])) ** 7 for i in range(n)]
    return [(1 / (1 + r), r / (1 + r)) for r in ratios] + [(mpf(1), mpf(0))]


RUNS = {
    "ddim": (recursions.ddim, straight(20), 20),
    "dpm++2m": (recursions.two_m, straight(20), 20),
    "ddpm": (recursions.ancestral, straight(50), 50),
    "heun": (recursions.heun, karras(0.002, 80.0, 18), 18),
}


@pytest.mark.parametrize("objective", LEARNED)
@pytest.mark.parametrize("sampler", RUNS)
def test_gaussian_data(sampler, objective):
    rule, levels, n = RUNS[sampler]
    mean, std = moments(exact(FlowMatching, objective=objective), sampler, n)
    want_mean, want_std = rule(levels)
    assert std.tolist() == pytest.approx(want_std, rel=1e-9)
    assert mean.tolist() == pytest.approx(want_mean, rel=1e-9, abs=1e-12)
    if sampler == "ddim":
        mean, std = moments(exact(FlowMatching, objective=objective, dtype=torch.float32), sampler, n)
        assert std.tolist() == pytest.approx(want_std, rel=1e-4)


def test_flow_is_vp_in_other_coordinates():
    """A denoiser of x / alpha at sigma / alpha gives both the same path, scaled by alpha + sigma."""

    class Denoises(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            made = self.process.at(c / (1000 if isinstance(self.process, Flow) else 999))
            shape = (-1, *[1] * (x.ndim - 1))
            return self.scale * torch.tanh(x / made.alpha.view(shape)) / (1 + made.sigma / made.alpha).view(shape)

    ends = []
    x = torch.randn(SHAPE, dtype=torch.float64)
    t = torch.tensor([0.9, 0.6, 0.4, 0.2, 0.05], dtype=torch.float64)
    ratio = VP().at(t).sigma / VP().at(t).alpha
    for model in (ScoreSDE(Denoises(), "vp", "x0"), FlowMatching(Denoises(), "x0")):
        process = model.model.process = model.process
        grid = process.discretize(process.time_of(ratio).flip(0)), torch.arange(5, -1, -1)
        made = process.at(process.time_of(ratio[:1]))
        start = x * made.alpha
        for sampler in ("ddim", "dpm++2m", "heun"):
            ends.append(model.sample(SHAPE, sampler=sampler, steps=grid, x_T=start))
    for a, b in zip(ends[:3], ends[3:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_samplers_start_in_pure_noise_or_say_why_not():
    flow, below = FlowMatching(Net()), FlowMatching(Net(), last=0.99)
    begin, refused = {}, {}
    for name in steps.SAMPLERS:
        try:
            assert flow.sample(SHAPE, sampler=name, steps=5).isfinite().all()
            begin[name] = flow.step_table(name, 5).levels[0].item()
        except ValueError as error:
            refused[name] = str(error)
    assert "'annealed_langevin' expected the levels of a ladder" in refused.pop("annealed_langevin")
    for name, said in refused.items():
        assert "alpha = 0" in said and "start below it" in said, name
        assert below.sample(SHAPE, sampler=name, steps=5).isfinite().all()
    assert {"euler_maruyama", "probability_flow"} <= set(refused)
    assert begin.pop("heun") == pytest.approx(80 / 81)  # Karras' largest ratio
    assert {name for name, t in begin.items() if t == 1} >= {
        "ddpm", "ddim", "dpm++2m", "reverse_diffusion", "predictor_corrector"
    }  # fmt: skip
    with pytest.raises(ValueError, match="sampler: 'heun' expected a finite sigma / alpha"):
        flow.sample(SHAPE, sampler="heun", steps=flow.process.grid(5))


def test_one_launch_beside_the_model(monkeypatch):
    net = Net()
    calls = count_calls(monkeypatch, net)
    flow = FlowMatching(net)
    for sampler in ("ddim", "dpm++2m", "heun", "ddpm"):
        flow.sample(SHAPE, sampler=sampler, steps=4)
    assert calls["model"] == calls["update"] == 4 + 4 + 7 + 4


@pytest.mark.slow
def test_encode_and_interpolate():
    flow = exact(FlowMatching)
    x0 = torch.tensor([[0.5, -0.4, 0.3, 0.2], [-0.2, -0.6, 1.0, 0.2]], dtype=torch.float64)
    noise = flow.encode(x0, steps=400)
    mean, std = flow.model.mean, flow.model.var.sqrt()
    torch.testing.assert_close(noise, (x0 - mean) / std, rtol=0, atol=2e-2)  # of first order in the steps
    torch.testing.assert_close(flow.sample((2, 4), steps=400, x_T=noise), x0, rtol=0, atol=2e-2)
    for weight, end in ((0.0, x0[:1]), (1.0, x0[1:])):
        torch.testing.assert_close(flow.interpolate(x0[:1], x0[1:], weight, steps=400), end, rtol=0, atol=2e-2)
    between = flow.interpolate(x0[:1], x0[1:], torch.tensor([0.5]), steps=50)
    assert not torch.allclose(between, x0[:1], atol=0.05) and not torch.allclose(between, x0[1:], atol=0.05)
    with pytest.raises(ValueError, match=r"weight: expected one or 1 numbers in \[0, 1\]"):
        flow.interpolate(x0[:1], x0[1:], 1.5)
    with pytest.raises(TypeError, match="weight: expected numbers, got str"):
        flow.interpolate(x0[:1], x0[1:], "half")
    with pytest.raises(ValueError, match="objective: 'x0' cannot be inverted from level 0"):
        FlowMatching(Net(), "x0").encode(torch.zeros(SHAPE), steps=3)


def test_the_objectives_that_need_a_signal_end_below_1():
    for objective in ("eps", "score"):
        flow = FlowMatching(Net(), objective)
        assert flow.process.last == 0.999 and flow.prior_std() == 0.999
        assert flow.sample(SHAPE, steps=4).isfinite().all()
        with pytest.raises(ValueError, match=rf"objective: '{objective}' says nothing of x_0 at t = 1"):
            FlowMatching(Net(), objective, last=1.0)
    flow = FlowMatching(Net())
    with pytest.raises(ValueError, match="says nothing of x_0 at t = 1"):
        flow.objective = "eps"
    assert flow.objective == "flow" and flow.process.last == 1
    flow.process = Flow(last=0.99)
    flow.objective = "eps"
    assert flow.sample(SHAPE, steps=4).isfinite().all()


# --- coupling -----------------------------------------------------------------------------------------------------


def test_optimal_coupling_is_the_best_of_all_orders():
    x0, noise = torch.randn(5, 2, 3), torch.randn(5, 2, 3)
    got = optimal_coupling(x0, noise)

    def cost(z: Tensor) -> float:
        return (x0 - z).square().sum().item()

    best = min(cost(noise[list(order)]) for order in itertools.permutations(range(5)))
    assert cost(got) == pytest.approx(best, rel=1e-6) and cost(got) < cost(noise)
    assert torch.equal(got.flatten(1).sort(0).values, noise.flatten(1).sort(0).values)
    FlowMatching(Net())(x0, noise=got).backward()
    with pytest.raises(ValueError, match="noise: expected shape"):
        optimal_coupling(x0, noise[:3])
    with pytest.raises(ValueError, match="x0, noise: expected finite numbers, got NaN or infinity"):
        optimal_coupling(x0, noise / 0)


def test_coupling_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(
        ImportError, match=r"scipy.optimize is not installed: pip install 'fastdiff-kernels\[coupling\]'"
    ):
        optimal_coupling(torch.zeros(2, 3), torch.zeros(2, 3))


# --- configuration and errors -------------------------------------------------------------------------------------


def test_config_round_trip():
    net = Net()
    for flow in (FlowMatching(net), FlowMatching(net, "eps", "huber", "min_snr", "cosmap", 3.0, 2.0)):
        again = FlowMatching(net, **flow.config)
        assert again.config == flow.config
        assert torch.equal(again.sample(SHAPE, steps=3, seed=1), flow.sample(SHAPE, steps=3, seed=1))


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: FlowMatching(Net(), "velocity"), ValueError, "objective: expected one of"),
        (lambda: FlowMatching(Net(), weighting="vlb"), ValueError, "weighting: expected one of simple, min_snr"),
        (lambda: FlowMatching(Net(), times="normal"), ValueError, "times: expected one of uniform, logit_normal, mode"),
        (lambda: FlowMatching(Net(), shift=0.0), ValueError, "shift: expected a finite number above 0, got 0.0"),
        (lambda: FlowMatching(Net(), last=1.5), ValueError, "last: expected a time above 1e-05 and at most 1, got 1.5"),
        (lambda: setattr(FlowMatching(Net()), "process", VP()), TypeError, "process: expected a Flow, got VP"),
        (lambda: setattr(FlowMatching(Net()), "times", "x"), ValueError, "times: expected one of"),
        (lambda: FlowMatching(Net()).sample(SHAPE, steps=0), ValueError, "steps: expected an integer of at least 1"),
        (lambda: FlowMatching(Net()).sample(SHAPE, steps=[1.5, 0]), ValueError, "steps: expected times from 1 to 0"),
        (lambda: mode(torch.zeros(1), 2.0), ValueError, "scale: expected a number from -1 to 2 / .pi - 2., got 2.0"),
        (lambda: logit_normal(torch.zeros(1), std=0.0), ValueError, "std: expected a number above 0, got 0.0"),
    ],
)
def test_errors(make, error, said):
    with pytest.raises(error, match=said):
        make()


def test_samplers_of_other_formulations_take_the_objective():
    """A network of velocities along a chain."""
    ddpm = DDPM(exact(FlowMatching).model, "cosine", 50, "flow", clip=None)
    ddpm.model.process, ddpm.model.objective = ddpm.process, "flow"
    mean, std = moments(ddpm, "dpm++2m", 25)
    torch.testing.assert_close(mean, ddpm.model.mean, rtol=0, atol=0.02)
    torch.testing.assert_close(std, ddpm.model.var.sqrt(), rtol=0.1, atol=0.02)


class TwoModes(nn.Module):
    """The velocity of 0.4 N(-1, 0.3^2) + 0.6 N(1, 0.4^2)."""

    share, mean, var = (torch.tensor(v, dtype=torch.float64) for v in ((0.4, 0.6), (-1.0, 1.0), (0.09, 0.16)))

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def log_density(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """log of each share times its normal density of x_t, (N, 2)."""
        spread = alpha**2 * self.var + sigma**2
        return self.share.log() - 0.5 * ((x - alpha * self.mean) ** 2 / spread + (2 * math.pi * spread).log())

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        sigma = c[:, None] / 1000
        alpha = 1 - sigma
        of_each = alpha * self.var * (x - alpha * self.mean) / (alpha**2 * self.var + sigma**2) + self.mean
        x0 = (self.log_density(x, alpha, sigma).softmax(1) * of_each).sum(1, keepdim=True)
        return self.scale * ((x - alpha * x0) / sigma - x0)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++2m"])
def test_two_modes_in_50_steps(sampler):
    """KL(samples, data) by quadrature over the start: the samples are a growing function of it."""
    flow = FlowMatching(TwoModes())
    z = torch.linspace(-6, 6, 6001, dtype=torch.float64)
    x = flow.sample((6001, 1), sampler=sampler, steps=50, x_T=z[:, None])
    slope = torch.gradient(x[:, 0], spacing=(z,))[0]
    assert (slope > 0).all()
    start = torch.distributions.Normal(0.0, 1.0).log_prob(z)
    data = flow.model.log_density(x, torch.ones(1), torch.zeros(1)).logsumexp(1)
    kl = torch.trapezoid(start.exp() * (start - slope.log() - data), z).item()
    assert -1e-4 < kl < 1e-2, kl  # the slope is one of differences
