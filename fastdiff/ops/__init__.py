"""The operations: `normal`, `noising`, `loss`, `vlb`, `update` and `group_norm_silu` check their arguments and call
torch.ops.fastdiff.*, which `_library` defines.

Common arguments:
    seed: the 64-bit key of the noise; an int, an int64 tensor of one element, or None to draw one on the device from
        PyTorch's default generator.
    sample_ids: (B,) int64 in [0, 2^32): the number of each sample in the noise; 0..B-1 if None.
    noise: a floating tensor shaped like the data that takes the place of generated noise.
    out: a tensor shaped and typed like the result, to write it into; not one of the operands, and without gradients.
"""

import math

import torch
from torch import Tensor

from .. import reference
from .checks import (
    FLOATING,
    as_ids,
    as_index,
    as_seed,
    check_floating,
    check_group_norm,
    check_like,
    check_out,
    check_table,
    names,
    noise_source,
)
from .library import has_norm_kernel, ids_in_range, in_range

# Streams keep draws with the same seed, sample and step apart.
PRIOR, FORWARD, REVERSE = 0, 1, 2
LOSSES = ("mse", "l1", "huber")
KEEPS = ("none", "x0hat", "x")


def normal(
    shape: tuple[int, ...] | torch.Size,
    seed: int | Tensor | None = None,
    *,
    sample_ids: Tensor | None = None,
    step: int | Tensor = 0,
    stream: int = PRIOR,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """z(seed, stream, sample, step, element) ~ N(0, 1), shape (B, ...): Philox4x32-10 and Box-Muller.

    A sample's numbers depend on its id and the element's place in it, not on the batch, the device or the layout.
    step: an int or an int64 tensor () or (B,). out: the tensor to fill, whose type and device then count. Raises
    TypeError or ValueError, naming the argument.
    """
    if dtype not in FLOATING:
        raise TypeError(f"dtype: expected one of {names(FLOATING)}, got {dtype}")
    if len(shape) < 1:
        raise ValueError("shape: expected a batch dimension, got ()")
    if not 0 <= stream < 2**32:
        raise ValueError(f"stream: expected a number in [0, 2^32), got {stream}")
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=device)
    else:
        check_floating("out", out)
        if out.shape != tuple(shape) or out.requires_grad:
            raise ValueError(f"out: expected shape {tuple(shape)} without gradient, got {tuple(out.shape)}")
    step = as_index("step", step, out)
    ids = as_ids(sample_ids, out)
    torch.ops.fastdiff.normal_(out, as_seed(seed, out.device), ids, step, stream)
    return out


