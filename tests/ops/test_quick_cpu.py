"""The quick way of compiled kernels for CPU tensors: what is repeated, with which bits, and what is refused."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from strategies import table, tensor
from tolerance import assert_same_bits

import fastdiff
from fastdiff import ops
from fastdiff.ops import quick

pytest.importorskip("numba")


@pytest.fixture(autouse=True)
def _compiled():
    quick.forget()
    with fastdiff.backend("cpu"):
        yield


@pytest.fixture
def recorded(monkeypatch):
    """The calls that were recorded since; a call that is repeated is not."""
    seen = []
    plan = quick.Recorder.plan
    monkeypatch.setattr(quick.Recorder, "plan", lambda self, result: seen.append(1) or plan(self, result))
    return seen


def full_way(call):
    """What a call gives if nothing is repeated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quick, "unwatched", lambda: False)
        return call()


def test_calls_that_differ_in_numbers_alone_are_one_kind(recorded):
    x, pred, rows = tensor((2, 3, 5)), tensor((2, 3, 5), salt=1), table(6, 9, 2)
    for step in range(6):
        for seed in (step, -step, 2**63 - 1):
            got = ops.update(x, pred, rows, step, seed=seed)
            assert_same_bits(got, full_way(lambda: ops.update(x, pred, rows, step, seed=seed)))  # noqa: B023
    assert len(recorded) == 1
    ops.update(x, pred, rows, 0, seed=2**64 - 1)  # no int64
    assert len(recorded) == 1


def test_every_call_draws_a_seed_of_its_own(recorded):
    x, levels = tensor((2, 7)), torch.tensor([[1.0, 1.0]])
    torch.manual_seed(0)
    got = [ops.noising(x, 0, levels) for _ in range(4)]
    torch.manual_seed(0)
    want = [full_way(lambda: ops.noising(x, 0, levels)) for _ in range(4)]
    assert len(recorded) == 1
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)
    assert not torch.equal(got[1], got[2])


@pytest.mark.parametrize("levels", [[0], [0, 5], list(range(66))])
def test_values_are_checked_in_every_call(levels, recorded):
    """One, a few, and many: they are compared in three ways."""
    x, z, t, numbers = tensor((len(levels), 2)), tensor((len(levels), 2)), torch.tensor(levels), torch.rand(66, 2)
    for _ in range(2):
        ops.noising(x, t, numbers, noise=z)
    for wrong in (-1, 66):
        with pytest.raises(ValueError, match=rf"^t: expected values in \[0, 66\), got {wrong}$"):
            ops.noising(x, t.index_fill(0, torch.tensor([len(levels) - 1]), wrong), numbers, noise=z)
    ids = torch.arange(len(levels))
    for _ in range(2):
        ops.noising(x, t, numbers, seed=1, sample_ids=ids)
    with pytest.raises(ValueError, match="sample_ids: expected values"):
        ops.noising(x, t, numbers, seed=1, sample_ids=ids - 1)
    assert len(recorded) == 2


def test_overlapping_memory_is_refused_in_every_call(recorded):
    both, rows = torch.zeros(40), table(6, 9, 2)
    for at in (20, 30):
        ops.update(both[:10].view(2, 5), both[at : at + 10].view(2, 5), rows, 0, noisy=False, inplace=True)
    with pytest.raises(ValueError, match="pred"):
        ops.update(both[:10].view(2, 5), both[5:15].view(2, 5), rows, 0, noisy=False, inplace=True)
    assert len(recorded) == 1


def test_a_team_of_another_size_is_another_kind(recorded):
    x, levels, before = tensor((2, 20000)), torch.tensor([[1.0, 1.0]]), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 1, 2):
            torch.set_num_threads(threads)
            results += [ops.noising(x, 0, levels, seed=1) for _ in range(2)]
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_same_bits(result, results[0])
    assert len(recorded) == 2


