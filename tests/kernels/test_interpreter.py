"""Triton's interpreter, which the helper `remembered` makes quicker: what is made again is what was asked for."""

import pytest
import torch
import triton
import triton.language as tl
from strategies import DEVICE

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled")


@triton.jit
def products_kernel(out_ptr, x_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    y = x + 1.0
    tl.store(out_ptr + at, x * x)
    tl.store(out_ptr + N + at, x * y)
    tl.store(out_ptr + 2 * N + at, y * x)


@triton.jit
def ones_kernel(out_ptr, x_ptr):
    x = tl.load(x_ptr)
    tl.store(out_ptr, x + 1)
    tl.store(out_ptr + 1, x + 1.0)


@triton.jit
def single_kernel(out_ptr, x_ptr, other_ptr):
    program = tl.program_id(0)
    other = tl.load(other_ptr + program)
    tl.store(out_ptr + program, tl.load(x_ptr + program, mask=program % 2 == 0, other=other))


def test_one_tensor_twice_is_not_two():
    x, out = torch.tensor([2.0, 3, 5, 7], device=DEVICE), torch.empty(3, 4, device=DEVICE)
    for _ in range(2):
        products_kernel[(1,)](out, x, N=4)
        assert torch.equal(out, torch.stack((x * x, x * (x + 1), x * (x + 1))))


def test_constants_that_are_equal_are_not_the_same():
    x, out = torch.tensor([2**24 + 1], device=DEVICE), torch.empty(2, device=DEVICE)
    ones_kernel[(1,)](out, x)
    assert out.tolist() == [2**24 + 2, 2**24]


def test_an_element_that_the_interpreter_looks_into():
    """A mask and what stands for the others: the interpreter asks whether a single one is 0."""
    x, other = torch.tensor([1.0, 2, 3, 4], device=DEVICE), torch.tensor([0.0, 0, 7, 8], device=DEVICE)
    out = torch.empty(4, device=DEVICE)
    single_kernel[(4,)](out, x, other)
    assert out.tolist() == [1, 0, 3, 8]
