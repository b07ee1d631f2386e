"""The terms of the variational bound and their gradients, against the float64 oracle and mpmath."""

import math

import mpmath
import pytest
import torch
from bound_inputs import ROWS, bound_rows, inputs, nats_of
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import BACKENDS, DEVICE, DTYPES, dtypes, index, layouts, salts, shapes, tensor
from tolerance import ARITHMETIC, BOUND, POWER, SUMMATION, assert_close, assert_same_bits
from torch import Tensor

import fastdiff
from fastdiff import ops, reference

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")
every = pytest.mark.parametrize("backend", BACKENDS)
DECODER = torch.tensor([0.0, 1, 0, 2 * math.log(0.2), 2 * math.log(0.2), 1], device=DEVICE)
BINS = torch.arange(256, dtype=torch.float64) / 127.5 - 1
mpmath.mp.dps = 60


# --- the decoder --------------------------------------------------------------------------------------------------


@every
def test_bins_of_a_known_gaussian(backend):
    """ln P(bins 0, 127, 255) for mean .1, std .2."""
    x0 = BINS[[0, 127, 255]].float()[:, None].to(DEVICE)
    with fastdiff.backend(backend):
        nats = ops.vlb(torch.full_like(x0, 0.1), x0, x0, 0, DECODER[None])
        if backend == "reference":
            wide = ops.vlb(torch.full_like(x0.double(), 0.1), x0.double(), x0.double(), 0, DECODER[None].double())
            assert wide.dtype == torch.float64
    want = torch.tensor([17.668359, 4.292660, 12.500363], device=DEVICE).double()
    # Nearly half the square of a distance over the standard deviation, which is a power.
    assert_close(nats, want, 4e-6 + 2 * POWER * want * (backend == "triton"))


@pytest.mark.parametrize("mean", [0.1, -0.97, 1.3, 0.0])
@pytest.mark.parametrize("std", [1e-3, 0.0071, 0.2, 5.0])
def test_bins_sum_to_one(mean, std):
    log_var = torch.full_like(BINS, 2 * math.log(std))
    nats, by_mean, by_log_var = reference.discretized_gaussian(BINS, torch.full_like(BINS, mean), log_var)
    p = (-nats).exp()
    assert abs(p.sum().item() - 1) < 1e-13
    # so that the derivatives of the sum vanish
    assert abs((p * by_mean).sum().item()) < 1e-12 / std and abs((p * by_log_var).sum().item()) < 1e-11


@pytest.mark.slow
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


@pytest.mark.slow
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


# --- every term ---------------------------------------------------------------------------------------------------


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


@pytest.mark.slow
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
