"""Forward noising, loss and reverse update, by the kernels and by plain PyTorch, against the float64 oracle."""

import math

import pytest
import torch
from fastdiff.kernels.launch import on_nvidia
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import BACKENDS, DEVICE, DTYPES, dtypes, index, layouts, salts, sample_ids, seeds, shapes, table, tensor
from tolerance import ARITHMETIC, SMALLEST, SUMMATION, assert_close, assert_same_bits, normals, rounding
from torch import Tensor
from update_errors import columns, update_errors

import fastdiff
from fastdiff import ops, reference
from fastdiff.ops import dispatch as _backend
from fastdiff.ops.checks import as_seed
from fastdiff.ops.stored import stored_scale
from fastdiff.rows import Row

# NumPy, in the interpreter, on what NaN and infinity go through.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
ROWS = 6
every = pytest.mark.parametrize("backend", BACKENDS)
Noise = tuple[dict[str, Tensor | None], Tensor | None, Tensor | float]


def draw_noise(
    source: str, like: Tensor, dtype: torch.dtype, layout: str, step: Tensor, stream: int, **options
) -> Noise:
    """(seed, sample_ids and noise to call an op with; z in float64; its error). source "none" leaves all out."""
    seed, salt, extreme, backend = (options[k] for k in ("seed", "salt", "extreme", "backend"))
    if source == "none":
        return {"seed": None, "sample_ids": None, "noise": None}, None, 0.0
    if source == "given":
        noise = tensor(like.shape, dtype, layout, salt + 3, extreme)
        return {"seed": None, "sample_ids": None, "noise": noise}, noise.double(), 0.0
    ids = sample_ids(len(like), salt) if source == "ids" else None
    key = as_seed(seed, DEVICE)
    z, error = normals(like.shape, key, ids, step, stream, fast=backend == "triton" and on_nvidia(like))
    return {"seed": key, "sample_ids": ids, "noise": None}, z, error


# --- forward noising --------------------------------------------------------------------------------------------


@pytest.mark.slow
@every
@given(
    shape=shapes(),
    dtype=st.tuples(dtypes, dtypes),
    layout=st.tuples(layouts, layouts),
    source=st.sampled_from(["seed", "ids", "given"]),
    per_sample=st.booleans(),
    extreme=st.booleans(),
    seed=seeds,
    salt=salts,
)
@example((2, 3, 4, 6), (torch.float16,) * 2, ("channels_last",) * 2, "ids", True, False, 1, 1)
@example((2, 3, 3, 5), (torch.bfloat16,) * 2, ("channels_last",) * 2, "seed", True, False, 2, 2)
@example((2, 3, 3, 5), (torch.float32,) * 2, ("channels_last",) * 2, "given", True, True, 3, 3)
@example((3, 2049), (torch.bfloat16, torch.float32), ("contiguous",) * 2, "seed", True, False, -4, 4)
@example((1, 4099), (torch.float16, torch.float32), ("contiguous",) * 2, "given", True, False, 5, 5)
def test_noising(backend, shape, dtype, layout, source, per_sample, extreme, seed, salt):
    x0 = tensor(shape, dtype[0], layout[0], salt, extreme)
    rows, t = table(ROWS, 2, salt), index(ROWS, shape[0], per_sample, salt)
    options = {"seed": seed, "salt": salt, "extreme": extreme, "backend": backend}
    drawn, z, z_error = draw_noise(source, x0, dtype[1], layout[1], t, ops.FORWARD, **options)
    with fastdiff.backend(backend):
        out = ops.noising(x0, t, rows, **drawn)
    assert out.dtype == x0.dtype and out.stride() == torch.empty_like(x0).stride()
    want = reference.noising(x0.double(), t, rows.double(), None, None, z, ops.FORWARD)
    alpha, sigma = columns(rows, t, x0)
    assert_close(
        out, want, ARITHMETIC * ((alpha * x0).abs() + (sigma * z).abs()) + sigma.abs() * z_error, backend=backend
    )


# --- loss -------------------------------------------------------------------------------------------------------


