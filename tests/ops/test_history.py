"""Updates that remember several tensors: slots of hist that are read together and overwritten one at a time."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import BACKENDS, DEVICE, dtypes, index, layouts, salts, shapes, table, tensor
from tolerance import ARITHMETIC, assert_close, assert_same_bits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from update_errors import update_errors

import fastdiff
from fastdiff import ops, reference
from fastdiff.ops import dispatch
from fastdiff.rows import WIDE, WIDTH, History, columns, history_columns, make_rows

# NumPy, in the interpreter, on what NaN and infinity go through.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
ROWS = 6
every = pytest.mark.parametrize("backend", BACKENDS)


def wide_table(salt: int) -> Tensor:
    """Rows whose slots are those of hist, and others, which keep nothing."""
    rows = table(ROWS, WIDE, salt)
    history_columns(rows).slot.copy_(torch.tensor([0.0, 1, 2, -1, 1, 3]).roll(salt))
    return rows


def past(slots: int, shape: tuple[int, ...], dtype: torch.dtype, layout: str, salt: int) -> Tensor:
    """(slots, B, ...) that lies in memory as a run's does where the layout is dense; else with gaps."""
    return torch.cat([tensor(shape, dtype, layout, salt + i) for i in range(slots)]).view(slots, *shape)


@pytest.mark.slow
@every
@given(
    shape=shapes(),
    dtype=dtypes,
    layout=st.tuples(layouts, layouts),
    slots=st.integers(1, 3),
    keep=st.sampled_from(["x0hat", "x", "mix"]),
    clip=st.sampled_from([None, 0.5]),
    guided=st.booleans(),
    inplace=st.booleans(),
    per_sample=st.booleans(),
    salt=salts,
)
@example((3, 3, 4, 6), torch.float16, ("channels_last",) * 2, 3, "mix", 0.5, True, True, True, 1)
@example((3, 3, 4, 6), torch.bfloat16, ("channels_last", "contiguous"), 2, "x0hat", None, False, False, True, 2)
@example((3, 2049), torch.float32, ("contiguous", "contiguous"), 3, "mix", 0.5, False, True, False, 3)
@example((2, 3, 5), torch.float32, ("contiguous", "contiguous"), 1, "mix", None, True, False, True, 4)
def test_slots(backend, shape, dtype, layout, slots, keep, clip, guided, inplace, per_sample, salt):
    x, pred, uncond = (tensor(shape, dtype, layout[0], salt + 10 * i) for i in range(3))
    hist = past(slots, shape, dtype, layout[1], salt + 40)
    hist = hist[0] if slots == 1 else hist
    rows, step = wide_table(salt), index(ROWS, shape[0], per_sample, salt)
    uncond = uncond if guided else None
    state, at, other, old = (None if i is None else i.double() for i in (x, pred, uncond, hist))
    with fastdiff.backend(backend):
        out = ops.update(
            x, pred, rows, step, uncond=uncond, hist=hist, clip=clip, keep=keep, noisy=False, inplace=inplace
        )
    want, kept = reference.update(
        state, at, rows.double(), step, None, None, other, None, None, old, clip, keep, ops.REVERSE
    )
    error, x0_error = update_errors(state, at, rows[:, :WIDTH], step, None, 0.0, other, None, None, clip)
    numbers = reference.coefficients(rows.double(), step, state)
    shares = [numbers[6], *numbers[WIDTH : WIDTH + 2]]
    for share, slot in zip(shares, old[None] if slots == 1 else old, strict=False):
        error = error + ARITHMETIC * (share * slot).abs()
    p, q = (numbers[WIDTH + History._fields.index(name)] for name in ("kept_from_x0", "kept_from_x"))
    x0 = numbers[0] * state + numbers[1] * (at if other is None else other + numbers[8] * (at - other))
    mixed = p.abs() * x0_error + ARITHMETIC * ((p * x0).abs() + (q * state).abs())
    assert_close(out, want, error, backend=backend)
    assert_close(hist, kept, {"x0hat": x0_error, "x": 0.0, "mix": mixed}[keep], backend=backend)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_mix_is_a_second_output(backend, dtype):
    """hist is not read, and may have another type."""
    x, pred = tensor((3, 2049), dtype), tensor((3, 2049), dtype, salt=1)
    rows, step = wide_table(2), torch.tensor([1, 3, 4], device=DEVICE)
    before, hist = torch.zeros_like(x), torch.full_like(x, torch.nan, dtype=torch.float32)
    with fastdiff.backend(backend):
        want = ops.update(x, pred, rows, step, hist=before, keep="mix", clip=0.5, noisy=False)
        out = ops.update(x, pred, rows, step, hist=hist, keep="new mix", clip=0.5, noisy=False, out=torch.empty_like(x))
    assert_same_bits(out, want)
    if dtype == torch.float32:
        assert_same_bits(hist, before)
    else:  # before is rounded
        torch.testing.assert_close(hist, before.float(), rtol=2**-7, atol=1e-30)
        assert not torch.equal(hist, before.float())


