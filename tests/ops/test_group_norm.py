"""silu(GroupNorm(x + add) (1 + scale) + shift) and its gradients, by kernels and by plain PyTorch, against float64."""

import itertools
import math
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from fastdiff.kernels.norm_tile import MINUS_LN_2, MINUS_LOG2_E, quick_sigmoid, silu, silu_slope
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import DEVICE, dtypes, laid, salts, tensor
from tolerance import ARITHMETIC, INTERPRETED, ROUNDING, SUMMATION, assert_close, assert_same_bits
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.kernels import group_norm as kernels
from fastdiff.kernels import norm_backward, norm_tile
from fastdiff.nn import ResnetBlock

# NumPy, in the interpreter, on exp(-u) beyond the range of float32.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
every = pytest.mark.parametrize("backend", ["triton", "reference"])
EPS = 1e-2
NAMES = ("y", "x", "weight", "bias", "scale", "shift", "add")
# Tiny GPUs, on which small images are large: a program that holds 128 or 32 elements, few programs or many.
SMALL = kernels.Limits(warp=4, forward=2, backward=2, held=16, few=8, enough=4, small=64, line=32, sector=8, parts=8)
LIMITS = [
    kernels.Limits(),
    SMALL,
    SMALL._replace(forward=1, backward=1, held=8, rows=2, blocks=3, line=16, resident=256),
    SMALL._replace(enough=1, blocks=1, rows=1, parts=2, resident=1),
    SMALL._replace(halves=False),
]


def operands(shape, dtype, wide, layout, offset, scaled, salt, added=None) -> dict[str, Tensor | None]:
    """x, weight, bias, scale, shift, add. x lies around `offset`; scale and shift are halves of one tensor, as a linear
    layer gives them; add is one row for each sample ("rows"), one for all ("row"), or None."""
    x = laid((tensor(shape, torch.float32, salt=salt) + offset).to(dtype), layout)
    rows = tensor((shape[0], 2 * shape[1]), wide, salt=salt + 1).chunk(2, 1) if scaled else (None, None)
    weight, bias = (tensor(shape[1:2], wide, salt=salt + i) for i in (2, 3))
    add = None if added is None else tensor(shape[:2] if added == "rows" else shape[1:2], wide, salt=salt + 4)
    return dict(zip(NAMES[1:], (x, weight, bias, *rows, add), strict=True))


def with_gradients(given, groups, grad, first=0, silu=True, layout="contiguous") -> dict[str, Tensor]:
    """y and its gradients, by name. first: channels of x; the others are given as skip, unless it is 0."""
    given = {name: t for name, t in given.items() if t is not None}
    if first:
        parts = given["x"].tensor_split([first], 1)
        given |= dict(zip(("x", "skip"), (laid(part.contiguous(), layout) for part in parts), strict=True))
    leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
    rows = (leaves.get(name) for name in ("scale", "shift", "add", "skip"))
    y = ops.group_norm_silu(leaves["x"], groups, leaves["weight"], leaves["bias"], EPS, *rows, silu=silu)
    found = {"y": y.detach()} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad), strict=True))
    if first:
        for name in ("x", "skip"):
            assert found[name].shape == given[name].shape
        found["x"] = torch.cat((found["x"], found.pop("skip")), 1)
    return found


