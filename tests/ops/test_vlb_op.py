"""The op of the bound: what it refuses, its registration, compilation, and equal bits."""

import re

import pytest
import torch
from bound_inputs import ROWS, bound_rows, inputs
from strategies import BACKENDS, DEVICE, table
from tolerance import assert_close, assert_same_bits

import fastdiff
from fastdiff import ops, reference
from fastdiff.bound import LossSecondMoment, vlb_rows
from fastdiff.ops import dispatch as _backend
from fastdiff.ops import registry
from fastdiff.schedule import linear

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")
every = pytest.mark.parametrize("backend", BACKENDS)


# --- what cannot be computed --------------------------------------------------------------------------------------

OUTSIDE = (-1, 2, ROWS, 0, 2**31, -(2**31), ROWS - 1, 2**32 + 1, -(2**63), 2**63 - 1)


@every
def test_a_level_outside_the_table_gives_nan_in_its_sample(backend):
    """On a GPU it cannot be refused without waiting for the device, so the implementations are called as such."""
    t, rows = torch.tensor(OUTSIDE, device=DEVICE), bound_rows(0)
    pred, raw, x_t, x0 = inputs((len(OUTSIDE), 5), dtype=torch.float32)
    if backend == "triton":
        value, *grads = torch.zeros(len(pred), device=DEVICE), torch.zeros_like(pred), torch.zeros_like(raw)
        _backend.launchers("triton").vlb(value, *grads, pred, raw, x_t, x0, t, rows, 0.5, 1.0)
        results = [value[:, None], *grads]
    else:
        results = reference.vlb(pred, raw, x_t, x0, t, rows, 0.5)
    for result in results:
        nan = result.isnan()
        assert torch.equal(nan.all(1), nan.any(1))
        assert nan.all(1).tolist() == [not 0 <= i < ROWS for i in OUTSIDE]


@every
def test_the_level_of_data_has_no_term(backend):
    pred, raw, x_t, x0 = inputs((2, 5), dtype=torch.float32)
    rows = vlb_rows(linear(4), "eps", "learned").float().to(DEVICE)
    with fastdiff.backend(backend):
        nats = ops.vlb(pred, x_t, x0, torch.tensor([0, 1], device=DEVICE), rows, raw_variance=raw)
    assert nats.isnan().tolist() == [True, False]


X, GRAD = torch.zeros(2, 3), torch.zeros(2, 3, requires_grad=True)
REFUSED = [
    ({"pred": X.int()}, TypeError, "pred: expected one of float32, bfloat16, float16, float64, got torch.int32"),
    ({"x_t": X[:1]}, ValueError, "x_t: expected shape (2, 3), got (1, 3)"),
    ({"x0": None}, TypeError, "x0: expected a tensor, got NoneType"),
    ({"raw_variance": X.to("meta")}, ValueError, "raw_variance: expected device cpu, got meta"),
    ({"t": ROWS}, ValueError, f"t: expected values in [0, {ROWS}), got {ROWS}"),
    ({"t": -1, "x0": GRAD}, ValueError, f"t: expected values in [0, {ROWS}), got -1"),
    ({"rows": torch.zeros(ROWS, 7)}, ValueError, "rows: expected a contiguous (rows, 6) table, got shape (6, 7)"),
    ({"rows": torch.zeros(ROWS, 6).double()}, TypeError, "rows: expected float32, got torch.float64"),
    ({"clip": 0.0}, ValueError, "clip: expected a number above 0 or None, got 0.0"),
    ({"reduction": "sum"}, ValueError, "reduction: expected 'mean' or 'none', got 'sum'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED)
def test_what_cannot_be_right_is_refused(arguments, error, message):
    right = {"pred": X, "x_t": X, "x0": X, "t": 0, "rows": torch.zeros(ROWS, 6)}
    with pytest.raises(error, match="^" + re.escape(message)):
        ops.vlb(**(right | arguments))


@every
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (2, 3, 0, 4)])
def test_empty_tensors(backend, shape):
    pred, raw, x_t, x0 = (torch.empty(shape, requires_grad=i < 2) for i in range(4))
    with fastdiff.backend(backend):
        each = ops.vlb(pred, x_t, x0, 0, bound_rows(0).cpu(), raw_variance=raw)
        whole = ops.vlb(pred, x_t, x0, 0, bound_rows(0).cpu(), raw_variance=raw, reduction="mean")
        whole.backward()
    assert each.shape == shape[:1] and bool(each.isnan().all())
    assert whole.shape == () and whole.isnan() and pred.grad.shape == raw.grad.shape == shape


# --- the op -------------------------------------------------------------------------------------------------------


