"""Coefficients of the polynomials that stand for functions in float32; shared by every compiled backend.

Minimax fits (Lawson's algorithm, lowest power first). Of the normal noise, which they define, with y = x^2, f = m - 1:

    sin(pi x) = x (1 - y) S(y)      x in [-1, 1]                    |error| <= 1.1e-7
    cos(pi x) = (1 - 4 y) C(y)      x in [-1, 1]                    |error| <= 1.2e-8
    log(m)    = f L(f)              m in [sqrt(1/2), sqrt(2))       relative error <= 1.7e-7

Of the variational bound, with t = (x - 3) / (x + 3) and Phi, phi the normal distribution function and density:

    (1 - Phi(x)) / phi(x) = M(t) / (x + 3)      x >= 0              relative error <= 8.5e-8, in float32 3.7e-7
    exp(-d) - 1 + d       = d^2 K(d)            d in [-1, 1]        relative error <= 8.6e-8

The factors carry the exact zeros, so the products keep their relative accuracy there and no term cancels another.
"""

SIN = (3.1415912976942297, -2.026083784674558, 0.5237804532315617, -0.07445936850361928, 0.005973291481878695)
COS = (
    0.9999999881272067,
    -0.9348011560917951,
    0.3194907789798901,
    -0.05719907665428481,
    0.006241965560240037,
    -0.00039917054552074394,
)
LOG = (
    0.9999999453094767,
    -0.5000036512350616,
    0.33335058946781326,
    -0.24969909059094786,
    0.19900165418806656,
    -0.17250829724731723,
    0.16222580878491694,
    -0.10106895969972977,
)
MILLS = (
    1.8275419437637122,
    -1.2767057482377235,
    0.5765604375471198,
    -0.11847093326855988,
    -0.026151476014555503,
    0.017461842017024328,
    0.002339770057947485,
    -0.002555926950986856,
    -0.0003196702764995049,
    0.00029967695195004746,
)
KL = (
    0.5000000099084626,
    -0.16666696191290767,
    0.041666515586316746,
    -0.008330930477161092,
    0.0013891335332196642,
    -0.00020325484159346898,
    2.4960814375853094e-05,
)
