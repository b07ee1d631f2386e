"""What the ops take and what they refuse."""

import math
import re

import pytest
import torch
from cpu_operands import ROWS, data, rows
from strategies import BACKENDS, DEVICE
from tolerance import assert_close, assert_same_bits

import fastdiff
from fastdiff import ops

X, META = torch.zeros(2, 3), torch.zeros(2, 3, device="meta")
INT, DOUBLE = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.float64)
GRAD = torch.zeros(2, 3, requires_grad=True)
FLOATS = "float32, bfloat16, float16, float64"


def normal(shape=(2, 3), **options):
    return ops.normal(shape, **options)


def noising(x0=X, t=0, rows=rows(2), **options):  # noqa: B008
    return ops.noising(x0, t, rows, **options)


def loss(pred=X, t=0, rows=rows(3), **options):  # noqa: B008
    return ops.loss(pred, t, rows, **options)


def update(x=X, pred=X, rows=rows(9), step=0, **options):  # noqa: B008
    return ops.update(x, pred, rows, step, **options)


REFUSED = [
    (normal, {"dtype": torch.int32}, TypeError, f"dtype: expected one of {FLOATS}, got torch.int32"),
    (normal, {"shape": ()}, ValueError, "shape: expected a batch dimension, got ()"),
    (normal, {"stream": -1}, ValueError, "stream: expected a number in [0, 2^32), got -1"),
    (normal, {"stream": 2**32}, ValueError, f"stream: expected a number in [0, 2^32), got {2**32}"),
    (normal, {"step": 1.5}, TypeError, "step: expected an int or an int64 tensor, got float"),
    (normal, {"step": True}, TypeError, "step: expected an int or an int64 tensor, got bool"),
    (normal, {"step": 2**63}, ValueError, f"step: expected 64 bits, got {2**63}"),
    (normal, {"step": INT.int()}, TypeError, "step: expected int64, got torch.int32"),
    (normal, {"step": INT[:1].expand(3)}, ValueError, "step: expected shape () or (2,), got (3,)"),
    (normal, {"step": INT[None]}, ValueError, "step: expected shape () or (2,), got (1, 2)"),
    (normal, {"step": INT.to("meta")}, ValueError, "step: expected device cpu, got meta"),
    (normal, {"seed": 1.5}, TypeError, "seed: expected an int, an int64 tensor or None, got float"),
    (normal, {"seed": False}, TypeError, "seed: expected an int, an int64 tensor or None, got bool"),
    (normal, {"seed": INT}, ValueError, "seed: expected one int64 number, got torch.int64 of shape (2,)"),
    (normal, {"seed": X[0, 0]}, ValueError, "seed: expected one int64 number, got torch.float32 of shape ()"),
    (normal, {"seed": INT[:1].to("meta")}, ValueError, "seed: expected device cpu, got meta"),
    (normal, {"sample_ids": [0, 1]}, TypeError, "sample_ids: expected an int64 tensor, got list"),
    (normal, {"sample_ids": X[:, 0]}, TypeError, "sample_ids: expected int64, got torch.float32"),
    (normal, {"sample_ids": INT[:1]}, ValueError, "sample_ids: expected shape (2,), got (1,)"),
    (normal, {"sample_ids": INT.to("meta")}, ValueError, "sample_ids: expected device cpu, got meta"),
    (normal, {"sample_ids": INT - 1}, ValueError, f"sample_ids: expected values in [0, {2**32}), got -1"),
    (normal, {"sample_ids": INT + 2**32}, ValueError, f"sample_ids: expected values in [0, {2**32}), got {2**32}"),
    (noising, {"x0": [0.0]}, TypeError, "x0: expected a tensor, got list"),
    (noising, {"x0": INT}, TypeError, f"x0: expected one of {FLOATS}, got torch.int64"),
    (noising, {"x0": X[0, 0]}, ValueError, "x0: expected a batch dimension, got shape ()"),
    (noising, {"t": "1"}, TypeError, "t: expected an int or an int64 tensor, got str"),
    (noising, {"t": -1}, ValueError, f"t: expected values in [0, {ROWS}), got -1"),
    (noising, {"t": torch.tensor([0, ROWS])}, ValueError, f"t: expected values in [0, {ROWS}), got {ROWS}"),
    (noising, {"sample_ids": INT - 5}, ValueError, f"sample_ids: expected values in [0, {2**32}), got -5"),
    (noising, {"rows": [[1, 0]]}, TypeError, "table: expected a tensor, got list"),
    (noising, {"rows": rows(2).double()}, TypeError, "table: expected float32, got torch.float64"),
    (noising, {"x0": DOUBLE, "rows": rows(2).half()}, TypeError, "table: expected float32, float64, got torch.float16"),
    (noising, {"rows": rows(3)}, ValueError, "table: expected a contiguous (rows, 2) table, got shape (6, 3)"),
    (noising, {"rows": rows(2)[:0]}, ValueError, "table: expected a contiguous (rows, 2) table, got shape (0, 2)"),
    (noising, {"rows": rows(2)[0]}, ValueError, "table: expected a contiguous (rows, 2) table, got shape (2,)"),
    (noising, {"rows": rows(3)[:, :2]}, ValueError, "table: expected a contiguous (rows, 2) table, got shape (6, 2)"),
    (noising, {"rows": rows(2).to("meta")}, ValueError, "table: expected device cpu, got meta"),
    (noising, {"seed": 1, "noise": X}, ValueError, "seed: expected None where noise is given"),
    (noising, {"noise": 1.0}, TypeError, "noise: expected a tensor, got float"),
    (noising, {"noise": X.int()}, TypeError, f"noise: expected one of {FLOATS}, got torch.int32"),
    (noising, {"noise": X[:1]}, ValueError, "noise: expected shape (2, 3), got (1, 3)"),
    (noising, {"noise": META}, ValueError, "noise: expected device cpu, got meta"),
    (loss, {"pred": X.int()}, TypeError, f"pred: expected one of {FLOATS}, got torch.int32"),
    (loss, {"t": ROWS}, ValueError, f"t: expected values in [0, {ROWS}), got {ROWS}"),
    (loss, {"rows": rows(2)}, ValueError, "table: expected a contiguous (rows, 3) table, got shape (6, 2)"),
    (loss, {"x0": X.T}, ValueError, "x0: expected shape (2, 3), got (3, 2)"),
    (loss, {"seed": 1, "noise": X}, ValueError, "seed: expected None where noise is given"),
    (loss, {"seed": 1, "sample_ids": INT - 1}, ValueError, f"sample_ids: expected values in [0, {2**32}), got -1"),
    (loss, {"kind": "l2"}, ValueError, "kind: expected one of mse, l1, huber, got 'l2'"),
    (loss, {"delta": 0.0}, ValueError, "delta: expected a number above 0, got 0.0"),
    (loss, {"delta": math.nan}, ValueError, "delta: expected a number above 0, got nan"),
    (loss, {"reduction": "sum"}, ValueError, "reduction: expected 'mean' or 'none', got 'sum'"),
    (update, {"x": X.int()}, TypeError, f"x: expected one of {FLOATS}, got torch.int32"),
    (update, {"pred": X[:, :2]}, ValueError, "pred: expected shape (2, 3), got (2, 2)"),
    (update, {"rows": rows(3)}, ValueError, "rows: expected a contiguous (rows, 9) table, got shape (6, 3)"),
    (update, {"step": ROWS}, ValueError, f"step: expected values in [0, {ROWS}), got {ROWS}"),
    (update, {"pred": GRAD, "step": ROWS}, ValueError, f"step: expected values in [0, {ROWS}), got {ROWS}"),
    (update, {"pred": GRAD, "sample_ids": INT - 1}, ValueError, f"sample_ids: expected values in [0, {2**32}), got -1"),
    (update, {"seed": 1, "noise": X}, ValueError, "seed: expected None where noise is given"),
    (update, {"seed": 1, "noisy": False}, ValueError, "seed: expected None with noisy=False"),
    (update, {"uncond": X[:1]}, ValueError, "uncond: expected shape (2, 3), got (1, 3)"),
    (update, {"raw_variance": META}, ValueError, "raw_variance: expected device cpu, got meta"),
    (update, {"keep": "x0"}, ValueError, "keep: expected one of none, x0hat, x, mix, new mix, new x0hat, got 'x0'"),
    (update, {"keep": "x"}, ValueError, "hist: expected exactly where keep is not 'none', got keep = 'x'"),
    (update, {"hist": X}, ValueError, "hist: expected exactly where keep is not 'none', got keep = 'none'"),
    (update, {"hist": X[0], "keep": "x"}, ValueError, "hist: expected shape (2, 3), got (3,)"),
    (update, {"keep": "mix", "hist": X}, ValueError, "rows: expected a contiguous (rows, 14) table, got shape (6, 9)"),
    (update, {"keep": "x", "hist": X[None]}, ValueError, "rows: expected a contiguous (rows, 14) table"),
    (
        update,
        {"rows": rows(14), "keep": "x", "hist": X[None]},
        ValueError,
        "hist: expected shape (2, 3), got (1, 2, 3)",
    ),
    (
        update,
        {"rows": rows(14), "keep": "x", "hist": X[None, :, :2].expand(3, 2, 2)},
        ValueError,
        "hist: expected shape (3, 2, 3), got (3, 2, 2)",
    ),
    (
        update,
        {"hist": X.half(), "keep": "x"},
        TypeError,
        "hist: expected the dtype of x, torch.float32, got torch.float16",
    ),
    (update, {"clip": 0.0}, ValueError, "clip: expected a number above 0 or None, got 0.0"),
    (update, {"clip": math.nan}, ValueError, "clip: expected a number above 0 or None, got nan"),
    (update, {"pred": GRAD, "inplace": True}, ValueError, "inplace, hist: a tensor would be overwritten"),
    (update, {"pred": GRAD, "hist": X, "keep": "x"}, ValueError, "inplace, hist: a tensor would be overwritten"),
]


