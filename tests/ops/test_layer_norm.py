"""The norm of rows, alone and of a gated sum, by the kernel and by plain PyTorch, against the float64 oracle."""

import re

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import DEVICE, dtypes, laid, layouts, salts, tensor
from tolerance import ARITHMETIC, SUMMATION, assert_close, assert_same_bits

import fastdiff
from fastdiff import ops, reference
from fastdiff.kernels import launch as launching
from fastdiff.kernels import layer_norm as kernels
from fastdiff.ops.layer_norm import LARGEST, is_fused

every = pytest.mark.parametrize("backend", ["triton", "reference"])
EPS = 1e-2
ROWS = ("gate", "scale", "shift")


def operands(shape, dtypes, layout, offset, present, salt):
    """(x, y or None, weight, bias, gate, scale, shift): what is present, the last three as parts of one tensor."""
    x, y = (laid((tensor(shape, salt=salt + i) + offset).to(dtypes[i]), layout) for i in range(2))
    vectors = [tensor(shape[-1:], dtypes[1], salt=salt + i) for i in (2, 3)]
    parts = tensor((shape[0], 6 * shape[-1]), dtypes[0], salt=salt + 4).chunk(6, 1) if len(shape) > 1 else (None,) * 6
    given = dict(zip(("weight", "bias", *ROWS), (*vectors, *parts[1:4]), strict=True))
    return x, y, *(t if name in present else None for name, t in given.items())


def errors(x, y, weight, bias, gate, scale, shift):
    """How far float32 may be off: (of s, of the norm), every rounding carried through to the result."""
    gated = reference.add_layer_norm(0 * x, y, None, None, EPS, gate, None, None)[0]
    s, s_error = x + gated, ARITHMETIC * (x.abs() + gated.abs())
    rstd = (s.var(-1, correction=0, keepdim=True) + EPS).rsqrt()
    xhat = (s - s.mean(-1, keepdim=True)) * rstd
    center_error = s_error + SUMMATION * (s.abs().mean(-1, keepdim=True) + s.abs())
    rstd_error = SUMMATION + 2 * (xhat.abs() * rstd * s_error).mean(-1, keepdim=True)
    xhat_error = rstd * center_error + xhat.abs() * rstd_error

    def by_sample(row, otherwise):
        return otherwise if row is None else row.reshape(len(row), *[1] * (x.ndim - 2), -1)

    weight, bias = 1 if weight is None else weight, torch.zeros(()) if bias is None else bias
    scale, shift = 1 + by_sample(scale, 0), by_sample(shift, torch.zeros(()))
    factor = torch.as_tensor(weight * scale).abs()
    terms = factor * xhat.abs() + (bias * scale).abs() + shift.abs()
    return s_error, factor * xhat_error + ARITHMETIC * terms


@st.composite
def shapes(draw):
    """(C,), (R, C), (B, N, C) or (B, H, W, C): widths of a part of a tile, of some and of several."""
    lead = draw(st.lists(st.integers(1, 5), max_size=3))
    return (*lead, draw(st.one_of(st.integers(1, 70), st.sampled_from([128, 320, 385, 700]))))


@pytest.mark.slow
@every
@given(
    shape=shapes(),
    dtype=st.tuples(dtypes, dtypes),
    layout=layouts,
    offset=st.sampled_from([0.0, 3.0, 100.0]),
    present=st.sets(st.sampled_from(["weight", "bias", *ROWS])),
    salt=salts,
)
@example((2, 17, 320), (torch.bfloat16,) * 2, "contiguous", 0.0, {"weight", "bias"}, 1)  # several rows a program
@example((3, 5, 385), (torch.float32, torch.bfloat16), "half", 100.0, {*ROWS}, 2)
@example((2, 3, 4, 66), (torch.float16,) * 2, "swapped", 3.0, {"weight", "bias", *ROWS}, 3)
@example((2, 2, 3, 40), (torch.float32,) * 2, "half", 3.0, set(), 4)
@example((4, 700), (torch.bfloat16,) * 2, "strided", 0.0, {"scale", "shift"}, 5)
def test_sums_and_norms_are_those_in_float64(backend, shape, dtype, layout, offset, present, salt):
    present = present - {*ROWS} if len(shape) == 1 else present
    present = present if "weight" in present else present - {"bias"}
    x, y, weight, bias, gate, *rows = operands(shape, dtype, layout, offset, present, salt)
    with fastdiff.backend(backend):
        alone = ops.layer_norm(x, weight, bias, EPS, scale=rows[0], shift=rows[1])
        total, normed = ops.add_layer_norm(x, y, weight, bias, EPS, gate=gate, scale=rows[0], shift=rows[1])
    x, y, weight, bias, gate, *rows = (None if t is None else t.double() for t in (x, y, weight, bias, gate, *rows))
    want = reference.add_layer_norm(x, y, weight, bias, EPS, gate, *rows)
    allowed = errors(x, y, weight, bias, gate, *rows)
    for got, right, error in zip((total, normed), want, allowed, strict=True):
        assert got.dtype == dtype[0] and (backend == "reference" or got.is_contiguous())
        assert_close(got, right, error, backend=backend)
    allowed = errors(x, torch.zeros_like(x), weight, bias, None, *rows)
    assert_close(alone, reference.layer_norm(x, weight, bias, EPS, *rows), allowed[1], backend=backend)


