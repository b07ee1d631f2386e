"""The emulator of compiled kernels: what it computes, the faults that it finds, and kernels that are made wrong."""

import os
import shutil
from pathlib import Path

import forked
import numpy as np
import pytest
import torch

from benchmarks.emulator.machine import execute
from benchmarks.emulator.memory import Fault, Memory, Range
from benchmarks.emulator.ptx import parse

TREE = Path(__file__).resolve().parents[2]
KERNEL = """
.visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0,
	.param .u64 .ptr .global .align 1 k_param_1
)
.reqntid 64
{
	.reg .pred %p<9>;
	.reg .b16 %rs<9>;
	.reg .b32 %r<99>;
	.reg .b64 %rd<9>;
	ld.param.b64 %rd1, [k_param_0];
	ld.param.b64 %rd2, [k_param_1];
	mov.u32 %r1, %tid.x;
	mul.wide.u32 %rd3, %r1, 4;
	add.s64 %rd1, %rd1, %rd3;
	add.s64 %rd2, %rd2, %rd3;
BODY
	ret;
}
"""
# Each thread writes its number to shared memory and reads that of another.
EXCHANGE = """
	shl.b32 %r2, %r1, 2;
	st.shared.b32 [ %r2 + 0 ], %r1;
	bar.sync 0;
	sub.s32 %r3, 252, %r2;
	ld.shared.b32 %r4, [%r3];
	st.global.b32 [ %rd2 + 0 ], { %r4 };
"""


def run(body: str, given: np.ndarray | None = None, programs: int = 1) -> np.ndarray:
    """What 64 threads write, 4 bytes each, of what they are given. Register %rd1 is the address of a thread's own in
    the given, %rd2 in the written, and %r1 is its number."""
    given = np.zeros(64, np.float32) if given is None else given
    out = np.zeros(64, np.uint32)
    kernel = parse(KERNEL.replace("BODY", body))
    ranges = [Range.of_host(a.ctypes.data, a.ctypes.data + a.nbytes, kernel.grain) for a in (given, out)]
    values = [a.ctypes.data.to_bytes(8, "little") for a in (given, out)]
    execute(kernel, (programs, 1, 1), values, 256, Memory(ranges))
    return out


def test_a_barrier_orders_what_warps_exchange():
    assert run(EXCHANGE).tolist() == list(range(63, -1, -1))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("bar.sync 0;", "", "reads what another warp wrote"),
        ("st.shared.b32 [ %r2 + 0 ], %r1;", "", "reads shared memory that nobody wrote"),
        ("[ %r2 + 0 ]", "[ %r2 + 4 ]", "beyond shared memory"),
        ("[ %rd2 + 0 ]", "[ %rd2 + 4 ]", "1 of 64 elements lie outside"),
        ("[ %rd2 + 0 ]", "[ %rd2 + 2 ]", "no multiple"),
        ("sub.s32 %r3, 252, %r2", "sad.s32 %r3, 252, %r2", "unknown instruction.*line 22 of the PTX: sad.s32"),
    ],
)
def test_faults(old, new, message):
    assert old in EXCHANGE
    with pytest.raises(Fault, match=message):
        run(EXCHANGE.replace(old, new))


def test_warps_that_write_different_values_into_one_place():
    """Equal ones are no race, and any one of a warp may stay."""
    run("	mov.b32 %r2, 0;\n	st.shared.b32 [ %r2 + 0 ], %r2;")
    run("	shr.u32 %r2, %r1, 5;\n	shl.b32 %r3, %r2, 2;\n	st.shared.b32 [ %r3 + 0 ], %r1;")
    with pytest.raises(Fault, match="another value"):
        run("	mov.b32 %r2, 0;\n	st.shared.b32 [ %r2 + 0 ], %r1;")


def test_programs_may_not_meet_in_global_memory():
    with pytest.raises(Fault, match="writes what another warp read"):
        run("	ld.global.b32 { %r2 }, [ %rd2 + 0 ];\n	st.global.b32 [ %rd2 + 0 ], { %r1 };", programs=2)


