"""How far a result may be from the float64 oracle: one table of roundings, one of arithmetic, one of normals."""

import math
import os

import torch
from torch import Tensor

from fastdiff import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# A store rounds to nearest: half a unit in the last place, relative.
ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# The smallest step between two numbers, where a store underflows.
SMALLEST = {
    torch.float64: 2.0**-1074,
    torch.float32: 2.0**-149,
    torch.float16: 2.0**-24,
    torch.bfloat16: 2.0**-133,
}
# The longest chain of float32 operations on one element has eight roundings, each relative to the terms it adds.
ARITHMETIC = 8 * 2.0**-24
# Pairwise sums of up to 2^20 float32 terms, relative to the sum of their magnitudes.
SUMMATION = 32 * 2.0**-24
# Of the polynomials (kernels/coefficients.py), with r <= 6.77 and the roundings on the way.
NORMAL = 3e-6
# Of the bound's polynomials with the roundings on the way and an approximate reciprocal or exponential, relative.
BOUND = 8e-7
# Weights after at most 50 steps of AdamW with a rate of 2e-4, whose gradients were summed in another order. It moves
# a weight by the rate times g / (|g| + 1e-8). Of 10^5 weights some have a g whose rounding, some 2^-24 of the terms
# that cancel in it, is a hundredth of it.
SAME_WEIGHTS = 1e-5
# NVIDIA's approximations (CUDA programming guide, intrinsic functions). Of r^2 = -2 ln 2 log2 u, absolute, between 1/2
# and 2; and all that is relative to r: the rest of the logarithm, sine or cosine on [-pi, pi], and four roundings.
FAST_SQUARE, FAST_RELATIVE = 2 * math.log(2) * 2.0**-22, 2.0**-20

# NVIDIA's powers and quotients of float32, relative: two units in the last place (PTX ISA, ex2.approx and div.full).
# Those of the interpreter are NumPy's.
POWER = QUOTIENT = 0.0 if INTERPRETED else 2.0**-22


def normals(
    shape: tuple[int, ...], seed: Tensor, ids: Tensor | None, step: Tensor, stream: int, fast: bool = False
) -> tuple[Tensor, Tensor]:
    """z in float64 and how far an implementation may be from it, both of the given shape.

    fast: with NVIDIA's approximations.
    """
    z = reference.normal(shape, seed, ids, step, stream, torch.float64)
    error = torch.full_like(z, NORMAL)
    if fast:
        n = math.prod(shape[1:])
        bits = reference.uniform_bits(shape[0], n, seed, ids, step, stream)
        r = radius(bits[..., 0::2]).repeat_interleave(2, -1).flatten(1)[:, :n].reshape(shape)
        error = fast_error(r)
    return z, error


def radius(bits: Tensor) -> Tensor:
    u = bits.to(torch.float32) * 2.0**-32 + 2.0**-33
    return (-2 * u.double().log()).sqrt()


def fast_error(r: Tensor) -> Tensor:
    """At most 6e-4 where u is near 1 and the error of the logarithm is all of r; 3e-6 for r from 0.12 to 3."""
    return FAST_RELATIVE * r + (FAST_SQUARE / r).clamp(max=FAST_SQUARE**0.5)


def rounding(dtype: torch.dtype, backend: str) -> float:
    """Triton's interpreter, and nothing else, cuts bfloat16 off: a whole unit in the last place."""
    return ROUNDING[dtype] * (2 if INTERPRETED and backend == "triton" and dtype == torch.bfloat16 else 1)


def assert_close(
    got: Tensor, want: Tensor, error: Tensor | float, roundings: int = 1, backend: str = "reference"
) -> None:
    """got is want within `error` of the arithmetic and so many roundings to the dtype of got; NaN and inf agree."""
    assert got.shape == want.shape
    exact = got.double()
    allowed = error + roundings * (rounding(got.dtype, backend) * want.abs() + SMALLEST[got.dtype])
    same = exact == want.to(got.dtype).double()  # also inf, and overflow of the dtype
    wrong = ~(same | ((exact - want).abs() <= allowed) | (exact.isnan() & want.isnan()))
    if bool(wrong.any()):
        first = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements differ; at {first}: got {exact[first].item()!r}, "
            f"want {want[first].item()!r}, allowed {torch.as_tensor(allowed).expand(want.shape)[first].item():.3g}"
        )


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    assert torch.equal(got.contiguous().view(words), want.contiguous().view(words))
