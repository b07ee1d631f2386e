"""Published samplers on Gaussian data: final mean and standard deviation against their algorithms in mpmath, in the
coordinates y = x / alpha and rho = sigma / alpha of k-diffusion."""

import functools
import itertools
from collections.abc import Callable

import mpmath
import pytest
import torch
from gaussian import MEAN, STD, exact, moments
from mpmath import exp, expm1, log, mpf, sqrt

from fastdiff import DDPM, steps
from fastdiff.objective import OBJECTIVES

mpmath.mp.dps = 30
T, N = 1000, 10
Denoise = Callable[[mpf, mpf], mpf]
Noise = Callable[[int], mpf]


def slope(denoise: Denoise, y: mpf, rho: mpf) -> mpf:
    """d of k-diffusion, the noise in y."""
    return (y - denoise(y, rho)) / rho


def ancestral(here: mpf, after: mpf, eta: mpf) -> tuple[mpf, mpf]:
    """(sigma_down, sigma_up) of k-diffusion's get_ancestral_step."""
    up = min(after, eta * sqrt(after**2 * (here**2 - after**2) / here**2))
    return sqrt(after**2 - up**2), up


def euler_ancestral(denoise: Denoise, y: mpf, rho: list[mpf], z: Noise, eta: float = 1) -> mpf:
    for i, (here, after) in enumerate(itertools.pairwise(rho)):
        down, up = ancestral(here, after, eta)
        y = y + slope(denoise, y, here) * (down - here) + up * z(i)
    return y


def dpm2(denoise: Denoise, y: mpf, rho: list[mpf], z: Noise, eta: float = 0) -> mpf:
    for i, (here, after) in enumerate(itertools.pairwise(rho)):
        down, up = ancestral(here, after, eta)
        d = slope(denoise, y, here)
        if down == 0:
            y = y + d * (down - here)
        else:
            middle = exp((log(here) + log(down)) / 2)
            d = slope(denoise, y + d * (middle - here), middle)
            y = y + d * (down - here) + up * z(i)
    return y


def dpmpp_2s(denoise: Denoise, y: mpf, rho: list[mpf], z: Noise, eta: float = 0) -> mpf:
    for i, (here, after) in enumerate(itertools.pairwise(rho)):
        down, up = ancestral(here, after, eta)
        if down == 0:
            y = y + slope(denoise, y, here) * (down - here)
        else:
            t, following = -log(here), -log(down)
            h = following - t
            s = t + h / 2
            inner = exp(-s) / exp(-t) * y - expm1(-h / 2) * denoise(y, here)
            y = exp(-following) / exp(-t) * y - expm1(-h) * denoise(inner, exp(-s)) + up * z(i)
    return y


def dpmpp_sde(denoise: Denoise, y: mpf, rho: list[mpf], z: Noise, eta: float = 1) -> mpf:
    """z(2 i) and z(2 i + 1) are the parts of one Brownian motion in rho, as in BrownianTreeNoiseSampler."""
    for i, (here, after) in enumerate(itertools.pairwise(rho)):
        if after == 0:
            y = y + slope(denoise, y, here) * (after - here)
            continue
        t, following = -log(here), -log(after)
        middle = exp(-(t + following) / 2)
        first, second = z(2 * i) * sqrt(here - middle), z(2 * i + 1) * sqrt(middle - after)
        down, up = ancestral(here, middle, eta)
        inner = down / here * y - expm1(t + log(down)) * denoise(y, here) + up * first / sqrt(here - middle)
        down, up = ancestral(here, after, eta)
        whole = (first + second) / sqrt(here - after)
        y = down / here * y - expm1(t + log(down)) * denoise(inner, middle) + up * whole
    return y


