"""Samplers on Gaussian data by their papers' formulas, in 40 digits and without tables: mean and standard deviation of
what they end with, for levels (alpha, sigma) that end at data, (1, 0)."""

import itertools
from collections.abc import Callable, Sequence

import mpmath
from gaussian import MEAN, STD
from mpmath import mpf

Levels = Sequence[tuple[mpf, mpf]]
Moments = tuple[list[float], list[float]]


def denoised(x: mpf, alpha: mpf, sigma: mpf, m: mpf, var: mpf) -> mpf:
    """E[x_0 | x] for x_0 ~ N(m, var)."""
    return m + alpha * var * (x - alpha * m) / (alpha**2 * var + sigma**2)


def moments(run: Callable[[mpf, mpf, mpf], mpf], start: mpf) -> Moments:
    """Of the affine map run(x, m, var), from N(0, start^2)."""
    with mpmath.workdps(40):
        ends = [(run(mpf(0), m, v), run(start, m, v)) for m, v in _data()]
    return [float(a) for a, _ in ends], [abs(float(b - a)) for a, b in ends]


def ddim(levels: Levels) -> Moments:
    def run(x: mpf, m: mpf, var: mpf) -> mpf:
        for (a, s), (after_a, after_s) in itertools.pairwise(levels):
            x0 = denoised(x, a, s, m, var)
            x = after_a * x0 + after_s * (x - a * x0) / s
        return x

    return moments(run, levels[0][1])


def two_m(levels: Levels) -> Moments:
    """Lu et al. 2022, algorithm 2; of first order where lambda is infinite."""

    def run(x: mpf, m: mpf, var: mpf) -> mpf:
        before, last = None, mpf("inf")
        for (a, s), (after_a, after_s) in itertools.pairwise(levels):
            x0 = denoised(x, a, s, m, var)
            if after_s == 0:
                return x0
            h = mpmath.log(after_a / after_s) - mpmath.log(a / s) if a else mpf("inf")
            best = x0 if before is None or mpmath.isinf(last) else x0 + (x0 - before) * h / (2 * last)
            x = after_s / s * x + after_a * (1 - mpmath.exp(-h)) * best
            before, last = x0, h
        return x

    return moments(run, levels[0][1])


def heun(levels: Levels) -> Moments:
    """Karras et al. 2022, algorithm 1, in x / alpha and sigma / alpha."""

    def run(x: mpf, m: mpf, var: mpf) -> mpf:
        x = x / levels[0][0]
        ratios = [s / a for a, s in levels]

        def slope(x: mpf, r: mpf) -> mpf:
            return (x - denoised(x, mpf(1), r, m, var)) / r

        for r, after in itertools.pairwise(ratios):
            first = slope(x, r)
            end = x + (after - r) * first
            x = x + (after - r) * (first + slope(end, after)) / 2 if after else end
        return x

    return moments(run, levels[0][1])


def ancestral(levels: Levels) -> Moments:
    """Draws from q(x_s | x_t, x_0) by Bayes' rule: precisions add."""
    ends = []
    with mpmath.workdps(40):
        for m, var in _data():
            mean, spread = mpf(0), levels[0][1] ** 2
            for (a, s), (after_a, after_s) in itertools.pairwise(levels):
                gain = denoised(mpf(1), a, s, m, var) - denoised(mpf(0), a, s, m, var)
                x0 = denoised(mean, a, s, m, var)
                if after_s == 0:
                    mean, spread = x0, gain**2 * spread
                    break
                ratio = a / after_a
                left = s**2 - ratio**2 * after_s**2
                precision = ratio**2 / left + 1 / after_s**2
                on_x, on_x0 = ratio / left / precision, after_a / after_s**2 / precision
                mean, spread = on_x * mean + on_x0 * x0, (on_x + on_x0 * gain) ** 2 * spread + 1 / precision
            ends.append((mean, mpmath.sqrt(spread)))
    return [float(a) for a, _ in ends], [float(b) for _, b in ends]


def _data() -> list[tuple[mpf, mpf]]:
    return [(mpf(m), mpf(s) ** 2) for m, s in zip(MEAN, STD, strict=True)]
