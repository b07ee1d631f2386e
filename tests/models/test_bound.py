"""The variational bound: its terms and their gradients against the float64 oracle and mpmath, its rows, its constant,
and the choice of levels by the second moment of their losses."""

import math
import re

import mpmath
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import BACKENDS, DEVICE, DTYPES, dtypes, index, layouts, salts, shapes, table, tensor
from tolerance import ARITHMETIC, BOUND, SUMMATION, assert_close, assert_same_bits
from torch import Tensor

import fastdiff
from fastdiff import bound, ops, reference
from fastdiff.bound import LossSecondMoment, prior_kl, vlb_rows
from fastdiff.ops import dispatch as _backend
from fastdiff.ops import registry
from fastdiff.schedule import NoiseSchedule, cosine, linear, make_schedule

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")
ROWS = 6
every = pytest.mark.parametrize("backend", BACKENDS)
DECODER = torch.tensor([0.0, 1, 0, 2 * math.log(0.2), 2 * math.log(0.2), 1], device=DEVICE)
BINS = torch.arange(256, dtype=torch.float64) / 127.5 - 1
mpmath.mp.dps = 60


def bound_rows(salt: int) -> Tensor:
    """(ROWS, 6) float32: terms of a chain in the even rows; decoders with deviations around a bin in the odd."""
    generator = torch.Generator().manual_seed(salt + 5)
    u = torch.rand(ROWS, 3, generator=generator)
    decoder = torch.arange(ROWS) % 2
    low = torch.where(decoder == 1, 12 * u[:, 1] - 11, 4 * u[:, 1] - 1)
    rows = torch.stack((8 * u[:, 0] - 3, low, low + 4 * u[:, 2] - 1, decoder), 1)
    rows[:, 0].exp_()
    return torch.cat((table(ROWS, 2, salt), rows.to(DEVICE)), 1)


