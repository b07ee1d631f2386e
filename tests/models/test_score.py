"""NCSN and ScoreSDE: loss and gradient against plain formulas, levels drawn, what is learned; and the chain's steps."""

import functools
import math

import pytest
import torch
from objectives import targets, x0_errors
from torch import Tensor, nn

from fastdiff import DDPM, NCSN, ScoreSDE, ops, steps
from fastdiff.diffusion import Diffusion
from fastdiff.objective import OBJECTIVES
from fastdiff.process import VE, VP, Process

SHAPE = (4, 2, 3)
pytestmark = pytest.mark.filterwarnings("ignore:schedule. alpha_bar_T")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        self.condition = c
        return self.linear(x) + 0.1 * torch.sin(c).view(-1, 1, 1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def plain_loss(
    net: Net, x0: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor, condition: Tensor, g2: Tensor | None,
    objective: str, kind: str, weighting: str,
) -> Tensor:  # fmt: skip
    """Per sample; the weights are written for the errors of eps, x_0 and score, and passed on by the chain rule."""
    alpha, sigma, x0, z = alpha.view(-1, 1, 1), sigma.view(-1, 1, 1), x0.double(), z.double()
    pred = net((alpha * x0 + sigma * z).float(), condition.float()).double()
    y, x0_error = targets(alpha, sigma, x0, z)[objective], x0_errors(alpha, sigma)[objective]
    score_error = alpha / sigma**2 * x0_error
    w = {
        "simple": sigma**2 if objective == "score" else 1.0,
        "min_snr": (alpha / sigma).square().clamp(max=5) * x0_error**2,
        "likelihood": 0.0 if g2 is None else g2.view(-1, 1, 1) * score_error**2,
    }[weighting]
    rho = {"mse": nn.MSELoss, "l1": nn.L1Loss, "huber": nn.HuberLoss}[kind](reduction="none")
    return (w * rho(pred, y)).mean((1, 2))


def check(model: Diffusion, expected: Tensor, x0: Tensor, t: Tensor, z: Tensor) -> None:
    gradient = torch.autograd.grad(expected.mean(), model.model.parameters())
    got = model(x0, t=t, noise=z)
    assert got.shape == () and got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected.mean(), rtol=2e-5, atol=1e-7)
    for g, e in zip(torch.autograd.grad(got, model.model.parameters()), gradient, strict=True):
        torch.testing.assert_close(g, e, rtol=2e-4, atol=1e-5 * e.abs().max().item())
    each = model(x0, t=t, noise=z, reduction="none").double()
    torch.testing.assert_close(each, expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["mse", "l1", "huber"])
