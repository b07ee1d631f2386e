"""Noise schedules against 60-digit arithmetic, published figures and the identities of Gaussian chains."""

import itertools
import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mpf

from fastdiff import schedule as schedules
from fastdiff.objective import OBJECTIVES, target_rows, weights, x0_rows
from fastdiff.schedule import SCHEDULES, NoiseSchedule, make_schedule

mpmath.mp.dps = 60
T = 1000


def exact_betas(name: str, n: int) -> list[mpf]:
    """beta_1..beta_n from the published formula; the constants are the float64 numbers that the code is given."""

    def between(low: mpf, high: mpf) -> list[mpf]:
        return [low + (high - low) * k / max(1, n - 1) for k in range(n)]

    def capped(alpha_bar: list[mpf]) -> list[mpf]:
        return [min(1 - after / before, mpf(0.999)) for before, after in itertools.pairwise(alpha_bar)]

    def logistic(x: mpf) -> mpf:
        return 1 / (1 + mpmath.exp(-x))

    if name == "linear":
        return between(mpf(1e-4), mpf(0.02))
    if name == "scaled_linear":
        return [root**2 for root in between(mpmath.sqrt(mpf(0.00085)), mpmath.sqrt(mpf(0.012)))]
    if name == "proportional":
        return [mpf(0.02) * t / n for t in range(1, n + 1)]
    if name == "raised_cosine":
        return [(1 - mpmath.cospi(mpf(t) / n)) / 2 for t in range(1, n + 1)]
    if name == "cosine":
        s = mpf(0.008)
        return capped([mpmath.cospi((mpf(t) / n + s) / (1 + s) / 2) ** 2 for t in range(n + 1)])
    end = logistic(mpf(3))
    return capped([(end - logistic(-3 + mpf(6) * t / n)) / (end - logistic(mpf(-3))) for t in range(n + 1)])


def products(betas: list[mpf]) -> list[mpf]:
    alpha_bar = [mpf(1)]
    for beta in betas:
        alpha_bar.append(alpha_bar[-1] * (1 - beta))
    return alpha_bar


def assert_close(got: torch.Tensor, expected: list[mpf], rel: float) -> None:
    for k, (g, e) in enumerate(zip(got.tolist(), expected, strict=True)):
        if math.isinf(g) and mpmath.isinf(e):
            assert (g > 0) == (e > 0), k
        else:
            assert abs(g - e) <= rel * abs(e), f"entry {k}: {g} is not {mpmath.nstr(e, 20)}"


# --- the named schedules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7, T])
@pytest.mark.parametrize("name", SCHEDULES)
def test_named_schedule_to_float64_precision(name, n):
    betas = exact_betas(name, n)
    alpha_bar = products(betas)
    made = make_schedule(name, n)
    assert made.timesteps == n and made.vp
    assert made.log_alpha.dtype == made.sigma.dtype == torch.float64
    log_alpha = [mpmath.log(a) / 2 if a > 0 else mpf("-inf") for a in alpha_bar]
    assert_close(made.log_alpha, log_alpha, 1e-11)
    assert_close(made.sigma, [mpmath.sqrt(1 - a) for a in alpha_bar], 1e-11)
    assert_close(made.betas, betas, 1e-11)
    t = torch.arange(1, n + 1)
    assert_close(made.transition(t, t - 1)[0], [mpmath.sqrt(1 - beta) for beta in betas], 1e-11)


def test_linear_figures():
    linear = schedules.linear(T)
    assert linear.alpha_bar[-1].item() == pytest.approx(4.0358e-5, rel=0.5e-4 / 4.0358)
    assert linear.snr[-1].item() == pytest.approx(4.035993e-05, abs=0.5e-11)
    assert schedules.scaled_linear(T).snr[-1].item() == pytest.approx(0.004682, abs=0.5e-6)


def test_proportional_leaves_most_of_the_signal():
    assert schedules.proportional(50).alpha_bar[-1].item() == pytest.approx(0.598, abs=0.5e-3)