def test_the_oracle_is_the_formula():
    x = torch.tensor([[[1.0, 3.0], [2.0, 2.0]], [[0.0, 4.0], [5.0, 1.0]]]).double()
    one = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double()
    # The variances are 1, 0; 4, 4.
    got = ops.layer_norm(x, one[0], one[1], 0.0625, scale=one, shift=-one)
    xhat = torch.tensor([[[-1.0, 1.0], [0.0, 0.0]], [[-2.0, 2.0], [2.0, -2.0]]]).double()
    xhat /= torch.tensor([[1.0625, 0.0625], [4.0625, 4.0625]]).double().sqrt()[..., None]
    want = (xhat * one[0] + one[1]) * (1 + one[:, None]) - one[:, None]
    torch.testing.assert_close(got, want)
    total, normed = ops.add_layer_norm(x - 2 * one[:, None], one[:, None].expand_as(x), gate=torch.full_like(one, 2))
    assert torch.equal(total, x) and torch.equal(normed, ops.layer_norm(x))
    assert torch.equal(ops.add_layer_norm(x - 1, torch.ones_like(x))[0], x)


@every
def test_the_norm_is_of_the_sum_before_it_is_rounded(backend):
    """Each s rounds to 256: the norm of that is 0. And around 256 E[s^2] - E[s]^2 would keep no digit."""
    x, y = torch.full((1, 64), 256.0), torch.tensor([0.0625, -0.0625] * 32)[None]
    with fastdiff.backend(backend):
        total, normed = ops.add_layer_norm(x.bfloat16().to(DEVICE), y.bfloat16().to(DEVICE), eps=0.0)
    assert (total.float() - 256).abs().max() <= 1  # the interpreter cuts off
    assert (normed.float().cpu() - 16 * y).abs().max() < 1e-2


# Widths of Stable Diffusion, DiT, SD3 and Flux: tiles x channels, rows, warps of a program.
SHAPES = {
    3: (1, 64, 16, 4),
    320: (5, 64, 16, 4),
    640: (5, 128, 8, 4),
    1152: (5, 256, 4, 4),
    1280: (5, 256, 4, 4),
    1536: (6, 256, 4, 4),
    3072: (6, 512, 2, 4),
    5120: (5, 1024, 1, 4),
    LARGEST: (6, 4096, 1, 16),
}


@pytest.mark.parametrize("channels", SHAPES)
def test_a_program_of_enough_warps_holds_its_rows(channels, monkeypatch):
    seen = []
    monkeypatch.setattr(kernels, "launch", lambda kernel, grid, **given: seen.append(given))
    for warp, tokens in ((32, 256), (64, 256), (32, 1)):
        monkeypatch.setattr(launching, "WARP", warp)
        x = torch.empty(1, tokens, channels, device="meta")
        rest = dict.fromkeys(("total", "y", "weight", "bias", "gate", "scale", "shift"))
        kernels.layer_norm(out=x, x=x, eps=EPS, **rest)
    assert tuple(seen[0][name] for name in ("CHUNKS", "CHUNK", "ROWS", "num_warps")) == SHAPES[channels]
    assert seen[1]["num_warps"] == SHAPES[channels][3] // 2 and seen[2]["ROWS"] == 1


def test_views_are_read_where_they_are(monkeypatch):
    """Tokens of a longer sequence, and parts of one tensor of rows; other layouts are copied first."""
    seen = []
    monkeypatch.setattr(kernels, "launch", lambda kernel, grid, **given: seen.append(given | {"grid": grid}))
    x, y = tensor((2, 9, 8))[:, 2:7], tensor((2, 5, 8))
    scale, shift = tensor((2, 48)).chunk(6, 1)[3:5]
    with fastdiff.backend("triton"):
        ops.add_layer_norm(x, y, scale=scale, shift=shift)
        ops.layer_norm(y)
        ops.layer_norm(x.transpose(1, 2).contiguous().transpose(1, 2), scale=scale.clone())
    given = seen[0]
    assert [given[f"{n}_ptr"].data_ptr() for n in ("x", "y", "scale")] == [t.data_ptr() for t in (x, y, scale)]
    assert (given["x_sample"], given["x_token"], given["y_sample"], given["scale_stride"]) == (72, 8, 40, 48)
    assert given["grid"] == (1, 2, 1) and seen[1]["grid"] == (1, 1, 1) and seen[1]["tokens"] == 10
    assert seen[2]["x_ptr"].is_contiguous() and seen[2]["x_token"] == 8