def noising(
    x0: Tensor,
    t: int | Tensor,
    table: Tensor,
    *,
    seed: int | Tensor | None = None,
    sample_ids: Tensor | None = None,
    noise: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x_t = alpha_t x_0 + sigma_t z (Ho et al. 2020, eq. 4), shaped and typed like x0 (B, ...).

    t: level, an int or an int64 tensor () or (B,), in [0, len(table)). table: (levels, 2) float32 rows (alpha, sigma).
    Without `noise`, z is the noise of stream FORWARD at step t. Differentiable by x0 and noise. A level outside the
    table is a ValueError on the CPU; on a GPU, where looking would wait for the device, its sample becomes NaN.
    """
    check_floating("x0", x0)
    t = as_index("t", t, x0)
    check_table("table", table, 2, x0)
    ids = as_ids(sample_ids, x0)
    if out is not None:
        check_out(out, x0, x0, noise)
        torch.ops.fastdiff.noising_out(out, x0, t, table, noise_source(x0, seed, noise), ids, noise, FORWARD)
        return out
    return torch.ops.fastdiff.noising(x0, t, table, noise_source(x0, seed, noise), ids, noise, FORWARD)


def loss(
    pred: Tensor,
    t: int | Tensor,
    table: Tensor,
    *,
    x0: Tensor | None = None,
    seed: int | Tensor | None = None,
    sample_ids: Tensor | None = None,
    noise: Tensor | None = None,
    kind: str = "mse",
    delta: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """L = w_t mean(rho(pred - y)) with y = p_t x_0 + q_t z, float32: () for reduction "mean", (B,) for "none".

    table: (levels, 3) float32 rows (p, q, w). x0 may be left out where p = 0, and seed and noise where q = 0; with the
    seed of `noising` the noise is drawn again, not read. kind: rho(r) = "mse" r^2, "l1" |r|, "huber" r^2/2 up to delta
    and delta (|r| - delta/2) beyond. The gradient by pred is computed in the same pass; it can be walked backward once.
    Differentiable by pred, x0 and noise. Levels outside the table: as for `noising`.
    """
    check_floating("pred", pred)
    t = as_index("t", t, pred)
    check_table("table", table, 3, pred)
    if x0 is not None:
        check_like("x0", x0, pred)
    if noise is not None or seed is not None:
        seed = noise_source(pred, seed, noise)
    if kind not in LOSSES:
        raise ValueError(f"kind: expected one of {', '.join(LOSSES)}, got {kind!r}")
    if not delta > 0:
        raise ValueError(f"delta: expected a number above 0, got {delta}")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction: expected 'mean' or 'none', got {reduction!r}")
    inputs = (pred, x0, noise)
    with_grad = torch.is_grad_enabled() and any(i is not None and i.requires_grad for i in inputs)
    ids = as_ids(sample_ids, pred)
    per_sample = reduction == "none"
    return torch.ops.fastdiff.loss(
        pred, x0, t, table, seed, ids, noise, FORWARD, kind, float(delta), per_sample, with_grad
    )[0]


def vlb(
    pred: Tensor,
    x_t: Tensor,
    x0: Tensor,
    t: int | Tensor,
    rows: Tensor,
    *,
    raw_variance: Tensor | None = None,
    clip: float | None = None,
    detach_mean: bool = False,
    reduction: str = "none",
) -> Tensor:
    """The term of level t of the variational bound, in nats per dimension: (B,) for reduction "none", () for "mean";
    float32, or float64 for float64 data (Ho et al. 2020, eq. 5).

    With x0hat = clip(a x_t + b pred), KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) = 1/2 (delta + exp(-delta) - 1 +
    w (x_0 - x0hat)^2 exp(-delta)). Where the row says decoder, -log p(x_0 | x_t) of images in 256 steps over [-1, 1]:
    the probability of x_0's bin, 1/255 to each side and open at both ends, under N(x0hat, exp(delta)) (eq. 13).

    pred, x_t, x0: (B, ...). rows: (levels, 6) float32 rows (a, b, w, low, high, decoder), see `bound.vlb_rows`.
    delta = low, or with raw_variance low + (raw + 1)/2 (high - low) (Nichol & Dhariwal 2021, eq. 15).
    clip: x0hat is kept in [-clip, clip]. detach_mean: no gradient by pred, as in their hybrid loss.
    The gradients by pred and raw_variance are computed in the same pass; they can be walked backward once. Where one by
    x_t or x0 is wanted too, the differentiable reference runs instead. Levels outside the table: as for `noising`.
    """
    check_floating("pred", pred)
    check_like("x_t", x_t, pred)
    check_like("x0", x0, pred)
    if raw_variance is not None:
        check_like("raw_variance", raw_variance, pred)
    t = as_index("t", t, pred)
    check_table("rows", rows, 6, pred)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip: expected a number above 0 or None, got {clip}")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction: expected 'mean' or 'none', got {reduction!r}")
    pred = pred.detach() if detach_mean else pred
    with_grad = torch.is_grad_enabled()
    if with_grad and (x_t.requires_grad or x0.requires_grad):
        if not torch.compiler.is_compiling():
            in_range("t", t, len(rows))
        value = reference.vlb(pred, raw_variance, x_t, x0, t, rows, clip)[0]
        return value.mean() if reduction == "mean" else value.reshape(len(value), -1).mean(1)
    wanted = [with_grad and i is not None and i.requires_grad for i in (pred, raw_variance)]
    return torch.ops.fastdiff.vlb(pred, raw_variance, x_t, x0, t, rows, clip, reduction == "none", *wanted)[0]


def update(
    x: Tensor,
    pred: Tensor,
    rows: Tensor,
    step: int | Tensor,
    *,
    seed: int | Tensor | None = None,
    sample_ids: Tensor | None = None,
    noise: Tensor | None = None,
    uncond: Tensor | None = None,
    raw_variance: Tensor | None = None,
    hist: Tensor | None = None,
    clip: float | None = None,
    keep: str = "none",
    noisy: bool = True,
    inplace: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """x' = c x0hat + d x + e pred + f z + g hist, x0hat = clip(a x + b pred): one step of any sampler, typed like x.

    x, pred: (B, ...). rows: (steps, 9) float32 rows (a, b, c, d, e, f, g, h, w); step: the row, an int or an int64
    tensor () or (B,). Without `noise`, z is the noise of stream REVERSE at `step`; noisy=False leaves f z out.
    uncond: pred becomes uncond + w (pred - uncond). raw_variance: f becomes exp(f + (raw + 1)/2 (h - f)).
    hist: read, then overwritten with what `keep` names, "x0hat" or "x". clip: x0hat is kept in [-clip, clip].
    inplace: x becomes x' and nothing is allocated. Rows outside the table: as levels for `noising`.
    Where a gradient by x, pred, uncond, raw_variance or noise is wanted, the differentiable reference runs instead.
    """
    check_floating("x", x)
    check_like("pred", pred, x)
    check_table("rows", rows, 9, x)
    step = as_index("step", step, x)
    for name, given in (("uncond", uncond), ("raw_variance", raw_variance)):
        if given is not None:
            check_like(name, given, x)
    if keep not in KEEPS:
        raise ValueError(f"keep: expected one of {', '.join(KEEPS)}, got {keep!r}")
    if (hist is None) != (keep == "none"):
        raise ValueError(f"hist: expected exactly where keep is not 'none', got keep = {keep!r}")
    if hist is not None:
        check_like("hist", hist, x)
        if hist.dtype != x.dtype:
            raise TypeError(f"hist: expected the dtype of x, {x.dtype}, got {hist.dtype}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip: expected a number above 0 or None, got {clip}")
    clip = None if clip == math.inf else clip  # the kernel multiplies the bound by c, which may be 0
    ids = as_ids(sample_ids, x)
    inputs = (x, pred, uncond, raw_variance, noise)
    with_grad = torch.is_grad_enabled() and any(i is not None and i.requires_grad for i in inputs)
    if with_grad and (inplace or hist is not None):
        raise ValueError("inplace, hist: a tensor would be overwritten that the gradient needs")
    if noisy or noise is not None:
        seed = noise_source(x, seed, noise)
    elif seed is not None:
        raise ValueError("seed: expected None with noisy=False")
    args = (pred, rows, step, seed, ids, uncond, raw_variance, noise, hist, clip, keep, REVERSE)
    if out is not None:
        if inplace:
            raise ValueError("out: expected None with inplace=True")
        check_out(out, x, *inputs)
        torch.ops.fastdiff.update_out(out, x, *args)
        return out
    if with_grad:
        if type(step) is Tensor and not torch.compiler.is_compiling():
            in_range("step", step, rows.shape[0])
            ids_in_range(ids)
        return reference.update(x, *args)[0]
    if inplace or hist is not None:
        # Inductor cannot take an op that both returns a tensor and overwrites an optional one.
        x = x if inplace else x.clone()
        torch.ops.fastdiff.update_(x, *args)
        return x
    return torch.ops.fastdiff.update(x, *args[:8], clip, REVERSE)


def combine(
    x: Tensor,
    y: Tensor,
    rows: Tensor,
    index: int | Tensor,
    *,
    z: Tensor | None = None,
    clip: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """from_x0 clip(x0_from_x x + x0_from_pred y) + from_x x + from_pred y + noise z, typed like x.

    An affine map of two or three tensors by one row of numbers: what a step of a scheduler is.

    Args:
        x, y, z: (B, ...) tensors of one shape; z may be left out.
        rows: (n, 9) float32 rows, see `fastdiff.rows`.
        index: the row; an int, or an int64 tensor () or (B,).
        clip: the first bracket is kept in [-clip, clip].
        out: see above.

    Returns: a tensor shaped and typed like x.
    Raises: TypeError or ValueError that names the argument.
    """
    return update(x, y, rows, index, noise=z, noisy=False, clip=clip, out=out)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """silu(GroupNorm(x) (1 + scale) + shift), shaped and typed like x (B, C, ...) (Wu & He 2018,
    arXiv:1803.08494, eq. 7; scale and shift as in Dhariwal & Nichol 2021, arXiv:2105.05233, section 4.3).

    GroupNorm: (x - mean) / sqrt(var + eps) of each of num_groups groups of neighbouring channels of a sample, times
    weight (C,) plus bias (C,). scale, shift: (B, C), both or neither. All of it in float32 whatever the types.
    Differentiable by every tensor; second derivatives need `backend("reference")`. Raises TypeError or ValueError.
    """
    check_group_norm(x, num_groups, weight, bias, eps, scale, shift)
    if not has_norm_kernel(x):
        return reference.group_norm_silu(x, num_groups, weight, bias, scale, shift, eps)
    return torch.ops.fastdiff.group_norm_silu(x, num_groups, weight, bias, scale, shift, eps)[0]
