"""The functions of the kernels in plain PyTorch: the oracle that they are checked against, and a path for any device.

Everything is computed in float32 and cast at the end; float64 data is computed in float64, which is the oracle. An
index outside the table gives NaN, as in the kernels.

Ho et al. 2020 is arXiv:2006.11239 (DDPM); Song et al. 2021 is arXiv:2010.02502 (DDIM); Nichol & Dhariwal 2021 is
arXiv:2102.09672; Salmon et al. 2011 is "Parallel random numbers: as easy as 1, 2, 3".
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import WIDTH, History, Row
from .support import transforms
from .support.gaussian import density_ratio, log_ndtr
from .support.shapes import flat

MASK = 0xFFFFFFFF
FAR = 1e30


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al. 2011, section 3.3) on 32-bit words held in int64; four words of one shape.

    The int64 product of two words wraps, which leaves all of its 64 bits right.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def uniform_bits(batch: int, n: int, seed: Tensor, ids: Tensor | None, step: Tensor, stream: int) -> Tensor:
    """The Philox words (batch, ceil(n / 4), 4) behind n normals of each sample, as int64 in [0, 2^32).

    Key: seed (1,) int64. Counter: (element // 4, ids (B,) or 0..B-1, step (1,) or (B,), stream).
    """
    device = seed.device
    block = torch.arange((n + 3) // 4, device=device)[None, :]
    sample = (torch.arange(batch, device=device) if ids is None else ids)[:, None] & MASK
    counter = (block, sample, step[:, None] & MASK, torch.full_like(block[:, :1], stream))
    words = philox4x32(counter, (seed & MASK, (seed >> 32) & MASK))
    return torch.stack(torch.broadcast_tensors(*words), dim=-1)


def box_muller(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Normals from words (..., 4): words 0, 1 give r cos(pi x), r sin(pi x) with r = sqrt(-2 log u); so do 2, 3.

    u = (word + 1/2) 2^-32 in [2^-33, 1] and x = int32(word) 2^-31 in [-1, 1] are float32 numbers by definition, so
    that they are the same in every implementation; the functions of them are taken in `dtype`.
    """
    u = bits[..., 0::2].to(torch.float32) * 2.0**-32 + 2.0**-33
    angle = bits[..., 1::2]
    x = (angle - ((angle >> 31) << 32)).to(torch.float32) * 2.0**-31
    r = (-2 * u.to(dtype).log()).clamp(min=0).sqrt()
    x = x.to(dtype) * math.pi
    return torch.stack((r * x.cos(), r * x.sin()), dim=-1).flatten(-2)


def normal(
    shape: torch.Size | tuple[int, ...], seed: Tensor, ids: Tensor | None, step: Tensor, stream: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """z(seed, stream, ids[i], step, element), shape (B, ...); element j takes output j % 4 of block j // 4."""
    n = math.prod(shape[1:])
    bits = uniform_bits(shape[0], n, seed, ids, step, stream)
    return box_muller(bits, dtype).flatten(1)[:, :n].reshape(shape)


def noising(
    x0: Tensor, t: Tensor, table: Tensor, seed: Tensor | None, ids: Tensor | None, noise: Tensor | None, stream: int
) -> Tensor:
    """x_t = alpha_t x_0 + sigma_t z (Ho et al. 2020, eq. 4); table (levels, 2) holds (alpha, sigma)."""
    alpha, sigma = coefficients(table, t, x0)
    if noise is None:
        if seed is None:
            raise ValueError("seed: expected a tensor where no noise is given, got None")
        noise = normal(x0.shape, seed, ids, t, stream, work_dtype(x0))
    return (alpha * x0 + sigma * noise).to(x0.dtype)


def loss(
    pred: Tensor, x0: Tensor | None, t: Tensor, table: Tensor, seed: Tensor | None, ids: Tensor | None,
    noise: Tensor | None, stream: int, rho: str, delta: float, mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(w_t m rho(pred - y), its derivative by pred) per element, y = p_t x_0 + q_t z; table (levels, 3): (p, q, w).

    rho: "mse" r^2 (Ho et al. 2020, eq. 14); "l1" |r|; "huber" r^2 / 2 up to |r| = delta, then delta (|r| - delta / 2).
    x0 None stands for p = 0, neither seed nor noise for q = 0, and mask None for m = 1.
    """
    p, q, w = coefficients(table, t, pred)
    if mask is not None:
        w = w * mask
    r = pred.to(work_dtype(pred))
    if x0 is not None:
        r = r - p * x0
    if noise is None and seed is not None:
        noise = normal(pred.shape, seed, ids, t, stream, work_dtype(pred))
    if noise is not None:
        r = r - q * noise
    if rho == "mse":
        return w * r * r, w * 2 * r
    sign = torch.where(r.isnan(), r, r.sign())  # torch.sign(NaN) is 0, and a NaN must not look converged
    if rho == "l1":
        return w * r.abs(), w * sign
    near = r.abs() <= delta
    return (
        w * torch.where(near, 0.5 * r * r, delta * (r.abs() - 0.5 * delta)),
        w * torch.where(near, r, delta * sign),
    )


def update(
    x: Tensor, pred: Tensor, rows: Tensor, step: Tensor, seed: Tensor | None, ids: Tensor | None,
    uncond: Tensor | None, raw: Tensor | None, noise: Tensor | None, hist: Tensor | None,
    clip: float | None, keep: str, stream: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(x', what hist becomes).

        x0hat = clip(x0_from_x x + x0_from_pred pred)
        x'    = from_x0 x0hat + from_x x + from_pred pred + noise z + from_hist hist

    rows (steps, WIDTH or WIDE) holds these columns, and those for hist (K, ...), see `fastdiff.rows`. Guidance (Ho &
    Salimans 2022, arXiv:2207.12598, eq. 6 with guidance = 1 + their weight): pred = uncond + guidance (pred - uncond).
    Learned variance (Nichol & Dhariwal 2021, eq. 15): exp(noise + r (noise_high - noise)) for noise, with
    r = (raw + 1) / 2. Then noise is log(beta~) / 2 and noise_high log(beta) / 2.
    """
    numbers = coefficients(rows, step, x)
    row, history = Row(*numbers[:WIDTH]), History(*numbers[WIDTH:]) if len(numbers) > WIDTH else None
    work = work_dtype(x)
    state = x.to(work)
    pred = pred.to(work)
    if uncond is not None:
        pred = uncond + row.guidance * (pred - uncond)
    x0 = row.x0_from_x * state + row.x0_from_pred * pred
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    out = row.from_x0 * x0 + row.from_x * state + row.from_pred * pred
    if noise is None and seed is not None:
        noise = normal(x.shape, seed, ids, step, stream, work)
    if noise is not None:
        std = row.noise
        if raw is not None:
            std = torch.exp(std + (raw.to(work) + 1) / 2 * (row.noise_high - std))
        out = out + std * noise
    if hist is None:
        return out.to(x.dtype), None
    kept = x0 if keep in ("x0hat", "new x0hat") else state
    if history is not None and keep in ("mix", "new mix"):
        kept = history.kept_from_x0 * x0 + history.kept_from_x * state
    if keep in ("new mix", "new x0hat"):
        return out.to(x.dtype), kept.to(hist.dtype)
    kept = kept.to(x.dtype)
    if history is None or hist.ndim == x.ndim:
        return (out + row.from_hist * hist).to(x.dtype), kept
    shares = (row.from_hist, history.from_hist2, history.from_hist3)
    for share, slot in zip(shares, hist, strict=False):
        out = out + share * slot
    return out.to(x.dtype), torch.stack([torch.where(history.slot == j, kept, old) for j, old in enumerate(hist)])


def vlb(
    pred: Tensor, raw: Tensor | None, x_t: Tensor, x0: Tensor, t: Tensor, rows: Tensor, clip: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(nats, their derivative by pred, by raw) per element: KL(q(x_s | x_t, x_0) || p(x_s | x_t)), or -log p(x_0 | x_t)
    where the row says so, with x0hat = clip(a x_t + b pred) (Ho et al. 2020, eq. 5, 13).

    rows (levels, 6) holds (a, b, w, low, high, decoder). log variance of p: v = low + r (high - low), r = (raw + 1) / 2
    (Nichol & Dhariwal 2021, eq. 15), or low without raw; relative to that of q but where there is a decoder.
    """
    a, b, w, low, high, decoder = coefficients(rows, t, pred)
    work = work_dtype(pred)
    mean = a * x_t + b * pred.to(work)
    x0hat = mean if clip is None else mean.clamp(-clip, clip)
    data = x0.to(work)
    v = low if raw is None else low + (raw.to(work) + 1) / 2 * (high - low)
    v = v.expand_as(mean)

    # Each function sees harmless values where the other is wanted, so that no NaN comes back through `where`.
    first = decoder != 0
    value, by_mean, by_v = gaussian_kl(data - x0hat, w, torch.where(first, 0.0, v))
    # The bins take most of the time. On a CPU, unless traced, it costs nothing to see that no sample asks for them.
    seen = transforms.bare(first)
    if seen is None or seen.device.type != "cpu" or bool(seen.any()):
        bins = discretized_gaussian(data, torch.where(first, x0hat, data), torch.where(first, v, 0.0))
        value, by_mean, by_v = (torch.where(first, i, j) for i, j in zip(bins, (value, by_mean, by_v), strict=True))
    if clip is not None:
        by_mean = torch.where(mean.abs() > clip, 0.0, by_mean)
    return value, by_mean * b, by_v * (high - low) / 2


def gaussian_kl(error: Tensor, w: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(KL, its derivative by the estimate of x_0, by delta), 2 KL = delta + expm1(-delta) + w error^2 exp(-delta).

    w = c^2 / beta~, and delta is the logarithm of the variance over beta~.
    """
    shrink = torch.expm1(-delta)
    pull = w * error * (-delta).exp()
    return 0.5 * (delta + shrink + pull * error), -pull, -0.5 * (shrink + pull * error)


def discretized_gaussian(x0: Tensor, mean: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(-log p, its derivative by mean, by log_var), p the probability of x_0's bin of 256 under N(mean, exp(log_var));
    the bins at -1 and 1 are open (Ho et al. 2020, eq. 13). Always in float64: p is a difference of logarithms."""
    data, m, v = (in_float64(t) for t in (x0, mean, log_var))
    inverse = (-0.5 * v).exp()
    first, last = data < -0.999, data > 0.999
    # An open bin ends where all functions of float64 have their limits. Their derivatives are finite there.
    upper = torch.where(last, FAR, (data + 1 / 255 - m) * inverse)
    lower = torch.where(first, -FAR, (data - 1 / 255 - m) * inverse)
    # Phi(upper) - Phi(lower) = Phi(-lower) - Phi(-upper): left of the mean neither is near 1.
    flip = data > m
    upper, lower = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    log_upper, log_lower = log_ndtr(upper), log_ndtr(lower)
    share = (log_lower - log_upper).exp()
    log_p = log_upper + torch.log1p(-share)

    # The densities at the ends over p = Phi(upper) (1 - share). That of an open end is 0, whatever stands for it.
    upper, lower = torch.where(upper == FAR, 40.0, upper), torch.where(lower == -FAR, 0.0, lower)
    rest = -torch.expm1(log_lower - log_upper)
    at_upper, at_lower = density_ratio(upper) / rest, density_ratio(lower) * share / rest
    by_c, by_scale = at_upper - at_lower, at_upper * upper - at_lower * lower
    by_mean = torch.where(flip, -by_c, by_c) * inverse
    return -log_p.to(x0), by_mean.to(x0), (0.5 * by_scale).to(x0)


def in_float64(t: Tensor) -> Tensor:
    """t in float64, on the CPU if its own device has no float64."""
    return t.to("cpu" if t.device.type == "mps" else t.device, torch.float64)


def inner(a: Tensor, b: Tensor, guidance: Tensor | None, centred: bool) -> Tensor:
    """(B, 3): <a, a>, <a, p> and <p, p> of each sample, p = b + guidance (a - b), or b without guidance; centred: of a
    and p less their means over the sample."""
    work = work_dtype(a)
    a, p = flat(a.to(work)), flat(b.to(work))
    if guidance is not None:
        p = p + guidance.to(work) * (a - p)
    if centred:
        a, p = (v - v.mean(1, keepdim=True) for v in (a, p))
    return torch.stack([(u * v).sum(1) for u, v in ((a, a), (a, p), (p, p))], 1)


def gated_gelu(x: Tensor) -> Tensor:
    """hidden gelu(gate), of the halves of x (..., 2 C) (Shazeer 2020, arXiv:2002.05202, eq. 6)."""
    hidden, gate = as_type(x, work_dtype(x)).tensor_split(2, -1)
    return as_type(hidden * F.gelu(gate), x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Pairs (a, b) of x (B, N, heads, D) as (a cos - b sin, b cos + a sin) (Su et al. 2021, arXiv:2104.09864)."""
    wide, *tables = (as_type(t, work_dtype(x)) for t in (x, cos, sin))
    wide = wide if weight is None else F.rms_norm(wide, x.shape[-1:], as_type(weight, wide.dtype), eps)
    turned = torch.stack((-wide[..., 1::2], wide[..., ::2]), -1).flatten(-2)
    cos, sin = (t[:, None].repeat_interleave(1 + (t.shape[-1] != x.shape[-1]), -1) for t in tables)
    return as_type(wide * cos + turned * sin, x.dtype)


def group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None,
    add: Tensor | None, eps: float, skip: Tensor | None, silu: bool,
) -> Tensor:  # fmt: skip
    """silu(GroupNorm(x + add) (1 + scale) + shift), scale and shift (B, C), add (B, C) or (C,) (Wu & He 2018,
    arXiv:1803.08494, eq. 7; Dhariwal & Nichol 2021, arXiv:2105.05233, section 4.3). skip: further channels of x."""
    work, x = work_dtype(x), x if skip is None else torch.cat((x, skip), 1)
    if transforms.active():
        # The norm has rules for no other layout, and here x cannot tell its own.
        x = x.clone(memory_format=torch.contiguous_format)
    u = torch.group_norm(with_channels(x, add), groups, as_type(weight, work), as_type(bias, work), eps)
    if scale is not None and shift is not None:
        u = u * (1 + _per_channel(as_type(scale, work), u)) + _per_channel(as_type(shift, work), u)
    return as_type(F.silu(u) if silu else u, x.dtype)


def group_norm_silu_grad(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, groups: int,
    weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, add: Tensor | None,
    skip: Tensor | None, silu: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients by x, weight, bias, scale, shift, add and skip; mean and rstd (B, groups) are those of the groups.

    SiLU is taken of u = f xhat + o. With slope = dL/du, and m_1 and m_2 the group's means of f slope and f slope xhat,
    dL/dx = rstd (f slope - m_1 - xhat m_2).
    """
    work, first, x = work_dtype(x), x.shape[1], x if skip is None else torch.cat((x, skip), 1)
    by = 1 if scale is None else 1 + scale.to(work)
    factor, offset = weight.to(work).expand(x.shape[:2]) * by, bias.to(work).expand(x.shape[:2]) * by
    if shift is not None:
        offset = offset + shift.to(work)
    f, o = _per_channel(factor, x), _per_channel(offset, x)

    def grouped(t: Tensor) -> Tensor:
        return t.reshape(x.shape[0], groups, -1)

    def over_pixels(t: Tensor) -> Tensor:
        return t.reshape(*x.shape[:2], -1).sum(2)

    xhat = ((grouped(with_channels(x, add)) - mean[..., None]) * rstd[..., None]).reshape(x.shape)
    slope = grad.to(work)
    if silu:
        u = f * xhat + o
        s = u.sigmoid()
        slope = slope * (s + u * s * (1 - s))
    m_1, m_2 = (grouped(t).mean(2, keepdim=True) for t in (f * slope, f * slope * xhat))
    by_x = ((grouped(f * slope) - m_1 - grouped(xhat) * m_2) * rstd[..., None]).reshape(x.shape)
    by_offset, by_factor = over_pixels(slope), over_pixels(slope * xhat)
    by_scale = by_shift = by_add = None
    if scale is not None:
        by_scale, by_shift = weight * by_factor + bias * by_offset, by_offset
    if add is not None:
        by_add = over_pixels(by_x) if add.ndim == 2 else over_pixels(by_x).sum(0)
    by_x = by_x.to(x.dtype)
    by_skip = None if skip is None else by_x[:, first:]
    return by_x[:, :first], (by_factor * by).sum(0), (by_offset * by).sum(0), by_scale, by_shift, by_add, by_skip


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift of rows x (B, ..., C), scale and shift (B, C) (Ba, Kiros & Hinton 2016,
    arXiv:1607.06450, eq. 4)."""
    work = work_dtype(x)
    weight, bias = (None if t is None else as_type(t, work) for t in (weight, bias))
    u = F.layer_norm(as_type(x, work), x.shape[-1:], weight, bias, eps)
    if scale is not None:
        u = u * (1 + _per_row(as_type(scale, work), x))
    if shift is not None:
        u = u + _per_row(as_type(shift, work), x)
    return as_type(u, x.dtype)


def add_layer_norm(
    x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    gate: Tensor | None, scale: Tensor | None, shift: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(s, layer_norm of s), s = x + gate y, gate (B, C); typed like x, and s is rounded after the norm."""
    work = work_dtype(x)
    y = as_type(y, work)
    s = as_type(x, work) + (y if gate is None else _per_row(as_type(gate, work), x) * y)
    return as_type(s, x.dtype), as_type(layer_norm(s, weight, bias, eps, scale, shift), x.dtype)


def _per_row(rows: Tensor, x: Tensor) -> Tensor:
    """(B, C) shaped to be multiplied with or added to x (B, ..., C)."""
    return rows.reshape(rows.shape[0], *[1] * (x.ndim - 2), rows.shape[-1])


def with_channels(x: Tensor, add: Tensor | None) -> Tensor:
    """x + add, add (B, C) or (C,), in the type that is computed in."""
    work = work_dtype(x)
    wide = as_type(x, work)
    return wide if add is None else wide + _per_channel(as_type(add, work), x)


def as_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), which costs as much as a small operation even where x has the type."""
    return x if x.dtype == dtype else x.to(dtype)


def _per_channel(rows: Tensor, x: Tensor) -> Tensor:
    """(B, C) or (C,) shaped to be multiplied with or added to x (B, C, ...)."""
    return rows.reshape(*rows.shape, *[1] * (x.ndim - 2))


def work_dtype(x: Tensor | torch.dtype) -> torch.dtype:
    """The type that everything is computed in, for data of this type: float64 for float64, else float32.

    States between the steps of a sampler and the rows of tables have it too.
    """
    return torch.float64 if (x.dtype if isinstance(x, Tensor) else x) == torch.float64 else torch.float32


def mean_of_samples(terms: Tensor) -> Tensor:
    """(B,), the mean of each sample of (B, ...)."""
    return terms.mean(tuple(range(1, terms.ndim))) if terms.ndim > 1 else terms


def coefficients(table: Tensor, index: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """The columns of table[index], each shaped (1 or B, 1, ...) to multiply `like`; NaN if the index is outside."""
    known = (index >= 0) & (index < table.shape[0])
    rows = table[torch.where(known, index, 0)].to(work_dtype(like))
    rows = torch.where(known[:, None], rows, math.nan)
    return tuple(column.reshape(-1, *[1] * (like.ndim - 1)) for column in rows.unbind(1))