@pytest.mark.parametrize(("op", "arguments", "error", "message"), REFUSED)
def test_what_cannot_be_right_is_refused(op, arguments, error, message):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with pytest.raises(error, match="^" + re.escape(message)):
        op(**arguments)
    if not arguments.keys() & {"t", "step", "sample_ids"}:
        assert torch.equal(torch.get_rng_state(), before), "refused before any work"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (0, 3, 4, 4), (2, 3, 0, 4)])
def test_empty_tensors(backend, shape):
    x, pred = data(*shape), data(*shape).requires_grad_()
    t = torch.zeros(shape[0], dtype=torch.int64)
    with fastdiff.backend(backend):
        assert ops.normal(shape, 1, step=t).shape == shape
        assert ops.noising(x, t, rows(2), seed=1).shape == shape
        assert ops.noising(x, 0, rows(2), noise=x).shape == shape
        assert ops.update(x, x, rows(9), t, seed=1, clip=1.0).shape == shape
        assert ops.update(x, x, rows(9), 0, hist=x.clone(), keep="x", inplace=True) is x
        # The mean of nothing is NaN.
        whole = ops.loss(pred, t, rows(3), x0=x, seed=1)
        assert whole.shape == () and math.isnan(whole.detach())
        each = ops.loss(pred, t, rows(3), x0=x, seed=1, reduction="none")
        assert each.shape == shape[:1] and bool(each.isnan().all())
        whole.backward()
        assert pred.grad.shape == shape


