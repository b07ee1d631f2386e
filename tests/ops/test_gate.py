"""Gated activations, by every backend, against the float64 oracle."""

import math
import re

import pytest
import torch
from hypothesis import example, given
from strategies import BACKENDS, DEVICE, dtypes, layouts, salts, shapes, tensor
from tolerance import ARITHMETIC, POWER, QUOTIENT, assert_close

import fastdiff
from fastdiff import ops, reference

every = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.slow
@every
@given(shape=shapes((60, 600)), dtype=dtypes, layout=layouts, salt=salts)
@example((3, 257), torch.float32, "contiguous", 1)  # two blocks beside each other, the second of one column
@example((2, 5, 256), torch.bfloat16, "contiguous", 2)  # two below each other
@example((70, 40), torch.float16, "half", 3)
def test_gated_gelu_is_that_in_float64(backend, shape, dtype, layout, salt):
    x = tensor((*shape[:-1], 2 * shape[-1]), dtype, layout, salt)
    with fastdiff.backend(backend):
        got = ops.gated_gelu(x)
    hidden, gate = x.double().chunk(2, -1)
    want = hidden * gate * torch.erfc(-gate / math.sqrt(2)) / 2
    # Of PyTorch it is one of the gate: 1 + erf cancels where gelu vanishes. A power of e has the error of its exponent.
    # Of a kernel's quotient i = 1 / (x + 3) the Mills ratio m has (1 / m - x) (x + 3) times the error, at most 2.4.
    kernel = ARITHMETIC * (1 + gate.square() / 2) + POWER + 2.4 * QUOTIENT
    error = (kernel * want if backend == "triton" else ARITHMETIC * hidden * gate).abs()
    assert got.dtype == dtype
    assert_close(got, want, error, backend=backend)


def test_gates_at_their_ends():
    """Open, closed, and 0 times infinity is NaN. PyTorch on a CPU has NaN for the first too."""
    gate = torch.tensor([math.inf, 1e4, 0.0, -1e4, -math.inf, math.nan], device=DEVICE)
    with fastdiff.backend("triton"):
        got = ops.gated_gelu(torch.cat((torch.full_like(gate, 2.0), gate)))
    want = torch.tensor([math.inf, 2e4, 0.0, 0.0, math.nan, math.nan], device=DEVICE)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_the_oracle_is_the_formula():
    """hidden first. Phi(1) = 0.841345, gelu(0) = 0, gelu(-1) = -Phi(-1)."""
    got = reference.gated_gelu(torch.tensor([[2.0, 5.0, 3.0, 1.0, 0.0, -1.0]], dtype=torch.float64))
    torch.testing.assert_close(got, torch.tensor([[2 * 0.8413447461, 0.0, -3 * 0.1586552539]]).double())


def test_a_gradient_is_that_of_the_oracle():
    x = tensor((3, 8)).cpu().requires_grad_()
    with fastdiff.backend("triton"):
        got = torch.autograd.grad(ops.gated_gelu(x).sum(), x)
    wide = x.detach().double().requires_grad_()
    torch.testing.assert_close(got[0].double(), torch.autograd.grad(reference.gated_gelu(wide).sum(), wide)[0])


@every
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_gates_of_nothing(backend, shape):
    with fastdiff.backend(backend):
        assert ops.gated_gelu(torch.empty(shape)).shape == (*shape[:-1], shape[-1] // 2)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([1.0, 2.0], TypeError, "x: expected a tensor, got list"),
        (torch.zeros(2, 4).int(), TypeError, "x: expected one of float32, bfloat16, float16, float64, got torch.int32"),
        (torch.zeros(4, 3), ValueError, "x: expected a last dimension of an even size, got shape (4, 3)"),
    ],
)
def test_what_cannot_be_right_is_refused(x, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        ops.gated_gelu(x)


@pytest.mark.slow
def test_opcheck():
    torch.library.opcheck(torch.ops.fastdiff.gated_gelu.default, (tensor((2, 3, 4), torch.bfloat16).cpu(),))
