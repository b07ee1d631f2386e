"""The probability-flow ODE by torchdiffeq: samples and likelihoods of Gaussian data, where both are known."""

import math
import sys

import pytest
import torch
from gaussian import MEAN, STD, exact
from torch import Tensor, nn

from fastdiff import DDPM, NCSN, FlowMatching, ScoreSDE, ops
from fastdiff.diffusion import Diffusion
from fastdiff.process import VE, VP

MODELS = {
    "vp": lambda **o: exact(ScoreSDE, "vp", objective="score", **o),
    "vp, v": lambda **o: exact(ScoreSDE, "vp", objective="v", **o),
    "subvp": lambda **o: exact(ScoreSDE, "subvp", objective="eps", **o),
    "ve": lambda **o: exact(ScoreSDE, VE(0.01, 50.0), objective="x0", **o),
    "ncsn": lambda **o: exact(NCSN, 50.0, 0.01, 10, objective="score", **o),
    "ddpm": lambda **o: exact(DDPM, "linear", 1000, "eps", **o),
    "flow": lambda **o: exact(FlowMatching, **o),
    "flow, x0": lambda **o: exact(FlowMatching, objective="x0", last=0.99, **o),
    "short ddpm": lambda **o: exact(DDPM, "linear", 20, "v", **o),
}
EACH = pytest.mark.parametrize("name", MODELS)
pytestmark = pytest.mark.filterwarnings("ignore:schedule. alpha_bar_T")


def ends(model: Diffusion) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means and standard deviations of the data at `first` and at `last`."""
    process = model.process
    made = process.at(torch.tensor([process.first, process.last], dtype=torch.float64))
    mean, var = torch.tensor(MEAN, dtype=torch.float64), torch.tensor(STD, dtype=torch.float64) ** 2
    means = [made.alpha[k] * mean for k in (0, 1)]
    stds = [(made.alpha[k] ** 2 * var + made.sigma[k] ** 2).sqrt() for k in (0, 1)]
    return means[0], stds[0], means[1], stds[1]


def draw(n: int, mean: Tensor, std: Tensor) -> Tensor:
    return mean + std * torch.randn(n, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def log_normal(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return torch.distributions.Normal(mean, std).log_prob(x).sum(1)


@pytest.mark.slow
@EACH
def test_samples_follow_the_exact_flow(name):
    """x at `first` of the flow from x at `last`: m_0 + std_0 / std_1 (x - m_1)."""
    model = MODELS[name]()
    mean, std, last_mean, last_std = ends(model)
    x_T = draw(6, torch.zeros(4, dtype=torch.float64), last_std)
    before = x_T.clone()
    got = model.sample((6, 4), sampler="ode", x_T=x_T)
    torch.testing.assert_close(got, mean + std / last_std * (x_T - last_mean), rtol=1e-4, atol=1e-4)
    assert torch.equal(x_T, before) and not got.requires_grad
    model.train()
    drawn = model.sample((5, 4), sampler="ode", seed=3)
    torch.testing.assert_close(model.sample((5, 4), sampler="ode", seed=3), drawn, rtol=0, atol=0)
    start = model.prior_std() * ops.normal((5, 4), 3, dtype=torch.float64)
    torch.testing.assert_close(model.sample((5, 4), sampler="ode", x_T=start), drawn, rtol=1e-9, atol=1e-9)
    assert model.training and model.model.training


@pytest.mark.slow
@EACH
def test_log_likelihood_is_the_density(name):
    """Of x at `first`, but that the prior N(0, prior^2) stands for the distribution at `last`: for x_T = m_1 + std_1 u
    the difference is log N(x_T; 0, prior) - log N(x_T; m_1, std_1)."""
    model = MODELS[name]()
    mean, std, last_mean, last_std = ends(model)
    x = draw(6, mean, std)
    x_T = last_mean + last_std * (x - mean) / std
    prior = torch.full((4,), model.prior_std(), dtype=torch.float64)
    left_out = log_normal(x_T, 0 * prior, prior) - log_normal(x_T, last_mean, last_std)
    got = model.log_likelihood(x, trace="exact", tolerance=1e-6)
    assert got.shape == (6,) and got.dtype == torch.float64 and not got.requires_grad
    torch.testing.assert_close(got, log_normal(x, mean, std) + left_out, rtol=0, atol=1e-4)
    if name in ("vp", "subvp", "flow"):  # at the end of which the prior is what the data became
        exactly = 1e-4 if name == "flow" else 0.05
        torch.testing.assert_close(got, log_normal(x, mean, std), rtol=0, atol=exactly)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vp", "ddpm", "short ddpm", "ncsn"])
def test_the_levels_of_a_chain_are_no_obstacle(name):
    """Solved over time, which has a kink at each level, chains took up to 60 times the calls of an SDE."""
    model, calls = MODELS[name](), []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    model.log_likelihood(torch.zeros(2, 4, dtype=torch.float64), trace="exact", tolerance=1e-7)
    assert len(calls) < 400


@pytest.mark.slow
def test_float32():
    for name in ("vp", "ve"):
        model, same = MODELS[name](dtype=torch.float32), MODELS[name]()
        mean, std, *_ = ends(model)
        x = draw(4, mean, std)
        got = model.log_likelihood(x.float(), trace="exact")
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), same.log_likelihood(x, trace="exact"), rtol=1e-3, atol=1e-2)
        assert model.sample((3, 4), sampler="ode", seed=0).dtype == torch.float32


class Mixed(nn.Module):
    """A score whose Jacobian is not diagonal, for which e' J e differs from the trace."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(0.5 * torch.randn(3, 3, generator=g, dtype=torch.float64))

    def forward(self, x: Tensor, c: Tensor, shift: float = 0.0) -> Tensor:
        return torch.tanh(x @ self.weight.T + shift) - x