def test_threads_that_repeat_one_plan_do_not_meet():
    x, pred, rows = tensor((3, 5000)), tensor((3, 5000), salt=1), table(6, 9, 2)
    want = [ops.update(x, pred, rows, step, seed=1) for step in range(6)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda k: ops.update(x, pred, rows, k % 6, seed=1), range(120)))
    for k, result in enumerate(got):
        assert_same_bits(result, want[k % 6])


def test_what_the_reference_runs_is_not_recorded(recorded):
    for dtype, name in ((torch.float64, "cpu"), (torch.float32, "reference")):
        with fastdiff.backend(name):
            for _ in range(2):
                ops.noising(tensor((2, 3), dtype), 0, torch.tensor([[1.0, 1.0]]), seed=1)
    assert not recorded


def test_a_view_that_negates_is_never_read_by_address(recorded):
    """Its memory has the other sign. As the first call of a kind, and where a plan exists for a plain one."""
    x, levels = tensor((2, 5)), torch.tensor([[2.0, 0.0]])
    for data in (torch._neg_view(x), x, x, torch._neg_view(x)):
        assert_same_bits(ops.noising(data, 0, levels, seed=1), data.resolve_neg() * 2)
    assert_same_bits(ops.noising(x, 0, levels.flip(1), noise=torch._neg_view(x)), -2 * x)
    assert len(recorded) == 1


def test_a_view_that_negates_is_not_written():
    x, rows = tensor((2, 5)), table(6, 9, 2)
    for name, options in (("out", {}), ("x", {"inplace": True}), ("hist", {"keep": "x0hat"})):
        given = {"x": x, name: torch._neg_view(x.clone()), **options}
        with pytest.raises(ValueError, match=f"^{name}: expected memory that holds the values"):
            ops.update(pred=x + 1, rows=rows, step=0, noisy=False, **given)
    with pytest.raises(ValueError, match=r"^out: expected memory"):
        ops.normal(x.shape, 1, out=torch._neg_view(x))


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
def test_tensors_without_strides_or_memory_come_after_plain_ones():
    """PyTorch's guards end the process where a tensor has no strides."""
    x, levels = tensor((2, 5)), torch.tensor([[2.0, 1.0]])
    for _ in range(2):
        ops.noising(x, 0, levels, noise=x + 1)
    nested = torch.nested.nested_tensor([x, x])
    for given in (nested, x.to_sparse(), x.to_sparse_csr(), x.to_mkldnn()):
        for first, second in ((given, x), (x, given)):
            with pytest.raises(TypeError, match="expected a dense tensor"):
                ops.noising(first, 0, levels, noise=second)
    zeros = torch._efficientzerotensor((2, 5))
    assert_same_bits(ops.noising(zeros, 0, levels, noise=x), x)


@pytest.mark.parametrize(("shape", "wrong"), [((2, 3), (2.0, 3)), ((2, 1), (2, True))])
def test_numbers_that_equal_an_integer_are_none(shape, wrong):
    out = torch.empty(shape)
    for _ in range(2):
        ops.normal(shape, 1, out=out)
    with pytest.raises(TypeError, match="shape: expected an integer"):
        ops.normal(wrong, 1, out=out)


def test_an_empty_result_is_a_tensor_of_its_own():
    x = torch.empty(0, 3)
    results = [ops.noising(x, 0, torch.tensor([[1.0, 1.0]]), seed=1) for _ in range(3)]
    assert len({*map(id, results), id(x)}) == 4


@pytest.mark.parametrize("name", ["out", "x", "hist"])
def test_a_gradient_notices_what_was_overwritten(name):
    x, pred, rows, written = tensor((2, 5)), tensor((2, 5), salt=1), table(6, 9, 2), tensor((2, 5), salt=2)
    options = {"out": {"out": written}, "x": {"inplace": True}, "hist": {"hist": written, "keep": "x0hat"}}[name]
    for _ in range(3):
        saved = (written if name != "x" else x) * torch.ones(5, requires_grad=True)
        ops.update(x, pred, rows, 0, noisy=False, **options)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saved.sum().backward()