@pytest.mark.parametrize("t", [3, torch.tensor(3), torch.tensor([3]), torch.tensor([3, 3])])
def test_an_index_is_a_number_or_one_for_each_sample(t):
    x, z = data(2, 5), data(2, 5, salt=1)
    alpha, sigma = rows(2)[3]
    assert torch.equal(ops.noising(x, t, rows(2), noise=z), alpha * x + sigma * z)
    a, b, c, d, e, f = rows(9)[3, :6]
    assert_close(
        ops.update(x, z, rows(9), t, noise=z), (c * (a * x + b * z) + d * x + e * z + f * z).double(), 1e-5
    )  # fmt: skip
    _, q, w = rows(3)[3]
    assert_close(ops.loss(x, t, rows(3), noise=z), (w * (x - q * z) ** 2).mean().double(), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_clip_is_none(backend):
    x, pred = data(2, 5).to(DEVICE), data(2, 5, salt=1).to(DEVICE)
    direct = torch.tensor([[0.5, 0.5, 0, 1, 1, 0, 0, 0, 0]], device=DEVICE)  # c = 0
    with fastdiff.backend(backend):
        for row in (direct, rows(9).to(DEVICE)):
            free, bounded = (ops.update(x, pred, row, 0, clip=c, noisy=False) for c in (None, math.inf))
            assert_same_bits(bounded, free)


def test_noise_may_be_given_where_none_would_be_drawn():
    x, z = data(2, 5), data(2, 5, salt=1)
    given = ops.update(x, x, rows(9), 1, noise=z, noisy=False)
    assert torch.equal(given, ops.update(x, x, rows(9), 1, noise=z))
    assert not torch.equal(given, ops.update(x, x, rows(9), 1, noisy=False))
