"""Memory that is written and read in one call, packed tensors, numbers of NumPy, and other devices."""

import forked
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DEVICE, table, tensor

import fastdiff
from fastdiff import ops
from fastdiff.ops import dispatch, registry
from fastdiff.ops.overlap import check_memory

T = torch.tensor([1, 0], device=DEVICE)
SHAPE = (2, 4, 6)
X, PRED = tensor(SHAPE), tensor(SHAPE, salt=1)


def views(shift: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors of SHAPE in one buffer, `shift` elements apart."""
    buffer = tensor((48 + shift,), salt=shift)
    return buffer[:48].view(SHAPE), buffer[shift:].view(SHAPE)


def overlaps():
    """Calls that write memory they read later, by name; each takes two tensors that overlap."""
    rows = table(3, 9, 0)
    return {
        "noising x0": lambda a, b: ops.noising(a, T, table(3, 2, 0), seed=1, out=b),
        "noising noise": lambda a, b: ops.noising(X, T, table(3, 2, 0), noise=a, out=b),
        "update x": lambda a, b: ops.update(a, PRED, rows, T, seed=1, out=b),
        "update pred": lambda a, b: ops.update(X, a, rows, T, seed=1, out=b),
        "update uncond": lambda a, b: ops.update(X, PRED, rows, T, seed=1, uncond=a, out=b),
        "update raw": lambda a, b: ops.update(X, PRED, rows, T, seed=1, raw_variance=a, out=b),
        "update noise": lambda a, b: ops.update(X, PRED, rows, T, noise=a, out=b),
        "update hist": lambda a, b: ops.update(X, PRED, rows, T, noisy=False, hist=a, keep="x", out=b),
        "combine y": lambda a, b: ops.combine(X, a, rows, T, out=b),
        "combine z": lambda a, b: ops.combine(X, PRED, rows, T, z=a, out=b),
        "in place pred": lambda a, b: ops.update(b, a, rows, T, noisy=False, inplace=True),
        "in place noise": lambda a, b: ops.update(b, PRED, rows, T, noise=a, inplace=True),
        "in place hist": lambda a, b: ops.update(b, PRED, rows, T, noisy=False, hist=a, keep="x", inplace=True),
        "hist x": lambda a, b: ops.update(a, PRED, rows, T, noisy=False, hist=b, keep="x"),
        "hist pred": lambda a, b: ops.update(X, a, rows, T, noisy=False, hist=b, keep="x0hat"),
    }


@pytest.mark.parametrize("name", overlaps())
@pytest.mark.parametrize("shift", [1, 24, 47])
def test_what_overlaps_is_refused(name, shift):
    for a, b in (views(shift), views(shift)[::-1]):
        before = a.clone(), b.clone(), torch.get_rng_state()
        with pytest.raises(ValueError, match=r"^(out|x|hist): expected memory that \w+ does not use"):
            overlaps()[name](a, b)
        assert torch.equal(a, before[0]) and torch.equal(b, before[1])
        assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("name", overlaps())
def test_neighbours_are_taken(name):
    a, b = views(48)
    right = overlaps()[name](a.clone(), b.clone())
    assert torch.equal(overlaps()[name](a, b), right)


def test_what_interleaves_without_overlap_is_taken():
    both = tensor((2, 8, 6), salt=3)
    x, rows = both[:, :4], table(3, 9, 0)
    right = ops.update(x.clone(), PRED, rows, T, noisy=False)
    assert torch.equal(ops.update(x, PRED, rows, T, noisy=False, out=both[:, 4:]), right)
    assert torch.equal(both[:, 4:], right)
    with pytest.raises(ValueError, match="out: expected memory that x does not use"):
        ops.update(x, PRED, rows, T, noisy=False, out=both[:, 3:7])


def test_an_operand_may_be_x_itself_in_place():
    rows = table(3, 9, 0)
    for same in (lambda x: x, lambda x: x.view(SHAPE)):
        x = X.clone()
        right = ops.update(x.clone(), x.clone(), rows, T, noise=x.clone(), clip=1.0)
        assert torch.equal(ops.update(x, same(x), rows, T, noise=same(x), clip=1.0, inplace=True), right)


def test_elements_in_one_place_are_refused():
    for out in (
        torch.zeros(48, device=DEVICE).as_strided(SHAPE, (1, 1, 1)),
        torch.zeros(1, 4, 6, device=DEVICE).expand(SHAPE),
    ):
        for call in (
            lambda out=out: ops.noising(X, T, table(3, 2, 0), seed=1, out=out),
            lambda out=out: ops.normal(SHAPE, 1, out=out),
            lambda out=out: ops.update(out, X, table(3, 9, 0), T, noisy=False, inplace=True),
        ):
            with pytest.raises(ValueError, match="expected every element in a place of its own"):
                call()


def test_tables_and_numbers_are_operands_too():
    rows = table(3, 2, 0)
    with pytest.raises(ValueError, match="out: expected memory that table does not use"):
        ops.noising(tensor((2, 3)), T, rows, seed=1, out=rows.view(2, 3))
    seed = torch.tensor([3], device=DEVICE)
    with pytest.raises(ValueError, match="out: expected memory that seed does not use"):
        ops.normal((2, 1), seed, out=seed.view(torch.float32).view(2, 1))


def test_two_tensors_of_one_array():
    if DEVICE.type == "cpu":
        array = np.zeros(50, np.float32)
        a, b = torch.from_numpy(array[:48]).view(SHAPE), torch.from_numpy(array[2:]).view(SHAPE)
        with pytest.raises(ValueError, match="out: expected memory"):
            ops.noising(a, T, table(3, 2, 0), seed=1, out=b)


@given(
    st.lists(st.integers(0, 7), min_size=3, max_size=3),
    st.lists(st.integers(0, 7), min_size=3, max_size=3),
    st.integers(0, 40),
)
def test_the_check_agrees_with_a_list_of_places(first, second, start):
    """Against every address, for views with any steps."""
    buffer = torch.zeros(512)
    a = buffer.as_strided((2, 3, 2), [s + 1 for s in first], 40)
    b = buffer.as_strided((3, 2, 2), [s + 1 for s in second], 20 + start)
    places = [
        set(torch.arange(512).as_strided(t.shape, t.stride(), t.storage_offset()).flatten().tolist()) for t in (a, b)
    ]
    if len(places[0]) < a.numel():
        return
    try:
        check_memory("a", a, {}, {"b": b})
        refused = False
    except ValueError as error:
        refused = "b" in str(error).split("expected")[1] or "strides" in str(error)
        if "strides" in str(error):  # no two elements are one, but that is not seen from the strides
            return
    assert refused == bool(places[0] & places[1])


# --- packed tensors ---------------------------------------------------------------------------------------------------


def test_packed_tensors_are_refused():
    rows, two = table(3, 9, 0).cpu(), table(3, 2, 0).cpu()
    x, t = X.cpu().flatten(1), T.cpu()
    nested = torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)])
    for call in (
        lambda: ops.noising(x.to_sparse(), t, two, seed=1),
        lambda: ops.noising(x.to_mkldnn(), t, two, seed=1),
        lambda: ops.noising(nested, t, two, seed=1),
        lambda: ops.noising(x, t.to_sparse(), two, seed=1),
        lambda: ops.noising(x, t, two.to_sparse_csr(), seed=1),
        lambda: ops.noising(x, t, two, seed=1, sample_ids=t.to_sparse()),
        lambda: ops.noising(x, t, two, seed=torch.tensor([1]).to_sparse()),
        lambda: ops.noising(x, t, two, noise=x.to_sparse()),
        lambda: ops.update(x, x.to_sparse(), rows, t, seed=1),
        lambda: ops.loss(x.to_sparse(), t, table(3, 3, 0).cpu(), seed=1),
    ):
        with pytest.raises(TypeError, match="expected a dense tensor"):
            call()


BAD = {
    "update noise": lambda: ops.update(X, X, table(3, 9, 0), 0, noise=np.zeros(SHAPE, np.float32)),
    "noising noise, out": lambda: ops.noising(X, 0, table(3, 2, 0), noise=[1.0], out=torch.empty_like(X)),
    "normal shape -1": lambda: ops.normal((2, -1), 0),
    "normal shape float": lambda: ops.normal((2, 1.5), 0),
    "normal shape int": lambda: ops.normal(5, 0),
    "normal shape str": lambda: ops.normal("ab", 0),
    "normal shape huge": lambda: ops.normal((2**62, 3), 0),
    "normal stream": lambda: ops.normal((2, 2), 0, stream=1.5),
    "normal stream str": lambda: ops.normal((2, 2), 0, stream="1"),
    "loss delta": lambda: ops.loss(X, 0, table(3, 3, 0), seed=1, delta="1"),
    "loss kind": lambda: ops.loss(X, 0, table(3, 3, 0), seed=1, kind=["mse"]),
    "loss reduction": lambda: ops.loss(X, 0, table(3, 3, 0), seed=1, reduction=None),
    "loss seed": lambda: ops.loss(X, 0, table(3, 3, 0), seed=1.0),
    "update clip": lambda: ops.update(X, X, table(3, 9, 0), 0, noisy=False, clip="1"),
    "update clip bool": lambda: ops.update(X, X, table(3, 9, 0), 0, noisy=False, clip=True),
    "update step": lambda: ops.update(X, X, table(3, 9, 0), np.float32(0), noisy=False),
    "update hist": lambda: ops.update(X, X, table(3, 9, 0), 0, noisy=False, hist=[1], keep="x"),
    "update out": lambda: ops.update(X, X, table(3, 9, 0), 0, noisy=False, out="x"),
    "norm groups": lambda: ops.group_norm_silu(X, "2", X[0, :, 0], X[0, :, 0], 0.0),
    "norm eps": lambda: ops.group_norm_silu(X, 2, X[0, :, 0], X[0, :, 0], None),
    "norm weight": lambda: ops.group_norm_silu(X, 2, None, X[0, :, 0], 0.0),
    "vlb raw": lambda: ops.vlb(X, X, X, 0, table(3, 6, 0), raw_variance=1.0),
    "vlb x_t": lambda: ops.vlb(X, 1, X, 0, table(3, 6, 0)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_end_in_our_words(name):
    with pytest.raises((TypeError, ValueError), match=r"^\w+: expected"):
        BAD[name]()


def test_an_empty_batch_with_empty_sample_ids():
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    empty = torch.zeros(0, 3, device=DEVICE)
    assert ops.normal((0, 3), 0, sample_ids=none, device=DEVICE).shape == (0, 3)
    assert ops.noising(empty, none, table(3, 2, 0), seed=1, sample_ids=none).shape == (0, 3)
    assert ops.update(empty, empty, table(3, 9, 0), none, seed=1, sample_ids=none).shape == (0, 3)
    assert ops.loss(empty, none, table(3, 3, 0), seed=1, sample_ids=none, reduction="none").shape == (0,)


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_numbers_of_numpy_are_numbers():
    rows, two, three = table(3, 9, 0), table(3, 2, 0), table(3, 3, 0)
    weight = tensor((4,), salt=1)
    for i, f in ((np.int64, np.float32), (np.uint8, np.float64), (np.array, np.float16)):
        pairs = (
            (ops.normal((i(2), i(3)), i(5), step=i(2), stream=i(7)), ops.normal((2, 3), 5, step=2, stream=7)),
            (ops.noising(X, i(1), two, seed=i(5)), ops.noising(X, 1, two, seed=5)),
            (ops.update(X, PRED, rows, i(1), seed=i(5), clip=f(0.5)), ops.update(X, PRED, rows, 1, seed=5, clip=0.5)),
            (ops.loss(X, i(1), three, seed=i(5), delta=f(0.5)), ops.loss(X, 1, three, seed=5, delta=0.5)),
            (ops.group_norm_silu(X, i(2), weight, weight, f(0.5)), ops.group_norm_silu(X, 2, weight, weight, 0.5)),
        )
        for got, right in pairs:
            assert torch.equal(got, right)
    with pytest.raises(TypeError, match="seed"):
        ops.normal((2, 3), np.bool_(True))
    with pytest.raises(ValueError, match="seed: expected 64 bits"):
        ops.normal((2, 3), 2**64)


# --- devices and imports ----------------------------------------------------------------------------------------------


def test_every_device_has_every_op():
    has = torch._C._dispatch_has_computed_kernel_for_dispatch_key
    for name in registry.OPS:
        for key in ("CPU", "CUDA", "MPS", "XPU", "HPU", "PrivateUse1"):
            assert has(f"fastdiff::{name}", key), (name, key)


class Elsewhere:
    """What dispatch asks of a tensor, on another device."""

    is_cuda, is_cpu, dtype = False, False, torch.float32

    def __init__(self, kind: str) -> None:
        self.device = torch.device(kind)


@pytest.mark.parametrize("kind", ["mps", "xpu", "hpu", "privateuseone"])
def test_other_devices_run_the_reference(kind):
    with fastdiff.backend(None):
        assert dispatch.backend_of(Elsewhere(kind)) == "reference"
        assert dispatch.kernels_of(Elsewhere(kind)) is None
    with fastdiff.backend("cpu"), pytest.raises(ValueError, match="backend: 'cpu' expected a CPU tensor"):
        dispatch.kernels_of(Elsewhere(kind))


def run(code: str) -> str:
    strict = "import warnings; warnings.simplefilter('error', RuntimeWarning)\n"
    done = forked.run("-c", strict + code)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_second_import_and_a_reload_work():
    print_noise = "print(ops.noising(x, 1, rows, seed=1).sum().item(), ops.loss(x, 1, table, seed=1).item())"
    code = f"""
import importlib, sys, torch
import fastdiff
from fastdiff import ops
torch.manual_seed(0)
x, rows, table = torch.randn(2, 3), torch.randn(2, 2), torch.randn(2, 3)
{print_noise}
first, old = ops, fastdiff
for name in [m for m in sys.modules if m.split(".")[0] == "fastdiff"]: del sys.modules[name]
import fastdiff
from fastdiff import ops
assert ops is not first
{print_noise}
pred = x.clone().requires_grad_()
for each in (first, ops):
    each.loss(pred, 1, table, seed=1).backward()
    torch.compile(lambda x: each.noising(x, 1, rows, seed=1), backend="eager", fullgraph=True)(x)
importlib.reload(sys.modules["fastdiff.ops.registry"])
importlib.reload(sys.modules["fastdiff.ops.noising"])
importlib.reload(fastdiff)
{print_noise}
"""
    first, *rest = run(code).splitlines()
    assert len(rest) == 2 and set(rest) == {first}
