"""Samplers of every formulation on Gaussian data: final moments against the published recursions in mpmath, and orders
of convergence. tests/test_steps.py has the same for the ancestral and DDIM steps of chains."""

import functools
import itertools
import math
from collections.abc import Callable

import mpmath
import pytest
import torch
from gaussian import MEAN, STD, exact, moments
from mpmath import mpf
from objectives import CLASSIC
from torch import Tensor

from fastdiff import DDPM, NCSN, ScoreSDE, steps
from fastdiff.process import VE, VP, Ladder
from fastdiff.steps import SAMPLERS

mpmath.mp.dps = 40
N = 1000
Moments = tuple[list[float], list[float]]


# --- published recursions, one dimension at a time ----------------------------------------------------------------


def for_each_dimension(rule: Callable[[mpf, mpf], tuple[mpf, mpf]]) -> Moments:
    found = [rule(mpf(m), mpf(s) ** 2) for m, s in zip(MEAN, STD, strict=True)]
    return [float(mean) for mean, _ in found], [float(mpmath.sqrt(var)) for _, var in found]


@functools.cache
def at(kind: str, t: mpf) -> tuple[mpf, mpf, mpf, mpf]:
    """(alpha, sigma^2, f, g^2) of the SDEs of Song et al. 2021 (eq. 29 to 33) with their constants."""
    if kind == "ve":
        var = (mpf(0.01) * mpf(5000) ** t) ** 2
        return mpf(1), var, mpf(0), 2 * var * mpmath.log(mpf(5000))
    low, high = mpf(0.1), mpf(20)
    beta, total = low + t * (high - low), low * t + (high - low) * t**2 / 2
    kept = mpmath.exp(-total)
    if kind == "vp":
        return mpmath.sqrt(kept), 1 - kept, -beta / 2, beta
    return mpmath.sqrt(kept), (1 - kept) ** 2, -beta / 2, beta * (1 - kept**2)


def score(alpha: mpf, var_t: mpf, m: mpf, var: mpf) -> tuple[mpf, mpf]:
    """(h, k) of the score h + k x of N(alpha m, alpha^2 var + var_t)."""
    return alpha * m / (alpha**2 * var + var_t), -1 / (alpha**2 * var + var_t)


def denoised(mean: mpf, spread: mpf, alpha: mpf, var_t: mpf, m: mpf, var: mpf) -> tuple[mpf, mpf]:
    h, k = score(alpha, var_t, m, var)
    gain = (1 + var_t * k) / alpha
    return gain * mean + var_t * h / alpha, gain**2 * spread


def euler(kind: str, first: float, flow: bool) -> Moments:
    """Euler-Maruyama for the reverse SDE with a last denoising step, or Euler for the probability-flow ODE (Song et al.
    2021, eq. 6, 13), at the times linspace(1, first, N + 1)."""

    def rule(m: mpf, var: mpf) -> tuple[mpf, mpf]:
        dt = (1 - mpf(first)) / N
        mean, spread = mpf(0), mpf(1) if kind == "vp" else at(kind, mpf(1))[1]
        for i in range(N):
            alpha, var_t, f, g2 = at(kind, 1 - i * dt)
            h, k = score(alpha, var_t, m, var)
            on_score = g2 / 2 if flow else g2
            gain = 1 - (f - on_score * k) * dt
            mean, spread = gain * mean + on_score * h * dt, gain**2 * spread + (0 if flow else g2 * dt)
        return (mean, spread) if flow else denoised(mean, spread, *at(kind, mpf(first))[:2], m, var)

    return for_each_dimension(rule)


def ladder(high: float, levels: int) -> list[mpf]:
    low = mpf(0.01)
    return [low * (mpf(high) / low) ** (mpf(i) / (levels - 1)) for i in range(levels)]


def ve_ancestral() -> Moments:
    """x_{i-1} = x_i + d s(x_i) + sqrt(d sigma_{i-1}^2 / sigma_i^2) z, d = sigma_i^2 - sigma_{i-1}^2 (Song et al. 2021,
    eq. 47), down to sigma_0 = 0."""
    sigma = [mpf(0), *ladder(50.0, N)]

    def rule(m: mpf, var: mpf) -> tuple[mpf, mpf]:
        mean, spread = mpf(0), sigma[-1] ** 2
        for i in range(N, 0, -1):
            here, below = sigma[i] ** 2, sigma[i - 1] ** 2
            h, k = score(mpf(1), here, m, var)
            gain = 1 + (here - below) * k
            mean, spread = gain * mean + (here - below) * h, gain**2 * spread + (here - below) * below / here
        return mean, spread

    return for_each_dimension(rule)


