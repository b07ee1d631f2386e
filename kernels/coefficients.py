"""Coefficients of the polynomials that define the normal noise in float32; shared by every compiled backend.

Minimax fits (Lawson's algorithm, lowest power first), with y = x^2 and f = m - 1:

    sin(pi x) = x (1 - y) S(y)      x in [-1, 1]                    |error| <= 1.1e-7
    cos(pi x) = (1 - 4 y) C(y)      x in [-1, 1]                    |error| <= 1.2e-8
    log(m)    = f L(f)              m in [sqrt(1/2), sqrt(2))       relative error <= 1.7e-7

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