@every
@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_new_x0hat_leaves_the_step_as_it_is(backend, clip):
    """hist is not read, and the new state has the bits of a step that keeps nothing."""
    x, pred, uncond = (tensor((3, 2049), salt=i) for i in range(3))
    rows, before, hist = table(2, WIDTH, 0), torch.zeros_like(x), torch.full_like(x, torch.nan)
    given = {"uncond": uncond, "clip": clip, "seed": 5}
    with fastdiff.backend(backend):
        want = ops.update(x, pred, rows, 1, **given)
        ops.update(x, pred, rows, 1, hist=before, keep="x0hat", **given)
        out = ops.update(x, pred, rows, 1, hist=hist, keep="new x0hat", **given)
    assert_same_bits(out, want)
    assert_same_bits(hist, before)


@every
def test_a_step_that_remembers_copies_nothing(backend):
    """Without out= too: x stays, and the result is that of out=."""
    rows, (x, pred, old) = table(2, WIDTH, 0), (tensor((2, 8), salt=i) for i in range(3))
    called = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    given = {"keep": "x0hat", "noisy": False}
    with fastdiff.backend(backend):
        want, before = ops.update(x, pred, rows, 1, hist=old.clone(), out=torch.empty_like(x), **given), x.clone()
        hist = old.clone()
        with Seen():
            got = ops.update(x, pred, rows, 1, hist=hist, **given)
    assert_same_bits(got, want)
    assert_same_bits(x, before)
    assert "clone" not in called


@every
def test_the_row_says_which_slot_is_overwritten(backend):
    x, pred = tensor((2, 7)), tensor((2, 7), salt=1)
    before = past(3, (2, 7), torch.float32, "contiguous", 5)
    rows = make_rows(torch.zeros(5, device=DEVICE), from_x=1.0, slot=torch.tensor([0.0, 1, 2, -1, 3], device=DEVICE))
    for step in range(5):
        hist = before.clone()
        with fastdiff.backend(backend):
            ops.update(x, pred, rows, step, hist=hist, keep="x", noisy=False)
        for slot in range(3):
            assert_same_bits(hist[slot], x if slot == step else before[slot])


@every
def test_a_row_outside_the_table_keeps_nothing(backend):
    x = tensor((2, 7))
    before = past(2, (2, 7), torch.float32, "contiguous", 5)
    step, hist = torch.tensor([1, ROWS], device=DEVICE), before.clone()
    rows = make_rows(torch.zeros(ROWS, device=DEVICE), from_x=1.0, slot=1.0)
    if backend == "reference":
        out, hist = reference.update(x, x, rows, step, None, None, None, None, None, hist, None, "x", 2)
    else:
        out = torch.empty_like(x)
        dispatch.launchers(backend).update(out, x, x, rows, step, None, None, None, None, None, hist, None, "x", 2)
    assert_same_bits(hist[:, 1], before[:, 1])
    assert_same_bits(hist[1, 0], x[0])
    assert out[1].isnan().all() and not out[0].isnan().any()


def test_rows_are_as_wide_as_their_columns():
    like = torch.zeros(3)
    assert make_rows(like, from_hist=1.0).shape == (3, WIDTH)
    rows = make_rows(like, from_hist=1.0, from_hist3=2.0, slot=1.0)
    assert rows.shape == (3, WIDE)
    assert columns(rows).from_hist.tolist() == [1.0] * 3 and history_columns(rows).from_hist3.tolist() == [2.0] * 3
    history_columns(rows).slot.fill_(2.0)
    assert rows[:, WIDTH + 2].tolist() == [2.0] * 3  # a view


@every
def test_slots_share_memory_with_nothing_else(backend):
    """What is read later is not overwritten, and out is none of the slots."""
    x, rows = tensor((2, 7)), wide_table(0)
    hist = past(2, (2, 7), torch.float32, "contiguous", 5)
    with fastdiff.backend(backend):
        with pytest.raises(ValueError, match="hist: expected memory that x does not use"):
            ops.update(hist[1], x, rows, 1, hist=hist, keep="x", noisy=False)
        with pytest.raises(ValueError, match="out: expected memory that hist does not use"):
            ops.update(x, x, rows, 1, hist=hist, keep="x", noisy=False, out=hist[0])


def test_tangents_of_slots():
    """Those of x' hold those of every slot, and those of the slot that is kept are the state's."""
    x, v = tensor((2, 7)).cpu(), tensor((2, 7), salt=1).cpu()
    rows = make_rows(torch.zeros(1), from_hist=2.0, from_hist2=-3.0, slot=1.0)

    def walk(x: Tensor) -> tuple[Tensor, Tensor]:
        hist = torch.stack((x, x.square()))
        return ops.update(x, x, rows, 0, hist=hist, keep="x", noisy=False), hist

    out, hist = torch.func.jvp(walk, (x,), (v,))[1]
    torch.testing.assert_close(out, 2 * v - 3 * 2 * x * v)
    torch.testing.assert_close(hist, torch.stack((v, v)))