def test_threads_branch_apart_and_meet():
    """Thread n adds up the numbers to n in a loop of its own length; then a shuffle needs the whole warp."""
    body = """
	mov.b32 %r2, 0;
	mov.b32 %r3, 0;
$L__loop:
	add.s32 %r2, %r2, %r3;
	add.s32 %r3, %r3, 1;
	setp.lt.u32 %p1, %r3, %r1;
	@%p1 bra $L__loop;
	shfl.sync.bfly.b32 %r4, %r2, 1, 31, -1;
	st.global.b32 [ %rd2 + 0 ], { %r4 };
"""
    assert run(body).tolist() == [m * (m - 1) // 2 for m in (n ^ 1 for n in range(64))]


def test_products_and_sums_are_rounded_once():
    """(1 + 2^-12)^2 + 2^-60 lies just above the middle of two numbers; rounded to float64 first, it would not."""
    a = np.full(64, 1 + 2.0**-12, np.float32)
    body = "	ld.global.b32 { %r2 }, [ %rd1 + 0 ];\n	fma.rn.f32 %r3, %r2, %r2, 0f21800000;\n"
    got = run(body + "	st.global.b32 [ %rd2 + 0 ], { %r3 };", a).view(np.float32)
    assert (got == np.float32(1 + 2.0**-11 + 2.0**-23)).all()


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_pairs_in_half_precision(kind, dtype):
    """The first number is the upper half. Ties go to even, large numbers to infinity."""
    x = np.random.default_rng(0).normal(size=64).astype(np.float32)
    x[:6] = 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, np.inf, 3e38, 2.0**-24
    body = f"	ld.global.b32 {{ %r2 }}, [ %rd1 + 0 ];\n	cvt.rn.{kind}x2.f32 %r3, 0f40000000, %r2;\n"
    got = run(body + "	st.global.b32 [ %rd2 + 0 ], { %r3 };", x)
    want = torch.stack((torch.from_numpy(x), torch.full((64,), 2.0)), 1).to(dtype).view(torch.int16)
    assert got.view(np.int16).tolist() == want.flatten().tolist()


@pytest.mark.parametrize("name", ["add", "sub", "mul"])
def test_arithmetic_of_pairs_in_half_precision(name):
    x = np.random.default_rng(0).normal(size=128).astype(np.float16)
    x[:6] = 65504, np.inf, np.nan, -0.0, 2.0**-24, 1 + 2.0**-10
    body = f"	ld.global.b32 {{ %r2 }}, [ %rd1 + 0 ];\n	{name}.f16x2 %r3, %r2, 0x38013c03;\n"
    got = torch.from_numpy(run(body + "	st.global.b32 [ %rd2 + 0 ], { %r3 };", x).view(np.float16))
    other = torch.tensor([0x3C03, 0x3801], dtype=torch.int16).view(torch.float16).double().repeat(64)
    want = getattr(torch, name)(torch.from_numpy(x).double(), other).half()
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert got[2].view(torch.int16) == 0x7FFF


# Launches in a process whose kernels are compiled, as they are and with one instruction another.
PROGRAM = """
import torch
import fastdiff
from benchmarks.calls import CALLS, Source
from benchmarks.emulator import driver
from benchmarks.workloads import agree
from fastdiff import ops
from fastdiff.kernels.group_norm import norm_grad

def drawn():
    got = ops.normal((2, 64), 5)
    with fastdiff.backend("reference"):
        agree("normal", [got], [ops.normal((2, 64), 5).double()], 1e-6)

def shared():
    call = CALLS["layer_norm"](Source((1, 1600), torch.bfloat16))
    call.bound(call.op)()

def merged():
    # Four warps merge the ten parts of a group, and round the products.
    torch.manual_seed(2)
    x = torch.randn(1, 3, 97, 101, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    ops.group_norm_silu(x, 1, torch.ones(3), torch.ones(3), 1e-5)

def one_pixel():
    # Threads hold a pixel each, and send the products to others.
    torch.manual_seed(0)
    x, grad = (torch.randn(1, 8, 3, 5).contiguous(memory_format=torch.channels_last) for _ in range(2))
    given = {"weight": torch.ones(8), "bias": torch.ones(8), "mean": torch.zeros(1, 2), "rstd": torch.ones(1, 2)}
    rows = ("scale", "shift", "add", "skip")
    none = dict.fromkeys([*rows, *(f"{name}_grad" for name in ("weight", "bias", *rows))])
    norm_grad(x_grad=torch.empty_like(x), grad=grad, x=x, groups=2, silu=True, **given, **none)

emulator, parse = driver.Emulator("sm_90"), driver.parse
for run, old, new in [
    (drawn, "", ""),
    (drawn, "cos.approx", "sin.approx"),
    (shared, "", ""),
    (shared, "bar.sync \\t0;", ""),
    (merged, "", ""),
    (one_pixel, "", ""),
]:
    driver.parse = lambda text: parse(text.replace(old, new))
    try:
        with fastdiff.backend("triton"):
            run()
        print("right")
    except RuntimeError as error:
        print(error)
print(emulator.launches.total(), emulator.ties)
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_compiled_kernels_are_executed():
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTDIFF_BACKEND")}
    done = forked.run("-c", PROGRAM, env=environment | {"PYTHONPATH": str(TREE)}, cwd=TREE)
    assert done.returncode == 0, done.stderr
    right, wrong, ordered, race, *others, counts = done.stdout.splitlines()
    assert [right, ordered, *others] == ["right"] * 4
    assert "off the float64 reference" in wrong and "with no barrier between" in race
    assert counts == "7 0"  # launches, ties


def test_statements_of_inline_assembly():
    """Several in a line, in a scope with registers of its own: -(-x) of two numbers in half precision."""
    x = np.random.default_rng(0).normal(size=128).astype(np.float16)
    body = """
	ld.global.b32 { %r2 }, [ %rd1 + 0 ];
	{ .reg .b16 low, high; .reg .b32 minus; neg.f16x2 minus, %r2; mov.b32 {low, high}, minus;
		cvt.f32.f16 %r3, high; neg.f32 %r3, %r3; }
	st.global.b32 [ %rd2 + 0 ], { %r3 };
"""
    assert run(body, x).view(np.float32).tolist() == x[1::2].astype(np.float32).tolist()