def langevin() -> Moments:
    """x <- x + e s(x) + sqrt(2 e) z, e = 2e-5 sigma_i^2 / sigma_min^2, 100 times at each of 10 levels (Song & Ermon
    2019, algorithm 1), denoised."""
    sigma = ladder(1.0, 10)

    def rule(m: mpf, var: mpf) -> tuple[mpf, mpf]:
        mean, spread = mpf(0), mpf(1)
        for here in reversed(sigma):
            e = mpf(2e-5) * (here / sigma[0]) ** 2
            h, k = score(mpf(1), here**2, m, var)
            for _ in range(100):
                mean, spread = (1 + e * k) * mean + e * h, (1 + e * k) ** 2 * spread + 2 * e
        return denoised(mean, spread, mpf(1), sigma[0] ** 2, m, var)

    return for_each_dimension(rule)


def edm() -> Moments:
    """Karras et al. 2022, algorithm 1 with the sigmas of eq. 5: 18 from 80 to 0.002, rho = 7."""
    ends = mpf(80.0) ** (mpf(1) / 7), mpf(0.002) ** (mpf(1) / 7)
    sigma = [(ends[0] + mpf(i) / 17 * (ends[1] - ends[0])) ** 7 for i in range(18)] + [mpf(0)]

    def rule(m: mpf, var: mpf) -> tuple[mpf, mpf]:
        def slope(x: mpf, s: mpf) -> mpf:  # (x - D(x)) / sigma = -sigma score
            h, k = score(mpf(1), s**2, m, var)
            return -s * (h + k * x)

        def run(x: mpf) -> mpf:
            for s, after in itertools.pairwise(sigma):
                first = slope(x, s)
                end = x + (after - s) * first
                x = x + (after - s) * (first + slope(end, after)) / 2 if after else end
            return x

        start = run(mpf(0))
        return start, (run(sigma[0]) - start) ** 2

    return for_each_dimension(rule)


def two_m() -> Moments:
    """DPM-Solver++(2M), 20 steps (Lu et al. 2022, algorithm 2) on beta = 1e-4..0.02, T = 1000."""
    alpha_bar = [mpf(1)]
    for i in range(N):
        alpha_bar.append(alpha_bar[-1] * (1 - mpf(1e-4) - (mpf(0.02) - mpf(1e-4)) * i / (N - 1)))
    grid = [N - 50 * k for k in range(21)]
    alpha, sigma = {t: mpmath.sqrt(alpha_bar[t]) for t in grid}, {t: mpmath.sqrt(1 - alpha_bar[t]) for t in grid}

    def rule(m: mpf, var: mpf) -> tuple[mpf, mpf]:
        def run(x: mpf) -> mpf:
            before = last_h = None
            for t, s in itertools.pairwise(grid):
                h, k = score(alpha[t], sigma[t] ** 2, m, var)
                x0 = (x + sigma[t] ** 2 * (h + k * x)) / alpha[t]
                if s == 0:  # lambda = infinity: of first order
                    return x0
                step = mpmath.log(alpha[s] / sigma[s]) - mpmath.log(alpha[t] / sigma[t])
                r = None if last_h is None else last_h / step
                best = x0 if r is None else (1 + 1 / (2 * r)) * x0 - before / (2 * r)
                x = sigma[s] / sigma[t] * x - alpha[s] * mpmath.expm1(-step) * best
                before, last_h = x0, step
            raise AssertionError

        start = run(mpf(0))
        return start, (run(mpf(1)) - start) ** 2

    return for_each_dimension(rule)


RUNS = {
    "dpm++2m, 20": (two_m, DDPM, ("linear", N), "dpm++2m", 20, (0.478211, 0.049498, 1.001330, 0.002298)),
    "vp": (lambda: euler("vp", 1e-3, False), ScoreSDE, ("vp",), None, None, (0.500250, 0.099785, 1.000644, 0.018873)),
    "vp flow": (
        lambda: euler("vp", 1e-3, True), ScoreSDE, ("vp",), "probability_flow", None,
        (0.499864, 0.099852, 1.000000, 0.022476),
    ),
    "subvp": (
        lambda: euler("subvp", 1e-3, False), ScoreSDE, ("subvp",), None, None,
        (0.500395, 0.100050, 1.000752, 0.020008),
    ),
    "ve": (lambda: euler("ve", 1e-5, False), ScoreSDE, ("ve",), None, None, None),
    "ve flow": (lambda: euler("ve", 1e-5, True), ScoreSDE, ("ve",), "probability_flow", None, None),
    "subvp flow": (lambda: euler("subvp", 1e-3, True), ScoreSDE, ("subvp",), "probability_flow", None, None),
    "ve ancestral": (ve_ancestral, NCSN, (50.0, 0.01, N), "ddpm", None, (0.497777, 0.099085, 0.995703, 0.017828)),
    "langevin": (langevin, NCSN, (1.0, 0.01, 10), None, None, (0.507644, 0.100898, 1.015504, 0.018071)),
    "edm": (edm, ScoreSDE, (VE(0.002, 80.0),), "heun", None, (0.527625, 0.109017, 1.044729, 0.022852)),
}  # fmt: skip


@functools.cache
def published(run: str) -> Moments:
    return RUNS[run][0]()


