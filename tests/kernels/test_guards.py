"""Kernels write every element of their outputs, none beside them, and read none beside their inputs.

Outputs start as NaN between guard zones, inputs lie between NaN, and what PyTorch allocates meanwhile is NaN too.
"""

import math
from unittest import mock

import pytest
import torch
from fastdiff.kernels.launch import grid_of
from fastdiff.kernels.layout import channels_of, lay_out
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import BACKENDS, DEVICE, DTYPES, LAYOUTS, dtypes, index, laid, layouts, shapes, table, tensor
from torch import Tensor

from fastdiff import rows
from fastdiff.kernels import cpu_compiled, group_norm, update
from fastdiff.ops import dispatch as _backend
from fastdiff.ops.checks import as_seed

SENTINEL = 768.0
ROWS = 6
every = pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
guards = st.sampled_from([64, 67])  # with and without the alignment of an allocation
sizes = [(1, 1), (2, 255), (2, 3, 3, 5), (3, 256), (1, 257), (1, 2048), (2, 3, 4, 6), (1, 2049), (1, 4097), (3,)]


@pytest.fixture(autouse=True)
def poisoned_allocations():
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


class Guarded:
    """A tensor in the middle of a larger buffer, which also fills the gaps of its layout."""

    def __init__(self, shape, dtype, layout, guard, fill=SENTINEL, values=None):
        pattern = laid(torch.empty(shape), layout)
        size = pattern.untyped_storage().nbytes() // 4
        self.buffer = torch.full((size + 2 * guard,), fill, dtype=dtype, device=DEVICE)
        place = shape, pattern.stride(), guard + pattern.storage_offset()
        self.tensor = self.buffer.as_strided(*place)
        self.tensor.copy_(torch.full(shape, math.nan) if values is None else values)
        owned = torch.zeros(len(self.buffer), dtype=torch.bool, device=DEVICE)
        owned.as_strided(*place).fill_(True)
        self.outside = ~owned

    def check(self):
        assert not bool(self.tensor.isnan().any()), "an element was not written, or came from outside"
        assert bool((self.buffer[self.outside] == SENTINEL).all()), "something beside the tensor was written"


def source(shape, dtype, layout, guard, salt) -> Tensor:
    return Guarded(shape, dtype, layout, guard, math.nan, tensor(shape, dtype, salt=salt)).tensor


def at_all_sizes(test):
    """The sizes around a block, in every type and layout by turns, beside what is drawn."""
    for i, shape in enumerate(sizes):
        layout = "contiguous" if len(shape) < 3 else LAYOUTS[i % 6]
        test = example(shape, DTYPES[i % 3], layout, (64, 67)[i % 2], i % 4 != 0)(test)
    return test


shaped = given(shape=shapes(), dtype=dtypes, layout=layouts, guard=guards, generated=st.booleans())


@pytest.mark.slow
@every
@at_all_sizes
@shaped
def test_normal(backend, shape, dtype, layout, guard, generated):
    out = Guarded(shape, dtype, layout, guard)
    step = index(ROWS, shape[0], True, 1)
    _backend.launchers(backend).normal_(out.tensor, as_seed(1, DEVICE), None, step, 1)
    out.check()


@pytest.mark.slow
@every
@at_all_sizes
@shaped
def test_noising(backend, shape, dtype, layout, guard, generated):
    out = Guarded(shape, dtype, layout, guard)
    x0, noise = (source(shape, dtype, layout, guard, i) for i in range(2))
    t, drawn = index(ROWS, shape[0], True, 1), (as_seed(1, DEVICE), None, None) if generated else (None, None, noise)
    _backend.launchers(backend).noising(out.tensor, x0, t, table(ROWS, 2, 0), *drawn, 1)
    out.check()


@pytest.mark.slow
@every
@at_all_sizes
@shaped
def test_loss(backend, shape, dtype, layout, guard, generated):
    pred, x0, noise = (source(shape, dtype, layout, guard, i) for i in range(3))
    t, drawn = index(ROWS, shape[0], True, 1), (as_seed(1, DEVICE), None, None) if generated else (None, None, noise)
    grad = Guarded(shape, dtype, layout, guard)
    out = Guarded((shape[0] if guard == 64 else 1,), torch.float32, "contiguous", guard)
    _backend.launchers(backend).loss(
        out.tensor, grad.tensor, pred, x0, t, table(ROWS, 3, 0), *drawn, None, 1, "huber", 1.0, 0.01, 0.01
    )  # fmt: skip
    grad.check()
    out.check()