def test_raised_cosine_ends_in_exactly_no_signal():
    made = schedules.raised_cosine(T)
    assert made.betas[-1] == 1 and made.alpha[-1] == 0 and made.sigma[-1] == 1 and made.alpha_bar[-1] == 0
    assert 2 * made.log_alpha[-2].item() == pytest.approx(math.log(T) + (1 - T) * math.log(4), rel=1e-9)
    assert made.snr[-1] == 0 and made.log_snr[-1] == -math.inf
    assert made.prior_kl(0.25) == 0
    # near the end alpha_t / alpha_{t-1} = sin(pi (T - t) / 2T) keeps its digits, which 1 - sin^2 would not
    long = schedules.raised_cosine(10**5)
    t = 10**5 - torch.tensor([1, 2, 10])
    expected = [mpmath.sin(mpmath.pi * k / (2 * 10**5)) for k in (1, 2, 10)]
    assert_close(long.transition(t, t - 1)[0], expected, 1e-9)


@pytest.mark.parametrize("weighting", ["simple", "min_snr"])
@pytest.mark.parametrize("objective", ["x0", "v"])
def test_raised_cosine_is_finite_everywhere(objective, weighting):
    made = schedules.raised_cosine(T)
    everything = [made.alpha, made.sigma, *x0_rows(made, objective), *target_rows(made, objective)]
    everything.append(weights(made, objective, weighting))
    t = torch.arange(1, T + 1)
    everything += [*made.transition(t, t - 1), *made.posterior(t, t - 1)]
    # a step from pure noise to every level
    everything += [*made.transition(torch.full_like(t, T)[:-1], t[:-1]), *made.posterior(t[-1:], t[:1] - 1)]
    for row in everything:
        assert row.isfinite().all()
        assert row.float().isfinite().all()


def test_level_zero_is_data():
    for name in SCHEDULES:
        made = make_schedule(name, 10)
        assert made.alpha[0] == 1 and made.sigma[0] == 0 and made.snr[0] == math.inf
        assert math.copysign(1, made.sigma[0].item()) == 1


def test_prior_kl():
    bits = schedules.linear(T).prior_kl(second_moment=0.25) / math.log(2)
    assert bits == pytest.approx(7.2787e-6, rel=0.5e-4 / 7.2787)
    signal = products(exact_betas("linear", T))[-1]
    for moment in (0.25, 1.0, 3.0):
        expected = (-signal + signal * mpf(moment) - mpmath.log(1 - signal)) / 2
        assert schedules.linear(T).prior_kl(moment) == pytest.approx(float(expected), rel=1e-9)
    spread = NoiseSchedule.from_alpha_sigma([1.0, 0.5], [0.1, 2.0])
    assert spread.prior_kl(0.7) == pytest.approx(0.5 * 0.25 * 0.7 / 4, rel=1e-12)  # the prior has sigma = 2 too


# --- given by values --------------------------------------------------------------------------------------------


def test_from_betas_round_trip():
    betas = torch.tensor([1e-12, 3e-5, 0.2, 0.9, 1.0], dtype=torch.float64)
    made = NoiseSchedule.from_betas(betas)
    torch.testing.assert_close(made.betas, betas, rtol=1e-6, atol=0)
    torch.testing.assert_close(made.betas[1:], betas[1:], rtol=1e-11, atol=0)
    # a single tiny beta survives, where 1 - alpha_bar would be 0
    assert NoiseSchedule.from_betas(torch.tensor([1e-30])).sigma[1].item() == pytest.approx(1e-15, rel=1e-6)
    assert torch.equal(NoiseSchedule.from_betas(betas.tolist()).sigma, made.sigma)


