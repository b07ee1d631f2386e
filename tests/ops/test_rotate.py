"""Rotary embedding, by every backend, against the float64 oracle."""

import re

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import BACKENDS, DEVICE, dtypes, layouts, salts, tensor
from tolerance import ARITHMETIC, assert_close

import fastdiff
from fastdiff import ops, reference

every = pytest.mark.parametrize("backend", BACKENDS)


def angles(tokens, columns, salt=0):
    return (tensor((tokens, columns), salt=salt + i) for i in (7, 8))


@pytest.mark.slow
@every
@given(
    batch=st.integers(1, 3), tokens=st.integers(1, 5), heads=st.integers(1, 3), half=st.integers(1, 40),
    pairs=st.booleans(), norm=st.booleans(), dtype=dtypes, layout=layouts, salt=salts,
)  # fmt: skip
@example(2, 3, 5, 64, False, True, torch.bfloat16, "contiguous", 1)  # more than a block, which ends within it
@example(1, 2, 1, 130, True, False, torch.float32, "half", 2)
@example(1, 2, 3, 4, True, True, torch.float32, "half", 3)
def test_rotations_are_those_in_float64(backend, batch, tokens, heads, half, pairs, norm, dtype, layout, salt):
    x = tensor((batch, tokens, heads, 2 * half), dtype, layout, salt)
    cos, sin = angles(tokens, half if pairs else 2 * half, salt)
    weight = tensor((2 * half,), dtype, salt=salt + 9)
    with fastdiff.backend(backend):
        got = ops.rotate(x, cos, sin, *([weight, 0.1] if norm else []))
    exact = x.double()
    if norm:
        exact = exact / (exact.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight.double()
    c, s = (t.double()[:, None].repeat_interleave(1 + pairs, -1) for t in (cos, sin))
    a, b = exact[..., ::2], exact[..., 1::2]
    turned = a * c[..., ::2] - b * s[..., ::2], b * c[..., 1::2] + a * s[..., 1::2]
    sizes = (a * c[..., ::2]).abs() + (b * s[..., ::2]).abs(), (b * c[..., 1::2]).abs() + (a * s[..., 1::2]).abs()
    want, size = (torch.stack(two, -1).flatten(-2) for two in (turned, sizes))
    assert got.dtype == dtype
    assert_close(got, want, ARITHMETIC * size, backend=backend)


@every
def test_a_quarter_turn_of_every_head_of_a_token(backend):
    x = torch.arange(1.0, 17, device=DEVICE).view(1, 2, 2, 4)
    zero, one = torch.zeros(2, 1, device=DEVICE), torch.ones(2, 1, device=DEVICE)
    cos, sin = torch.cat([zero, one], 1), torch.cat([one, zero], 1)  # of the pairs: the first turns
    with fastdiff.backend(backend):
        got = ops.rotate(x[:, :, :1], cos, sin)
    assert got.flatten().tolist() == [-2, 1, 3, 4, -10, 9, 11, 12]


def test_a_gradient_is_that_of_the_oracle():
    x, (cos, sin) = tensor((2, 3, 2, 4)).cpu().requires_grad_(), (t.cpu() for t in angles(3, 4))
    with fastdiff.backend("triton"):
        got = torch.autograd.grad(ops.rotate(x, cos, sin).square().sum(), x)
    wide = x.detach().double().requires_grad_()
    want = torch.autograd.grad(reference.rotate(wide, cos.double(), sin.double(), None, 0.0).square().sum(), wide)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-6, atol=1e-5)


@every
@pytest.mark.parametrize("shape", [(0, 2, 1, 4), (2, 0, 1, 4), (2, 2, 0, 4), (2, 2, 1, 0)])
def test_rotations_of_nothing(backend, shape):
    with fastdiff.backend(backend):
        assert ops.rotate(torch.empty(shape), *torch.empty(2, shape[1], shape[3])).shape == shape


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], None, None), TypeError, "x: expected a tensor, got list"),
        (((2, 3, 4), (3, 4), (3, 4)), ValueError, "x: expected shape (B, N, heads, D) with an even D, got (2, 3, 4)"),
        (((2, 3, 1, 5), (3, 5), (3, 5)), ValueError, "x: expected shape (B, N, heads, D) with an even D"),
        (((2, 3, 1, 4), (2, 4), (3, 4)), ValueError, "cos: expected shape (3, 4) or (3, 2), got (2, 4)"),
        (((2, 3, 1, 4), (3, 4), (3, 3)), ValueError, "sin: expected shape (3, 4) or (3, 2), got (3, 3)"),
        (((2, 3, 1, 4), (3, 4), (3, 2)), ValueError, "sin: expected shape (3, 4) as cos has, got (3, 2)"),
        (((2, 3, 1, 4), (3, 4), (3, 4), (3,)), ValueError, "weight: expected shape (4,), got (3,)"),
        (((2, 3, 1, 4), (3, 4), (3, 4), None, -1), ValueError, "eps: expected a number of at least 0, got -1"),
    ],
)
def test_what_cannot_be_right_is_refused(arguments, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        ops.rotate(*(torch.zeros(a) if isinstance(a, tuple) else a for a in arguments))


@pytest.mark.slow
def test_opcheck():
    x, tables = tensor((2, 3, 2, 4), torch.bfloat16).cpu(), [t.cpu() for t in angles(3, 2)]
    torch.library.opcheck(torch.ops.fastdiff.rotate.default, (x, *tables, tables[0][0].repeat(2), 0.1))
