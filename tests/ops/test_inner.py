"""Inner products of each sample, by every backend, against the float64 oracle."""

import math
import re

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import BACKENDS, DEVICE, dtypes, layouts, salts, shapes, tensor
from tolerance import ARITHMETIC, SUMMATION, assert_close, assert_same_bits
from torch import Tensor

import fastdiff
from fastdiff import ops, reference
from fastdiff.kernels import inner as kernels

every = pytest.mark.parametrize("backend", BACKENDS)


def bound(a: Tensor, b: Tensor, w: float | None, centred: bool) -> Tensor:
    """How far the three sums may be from those in float64, (B, 3)."""
    p = b if w is None else b + w * (a - b)
    of_p = 0 if w is None else ARITHMETIC * (b.abs() + abs(w) * (a - b).abs())
    errors = [torch.zeros_like(a), of_p + torch.zeros_like(p)]
    parts = [a, p]
    if centred:  # a mean is off by what its sum is, and what it is taken from is rounded
        errors = [e + SUMMATION * u.abs().mean(1, keepdim=True) for e, u in zip(errors, parts, strict=True)]
        parts = [u - u.mean(1, keepdim=True) for u in parts]
    sums = []
    for i, j in ((0, 0), (0, 1), (1, 1)):
        u, v, e, f = parts[i].abs(), parts[j].abs(), errors[i], errors[j]
        sums.append((u * f + e * v + e * f + SUMMATION * u * v).sum(1))
    return torch.stack(sums, 1)


@pytest.mark.slow
@every
@given(
    shape=shapes(),
    dtype=st.tuples(dtypes, dtypes),
    layout=st.tuples(layouts, layouts),
    w=st.sampled_from([None, 0.0, 7.5, -1.0]),
    centred=st.booleans(),
    offset=st.sampled_from([0.0, 4096.0]),
    salt=salts,
)
@example((2, 9001), (torch.float32,) * 2, ("contiguous",) * 2, 7.5, True, 4096.0, 1)  # three blocks
@example((3, 3, 5, 7), (torch.bfloat16,) * 2, ("half",) * 2, None, False, 0.0, 2)
@example((2, 4, 6, 6), (torch.float16, torch.float32), ("channels_last", "half"), -1.0, True, 0.0, 3)
def test_inner_products_are_those_in_float64(backend, shape, dtype, layout, w, centred, offset, salt):
    """Far from 0 too, where squares less the squared mean would leave nothing."""
    a, b = (tensor(shape, dtype[i], layout[i], salt + i) for i in range(2))
    if offset and dtype == (torch.float32,) * 2:
        a, b = a + offset, b - offset / 2
    guidance = None if w is None else torch.full((1, 1), w, device=DEVICE)
    with fastdiff.backend(backend):
        got = ops.inner(a, b, guidance=guidance, centred=centred)
    wide = [v.double().reshape(len(v), math.prod(shape[1:])) for v in (a, b)]
    want = reference.inner(*wide, None if guidance is None else guidance.double(), centred)
    assert got.dtype == torch.float32 and want.dtype == torch.float64
    assert_close(got, want, bound(*wide, w, centred), backend=backend)


def test_the_oracle_is_the_formula():
    a, b = torch.tensor([[1.0, 2.0, 6.0]]).double(), torch.tensor([[0.0, 1.0, 2.0]]).double()
    assert ops.inner(a, b).tolist() == [[41.0, 14.0, 5.0]]
    assert ops.inner(a, b, centred=True).tolist() == [[14.0, 5.0, 2.0]]
    p = torch.tensor([[2.0, 3.0, 10.0]]).double()  # 2 a - b
    for centred in (False, True):
        for w in (a[:, 1:2], a[0, 1]):  # one number, of any shape
            assert torch.equal(ops.inner(a, b, guidance=w, centred=centred), ops.inner(a, p, centred=centred))


def test_blocks_are_merged_in_several_rounds(monkeypatch):
    """Nine blocks, four at a time, the last round with one and each with another mean."""
    a = tensor((2, 8 * 4096 + 5)).cumsum(1)
    b = a.flip(1) + 1000
    want = [v.double() for v in (a, b)]
    monkeypatch.setattr(kernels, "BLOCK_MERGED", 4)
    with fastdiff.backend("triton"):
        got = ops.inner(a, b, centred=True)
    assert_close(got, reference.inner(*want, None, True), bound(*want, None, True))


@every
def test_samples_of_halves_of_a_batch_are_samples(backend):
    """What a step does: both predictions are halves of one output. A sample's sums do not depend on its batch."""
    both = tensor((6, 3, 40, 40), torch.float32, "channels_last")
    with fastdiff.backend(backend):
        whole = ops.inner(both[:3], both[3:], centred=True)
        one = ops.inner(both[1:2], both[4:5], centred=True)
    assert_same_bits(one, whole[1:2])


@every
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (2, 3, 0, 4)])
@pytest.mark.parametrize("centred", [False, True])
def test_sums_of_nothing_are_zero(backend, shape, centred):
    with fastdiff.backend(backend):
        got = ops.inner(torch.empty(shape), torch.empty(shape), centred=centred)
    assert got.shape == (shape[0], 3) and not got.any()


X = torch.zeros(2, 3)
REFUSED = [
    ({"a": X.int()}, TypeError, "a: expected one of float32, bfloat16, float16, float64, got torch.int32"),
    ({"b": X[:1]}, ValueError, "b: expected shape (2, 3), got (1, 3)"),
    ({"guidance": 2.0}, TypeError, "guidance: expected a tensor, got float"),
    ({"guidance": X[0]}, ValueError, "guidance: expected one number, got shape (3,)"),
    ({"guidance": X[0, :1].to("meta")}, ValueError, "guidance: expected device cpu, got meta"),
    ({"centred": 1}, TypeError, "centred: expected a bool, got 1"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED)
def test_what_cannot_be_right_is_refused(arguments, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        ops.inner(**({"a": X, "b": X} | arguments))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(dtype):
    a, b = (tensor((2, 3, 4), dtype, salt=i).cpu() for i in range(2))
    torch.library.opcheck(torch.ops.fastdiff.inner.default, (a, b, torch.tensor([2.0]), True))
