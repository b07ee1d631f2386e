"""Registration of the ops, their gradients, and compilation."""

from functools import partial

import pytest
import torch
from cpu_operands import ROWS, data, rows
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

# --- registration -------------------------------------------------------------------------------------------------


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
        ("loss", (last, other.detach(), t, three, seed, ids, None, None, 1, "huber", 0.5, True, False)),
        ("loss", (leaf, other, t, three, None, None, last, x, 1, "mse", 1.0, False, True)),
        ("loss", (leaf, None, one, three, seed, None, None, None, 1, "l1", 1.0, True, True)),
        ("scale_", (last.clone(), torch.tensor([3.0]), 0.5)),
        ("scale_", (x.clone(), torch.tensor([3.0, 2.0]), 0.5)),
        ("update", (x, last, nine, t, seed, ids, None, None, None, 1.0, 2)),
        ("update", (x, last, nine, one, None, None, other.detach(), last, x, None, 2)),
        ("update_", (x.clone(), last, nine, t, seed, None, None, None, None, None, 1.0, "none", 2)),
        ("update_", (last.clone(), x, nine, one, None, None, x, x, x, last.clone(), None, "x", 2)),
        ("update_", (x.clone(), x, rows(14), t, None, None, None, None, None, torch.stack((x, x)), None, "mix", 2)),
        ("noising_out", (x.clone(), last, t, rows(2), seed, ids, None, 1)),
        ("update_out", (last.clone(), x, last, nine, t, seed, None, None, None, None, x.clone(), 1.0, "x0hat", 2)),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "args"), sample_inputs())
def test_opcheck(name, args):
    """PyTorch's own tests: schema, autograd registration, fake tensors, and AOT dispatch with dynamic shapes."""
    torch.library.opcheck(getattr(torch.ops.fastdiff, name).default, args)


# --- gradients ----------------------------------------------------------------------------------------------------


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


@pytest.mark.slow
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


# --- compilation --------------------------------------------------------------------------------------------------


def test_a_gradient_that_was_not_stored_is_computed_in_the_backward_pass():
    """The ops themselves can be called so; the functions ask for what will be needed."""
    pred, raw, x0, noise = (tensor((2, 5), salt=i).requires_grad_(i < 2) for i in range(4))
    t, loss_rows, vlb_rows = index(4, 2, True, 0), table(4, 3, 0), table(4, 6, 0)
    ask_loss = partial(torch.ops.fastdiff.loss, pred, x0, t, loss_rows, None, None, noise, None, 1, "mse", 1.0, False)
    ask_vlb = partial(torch.ops.fastdiff.vlb, pred, raw, noise, x0, t, vlb_rows.clamp(min=0), None, False)
    for ask, leaves, flags in ((ask_loss, [pred], 1), (ask_vlb, [pred, raw], 2)):
        value, *stored = ask(*[False] * flags)
        assert all(grad.numel() == 0 for grad in stored)
        wanted = torch.autograd.grad(ask(*[True] * flags)[0], leaves)
        for got, want in zip(torch.autograd.grad(value, leaves), wanted, strict=True):
            assert_close(got, want.double(), 0.0, 4)  # times 1/n or divided by n


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


@pytest.mark.slow
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


@pytest.mark.slow
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
    _, grad = run["loss"](x, x, t, three, seed, t, None, None, 1, "mse", 1.0, True, True)
    run["scale_"](grad, x[:, 0, 0, 0], 0.5)
    run["update_"](x, x, nine, t, seed, t, None, None, None, None, 1.0, "none", 2)
    assert launched == ["normal_", "noising", "loss", "scale_", "update"]