def errors(given, groups, grad, cancels, silu=True) -> dict[str, Tensor]:
    """How far float32 may be off, by name: every rounding of the arithmetic, carried through to the result.

    cancels: the variance is E[x^2] - E[x]^2, as in PyTorch's own kernel for channels-last images on the CPU.
    """
    x, weight, bias, scale, shift, add = (None if t is None else t.double() for t in given.values())
    batch, channels = x.shape[:2]
    ones = [1] * (x.ndim - 2)
    size = x.abs()
    if add is not None:
        size = size + add.abs().reshape(-1, channels, *ones)
        x = x + add.reshape(-1, channels, *ones)

    def group_mean(t):
        means = t.reshape(batch, groups, -1).mean(2).repeat_interleave(channels // groups, 1)
        return means.reshape(batch, channels, *ones)

    def pixel_sum(t):
        return t.reshape(batch, channels, -1).sum(2)

    mean = group_mean(x)
    variance = group_mean((x - mean) ** 2)
    rstd = (variance + EPS) ** -0.5
    xhat = (x - mean) * rstd
    by = x.new_ones(batch, channels) if scale is None else 1 + scale
    factor = (weight * by).reshape(batch, channels, *ones)
    shown = bias * by + (0 if shift is None else shift)
    offset = shown.reshape(batch, channels, *ones)
    shown_size = (bias * by).abs() + (0 if shift is None else shift.abs())

    rstd_error = SUMMATION * (1 + ((group_mean(x**2) * rstd**2) if cancels else 0))
    xhat_error = rstd * SUMMATION * (group_mean(size) + size) + xhat.abs() * rstd_error
    u = factor * xhat + offset
    u_error = factor.abs() * xhat_error + ARITHMETIC * ((factor * xhat).abs() + shown_size.reshape(offset.shape))
    if silu:
        s = u.sigmoid()
        y_error = 1.1 * u_error + ARITHMETIC * (1 + u.abs()) * (u * s).abs()
        slope = grad.double() * s * (1 + u * (1 - s))
        slope_error = grad.double().abs() * (0.5 * u_error + ARITHMETIC * (1 + u.abs()) * s * (1 + u.abs()))
    else:
        y_error, slope, slope_error = u_error, grad.double(), torch.zeros_like(u)
    one_error = slope_error + SUMMATION * slope.abs()
    other_error = slope_error * xhat.abs() + slope.abs() * xhat_error + SUMMATION * (slope * xhat).abs()
    m_1, m_2 = group_mean(factor * slope), group_mean(factor * slope * xhat)
    m_1_error, m_2_error = group_mean(factor.abs() * one_error), group_mean(factor.abs() * other_error)
    terms = (factor * slope).abs() + m_1.abs() + (xhat * m_2).abs()
    found = {"y": y_error}
    found["x"] = rstd * (
        factor.abs() * slope_error + m_1_error + xhat.abs() * m_2_error + m_2.abs() * xhat_error
        + terms * (ARITHMETIC + rstd_error)
    )  # fmt: skip
    ones_error, others_error = pixel_sum(one_error), pixel_sum(other_error)
    found["weight"], found["bias"] = (by.abs() * others_error).sum(0), (by.abs() * ones_error).sum(0)
    found["add"] = pixel_sum(found["x"] + SUMMATION * rstd * terms)
    if add is not None and add.ndim == 1:
        found["add"] = found["add"].sum(0)
    found["scale"], found["shift"] = weight.abs() * others_error + bias.abs() * ones_error, ones_error
    return {name: error * (1 + ARITHMETIC) for name, error in found.items()}


def check(
    backend, shape, groups, dtype, wide, layout, offset, scaled, salt, added=None, limits=LIMITS[0], first=0, silu=True
):  # fmt: skip
    given = operands(shape, dtype, wide, layout, offset, scaled, salt, added)
    grad = tensor(shape, dtype, salt=salt + 5)
    with fastdiff.backend(backend), mock.patch.object(kernels, "LIMITS", limits):
        got = with_gradients(given, groups, grad, first, silu, layout)
    double = {name: None if t is None else t.double() for name, t in given.items()}
    want = with_gradients(double, groups, grad.double(), silu=silu)
    allowed = errors(given, groups, grad, cancels=backend == "reference" and DEVICE.type == "cpu", silu=silu)
    assert got.keys() == want.keys()
    if layout == "contiguous" or (backend == "triton" and not first):
        assert got["y"].stride() == torch.empty_like(given["x"]).stride()
    for name, result in got.items():
        assert result.dtype == (dtype if name in ("y", "x") else wide), name
        assert_close(result, want[name], allowed[name], 1, backend)


@st.composite
def shaped(draw):
    """(shape, groups): (B, C), (B, C, L), (B, C, H, W) or (B, C, D, H, W) with more than one value in a group."""
    groups, depth, rank = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(0, 3))
    inner = [draw(st.integers(1, 7)) for _ in range(rank)]
    depth += depth == 1 and math.prod(inner) == 1
    return (draw(st.integers(1, 3)), groups * depth, *inner), groups


