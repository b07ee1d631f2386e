"""The bound's rows, its constant, and the choice of levels by the second moment of their losses."""

import math

import mpmath
import pytest
import torch
from bound_inputs import nats_of
from objectives import targets
from strategies import tensor
from torch import Tensor

from fastdiff import bound, ops
from fastdiff.bound import LossSecondMoment, prior_kl, vlb_rows
from fastdiff.schedule import NoiseSchedule, cosine, linear, make_schedule

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")
mpmath.mp.dps = 60


# --- rows ---------------------------------------------------------------------------------------------------------

SCHEDULES = {"linear": linear(1000), "cosine": cosine(1000), "raised_cosine": make_schedule("raised_cosine", 50)}


def chain(name: str, timesteps: int) -> list[mpmath.mpf]:
    """alpha_bar_t as it is written, for t = 0..T."""
    T = mpmath.mpf(timesteps)
    if name == "cosine":
        f = [mpmath.cos((t / T + mpmath.mpf("0.008")) / mpmath.mpf("1.008") * mpmath.pi / 2) ** 2 for t in range(1001)]
        beta = [min(1 - f[t] / f[t - 1], mpmath.mpf("0.999")) for t in range(1, 1001)]
    elif name == "linear":
        beta = [mpmath.mpf("1e-4") + (mpmath.mpf("0.02") - mpmath.mpf("1e-4")) * i / (T - 1) for i in range(timesteps)]
    else:
        beta = [(1 - mpmath.cos(mpmath.pi * t / T)) / 2 for t in range(1, timesteps + 1)]
    alpha_bar = [mpmath.mpf(1)]
    for b in beta:
        alpha_bar.append(alpha_bar[-1] * (1 - b))
    return alpha_bar


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("variance", ["posterior", "beta", "learned"])
def test_terms_are_those_of_mpmath(name, variance):
    """The KL of two Gaussians with the means and variances of Ho et al. 2020, eq. 6, 7, and the decoder."""
    schedule = SCHEDULES[name]
    T = schedule.timesteps
    alpha_bar = chain(name, T)
    rows = vlb_rows(schedule, "v", variance)
    pred, raw, x_t, x0 = 0.3, -0.4, 0.7, 40 / 127.5 - 1
    for t in (1, 2, 3, T // 2, T - 1, T):
        now, before = alpha_bar[t], alpha_bar[t - 1]
        beta = 1 - now / before
        posterior = (1 - before) / (1 - now) * beta
        x0hat = mpmath.sqrt(now) * x_t - mpmath.sqrt(1 - now) * pred
        low = posterior if t > 1 else (1 - alpha_bar[1]) / (1 - alpha_bar[2]) * (1 - alpha_bar[2] / alpha_bar[1])
        r = {"posterior": 0, "beta": 1, "learned": (mpmath.mpf(raw) + 1) / 2}[variance]
        var = mpmath.exp(mpmath.log(low) + r * (mpmath.log(beta) - mpmath.log(low)))
        if t == 1:
            want = nats_of(x0, x0hat, mpmath.sqrt(var))
        else:
            c, d = mpmath.sqrt(before) * beta / (1 - now), mpmath.sqrt(now / before) * (1 - before) / (1 - now)
            apart = (c * x0 + d * x_t) - (c * x0hat + d * x_t)
            want = (mpmath.log(var) - mpmath.log(posterior) - 1 + (posterior + apart**2) / var) / 2
        operands = (torch.full((1, 1), i, dtype=torch.float64) for i in (pred, x_t, x0))
        raws = torch.full((1, 1), raw, dtype=torch.float64) if variance == "learned" else None
        got = ops.vlb(*operands, t, rows, raw_variance=raws).item()
        assert got == pytest.approx(float(want), rel=1e-8, abs=1e-15), t


@pytest.mark.parametrize("objective", ["eps", "x0", "v", "score"])
def test_a_perfect_prediction_leaves_no_term(objective):
    """Of x_t = alpha x_0 + sigma eps every prediction gives the same x0hat; with the posterior variance the KL is 0."""
    schedule = linear(100)
    t = torch.arange(2, 101)
    alpha, sigma = schedule.alpha[t][:, None], schedule.sigma[t][:, None]
    x0, eps = torch.rand(2, len(t), 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    pred = targets(alpha, sigma, x0, eps)[objective]
    nats = ops.vlb(pred, alpha * x0 + sigma * eps, x0, t, vlb_rows(schedule, objective, "posterior"))
    assert nats.abs().max() < 1e-20
    beta = ops.vlb(pred, alpha * x0 + sigma * eps, x0, t, vlb_rows(schedule, objective, "beta"))
    assert bool((beta > 1e-9).all())


def test_rows_of_two_variances_and_one_level():
    learned, beta, posterior = (vlb_rows(linear(10), "eps", v) for v in ("learned", "beta", "posterior"))
    assert torch.equal(learned[1:, 3:5], torch.stack((posterior[1:, 3], beta[1:, 3]), 1))
    assert torch.equal(beta[1:, 3], beta[1:, 4]) and torch.equal(posterior[1:, 3], posterior[1:, 4])
    assert learned[0].isnan().all() and learned[1:, 5].tolist() == [1.0] + [0.0] * 9
    # The signal-to-noise ratio that the step gives back (Kingma et al. 2021, arXiv:2107.00630, eq. 13).
    snr = linear(10).snr
    assert torch.allclose(learned[2:, 2], snr[1:-1] - snr[2:], rtol=1e-12)
    single = vlb_rows(NoiseSchedule.from_betas(torch.tensor([0.3])), "x0", "learned")
    assert single[1, 3].item() == single[1, 4].item() == pytest.approx(math.log(0.3))


def test_rows_that_cannot_be():
    with pytest.raises(ValueError, match="variance: expected one of posterior, beta, learned, got 'fixed'"):
        vlb_rows(linear(10), "eps", "fixed")
    with pytest.raises(ValueError, match="objective: 'eps' cannot determine x_0 at level 50"):
        vlb_rows(SCHEDULES["raised_cosine"], "eps", "beta")


# --- the prior's term ---------------------------------------------------------------------------------------------

def test_prior_kl_of_each_sample():
    schedule = linear(1000)
    x0 = tensor((3, 2, 5)).cpu()
    got = prior_kl(schedule, x0.double())
    want = torch.tensor([schedule.prior_kl(x.double().square().mean().item()) for x in x0], dtype=torch.float64)
    assert got.dtype == torch.float64 and torch.allclose(got, want, rtol=1e-10)
    assert prior_kl(schedule, x0.bfloat16()).dtype == torch.float32
    # Ho et al. 2020 print about 1e-5 bits per dimension.
    assert prior_kl(schedule, torch.full((1, 4), 0.5).double()).item() / math.log(2) == pytest.approx(
        7.2787e-6, abs=5e-11
    )


def test_prior_kl_where_the_variance_grows():
    """Against N(0, sigma_T^2), from which sampling starts: 1/2 x_0^2 / sigma_T^2."""
    schedule = NoiseSchedule.from_alpha_sigma(torch.ones(3), torch.tensor([0.1, 1.0, 50.0]))
    assert prior_kl(schedule, torch.full((2, 4), 3.0).double()).tolist() == pytest.approx([4.5 / 2500] * 2)


# --- importance sampling ------------------------------------------------------------------------------------------

def filled(timesteps: int, salt: int = 0) -> tuple[LossSecondMoment, Tensor]:
    """With ten losses of each level, (T, 10), told in a mixed order."""
    losses = 5 * torch.rand(timesteps, 10, generator=torch.Generator().manual_seed(salt)) ** 3
    moments = LossSecondMoment(timesteps)
    order = torch.randperm(10 * timesteps, generator=torch.Generator().manual_seed(salt + 1))
    for part in order.split(7):
        moments.update(part // 10 + 1, losses.flatten()[part])
    return moments, losses


def test_levels_are_even_until_each_has_ten_losses():
    moments = LossSecondMoment(4)
    levels = torch.arange(1, 5)
    for _ in range(9):
        moments.update(levels, levels.float())
    moments.update(levels[:3], levels[:3].float())
    assert torch.equal(moments.probabilities(), torch.full((4,), 0.25))
    assert moments.sample(3)[1].tolist() == [1.0, 1.0, 1.0]
    moments.update(levels[3:], levels[3:].float())
    want = 0.999 * levels / 10 + 0.001 / 4
    assert torch.allclose(moments.probabilities(), want)


def test_probabilities_are_the_root_of_the_second_moment():
    moments, losses = filled(6)
    size = losses.double().square().mean(1).sqrt()
    assert torch.allclose(moments.probabilities().double(), 0.999 * size / size.sum() + 0.001 / 6, rtol=1e-6)
    torch.manual_seed(0)
    t, _ = moments.sample(200_000)
    drawn = torch.bincount(t, minlength=7)[1:] / 200_000
    p = moments.probabilities()
    assert t.min() >= 1 and bool(((drawn - p).abs() < 5 * (p / 200_000).sqrt()).all())


def test_the_estimate_is_unbiased():
    """The expectation over t, taken exactly, and a draw."""
    moments, losses = filled(6)
    term = losses.mean(1).double()
    p = moments.probabilities().double()
    torch.manual_seed(0)
    t, weights = moments.sample(200_000)
    expected = torch.zeros(6, dtype=torch.float64)
    expected[t - 1] = weights.double()  # what each level's weight is
    assert (p * expected * term).sum().item() == pytest.approx(term.mean().item(), rel=1e-6)
    assert (p * expected).sum().item() == pytest.approx(1.0, rel=1e-6)
    estimate = weights * term[t - 1]
    assert estimate.mean().item() == pytest.approx(term.mean().item(), abs=5 * estimate.std().item() / 200_000**0.5)


def test_only_the_last_ten_losses_of_a_level_count():
    """Also where a batch brings more of them at once, and with other levels and lost losses between them."""
    moments = LossSecondMoment(2)
    losses = torch.arange(1.0, 26)
    t = torch.where(torch.arange(25) % 6 == 5, 2, 1)
    losses[3], losses[9] = math.nan, math.inf
    for part in (slice(0, 4), slice(4, 25)):
        moments.update(t[part], losses[part])
    first = losses[(t == 1) & losses.isfinite()]
    assert sorted(moments.losses[0].tolist()) == first[-10:].tolist()
    assert moments.losses[1].tolist() == losses[t == 2].tolist() + [0.0] * 6
    assert moments.seen.tolist() == [len(first), 4]


def test_levels_without_loss_are_even():
    moments = LossSecondMoment(3)
    moments.update(torch.arange(30) % 3 + 1, torch.zeros(30))
    assert torch.equal(moments.probabilities(), torch.full((3,), 1 / 3))


def test_the_history_is_state():
    moments, _ = filled(5)
    other = LossSecondMoment(5)
    other.load_state_dict(moments.state_dict())
    assert torch.equal(other.probabilities(), moments.probabilities())
    assert list(moments.state_dict()) == ["losses", "seen"]
    with pytest.raises(ValueError, match="timesteps: expected an integer of at least 1, got 0"):
        LossSecondMoment(0)


def test_the_history_is_not_differentiated():
    moments = bound.LossSecondMoment(3)
    moments.update(torch.tensor([1, 2]), torch.ones(2, requires_grad=True))
    assert not moments.losses.requires_grad
