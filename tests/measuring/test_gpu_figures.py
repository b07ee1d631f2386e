"""The kit for a GPU: its figures, and a rehearsal without one."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
import triton

from benchmarks import workloads
from benchmarks.gpu import checks, launches, measure, operations, packaged_step, training
from benchmarks.gpu.results import Results
from benchmarks.gpu.rows import STAGES, NotAvailable, Setup
from benchmarks.gpu.worker import measure as outcome_of
from benchmarks.static import variants
from fastdiff.kernels import launch, layer_norm, rotate
from fastdiff.ops.rotate import LARGEST

ROOT = Path(__file__).resolve().parents[2]
HELPED = os.pathsep.join((str(ROOT), str(ROOT / "tests" / "helpers")))
CPU = Setup(torch.device("cpu"), toy=True)
MACHINE = {"device": "cuda:0 (A GPU)", "torch": "2.11.0"}


@pytest.fixture
def file(tmp_path):
    return Results(tmp_path / "a-gpu.json", "run", MACHINE)


# --- the figures --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_figures_of_a_job(monkeypatch):
    """The host returns after 1 s of a run that takes 4 s; the first run takes 10 s."""
    now = [0.0]
    calls = []

    def run():
        calls.append(len(calls))
        now[0] += 1.0

    def clock(device):
        if len(calls) == 1 and now[0] < 10:
            now[0] = 10.0
        elif calls and now[0] % 4:
            now[0] += 4 - now[0] % 4
        return now[0]

    monkeypatch.setattr(measure, "clock", clock)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(measure, "profiled", lambda run, device: (600, 0.2))
    figures = measure.job(run, CPU.device, steps=2, units=8)
    assert figures["first_call_s"] == 10 and figures["per_s"] == 2.0 and figures["ms_per_step"] == 2000
    assert figures["host_ms_per_step"] == 500
    assert figures["gpu_ms_per_step"] == 100 and figures["kernels_per_step"] == 300 and figures["peak_mb"] > 0
    assert len(calls) == 2 + measure.REPEATS

    def locked(run, device):
        raise AssertionError("Legacy CUDA profiling requires use_cpu=True\nand more")

    monkeypatch.setattr(measure, "profiled", locked)
    figures = measure.job(run, CPU.device, steps=2, units=8)
    assert figures["profiler"] == "AssertionError: Legacy CUDA profiling requires use_cpu=True" and "per_s" in figures
    monkeypatch.setattr(measure, "profiled", lambda run, device: (0, 0.0))
    figures = measure.job(run, CPU.device, steps=2, units=8)
    assert figures["profiler"] == "it saw no kernels" and "gpu_ms_per_step" not in figures


def test_ranges_that_are_marked_are_no_kernels():
    def run():
        torch.zeros(2)

    def marked():
        with torch.profiler.record_function("a compiled graph"):
            run()

    assert measure.profiled(marked, CPU.device)[0] == measure.profiled(run, CPU.device)[0] > 0


def test_a_job_says_what_the_compiler_gave_up():
    counted = {"graph_break": {"no rule for f\nmore": 2, "no rule for g": 1}, "inductor": {"cudagraph_skips": 4}}
    assert measure.given_up(counted) == {"cudagraph_skips": 4, "graph_breaks": 3, "broken_by": "no rule for f"}
    assert measure.given_up({"inductor": {"fxgraph_cache_hit": 1}}) == measure.given_up({}) == {}


@pytest.mark.slow
def test_kernels_are_counted():
    x = torch.ones(10)
    once, seconds = measure.profiled(x.neg, CPU.device)
    thrice, _ = measure.profiled(lambda: (x.neg(), x.neg(), x.neg()), CPU.device)
    assert once > 0 and thrice == 3 * once and 0 < seconds < 1


def test_times_on_a_gpu(monkeypatch):
    """What is asked of Triton there, and the time that a call holds up the program."""
    asked = []
    monkeypatch.setattr(
        triton.testing, "do_bench_cudagraph", lambda f, rep, return_mode: asked.append((rep, return_mode)) or f()
    )
    assert measure.milliseconds([lambda: 3.0] * 4, torch.device("cuda"), 1.0) == [3.0] * 4
    assert asked == [(25, "median")] * 4
    now = [0.0]
    monkeypatch.setattr(measure, "clock", lambda device: now[0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    call = functools.partial(lambda: now.__setitem__(0, now[0] + 2e-6))
    assert measure.host_microseconds(call, torch.device("cuda")) == pytest.approx(2.0)


TOOL = """#!/bin/sh
echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" >> "$0.log"
[ "$2" = memcheck ] && echo "==== ERROR SUMMARY: 0 errors" && exit
echo "==== RACECHECK SUMMARY: 2 hazards displayed"
exit 9
"""


def test_the_sanitizer_is_heard(monkeypatch, tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(TOOL)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert checks.sanitizer("memcheck", "loss", CPU) == {"summary": "ERROR SUMMARY: 0 errors"}
    with pytest.raises(RuntimeError, match="RACECHECK SUMMARY: 2 hazards displayed"):
        checks.sanitizer("racecheck", "loss", CPU)
    first = (tmp_path / "compute-sanitizer.log").read_text().splitlines()[0]
    assert first.startswith(f"1 --tool memcheck --error-exitcode 9 {sys.executable} -m") and first.endswith("loss cpu")


def test_without_the_sanitizer(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NotAvailable, match="compute-sanitizer is not installed"):
        checks.sanitizer("memcheck", "loss", CPU)


@pytest.mark.slow
def test_what_the_sanitizer_is_given_launches_every_kernel():
    script = "import quick_interpreter, triton.runtime.interpreter as i\nquick_interpreter.install()\n" + (
        "run, seen = i.GridExecutor.__call__, set()\n"
        "def call(self, *args, **kwargs):\n    seen.add(self.fn.__name__)\n    run(self, *args, **kwargs)\n"
        "i.GridExecutor.__call__ = call\n"
        "import torch\nfrom benchmarks.gpu import launches\n"
        "layouts = launches.LAYOUTS\n"
        "for name in launches.OPERATIONS:\n"
        "    norm = name == 'group_norm_silu'\n"
        "    launches.LAYOUTS = layouts[: 1 + norm]\n"
        "    for shape in launches.shapes_of(name)[: 1 + norm]:\n"
        "        launches.launch(name, torch.device('cpu'), shape, launches.DTYPES[:1])\n"
        "print(*sorted(seen))\n"
    )
    environment = {"TRITON_INTERPRET": "1", "FASTDIFF_BACKEND": "triton", "PYTHONPATH": HELPED, "PATH": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    known = {f"{kernel}_kernel" for kernel, _, _ in variants.COMMON + variants.RARE}
    known.add("parameters_kernel")  # of a norm: it sums what the programs of its gradient have left
    assert done.stdout.split() == sorted(known), done.stderr


def test_the_sanitizer_sees_warps_that_meet():
    """In shared memory, where races are: a row or head of a program's tile has more elements than a warp holds."""
    rows = layer_norm.shape_of(launches.WIDE_ROW, 3)
    assert rows["CHUNK"] > launch.WARP * layer_norm.HELD and rows["ROWS"] > 1
    assert LARGEST >= launches.WIDE_HEAD > launch.WARP * rotate.HELD