@pytest.mark.slow
@pytest.mark.parametrize("run", [run for run in RUNS if RUNS[run][-1] is not None])
def test_the_recursions_give_the_published_digits(run):
    assert published(run)[1] == pytest.approx(RUNS[run][-1], abs=0.5e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("objective", CLASSIC)
@pytest.mark.parametrize("run", RUNS)
def test_sampler_on_gaussian_data(run, objective, dtype):
    _, made, args, sampler, n, _ = RUNS[run]
    mean, std = moments(exact(made, *args, objective=objective, dtype=dtype), sampler, n)
    expected_mean, expected_std = published(run)
    rel = 1e-9 if dtype == torch.float64 else 1e-3
    assert std.tolist() == pytest.approx(expected_std, rel=rel)
    assert mean.tolist() == pytest.approx(expected_mean, rel=rel, abs=rel / 100)


# --- order of convergence -----------------------------------------------------------------------------------------
# On Gaussian data x at time s of the flow that is at x at time t is alpha_s m + root (x - alpha_t m), with root^2 =
# (alpha_s^2 var + sigma_s^2) / (alpha_t^2 var + sigma_t^2): also at the last level, so that no step to data, whose size
# does not fall with the others, hides the order.


def flow_errors(make: Callable[[int], tuple], sampler: str, sizes: tuple[int, ...], process: VP | VE) -> list[Tensor]:
    diffusion, errors = exact(ScoreSDE, process, objective="x0"), []
    var = torch.tensor(STD, dtype=torch.float64) ** 2
    for n in sizes:
        made, levels = make(n)
        _, std = moments(diffusion, sampler, (made, levels))
        ends = [made.alpha[k] ** 2 * var + made.sigma[k] ** 2 for k in (levels[0], levels[-1])]
        errors.append(std / made.prior_std(int(levels[0])) - (ends[1] / ends[0]).sqrt())
    return errors


def even_in_time(process: VP, n: int) -> tuple:
    """n steps from t = 1 to 1/2."""
    return process.discretize(torch.linspace(0.5, 1, n + 1, dtype=torch.float64)), torch.arange(n + 1, 0, -1)


def even_in_log_snr(process: VP | VE, n: int) -> tuple:
    """n steps from sigma / alpha = 10 to 0.2: the solvers' errors are powers of the step in log(alpha / sigma)."""
    ratios = torch.linspace(math.log(0.2), math.log(10), n + 1, dtype=torch.float64).exp()
    return process.discretize(process.time_of(ratios)), torch.arange(n + 1, 0, -1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "process", "grid", "order"),
    [
        ("ddim", VP(), even_in_log_snr, 1),
        ("ddim", VP(), even_in_time, 1),
        ("probability_flow", VP(), even_in_time, 1),
        ("probability_flow", VE(0.002, 80.0), even_in_log_snr, 1),
        ("dpm++2m", VP(), even_in_log_snr, 2),
        ("dpm++2m", VE(0.002, 80.0), even_in_log_snr, 2),
        ("heun", VP(), even_in_log_snr, 2),
        ("heun", VE(0.002, 80.0), even_in_log_snr, 2),
    ],
)
def test_order_of_convergence(sampler, process, grid, order):
    errors = flow_errors(functools.partial(grid, process), sampler, (128, 256, 512), process)
    for coarse, fine in itertools.pairwise(errors):
        moving = coarse.abs() > 1e-12  # VP's flow leaves N(0, 1) where it is
        rate = (coarse / fine).abs().log2()
        assert ((rate - order).abs() < 0.1)[moving].all() and moving.sum() >= 3, rate


def test_every_sampler_is_here_or_in_a_test_of_its_own():
    assert set(SAMPLERS) == {
        "ddpm", "ddim", "dpm++2m", "heun", "euler_maruyama", "probability_flow", "annealed_langevin",
        "reverse_diffusion", "predictor_corrector",  # test_solvers
        "euler_ancestral", "dpm++2m_sde", "dpm++3m_sde", "unipc", "deis", "lms", "plms", "dpm2", "dpm2_ancestral",
        "dpm++2s", "dpm++2s_ancestral", "dpm++sde", "consistency",  # test_published
        "lcm", "tcd",  # test_consistency
    }  # fmt: skip
    assert steps.SAMPLERS is SAMPLERS


@pytest.mark.slow
def test_tables_are_made_on_the_cpu_whatever_the_default_device():
    process = Ladder(50.0, 0.01, 10)  # all samplers take it
    for name in SAMPLERS:
        count = None if name == "heun" else 5
        made = steps.make_steps(process, name, count, "score", None)
        with torch.device("meta"):
            again = steps.make_steps(process, name, count, "score", None)
        assert torch.equal(again.rows, made.rows) and torch.equal(again.levels, made.levels), name


def test_an_unknown_objective_is_named():
    with pytest.raises(ValueError, match=r"^objective: expected one of eps, x0, .* got 'epsilon'$"):
        steps.make_steps(VP(), "ddim", 5, "epsilon", None)
