"""The quick way: equal bits, the launches of the full way, and what has to take the full way."""

import json
import os
import shutil
from pathlib import Path

import forked
import pytest
import torch
from hypothesis import given
from strategies import BACKENDS, DEVICE, DTYPES, dtypes, laid, layouts, salts, shapes, table, tensor
from tolerance import INTERPRETED, assert_same_bits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from benchmarks.calls import CALLS, Source
from fastdiff import ops

ROWS = 6
PLAIN, SPECIAL = ([name for name in CALLS if ("," in name) is special] for special in (False, True))
every = pytest.mark.parametrize("backend", BACKENDS)


class Watched(TorchDispatchMode):
    """A mode that changes nothing, but that has to see every operation."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class WithExact(Source):
    """Its tables have 0 and 1 among their numbers, as those of schedules and samplers have."""

    def table(self, columns: int, rows: int = ROWS) -> Tensor:
        salt = torch.randint(2**20, (), generator=self.random, device=self.device)
        return table(rows, columns, int(salt))


@pytest.mark.slow
@every
@given(shape=shapes((60,)), dtype=dtypes, layout=layouts, salt=salts)
def test_equal_bits_by_the_dispatcher(backend, shape, dtype, layout, salt):
    times = 2 if DEVICE.type == "cuda" or backend == "cpu" else 1  # the second call repeats the first
    parts = 4 if INTERPRETED and backend == "triton" else 1  # so slow that each example has a part of the calls

    def results(make) -> tuple[Tensor, ...]:
        call = make(WithExact(shape, dtype, DEVICE, lambda x: laid(x, layout), salt))
        got = call.whole(call.op)()
        return got if isinstance(got, tuple) else (got,)

    with fastdiff.backend(backend):
        for name in PLAIN[salt % parts :: parts] + SPECIAL[salt % (4 * parts) :: 4 * parts]:
            make = CALLS[name]
            found = [results(make) for _ in range(times)]
            with Watched():
                want = results(make)
            for got in found:
                for a, b in zip(got, want, strict=True):
                    assert a.dtype == b.dtype and a.stride() == b.stride(), name
                    assert_same_bits(a, b)


def test_a_mode_sees_the_op():
    with Watched() as mode:
        ops.noising(torch.zeros(2, 3), 0, torch.ones(2, 2), seed=torch.tensor([1]))
    assert "fastdiff.noising.default" in mode.seen


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_a_view_that_negates_takes_the_full_way(backend):
    """The imaginary part of a conjugate is stored with the other sign."""
    x = torch.view_as_complex(tensor((2, 5, 2)).cpu()).conj().imag
    assert x.is_neg()
    with fastdiff.backend(backend):
        got = ops.noising(x, 0, torch.tensor([[2.0, 0.0]]), noise=torch.zeros(2, 5))
    assert torch.equal(got, 2 * x)


class Traced(BaseException):
    """Raised instead of compiling what was traced."""


@pytest.mark.slow
def test_calls_on_a_gpu_are_traced_into_one_graph():
    """Nothing asks for the current device or stream there: torch.compile cannot trace that."""
    seen = []

    def calls(x, weight, t, seed, rows):
        x = ops.group_norm_silu(x, 2, weight, weight, 1.0)
        x = ops.layer_norm(x)  # its arithmetic: the compiler fuses that
        noised = ops.noising(x, t, rows[2], seed=seed) + ops.normal(x.shape, seed, device=x.device)
        new = ops.update(noised, x, rows[9], t, seed=seed)
        return ops.loss(new, t, rows[3], seed=seed), ops.vlb(new, x, x, t, rows[6]), ops.inner(new, x)

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if "fastdiff" in str(node.target))
        raise Traced

    with FakeTensorMode():
        x, weight = torch.empty(2, 4, 8, 8, device="cuda"), torch.empty(4, device="cuda")
        t, seed = (torch.empty(n, dtype=torch.int64, device="cuda") for n in (2, 1))
        rows = {columns: torch.empty(ROWS, columns, device="cuda") for columns in (2, 3, 6, 9)}
    with pytest.raises(Traced), fastdiff.backend(None):
        torch.compile(calls, backend=backend, fullgraph=True)(x, weight, t, seed, rows)
    names = ("group_norm_silu", "noising", "normal_", "update", "loss", "vlb", "inner")
    assert seen == [f"fastdiff.{name}.default" for name in names]


# --- launches, by a driver that notes them instead -----------------------------------------------------------------

SCRIPT = """
import importlib, random, torch, triton
from functools import partial
import fastdiff
from fastdiff import ops
from fastdiff.ops import checks, dispatch, plan, quick
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

launched, repeated = [], []

class Driver:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return stream
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

def run(self, *args):
    launched.append((self.hash, args[:4], args[6:9], args[9:]))

driver.set_active(Driver())
stream = 7
CompiledKernel._init_handles = lambda self: setattr(self, "_run", lambda *args: run(self, *args))
for file in dispatch.TRITON:
    importlib.import_module("fastdiff.kernels." + file).on_nvidia = lambda x: True
    importlib.import_module("fastdiff.ops." + file).check_range = lambda *args: None