@pytest.mark.slow
def test_the_outcome_of_the_tests_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: None)  # in one process, which is quicker for two tests
    good, bad, broken = (tmp_path / f"test_{name}.py" for name in ("good", "bad", "broken"))
    good.write_text("def test_a(): pass\n")
    bad.write_text("def test_b(): assert False\n")
    broken.write_text("import no_such_package\n")
    left_out = checks.tests([str(good), str(broken)])
    assert left_out["passed"] == 1 and left_out["not imported"].endswith("test_broken.py")
    with pytest.raises(RuntimeError, match=r"1 failed, 1 passed, 1 error(.|\n)*test_bad\.py::test_b(.|\n)*test_broken"):
        checks.tests([str(good), str(bad), str(broken)])


def test_the_tests_that_are_asked_for_exist():
    asked = [row.run.args[0] for row in checks.rows(Setup(CPU.device, toy=False)) if row.run.func is checks.tests]
    files = [word.split("::")[0] for arguments in asked for word in arguments if word.startswith("tests")]
    assert len(files) == 4 and all((ROOT / file).exists() for file in files)


# --- the rehearsal ------------------------------------------------------------------------------------------------


# Runs a module as `python -m` does. Its package is the exported program, which takes no compiler.
UNCOMPILED = """
import runpy, subprocess, sys, torch
start, names = subprocess.run, ("torch._inductor.aoti_load_package(package)", "torch.export.load(package).module()")
subprocess.run = lambda command, **options: start([part.replace(*names) for part in command], **options)
torch._inductor.aoti_compile_and_package = lambda program, package_path, **_: (
    torch.export.save(program, package_path) or package_path
)
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__")
"""