@pytest.mark.parametrize("weighting", ["simple", "likelihood", "min_snr"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("sde", ["vp", "subvp", "ve"])
def test_loss_of_an_sde(sde, objective, weighting, kind):
    net, x0, z = Net(), torch.rand(SHAPE) * 2 - 1, torch.randn(SHAPE)
    t = torch.tensor([0.02, 0.1, 0.5, 1.0], dtype=torch.float64)
    beta, total = 0.1 + 19.9 * t, 0.1 * t + 19.9 * t**2 / 2
    if sde == "ve":
        alpha, sigma = torch.ones_like(t), 0.01 * 5000**t
        g2, condition = 2 * sigma**2 * math.log(5000), sigma
    else:
        alpha, condition = (-total / 2).exp(), 999 * t
        sigma, g2 = (1 - (-total).exp()).sqrt(), beta
        if sde == "subvp":
            sigma, g2 = sigma**2, beta * (1 - (-2 * total).exp())
    model = ScoreSDE(net, sde, objective, kind, weighting)
    expected = plain_loss(net, x0, z, alpha, sigma, condition, g2, objective, kind, weighting)
    check(model, expected, x0, t, z)


@pytest.mark.parametrize("weighting", ["simple", "min_snr"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_of_a_ladder(objective, weighting):
    net, x0, z = Net(), torch.rand(SHAPE) * 2 - 1, torch.randn(SHAPE)
    t, sigma = torch.tensor([1, 2, 3, 5]), 0.01 * 100 ** (torch.tensor([0.0, 1, 2, 4], dtype=torch.float64) / 4)
    model = NCSN(net, 1.0, 0.01, 5, objective, weighting=weighting)
    expected = plain_loss(net, x0, z, torch.ones_like(sigma), sigma, sigma, None, objective, "mse", weighting)
    check(model, expected, x0, t, z)
    torch.testing.assert_close(net.condition, sigma.float())


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("make", [lambda o: ScoreSDE(Net(), "vp", o), lambda o: NCSN(Net(), objective=o)])
def test_loss_of_a_seed_is_the_loss_of_its_noise(make, objective):
    """The noise of x_t is drawn again for the target, at each sample's own step."""
    model, x0 = make(objective), torch.rand(SHAPE)
    sde = isinstance(model, ScoreSDE)
    t = torch.tensor([0.1, 0.9, 0.5, 0.2]) if sde else torch.tensor([1, 9, 5, 2])
    z = ops.normal(SHAPE, 7, step=torch.arange(4) if sde else t, stream=ops.FORWARD)
    torch.testing.assert_close(model(x0, t=t, seed=7), model(x0, t=t, noise=z), rtol=1e-5, atol=0)
    assert model(x0, t=t, seed=7) != model(x0, t=t, seed=8)
    torch.manual_seed(1)
    first = model(x0)
    torch.manual_seed(1)
    assert model(x0) == first != model(x0)


@pytest.mark.parametrize("sde", ["vp", "ve"])
def test_times_are_uniform_from_first_to_1(sde):
    net = Net()
    model = ScoreSDE(net, sde)
    model(torch.zeros(8000, 1, 3))
    condition = net.condition.double()
    t = condition / 999 if sde == "vp" else (condition / 0.01).log() / math.log(5000)
    first = model.process.first
    assert first - 1e-6 <= t.min() < first + 2e-3 and 1 - 2e-3 < t.max() <= 1 + 1e-6
    counts = torch.histc(t.float(), 4, first, 1)
    assert ((counts - 2000).abs() < 4 * math.sqrt(8000 * 3 / 16)).all()  # 4 standard deviations


def test_q_sample():
    model, x0, z = ScoreSDE(Net(), "subvp"), torch.rand(SHAPE), torch.randn(SHAPE)
    for t in (0.3, torch.tensor(0.3, dtype=torch.float64), torch.full((4,), 0.3, dtype=torch.float64)):
        total = 0.1 * 0.3 + 19.9 * 0.3**2 / 2
        want = math.exp(-total / 2) * x0 + (1 - math.exp(-total)) * z
        torch.testing.assert_close(model.q_sample(x0, t, noise=z), want)
    ladder = NCSN(Net(), 2.0, 0.02, 3)
    torch.testing.assert_close(ladder.q_sample(x0, 2, noise=z), x0 + 0.2 * z)


MODE, SPREAD = torch.tensor([0.6, -0.6]), 0.05  # data at MODE and -MODE
CORRECTOR = functools.partial(steps.predictor_corrector, snr=0.03)


def two_modes(name: str, model: nn.Module) -> Diffusion:
    made = NCSN(model, 2.0, 0.02, 10) if name == "ncsn" else ScoreSDE(model, VE(0.01, 3.0) if name == "ve" else name)
    model.process = made.process
    return made


def levels(process: Process, c: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma), (B, 1), from what the model is condition."""
    if isinstance(process, VP):
        made = process.at(c / 999)
        return made.alpha.float()[:, None], made.sigma.float()[:, None]
    return torch.ones_like(c)[:, None], c[:, None]


def near_a_mode(x: Tensor) -> tuple[float, float, float]:
    """The shares of samples within 5 SPREAD of a mode and at the first of them, and how far all are from one."""
    distance = torch.stack(((x - MODE).norm(dim=1), (x + MODE).norm(dim=1)))
    nearest, first = distance.min(0).values, distance[0] < distance[1]
    far = (nearest < 5 * SPREAD).float().mean()
    return far.item(), first.float().mean().item(), (nearest.square().mean() / 2).sqrt().item()


@pytest.mark.slow
@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("name", ["vp", "subvp", "ve", "ncsn"])
def test_two_modes_are_sampled(name):
    """With the exact score of the mixture every sampler finds both modes at nearly their width."""

    class Mixture(nn.Module):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            alpha, sigma = levels(self.process, c)
            var = alpha**2 * SPREAD**2 + sigma**2
            side = torch.tanh(alpha * (x * MODE).sum(1, keepdim=True) / var)
            return (alpha * side * MODE - x) / var

    model = two_modes(name, Mixture())
    n = None if name == "ncsn" else 100
    for sampler, count in ((None, n or 30), ("ddpm", n), (CORRECTOR, n), ("heun", 18), ("dpm++2m", n)):
        near, first, width = near_a_mode(model.sample((512, 2), seed=0, sampler=sampler, steps=count))
        assert near > 0.99 and 0.4 < first < 0.6, sampler  # 4.5 standard errors
        assert 0.6 < width / SPREAD < 1.4, (sampler, width)


@pytest.mark.slow
@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("name", ["vp", "subvp", "ve", "ncsn"])
def test_two_modes_are_learned(name):
    class Mlp(nn.Module):
        """Given the state at unit scale and log(sigma / alpha), it predicts the noise."""

        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            alpha, sigma = levels(self.process, c)
            level = (sigma / alpha).log() / 2
            scaled = x * (alpha**2 * 0.36 + sigma**2).rsqrt()
            return -self.net(torch.cat((scaled, level, level.sin()), 1)) / sigma  # as score networks do

    model = two_modes(name, Mlp())
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 450)
    losses = []
    for _ in range(450):
        sign = torch.randint(0, 2, (256, 1)) * 2 - 1
        optimizer.zero_grad()
        loss = model(sign * MODE + SPREAD * torch.randn(256, 2))
        loss.backward()
        optimizer.step()
        decay.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.85 * sum(losses[:20])
    for sampler, count in ((None, 30 if name == "ncsn" else 100), ("heun", 18)):
        near, first, _ = near_a_mode(model.sample((512, 2), seed=0, sampler=sampler, steps=count))
        assert near > 0.8 and 0.3 < first < 0.7, sampler


# --- configuration and errors -------------------------------------------------------------------------------------


def test_config_round_trip():
    net = Net()
    for model in (
        ScoreSDE(net, "ve", "eps", "huber", "likelihood", 2.0),
        ScoreSDE(net, "vp", beta_max=10.0),
        NCSN(net, 3.0, 0.1, 7, "x0", "l1", "min_snr", 1.5),
    ):
        again = type(model)(net, **model.config)
        assert again.config == model.config
        options = {"steps": 3, "seed": 1}
        assert torch.equal(again.sample(SHAPE, **options), model.sample(SHAPE, **options))
    with pytest.raises(ValueError, match="config: expected an SDE given by name, got an object"):
        _ = ScoreSDE(net, VP()).config


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ScoreSDE(Net(), "vpp"), "sde: expected one of vp, subvp, ve, got 'vpp'"),
        (lambda: ScoreSDE(Net(), "vp", "noise"), "objective: expected one of"),
        (lambda: ScoreSDE(Net(), weighting="vlb"), "weighting: expected one of simple, likelihood, min_snr, got 'vlb'"),
        (lambda: ScoreSDE(Net(), loss="l2"), "loss: expected one of"),
        (lambda: ScoreSDE(Net(), clip=0.0), "clip: expected a number above 0 or None"),
        (lambda: NCSN(Net(), weighting="likelihood"), "weighting: expected one of"),
        (lambda: NCSN(Net(), 0.01, 1.0), "sigma_min, sigma_max: expected 0 < sigma_min < sigma_max"),
        (lambda: NCSN(Net(), levels=0), "levels: expected an integer of at least 1"),
    ],
)
def test_constructor_errors(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_options_of_another_sde():
    with pytest.raises(TypeError, match="sigma_min: expected options of 'vp', beta_min and beta_max, got another"):
        ScoreSDE(Net(), "vp", sigma_min=0.01)


# --- the forward chain, step by step ------------------------------------------------------------------------------


def test_steps_of_the_chain_compose_to_its_closed_form():
    """x_t after t single steps is affine in x_0 and the noises: sample 0 has x_0 = 1, sample k noise 1 at step k."""
    n = 12
    ddpm = DDPM(Net(), torch.linspace(0.01, 0.9, n), n)
    x = torch.zeros(n + 1, 1, dtype=torch.float64)
    x[0] = 1
    for t in range(1, n + 1):
        z = torch.zeros_like(x)
        z[t] = 1
        x = ddpm.q_step(x, t, noise=z)
        assert x[0].item() == pytest.approx(ddpm.schedule.alpha[t].item(), rel=1e-12)
        assert x[1:].norm().item() == pytest.approx(ddpm.schedule.sigma[t].item(), rel=1e-12)
    x, z = torch.randn(4, 3), torch.randn(4, 3)
    t = torch.tensor([1, 12, 5, 5])
    each = torch.cat([ddpm.q_step(x[i : i + 1], int(t[i]), noise=z[i : i + 1]) for i in range(4)])
    assert torch.equal(ddpm.q_step(x, t, noise=z), each)
    assert torch.equal(ddpm.q_step(x, t, seed=3), ddpm.q_step(x, t, seed=3))
    drawn = torch.cat([ddpm.q_step(torch.zeros(1, 20000), level, seed=3) for level in (4, 5)])
    for row, level in zip(drawn, (4, 5), strict=True):  # 5 standard errors
        assert row.std().item() == pytest.approx(ddpm.schedule.betas[level - 1].sqrt().item(), rel=5 / 200)
    assert abs(torch.corrcoef(drawn)[0, 1]) < 5 / math.sqrt(20000)  # another level, another noise
    for t in (0, 13):
        with pytest.raises(ValueError, match="t: expected levels from 1 to 12"):
            ddpm.q_step(x, t)


def test_posterior_is_bayes_rule():
    """q(x_{t-1} | x_t, x_0) is q(x_t | x_{t-1}) q(x_{t-1} | x_0), normalised: precisions add."""
    betas = [0.05, 0.2, 0.5, 0.9]
    ddpm = DDPM(Net(), betas, 4)
    x0, x_t = torch.randn(4, 2, 3, dtype=torch.float64), torch.randn(4, 2, 3, dtype=torch.float64)
    mean, var = ddpm.q_posterior(x0, x_t, torch.tensor([1, 2, 3, 4]))
    assert mean.shape == x0.shape and var.shape == (4, 1, 1) and mean.dtype == torch.float64
    kept = 1.0
    for i, beta in enumerate(betas):
        if i == 0:
            torch.testing.assert_close(mean[0], x0[0], rtol=1e-12, atol=0)
            assert var[0].item() == 0
        else:
            precision = (1 - beta) / beta + 1 / (1 - kept)
            best = (math.sqrt(1 - beta) / beta * x_t[i] + math.sqrt(kept) / (1 - kept) * x0[i]) / precision
            torch.testing.assert_close(mean[i], best, rtol=1e-11, atol=1e-12)
            assert var[i].item() == pytest.approx(1 / precision, rel=1e-11)
            alone, alone_var = ddpm.q_posterior(x0[i : i + 1], x_t[i : i + 1], i + 1)
            assert torch.equal(alone[0], mean[i]) and torch.equal(alone_var[0], var[i])
        kept *= 1 - beta
    with pytest.raises(ValueError, match="t: expected levels from 1 to 4, got 0"):
        ddpm.q_posterior(x0, x_t, 0)
    with pytest.raises(ValueError, match="x0: expected shape"):
        ddpm.q_posterior(x0[:2], x_t, 1)


# --- float64 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["eps", "v"])
@pytest.mark.parametrize("made", [lambda m, o: DDPM(m, "cosine", 50, o, clip=None), lambda m, o: ScoreSDE(m, "vp", o)])
def test_tables_of_float64_data_are_not_rounded(made, objective):
    class Linear(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return 0.7 * x

    model = made(Linear(), objective)
    x0, z = torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4), torch.ones(2, 4, dtype=torch.float64)
    t = torch.tensor([3, 40]) if isinstance(model, DDPM) else torch.tensor([0.1, 0.9], dtype=torch.float64)
    at = model.process.at(t.double())
    alpha, sigma = at.alpha[:, None], at.sigma[:, None]
    x_t = alpha * x0 + sigma * z
    exact = {"rtol": 1e-13, "atol": 1e-14}
    torch.testing.assert_close(model.q_sample(x0, t, noise=z), x_t, **exact)
    pred = 0.7 * x_t
    x0hat = (x_t - sigma * pred) / alpha if objective == "eps" else alpha * x_t - sigma * pred
    torch.testing.assert_close(model.predict_x0(x_t, t), x0hat, **exact)
    y = z if objective == "eps" else alpha * z - sigma * x0
    want = (pred - y).square().mean(1)
    torch.testing.assert_close(model(x0, t=t, noise=z, reduction="none").double(), want, rtol=1e-6, atol=0)