dispatch.interpreting = lambda: True
quick.on_gpu, quick.stream_of = lambda x: True, lambda x: stream

def counted(repeat, *args):
    result = repeat(*args)
    repeated.extend([1] * (result is not NotImplemented and result is not quick.FULL))
    return result

class Plan(quick.Plan):
    def __init__(self, *args):
        super().__init__(*args)
        self.repeat = partial(counted, self.repeat)
plan.Plan = Plan
fastdiff.backend("triton")

def noted(call):
    launched.clear()
    repeated.clear()
    result = call()
    return result, list(launched), len(repeated)
"""

LAUNCHES = """
from benchmarks.calls import CALLS, Source
def shown(launches, given):
    '''Launches with the names of the operands for their addresses; for others whether they are aligned.'''
    names = {t.data_ptr(): name for name, t in given.items() if isinstance(t, torch.Tensor)}
    def one(value):
        value = value.data_ptr() if isinstance(value, torch.Tensor) else value
        return names.get(value, ("made", value % 16) if isinstance(value, int) and value > 2**32 else value)
    return [(kernel, grid, [one(a) for a in args]) for kernel, grid, _, args in launches]

random.seed(1)
kinds = repeats = 0
quickly = set()
plain, special = ([name for name in CALLS if ("," in name) is kind] for kind in (False, True))
for case in range(30):
    n, offset, layout = random.choice((2, 8, 4)), random.choice((0, 1, 8)), random.choice(("first", "last"))
    dtype, batch, each = random.choice((torch.float32, torch.bfloat16)), random.choice((1, 3)), random.choice((1, 3))
    def lay(x):
        memory = torch.zeros(x.numel() + offset, dtype=x.dtype)[offset:]
        b, c, *rest = x.shape
        return memory.view(b, *rest, c).movedim(-1, 1) if layout == "last" else memory.view(x.shape)
    def form():
        source = Source((batch, 4, n, 8), dtype, lay=lay)
        source.t = source.t[:each]
        call = maker(source)
        return call.operands, call.whole(call.op)
    for name in plain + special[case % 6 :: 6]:  # so few, as each is compiled
        maker = CALLS[name]
        (first, one), (second, two), (third, three) = form(), form(), form()
        _, recorded, _ = noted(one)
        _, again, repeats_now = noted(two)
        with torch.utils._python_dispatch._disable_current_modes():
            unwatched, quick.unwatched = quick.unwatched, lambda: False
            _, wanted, none = noted(three)
            quick.unwatched = unwatched
        assert none == 0
        kind = name, n, offset, layout, dtype, batch
        assert shown(again, second) == shown(wanted, third) == shown(recorded, first), kind
        repeats += repeats_now > 0
        quickly |= {name} if repeats_now else set()
        kinds += 1
print(kinds, repeats, *(CALLS.keys() - quickly))
"""

WAYS = """
x, table, seed = torch.zeros(2, 8), torch.zeros(5, 2), torch.ones(1, dtype=torch.int64)
call = lambda x=x: ops.noising(x, 1, table, seed=seed)
call()
_, launches, times = noted(call)
assert times == 1 and len(launches) == 1 and launches[0][1][3] == 7 and launches[0][2] == (None, None, None)
# A kind of its own for another stream: the number 1 was written on the first.
stream = 9
_, launches, times = noted(call)
assert times == 0 and launches[0][1][3] == 9
_, launches, times = noted(call)
assert times == 1 and launches[0][1][3] == 9
# A profiler's hooks.
seen = []
triton.knobs.runtime.launch_enter_hook.add(seen.append)
_, launches, times = noted(call)
assert times == 1 and launches[0][2][1] is triton.knobs.runtime.launch_enter_hook and launches[0][2][0] is not None
triton.knobs.runtime.launch_enter_hook.remove(seen.append)
# What a check refuses is refused each time.
for _ in range(2):
    try:
        ops.noising(x, 1, table, seed=seed, out=x)
    except ValueError as error:
        assert "one of the operands" in str(error)
    else:
        raise AssertionError
    ops.noising(x, 1, table, seed=seed, out=torch.zeros(2, 8))
for wrong in (True, 1.0):  # equal to 1
    try:
        ops.noising(x, wrong, table, seed=seed)
    except TypeError:
        pass
    else:
        raise AssertionError
# So is memory that overlaps, though its kind was repeated before.
both = torch.zeros(64)
write = lambda x, out: ops.noising(x, torch.zeros(1, dtype=torch.int64), table, seed=seed, out=out)
for at in (16, 32):
    _, launches, times = noted(lambda: write(both[:16].view(2, 8), both[at : at + 16].view(2, 8)))
assert times == 1 and launches[0][3][2] == both.data_ptr() + 128
try:
    noted(lambda: write(both[:16].view(2, 8), both[12:28].view(2, 8)))