def sample_inputs() -> list[tuple]:
    """Arguments of torch.ops.fastdiff.vlb: fixed or learned variance, each gradient or none. What comes in is 1, which
    leaves the stored gradient, the op's other outputs, as it is."""
    pred, raw, x_t, x0 = (i.cpu() for i in inputs((2, 3, 4, 4), dtype=torch.float32))
    last = x_t.to(memory_format=torch.channels_last)
    t, one, rows = torch.tensor([1, 4]), torch.tensor([2]), bound_rows(0).cpu()
    leaf, half = (i.detach().clone().requires_grad_() for i in (pred, raw.half()))
    return [
        (pred, None, last, x0, t, rows, 1.0, True, False, False),
        (pred, raw, x_t, last, one, rows, None, False, False, False),
        (leaf, None, x_t, x0, one, rows, 1.0, True, True, False),
        (leaf, half, last, x0, t, rows, None, False, True, True),
        (pred.bfloat16(), half, x_t, x0, t, rows, 1.0, True, False, True),
        (pred.double(), raw, x_t, x0, t, rows.double(), 1.0, True, False, False),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("args", sample_inputs())
def test_opcheck(args):
    torch.library.opcheck(torch.ops.fastdiff.vlb.default, args)


@pytest.mark.parametrize("decoder", [False, True])
def test_a_gradient_is_taken_twice(decoder):
    pred, raw, x_t, x0 = (i.cpu() for i in inputs((2, 5), dtype=torch.float32))
    leaves = pred.requires_grad_(), raw.requires_grad_()
    rows, t = bound_rows(0).cpu(), torch.tensor([1])
    rows[:, 5] = float(decoder)
    value = ops.vlb(pred, x_t, x0, 1, rows, raw_variance=raw, reduction="mean")
    exact = torch.autograd.grad(reference.vlb(pred, raw, x_t, x0, t, rows, None)[0].mean(), leaves, create_graph=True)
    for create_graph in (False, True, False):
        got = torch.autograd.grad(value, leaves, retain_graph=True, create_graph=create_graph)
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-6)
        if create_graph:
            squares = (sum((g**2).sum() for g in gs) for gs in (got, exact))
            second = [torch.autograd.grad(square, leaves, retain_graph=True) for square in squares]
            torch.testing.assert_close(second[0], second[1], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_compiled_training():
    """One graph, no break: the hybrid loss of Nichol & Dhariwal 2021, eq. 16."""
    x_t, x0, weight = (i.cpu() for i in inputs((2, 3, 4, 4), dtype=torch.float32)[:3])
    rows, loss_rows = bound_rows(0).cpu(), table(ROWS, 3, 3).cpu()

    def step(weight, t):
        pred, raw = torch.cat((x_t * weight, x_t + weight), 1).chunk(2, 1)
        nats = ops.vlb(pred, x_t, x0, t, rows, raw_variance=raw, clip=1.0, detach_mean=True, reduction="mean")
        return ops.loss(pred, t, loss_rows, x0=x0) + 0.5 * nats

    torch._dynamo.reset()
    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = weight.clone().requires_grad_()
        value = call(leaf, torch.tensor([1, 4]))
        value.backward()
        results.append((value.detach(), leaf.grad))
    for eager, compiled in zip(*results, strict=True):
        assert_close(compiled, eager.double(), 1e-6 * (1 + eager.double().abs()))


def test_nothing_reads_a_tensor(monkeypatch):
    """Meta tensors have no values: to ask for one is an error."""
    pred, raw, x_t, x0 = (i.to("meta") for i in inputs((2, 5), dtype=torch.float32))
    t, rows = torch.tensor([1, 4]).to("meta"), bound_rows(0).to("meta")
    pred.requires_grad_()
    ops.vlb(pred, x_t, x0, t, rows, raw_variance=raw).sum().backward()
    assert pred.grad.shape == pred.shape
    launched = []
    launchers = type("Launchers", (), {"vlb": staticmethod(lambda **operands: launched.append(len(operands)))})
    monkeypatch.setattr(_backend, "kernels_of", lambda x: launchers)
    registry.OPS["vlb"].implementation(pred.detach(), raw, x_t, x0, t, rows, 1.0, True, True, True)
    assert launched == [11]
    moments = LossSecondMoment(6).to("meta")
    levels, weights = moments.sample(3)
    moments.update(levels, weights)


@every
def test_equal_bits_every_time(backend):
    results = []
    for _ in range(2):
        pred, raw, x_t, x0 = (i.requires_grad_(n < 2) for n, i in enumerate(inputs((3, 700), dtype=torch.float32)))
        with fastdiff.backend(backend):
            value = ops.vlb(pred, x_t, x0, torch.arange(3, device=DEVICE), bound_rows(2), raw_variance=raw)
            (3 * value.sum()).backward()
        results.append((value.detach(), pred.grad, raw.grad))
    for first, second in zip(*results, strict=True):
        assert_same_bits(first, second)