@pytest.mark.slow
def test_hutchinson_is_unbiased():
    """Over 400 probes, as the samples of one batch, within 5 standard errors; different by seed, the same for one."""
    model = ScoreSDE(Mixed(), VP(0.1, 5.0))
    x = draw(1, torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))[:, :3]
    want = model.log_likelihood(x, trace="exact").item()
    got = model.log_likelihood(x.expand(400, 3).contiguous(), seed=0)
    assert got.std() > 0.05
    assert abs(got.mean().item() - want) < 5 * got.std().item() / math.sqrt(400)
    same, other = model.log_likelihood(x, seed=1), model.log_likelihood(x, seed=2)
    assert torch.equal(model.log_likelihood(x, seed=1), same) and not torch.equal(same, other)
    torch.manual_seed(0)
    first = model.log_likelihood(x)
    torch.manual_seed(0)
    assert torch.equal(model.log_likelihood(x), first)
    # a probe of signs gives a diagonal Jacobian's trace exactly
    gaussian = MODELS["vp"]()
    mean, std, *_ = ends(gaussian)
    y = draw(3, mean, std)
    torch.testing.assert_close(gaussian.log_likelihood(y, seed=5), gaussian.log_likelihood(y, trace="exact"))


@pytest.mark.slow
def test_model_arguments_and_shapes_pass_through():
    model = ScoreSDE(Mixed(), VP(0.1, 5.0))
    x = torch.zeros(2, 4, 3, dtype=torch.float64)
    assert model.log_likelihood(x, trace="exact").shape == (2,)
    assert not torch.equal(model.log_likelihood(x, seed=0, shift=1.0), model.log_likelihood(x, seed=0))
    x_T = torch.ones(2, 4, 3, dtype=torch.float64)
    shifted = model.sample((2, 4, 3), sampler="ode", x_T=x_T, shift=1.0)
    assert shifted.shape == x_T.shape and not torch.allclose(shifted, model.sample((2, 4, 3), sampler="ode", x_T=x_T))


def test_parameters_get_no_gradient():
    model = ScoreSDE(Mixed(), VP(0.1, 5.0))
    model.log_likelihood(torch.zeros(2, 3, dtype=torch.float64), seed=0)
    assert model.model.weight.grad is None


# --- errors -------------------------------------------------------------------------------------------------------


class Forbidden(nn.Module):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        raise AssertionError("called")


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 5}, {"steps": torch.tensor([1.0, 0.5])}, {"noise": torch.zeros(5, 2, 3)}, {"eta": 0.5},
        {"callback": print}, {"return_trajectory": True}, {"guidance": 1.0, "shift": 1.0, "uncond": {"shift": 1.0}},
    ],
)  # fmt: skip
def test_the_ode_takes_no_options_of_steps(options):
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="sampler: 'ode' chooses its own steps and expected no steps, eta, noise"):
        ScoreSDE(Forbidden()).sample((2, 3), sampler="ode", **options)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_chain_without_signal_at_its_end_is_refused():
    model = DDPM(Forbidden(), "raised_cosine", 20, "v")
    for call in (lambda: model.sample((2, 3), sampler="ode"), lambda: model.log_likelihood(torch.zeros(2, 3))):
        with pytest.raises(ValueError, match="process: the ODE expected a finite sigma / alpha at the end"):
            call()


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"trace": "both"}, ValueError, "trace: expected 'hutchinson' or 'exact', got 'both'"),
        ({"tolerance": 0.0}, ValueError, "tolerance: expected a finite number above 0"),
        ({"tolerance": math.nan}, ValueError, "tolerance: expected a finite number above 0"),
        ({"x0": [1.0]}, TypeError, "x0: expected a tensor"),
        ({"seed": 1.5}, TypeError, "seed: expected an int"),
    ],
)
def test_wrong_arguments(options, error, said):
    with pytest.raises(error, match=said):
        ScoreSDE(Forbidden()).log_likelihood(**{"x0": torch.zeros(2, 3), **options})


class Steep(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return -1e12 * x * x


def test_an_ode_that_is_too_steep_is_said():
    with pytest.raises(RuntimeError, match="the ODE is too steep for the solver"):
        ScoreSDE(Steep(), "vp", "score", clip=None).sample((1, 2), sampler="ode", seed=0)


def test_without_torchdiffeq(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    model, state = ScoreSDE(Forbidden()), torch.get_rng_state()
    for call in (lambda: model.sample((2, 3), sampler="ode"), lambda: model.log_likelihood(torch.zeros(2, 3))):
        with pytest.raises(ImportError, match=r"torchdiffeq is not installed: pip install 'fastdiff-kernels\[ode\]'"):
            call()
    assert torch.equal(torch.get_rng_state(), state)