def test_from_alpha_sigma_round_trip_and_agreement_with_vp():
    vp = schedules.raised_cosine(20)
    made = NoiseSchedule.from_alpha_sigma(vp.alpha[1:], vp.sigma[1:])
    assert not made.vp and made.timesteps == 20
    torch.testing.assert_close(made.alpha, vp.alpha, rtol=1e-14, atol=0)
    assert torch.equal(made.sigma[1:], vp.sigma[1:]) and made.sigma[0] == 0
    t = torch.arange(1, 21)
    for s in (t - 1, t // 2):
        for got, expected in zip(made.posterior(t, s), vp.posterior(t, s), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)


def test_variance_exploding_chain():
    """alpha = 1: beta_ts = sigma_t^2 - sigma_s^2, and the posterior is the bridge between x_0 and x_t."""
    sigma = torch.tensor([0.01, 0.5, 3.0, 50.0], dtype=torch.float64)
    made = NoiseSchedule.from_alpha_sigma(torch.ones(4), sigma)
    var = torch.cat((torch.zeros(1), sigma)) ** 2
    torch.testing.assert_close(made.betas, var.diff(), rtol=1e-12, atol=0)
    t, s = torch.tensor([4, 4, 2]), torch.tensor([3, 0, 1])
    c, d, v = made.posterior(t, s)
    torch.testing.assert_close(d, var[s] / var[t], rtol=1e-12, atol=0)
    torch.testing.assert_close(c, 1 - var[s] / var[t], rtol=1e-12, atol=0)
    torch.testing.assert_close(v, var[s] * (var[t] - var[s]) / var[t], rtol=1e-12, atol=0)


def test_make_schedule_takes_names_values_and_schedules():
    made = make_schedule("linear", 30)
    assert make_schedule(made, 30) is made
    torch.testing.assert_close(make_schedule(made.betas, 30).log_alpha, made.log_alpha, rtol=1e-12, atol=0)


# --- identities -------------------------------------------------------------------------------------------------

# A float64 sum of logarithms keeps beta to about 1e-16 sum(beta) / beta.
chains = st.one_of(
    st.lists(st.floats(1e-4, 0.999), min_size=2, max_size=12),
    st.lists(st.floats(1e-14, 1e-11), min_size=2, max_size=12),
)
identities = settings(deadline=None)


def pairs(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All levels s < t of 0..n."""
    t, s = torch.tril_indices(n + 1, n + 1, offset=-1)
    return t, s


@identities
@given(chains)
def test_chain_identities(betas):
    made = NoiseSchedule.from_betas(torch.tensor(betas, dtype=torch.float64))
    alpha, sigma = made.alpha, made.sigma
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=1e-14, atol=0)
    t, s = pairs(len(betas))
    alpha_ts, beta_ts = made.transition(t, s)
    torch.testing.assert_close(alpha_ts * alpha[s], alpha[t], rtol=1e-12, atol=0)
    torch.testing.assert_close(beta_ts + alpha_ts**2 * sigma[s] ** 2, sigma[t] ** 2, rtol=1e-9, atol=1e-16)
    # through any level u in between
    u = (t + s) // 2
    first, second = made.transition(t, u)[0], made.transition(u, s)[0]
    torch.testing.assert_close(first * second, alpha_ts, rtol=1e-12, atol=0)
    c, d, var = made.posterior(t, s)
    # the posterior mean maps the mean of x_t to that of x_s, and its variances add up
    torch.testing.assert_close(c + d * alpha[t], alpha[s], rtol=1e-9, atol=0)
    torch.testing.assert_close(var + d**2 * sigma[t] ** 2, sigma[s] ** 2, rtol=1e-9, atol=1e-30)


@identities
@given(chains)
def test_posterior_is_gaussian_conditioning(betas):
    """x_t as a vector of coefficients of (x_0, eps_1, .., eps_T), built step by step; then condition by covariances."""
    made = NoiseSchedule.from_betas(torch.tensor(betas, dtype=torch.float64))
    n = len(betas)
    x = [[mpf(1)] + [mpf(0)] * n]
    for k, beta in enumerate(betas):
        x.append([mpmath.sqrt(1 - mpf(beta)) * value for value in x[-1]])
        x[-1][k + 1] = mpmath.sqrt(mpf(beta))

    def cov(i: int, j: int) -> mpf:
        return sum(a * b for a, b in zip(x[i][1:], x[j][1:], strict=True))

    t, s = pairs(n)
    c, d, var = made.posterior(t, s)
    gain = [cov(i, j) / cov(i, i) for i, j in zip(t.tolist(), s.tolist(), strict=True)]
    assert_close(d, gain, 1e-9)
    ts = list(zip(t.tolist(), s.tolist(), gain, strict=True))
    assert_close(c, [x[j][0] - g * x[i][0] for i, j, g in ts], 1e-9)
    assert_close(var, [cov(j, j) - g * cov(i, j) for i, j, g in ts], 1e-9)


@identities
@given(chains)
def test_objectives_are_inverse_to_noising(betas):
    """x_0 = a x_t + b y with y = p x_0 + q z and x_t = alpha x_0 + sigma z, for every x_0 and z."""
    made = NoiseSchedule.from_betas(torch.tensor(betas, dtype=torch.float64))
    for objective in OBJECTIVES:
        (p, q), (a, b) = target_rows(made, objective), x0_rows(made, objective)
        level = slice(1 if objective == "score" else 0, None)  # the score of data is not that of any noise
        gain = 1e-13 * (a.abs() + b.abs() + 1)
        assert ((a * made.alpha + b * p - 1).abs() <= gain)[level].all()
        assert ((a * made.sigma + b * q).abs() <= gain)[level].all()


def test_v_determines_x0_where_the_variance_is_not_kept():
    """From x_t = alpha x_0 + sigma z and v = alpha z - sigma x_0: x_0 = (alpha x_t - sigma v) / (alpha^2 + sigma^2)."""
    made = NoiseSchedule.from_alpha_sigma([1.0, 0.5, 0.0], [0.2, 3.0, 2.0])
    (p, q), (a, b) = target_rows(made, "v"), x0_rows(made, "v")
    torch.testing.assert_close(a * made.alpha + b * p, torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(a * made.sigma + b * q, torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("objective", ["eps", "x0", "v"])
def test_min_snr_weights(objective):
    """Hang et al. 2023, section 3.4: min(SNR, 5) on x_0, min(SNR, 5)/SNR on eps, min(SNR, 5)/(SNR + 1) on v."""
    alpha_bar = products(exact_betas("linear", T))[1:]
    snr = [a / (1 - a) for a in alpha_bar]
    error = {"eps": snr, "x0": [mpf(1)] * T, "v": [r + 1 for r in snr]}[objective]
    made = schedules.linear(T)
    got = weights(made, objective, "min_snr")[1:]
    assert_close(got, [min(r, mpf(5)) / e for r, e in zip(snr, error, strict=True)], 1e-9)
    assert torch.equal(weights(made, objective, "simple"), torch.ones(T + 1, dtype=torch.float64))
    end = {"eps": 1.0, "x0": 0.0, "v": 0.0}[objective]
    assert weights(schedules.raised_cosine(T), objective, "min_snr")[-1] == end


# --- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("betas", "said"),
    [
        ([], "betas: expected a non-empty 1-D sequence"),
        ([[0.1, 0.2]], r"betas: .* got shape \(1, 2\)"),
        ([0.1, 0.0], r"betas: expected values in \(0, 1\], got 0.0"),
        ([0.1, -0.5], r"betas: .* got -0.5"),
        ([1.5], r"betas: .* got 1.5"),
        ([0.1, math.nan], r"betas: .* got nan"),
        ([0.1, 1.0, 0.1], "betas: 1 removes all signal"),
    ],
)
def test_wrong_betas(betas, said):
    with pytest.raises(ValueError, match=said):
        NoiseSchedule.from_betas(betas)


@pytest.mark.parametrize("betas", [None, ["a"], object()])
def test_betas_of_wrong_type(betas):
    with pytest.raises(TypeError, match="betas: expected numbers"):
        NoiseSchedule.from_betas(betas)
    with pytest.raises(TypeError, match="betas: expected numbers"):
        make_schedule(betas, 1000)


@pytest.mark.parametrize(
    ("alpha", "sigma", "said"),
    [
        ([], [], "alpha, sigma: expected two equal non-empty 1-D shapes"),
        ([1.0], [1.0, 2.0], r"alpha, sigma: .* got \(1,\) and \(2,\)"),
        ([[1.0]], [[1.0]], "alpha, sigma: expected two equal"),
        ([1.1], [1.0], "alpha: expected values in"),
        ([-0.1], [1.0], "alpha: expected values in"),
        ([math.nan], [1.0], "alpha: expected values in"),
        ([0.5, 0.6], [0.5, 0.6], "alpha: .* never increase"),
        ([1.0], [0.0], "sigma: expected finite values above 0"),
        ([1.0], [math.inf], "sigma: expected finite values above 0"),
        ([1.0], [math.nan], "sigma: expected finite values above 0"),
        ([1.0, 1.0], [0.5, 0.5], "sigma / alpha: expected strictly increasing"),
        ([0.1, 0.0, 0.0], [1.0, 1.0, 2.0], "sigma / alpha: expected strictly increasing"),
    ],
)
def test_wrong_alpha_sigma(alpha, sigma, said):
    with pytest.raises(ValueError, match=said):
        NoiseSchedule.from_alpha_sigma(alpha, sigma)


@pytest.mark.parametrize("log_alpha_bar", [[], [0.0], [-0.1, -0.2], [0.0, -1.0, -0.5], [0.0, math.nan], [[0.0, -1.0]]])
def test_wrong_log_alpha_bar(log_alpha_bar):
    with pytest.raises(ValueError, match="log_alpha_bar: expected"):
        NoiseSchedule.from_log_alpha_bar(torch.tensor(log_alpha_bar))


@pytest.mark.parametrize("name", schedules.SCHEDULES)
@pytest.mark.parametrize("timesteps", [0, -1, 2.5])
def test_a_schedule_names_a_wrong_number_of_steps(name, timesteps):
    with pytest.raises(ValueError, match="timesteps: expected an integer of at least 1"):
        schedules.SCHEDULES[name](timesteps)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: schedules.linear(3, 0.5, 2.0), "beta_end: expected a number in"),
        (lambda: schedules.scaled_linear(3, -1.0), "beta_start: expected a number in"),
        (lambda: schedules.cosine(3, s=-0.1), "s: expected a number of at least 0"),
        (lambda: schedules.sigmoid(3, 1.0, 1.0), "start, end: expected start below end"),
    ],
)
def test_a_schedule_names_a_wrong_option(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_wrong_schedule_options():
    with pytest.raises(ValueError, match=r"schedule: expected one of linear, .* got 'linnear'"):
        make_schedule("linnear", 10)
    for timesteps in (0, -1, 10.0, True, "10", None):
        with pytest.raises(ValueError, match="timesteps: expected an integer of at least 1"):
            make_schedule("linear", timesteps)
    with pytest.raises(ValueError, match="timesteps: expected 3, the length of the given schedule, got 1000"):
        make_schedule(torch.full((3,), 0.1), 1000)
    with pytest.raises(ValueError, match="timesteps: expected 3"):
        make_schedule(schedules.linear(3), 4)
    for max_beta in (0.0, -1.0, 1.0, 2.0, math.nan):
        for made in (schedules.cosine, schedules.sigmoid):
            with pytest.raises(ValueError, match="max_beta: expected a number between 0 and 1"):
                made(10, max_beta=max_beta)
    with pytest.raises(ValueError, match="start, end: expected start below end, got 3"):
        schedules.sigmoid(10, start=3.0, end=-3.0)