def dpmpp_2m_sde(denoise: Denoise, y: mpf, rho: list[mpf], z: Noise, eta: float = 1) -> mpf:
    before = h_last = None
    for i, (here, after) in enumerate(itertools.pairwise(rho)):
        x0 = denoise(y, here)
        if after == 0:
            return x0
        h = log(here) - log(after)
        y = after / here * exp(-eta * h) * y - expm1(-h - eta * h) * x0
        if before is not None:
            y = y - expm1(-h - eta * h) / 2 * (h / h_last) * (x0 - before)
        y = y + z(i) * after * sqrt(-expm1(-2 * eta * h))
        before, h_last = x0, h
    raise AssertionError


def dpmpp_3m_sde(denoise: Denoise, y: mpf, rho: list[mpf], z: Noise, eta: float = 1) -> mpf:
    past: list[tuple[mpf, mpf]] = []
    for i, (here, after) in enumerate(itertools.pairwise(rho)):
        x0 = denoise(y, here)
        if after == 0:
            return x0
        h = log(here) - log(after)
        total = h * (eta + 1)
        y = exp(-total) * y - expm1(-total) * x0
        two = expm1(-total) / total + 1
        three = two / total - mpf(1) / 2
        if len(past) > 1:
            (one_x0, one_h), (old_x0, old_h) = past[-1], past[-2]
            r0, r1 = one_h / h, old_h / h
            d10, d11 = (x0 - one_x0) / r0, (one_x0 - old_x0) / r1
            y = y + two * (d10 + (d10 - d11) * r0 / (r0 + r1)) - three * (d10 - d11) / (r0 + r1)
        elif past:
            y = y + two * (x0 - past[-1][0]) / (past[-1][1] / h)
        y = y + z(i) * after * sqrt(-expm1(-2 * h * eta))
        past.append((x0, h))
    raise AssertionError


def unipc(denoise: Denoise, y: mpf, rho: list[mpf], z: Noise, order: int = 3, variant: str = "bh2") -> mpf:
    """Zhao et al. 2023, algorithms 1 and 2 with the function B(h) and the systems R rho = b of their code."""
    place = [-log(r) if r else mpmath.inf for r in rho]
    found: list[mpf] = []
    corrected, last_order = y, 0
    n = len(rho) - 1

    def update(x: mpf, i: int, p: int, known: list[mpf], new: mpf | None) -> mpf:
        """Over step i, from x at it; `known` ends with the estimate there, `new` is that at the end."""
        hh, start = place[i] - place[i + 1], known[-1]
        if hh == -mpmath.inf:
            return start
        phi_1 = expm1(hh)
        b_h = hh if variant == "bh1" else expm1(hh)
        rk = [(place[i - j] - place[i]) / -hh for j in range(1, p)] + [mpf(1)]
        d = [(known[-1 - j] - start) / rk[j - 1] for j in range(1, p)]
        powers, b, factorial, phi = [], [], 1, phi_1 / hh - 1
        for k in range(1, p + 1):
            powers.append([r ** (k - 1) for r in rk])
            b.append(phi * factorial / b_h)
            factorial *= k + 1
            phi = phi / hh - mpf(1) / factorial
        x = exp(hh) * x - phi_1 * start
        if new is None:
            if p == 2:
                return x - b_h * d[0] / 2
            left, right = mpmath.matrix(powers)[: p - 1, : p - 1], mpmath.matrix(b)[: p - 1]
            weights = mpmath.lu_solve(left, right) if p > 1 else []
            return x - b_h * sum(w * one for w, one in zip(weights, d, strict=True))
        weights = [mpf(1) / 2] if p == 1 else mpmath.lu_solve(mpmath.matrix(powers), mpmath.matrix(b))
        return x - b_h * sum(w * one for w, one in zip(weights, [*d, new - start], strict=True))

    for i in range(n):
        x0 = denoise(y, rho[i])
        corrected = update(corrected, i - 1, last_order, found, x0) if i else y
        found.append(x0)
        last_order = min(order, n - i, i + 1)
        y = update(corrected, i, last_order, found, None)
    return y


