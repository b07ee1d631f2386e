"""The operations around their kernels: arguments, registration, gradients, choice of implementation, compilation."""

import math
import os
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from strategies import BACKENDS, DEVICE, dtypes, index, salts, shapes, table, tensor
from tolerance import ARITHMETIC, assert_close, assert_same_bits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fastdiff
from fastdiff import ops, reference
from fastdiff.ops import dispatch as _backend
from fastdiff.ops import registry

ROWS = 6
CPU = torch.device("cpu")


def cpu(x: Tensor) -> Tensor:
    return x.to(CPU)


def rows(columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return cpu(table(ROWS, columns, columns)).to(dtype)


def data(*shape: int, dtype: torch.dtype = torch.float32, salt: int = 0, layout: str = "contiguous") -> Tensor:
    return cpu(tensor(shape, dtype, layout, salt))


# --- arguments --------------------------------------------------------------------------------------------------

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
    (update, {"keep": "x0"}, ValueError, "keep: expected one of none, x0hat, x, got 'x0'"),
    (update, {"keep": "x"}, ValueError, "hist: expected exactly where keep is not 'none', got keep = 'x'"),
    (update, {"hist": X}, ValueError, "hist: expected exactly where keep is not 'none', got keep = 'none'"),
    (update, {"hist": X[0], "keep": "x"}, ValueError, "hist: expected shape (2, 3), got (3,)"),
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


# --- registration -----------------------------------------------------------------------------------------------


def sample_inputs() -> list[tuple[str, tuple]]:
    """Arguments of torch.ops.fastdiff.*: with and without each optional tensor, contiguous or not, with gradients."""
    x, other, last = data(2, 3, 4, 4), data(2, 3, 4, 4, salt=1), data(2, 3, 4, 4, layout="channels_last", salt=2)
    leaf = x.bfloat16().requires_grad_()
    t, one, seed = torch.tensor([1, 4]), torch.tensor([2]), torch.tensor([7])
    ids = torch.tensor([5, 2**32 - 1])
    nine = rows(9)
    # Of positive losses: the second output, the stored gradient, is scaled in place by what comes in, here 1.
    three = rows(3).abs()
    return [
        ("normal_", (last.clone(), seed, ids, t, 1)),
        ("normal_", (x.clone(), seed, None, one, 0)),
        ("noising", (last, t, rows(2), seed, ids, None, 1)),
        ("noising", (leaf, one, rows(2), None, None, other.requires_grad_(), 1)),
        ("loss", (last, other.detach(), t, three, seed, ids, None, 1, "huber", 0.5, True, False)),
        ("loss", (leaf, other, t, three, None, None, last, 1, "mse", 1.0, False, True)),
        ("loss", (leaf, None, one, three, seed, None, None, 1, "l1", 1.0, True, True)),
        ("scale_", (last.clone(), torch.tensor([3.0]), 0.5)),
        ("scale_", (x.clone(), torch.tensor([3.0, 2.0]), 0.5)),
        ("update", (x, last, nine, t, seed, ids, None, None, None, 1.0, 2)),
        ("update", (x, last, nine, one, None, None, other.detach(), last, x, None, 2)),
        ("update_", (x.clone(), last, nine, t, seed, None, None, None, None, None, 1.0, "none", 2)),
        ("update_", (last.clone(), x, nine, one, None, None, x, x, x, last.clone(), None, "x", 2)),
        ("noising_out", (x.clone(), last, t, rows(2), seed, ids, None, 1)),
        ("update_out", (last.clone(), x, last, nine, t, seed, None, None, None, None, x.clone(), 1.0, "x0hat", 2)),
    ]


@pytest.mark.parametrize(("name", "args"), sample_inputs())
def test_opcheck(name, args):
    """PyTorch's own tests: schema, autograd registration, fake tensors, and AOT dispatch with dynamic shapes."""
    torch.library.opcheck(getattr(torch.ops.fastdiff, name).default, args)


# --- gradients --------------------------------------------------------------------------------------------------


class Recomputed(torch.autograd.Function):
    """ops.loss(pred, x0, noise) whose backward runs it anew, since its gradient can be taken once and gradcheck asks
    more often."""

    @staticmethod
    def forward(ctx, call, *inputs):
        ctx.call = call
        ctx.save_for_backward(*inputs)
        return call(*inputs)

    @staticmethod
    def backward(ctx, incoming):
        inputs = [i.detach().requires_grad_() for i in ctx.saved_tensors]
        with torch.enable_grad():
            value = ctx.call(*inputs)
        return None, *torch.autograd.grad(value, inputs, incoming)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ops.LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_of_loss(backend, kind, reduction):
    """The value is float32 even for float64 data, so the steps are large; within them rho is at most quadratic."""
    pred, x0, noise = (data(2, 5, dtype=torch.float64, salt=i).requires_grad_() for i in range(3))
    t = torch.tensor([1, 4])

    def value(pred, x0, noise):
        return ops.loss(pred, t, rows(3), x0=x0, noise=noise, kind=kind, delta=1.0, reduction=reduction)

    r = pred - sum(f[:, None] * i for f, i in zip(rows(3)[t, :2].unbind(1), (x0, noise), strict=True))
    for kink in {"mse": (), "l1": (0,), "huber": (-1, 1)}[kind]:
        assert (r - kink).abs().min() > 2 * 2.0**-6
    with fastdiff.backend(backend):
        assert torch.autograd.gradcheck(
            lambda *inputs: Recomputed.apply(value, *inputs).double(), (pred, x0, noise), eps=2.0**-6, atol=1e-4, rtol=0
        )


def test_gradcheck_of_noising():
    x0, noise = (data(2, 5, dtype=torch.float64, salt=i).requires_grad_() for i in range(2))
    t = torch.tensor([1, 4])
    assert torch.autograd.gradcheck(lambda x0, z: ops.noising(x0, t, rows(2), noise=z), (x0, noise))
    assert torch.autograd.gradcheck(lambda x0: ops.noising(x0, t, rows(2), seed=1), (x0,))
    assert torch.autograd.gradgradcheck(lambda x0, z: ops.noising(x0, t, rows(2), noise=z), (x0, noise))


@pytest.mark.parametrize("clip", [None, 1.0])
def test_gradcheck_of_update(clip):
    inputs = tuple(data(2, 5, dtype=torch.float64, salt=i).requires_grad_() for i in range(5))
    t = torch.tensor([1, 4])

    def step(x, pred, uncond, raw, noise):
        return ops.update(x, pred, rows(9), t, uncond=uncond, raw_variance=raw, noise=noise, clip=clip)

    assert torch.autograd.gradcheck(step, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@given(shape=shapes(), dtype=dtypes, salt=salts)
def test_gradient_of_update_is_that_of_the_reference(backend, shape, dtype, salt):
    x, pred = (data(*shape, dtype=dtype, salt=salt + i).to(DEVICE).requires_grad_() for i in range(2))
    step, table = index(ROWS, shape[0], True, salt), rows(9).to(DEVICE)
    with fastdiff.backend(backend):
        out = ops.update(x, pred, table, step, seed=3)
        out.backward(torch.ones_like(out))
        plain = ops.update(x.detach(), pred.detach(), table, step, seed=3)
    assert out.dtype == dtype
    assert_close(plain, out.detach().double(), 100 * ARITHMETIC, 2, backend)
    a, b, c, d, e = (i.double() for i in reference.coefficients(table, step, x)[:5])
    for leaf, slope in ((x, c * a + d), (pred, c * b + e)):
        assert_close(leaf.grad, slope.expand(shape), 10 * ARITHMETIC)


@pytest.mark.parametrize("kind", ops.LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_gradient_of_a_loss_is_taken_twice(kind, reduction):
    pred, x0 = data(2, 5).requires_grad_(), data(2, 5, salt=1).requires_grad_()
    table = rows(3)
    value = ops.loss(pred, 1, table, x0=x0, seed=1, kind=kind, delta=0.7, reduction=reduction).sum()
    t, key = torch.tensor([1]), torch.tensor([1])
    terms = reference.loss(pred, x0, t, table, key, None, None, ops.FORWARD, kind, 0.7)[0]
    right = (terms.mean(1) if reduction == "none" else terms.mean()).sum()
    exact = torch.autograd.grad(right, (pred, x0), create_graph=True)
    for create_graph in (False, True, False, True):  # the first walk takes what is stored
        got = torch.autograd.grad(value, (pred, x0), retain_graph=True, create_graph=create_graph)
        for g, e in zip(got, exact, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-6)
            assert g.requires_grad == create_graph
        if create_graph:
            penalties = (sum((g**3).sum() for g in gs) for gs in (got, exact))
            second = [torch.autograd.grad(p, (pred, x0), retain_graph=True) for p in penalties]
            torch.testing.assert_close(second[0], second[1], rtol=1e-4, atol=1e-6)


def test_gradients_of_a_batch_of_losses_at_once():
    pred = data(3, 5).requires_grad_()
    losses = ops.loss(pred, 1, rows(3), seed=1, reduction="none")
    got = torch.autograd.grad(losses, pred, torch.eye(3), is_grads_batched=True, retain_graph=True)[0]
    right = torch.stack([torch.autograd.grad(losses[i], pred, retain_graph=True)[0] for i in range(3)])
    torch.testing.assert_close(got, right)


@pytest.mark.parametrize("by", ["pred", "x0", "noise"])
def test_checkpointing_around_a_loss(by):
    """A checkpoint counts how often each saved tensor is read."""
    given = {name: data(2, 5, salt=k) for k, name in enumerate(("pred", "x0", "noise"))}
    given[by].requires_grad_()

    def f(pred, x0, noise):
        x_t = ops.noising(x0, 1, rows(2), noise=noise)
        return ops.loss(pred * x_t, 1, rows(3), x0=x0, noise=noise)

    right = torch.autograd.grad(f(**given), given[by])[0]
    got = torch.autograd.grad(checkpoint(f, *given.values(), use_reentrant=False), given[by])[0]
    assert torch.equal(got, right)


@pytest.mark.parametrize("op", ["loss", "vlb"])
def test_the_backward_of_a_loss_allocates_no_tensor(op):
    """The gradient is there since the forward; nothing else may be as large."""

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            self.largest = max([self.largest, *(r.numel() for r in tree_leaves(result) if isinstance(r, Tensor))])
            return result

    pred = data(4, 50).requires_grad_()
    if op == "loss":
        value = ops.loss(pred, 1, rows(3), seed=1)
    else:
        value = ops.vlb(pred, data(4, 50), data(4, 50), 1, rows(6), reduction="mean")
    with Sizes() as seen:
        torch.autograd.grad(value, pred)
    assert seen.largest < pred.numel()


def test_only_what_needs_a_gradient_gets_one():
    pred, x0, noise = (data(2, 5, salt=i) for i in range(3))
    value = ops.loss(pred, 1, rows(3), x0=x0.requires_grad_(), noise=noise)
    value.backward()
    p, q, w = rows(3)[1].double()
    want = -p * 2 * w * (pred - p * x0.detach() - q * noise) / 10
    assert_close(x0.grad, want, 1e-5)
    assert pred.grad is None and noise.grad is None
    assert not ops.loss(pred, 1, rows(3), noise=noise).requires_grad
    with torch.no_grad():
        assert not ops.loss(pred, 1, rows(3), x0=x0, noise=noise).requires_grad
        assert not ops.noising(x0, 1, rows(2), noise=noise).requires_grad


# --- choice of implementation -----------------------------------------------------------------------------------


@pytest.fixture
def interpreter(monkeypatch):
    """Sets TRITON_INTERPRET, as a process would start with it."""

    def set_to(value: str | None) -> None:
        if value is None:
            monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        else:
            monkeypatch.setenv("TRITON_INTERPRET", value)
        _backend.interpreting.cache_clear()

    yield set_to
    _backend.interpreting.cache_clear()


@pytest.fixture
def chosen(monkeypatch):
    """Which implementation ran each op since the last look, instead of running it."""
    seen = []

    class Launchers:
        def __init__(self, name):
            self.CODES = {torch.float32: 0}
            self.noising = lambda **operands: seen.append(name)

    def plain(x0, *args):
        seen.append("reference")
        return x0.clone()

    monkeypatch.setattr(_backend, "launchers", Launchers)
    monkeypatch.setattr(reference, "noising", plain)

    def look(x: Tensor = X) -> str:
        ops.noising(x, 0, rows(2, torch.float32), seed=1)
        return seen.pop()

    return look


def test_backend_forces_an_implementation(chosen, interpreter):
    interpreter("1")
    for name in ("triton", "cpu", "reference"):
        with fastdiff.backend(name):
            assert chosen() == name
            assert chosen(DOUBLE) == "reference"


def test_backends_nest_and_end_with_their_block(chosen):
    with fastdiff.backend("cpu"):
        with pytest.raises(KeyError), fastdiff.backend("reference"):
            assert chosen() == "reference"
            raise KeyError
        assert chosen() == "cpu"
        before = fastdiff.backend("reference")
        assert chosen() == "reference"
        before.__exit__()
        assert chosen() == "cpu"


def test_the_default_backend_of_cpu_tensors(chosen, interpreter, monkeypatch):
    with fastdiff.backend(None):
        interpreter("1")
        assert chosen() == "triton"
        interpreter(None)
        assert chosen() == "cpu"
        monkeypatch.setitem(sys.modules, "numba", None)
        _backend.has_numba.cache_clear()
        try:
            with pytest.warns(UserWarning, match=r"pip install 'fastdiff-kernels\[cpu\]'") as caught:
                assert chosen() == chosen() == "reference"
            assert len(caught) == 1, "one hint is enough"
        finally:
            _backend.has_numba.cache_clear()


def test_backends_that_cannot_be(interpreter):
    with pytest.raises(ValueError, match="backend: expected one of triton, cpu, reference or None, got 'cuda'"):
        fastdiff.backend("cuda")
    interpreter(None)
    with fastdiff.backend("triton"), pytest.raises(ValueError, match="TRITON_INTERPRET=1, got device cpu"):
        ops.noising(X, 0, rows(2), seed=1)
    with (
        fastdiff.backend("cpu"),
        pytest.raises(ValueError, match="backend: 'cpu' expected a CPU tensor, got device meta"),
    ):
        _backend.kernels_of(META)


def run(script: str, **variables: str) -> subprocess.CompletedProcess:
    """A fresh interpreter without this one's variables."""
    mine = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTDIFF_BACKEND")}
    return subprocess.run(
        [sys.executable, "-c", script], env={**mine, **variables}, capture_output=True, text=True, check=False
    )


def test_import_needs_no_optional_package():
    optional = ("triton", "numba", "safetensors", "tqdm", "sklearn", "PIL")
    done = run(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import fastdiff, fastdiff.ddpm, fastdiff.unet, fastdiff.schedule, fastdiff.steps\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        f"print(sorted(new & set({optional})), len(new) > 0)"
    )
    assert done.stdout.strip() == "[] True", done.stderr


def test_the_environment_chooses_the_backend():
    script = (
        "import torch, fastdiff\n"
        "from fastdiff import ops\n"
        "print(fastdiff.ops.dispatch.forced())\n"
        "try: ops.normal((1, 4), 1)\n"
        "except ValueError as error: print(error)\n"
    )
    done = run(script, FASTDIFF_BACKEND="triton")
    assert done.stdout.splitlines() == [
        "triton",
        "backend: 'triton' expected a GPU tensor or TRITON_INTERPRET=1, got device cpu",
    ], done.stderr
    done = run(script, FASTDIFF_BACKEND="fast")
    assert done.returncode == 1 and "ValueError: backend: expected one of triton, cpu, reference" in done.stderr


# --- compilation ------------------------------------------------------------------------------------------------


def train_step(x0: Tensor, weight: Tensor, t: Tensor, seed: Tensor) -> Tensor:
    x_t = ops.noising(x0, t, rows_2, seed=seed)
    return ops.loss(x_t * weight, t, rows_3, x0=x0, seed=seed, kind="huber")


def sample_step(x: Tensor, weight: Tensor, step: Tensor, seed: Tensor) -> Tensor:
    hist = x * 0.5
    out = ops.update(x, x * weight, rows_9, step, seed=seed, clip=1.0, hist=hist, keep="x0hat")
    return ops.update(out, hist, rows_9, step, noisy=False, inplace=True)


rows_2, rows_3, rows_9 = rows(2), rows(3), rows(9)


@pytest.fixture
def one_compilation():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def test_compiled_training(one_compilation):
    """The whole compiler once: equal values and gradients, one graph for all timesteps and seeds."""
    compiled = torch.compile(train_step, fullgraph=True, backend="inductor")
    x0 = data(2, 3, 4, 4)
    for t, seed in ((0, 1), (5, -3), (2, 2**40)):
        results = []
        for call in (train_step, compiled):
            weight = data(2, 3, 4, 4, salt=1).requires_grad_()
            value = call(x0, weight, torch.tensor([t, 1]), torch.tensor([seed]))
            (3 * value).backward()
            results.append((value.detach(), weight.grad))
        for eager, other in zip(*results, strict=True):
            assert_close(other, eager.double(), 1e-6 * (1 + eager.double().abs()))


def test_compiled_sampling(one_compilation):
    compiled = torch.compile(sample_step, fullgraph=True, backend="aot_eager")
    weight = data(2, 3, 4, 4, salt=1)
    with torch.inference_mode():
        for step, seed in ((0, 1), (5, -3), (2, 2**40)):
            x, same = data(2, 3, 4, 4), data(2, 3, 4, 4)
            args = weight, torch.tensor([step]), torch.tensor([seed])
            assert_close(compiled(x, *args), sample_step(same, *args).double(), 1e-6)


def test_a_drawn_seed_is_no_constant_of_the_graph(one_compilation):
    compiled = torch.compile(lambda x: ops.noising(x, 1, rows_2), fullgraph=True, backend="aot_eager")
    x = data(2, 8)
    torch.manual_seed(1)
    first, second = compiled(x), compiled(x)
    torch.manual_seed(1)
    assert_same_bits(compiled(x), first)
    assert not torch.equal(first, second)


# --- no wait for the device ---------------------------------------------------------------------------------------


def test_nothing_reads_a_tensor(monkeypatch):
    """Meta tensors have no values: to ask for one is an error. They stand for a device that would have to be waited
    for, first in front of the implementations, then in them."""
    x, t, seed = (i.to("meta") for i in (data(2, 3, 4, 4), torch.tensor([1, 4]), torch.tensor([7])))
    two, three, nine = (rows(n).to("meta") for n in (2, 3, 9))
    with pytest.raises(RuntimeError, match="meta"):
        t.max().item()
    for key in (seed, None):
        pred = ops.noising(x, t, two, seed=key).requires_grad_()
        ops.loss(pred, t, three, x0=x, seed=key, sample_ids=t).backward()
        assert pred.grad.shape == x.shape
        assert ops.update(x, x, nine, t, seed=key, clip=1.0, sample_ids=t, inplace=True) is x
        ops.update(x, x, nine, t[:1], seed=key, hist=x.clone(), keep="x0hat", raw_variance=x, uncond=x)

    launched = []

    class Launchers:
        def __getattr__(self, name):
            return lambda **operands: launched.append(name)

    monkeypatch.setattr(_backend, "kernels_of", lambda x: Launchers())
    run = {name: op.implementation for name, op in registry.OPS.items()}
    run["normal_"](x, seed, t, t, 0)
    run["noising"](x, t, two, seed, t, None, 1)
    _, grad = run["loss"](x, x, t, three, seed, t, None, 1, "mse", 1.0, True, True)
    run["scale_"](grad, x[:, 0, 0, 0], 0.5)
    run["update_"](x, x, nine, t, seed, t, None, None, None, None, 1.0, "none", 2)
    assert launched == ["normal_", "noising", "loss", "scale_", "update"]