def run_python(command, cwd, **_):
    """As subprocess does, in a fork."""
    if command[1:3] == ["-m", "benchmarks.gpu.packaged_step"]:
        command = [*command[:1], "-c", UNCOMPILED, *command[2:]]
    return forked.run(*command[1:], cwd=cwd)


@pytest.fixture
def short(monkeypatch):
    """No time for the clock or for garbage, and no compiler, which takes minutes and is tested elsewhere."""
    monkeypatch.setattr(measure, "gc", SimpleNamespace(collect=lambda: None))
    monkeypatch.setattr(measure, "SECONDS", 0)
    monkeypatch.setattr(measure, "REPEATS", 1)
    monkeypatch.setattr(measure.host_microseconds, "__defaults__", (2, 1))  # calls, rounds
    monkeypatch.setattr(training, "TOY_STEPS", 1)
    monkeypatch.setattr(operations, "SECONDS", 0.01)
    monkeypatch.setattr(checks, "subprocess", SimpleNamespace(run=run_python))
    with torch._dynamo.config.patch(disable=True):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_the_rehearsal(stage, short):
    """Every row of every stage, at toy size: it has its figures, or what it needs is not there."""
    outcomes = {row.name: outcome_of(row) for row in stage.rows(CPU)}
    assert not {name: row["error"] for name, row in outcomes.items() if "error" in row}
    json.dumps(outcomes)
    expected = {"smoke": 10, "sampling": 7, "training": 4, "operations": 16, "host": 24, "checks": 4}
    assert sum("figures" in row for row in outcomes.values()) >= expected[stage.name]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_the_rows_of_a_gpu(stage):
    """They can be named without a GPU, no two are alike, and each may run in ten minutes."""
    rows = stage.rows(Setup(torch.device("cuda"), toy=False))
    assert len({row.name for row in rows}) == len(rows)
    assert all(row.seconds <= min(600, stage.seconds) for row in rows)


@pytest.mark.slow
def test_all_methods_do_the_same_steps(short):
    """The images of diffusers in bfloat16 are those of fastdiff in float32, but for rounding."""
    rows = next(stage for stage in STAGES if stage.name == "sampling").rows(CPU)
    figures = next(row for row in rows if row.name == "cifar10 U-Net, batch 2 / diffusers eager").run()
    assert 0 < figures["off_float32"] < 0.05
    accelerated = next(row for row in rows if row.name == "SD 1.5 U-Net, batch 1 / accelerate eager").run()
    assert accelerated["off_eager"] < 0.1