@every
@at_all_sizes
@shaped
def test_scale(backend, shape, dtype, layout, guard, generated):
    layout = layout if layout in ("channels_last", "swapped") else "contiguous"
    grad = Guarded(shape, dtype, layout, guard, values=tensor(shape, dtype))
    before = grad.tensor.clone()
    by = torch.tensor([-2.0, 1.0, 4.0, 0.5, 8.0], device=DEVICE)[: shape[0] if generated else 1]
    _backend.launchers(backend).scale_(grad.tensor, by, 0.5)
    grad.check()
    assert torch.equal(grad.tensor, before * (by / 2).to(dtype).reshape(-1, *[1] * (len(shape) - 1)))


@pytest.mark.slow
@every
@at_all_sizes
@shaped
def test_update(backend, shape, dtype, layout, guard, generated):
    x, pred, uncond, raw, noise = (source(shape, dtype, layout, guard, i) for i in range(5))
    step, drawn = index(ROWS, shape[0], True, 1), (as_seed(1, DEVICE), None) if generated else (None, None)
    inplace = guard == 64
    out = Guarded(shape, dtype, layout, guard, values=x if inplace else None)
    hist = Guarded(shape, dtype, layout, guard, values=tensor(shape, dtype, salt=6))
    _backend.launchers(backend).update(
        out.tensor, out.tensor if inplace else x, pred, table(ROWS, 9, 0), step, *drawn,
        uncond, raw, None if generated else noise, hist.tensor, 1.0, "x0hat" if inplace else "x", 2,
    )  # fmt: skip
    out.check()
    hist.check()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["triton"])  # the only one with a kernel of it
@at_all_sizes
@shaped
def test_vlb(backend, shape, dtype, layout, guard, generated):
    """Terms and decoders by turns; `generated` takes the gradient by the variance too."""
    pred, raw, x_t, x0 = (source(shape, dtype, layout, guard, i) for i in range(4))
    grads = [Guarded(shape, dtype, layout, guard) for _ in range(2)]
    out = Guarded((shape[0] if guard == 64 else 1,), torch.float32, "contiguous", guard)
    rows = table(ROWS, 6, 0)
    rows[:, 5] = torch.arange(ROWS) % 2
    t = index(ROWS, shape[0], True, 1)
    stored = [grads[0].tensor, grads[1].tensor if generated else None]
    _backend.launchers(backend).vlb(out.tensor, *stored, pred, raw, x_t, x0, t, rows, 1.0, 0.01)
    out.check()
    for grad in grads[: 1 + generated]:
        grad.check()


# A program holds 16 or 64 elements: the groups below in several parts, with chunks of their channels, or in one.
TINY = group_norm.Limits(warp=1, forward=1, backward=1, held=16, few=16, enough=4, rows=1, line=16, sector=4, blocks=2)
normed = given(
    shape=st.sampled_from([(2, 6), (1, 6, 5), (2, 6, 5, 3), (1, 12, 4, 7)]), dtype=dtypes, layout=layouts, guard=guards,
    scaled=st.booleans(), added=st.sampled_from([None, 1, 2]), held=st.sampled_from([4, 16, 64]),
    first=st.sampled_from([0, 1, 4]),
)  # fmt: skip


def norm_operands(shape, dtype, layout, guard, scaled, added, first):
    """The operands of the norm and their number of groups; `added` is the rank of add, or None. first: channels of x if
    the others are skip, or 0."""
    weight, bias = (source(shape[1:2], dtype, layout, guard, i) for i in (1, 2))
    scale, shift = (source(shape[:2], dtype, layout, guard, i) for i in (3, 4)) if scaled else (None, None)
    add = None if added is None else source(shape[2 - added : 2], dtype, layout, guard, 5)
    x = source((shape[0], first or shape[1], *shape[2:]), dtype, layout, guard, 0)
    skip = source((shape[0], shape[1] - first, *shape[2:]), dtype, layout, guard, 9) if first else None
    rows = {"weight": weight, "bias": bias, "scale": scale, "shift": shift, "add": add}
    return {"x": x, "skip": skip, "groups": 3, "silu": True} | rows


@pytest.mark.slow
@normed
def test_norm(shape, dtype, layout, guard, scaled, added, held, first):
    out = Guarded(shape, dtype, layout, guard)
    mean, rstd = (Guarded((shape[0], 3), torch.float32, "contiguous", guard) for _ in range(2))
    operands = norm_operands(shape, dtype, layout, guard, scaled, added, first)
    with mock.patch.object(group_norm, "LIMITS", TINY._replace(held=held)):
        group_norm.norm(out=out.tensor, mean=mean.tensor, rstd=rstd.tensor, **operands, eps=1e-5)
    for written in (out, mean, rstd):
        written.check()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy's exp: the statistics are not x's
