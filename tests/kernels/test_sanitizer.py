"""Every kernel under the sanitizer, which also watches the rest of the suite (conftest.py): sizes that are and are not
multiples of the block, layouts with gaps, programs beyond the batch; and faulty kernels, which it must find.
"""

import importlib

import pytest
import sanitizer
import torch
import triton
import triton.language as tl
from strategies import laid, table, tensor

import fastdiff
from benchmarks.calls import CALLS, MIXED, Source, vlb
from fastdiff import ops
from fastdiff.kernels import group_norm
from fastdiff.ops.dispatch import TRITON
from fastdiff.rows import WIDE

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels report no addresses"),
]
ROWS = 6


@pytest.fixture
def launches():
    """Those of a test."""
    sanitizer.launches.clear()
    with fastdiff.backend("triton"):
        yield sanitizer.launches


# One block of 2048 or 4096 elements and its neighbours, several blocks, samples that are no multiple of anything.
CASES = [
    ((2, 2048), torch.float32, "contiguous"),
    ((2, 4097), torch.bfloat16, "contiguous"),
    ((3, 257), torch.float32, "contiguous"),
    ((1, 3, 64, 64), torch.bfloat16, "contiguous"),
    ((2, 3, 5, 7), torch.float16, "half"),
    ((2, 4, 16, 48), torch.float32, "half"),
    ((2, 3, 4, 6), torch.float32, "channels_last"),
    ((2, 3, 32, 48), torch.bfloat16, "channels_last"),
]
every = pytest.mark.parametrize(("shape", "dtype", "layout"), CASES)
drawn = pytest.mark.parametrize("generated", [True, False])


# These have tests of their own below: of the plans of a norm, of heads, and of every way to keep what a step needs.
OTHERS = ("group_norm", "rotate", "update", "combine")
# Which read and write less than others of the operation.
WITHIN = ("normal", "normal, out", "noising", "loss", "vlb", "vlb, decoder", "vlb, learned", "layer_norm")
WATCHED = {name: make for name, make in CALLS.items() if not name.startswith(OTHERS) and name not in WITHIN}
WATCHED["vlb, mean"] = lambda s: vlb(s, MIXED, raw_variance=s.data(), clip=1.0, reduction="mean")
# Operands that are read where they lie; that of a gate only if it is contiguous.
READ = {"vlb": ("pred", "raw_variance"), "inner": ("a", "b"), "gated_gelu": ("x",)}


def noise_of(x, generated):
    """Numbers of samples that are not their places."""
    if generated:
        return {"seed": 5, "sample_ids": torch.arange(len(x)) + 70_000}
    return {"noise": tensor(tuple(x.shape), x.dtype, salt=3)}


@every
@pytest.mark.parametrize("name", WATCHED)
def test_calls(launches, name, shape, dtype, layout):
    call = WATCHED[name](Source(shape, dtype, lay=lambda x: laid(x, layout)))
    call.whole(call.op)()
    assert len(launches) == call.launches
    for x in (call.operands.get(operand) for operand in READ.get(call.op.__name__, ())):
        if x is not None:
            assert (x.data_ptr() in launches[0].starts) == (name != "gated_gelu" or x.is_contiguous())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotate(launches, dtype):
    """The queries of a fused projection are read where they lie: heads of two blocks and a half, and part of one."""
    for depth in (256, 6):
        x = tensor((2, 3, 3, 5 * depth), dtype)[:, :, 1].unflatten(-1, (5, depth))
        cos, sin = tensor((3, depth)), tensor((3, depth), salt=1)
        ops.rotate(x, cos, sin, sin[0] if depth == 256 else None)
        ops.rotate(x, cos[:, ::2], sin[:, 1::2])
        assert {x.data_ptr(), cos.data_ptr(), sin.data_ptr()} <= launches[-2].starts, "a copy was read"
    assert len(launches) == 4