def test_what_the_goals_are_about_comes_first_and_what_compiles_longest_last():
    stages = {stage.name: stage.rows(Setup(torch.device("cuda"), toy=False)) for stage in STAGES}
    by_turn: dict[int, set[str]] = {}
    for stage in ("sampling", "training"):
        for row in stages[stage]:
            by_turn.setdefault(row.turn, set()).add(row.method)
    plain = {"diffusers eager", "fastdiff eager", "fastdiff graph", "accelerate eager", "accelerate graph"}
    assert by_turn[1] == plain - {"fastdiff eager", "accelerate eager"}
    assert by_turn[2] == {"diffusers reduce-overhead", "diffusers compiled"}
    assert by_turn[4] == {"diffusers max-autotune"} and by_turn[5] == plain - {"fastdiff eager", "fastdiff graph"}
    assert by_turn[6] == {"diffusers max-autotune", "diffusers reduce-overhead", "accelerate compiled"}
    assert [row.case for row in stages["sampling"] if row.turn == 4] == ["SD 1.5 U-Net, batch 1"]
    assert {row.case for row in stages["sampling"] if row.turn == 5} == {"SD 3.5 transformer, batch 1"}
    assert {row.turn for name in ("smoke", "host") for row in stages[name]} == {1}
    first = [row for row in stages["operations"] if row.turn == 1]
    assert len(first) == 32 and all("norm" in row.case and row.method.startswith("bfloat16") for row in first)
    assert {row.turn for row in stages["operations"]} == {1, 2, 3, 4, 5}
    assert {row.turn for row in stages["checks"]} == {3}
    assert all((row.turn > 3) == ("and torch.compile" in row.case) for row in stages["operations"])
    assert len(stages["sampling"]) == 6 * 3 + 6 * 2 + 5


def test_a_training_step_trains(short):
    """The weights move and their average follows, by diffusers' recipe and by fastdiff's."""
    for method in ("diffusers eager", "fastdiff eager"):
        moved = []
        real = training.training_step

        def watched(parameters, loss, average, real=real, moved=moved, **options):
            before = [p.detach().clone() for p in parameters]
            step = real(parameters, loss, average, **options)
            return lambda: (step(), moved.append(sum((p - b).norm() for p, b in zip(parameters, before, strict=True))))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "training_step", watched)
            training.METHODS[method](2 * torch.rand(2, 3, 8, 8) - 1, CPU)()
        assert moved[0] > 0


@pytest.mark.slow
def test_a_result_that_is_not_the_reference_is_not_timed(short, monkeypatch):
    monkeypatch.setitem(workloads.BOUND, torch.float32, 0.0)
    rows = [row for row in operations.rows(CPU) if "float32" in row.name]
    outcomes = [outcome_of(row) for row in rows]
    assert len(rows) == 20 and all("off the float64 reference" in outcome["error"] for outcome in outcomes)


def test_the_packaged_step_of_stock_pytorch_has_nothing_of_ours():
    """Nothing but PyTorch and the standard library; its loading process looks for itself."""
    script = (ROOT / "benchmarks" / "gpu" / "packaged_step.py").read_text()
    names = re.findall(r"^(?:import|from) +(.+?)(?: import .*)?$", script, re.MULTILINE)
    known = {"torch", "faulthandler, gc, sys, torch"}
    assert set(names) - known <= sys.stdlib_module_names and known < set(names)
    assert packaged_step.Step("stock").ops is None and "fastdiff" not in packaged_step.Step.forward.__code__.co_names


@pytest.mark.slow
def test_options_that_this_pytorch_lacks_are_left_out():
    assert packaged_step.known({"cpp.simdlen": 0, "no.such_option": 1}) == {"cpp.simdlen": 0}


@pytest.mark.slow
@pytest.mark.parametrize("cure", ["one OpenMP thread", "nothing"])
def test_a_packaged_step_that_dies_says_where_and_what_helps(monkeypatch, cure):
    """Its process dies after the package was loaded, unless one thing is changed."""

    def run(command, env, **_):
        if cure == "one OpenMP thread" and env.get("OMP_NUM_THREADS") == "1":
            torch.save(packaged_step.Step("stock").eval()(x, torch.tensor([3])).detach(), command[4])
            return SimpleNamespace(returncode=0)
        return SimpleNamespace(returncode=-11, stdout="import\nload\n", stderr="Fatal error\n  File step.so\n")

    x = torch.linspace(-1, 1, 96).reshape(packaged_step.SHAPE)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(packaged_step, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(torch.export, "export", lambda *args, **options: None)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda program, package_path, **_: package_path)
    with pytest.raises(RuntimeError) as error:
        packaged_step.main("cpu", "stock")
    told = str(error.value)
    assert told.startswith("SIGSEGV, the last that it did: load. Fatal error / File step.so")
    assert f"It is cured by: {cure}." in told and len(told) < 1800