@normed
def test_norm_gradient(shape, dtype, layout, guard, scaled, added, held, first):
    operands = norm_operands(shape, dtype, layout, guard, scaled, added, first)
    grad = source(shape, dtype, layout, guard, 6)
    by_x = Guarded(operands["x"].shape, dtype, layout, guard)
    by_skip = Guarded(operands["skip"].shape, dtype, layout, guard) if first else None
    mean, rstd = (source((shape[0], 3), torch.float32, "contiguous", guard, i) for i in (7, 8))
    by = {
        f"{name}_grad": None if operands[name] is None else Guarded(operands[name].shape, dtype, "contiguous", guard)
        for name in ("weight", "bias", "scale", "shift", "add")
    }
    by["skip_grad"] = by_skip
    tensors = {name: None if guarded is None else guarded.tensor for name, guarded in by.items()}
    with mock.patch.object(group_norm, "LIMITS", TINY._replace(held=held)):
        group_norm.norm_grad(x_grad=by_x.tensor, **tensors, grad=grad, mean=mean, rstd=rstd, **operands)
    for written in (by_x, *by.values()):
        if written is not None:
            written.check()


# --- rows, layouts and grids ------------------------------------------------------------------------------------------


def test_the_kernels_read_the_columns_that_rows_names():
    letters = (getattr(update, c) for c in "ABCDEFGH")
    assert [c.value for c in letters] == list(range(8)) and update.W.value == 8 and update.WIDTH.value == rows.WIDTH
    order = (
        "x0_from_x", "x0_from_pred", "from_x0", "from_x", "from_pred", "noise", "from_hist", "noise_high", "guidance",
    )  # fmt: skip
    assert rows.Row._fields == order
    assert [getattr(cpu_compiled, name.upper()) for name in (*order, "width")] == list(range(10))
    more = [getattr(update, name).value for name in ("G2", "G3", "S", "P", "Q")]
    assert more == [getattr(cpu_compiled, name.upper()) for name in rows.History._fields] == list(range(9, 14))
    assert rows.History._fields == ("from_hist2", "from_hist3", "slot", "kept_from_x0", "kept_from_x")
    assert cpu_compiled.WIDE == rows.WIDE == 14


@pytest.mark.parametrize(
    ("shape", "layout", "drawn", "given"),
    [
        ((2, 3, 4, 6), "contiguous", 1, 1),
        ((2, 3, 4, 6), "channels_last", 3, 1),
        ((2, 3, 3, 5), "channels_last", None, 1),
        ((2, 3, 2, 2, 2), "channels_last", 3, 1),
        ((2, 3, 4, 8), "swapped", None, 1),
        ((2, 8, 6), "swapped", None, 1),
        ((2, 6, 8), "swapped", 6, 1),
        ((2, 3, 4, 6), "batch_last", None, None),
        ((2, 3, 4, 6), "strided", None, None),
        ((2, 3, 4, 6), "half", None, None),
        ((5,), "contiguous", 1, 1),
        ((5,), "strided", None, None),
    ],
)
def test_dense_layouts_are_worked_on_where_they_lie(shape, layout, drawn, given):
    """CHANNELS of the walk, for generated and for given noise; None where a copy is needed."""
    x, same, plain = tensor(shape, layout=layout), tensor(shape, layout=layout, salt=1), tensor(shape, salt=2)
    for generated, channels in ((True, drawn), (False, given)):
        walked, (first, second, third, absent) = lay_out(x, same, plain, None, generated=generated)
        assert absent is None and walked == (channels or 1)
        assert (first is x) == (second is same) == (channels is not None)
        assert (third is plain) == (channels is None or layout == "contiguous")
        assert first.stride() == second.stride() == third.stride()
        for got, want in ((first, x), (second, same), (third, plain)):
            assert torch.equal(got, want)


def test_channels_do_not_depend_on_the_stride_between_samples():
    for layout, channels in (("contiguous", 1), ("channels_last", 3), ("swapped", 0)):
        assert channels_of(tensor((4, 3, 5, 6), layout=layout)[::2]) == channels


@given(batch=st.integers(1, 200_000), n=st.integers(1, 2**40), block=st.sampled_from([256, 512, 1024, 2048, 4096]))
def test_grid_holds_every_block_within_the_limits(batch, n, block):
    """CUDA programming guide, technical specifications: 2^31 - 1 programs on axis 0, 65,535 on axes 1 and 2."""
    blocks, low, high = grid_of(batch, n, block)
    assert (blocks - 1) * block < n <= blocks * block
    assert low <= 65535 and high <= 65535
    assert low * (high - 1) < batch <= low * high
    assert high == 1 or low == 32768  # the factor of `owner`