@pytest.mark.slow
@every
@drawn
@pytest.mark.parametrize("keep", ops.KEEPS)
@pytest.mark.parametrize("inplace", [True, False])
def test_update(launches, shape, dtype, layout, generated, keep, inplace):
    x, pred, uncond, raw, hist = (tensor(shape, dtype, layout, salt=i) for i in range(5))
    hist = None if keep == "none" else hist
    rows = table(ROWS, WIDE if keep.endswith("mix") else 9, salt=0)
    ops.update(
        x, pred, rows, 3, uncond=uncond, raw_variance=raw, hist=hist, clip=1.0, keep=keep,
        inplace=inplace, **noise_of(x, generated),
    )  # fmt: skip
    assert len(launches) == 1


def test_programs_beyond_the_batch_do_nothing(launches, monkeypatch):
    """The last row of a grid of more than 32,768 samples has them."""
    modules = [importlib.import_module(f"fastdiff.kernels.{file}") for file in TRITON]
    for module in (module for module in modules if hasattr(module, "grid_of")):
        monkeypatch.setattr(module, "grid_of", lambda batch, n, block: (triton.cdiv(n, block), batch + 2, 1))
    x = tensor((2, 300)).requires_grad_()
    ops.normal(x.shape, 5)
    (3 * ops.loss(x, 1, table(ROWS, 3, salt=0), seed=5, reduction="none").sum()).backward()
    x = x.detach()
    ops.update(ops.noising(x, 1, table(ROWS, 2, salt=0)), x, table(ROWS, 9, salt=0), 1)
    ops.vlb(x, x, x, 1, table(ROWS, 6, salt=0))
    ops.inner(x, x)
    ops.add_layer_norm(x, x, gate=x)
    ops.rotate(x[:, None, None], x[:1], x[1:])
    assert len(launches) == 12


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "half"])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(("held", "count"), [(128, 3), (8, 5)])
def test_group_norm_and_its_gradients(launches, monkeypatch, dtype, layout, scaled, held, count):
    """A program for every group, or several for each: then a launch more for the statistics, and one for the sums."""
    limits = group_norm.Limits(warp=1, forward=1, backward=1, held=held, few=held, enough=8, rows=1, line=16, sector=4)
    monkeypatch.setattr(group_norm, "LIMITS", limits)
    x = tensor((2, 6, 4, 5), dtype, layout).requires_grad_()
    weight, bias = (tensor((6,), dtype, salt=i).requires_grad_() for i in (1, 2))
    rows = tensor((2, 12), dtype, salt=3).chunk(2, 1) if scaled else (None, None)
    add = tensor((2, 6), dtype, salt=4).requires_grad_()
    ops.group_norm_silu(x, 2, weight, bias, 1e-5, *rows, add).sum().backward()
    assert len(launches) == count


@pytest.mark.parametrize("resident", [1, 2**20])
def test_the_parts_of_large_groups_are_read_again_soon(launches, monkeypatch, resident):
    """Statistics and output by turns, for as many slabs at a time as the cache holds."""
    limits = group_norm.Limits(warp=1, forward=1, backward=1, held=8, few=8, enough=1, parts=2, resident=resident)
    monkeypatch.setattr(group_norm, "LIMITS", limits)
    x = tensor((3, 2, 4, 8))
    ops.group_norm_silu(x, 1, x[0, :, 0, 0], x[0, :, 0, 1], 1e-5)
    assert len(launches) == (6 if resident == 1 else 2)


@triton.jit
def faulty(in_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at % 8, tl.load(in_ptr + at))


def test_a_load_outside_is_found(launches):
    with pytest.raises(Exception, match="1 of 8 elements that a program reads lie outside"):
        faulty[(1,)](torch.ones(8)[:7], torch.empty(8), BLOCK=8)


def test_a_store_into_a_gap_is_found(launches):
    with pytest.raises(Exception, match="4 of 8 elements that a program writes lie outside"):
        faulty[(1,)](torch.ones(8), torch.empty(8)[::2], BLOCK=8)


def test_a_race_between_stores_is_found(launches):
    with pytest.raises(AssertionError, match="written twice"):
        faulty[(2,)](torch.ones(16), torch.empty(8), BLOCK=8)


def test_a_race_between_a_load_and_a_store_is_found(launches):
    x = torch.ones(16)
    with pytest.raises(AssertionError, match="read and written by two programs"):
        faulty[(2,)](x, x[4:12], BLOCK=4)