@pytest.mark.skipif(DEVICE.type != "cpu", reason="memory that is never written costs nothing on a CPU alone")
@pytest.mark.parametrize(("shape", "stride"), [((3, 1, 64), (2**30, 64, 1)), ((1, 3, 64), (0, 2**30, 1))])
def test_rows_lie_further_apart_than_32_bits_count(shape, stride):
    x = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided(shape, stride)
    x.copy_(tensor(shape))
    with fastdiff.backend("triton"):
        got = ops.layer_norm(x, shift=x[:, 0])
        assert_same_bits(got, ops.layer_norm(x.contiguous(), shift=x[:, 0]))


def test_rows_that_share_memory():
    x, row = tensor((2, 3, 1, 8)).expand(2, 3, 4, 8), tensor((2, 8))
    with fastdiff.backend("triton"):
        for view in (x, x[:, :1], x[0, 0]):
            assert_same_bits(ops.layer_norm(view), ops.layer_norm(view.contiguous()))
        assert_same_bits(ops.layer_norm(x, shift=row), ops.layer_norm(x.contiguous(), shift=row))


def test_samples_do_not_depend_on_their_batch():
    x, y, rows = tensor((3, 7, 96), torch.bfloat16), tensor((3, 7, 96)), tensor((3, 288), salt=1)
    with fastdiff.backend("triton"):
        whole = ops.add_layer_norm(x, y, **dict(zip(ROWS, rows.chunk(3, 1), strict=True)))
        one = ops.add_layer_norm(x[1:2], y[1:2], **dict(zip(ROWS, rows[1:2].chunk(3, 1), strict=True)))
    for a, b in zip(one, whole, strict=True):
        assert_same_bits(a, b[1:2])


@every
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (2, 0, 3)])
def test_no_element_gives_none(backend, shape):
    x = torch.zeros(shape)
    with fastdiff.backend(backend):
        for got in (ops.layer_norm(x, x.new_ones(shape[-1:])), *ops.add_layer_norm(x, x)):
            assert got.shape == shape


def test_the_reference_has_the_gradient(monkeypatch):
    """If one is wanted of any operand, the kernel stays out; so it does for longer rows and other types."""
    x = tensor((1, 2, 3)).double()
    rows = [tensor((1, 3), salt=i).double().requires_grad_() for i in range(5)]
    call = lambda x, *r: ops.add_layer_norm(x, x, r[0][0], r[1][0], EPS, gate=r[2], scale=r[3], shift=r[4])  # noqa: E731
    assert torch.autograd.gradcheck(call, (x.requires_grad_(), *rows), fast_mode=True)
    with fastdiff.backend("triton"):
        wide = tensor((2, 3)).requires_grad_()
        assert not is_fused(wide) and not is_fused(wide.detach(), None, wide) and is_fused(wide.detach())
        with torch.no_grad():
            assert is_fused(wide) and not is_fused(wide.double())
        assert not is_fused(torch.empty(1, LARGEST + 1)) and is_fused(torch.empty(1, LARGEST))
        assert ops.layer_norm(wide).requires_grad


X, W = torch.zeros(2, 5, 3), torch.ones(3)
REFUSED = [
    ({"x": X.int()}, TypeError, "x: expected one of float32, bfloat16, float16, float64, got torch.int32"),
    ({"y": X[:, :1]}, ValueError, "y: expected shape (2, 5, 3), got (2, 1, 3)"),
    ({"weight": X[0]}, ValueError, "weight: expected shape (3,), got (5, 3)"),
    ({"weight": None}, ValueError, "bias: expected None without weight"),
    ({"bias": W.to("meta")}, ValueError, "bias: expected device cpu, got meta"),
    ({"eps": -1.0}, ValueError, "eps: expected a number of at least 0, got -1.0"),
    ({"eps": "1"}, TypeError, "eps: expected a number, got str"),
    ({"gate": X}, ValueError, "gate: expected shape (2, 3), got (2, 5, 3)"),
    ({"scale": X[:1, 0]}, ValueError, "scale: expected shape (2, 3), got (1, 3)"),
    ({"shift": 1.0}, TypeError, "shift: expected a tensor, got float"),
    ({"x": W, "y": W, "shift": W}, ValueError, "x: expected shape (B, ..., C) where shift is given, got (3,)"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED)
def test_what_cannot_be_right_is_refused(arguments, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        ops.add_layer_norm(**({"x": X, "y": X, "weight": W, "bias": W} | arguments))


@pytest.mark.slow
def test_opcheck():
    x, y, rows = (
        tensor(shape, torch.bfloat16, salt=i).cpu() for i, shape in enumerate([(2, 3, 4), (2, 3, 4), (2, 12)])
    )
    gate, scale, shift = rows.chunk(3, 1)
    torch.library.opcheck(torch.ops.fastdiff.layer_norm.default, (x, x[0, 0], x[0, 1], EPS, scale, None))
    torch.library.opcheck(torch.ops.fastdiff.add_layer_norm.default, (x, y, None, None, EPS, gate, scale, shift))
