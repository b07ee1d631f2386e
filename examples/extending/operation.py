"""Add an operation: y = x + w_b (target - x), one weight per sample, in three parts.

python examples/extending/operation.py

In the package each part has its own place: the reference in fastdiff/reference.py, the kernel and its launcher in
kernels/, and the checks, schema and gradient in fastdiff/ops/. Here they stand below each other. Without a GPU the
kernel runs in Triton's interpreter.
"""

import os

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import triton
import triton.language as tl

# --- fastdiff/reference.py: plain PyTorch, the oracle ------------------------------------------------------------


def reference_pull(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """y = x + w_b (target - x), computed in float32, or in float64 for float64 data."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    w = weight.to(work).reshape(-1, *[1] * (x.ndim - 1))
    return (x.to(work) + w * (target.to(work) - x.to(work))).to(x.dtype)


# --- kernels/pull.py: the kernel and its launcher ----------------------------------------------------------------


@triton.jit
def pull_kernel(
    x_ptr,  # (batch, size)       any floating type
    target_ptr,  # (batch, size)  any floating type
    weight_ptr,  # (batch,)       float32
    out_ptr,  # (batch, size)     written: y
    size,
    BLOCK: tl.constexpr,
):
    """Moves, per element: reads x and target, writes y."""
    sample = tl.program_id(1).to(tl.int64)
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    at = sample * size + offsets
    x = tl.load(x_ptr + at, mask=inside).to(tl.float32)
    target = tl.load(target_ptr + at, mask=inside).to(tl.float32)
    tl.store(out_ptr + at, x + tl.load(weight_ptr + sample) * (target - x), mask=inside)


def launch_pull(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """y, shaped and typed like x."""
    out = torch.empty_like(x)
    size, block = x[0].numel(), 1024
    pull_kernel[triton.cdiv(size, block), len(x)](x, target, weight, out, size, BLOCK=block, enable_fp_fusion=True)
    return out


# --- fastdiff/ops/pull.py: checks, schema, fake, gradient, public function ----------------------------------------


@torch.library.custom_op("fastdiff_example::pull", mutates_args=())
def pull_op(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """What runs: the kernel."""
    return launch_pull(x.contiguous(), target.contiguous(), weight.float().contiguous())


@pull_op.register_fake
def _(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx, grad):
    x, target, weight = ctx.saved_tensors
    w = weight.reshape(-1, *[1] * (x.ndim - 1))
    return grad * (1 - w), grad * w, (grad * (target - x)).flatten(1).sum(1)


pull_op.register_autograd(_gradient, setup_context=_save)


def pull(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Move every sample towards a target: y = x + w_b (target - x).

    Args:
        x: (B, ...).
        target: as x.
        weight: (B,), of the target; 0 leaves x.

    Returns: y, shaped and typed like x.
    Raises: ValueError that names the argument.
    """
    if target.shape != x.shape:
        raise ValueError(f"target: expected shape {tuple(x.shape)}, got {tuple(target.shape)}")
    if weight.shape != x.shape[:1]:
        raise ValueError(f"weight: expected shape ({len(x)},), got {tuple(weight.shape)}")
    return pull_op(x, target, weight)


# --- tests/ops/test_pull.py: agreement with the reference in float64, the gradient, the checks ------------------


def main() -> None:
    """Check the operation as a test would."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    x, target = torch.randn(2, 3, 33, 31, device=device), torch.randn(2, 3, 33, 31, device=device)
    weight = torch.tensor([0.0, 0.3], device=device)
    want = reference_pull(x.double(), target.double(), weight.double())
    # Three roundings of numbers below 8.
    torch.testing.assert_close(pull(x, target, weight).double(), want, rtol=0, atol=3 * 8 * 2**-24)
    assert torch.equal(pull(x, target, weight)[0], x[0])

    leaves = [tensor.clone().requires_grad_() for tensor in (x, target, weight)]
    pull(*leaves).sum().backward()
    wide = [tensor.double().requires_grad_() for tensor in (x, target, weight)]
    reference_pull(*wide).sum().backward()
    for got, expected in zip(leaves, wide, strict=True):
        torch.testing.assert_close(got.grad, expected.grad, check_dtype=False, rtol=1e-4, atol=1e-4)
    torch.library.opcheck(pull_op, (x, target, weight))
    try:
        pull(x, target[:1], weight)
    except ValueError as error:
        print(f"pull agrees with its reference; bad input says: {error}")


if __name__ == "__main__":
    main()
