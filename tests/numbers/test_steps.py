"""Step tables: whole samplers on Gaussian data, where the exact prediction makes every sampler an affine map."""

import functools
import itertools
import math
import re

import mpmath
import pytest
import torch
from gaussian import MEAN, STD, exact, moments
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mpf
from objectives import CLASSIC, targets
from torch import Tensor

from fastdiff import DDPM, reference, schedule, steps
from fastdiff.objective import OBJECTIVES
from fastdiff.rows import WIDTH, columns, make_rows
from fastdiff.schedule import NoiseSchedule, grid, make_schedule
from fastdiff.steps import LOG_ZERO, StepTable

mpmath.mp.dps = 60
T = 1000


@functools.cache
def outcome(
    name: str, objective: str, variance: str, n: int, sampler: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the samples from x_T ~ N(0, 1), without chance."""
    ddpm = exact(DDPM, name, T, objective, variance=variance, dtype=dtype)
    return moments(ddpm, sampler, n)


@functools.cache
def recursion(name: str, variance: str, n: int, sampler: str, eta: float = 0.0) -> tuple[list[float], list[float]]:
    """The same for N(MEAN, STD^2) from the published formulas in 60 digits: x_s = E + f z with E affine in x_t,
    dimension by dimension."""
    alpha_bar = [mpmath.exp(2 * mpf(value)) for value in make_schedule(name, T).log_alpha.tolist()]
    levels = [int(mpmath.nint(mpf(T) * k / n)) for k in range(n, -1, -1)]
    means, stds = [], []
    for m, s in zip(MEAN, STD, strict=True):
        m, s = mpf(m), mpf(s)
        mean, var = mpf(0), mpf(1)
        for t, u in itertools.pairwise(levels):
            a_t, a_u = mpmath.sqrt(alpha_bar[t]), mpmath.sqrt(alpha_bar[u])
            var_t, var_u, beta = 1 - alpha_bar[t], 1 - alpha_bar[u], 1 - alpha_bar[t] / alpha_bar[u]
            gain = a_t * s**2 / (alpha_bar[t] * s**2 + var_t)  # x0hat = m + gain (x - a_t m)
            if sampler == "ddpm":  # x_u given x_t and x_0 by regression on x_t
                f2 = (beta if variance == "beta" else beta * var_u / var_t) if u else mpf(0)
                on_x = a_t / a_u * var_u / var_t
            else:
                f2 = eta**2 * var_u / var_t * beta
                on_x = mpmath.sqrt((var_u - f2) / var_t)
            on_x0 = a_u - a_t * on_x
            mean = on_x0 * (m + gain * (mean - a_t * m)) + on_x * mean
            var = (on_x0 * gain + on_x) ** 2 * var + f2
        means.append(float(mean))
        stds.append(float(mpmath.sqrt(var)))
    return means, stds


RUNS = {
    # schedule, variance, steps, sampler: the final standard deviations for STD
    ("linear", "posterior", T, "ddpm"): (0.496110, 0.096311, 0.995524, 0.016340),
    ("linear", "beta", T, "ddpm"): (0.500752, 0.100766, 0.999950, 0.019427),
    ("proportional", "beta", T, "ddpm"): (0.500832, 0.101132, 0.999990, 0.020820),
    ("raised_cosine", "posterior", T, "ddpm"): (0.490659, 0.095213, 0.986019, 0.017576),
    ("linear", "posterior", 50, "ddpm"): (0.444100, 0.068253, 0.925966, 0.004993),
    ("linear", "posterior", 50, "ddim"): (0.471403, 0.074173, 0.963551, 0.005038),
}
CASES = [(*run, objective) for run in RUNS for objective in CLASSIC if run[0] != "raised_cosine" or objective in "x0 v"]


# --- whole samplers ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "variance", "n", "sampler", "objective"), CASES)
def test_sampler_on_gaussian_data(name, variance, n, sampler, objective):
    mean, std = outcome(name, objective, variance, n, sampler, torch.float64)
    expected_mean, expected_std = recursion(name, variance, n, sampler)
    assert std.tolist() == pytest.approx(expected_std, rel=1e-9)
    assert mean.tolist() == pytest.approx(expected_mean, rel=1e-9, abs=1e-12)
    assert std.tolist() == pytest.approx(RUNS[name, variance, n, sampler], abs=0.5e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize(("name", "variance", "n", "sampler", "objective"), CASES)
def test_sampler_in_float32(name, variance, n, sampler, objective):
    mean, std = outcome(name, objective, variance, n, sampler, torch.float32)
    expected_mean, expected_std = recursion(name, variance, n, sampler)
    assert std.tolist() == pytest.approx(expected_std, rel=1e-3)
    assert mean.tolist() == pytest.approx(expected_mean, rel=1e-3, abs=1e-5)


def test_respaced_ancestral_is_ddim_with_eta_1():
    assert recursion("linear", "posterior", 50, "ddim", 1.0)[1] == pytest.approx(
        RUNS["linear", "posterior", 50, "ddpm"], abs=0.5e-6
    )


def test_ddim_is_first_order():
    """Halving the step size halves the distance to the exact flow."""
    limit = torch.tensor(STD[:3])
    errors = [limit - outcome("linear", "v", "posterior", n, "ddim", torch.float64)[1][:3] for n in (25, 50, 100, 200)]
    for coarse, fine in itertools.pairwise(errors):
        assert ((coarse / fine > 1.7) & (coarse / fine < 2.2)).all()


# --- rows -------------------------------------------------------------------------------------------------------

betas = st.lists(st.floats(1e-4, 0.99), min_size=1, max_size=10)
rules = settings(deadline=None)


def some_levels(n: int, mask: int) -> Tensor:
    """n, those levels below n whose bit is set, and 0."""
    return torch.tensor([t for t in range(n, -1, -1) if t in (0, n) or mask >> t & 1])


@rules
@given(betas, st.integers(0, 1023), st.sampled_from(list(OBJECTIVES)), st.floats(0, 1))
def test_every_row_keeps_the_marginals(values, mask, objective, eta):
    """With the true x_0, x_t = alpha_t x_0 + sigma_t eps becomes alpha_s x_0 + q eps + f z with q^2 + f^2 = sigma_s^2;
    and for one x_0 that is Bayes' rule where eta = 1."""
    made = NoiseSchedule.from_betas(values)
    levels = some_levels(len(values), mask)
    t, s = levels[:-1], levels[1:]
    alpha, sigma = made.alpha, made.sigma
    clip = 1.0 if objective in ("eps", "score") else None
    tables = [steps.ancestral(made, levels, objective, clip), steps.ddim(made, levels, objective, clip, eta)]
    zero, one = 0 * alpha, 1 + 0 * alpha
    p, q = targets(alpha, sigma, one, zero)[objective], targets(alpha, sigma, zero, one)[objective]
    for table in tables:
        row = columns(table.rows)
        gain = 1e-13 * (row.x0_from_x.abs() + row.x0_from_pred.abs() + 1)
        assert ((row.x0_from_x * alpha[t] + row.x0_from_pred * p[t] - 1).abs() <= gain).all()
        assert ((row.x0_from_x * sigma[t] + row.x0_from_pred * q[t]).abs() <= gain).all()
        torch.testing.assert_close(row.from_x0 + row.from_x * alpha[t], alpha[s], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close((row.from_x * sigma[t]) ** 2 + row.noise**2, sigma[s] ** 2, rtol=1e-9, atol=1e-12)
        assert (row.from_pred == 0).all() and (row.from_hist == 0).all() and (row.guidance == 1).all()
        assert (row.noise[s == 0] == 0).all() and table.keep == "none" and len(table) == len(t)
        assert torch.equal(table.levels, levels)
    ancestral, same = tables[0], steps.ddim(made, levels, objective, clip, 1.0)
    torch.testing.assert_close(same.rows, ancestral.rows, rtol=1e-6, atol=1e-7)


def test_noisy_says_whether_noise_is_added():
    made = schedule.linear(10)
    assert steps.ancestral(made, grid(10, None), "x0").noisy
    assert not steps.ancestral(made, grid(10, 1), "x0").noisy
    assert not steps.ddim(made, grid(10, None), "x0").noisy
    assert steps.ddim(made, grid(10, None), "x0", eta=0.1).noisy
    assert not steps.ddim(made, grid(10, 1), "x0", eta=1.0).noisy


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_learned_variance_reaches_from_posterior_to_beta(objective):
    """raw = -1 gives beta~, raw = 1 gives beta, raw = 0 their geometric mean; nothing at the step to level 0."""
    made, levels = schedule.cosine(6), grid(6, None)
    tables = {name: steps.ancestral(made, levels, objective, 1.0, name) for name in steps.VARIANCES}
    learned = tables["learned"].rows
    assert columns(learned).noise[-1] == columns(learned).noise_high[-1] == LOG_ZERO
    g = torch.Generator().manual_seed(0)
    x, pred, z = torch.randn(3, 6, 5, generator=g, dtype=torch.float64)
    step = torch.arange(6)

    def apply(rows: Tensor, raw: Tensor | None, noise: Tensor = z) -> Tensor:
        none = (None, None, None)
        return reference.update(x, pred, rows, step, *none, raw, noise, None, 1.0, "none", 2)[0]

    base = apply(learned, torch.zeros_like(x), 0 * z)
    low, middle, high = (apply(learned, torch.full_like(x, raw)) for raw in (-1.0, 0.0, 1.0))
    torch.testing.assert_close(low, apply(tables["posterior"].rows, None), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(high, apply(tables["beta"].rows, None), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((middle - base) ** 2, (low - base) * (high - base), rtol=1e-9, atol=1e-12)
    assert math.exp(LOG_ZERO) < torch.finfo(torch.float32).smallest_normal * 2**-24


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_denoise_rows(objective):
    """Row t turns x_t and the true prediction into x_0; where eps does not determine it, the row is NaN."""
    made = schedule.raised_cosine(8)
    rows = steps.denoise_rows(made, objective)
    assert rows.shape == (9, WIDTH)
    g = torch.Generator().manual_seed(0)
    x0, z = torch.randn(2, 9, 5, generator=g, dtype=torch.float64)
    alpha, sigma = made.alpha[:, None], made.sigma[:, None]
    pred = targets(alpha, sigma, x0, z)[objective]
    args = (alpha * x0 + sigma * z, pred, rows, torch.arange(9))
    got = reference.update(*args, None, None, None, None, z, None, None, "none", 2)[0]
    known = slice(1 if objective == "score" else 0, 8 if objective in ("eps", "score") else 9)
    torch.testing.assert_close(got[known], x0[known], rtol=1e-9, atol=1e-9)
    assert rows[known].isfinite().all() and got[known.stop :].isnan().all() and rows[known.stop :].isnan().all()


def test_raised_cosine_steps_out_of_pure_noise():
    """From alpha_T = 0, x_T says nothing: its coefficient is 0 and the step is a draw from q(x_s | x0hat)."""
    made = schedule.raised_cosine(T)
    for s in (0, 1, 500, T - 1):
        for objective in ("x0", "v"):
            row = columns(steps.ancestral(made, torch.tensor([T, s]), objective).rows[0])
            assert row.x0_from_x == 0 and abs(row.x0_from_pred) == 1 and row.from_x == 0
            assert row.from_x0 == made.alpha[s] and row.noise == made.sigma[s]


def test_rows_by_the_names_of_their_columns():
    """Columns are views, what is not named is 0, and a name that is no column is refused."""
    rows = make_rows(torch.zeros(3), torch.float64, noise=torch.tensor([1.0, 2.0, 3.0]), from_x=0.5)
    assert rows.shape == (3, WIDTH) and rows.dtype == torch.float64
    assert columns(rows).noise.tolist() == [1, 2, 3] and columns(rows).from_x.tolist() == [0.5] * 3
    assert rows.sum() == 7.5
    columns(rows).guidance.fill_(2.0)
    assert rows.sum() == 13.5
    with pytest.raises(ValueError, match=r"from_x0: expected a number for each of 2 steps, got \(11,\)"):
        steps.make_table(schedule.linear(10), torch.tensor([10, 5, 0]), from_x0=schedule.linear(10).alpha)
    with pytest.raises(TypeError, match=r"scale: expected a column, one of x0_from_x, .*guidance"):
        make_rows(torch.zeros(3), scale=1.0)


# --- grid -------------------------------------------------------------------------------------------------------


def test_grid():
    for timesteps in [*range(1, 40), T]:
        for n in {1, 2, 3, 7, 20, 50, timesteps - 1, timesteps} & set(range(1, timesteps + 1)):
            levels = grid(timesteps, n)
            assert levels.dtype == torch.int64
            for k, level in enumerate(levels.tolist()):
                assert abs(2 * level * n - 2 * timesteps * (n - k)) <= n  # |level - T (n - k) / n| <= 1 / 2
            assert (levels.diff() < 0).all() and levels[0] == timesteps and levels[-1] == 0
    assert torch.equal(grid(T, None), torch.arange(T, -1, -1))
    assert grid(T, 50)[:3].tolist() == [1000, 980, 960]


@pytest.mark.parametrize("n", [0, -1, 11, 5.0, True, "5"])
def test_grid_refuses(n):
    with pytest.raises(ValueError, match=f"steps: expected an integer from 1 to 10, got {n!r}"):
        grid(10, n)


# --- errors -----------------------------------------------------------------------------------------------------

SAMPLERS = pytest.mark.parametrize("sampler", [steps.ancestral, steps.ddim])


@SAMPLERS
@pytest.mark.parametrize("clip", [None, 1.0])
def test_eps_is_refused_where_it_cannot_determine_x0(sampler, clip):
    made = schedule.raised_cosine(10)
    with pytest.raises(ValueError, match=r"objective: 'eps' cannot determine x_0 at level 10, where alpha = 0;"):
        sampler(made, grid(10, None), "eps", clip)
    sampler(made, torch.tensor([9, 4, 0]), "eps", clip)
    for objective in ("x0", "v"):
        sampler(made, grid(10, None), objective, clip)
    # alpha = 10^-38.05 is below what float32 holds in full
    tiny = NoiseSchedule.from_log_alpha_bar(torch.tensor([0.0, -76.1 * math.log(10)], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"level 1, where alpha = 8\.9"):
        sampler(tiny, torch.tensor([1, 0]), "eps", clip)


@SAMPLERS
def test_unclipped_eps_is_refused_beyond_float32(sampler):
    """The gain alpha_s / alpha_t of one step, here 1.01e5 and 0.99e5."""
    lost, kept = (NoiseSchedule.from_log_alpha_bar([0.0, -0.1, -0.1 - 2 * math.log(gain)]) for gain in (1.01e5, 0.99e5))
    levels = torch.tensor([2, 1, 0])
    with pytest.raises(ValueError, match=r"objective: 'eps' without clip loses x_0 from level 2 to 1, .* 1\.01e\+05"):
        sampler(lost, levels, "eps")
    sampler(lost, levels, "eps", 1.0)
    sampler(lost, levels, "x0")
    sampler(kept, levels, "eps")


def test_eta_out_of_range():
    made, levels = schedule.linear(T), grid(T, None)
    for eta in (-0.1, -1e-9, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"eta: expected a finite number of at least 0, got {re.escape(str(eta))}"):
            steps.ddim(made, levels, "eps", eta=eta)
    with pytest.raises(ValueError, match=r"eta: 1\.5 asks for more noise than a level holds"):
        steps.ddim(made, levels, "eps", eta=1.5)
    steps.ddim(made, levels, "eps", eta=1.0)


def test_rows_beyond_float32():
    weak = NoiseSchedule.from_alpha_sigma([1.0, 1e-37], [0.5, 100.0])
    with pytest.raises(ValueError, match=r"steps: the step from level 2 to 1 has coefficients beyond float32: \[1"):
        steps.ancestral(weak, torch.tensor([2, 1, 0]), "eps", 1.0)
    for value in (math.inf, math.nan, 1e39):
        rows = make_rows(torch.zeros(2, dtype=torch.float64), from_x=torch.tensor([0.0, value]))
        with pytest.raises(ValueError, match="steps: the step from level 5 to 0 has coefficients beyond float32"):
            StepTable(torch.tensor([7, 5, 0]), rows, noisy=False)