@pytest.mark.slow
@every
@given(
    shaped=shaped(),
    dtype=dtypes,
    wide=st.booleans(),
    layout=st.sampled_from(["contiguous", "channels_last", "half", "strided", "swapped", "batch_last"]),
    offset=st.sampled_from([0.0, 3.0, 100.0]),
    scaled=st.booleans(),
    added=st.sampled_from([None, "rows", "row"]),
    limits=st.sampled_from(LIMITS),
    split=st.sampled_from([0.0, 0.4, 0.9]),
    silu=st.booleans(),
    salt=salts,
)
@example(((2, 6, 5, 4), 2), torch.bfloat16, True, "channels_last", 3.0, True, "rows", LIMITS[2], 0.5, True, 1)
@example(((1, 12, 7, 7), 4), torch.float32, False, "contiguous", 100.0, True, None, LIMITS[2], 0.6, True, 2)
@example(((3, 5, 7), 1), torch.float16, False, "half", 0.0, False, "row", LIMITS[3], 0.5, False, 3)
@example(((2, 4, 1, 1), 2), torch.float32, True, "contiguous", 3.0, True, "rows", LIMITS[0], 0.3, True, 4)
@example(((1, 48, 3, 5), 4), torch.bfloat16, True, "channels_last", 0.0, False, "rows", LIMITS[0], 0.34, False, 5)
@example(((1, 24, 3, 5), 2), torch.float32, True, "contiguous", 0.0, False, None, LIMITS[0], 0.7, True, 6)
@example(((2, 24), 2), torch.float32, True, "contiguous", 0.0, False, "row", LIMITS[1], 0.0, False, 7)
@example(((1, 40, 5), 1), torch.float32, True, "channels_last", 3.0, True, "rows", LIMITS[2], 0.1, False, 8)
def test_output_and_every_gradient(
    backend, shaped, dtype, wide, layout, offset, scaled, added, limits, split, silu, salt
):  # fmt: skip
    """Groups that a program holds, several or one, and groups of several parts: spans of pixels, chunks of channels;
    of one tensor, or of the channels of two."""
    shape, groups = shaped
    wide = torch.float32 if wide else dtype
    first = int(split * shape[1])
    check(backend, shape, groups, dtype, wide, layout, offset, scaled, salt, added, limits, first, silu)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [32, 130])
def test_the_parameters_of_a_large_batch(batch):
    """Their gradients are sums over a few samples at a time, or over many."""
    seen, real = [], kernels.launch

    def launch(kernel, grid, **given):
        seen.append(given.get("ROWS"))
        real(kernel, grid, **given)

    with mock.patch.object(kernels, "launch", launch):
        check("triton", (batch, 4), 2, torch.float32, torch.float32, "contiguous", 3.0, True, 9, "rows")
    assert seen[-1] == (32 if batch == 32 else 128)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("limits", [LIMITS[0], LIMITS[0]._replace(held=8)])
def test_images_of_several_tiles(layout, limits):
    check("triton", (1, 6, 33, 67), 2, torch.float32, torch.float32, layout, 3.0, True, 7, "rows", limits)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "limits", "groups", "firsts", "within"),
    [
        ("contiguous", LIMITS[0], 2, [7], []),
        ("contiguous", LIMITS[1], 2, [7], []),
        ("channels_last", LIMITS[0], 2, [3, 4, 6, 7], [3, 7]),
        ("channels_last", LIMITS[1], 2, [7], [7]),
        ("channels_last", LIMITS[3], 4, [4], [4]),  # slabs of 3 channels in tiles of 4
    ],
)
def test_two_tensors_give_the_bits_of_their_concatenation(monkeypatch, layout, limits, groups, firsts, within):
    """They meet between two groups or in the middle of one, between two tiles or in the middle of one.

    within: where they meet in the middle of an access. There compiled threads read element by element, hold other
    pixels, and so sum the gradients of the rows in another order."""
    if INTERPRETED:  # compiled kernels keep their globals
        monkeypatch.setattr(norm_tile, "RECENT", tl.constexpr(True))
    given = operands((2, 12, 3, 5), torch.bfloat16, torch.float32, layout, 1.0, True, 3, "row")
    grad = tensor((2, 12, 3, 5), torch.bfloat16, salt=9)
    bounds = errors(given, groups, grad, False)
    with fastdiff.backend("triton"), mock.patch.object(kernels, "LIMITS", limits):
        whole = with_gradients(given, groups, grad)
        for first in firsts:
            split = with_gradients(given, groups, grad, first=first, layout=layout)
            for name, result in whole.items():
                if INTERPRETED or first not in within or name in ("y", "x"):
                    assert_same_bits(split[name], result)
                else:
                    assert_close(split[name], result, bounds[name])
                assert split[name].stride() == result.stride()