except ValueError as error:
    assert "overlaps" in str(error) and not repeated
else:
    raise AssertionError
# Kinds that differ in one tensor alone, after the first of them, are told apart; each is then repeated.
grad = torch.zeros(2, 8)
scaled = lambda incoming: fastdiff.ops.stored.scaled(grad, incoming)
kinds = [torch.ones(()), torch.ones(2), torch.ones(2, 2)[:, 0], torch.ones(()).requires_grad_(), torch.ones(9)[1:3]]
assert [noted(lambda: scaled(k))[2] for k in kinds] == [0] * 5
assert [noted(lambda: scaled(k))[2] for k in kinds] == [1, 1, 0, 1, 1]
# A copy into another layout is not repeated.
odd = torch.zeros(2, 16)[:, ::2]
call(odd)
assert noted(lambda: call(odd))[2] == 0
# A seed that is drawn is drawn again.
drawn = lambda: ops.noising(x, 1, table)
draws, plan.draw = [], lambda device, draw=plan.draw: draws.append(draw(device)) or draws[-1]
drawn()
assert noted(drawn)[2] == 1 and noted(drawn)[2] == 1 and len({int(seed) for seed in draws}) == 2
# Whatever watches takes the full way.
class Mode(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))
class FunctionMode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))
class Subclass(torch.Tensor):
    pass
from torch._subclasses import FakeTensorMode
assert noted(call)[2] == 1
for mode in (Mode(), FunctionMode(), torch.autograd.profiler.profile()):
    with mode:
        assert noted(call)[2] == 0, mode
with FakeTensorMode(allow_non_fake_inputs=True):
    fake, one = torch.zeros(2, 8), torch.ones(1, dtype=torch.int64)
    assert noted(lambda: ops.noising(fake, one, torch.zeros(5, 2), seed=seed))[1] == []
assert noted(lambda: call(x.as_subclass(Subclass)))[2] == 0
traced = torch.jit.trace(lambda x: call(x), (x,), check_trace=False)
assert "fastdiff::noising" in str(traced.graph)
graphs = []
keeping = lambda graph, inputs: graphs.append(str(graph.graph)) or graph
compiled = torch.compile(lambda x: call(x), backend=keeping, fullgraph=True)
assert noted(lambda: compiled(x))[2] == 0 and "noising" in graphs[0]
def inside(x):
    with_times.append(noted(call)[2])
    return x.sum()
with_times = []
torch.func.grad(inside)(x)
torch.vmap(lambda x: x * (with_times.append(noted(call)[2]) or 1))(x)
assert with_times == [0, 0], with_times
assert noted(call)[2] == 1
with fastdiff.backend("reference"):
    assert noted(call)[1:] == ([], 0)
quick.forget()
assert noted(call)[2] == 0
# What never repeats is not recorded forever, and what repeats is found again.
recorded = []
plan = quick.Recorder.plan
quick.Recorder.plan = lambda self, result: recorded.append(1) or plan(self, result)
for k in range(1000):
    ops.normal((2, 8), seed, step=k)
assert 64 <= len(recorded) < 100, len(recorded)
for _ in range(100):
    repeats = noted(lambda: ops.normal((2, 8), seed, step=-1))[2]
assert repeats == 1
print("ok")
"""


def run(script: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTDIFF_BACKEND")}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    done = forked.run("-c", SCRIPT + script, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_repeated_launches_are_those_of_the_full_way():
    """The same kernels, grids and operands: aligned or not, in every layout, type and batch."""
    kinds, repeats, *never = run(LAUNCHES).split()
    assert int(kinds) == 30 * len(PLAIN) + 5 * len(SPECIAL) and int(repeats) > 220 and not never


@pytest.mark.slow
def test_streams_hooks_checks_and_what_takes_the_full_way():
    assert run(WAYS).strip() == "ok"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_equal_bits_on_another_stream_and_in_a_graph(dtype, layout):
    x = laid(torch.randn(4, 6, 8, 8, device="cuda").to(dtype), layout)
    step, seed, rows = torch.tensor([1], device="cuda"), torch.tensor([5], device="cuda"), table(ROWS, 9, 1)

    def call() -> Tensor:
        return ops.update(x, x, rows, step, seed=seed, clip=1.0)

    with Watched():
        want = call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = [call() for _ in range(3)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results.append(call())
    graph.replay()
    torch.cuda.synchronize()
    for got in results:
        assert_same_bits(got, want)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_host_time_runs(tmp_path):
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "host_time.py"
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTDIFF_BACKEND")}
    done = forked.run(script, "--rounds", 1, "--json", tmp_path / "rows.json", env=environment)
    assert done.returncode == 0, done.stderr
    rows = {r["op"]: r for r in json.loads((tmp_path / "rows.json").read_text())}
    assert rows["loss, forward and backward"]["launches"] == 3
    assert rows["group_norm_silu, scale and shift, forward and backward"]["launches"] == 3
    assert all(r["ours_us"] > 0 and r["eager_us"] > 0 for r in rows.values())
