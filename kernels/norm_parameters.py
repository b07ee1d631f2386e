"""The gradients of the norm by its parameters, from the sums over pixels that its backward pass leaves.

    slopes  = sum over pixels of dL/du,  products = sum over pixels of dL/du xhat      (of each sample and channel)
    scale_grad  = weight products + bias slopes,           shift_grad = slopes
    weight_grad = sum over samples of (1 + scale) products, bias_grad = sum over samples of (1 + scale) slopes

with u = (weight xhat + bias) (1 + scale) + shift, of which SiLU is taken.
Moves: reads the sums and scale, 2 parts + 1 numbers of each sample and channel; writes two of them, or none.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import FUSED, kernel, launch

COLUMNS, SAMPLES = 32, 32  # channels of a program, and samples that it sums at a time


@kernel
def norm_parameters_kernel(
    weight_grad_ptr, bias_grad_ptr,  # (channels,)                 the types of weight and bias, written
    scale_grad_ptr, shift_grad_ptr,  # (batch, channels) or None   the types of scale and shift, written
    sums_ptr,  # (parts, 2, batch, channels)                       float32: slopes and products of a part of the pixels
    weight_ptr, bias_ptr,  # (channels,)                           any floating type
    scale_ptr,  # (batch, channels) or None                        any floating type, scale_stride between samples
    batch, channels, scale_stride,
    PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    by_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    by_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, batch, ROWS):
        sample = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (sample < batch) & inside[None, :]
        at = sample * channels + channel[None, :]
        slopes = tl.zeros([ROWS, BLOCK], tl.float32)
        products = tl.zeros([ROWS, BLOCK], tl.float32)
        part_ptr = sums_ptr
        for _ in tl.static_range(PARTS):
            slopes += tl.load(part_ptr + at, mask=mask, other=0.0)
            part_ptr += batch.to(tl.int64) * channels
            products += tl.load(part_ptr + at, mask=mask, other=0.0)
            part_ptr += batch.to(tl.int64) * channels
        if scale_ptr is not None:
            tl.store(scale_grad_ptr + at, weight[None, :] * products + bias[None, :] * slopes, mask=mask)
            tl.store(shift_grad_ptr + at, slopes, mask=mask)
            scale = tl.load(scale_ptr + sample * scale_stride + channel[None, :], mask=mask, other=0.0)
            slopes *= 1.0 + scale.to(tl.float32)
            products *= 1.0 + scale.to(tl.float32)
        by_weight += products
        by_bias += slopes
    tl.store(weight_grad_ptr + channel, tl.sum(by_weight, 0), mask=inside)
    tl.store(bias_grad_ptr + channel, tl.sum(by_bias, 0), mask=inside)


def norm_parameters(
    weight_grad: Tensor, bias_grad: Tensor, scale_grad: Tensor | None, shift_grad: Tensor | None,
    sums: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None,
) -> None:  # fmt: skip
    """Write the gradients of contiguous parameters from the sums (parts, 2, B, C); scale has adjacent channels."""
    parts, _, batch, channels = sums.shape
    launch(
        norm_parameters_kernel, (triton.cdiv(channels, COLUMNS), 1, 1),
        weight_grad_ptr=weight_grad, bias_grad_ptr=bias_grad, scale_grad_ptr=scale_grad, shift_grad_ptr=shift_grad,
        sums_ptr=sums, weight_ptr=weight, bias_ptr=bias, scale_ptr=scale,
        batch=batch, channels=channels, scale_stride=0 if scale is None else scale.stride(0),
        PARTS=parts, ROWS=SAMPLES, BLOCK=COLUMNS, num_warps=4, **FUSED,
    )  # fmt: skip
