"""Learned variance and the variational bound at the level of the modules: training on it, evaluating it, sampling."""

import math

import pytest
import torch
from objectives import targets
from torch import Tensor, nn

from fastdiff import DDPM, NCSN, ScoreSDE, ops, steps
from fastdiff.bound import vlb_rows
from fastdiff.objective import OBJECTIVES
from fastdiff.schedule import linear, make_schedule

T = 1000
MEAN, STD = (0.3, -0.5, 0.0, 0.2), (0.5, 0.1, 1.0, 0.02)
pytestmark = pytest.mark.filterwarnings("ignore:schedule. alpha_bar_T")


class Both(nn.Module):
    """Twice the channels: a prediction and a raw variance, or one of them fixed."""

    def __init__(self, raw: float | None = None, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.net = nn.Linear(4, 8, dtype=dtype)
        self.raw = raw

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out = self.net(x) + 0.001 * t[:, None]
        return out if self.raw is None else torch.cat((out[:, :4], torch.full_like(out[:, 4:], self.raw)), 1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# --- the bound of the best model --------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_best_model_reaches_entropy_plus_the_prior(name, objective):
    """With E[x_0 | x_t] and Var(x_{t-1} | x_t) of Gaussian data, the bound is H(x_0) + KL(q(x_T) || N(0, 1)).

    Every term is of second degree in (x_0, z), so Gauss-Hermite quadrature with two nodes each is exact. The decoder is
    a density here: with bins it would be that of rounded data.
    """
    made = make_schedule(name, T)
    mean, var = torch.tensor(MEAN, dtype=torch.float64), torch.tensor(STD, dtype=torch.float64) ** 2
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    x0 = mean + signs[:, :1] * var.sqrt()
    z = signs[:, 1:]
    rows = vlb_rows(made, objective, "learned")
    t = torch.arange(1, T + 1)
    alpha, sigma = made.alpha[t], made.sigma[t]
    spread = alpha[:, None] ** 2 * var + sigma[:, None] ** 2  # (T, 4)
    c, _, posterior = made.posterior(t, t - 1)
    left = sigma[:, None] ** 2 * var / spread  # Var(x_0 | x_t)
    wanted = (posterior[:, None] + c[:, None] ** 2 * left).log()
    low, high = rows[1:, 3, None], rows[1:, 4, None]
    low, high = (torch.cat((v[:1], v[1:] + posterior[1:, None].log())) for v in (low, high))
    raw = 2 * (wanted - low) / (high - low) - 1
    assert ((raw > -1) & (raw < 1 + 1e-6)).all()  # beta~ and beta bound what the best variance may be

    x_t = alpha[:, None, None] * x0 + sigma[:, None, None] * z  # (T, 4 nodes, 4 dimensions)
    r = (x_t - alpha[:, None, None] * mean) / spread[:, None]
    x0hat = mean + alpha[:, None, None] * var * r
    eps = sigma[:, None, None] * r
    pred = targets(alpha[:, None, None], sigma[:, None, None], x0hat, eps)[objective]

    total = made.prior_kl(0.0) * 4 + 0.5 * made.alpha_bar[-1] * (mean**2 + var).sum()
    for node in range(4):
        args = pred[1:, node], x_t[1:, node], x0[node].expand(T - 1, 4), t[1:], rows
        total = total + ops.vlb(*args, raw_variance=raw[1:]).sum() * 4 / 4
        first = 0.5 * ((2 * math.pi * wanted[0].exp()).log() + (x0[node] - x0hat[0, node]) ** 2 / wanted[0].exp())
        total = total + first.sum() / 4
    end = made.alpha_bar[-1] * var + made.sigma[-1] ** 2
    prior = 0.5 * (end + made.alpha_bar[-1] * mean**2 - 1 - end.log())
    entropy = 0.5 * (2 * math.pi * math.e * var).log()
    assert total.item() == pytest.approx((entropy + prior).sum().item(), abs=1e-6)


# --- training ---------------------------------------------------------------------------------------------------


def parts(ddpm: DDPM, x0: Tensor, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """(mean squared error, bits of the bound times T), (B,) each, from the ops that they are made of."""
    x_t = ddpm.q_sample(x0, t, noise=z)
    pred, raw = ddpm.model(x_t, t - 1).chunk(2, 1)
    rows = vlb_rows(ddpm.schedule, ddpm.objective, "learned").float()
    nats = ops.vlb(pred, x_t, x0, t, rows, raw_variance=raw)
    return (pred - z).square().mean(1), nats * ddpm.timesteps / math.log(2)


def test_hybrid_loss_and_its_gradient():
    x0, z, t = torch.rand(5, 4) * 2 - 1, torch.randn(5, 4), torch.tensor([1, 2, 50, 900, 1000])
    ddpm = DDPM(Both(), "linear", T, loss="hybrid", variance="learned")
    simple, bits = parts(ddpm, x0, t, z)
    losses = ddpm(x0, t=t, noise=z, reduction="none")
    torch.testing.assert_close(losses, simple + 1e-3 * bits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ddpm(x0, t=t, noise=z), losses.mean(), rtol=1e-5, atol=1e-6)
    weight = ddpm.model.net.weight
    got, of_simple, of_bits = (
        torch.autograd.grad(v.mean(), weight, retain_graph=True)[0] for v in (ddpm(x0, t=t, noise=z), simple, bits)
    )
    torch.testing.assert_close(got[:4], of_simple[:4], rtol=1e-4, atol=1e-6)  # the mean learns from the error alone
    torch.testing.assert_close(got[4:], 1e-3 * of_bits[4:], rtol=1e-4, atol=1e-6)
    assert got[4:].norm() > 0


def test_bound_as_loss():
    x0, z, t = torch.rand(5, 4) * 2 - 1, torch.randn(5, 4), torch.tensor([1, 2, 50, 900, 1000])
    ddpm = DDPM(Both(), "linear", T, loss="vlb", variance="learned")
    torch.testing.assert_close(ddpm(x0, t=t, noise=z, reduction="none"), parts(ddpm, x0, t, z)[1], rtol=1e-5, atol=1e-6)
    fixed = DDPM(nn.Identity(), "linear", T, "x0", loss="vlb", variance="beta")
    fixed.model.forward = lambda x, t: x  # type: ignore[method-assign]
    rows = vlb_rows(fixed.schedule, "x0", "beta").float()
    x_t = fixed.q_sample(x0, t, noise=z)
    expected = ops.vlb(x_t, x_t, x0, t, rows) * T / math.log(2)
    torch.testing.assert_close(fixed(x0, t=t, noise=z, reduction="none"), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_importance_weights_leave_the_loss_unbiased():
    """Levels in proportion to their losses, weighted back: the mean over many draws is the mean over levels."""
    ddpm = DDPM(Both(), "linear", 8, loss="vlb", variance="learned", importance=True)
    x0 = torch.rand(4, 4) * 2 - 1
    for _ in range(200):
        ddpm(x0)
    p = ddpm.importance.probabilities()
    assert p.max() > 2 / 8  # no longer even
    with torch.no_grad():
        ddpm.eval()
        wide = x0.repeat_interleave(500, 0)
        even = torch.stack([ddpm(wide, t=t) for t in range(1, 9)]).mean()
        ddpm.train()
        before = ddpm.importance.seen.clone()
        estimate = torch.stack([ddpm(wide) for _ in range(20)])
        assert (ddpm.importance.seen > before).any()
    error = estimate.std() / 20**0.5
    assert (estimate.mean() - even).abs() < 5 * error + 0.01 * even
    assert "importance.losses" in ddpm.state_dict()


# --- evaluation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [None, 7])
def test_bits_per_dim_term_by_term(steps):
    x0 = torch.rand(3, 4) * 2 - 1
    ddpm = DDPM(Both(), "cosine", 20, "v", loss="vlb", variance="learned")
    bound = ddpm.bits_per_dim(x0, steps=steps, seed=3)
    levels = ddpm.process.grid(steps)[1]
    made = ddpm.process.discretize(levels[:-1].flip(0).double())
    rows = vlb_rows(made, "v", "learned").float()
    n = len(levels) - 1
    assert bound.terms.shape == (3, n) and bound.prior.shape == (3,)
    for k in (0, n // 2, n - 1):
        z = ops.normal((3, 4), 3, step=n - k, stream=ops.FORWARD)
        x_t = ddpm.q_sample(x0, int(levels[k]), noise=z)
        pred, raw = ddpm.model(x_t, torch.full((3,), int(levels[k]) - 1)).chunk(2, 1)
        nats = ops.vlb(pred, x_t, x0, n - k, rows, raw_variance=raw, clip=1.0)
        torch.testing.assert_close(bound.terms[:, k], nats / math.log(2), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(bound.total, bound.prior + bound.terms.sum(1))
    again = ddpm.bits_per_dim(x0, steps=steps, seed=3)
    assert torch.equal(again.terms, bound.terms) and not ddpm.bits_per_dim(x0, seed=4).terms.equal(bound.terms)
    assert ddpm.training and not bound.terms.requires_grad


def test_prior_of_the_bound():
    """7.2787e-6 bits per dimension for beta = 1e-4..0.02 and E[x_0^2] = 0.25; Ho et al. 2020 print about 1e-5."""
    x0 = torch.tensor([[0.5, -0.5, 0.5, 0.5], [1.0, 1.0, 1.0, -1.0]])
    bound = DDPM(Both(), "linear", T, loss="vlb", variance="learned").bits_per_dim(x0, steps=[T, 1, 0], seed=0)
    assert bound.prior[0].item() == pytest.approx(7.2787e-6, rel=1e-4)
    assert bound.prior[1].item() == pytest.approx(linear(T).prior_kl(1.0) / math.log(2), rel=1e-4)


def test_bits_per_dim_of_score_models():
    class Zero(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return 0 * x

    x0 = torch.zeros(2, 4)
    for model in (ScoreSDE(Zero(), "vp", "x0"), ScoreSDE(Zero(), "subvp", "x0"), NCSN(Zero(), objective="x0")):
        bound = model.bits_per_dim(x0, steps=None if isinstance(model, NCSN) else 10, seed=0)
        # x_0 is predicted exactly: no step costs anything but the last, whose bin holds more or less of the mass
        assert bound.terms[:, :-1].abs().max() < 1e-6 and (bound.terms[:, -1] >= 0).all()
        assert bound.total.isfinite().all()


# --- sampling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("raw", "variance"), [(-1.0, "posterior"), (1.0, "beta")])
def test_learned_variance_at_its_ends_is_a_fixed_one(raw, variance):
    net = Both(raw)

    class First(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return net(x, t)[:, :4]

    learned = DDPM(net, "cosine", 12, "v", loss="hybrid", variance="learned")
    fixed = DDPM(First(), "cosine", 12, "v", variance=variance)
    for options in ({}, {"steps": 5}, {"sampler": "ddim", "steps": 4}, {"sampler": "heun", "steps": 4}):
        got, want = (m.sample((6, 4), seed=1, **options) for m in (learned, fixed))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(learned.sample((6, 4), seed=1, sampler=steps.ancestral), learned.sample((6, 4), seed=1))
    x = torch.randn(6, 4)
    got, want = (m.p_sample(x, 7, seed=1) for m in (learned, fixed))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_config_of_a_learned_variance():
    ddpm = DDPM(Both(), "cosine", 12, "v", loss="vlb", variance="learned", importance=True)
    assert DDPM(Both(), **ddpm.config).config == ddpm.config


# --- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": "hybrid"}, "variance: expected 'learned' with loss 'hybrid', got 'posterior'"),
        ({"variance": "learned"}, "loss: expected 'hybrid' or 'vlb', which train a learned variance, got 'mse'"),
        ({"variance": "fixed"}, "variance: expected one of posterior, beta, learned, got 'fixed'"),
    ],
)
def test_constructor_errors(options, said):
    with pytest.raises(ValueError, match=said):
        DDPM(Both(), **options)


def test_a_model_without_the_second_half_is_refused():
    ddpm = DDPM(nn.Identity(), "cosine", 12, loss="vlb", variance="learned")
    ddpm.model.forward = lambda x, t: x  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"model: expected an output of shape \(2, 8\), got \(2, 4\)"):
        ddpm(torch.zeros(2, 4))
