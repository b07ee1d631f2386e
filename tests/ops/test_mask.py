"""The mask of the loss: a weight of each element, in the value and in the gradient."""

import pytest
import torch
from strategies import BACKENDS, DEVICE, index, table, tensor
from tolerance import ARITHMETIC, SUMMATION, assert_close, assert_same_bits

import fastdiff
from fastdiff import ops, reference

ROWS = 6
every = pytest.mark.parametrize("backend", BACKENDS)


def ask(pred, mask, kind="mse", reduction="mean", **noise):
    leaf = pred.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    t = index(ROWS, len(pred), True, 1)
    x0 = tensor(pred.shape, torch.float32, salt=2)
    value = ops.loss(leaf, t, table(ROWS, 3, 1), x0=x0, mask=mask, kind=kind, reduction=reduction, **noise)
    value.sum().backward()
    return value.detach(), leaf.grad


@every
@pytest.mark.parametrize("kind", ops.LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_masked_loss_is_the_formula_in_float64(backend, kind, reduction):
    shape = (2, 3, 5, 7)
    pred, noise, x0 = (tensor(shape, torch.float32, salt=salt) for salt in (4, 3, 2))
    mask = tensor(shape, torch.float32, salt=5).abs()
    with fastdiff.backend(backend):
        value, grad = ask(pred, mask, kind, reduction, noise=noise)
    t, rows = index(ROWS, 2, True, 1), table(ROWS, 3, 1).double()
    p, q, w = reference.coefficients(rows, t, pred.double())
    r = pred.double() - p * x0.double() - q * noise.double()
    size = pred.double().abs() + (p * x0).abs() + (q * noise).abs()
    rho, slope = {
        "mse": (r * r, 2 * r),
        "l1": (r.abs(), r.sign()),
        "huber": (torch.where(r.abs() <= 1, r * r / 2, r.abs() - 0.5), r.clamp(-1, 1)),
    }[kind]
    count = r.numel() if reduction == "mean" else r[0].numel()
    want = (w * mask * rho).flatten(1).sum(1) / count
    error = ARITHMETIC + SUMMATION
    bound = (error * (w * mask).abs() * (size + 1) ** 2).flatten(1).sum(1) / count * 2
    if reduction == "mean":
        want, bound = want.sum(), bound.sum()
    assert_close(value, want, bound, backend=backend)
    assert_close(grad, w * mask * slope / count, 4 * ARITHMETIC * (w * mask).abs() * (size + 1) / count)


@every
def test_mask_of_ones_changes_nothing_and_zeros_leave_nothing(backend):
    pred = tensor((2, 3, 4, 8), torch.bfloat16, "channels_last", 4)
    with fastdiff.backend(backend):
        plain = ask(pred, None, seed=7)
        ones = ask(pred, torch.ones(2, 3, 4, 8, dtype=torch.bool, device=DEVICE), seed=7)
        zeros = ask(pred, torch.zeros(2, 1, 1, 1, device=DEVICE), seed=7)
    assert_close(ones[0], plain[0].double(), SUMMATION * plain[0].double())
    assert_same_bits(ones[1], plain[1])
    assert zeros[0] == 0 and not zeros[1].any()


@every
def test_masked_samples_are_as_if_they_were_not_there(backend):
    pred = tensor((3, 10), torch.float32, salt=4)
    mask = torch.tensor([[1.0], [0.0], [1.0]], device=DEVICE)
    with fastdiff.backend(backend):
        each, _ = ask(pred, None, reduction="none", seed=7)
        mean, grad = ask(pred, mask / mask.mean(), seed=7)
    want = (each[0].double() + each[2].double()) / 2
    assert_close(mean, want, 2 * (ARITHMETIC + SUMMATION) * want)
    assert not grad[1].any() and grad[0].any()


def test_second_backward_of_a_masked_loss():
    pred = tensor((2, 6), torch.float64, salt=4).requires_grad_()
    mask = torch.tensor([[1.0] * 3 + [0.0] * 3], device=DEVICE).expand(2, 6).double()
    value = ops.loss(pred, 1, table(ROWS, 3, 1), seed=1, mask=mask)
    first, again = (torch.autograd.grad(value, pred, retain_graph=True)[0] for _ in range(2))
    assert torch.allclose(first, again, rtol=1e-6) and not again[:, 3:].any() and again[:, :3].all()
    tangent = torch.func.grad(lambda p: ops.loss(p, 1, table(ROWS, 3, 1), seed=1, mask=mask))(pred.detach())
    assert torch.allclose(tangent, again, rtol=1e-6)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(2, 2), ValueError, "mask: expected a shape that expands to \\(2, 3\\), got \\(2, 2\\)"),
        (torch.ones(3), ValueError, "mask: expected a shape that expands to \\(2, 3\\), got \\(3,\\)"),
        (torch.ones(2, 3, dtype=torch.int64), TypeError, "mask: expected one of .*, got torch.int64"),
        ([1.0], TypeError, "mask: expected a tensor, got list"),
        (torch.ones(2, 3, device="meta"), ValueError, "mask: expected device cpu, got meta"),
    ],
)
def test_refused_masks(mask, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        ops.loss(torch.zeros(2, 3), 0, table(ROWS, 3, 1).cpu(), mask=mask)