def inputs(shape: tuple[int, ...], salt: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """(pred, raw, x_t, x0)."""
    return [tensor(shape, dtype, salt=salt + i) for i in range(4)]


# --- the decoder ------------------------------------------------------------------------------------------------


def nats_of(x0: float, mean: float, std: float) -> mpmath.mpf:
    """-log of the probability of x_0's bin, as it is written (Ho et al. 2020, eq. 13)."""
    upper = mpmath.inf if x0 > 0.999 else (mpmath.mpf(x0) + mpmath.mpf(1) / 255 - mean) / std
    lower = -mpmath.inf if x0 < -0.999 else (mpmath.mpf(x0) - mpmath.mpf(1) / 255 - mean) / std
    if lower > 0:
        upper, lower = -lower, -upper
    return -mpmath.log(mpmath.ncdf(upper) - mpmath.ncdf(lower))


@every
def test_bins_of_a_known_gaussian(backend):
    """ln P(bins 0, 127, 255) for mean .1, std .2."""
    x0 = BINS[[0, 127, 255]].float()[:, None].to(DEVICE)
    with fastdiff.backend(backend):
        nats = ops.vlb(torch.full_like(x0, 0.1), x0, x0, 0, DECODER[None])
        if backend == "reference":
            wide = ops.vlb(torch.full_like(x0.double(), 0.1), x0.double(), x0.double(), 0, DECODER[None].double())
            assert wide.dtype == torch.float64
    assert_close(nats, torch.tensor([17.668359, 4.292660, 12.500363], device=DEVICE).double(), 4e-6)


@pytest.mark.parametrize("mean", [0.1, -0.97, 1.3, 0.0])
@pytest.mark.parametrize("std", [1e-3, 0.0071, 0.2, 5.0])
def test_bins_sum_to_one(mean, std):
    log_var = torch.full_like(BINS, 2 * math.log(std))
    nats, by_mean, by_log_var = reference.discretized_gaussian(BINS, torch.full_like(BINS, mean), log_var)
    p = (-nats).exp()
    assert abs(p.sum().item() - 1) < 1e-13
    # so that the derivatives of the sum vanish
    assert abs((p * by_mean).sum().item()) < 1e-12 / std and abs((p * by_log_var).sum().item()) < 1e-11


@every
def test_bins_of_each_kind_sum_to_one(backend):
    """One sample for each bin; far bins, the bin of the mean, and open bins; narrow against the deviation and not."""
    x0 = BINS[::3].float()[:, None].to(DEVICE)
    for std in (0.004, 0.3):
        middle = torch.full_like(x0, 0.1)
        row = DECODER.clone()
        row[3:5] = 2 * math.log(std)
        with fastdiff.backend(backend):
            nats = ops.vlb(middle, x0, x0, 0, row[None])
        want = reference.discretized_gaussian(x0.double(), middle.double(), row[3].double().expand_as(x0))[0][:, 0]
        assert_close(nats, want, BOUND * (1 + want))


@pytest.mark.parametrize("x0", [-1.0, -0.25, 0.0, 0.9921875, 1.0])
@pytest.mark.parametrize("sigmas", [-40.0, -3.0, -0.01, 0.0, 0.6, 7.0, 40.0])
@pytest.mark.parametrize("std", [0.0008, 0.01, 0.7])
def test_decoder_is_that_of_mpmath(x0, sigmas, std):
    """40 standard deviations away it is 800 nats, not the -log(1e-12) of a clamped probability."""
    mean = x0 + sigmas * std
    v = 2 * math.log(std)
    got = [i.item() for i in reference.discretized_gaussian(*torch.tensor([[x0], [mean], [v]], dtype=torch.float64))]
    std, mean = mpmath.exp(mpmath.mpf(v) / 2), mpmath.mpf(mean)
    want = nats_of(x0, mean, std)
    assert got[0] == pytest.approx(float(want), rel=1e-11, abs=1e-12)
    step = mpmath.mpf(10) ** -15
    by_mean = (nats_of(x0, mean + step, std) - nats_of(x0, mean - step, std)) / (2 * step)
    up, down = (nats_of(x0, mean, mpmath.exp((mpmath.mpf(v) + s) / 2)) for s in (step, -step))
    assert got[1] == pytest.approx(float(by_mean), rel=1e-9, abs=1e-9)
    assert got[2] == pytest.approx(float((up - down) / (2 * step)), rel=1e-9, abs=1e-9)


@every
def test_far_tails_are_finite(backend):
    """The gradient in the tail is the distance in standard deviations, over one."""
    std = 0.01
    x0 = torch.tensor([[0.0], [0.5], [-1.0], [1.0]], device=DEVICE)
    mean = (x0 + std * torch.tensor([[40.0], [-40.0], [40.0], [-40.0]], device=DEVICE)).requires_grad_()
    row = DECODER.clone()
    row[3:5] = 2 * math.log(std)
    with fastdiff.backend(backend):
        nats = ops.vlb(mean, x0, x0, 0, row[None])
        nats.sum().backward()
    data, m, v = x0.double(), mean.detach().double(), row[3].double().expand_as(x0)
    want, slope, _ = reference.discretized_gaussian(data, m, v)
    assert bool((want > 700).all()) and bool((slope.abs() > 39 / std).all())
    error = ARITHMETIC * 40**2
    assert_close(nats.detach(), want[:, 0], error)
    assert_close(mean.grad, slope, error / 40 / std)


@every
def test_decoder_of_every_width_and_distance(backend):
    """Bins from far wider than the standard deviation to far narrower, from around the mean to the tail."""
    std = torch.tensor([0.001, 0.01, 0.05, 0.1, 0.15, 0.3, 2.0, 500.0])
    sigmas = torch.tensor([0.0, 0.2, 0.6, 1.0, 3.0, 6.0, 10.0, 40.0])
    level, at = (i.flatten() for i in torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij"))
    mean = (sigmas[at] * std[level])[:, None].to(DEVICE).requires_grad_()
    x0 = torch.zeros_like(mean)
    raw = (x0.detach() - 1).requires_grad_()
    log_var = 2 * std.log()
    rows = torch.stack((0 * std, 0 * std + 1, 0 * std, log_var, log_var + 2, 0 * std + 1), 1).to(DEVICE)
    with fastdiff.backend(backend):
        nats = ops.vlb(mean, x0, x0, level.to(DEVICE), rows, raw_variance=raw)
        nats.sum().backward()
    v = rows[level, 3].double()[:, None]
    exact = x0.double(), mean.detach().double(), v
    want = reference.discretized_gaussian(*exact)
    errors = decoder_errors(*exact, *want)
    for got, value, error in zip((nats[:, None], mean.grad, raw.grad), want, errors, strict=True):
        # The standard deviation is exp(v / 2) in float32, and -log p and its derivatives are at most quadratic in it.
        inherent = ARITHMETIC * (1 + v.abs()) * ((value.abs() + 1) if got is not mean.grad else value.abs())
        assert_close(got.detach(), value, error + inherent + 1e-10)  # the oracle, at 500


# --- every term -------------------------------------------------------------------------------------------------


def derivatives(value: Tensor, *leaves: Tensor) -> list[Tensor]:
    """Of an elementwise function."""
    found = torch.autograd.grad(value.sum(), leaves, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(leaf) if f is None else f.abs() for f, leaf in zip(found, leaves, strict=True)]


def kl_errors(error, w, delta, value, by_delta, backend):
    """Of the KL and its derivatives by the mean and delta, where these two are exact."""
    e = (-delta).exp()
    spread = w * error**2 * e
    exponent = BOUND + ARITHMETIC * (1 + delta.abs())
    phi = delta + torch.expm1(-delta)
    # delta - (1 - e) loses the leading digits where it is computed as such.
    plain = 0.0 if backend == "triton" else ARITHMETIC * delta.abs()
    return (
        8 * BOUND * phi + plain + exponent * spread,
        exponent * (w * error * e).abs(),
        8 * BOUND * torch.expm1(-delta).abs() + exponent * spread,
    )


def decoder_errors(x0, mean, v, value, by_mean, by_v):
    """Of -log p and its derivatives by the mean and v, where these two are exact. p is a difference of two tails, or
    what they leave of 1: over p they say how many digits that loses."""
    inverse = (-v / 2).exp()
    is_open = x0.abs() > 0.999
    sign = torch.where(torch.where(is_open, x0, x0 - mean) < 0, -1.0, 1.0)
    c, h = sign * (x0 - mean) * inverse, inverse / 255
    near, far = c - h, c + h
    tails = [torch.special.log_ndtr(-i.abs()) + value for i in (near, far)]
    loss = tails[0].exp() + torch.where(is_open, 0.0, tails[1].exp())
    ratio = (-0.5 * near**2 - 0.5 * math.log(2 * math.pi) + value).exp()
    decay = torch.where(is_open, 0.0, (-2 * c * h).exp())
    narrow = ~is_open & (h < 0.0499) & (c * h < 0.499)
    relative = torch.where(narrow, BOUND, 2 * BOUND * (1 + loss)) + ARITHMETIC * torch.where(near < 0, near**2, 1.0)
    by_c, by_scale = by_mean.abs() / inverse, 2 * by_v.abs()
    c_error = torch.where(narrow, ARITHMETIC * (c.abs() + h), relative * by_c + ARITHMETIC * ratio)
    scale_error = ARITHMETIC * ratio * (near.abs() + decay * far.abs()) + relative * by_scale
    scale_error = torch.where(narrow, ARITHMETIC * (1 + c**2), scale_error)
    return relative + ARITHMETIC * (1 + c**2 + value), c_error * inverse + ARITHMETIC * by_mean.abs(), scale_error


def term_errors(pred, raw, x_t, x0, t, rows, clip, backend):
    """How far float32 may be from what reference.vlb gives for arguments in float64."""
    a, b, w, low, high, decoder = reference.coefficients(rows.double(), t, pred)
    mean = a * x_t + b * pred
    mean_error = ARITHMETIC * ((a * x_t).abs() + (b * pred).abs())
    at_bound = torch.zeros_like(mean, dtype=torch.bool)
    if clip is not None:
        at_bound = (mean.abs() - clip).abs() <= mean_error
        mean_error = torch.where((mean.abs() > clip) & ~at_bound, 0.0, mean_error)
        mean = mean.clamp(-clip, clip)
    mean_error = mean_error + ARITHMETIC * (x0 - mean).abs()
    v = low.expand_as(mean) if raw is None else low + (raw + 1) / 2 * (high - low)
    r = 0.0 if raw is None else (raw.abs() + 1) / 2
    v_error = ARITHMETIC * (1 + low.abs() + r * (high.abs() + low.abs()))

    mean, v = mean.detach().clone().requires_grad_(), v.detach().clone().requires_grad_()
    first = (decoder != 0).expand_as(mean)
    bins = reference.discretized_gaussian(x0, mean, v)
    terms = reference.gaussian_kl(x0 - mean, w, v)
    value, by_mean, by_v = (torch.where(first, i, j) for i, j in zip(bins, terms, strict=True))
    own = [
        torch.where(first, i, j)
        for i, j in zip(
            decoder_errors(x0, mean, v, *bins), kl_errors(x0 - mean, w, v, terms[0], terms[2], backend), strict=True
        )
    ]
    slopes, mean_slopes, v_slopes = (derivatives(i, mean, v) for i in (value, by_mean, by_v))
    errors = [
        2 * (i + by[0] * mean_error + by[1] * v_error)
        for i, by in zip(own, (slopes, mean_slopes, v_slopes), strict=True)
    ]
    errors[0] = errors[0] + mean_slopes[0] * mean_error**2 + v_slopes[1] * v_error**2
    errors[1] = b.abs() * (errors[1] + torch.where(at_bound, by_mean.abs(), 0.0))
    errors[2] = 0.5 * ((high - low).abs() * errors[2] + ARITHMETIC * (high.abs() + low.abs()) * by_v.abs())
    return [e.detach() for e in errors], (v.abs() > 30).detach()


FLUSHED = 2.0**-126  # subnormal gradients, see strategies.EXTREMES
SAME, LAST = ("contiguous",) * 4, ("channels_last",) * 4
HALVES = ("half", "half", "contiguous", "contiguous")
SINGLE, BRAIN, HALF = ((d,) * 4 for d in (torch.float32, torch.bfloat16, torch.float16))


@every
@given(
    shape=shapes(),
    dtype=st.tuples(*[dtypes] * 4),
    layout=st.sampled_from([SAME, LAST, HALVES]) | st.tuples(*[layouts] * 4),
    learned=st.booleans(),
    clip=st.sampled_from([None, 1.0, 3.0]),
    detach_mean=st.booleans(),
    reduction=st.sampled_from(["mean", "none"]),
    per_sample=st.booleans(),
    extreme=st.booleans(),
    salt=salts,
)
@example((3, 2, 3, 5), HALF, HALVES, True, 1.0, False, "none", True, False, 1)
@example((2, 3, 3, 5), BRAIN, LAST, True, None, False, "mean", True, False, 2)
@example((3, 2049), SINGLE, SAME, True, 1.0, False, "none", True, False, 3)
@example((2, 4, 600), SINGLE, HALVES, True, None, True, "none", True, False, 4)
@example((3, 900), SINGLE, SAME, False, 3.0, False, "mean", True, True, 5)
@example((2, 700), SINGLE, SAME, True, None, False, "none", True, True, 6)
def test_vlb(backend, shape, dtype, layout, learned, clip, detach_mean, reduction, per_sample, extreme, salt):
    leaves = [tensor(shape, dtype[i], layout[i], salt + 10 * i, extreme) for i in range(4)]
    pred, raw, x_t, x0 = leaves
    # Half of the data is images.
    x0 = leaves[3] = torch.where(torch.rand_like(x0, dtype=torch.float32) < 0.5, (x0 / 4).clamp(-1, 1), x0)
    pred.requires_grad_()
    raw = raw.requires_grad_() if learned else None
    rows, t = bound_rows(salt), index(ROWS, shape[0], per_sample, salt)
    options = {"clip": clip, "reduction": reduction, "detach_mean": detach_mean, "raw_variance": raw}
    with fastdiff.backend(backend):
        value = ops.vlb(pred, x_t, x0, t, rows, **options)
        with torch.no_grad():
            alone = ops.vlb(pred, x_t, x0, t, rows, **options)
        if value.requires_grad:
            value.sum().backward()
    assert value.dtype == torch.float32 and value.requires_grad == (learned or not detach_mean)
    assert_same_bits(alone, value)

    exact = [i.detach().double() for i in leaves]
    exact[1] = exact[1] if learned else None
    want, *slopes = reference.vlb(*exact, t, rows.double(), clip)
    (value_error, *errors), wild = term_errors(*exact, t, rows, clip, backend)
    # What becomes of an infinite operand or of a variance of exp(30) or exp(-30) depends on the grouping of the terms.
    operands = torch.stack([i for i in exact if i is not None])
    wild = wild | operands.isinf().any(0)
    not_a_number = operands.isnan().any(0)
    value_error = value_error + SUMMATION * want.abs()
    count = want.numel() if reduction == "mean" else want.numel() // len(want)
    got = value.detach()
    if reduction == "mean":
        whole = [i.reshape(-1) for i in (want, value_error, wild, not_a_number)]
        got = got.reshape(1)
        want, value_error, wild_value, nan_value = (i[None] for i in whole)
    else:
        want, value_error, wild_value, nan_value = (
            i.reshape(shape[0], -1) for i in (want, value_error, wild, not_a_number)
        )
    wild_value, nan_value = wild_value.any(1), nan_value.any(1)
    assert bool(got[nan_value].isnan().all())
    free = ~(wild_value | nan_value)
    assert_close(got[free], want.mean(1)[free], value_error.mean(1)[free])
    for leaf, slope, error in zip((None if detach_mean else pred, raw), slopes, errors, strict=True):
        if leaf is None:
            continue
        assert leaf.grad.dtype == leaf.dtype
        slope = torch.where(wild, math.nan, slope / count)
        got = torch.where(wild, math.nan, leaf.grad)
        assert_close(got, slope, error / count + FLUSHED, 2, backend)
    assert not detach_mean or pred.grad is None


def test_kl_of_nearly_equal_variances():
    """1/2 (delta - 1 + exp(-delta)) and half of 1 - exp(-delta) keep their digits in the kernel, though they vanish."""
    delta = torch.tensor([0.0, 1e-6, -1e-4, 1e-2, 0.3, -0.7, 0.99, -1.01, 2.5], device=DEVICE)
    x = torch.zeros(len(delta), 1, device=DEVICE)
    raw = (x - 1).requires_grad_()
    rows = torch.stack((delta * 0, delta * 0, delta * 0 + 1, delta, delta + 2, delta * 0), 1)
    with fastdiff.backend("triton"):
        nats = ops.vlb(x, x, x, torch.arange(len(delta), device=DEVICE), rows, raw_variance=raw)
        nats.sum().backward()
    exact = [mpmath.mpf(d) for d in delta.double().tolist()]
    for got, want, lost in (
        (nats, [(d - 1 + mpmath.exp(-d)) / 2 for d in exact], 0.0),
        # times half of high - low, where it is subtracted
        (raw.grad[:, 0], [(1 - mpmath.exp(-d)) / 2 for d in exact], 2.0**-24),
    ):
        want = torch.tensor([float(w) for w in want], dtype=torch.float64, device=DEVICE)
        assert_close(got.detach(), want, (BOUND + lost) * want.abs())


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("clip", [None, 1.5])
def test_gradcheck_of_the_reference(learned, clip):
    """By every operand; and the slopes that the fused op gives are those derivatives."""
    pred, raw, x_t, x0 = (i.cpu().requires_grad_() for i in inputs((ROWS, 5)))
    rows, t = bound_rows(3).cpu().double(), torch.arange(ROWS)
    assert ((rows[t, :1] * x_t + rows[t, 1:2] * pred).abs() - 1.5).abs().min() > 1e-3
    given = (pred, raw, x_t, x0) if learned else (pred, x_t, x0)

    def value(*operands):
        operands = operands if learned else (operands[0], None, *operands[1:])
        return reference.vlb(*operands, t, rows, clip)[0]

    assert torch.autograd.gradcheck(value, given, eps=1e-7, atol=1e-4, rtol=1e-4)
    _, *slopes = reference.vlb(pred, raw if learned else None, x_t, x0, t, rows, clip)
    wanted = torch.autograd.grad(value(*given).sum(), given[: 1 + learned])
    for slope, want in zip(slopes, wanted, strict=False):
        assert_close(slope.detach(), want, 1e-9 * (1 + want.abs()))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_by_all_operands(reduction):
    """Those by x_t and x_0 are the reference's, and do not change the others."""
    operands = [i.cpu().requires_grad_() for i in inputs((3, 5), 4)]
    rows, t, by = bound_rows(4).cpu().double(), torch.tensor([0, 1, 3]), torch.tensor([1.0, -2, 3]).double()
    by = by[0] if reduction == "mean" else by

    def gradients(leaves):
        pred, raw, x_t, x0 = (i if i in leaves else i.detach() for i in operands)
        value = ops.vlb(pred, x_t, x0, t, rows, raw_variance=raw, clip=2.0, reduction=reduction)
        return torch.autograd.grad(value, [i for i in (pred, raw, x_t, x0) if i.requires_grad], by)

    class Chosen(list):
        def __contains__(self, item):
            return any(item is i for i in self)

    whole, two = gradients(Chosen(operands)), gradients(Chosen(operands[:2]))
    assert len(whole) == 4 and all(bool(g.abs().sum() > 0) for g in whole)
    for got, want in zip(two, whole, strict=False):
        assert_close(got, want, 1e-9 * (1 + want.abs()))


INCOMING = (1.0, 3.0, 65536.0, -0.001)


@every
@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_of_a_models_output(backend, dtype):
    """(B, 2C, H, W): read where they lie, and the gradient of each comes back to its half, scaled by what comes in."""
    whole = tensor((4, 6, 3, 5), dtype).requires_grad_()
    x_t, x0 = tensor((4, 3, 3, 5), dtype, salt=1), tensor((4, 3, 3, 5), dtype, salt=2).clamp(-1, 1)
    rows, t = bound_rows(7), torch.tensor([0, 1, 2, 3], device=DEVICE)
    by = torch.tensor(INCOMING, device=DEVICE)
    with fastdiff.backend(backend):
        pred, raw = whole.chunk(2, 1)
        ops.vlb(pred, x_t, x0, t, rows, raw_variance=raw).backward(by)
    exact = [i.detach().double() for i in (*whole.chunk(2, 1), x_t, x0)]
    _, *slopes = reference.vlb(*exact, t, rows.double(), None)
    (_, *errors), _ = term_errors(*exact, t, rows, None, backend)
    scale = by.double().reshape(-1, 1, 1, 1) / 45
    want = torch.cat(slopes, 1) * scale
    error = torch.cat(errors, 1) * scale.abs()
    assert_close(whole.grad, want, error, 3, backend)


@every
def test_float16_gradients_beyond_its_range(backend):
    """1.25e5 before it is multiplied by what comes in, 125 after; and 3e-9, 2e-4 after."""
    rows = torch.tensor([[0, 1.0, 0, 2 * math.log(0.002), 0, 1], [0, 1, 1e-5, 0, 0, 0]], device=DEVICE)
    for level, n, apart, incoming in ((0, 1, 0.5, 1e-3), (1, 1024, 0.3, 65536.0)):
        x0 = torch.zeros(1, n, device=DEVICE, dtype=torch.float16)
        pred = torch.full_like(x0, apart).requires_grad_()
        with fastdiff.backend(backend):
            ops.vlb(pred, x0, x0, level, rows).backward(torch.tensor([incoming], device=DEVICE))
        t = torch.tensor([level], device=DEVICE)
        slope = reference.vlb(pred.detach().double(), None, x0, x0, t, rows.double(), None)[1]
        assert_close(pred.grad, slope * incoming / n, 1e-5 * (slope * incoming / n).abs())


# --- what cannot be computed ------------------------------------------------------------------------------------

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


# --- the op -----------------------------------------------------------------------------------------------------


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


# --- rows -------------------------------------------------------------------------------------------------------

SCHEDULES = {"linear": linear(1000), "cosine": cosine(1000), "raised_cosine": make_schedule("raised_cosine", 50)}


def chain(name: str, timesteps: int) -> list[mpmath.mpf]:
    """alpha_bar_t as it is written, for t = 0..T."""
    T = mpmath.mpf(timesteps)
    if name == "cosine":
        f = [mpmath.cos((t / T + mpmath.mpf("0.008")) / mpmath.mpf("1.008") * mpmath.pi / 2) ** 2 for t in range(1001)]
        beta = [min(1 - f[t] / f[t - 1], mpmath.mpf("0.999")) for t in range(1, 1001)]
    elif name == "linear":
        beta = [mpmath.mpf("1e-4") + (mpmath.mpf("0.02") - mpmath.mpf("1e-4")) * i / (T - 1) for i in range(timesteps)]
    else:
        beta = [(1 - mpmath.cos(mpmath.pi * t / T)) / 2 for t in range(1, timesteps + 1)]
    alpha_bar = [mpmath.mpf(1)]
    for b in beta:
        alpha_bar.append(alpha_bar[-1] * (1 - b))
    return alpha_bar


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("variance", ["posterior", "beta", "learned"])
def test_terms_are_those_of_mpmath(name, variance):
    """The KL of two Gaussians with the means and variances of Ho et al. 2020, eq. 6, 7, and the decoder."""
    schedule = SCHEDULES[name]
    T = schedule.timesteps
    alpha_bar = chain(name, T)
    rows = vlb_rows(schedule, "v", variance)
    pred, raw, x_t, x0 = 0.3, -0.4, 0.7, 40 / 127.5 - 1
    for t in (1, 2, 3, T // 2, T - 1, T):
        now, before = alpha_bar[t], alpha_bar[t - 1]
        beta = 1 - now / before
        posterior = (1 - before) / (1 - now) * beta
        x0hat = mpmath.sqrt(now) * x_t - mpmath.sqrt(1 - now) * pred
        low = posterior if t > 1 else (1 - alpha_bar[1]) / (1 - alpha_bar[2]) * (1 - alpha_bar[2] / alpha_bar[1])
        r = {"posterior": 0, "beta": 1, "learned": (mpmath.mpf(raw) + 1) / 2}[variance]
        var = mpmath.exp(mpmath.log(low) + r * (mpmath.log(beta) - mpmath.log(low)))
        if t == 1:
            want = nats_of(x0, x0hat, mpmath.sqrt(var))
        else:
            c, d = mpmath.sqrt(before) * beta / (1 - now), mpmath.sqrt(now / before) * (1 - before) / (1 - now)
            apart = (c * x0 + d * x_t) - (c * x0hat + d * x_t)
            want = (mpmath.log(var) - mpmath.log(posterior) - 1 + (posterior + apart**2) / var) / 2
        operands = (torch.full((1, 1), i, dtype=torch.float64) for i in (pred, x_t, x0))
        raws = torch.full((1, 1), raw, dtype=torch.float64) if variance == "learned" else None
        got = ops.vlb(*operands, t, rows, raw_variance=raws).item()
        assert got == pytest.approx(float(want), rel=1e-8, abs=1e-15), t


@pytest.mark.parametrize("objective", ["eps", "x0", "v", "score"])
def test_a_perfect_prediction_leaves_no_term(objective):
    """Of x_t = alpha x_0 + sigma eps every prediction gives the same x0hat; with the posterior variance the KL is 0."""
    schedule = linear(100)
    t = torch.arange(2, 101)
    alpha, sigma = schedule.alpha[t][:, None], schedule.sigma[t][:, None]
    x0, eps = torch.rand(2, len(t), 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    pred = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "score": -eps / sigma}[objective]
    nats = ops.vlb(pred, alpha * x0 + sigma * eps, x0, t, vlb_rows(schedule, objective, "posterior"))
    assert nats.abs().max() < 1e-20
    beta = ops.vlb(pred, alpha * x0 + sigma * eps, x0, t, vlb_rows(schedule, objective, "beta"))
    assert bool((beta > 1e-9).all())


def test_rows_of_two_variances_and_one_level():
    learned, beta, posterior = (vlb_rows(linear(10), "eps", v) for v in ("learned", "beta", "posterior"))
    assert torch.equal(learned[1:, 3:5], torch.stack((posterior[1:, 3], beta[1:, 3]), 1))
    assert torch.equal(beta[1:, 3], beta[1:, 4]) and torch.equal(posterior[1:, 3], posterior[1:, 4])
    assert learned[0].isnan().all() and learned[1:, 5].tolist() == [1.0] + [0.0] * 9
    # The signal-to-noise ratio that the step gives back (Kingma et al. 2021, arXiv:2107.00630, eq. 13).
    snr = linear(10).snr
    assert torch.allclose(learned[2:, 2], snr[1:-1] - snr[2:], rtol=1e-12)
    single = vlb_rows(NoiseSchedule.from_betas(torch.tensor([0.3])), "x0", "learned")
    assert single[1, 3].item() == single[1, 4].item() == pytest.approx(math.log(0.3))


def test_rows_that_cannot_be():
    with pytest.raises(ValueError, match="variance: expected one of posterior, beta, learned, got 'fixed'"):
        vlb_rows(linear(10), "eps", "fixed")
    with pytest.raises(ValueError, match="objective: 'eps' cannot determine x_0 at level 50"):
        vlb_rows(SCHEDULES["raised_cosine"], "eps", "beta")


# --- the prior's term -------------------------------------------------------------------------------------------


def test_prior_kl_of_each_sample():
    schedule = linear(1000)
    x0 = tensor((3, 2, 5)).cpu()
    got = prior_kl(schedule, x0.double())
    want = torch.tensor([schedule.prior_kl(x.double().square().mean().item()) for x in x0], dtype=torch.float64)
    assert got.dtype == torch.float64 and torch.allclose(got, want, rtol=1e-10)
    assert prior_kl(schedule, x0.bfloat16()).dtype == torch.float32
    # Ho et al. 2020 print about 1e-5 bits per dimension.
    assert prior_kl(schedule, torch.full((1, 4), 0.5).double()).item() / math.log(2) == pytest.approx(
        7.2787e-6, abs=5e-11
    )


def test_prior_kl_where_the_variance_grows():
    """Against N(0, sigma_T^2), from which sampling starts: 1/2 x_0^2 / sigma_T^2."""
    schedule = NoiseSchedule.from_alpha_sigma(torch.ones(3), torch.tensor([0.1, 1.0, 50.0]))
    assert prior_kl(schedule, torch.full((2, 4), 3.0).double()).tolist() == pytest.approx([4.5 / 2500] * 2)


# --- importance sampling ----------------------------------------------------------------------------------------


def filled(timesteps: int, salt: int = 0) -> tuple[LossSecondMoment, Tensor]:
    """With ten losses of each level, (T, 10), told in a mixed order."""
    losses = 5 * torch.rand(timesteps, 10, generator=torch.Generator().manual_seed(salt)) ** 3
    moments = LossSecondMoment(timesteps)
    order = torch.randperm(10 * timesteps, generator=torch.Generator().manual_seed(salt + 1))
    for part in order.split(7):
        moments.update(part // 10 + 1, losses.flatten()[part])
    return moments, losses


def test_levels_are_even_until_each_has_ten_losses():
    moments = LossSecondMoment(4)
    levels = torch.arange(1, 5)
    for _ in range(9):
        moments.update(levels, levels.float())
    moments.update(levels[:3], levels[:3].float())
    assert torch.equal(moments.probabilities(), torch.full((4,), 0.25))
    assert moments.sample(3)[1].tolist() == [1.0, 1.0, 1.0]
    moments.update(levels[3:], levels[3:].float())
    want = 0.999 * levels / 10 + 0.001 / 4
    assert torch.allclose(moments.probabilities(), want)


def test_probabilities_are_the_root_of_the_second_moment():
    moments, losses = filled(6)
    size = losses.double().square().mean(1).sqrt()
    assert torch.allclose(moments.probabilities().double(), 0.999 * size / size.sum() + 0.001 / 6, rtol=1e-6)
    torch.manual_seed(0)
    t, _ = moments.sample(200_000)
    drawn = torch.bincount(t, minlength=7)[1:] / 200_000
    p = moments.probabilities()
    assert t.min() >= 1 and bool(((drawn - p).abs() < 5 * (p / 200_000).sqrt()).all())


def test_the_estimate_is_unbiased():
    """The expectation over t, taken exactly, and a draw."""
    moments, losses = filled(6)
    term = losses.mean(1).double()
    p = moments.probabilities().double()
    torch.manual_seed(0)
    t, weights = moments.sample(200_000)
    expected = torch.zeros(6, dtype=torch.float64)
    expected[t - 1] = weights.double()  # what each level's weight is
    assert (p * expected * term).sum().item() == pytest.approx(term.mean().item(), rel=1e-6)
    assert (p * expected).sum().item() == pytest.approx(1.0, rel=1e-6)
    estimate = weights * term[t - 1]
    assert estimate.mean().item() == pytest.approx(term.mean().item(), abs=5 * estimate.std().item() / 200_000**0.5)


def test_only_the_last_ten_losses_of_a_level_count():
    """Also where a batch brings more of them at once, and with other levels and lost losses between them."""
    moments = LossSecondMoment(2)
    losses = torch.arange(1.0, 26)
    t = torch.where(torch.arange(25) % 6 == 5, 2, 1)
    losses[3], losses[9] = math.nan, math.inf
    for part in (slice(0, 4), slice(4, 25)):
        moments.update(t[part], losses[part])
    first = losses[(t == 1) & losses.isfinite()]
    assert sorted(moments.losses[0].tolist()) == first[-10:].tolist()
    assert moments.losses[1].tolist() == losses[t == 2].tolist() + [0.0] * 6
    assert moments.seen.tolist() == [len(first), 4]


def test_levels_without_loss_are_even():
    moments = LossSecondMoment(3)
    moments.update(torch.arange(30) % 3 + 1, torch.zeros(30))
    assert torch.equal(moments.probabilities(), torch.full((3,), 1 / 3))


def test_the_history_is_state():
    moments, _ = filled(5)
    other = LossSecondMoment(5)
    other.load_state_dict(moments.state_dict())
    assert torch.equal(other.probabilities(), moments.probabilities())
    assert list(moments.state_dict()) == ["losses", "seen"]
    with pytest.raises(ValueError, match="timesteps: expected an integer of at least 1, got 0"):
        LossSecondMoment(0)


def test_the_history_is_not_differentiated():
    moments = bound.LossSecondMoment(3)
    moments.update(torch.tensor([1, 2]), torch.ones(2, requires_grad=True))
    assert not moments.losses.requires_grad