@pytest.mark.skipif(not INTERPRETED, reason="compiled kernels keep their globals")
@pytest.mark.parametrize("recent", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_gradient_by_every_version_of_triton(monkeypatch, recent, layout):
    """Some keep x for the second pass over the slab, some x - center."""
    monkeypatch.setattr(norm_backward, "RECENT", tl.constexpr(recent))
    check("triton", (1, 6, 3, 5), 2, torch.float32, torch.float32, layout, 3.0, False, 7, "rows")


@pytest.mark.parametrize("limits", [LIMITS[0], SMALL._replace(warp=32, held=4, parts=4)])
def test_the_statistics_of_a_far_mean_do_not_cancel(monkeypatch, limits):
    """Deviations of 1 around 4,096 in float32: E[x^2] - E[x]^2 would keep no digit of the variance."""
    monkeypatch.setattr(kernels, "LIMITS", limits)
    random = torch.Generator().manual_seed(0)
    x = (4096 + torch.randint(-1, 2, (1, 2, 40, 40), generator=random).float()).to(DEVICE)
    one, zero = torch.ones(2, device=DEVICE), torch.zeros(2, device=DEVICE)
    with fastdiff.backend("triton"):
        _, mean, rstd = torch.ops.fastdiff.group_norm_silu(x, 1, one, zero, None, None, None, 0.0, None, True)
    deviation, exact = torch.std_mean(x.double(), correction=0)
    assert abs(mean.item() - exact.item()) < 2e-3
    assert abs(rstd.item() * deviation.item() - 1) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("limits", LIMITS[:3])
def test_equal_bits_from_run_to_run(layout, limits):
    given = operands((2, 12, 5, 7), torch.bfloat16, torch.float32, layout, 1.0, True, 3, "row")
    grad = tensor((2, 12, 5, 7), torch.bfloat16, salt=9)
    with fastdiff.backend("triton"), mock.patch.object(kernels, "LIMITS", limits):
        first, second = (with_gradients(given, 4, grad) for _ in range(2))
    for name, result in first.items():
        assert_same_bits(result, second[name])


def test_the_bounds_of_the_approximate_sigmoid_are_below_the_rounding_of_16_bit_types():
    """PTX: ex2.approx.ftz.f32 is within 2^-22 of the power, rcp.approx.ftz.f32 within one unit in the last place."""
    u = torch.linspace(-86, 88, 20_001)
    v = (u * MINUS_LOG2_E.value).double()  # rounded to float32, as in the kernel
    log2_e = torch.tensor(MINUS_LOG2_E.value).double()
    for power, reciprocal in itertools.product((-1, 1), repeat=2):
        e = (v.exp2() * (1 + power * 2.0**-22)).float()
        s = (1 / (e.double() * log2_e + log2_e).float().double()) * (1 + reciprocal * 2.0**-23)
        error = (s / MINUS_LN_2.value / u.double().sigmoid() - 1).abs()
        assert error.max() < ROUNDING[torch.float16] / 32
        assert error[u.abs() < 8].max() < 2.0**-20


@triton.jit
def approximate(sigmoid_ptr, silu_ptr, slope_ptr, u_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    v = tl.load(u_ptr + at) * MINUS_LOG2_E
    tl.store(sigmoid_ptr + at, quick_sigmoid(v) / MINUS_LN_2)
    tl.store(silu_ptr + at, silu(v, True))
    tl.store(slope_ptr + at, silu_slope(v, True) / MINUS_LN_2)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("channels", [128, 256])
def test_the_second_read_of_a_large_image_finds_it_in_the_cache(channels, last):
    """As those that an autoencoder decodes; and a pair of launches fills the GPU."""
    limits, pixels = kernels.Limits(), 512 * 512
    plan = kernels.plan_of(1, channels, pixels, 32, last, 2, False, limits)
    width = plan.shape["GROUPS"] * plan.shape["DEPTH"]
    assert plan.piece * width * pixels * 2 <= limits.resident < channels * pixels * 2
    assert plan.piece * plan.parts >= 0.9 * limits.enough
    assert sum(grid[0] for _, grid in plan.grids()) == plan.slabs == channels // width


@triton.jit
def exact_sigmoid(v):
    return MINUS_LN_2 / (1.0 + tl.exp2(v))


@pytest.mark.skipif(not INTERPRETED, reason="compiled kernels keep their globals")
@pytest.mark.parametrize("limits", LIMITS[:2])
def test_the_units_of_the_approximate_sigmoid(monkeypatch, limits):
    """With an exact one in its place, a group in one program and in parts: u, slopes and their sums are rescaled."""
    monkeypatch.setattr(kernels, "on_nvidia", lambda x: True)
    monkeypatch.setattr(norm_tile, "quick_sigmoid", exact_sigmoid)
    check("triton", (1, 8, 9, 7), 2, torch.float16, torch.float32, "channels_last", 3.0, True, 3, "rows", limits)


@pytest.mark.gpu
@pytest.mark.skipif(torch.version.hip is not None, reason="NVIDIA's instructions")
def test_the_approximate_sigmoid_and_what_is_made_of_it():
    u = torch.linspace(-86, 88, 8192, device=DEVICE)
    results = torch.empty(3, len(u), device=DEVICE)
    approximate[(1,)](*results, u, BLOCK=len(u))
    u = u.double()
    s = u.sigmoid()
    wanted, size = (s, u * s, s * (1 + u * (1 - s))), (s, u * s, s * (1 + u.abs()))
    for result, value, scale in zip(results, wanted, size, strict=True):
        assert ((result.double() - value).abs() <= scale.abs() * ROUNDING[torch.float16] / 32).all()


def test_the_reference_is_the_formula():
    given = operands((2, 6, 3, 4), torch.float64, torch.float64, "contiguous", 1.0, True, 3, "rows")
    x, weight, bias, scale, shift, add = given.values()
    grouped = (x + add[:, :, None, None]).reshape(2, 3, -1)
    mean, variance = grouped.mean(2, keepdim=True), grouped.var(2, correction=0, keepdim=True)
    u = ((grouped - mean) / (variance + EPS).sqrt()).reshape(x.shape) * weight[:, None, None] + bias[:, None, None]
    u = u * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    torch.testing.assert_close(ops.group_norm_silu(x, 3, weight, bias, EPS, scale, shift, add), u / (1 + (-u).exp()))


@pytest.mark.slow
@every
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("scaled", "added", "first"), [(False, None, 3), (True, "rows", 0), (False, "row", 0)])
def test_opcheck(backend, layout, scaled, added, first):
    """PyTorch's own tests: schema, autograd registration, fake tensors, and AOT dispatch with dynamic shapes."""
    given = operands((2, 4, 3, 3), torch.float32, torch.float32, layout, 0.0, scaled, 1, added)
    x, *rest = (None if t is None else t.detach().requires_grad_() for t in given.values())
    skip = None
    if first:
        x, skip = (laid(part.detach(), layout).requires_grad_() for part in x.tensor_split([first], 1))
    with fastdiff.backend(backend):
        torch.library.opcheck(torch.ops.fastdiff.group_norm_silu.default, (x, 2, *rest, EPS, skip, first == 0))
        with torch.no_grad():
            y, mean, rstd = torch.ops.fastdiff.group_norm_silu(x, 2, *rest, EPS, skip, first == 0)
        for parameters in (True, False):
            arguments = (torch.ones_like(y), x, mean, rstd, 2, *rest, skip, first == 0, parameters)
            arguments = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
            torch.library.opcheck(torch.ops.fastdiff.group_norm_silu_grad.default, arguments)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("added", ["rows", "row"])
def test_the_gradient_of_the_reference_is_that_of_autograd(added, silu):
    """The op itself runs it where there is no kernel."""
    given = operands((2, 6, 3, 4), torch.float64, torch.float64, "contiguous", 1.0, True, 3, added)
    x, *rows = given.values()
    leaves = [t.detach().requires_grad_() for t in (x[:, :4], *rows, x[:, 4:])]
    x, weight, bias, scale, shift, add, skip = leaves
    grad = tensor((2, 6, 3, 4), torch.float64, salt=9)
    exact = ops.group_norm_silu(x, 3, weight, bias, EPS, scale, shift, add, skip, silu=silu)
    want = torch.autograd.grad(exact, leaves, grad)
    y = torch.ops.fastdiff.group_norm_silu(x, 3, weight, bias, scale, shift, add, EPS, skip, silu)[0]
    for a, b in zip(torch.autograd.grad(y, leaves, grad), want, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_that_are_not_wanted_and_a_batch_of_none():
    given = operands((2, 4, 3, 3), torch.float32, torch.float32, "contiguous", 0.0, True, 1)
    with fastdiff.backend("triton"):
        scale = given["scale"].detach().requires_grad_()
        y = ops.group_norm_silu(given["x"], 2, given["weight"], given["bias"], EPS, scale, given["shift"])
        assert torch.autograd.grad(y.sum(), scale)[0].any()
        x = given["x"].detach().requires_grad_()
        y = ops.group_norm_silu(x, 2, given["weight"], given["bias"], EPS)
        with mock.patch.object(kernels, "parameters_kernel", None):  # by x alone: one launch
            assert torch.autograd.grad(y.sum(), x)[0].any()
        weight = given["weight"].detach().requires_grad_()
        y = ops.group_norm_silu(given["x"][:0], 2, weight, given["bias"], EPS)
        assert y.shape == (0, 4, 3, 3)
        assert torch.equal(torch.autograd.grad(y.sum(), weight)[0], torch.zeros(4, device=DEVICE))


@pytest.mark.parametrize("add", [False, True])  # and skip
def test_second_derivatives(add):
    given = operands((2, 4, 3), torch.float32, torch.float32, "contiguous", 0.0, False, 1)
    x, weight, bias = (given[name].detach().requires_grad_() for name in ("x", "weight", "bias"))
    more = {"add": given["bias"].detach().clone().requires_grad_()} if add else {}
    if add:
        x, more["skip"] = (part.detach().requires_grad_() for part in x.tensor_split([1], 1))
    found = []
    for backend in ("reference", "triton"):
        with fastdiff.backend(backend):
            y = ops.group_norm_silu(x, 1, weight, bias, EPS, **more)
            inputs = (x, weight, bias, *more.values())
            first = torch.autograd.grad(y.sum(), inputs, create_graph=True)
            second = torch.autograd.grad(sum((g**2).sum() for g in first), inputs, retain_graph=True)
            found.append((*first, *second, *torch.autograd.grad(y.sum(), inputs)))
    for right, got in zip(*found, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-4)


def test_gradients_with_a_graph_of_operands_that_are_made_of_each_other():
    """As a U-Net's skip, of which x was made: what comes by x is not counted twice."""
    given = operands((2, 4, 3, 3), torch.float32, torch.float32, "contiguous", 0.0, False, 1)
    skip, weight = given["x"].detach().requires_grad_(), torch.cat([given["weight"]] * 2)
    found = []
    for backend, graph in (("reference", False), ("triton", False), ("triton", True)):
        with fastdiff.backend(backend):
            y = ops.group_norm_silu(2 * skip.sin(), 2, weight, weight, EPS, skip=skip, add=weight)
        found += torch.autograd.grad(y.square().sum(), skip, create_graph=graph)
    for got in found[1:]:
        torch.testing.assert_close(got, found[0], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("scale_shift", [False, True])
def test_a_block_of_the_network_compiles_to_one_graph_with_the_kernel(scale_shift):
    block = ResnetBlock(
        4, 6, emb_dim=5, groups=2, eps=1e-2, dropout=0.0, scale_shift=scale_shift, scale=1.0, resample=None
    ).to(DEVICE)
    x, emb = tensor((2, 4, 3, 3)).requires_grad_(), tensor((1, 5))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    want = block(x, emb)
    torch.compiler.reset()
    with fastdiff.backend("triton"):
        got = torch.compile(block, backend=backend, fullgraph=True)(x, emb)
        step = torch.compile(block, backend="aot_eager", fullgraph=True)(x, emb)
    assert len(graphs) == 1
    assert sum("group_norm_silu" in str(node.target) for node in graphs[0].graph.nodes) == 2
    gradients = [torch.autograd.grad(y.square().sum(), [x, *block.parameters()]) for y in (want, got, step)]
    for y, by in zip((got, step), gradients[1:], strict=True):
        torch.testing.assert_close(y, want)
        for a, b in zip(by, gradients[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


X, W = torch.zeros(2, 4, 3), torch.ones(4)
S = torch.zeros(2, 4)
REFUSED = [
    ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
    ({"x": X.long()}, TypeError, "x: expected one of float32, bfloat16, float16, float64, got torch.int64"),
    ({"x": X[:, 0, 0]}, ValueError, r"x: expected shape \(B, C, ...\), got \(2,\)"),
    ({"num_groups": 3}, ValueError, "num_groups: expected a divisor of 4 channels, got 3"),
    ({"num_groups": 0}, ValueError, "num_groups: expected a divisor of 4 channels, got 0"),
    ({"num_groups": 2.0}, ValueError, "num_groups: expected a divisor of 4 channels, got 2.0"),
    ({"weight": W[:3]}, ValueError, r"weight: expected shape \(4,\), got \(3,\)"),
    ({"weight": None}, TypeError, "weight: expected a tensor, got NoneType"),
    ({"bias": W.to("meta")}, ValueError, "bias: expected device cpu, got meta"),
    ({"skip": X[:1]}, ValueError, r"skip: expected the shape of x, \(2, 4, 3\), but for C, got \(1, 4, 3\)"),
    ({"skip": X[:, :, 0]}, ValueError, r"skip: expected the shape of x, \(2, 4, 3\), but for C, got \(2, 4\)"),
    ({"skip": X.half()}, ValueError, "skip: expected the type of x, torch.float32, got torch.float16"),
    ({"skip": X}, ValueError, r"weight: expected shape \(8,\), got \(4,\)"),
    ({"skip": X[:, :1]}, ValueError, "num_groups: expected a divisor of 5 channels, got 2"),
    ({"skip": X.to("meta")}, ValueError, "skip: expected device cpu, got meta"),
    ({"silu": 1}, TypeError, "silu: expected a bool, got int"),
    ({"eps": -1.0}, ValueError, "eps: expected a number of at least 0, got -1.0"),
    ({"eps": math.nan}, ValueError, "eps: expected a number of at least 0, got nan"),
    ({"scale": S}, ValueError, "shift: expected both scale and shift, or neither"),
    ({"shift": S}, ValueError, "scale: expected both scale and shift, or neither"),
    ({"scale": S, "shift": S[:1]}, ValueError, r"shift: expected shape \(2, 4\), got \(1, 4\)"),
    ({"add": S[:1]}, ValueError, r"add: expected shape \(2, 4\), got \(1, 4\)"),
    ({"add": W[:3]}, ValueError, r"add: expected shape \(4,\), got \(3,\)"),
    ({"add": 1.0}, TypeError, "add: expected a tensor, got float"),
    ({"add": W.to("meta")}, ValueError, "add: expected device cpu, got meta"),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED)
def test_refused(changes, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        ops.group_norm_silu(**{"x": X, "num_groups": 2, "weight": W, "bias": W, "eps": EPS} | changes)