def residual(
    pred: Tensor, x0: Tensor | None, z: Tensor | None, z_error, rows: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """(r = pred - p x_0 - q z, how far float32 may be from it)."""
    p, q, _ = columns(rows, t, pred)
    r, size = pred.double(), pred.double().abs()
    for factor, term in ((p, x0), (q, z)):
        if term is not None:
            r, size = r - factor * term, size + (factor * term).abs()
    return r, ARITHMETIC * size + (q.abs() * z_error if z is not None else 0.0)


def loss_errors(kind: str, delta: float, r: Tensor, r_error: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """How far w rho(r) and w rho'(r) may be off, of each element."""
    if kind == "mse":
        value, slope = 2 * r.abs() * r_error + r_error**2 + ARITHMETIC * r**2, 2 * r_error + ARITHMETIC * r.abs()
    elif kind == "l1":
        value, slope = r_error + ARITHMETIC * r.abs(), 2.0 * (r.abs() <= r_error)
    else:
        value = delta * r_error + r_error**2 + ARITHMETIC * delta * (r.abs() + delta)
        slope = r_error + ARITHMETIC * delta
    return w.abs() * value, w.abs() * slope


def stored(slope: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    """A float16 gradient is kept times a power of two up to `count`, and is infinite where that overflows."""
    factor = stored_scale(dtype, count) / count
    return torch.where((slope * factor).abs() > torch.finfo(dtype).max, slope * math.inf, slope)


@pytest.mark.slow
@every
@given(
    shape=shapes(),
    dtype=st.tuples(dtypes, dtypes, dtypes),
    layout=st.tuples(layouts, layouts, layouts),
    source=st.sampled_from(["seed", "ids", "given", "none"]),
    with_x0=st.booleans(),
    kind=st.sampled_from(ops.LOSSES),
    delta=st.sampled_from([0.1, 1.0, 3.5]),
    reduction=st.sampled_from(["mean", "none"]),
    per_sample=st.booleans(),
    extreme=st.booleans(),
    seed=seeds,
    salt=salts,
)
@example((2, 3, 4, 6), (torch.float16,) * 3, ("channels_last",) * 3, "ids", True, "mse", 1.0, "none", True, False, 1, 1)
@example(
    (2, 3, 3, 5), (torch.bfloat16,) * 3, ("channels_last",) * 3, "seed", True, "l1", 1.0, "mean", True, False, 2, 2
)
@example((2, 3, 3, 5), (torch.float32,) * 3, ("half",) * 3, "given", True, "huber", 0.1, "none", True, True, 3, 3)
@example((3, 2049), (torch.bfloat16,) * 3, ("contiguous",) * 3, "seed", False, "huber", 1.0, "none", True, False, 4, 4)
@example((2, 40), (torch.float32,) * 3, ("contiguous",) * 3, "none", True, "l1", 1.0, "none", True, True, 5, 5)
def test_loss(
    backend, shape, dtype, layout, source, with_x0, kind, delta, reduction, per_sample, extreme, seed, salt
):  # fmt: skip
    pred = tensor(shape, dtype[0], layout[0], salt, extreme).requires_grad_()
    x0 = tensor(shape, dtype[1], layout[1], salt + 9, extreme) if with_x0 else None
    rows, t = table(ROWS, 3, salt), index(ROWS, shape[0], per_sample, salt)
    options = {"seed": seed, "salt": salt, "extreme": extreme, "backend": backend}
    drawn, z, z_error = draw_noise(source, pred, dtype[2], layout[2], t, ops.FORWARD, **options)
    with fastdiff.backend(backend):
        value = ops.loss(pred, t, rows, x0=x0, kind=kind, delta=delta, reduction=reduction, **drawn)
        with torch.no_grad():
            alone = ops.loss(pred, t, rows, x0=x0, kind=kind, delta=delta, reduction=reduction, **drawn)
        value.sum().backward()
    assert value.dtype == torch.float32
    assert_same_bits(alone, value)

    double = None if x0 is None else x0.double()
    want, slope = reference.loss(
        pred.detach().double(), double, t, rows.double(), None, None, z, ops.FORWARD, kind, delta
    )
    r, r_error = residual(pred.detach(), double, z, z_error, rows, t)
    value_error, slope_error = loss_errors(kind, delta, r, r_error, columns(rows, t, pred)[2])
    value_error = value_error + SUMMATION * want.abs()
    count = want.numel() if reduction == "mean" else want.numel() // len(want)
    want, value_error = (
        i.mean() if reduction == "mean" else i.reshape(len(i), -1).mean(1) for i in (want, value_error)
    )
    assert_close(value.detach(), want, value_error)
    assert_close(pred.grad, stored(slope, pred.dtype, count) / count, slope_error / count, 2, backend)


# --- reverse update ---------------------------------------------------------------------------------------------


SAME = ("contiguous",) * 6
LAST = ("channels_last",) * 6
HALVES = ("contiguous", "half", "half", "half", "contiguous", "contiguous")
SINGLE, BRAIN, HALF = ((d,) * 5 for d in (torch.float32, torch.bfloat16, torch.float16))


@pytest.mark.slow
@every
@given(
    shape=shapes(),
    dtype=st.tuples(dtypes, dtypes, dtypes, dtypes, dtypes),
    layout=st.sampled_from([SAME, LAST, HALVES]) | st.tuples(*[layouts] * 6),
    source=st.sampled_from(["seed", "ids", "given", "none"]),
    guided=st.booleans(),
    learned=st.booleans(),
    keep=st.sampled_from(["none", "x0hat", "x"]),  # "mix" is in test_history
    clip=st.sampled_from([None, 0.5, 1.0, 100.0]),
    inplace=st.booleans(),
    per_sample=st.booleans(),
    extreme=st.booleans(),
    seed=seeds,
    salt=salts,
)
@example((2, 3, 4, 6), HALF, LAST, "ids", True, True, "x0hat", 1.0, True, True, False, 1, 1)
@example((2, 3, 3, 5), BRAIN, LAST, "seed", True, False, "x", 0.5, True, True, False, 2, 2)
@example((2, 2, 3, 5), SINGLE, HALVES, "given", True, True, "x", None, False, True, True, 3, 3)
@example((2, 4, 600), SINGLE, HALVES, "seed", False, True, "x0hat", 1.0, True, False, False, 4, 4)
@example((3, 7, 2), BRAIN, ("swapped",) * 6, "none", True, False, "x0hat", 1.0, True, False, True, 5, 5)
def test_update(
    backend, shape, dtype, layout, source, guided, learned, keep, clip, inplace, per_sample, extreme, seed, salt
):  # fmt: skip
    x, pred, uncond, raw, hist = (
        tensor(shape, dtype[0 if i == 4 else i], layout[i], salt + 10 * i, extreme) for i in range(5)
    )
    rows, step = table(ROWS, 9, salt), index(ROWS, shape[0], per_sample, salt)
    options = {"seed": seed, "salt": salt, "extreme": extreme, "backend": backend}
    drawn, z, z_error = draw_noise(source, x, dtype[4], layout[5], step, ops.REVERSE, **options)
    uncond = uncond if guided else None
    raw = raw if learned else None
    hist = None if keep == "none" else hist
    exact = [None if i is None else i.double() for i in (x, pred, uncond, raw, hist)]
    before = [i.clone() for i in (x, pred)]
    with fastdiff.backend(backend):
        out = ops.update(
            x, pred, rows, step, uncond=uncond, raw_variance=raw, hist=hist, clip=clip, keep=keep,
            noisy=source != "none", inplace=inplace, **drawn,
        )  # fmt: skip
    assert out is x if inplace else (out.dtype == x.dtype and out.stride() == torch.empty_like(x).stride())
    if not inplace:
        assert_same_bits(x, before[0])
    assert_same_bits(pred, before[1])

    state, pred, uncond, raw, past = exact
    want, kept = reference.update(
        state, pred, rows.double(), step, None, None, uncond, raw, z, past, clip, keep, ops.REVERSE
    )
    error, x0_error = update_errors(state, pred, rows, step, z, z_error, uncond, raw, past, clip)
    # What becomes of an infinite operand depends on the grouping of the terms, but it is nothing finite.
    operands = [i.expand_as(want) for i in (state, pred, uncond, raw, z, past) if i is not None]
    infinite = torch.stack(operands).isinf().any(0) & ~torch.stack(operands).isnan().any(0) & ~want.isfinite()
    assert not bool((infinite & out.isfinite()).any())
    if raw is not None and z is not None:  # 0 times a standard deviation beyond float32 is NaN, but 0 in float64
        row = Row(*reference.coefficients(rows.double(), step, state))
        std = torch.exp(row.noise + (raw + 1) / 2 * (row.noise_high - row.noise))
        infinite |= std.float().isinf() & (z == 0)
    assert_close(torch.where(infinite, math.nan, out), torch.where(infinite, math.nan, want), error, backend=backend)
    if hist is not None:
        assert_close(hist, kept, x0_error if keep == "x0hat" else 0.0, backend=backend)


@every
def test_clip_keeps_nan_and_bounds_infinity(backend):
    """x0hat = pred, read from hist: in x' itself 0 inf is NaN."""
    pred = torch.tensor([[math.nan, math.inf, -math.inf, 3.0, -3.0, 0.5]], device=DEVICE)
    row = torch.tensor([[0.0, 1, 1, 0, 0, 0, 0, 0, 0]], device=DEVICE)
    hist = torch.zeros_like(pred)
    with fastdiff.backend(backend):
        ops.update(torch.zeros_like(pred), pred, row, 0, hist=hist, keep="x0hat", clip=1.0, noisy=False)
    assert math.isnan(hist[0, 0]) and hist[0, 1:].tolist() == [1.0, -1.0, 1.0, -1.0, 0.5]


# --- an index outside the table ---------------------------------------------------------------------------------

OUTSIDE = (-1, 2, ROWS, 0, 2**31, -(2**31), ROWS - 1, 2**32 + 1, -(2**63), 2**63 - 1)


def nan_samples(x: Tensor) -> list[bool]:
    """Which samples are NaN throughout; none may be NaN in part."""
    nan = x.isnan().flatten(1) if x.ndim > 1 else x.isnan()[:, None]
    assert torch.equal(nan.all(1), nan.any(1))
    return nan.all(1).tolist()


@pytest.mark.slow
@every
def test_an_index_outside_the_table_gives_nan_in_its_sample(backend):
    """On a GPU it cannot be refused without waiting for the device, so the implementations are called as such."""
    index = torch.tensor(OUTSIDE, device=DEVICE)
    outside = [not 0 <= i < ROWS for i in OUTSIDE]
    x, pred, hist = (tensor((len(OUTSIDE), 5), salt=i) for i in range(3))
    seed, rows = as_seed(1, DEVICE), [table(ROWS, n, n) for n in (2, 3, 9)]
    if backend != "reference":
        out, grad, value = torch.empty_like(x), torch.empty_like(x), torch.empty(len(x), device=DEVICE)
        kernels = _backend.launchers(backend)
        kernels.noising(out, x, index, rows[0], seed, None, None, 1)
        assert nan_samples(out) == outside
        kernels.loss(value, grad, pred, x, index, rows[1], seed, None, None, None, 1, "mse", 1.0, 1.0, 1.0)
        assert nan_samples(value) == nan_samples(grad) == outside
        kernels.update(
            out, x, pred, rows[2], index, seed, None, None, None, None, hist, 1.0, "x0hat", 2
        )  # fmt: skip
    else:
        assert nan_samples(reference.noising(x, index, rows[0], seed, None, None, 1)) == outside
        for result in reference.loss(pred, x, index, rows[1], seed, None, None, 1, "mse", 1.0):
            assert nan_samples(result) == outside
        out, hist = reference.update(
            x, pred, rows[2], index, seed, None, None, None, None, hist, 1.0, "x0hat", 2
        )  # fmt: skip
    assert nan_samples(out) == nan_samples(hist) == outside


# --- gradients --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@every
@given(shape=shapes(), dtype=st.tuples(dtypes, dtypes), layout=st.tuples(layouts, layouts), seed=seeds, salt=salts)
def test_gradients_of_noising(backend, shape, dtype, layout, seed, salt):
    x0, noise = (tensor(shape, dtype[i], layout[i], salt + i).requires_grad_() for i in range(2))
    rows, t = table(ROWS, 2, salt), index(ROWS, shape[0], True, salt)
    incoming = tensor(shape, dtype[0], layout[1], salt + 2)
    with fastdiff.backend(backend):
        ops.noising(x0, t, rows, noise=noise).backward(incoming)
        drawn = torch.autograd.grad(ops.noising(x0, t, rows, seed=seed), x0, incoming)[0]
    exact = [i.detach().double().requires_grad_() for i in (x0, noise)]
    reference.noising(exact[0], t, rows.double(), None, None, exact[1], ops.FORWARD).backward(incoming.double())
    for got, want in zip((x0, noise), exact, strict=True):
        assert got.grad.dtype == got.dtype
        assert_close(got.grad, want.grad, ARITHMETIC * want.grad.abs())
    assert_same_bits(drawn, x0.grad)


INCOMING = (1.0, 3.0, 65536.0, -0.001)


@pytest.mark.slow
@every
@given(
    shape=shapes(),
    dtype=st.tuples(dtypes, dtypes, dtypes),
    layout=st.tuples(layouts, layouts, layouts),
    incoming=st.sampled_from([*INCOMING, "per sample"]),
    kind=st.sampled_from(ops.LOSSES),
    salt=salts,
)
@example((2, 3, 4, 6), (torch.float16,) * 3, ("contiguous",) * 3, 65536.0, "mse", 1)
@example((3, 2049), (torch.float16,) * 3, ("contiguous",) * 3, "per sample", "huber", 2)
@example((3, 4, 5), (torch.bfloat16,) * 3, ("batch_last",) * 3, "per sample", "l1", 3)
@example((3, 4, 5), (torch.float16,) * 3, ("batch_last",) * 3, 3.0, "mse", 4)
def test_gradients_of_loss(backend, shape, dtype, layout, incoming, kind, salt):
    pred, x0, noise = inputs = [tensor(shape, dtype[i], layout[i], salt + i).requires_grad_() for i in range(3)]
    rows, t = table(ROWS, 3, salt), index(ROWS, shape[0], True, salt)
    vector = incoming == "per sample"
    by = torch.tensor([INCOMING[i % 4] for i in range(shape[0])] if vector else incoming, device=DEVICE)
    with fastdiff.backend(backend):
        ops.loss(pred, t, rows, x0=x0, noise=noise, kind=kind, reduction="none" if vector else "mean").backward(by)

    exact = [i.detach().double().requires_grad_() for i in inputs]
    value, _ = reference.loss(exact[0], exact[1], t, rows.double(), None, None, exact[2], ops.FORWARD, kind, 1.0)
    count = value.numel() // (shape[0] if vector else 1)
    scale = by.double().reshape(-1, *[1] * (len(shape) - 1)) / count
    (value * scale).sum().backward()

    p, q, w = columns(rows, t, pred)
    r, r_error = residual(*(i.detach() for i in exact), 0.0, rows, t)
    # The stored gradient is rounded, and may be subnormal, before it is scaled.
    stored = loss_errors(kind, 1.0, r, r_error, w)[1] + 2 * SMALLEST[pred.dtype]
    error = stored * scale.abs()
    assert_close(pred.grad, exact[0].grad, error, 2, backend)
    # The others are multiples of that by pred, as it was rounded.
    error = error + 2 * rounding(pred.dtype, backend) * exact[0].grad.abs() + SMALLEST[pred.dtype]
    overflow = torch.where(exact[0].grad.abs() > torch.finfo(pred.dtype).max, math.inf, 1.0)
    for got, want, factor in ((x0.grad, exact[1].grad, p), (noise.grad, exact[2].grad, q)):
        assert_close(got, want * overflow, factor.abs() * error + ARITHMETIC * want.abs())


@every
def test_loss_and_gradient_are_deterministic(backend):
    results = []
    for _ in range(2):
        pred = tensor((3, 700), torch.bfloat16, salt=1).requires_grad_()
        with fastdiff.backend(backend):
            value = ops.loss(pred, 2, table(ROWS, 3, 2), x0=tensor((3, 700), salt=3), seed=5)
            (3 * value).backward()
        results.append((value.detach(), pred.grad))
    for first, second in zip(*results, strict=True):
        assert_same_bits(first, second)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@pytest.mark.parametrize(
    ("dtype", "signalling"), [(torch.float32, 0x7F800001), (torch.float16, 0x7C01), (torch.bfloat16, 0x7F81)]
)
def test_scale_writes_nothing_where_the_product_is_one(backend, dtype, signalling):
    """Arithmetic turns a signalling NaN into a quiet one: its bits stay only where nothing is written."""
    words = torch.int32 if dtype == torch.float32 else torch.int16
    grad = torch.full((3, 300), signalling, dtype=words, device=DEVICE).view(dtype)
    before = grad.clone()
    _backend.launchers(backend).scale_(grad, torch.tensor([8.0, 4.0, 8.0], device=DEVICE), 0.125)
    assert_same_bits(grad[::2], before[::2])
    assert not torch.equal(grad[1].view(words), before[1].view(words))
    grad = tensor((3, 300), dtype)
    before = grad.clone()
    _backend.launchers(backend).scale_(grad, torch.tensor([0.5], device=DEVICE), 4.0)
    assert_same_bits(grad, 2 * before)


# --- compiled kernels only --------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(70000, 3), (64, 3, 128, 128), (5, 3, 255, 257)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_large_tensors(shape, dtype, layout):
    test_noising.hypothesis.inner_test(
        "triton", shape, (dtype, dtype), (layout, layout), "ids", True, False, 1, 1
    )  # fmt: skip
    for kind in ops.LOSSES:
        test_loss.hypothesis.inner_test(
            "triton", shape, (dtype,) * 3, (layout,) * 3, "seed", True, kind, 1.0, "mean", True, False, 1, 1
        )  # fmt: skip
    test_update.hypothesis.inner_test(
        "triton", shape, (dtype,) * 5, (layout,) * 6, "seed", True, True, "x0hat", 1.0, True, True, False, 1, 1
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 2**30), (1, 2**31 + 2**20)])
def test_more_than_2_31_elements(shape):
    """The end of the data equals the same elements of a small tensor, or of the oracle."""
    x0 = torch.zeros(shape, dtype=torch.float16, device=DEVICE)
    x0[-1, -64:] = tensor((64,), torch.float16)
    rows, t, seed = table(ROWS, 2, 0), index(ROWS, shape[0], True, 0), as_seed(3, DEVICE)
    with fastdiff.backend("triton"):
        out = ops.noising(x0, t, rows, seed=seed)[-1:, -64:]
    blocks = torch.arange((shape[1] - 64) // 4, shape[1] // 4, device=DEVICE)
    counter = [c.expand_as(blocks) for c in (blocks, t[:1] * 0 + shape[0] - 1, t[-1:], t[:1] * 0 + ops.FORWARD)]
    bits = torch.stack(reference.philox4x32(counter, (seed, seed * 0)), -1)
    z = reference.box_muller(bits, torch.float64).reshape(1, 64)
    alpha, sigma = columns(rows, t[-1:], x0[-1:, -64:])
    want = alpha * x0[-1:, -64:].double() + sigma * z
    assert_close(out, want, ARITHMETIC * (want.abs() + 20) + sigma.abs() * 1e-3)


@pytest.mark.gpu
def test_cuda_graph():
    """A captured graph takes the step, the seed and the data that its tensors hold when it is replayed."""
    x, pred, rows = tensor((4, 500)), tensor((4, 500), salt=1), table(ROWS, 9, 0)
    step, seed = torch.zeros(1, dtype=torch.int64, device=DEVICE), as_seed(1, DEVICE)
    with fastdiff.backend("triton"):
        ops.update(x, pred, rows, step, seed=seed, clip=1.0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = ops.update(x, pred, rows, step, seed=seed, clip=1.0)
        for i in range(3):
            step.fill_(i)
            seed.fill_(100 + i)
            x.copy_(tensor((4, 500), salt=i))
            graph.replay()
            assert_same_bits(out, ops.update(x, pred, rows, i, seed=100 + i, clip=1.0))


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    x, rows = tensor((4, 500)), [table(ROWS, n, n) for n in (2, 3, 9)]
    t, seed = index(ROWS, 4, True, 0), as_seed(1, DEVICE)
    before = torch.cuda.get_sync_debug_mode()
    for mode in (before, "error"):  # the first round compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            pred = ops.noising(x, t, rows[0], seed=seed).requires_grad_()
            ops.loss(pred, t, rows[1], x0=x, seed=seed).backward()
            ops.loss(pred.detach(), t, rows[1], x0=x)
            ops.update(x, pred.detach(), rows[2], t, clip=1.0, inplace=True)
        finally:
            torch.cuda.set_sync_debug_mode(before)