def lagrange(places: list[mpf], a: int, at: mpf) -> mpf:
    terms = [(at - p) / (places[a] - p) for j, p in enumerate(places) if j != a]
    return mpmath.fprod(terms)


@functools.cache
def integrals(log_rho: bool, known: int, *places: mpf) -> list[mpf]:
    """int l_a d rho from the second of the places to the first, l_a through the others, the newest first."""
    after, *values = places
    at = log if log_rho else mpf
    nodes = [at(r) for r in values[:known]]
    return [mpmath.quad(lambda r, a=a: lagrange(nodes, a, at(r)), [values[0], after]) for a in range(known)]


def by_quadrature(log_rho: bool, denoise: Denoise, y: mpf, rho: list[mpf], z: Noise, order: int) -> mpf:
    """y + sum of eps_a int l_a d rho: rho-AB-DEIS, which is k-diffusion's LMS, or DEIS with log rho."""
    past: list[mpf] = []
    for i, (here, after) in enumerate(itertools.pairwise(rho)):
        past.insert(0, slope(denoise, y, here))
        known = 1 if log_rho and after == 0 else min(order, i + 1)
        weights = integrals(log_rho, known, after, *rho[i::-1])
        y = y + sum(w * eps for w, eps in zip(weights, past, strict=False))
    return y


def plms(denoise: Denoise, y: mpf, rho: list[mpf], z: Noise) -> mpf:
    """Latent diffusion's PLMS: eps' by Liu et al. 2022, eq. 12, in a step of DDIM; the first step asks twice."""
    past: list[mpf] = []
    for here, after in itertools.pairwise(rho):
        eps = slope(denoise, y, here)
        if not past:
            mixed = (eps + slope(denoise, y + (after - here) * eps, after)) / 2
        elif len(past) == 1:
            mixed = (3 * eps - past[-1]) / 2
        elif len(past) == 2:
            mixed = (23 * eps - 16 * past[-1] + 5 * past[-2]) / 12
        else:
            mixed = (55 * eps - 59 * past[-1] + 37 * past[-2] - 9 * past[-3]) / 24
        past.append(eps)
        y = y + (after - here) * mixed
    return y


def consistency(denoise: Denoise, y: mpf, rho: list[mpf], z: Noise, least: float = 0) -> mpf:
    """Song et al. 2023, algorithm 1."""
    for i, (here, after) in enumerate(itertools.pairwise(rho)):
        y = denoise(y, here) + (sqrt(after**2 - mpf(least) ** 2) * z(i) if after else 0)
    return y


