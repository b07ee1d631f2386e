"""Gated activations, by every backend, against the float64 oracle."""

import math
import re

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import BACKENDS, dtypes, layouts, salts, shapes, tensor
from tolerance import ARITHMETIC, assert_close

import fastdiff
from fastdiff import ops, reference

every = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.slow
@every
@given(shape=shapes((60, 600)), dtype=dtypes, layout=layouts, salt=salts, extreme=st.booleans())
@example((3, 257), torch.float32, "contiguous", 1, False)  # two blocks beside each other, the second of one column
@example((2, 5, 256), torch.bfloat16, "contiguous", 2, False)  # two below each other
@example((70, 40), torch.float16, "half", 3, True)
def test_gated_gelu_is_that_in_float64(backend, shape, dtype, layout, salt, extreme):
    x = tensor((*shape[:-1], 2 * shape[-1]), dtype, layout, salt, extreme)
    with fastdiff.backend(backend):
        got = ops.gated_gelu(x)
    hidden, gate = x.double().chunk(2, -1)
    want = hidden * gate * (1 + torch.erf(gate / math.sqrt(2))) / 2
    # 1 + erf cancels where gelu vanishes, as in PyTorch: the error is one of the gate.
    error = ARITHMETIC * (hidden * gate).abs().nan_to_num(math.inf)
    assert got.dtype == dtype
    assert_close(got, want, error, backend=backend)


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
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(dtype):
    torch.library.opcheck(torch.ops.fastdiff.gated_gelu.default, (tensor((2, 3, 4), dtype).cpu(),))