RUNS = {
    "euler_ancestral": (euler_ancestral, "euler_ancestral"),
    "dpm2": (dpm2, "dpm2"),
    "dpm2_ancestral": (functools.partial(dpm2, eta=1), "dpm2_ancestral"),
    "dpm2, eta 0.5": (functools.partial(dpm2, eta=mpf(0.5)), functools.partial(steps.dpm2_ancestral, eta=0.5)),
    "dpm++2s": (dpmpp_2s, "dpm++2s"),
    "dpm++2s_ancestral": (functools.partial(dpmpp_2s, eta=1), "dpm++2s_ancestral"),
    "dpm++2s, eta 0.5": (
        functools.partial(dpmpp_2s, eta=mpf(0.5)), functools.partial(steps.dpm_solver_pp_2s_ancestral, eta=0.5)
    ),
    "dpm++sde": (dpmpp_sde, "dpm++sde"),
    "dpm++sde, eta 0.5": (
        functools.partial(dpmpp_sde, eta=mpf(0.5)), functools.partial(steps.dpm_solver_pp_sde, eta=0.5)
    ),
    "dpm++2m_sde": (dpmpp_2m_sde, "dpm++2m_sde"),
    "dpm++2m_sde, eta 0.5": (
        functools.partial(dpmpp_2m_sde, eta=mpf(0.5)), functools.partial(steps.dpm_solver_pp_2m_sde, eta=0.5)
    ),
    "dpm++3m_sde": (dpmpp_3m_sde, "dpm++3m_sde"),
    "dpm++3m_sde, eta 0": (
        functools.partial(dpmpp_3m_sde, eta=0), functools.partial(steps.dpm_solver_pp_3m_sde, eta=0.0)
    ),
    "unipc": (unipc, "unipc"),
    **{
        f"unipc {order} {variant}": (
            functools.partial(unipc, order=order, variant=variant),
            functools.partial(steps.unipc, order=order, variant=variant),
        )
        for order in (1, 2, 3) for variant in ("bh1", "bh2")
    },
    "deis": (functools.partial(by_quadrature, True, order=3), "deis"),
    "deis 1": (functools.partial(by_quadrature, True, order=1), functools.partial(steps.deis, order=1)),
    "deis 2": (functools.partial(by_quadrature, True, order=2), functools.partial(steps.deis, order=2)),
    "lms": (functools.partial(by_quadrature, False, order=4), "lms"),
    "lms 2": (functools.partial(by_quadrature, False, order=2), functools.partial(steps.lms, order=2)),
    "plms": (plms, "plms"),
    "consistency": (consistency, "consistency"),
    "consistency 0.002": (
        functools.partial(consistency, least=0.002), functools.partial(steps.consistency, least=0.002)
    ),
}  # fmt: skip


@functools.cache
def chain_ratios() -> tuple[list[mpf], mpf]:
    """(rho, alpha at the start) of N strides of beta = 1e-4..0.02."""
    kept, alpha_bar = mpf(1), [mpf(1)]
    for i in range(T):
        kept *= 1 - mpf(1e-4) - (mpf(0.02) - mpf(1e-4)) * i / (T - 1)
        alpha_bar.append(kept)
    visited = [alpha_bar[T - T // N * k] for k in range(N + 1)]
    return [sqrt((1 - a) / a) for a in visited], sqrt(visited[0])


@functools.cache
def published(run: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each dimension, from an affine map of the start and the noises."""
    rule, found = RUNS[run][0], []
    rho, alpha = chain_ratios()
    for m, s in zip(MEAN, STD, strict=True):

        def denoise(y: mpf, r: mpf, m: float = m, var: mpf = mpf(s) ** 2) -> mpf:  # noqa: B008
            return (var * y + r**2 * m) / (var + r**2)

        drawn: list[int] = []
        start = rule(denoise, mpf(0), rho, lambda k: drawn.append(k) or mpf(0))  # noqa: B023
        spread = (rule(denoise, 1 / alpha, rho, lambda k: mpf(0)) - start) ** 2
        for j in drawn:
            spread += (rule(denoise, mpf(0), rho, lambda k, j=j: mpf(k == j)) - start) ** 2
        found.append((float(start), float(sqrt(spread))))
    return [mean for mean, _ in found], [std for _, std in found]


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("run", RUNS)
def test_sampler_on_gaussian_data(run, objective):
    mean, std = moments(exact(DDPM, "linear", T, objective=objective), RUNS[run][1], N)
    expected_mean, expected_std = published(run)
    assert std.tolist() == pytest.approx(expected_std, rel=1e-9)
    assert mean.tolist() == pytest.approx(expected_mean, rel=1e-9, abs=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("run", [run for run, (_, sampler) in RUNS.items() if isinstance(sampler, str)])
def test_sampler_in_float32(run):
    mean, std = moments(exact(DDPM, "linear", T, objective="v", dtype=torch.float32), RUNS[run][1], N)
    expected_mean, expected_std = published(run)
    assert std.tolist() == pytest.approx(expected_std, rel=1e-3, abs=1e-5)
    assert mean.tolist() == pytest.approx(expected_mean, rel=1e-3, abs=1e-5)
