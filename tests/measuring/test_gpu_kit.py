"""The kit for a GPU: its rows in processes, the budget, the command and the report."""

import functools
import multiprocessing
import os
import select
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
import triton

from benchmarks.gpu import __main__ as kit
from benchmarks.gpu import packages, report, results, runner
from benchmarks.gpu.results import Results
from benchmarks.gpu.rows import STAGES, Row, Setup, Stage
from benchmarks.gpu.worker import UNKNOWN_OPTION, Worker, forget, reusable
from benchmarks.gpu.worker import measure as outcome_of

ROOT = Path(__file__).resolve().parents[2]
CPU = Setup(torch.device("cpu"), toy=False)
MACHINE = {"device": "cuda:0 (A GPU)", "torch": "2.11.0"}


@pytest.fixture
def file(tmp_path):
    return Results(tmp_path / "a-gpu.json", "run", MACHINE)


# --- rows in a real process ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What the runner makes of the stand-in rows, by their names; and the number of the hanging row's child."""
    folder = tmp_path_factory.mktemp("worker")
    forks = multiprocessing.get_context("forkserver")  # as new processes are, but with PyTorch imported once
    forks.set_forkserver_preload(["benchmarks.gpu.worker"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, "get_context", lambda method: forks)
        patch.setenv("CHILD_FILE", str(folder / "child"))
        done = Results(folder / "results.json", "run", MACHINE)
        runner.run([Stage("stand-in", "gpu_rows")], CPU, 600, done, lambda line: None)
    rows = results.read(folder / "results.json")["rows"]
    return {key.split(" / ")[1]: row for key, row in rows.items()}, int((folder / "child").read_text())


@pytest.mark.slow
def test_a_row_that_fails_is_recorded_and_the_next_goes_on(outcomes):
    rows, _ = outcomes
    assert rows["fails"]["error"] == "RuntimeError: 3 is not 4"
    assert rows["second"]["figures"] == rows["first"]["figures"]  # in the same process


@pytest.mark.slow
def test_a_row_that_hangs_is_killed_with_its_children(outcomes):
    rows, child = outcomes
    assert rows["hangs"]["error"] == "killed after 2 s"
    assert rows["third"]["figures"]["process"] != rows["second"]["figures"]["process"]
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.slow
def test_without_the_kit_a_process_ends_with_its_children():
    """The kit may be killed, as a command is that takes too long."""
    code = """
import multiprocessing, os, subprocess, sys, threading
from benchmarks.gpu.worker import end_with_parent
def hangs(pipe):
    os.setpgrp()
    threading.Thread(target=end_with_parent, daemon=True).start()
    pipe.send((os.getpid(), subprocess.Popen(["tail", "-f", "/dev/null"]).pid))
    threading.Event().wait()
ours, theirs = multiprocessing.Pipe()
multiprocessing.get_context("fork").Process(target=hangs, args=(theirs,)).start()
print(*ours.recv(), flush=True)
os.kill(os.getpid(), 9)
"""
    program = forked.start("-c", code, cwd=ROOT)
    children = program.stdout.readline().split()
    ended, _, _ = select.select([program.stdout], [], [], 30)  # all who could write are gone
    for child in () if ended else map(int, children):
        os.kill(child, 9)
    assert ended and len(children) == 2


@pytest.mark.slow
def test_a_row_that_dies_is_recorded_with_its_signal(outcomes):
    rows, _ = outcomes
    assert rows["dies"]["error"] == "the process ended with SIGSEGV"
    assert rows["last"]["figures"]["process"] != rows["third"]["figures"]["process"]


@pytest.mark.slow
def test_what_is_not_there_is_not_an_error(outcomes):
    rows, _ = outcomes
    assert rows["lacks"]["not_available"] == "no such tool"
    assert "unexpected keyword argument 'graph'" in rows["option"]["not_available"]


def test_a_process_that_died_after_its_last_row_is_told():
    worker = Worker(Stage("stand-in", "gpu_rows"), CPU)
    worker.pipe, theirs = multiprocessing.Pipe()
    theirs.close()
    worker.process = SimpleNamespace(pid=0, exitcode=-9, join=lambda seconds: None, kill=lambda: None)
    assert worker.run("first / works", 1) == {"error": "the process ended with SIGKILL"} and worker.process is None


def test_a_type_error_of_another_kind_is_an_error():
    assert "error" in outcome_of(Row("a", "b", lambda: {"length": len(3)}, 1))  # type: ignore[arg-type]
    assert UNKNOWN_OPTION.search("graph: expected a CUDA model, got cpu")
    assert not UNKNOWN_OPTION.search("f() got an unexpected keyword argument 'steps'")


def test_a_device_that_is_lost_ends_the_process(monkeypatch):
    """A worker that says it is not healthy is stopped, so that the next row gets a new one."""

    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.compiler, "reset", lost)
    assert not forget(torch.device("cpu"))


def test_after_a_row_that_failed_on_a_gpu_the_process_ends(monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.worker.forget", lambda device: True)
    failed = {"error": "RuntimeError: CUDA error: operation not permitted when stream is capturing"}
    assert not reusable(failed, torch.device("cuda"))
    assert reusable(failed, CPU.device) and reusable({"figures": {}}, CPU.device)


# --- budget, and rows that are there, on a clock of the tests -----------------------------------------------------


class Here:
    """A worker in this process, whose rows take as long on the tests' clock as they say."""

    now = 0.0
    started: list[str] = []  # noqa: RUF012
    ran: list[str] = []  # noqa: RUF012
    limits: list[float] = []  # noqa: RUF012
    made = 0

    def __init__(self, stage, setup):
        self.stage, self.setup = stage, setup
        Here.made += 1

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def start(self, seconds):
        Here.started.append(self.stage.name)

    def run(self, name, seconds):
        Here.ran.append(name)
        Here.limits.append(seconds)
        row, start = next(row for row in self.stage.rows(self.setup) if row.name == name), Here.now
        outcome = outcome_of(row)
        if Here.now - start > seconds:
            Here.now = start + seconds
            raise TimeoutError(f"killed after {seconds:.0f} s")
        return outcome


class Listed(Stage):
    def rows(self, setup):
        return self.module


def stage(*rows: tuple[str, float, float], seconds: float = float("inf"), turns: tuple[int, ...] = ()) -> Stage:
    """Rows of (name, limit, the seconds that they take), in turn 1 or in these turns."""

    def run(taken):
        Here.now += taken
        return {"taken": taken}

    found = [
        Row(name, "m", functools.partial(run, taken), limit, turn)
        for (name, limit, taken), turn in zip(rows, turns or [1] * len(rows), strict=True)
    ]
    return Listed("s", found, seconds)


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(runner, "Worker", Here)
    monkeypatch.setattr(runner.time, "monotonic", lambda: Here.now)
    Here.now, Here.started, Here.ran, Here.limits, Here.made = 0.0, [], [], [], 0
    return Here


def quiet(line: str) -> None:
    pass


def test_the_budget_holds(here, file):
    """A row runs if half of its limit is left, and no longer than that; one with a smaller limit may still fit."""
    runner.run([stage(("a", 50, 40), ("b", 122, 1), ("c", 120, 50), ("d", 22, 1), ("e", 20, 1))], CPU, 100, file, quiet)
    assert here.ran == ["a / m", "c / m", "e / m"] and here.limits == [50, 60, 10]
    assert file.content["rows"]["s / b / m"]["not_run"] == "its limit is 122 s and 60 s were left"
    assert "10 s were left" in file.content["rows"]["s / d / m"]["not_run"]


def test_a_row_that_the_budget_ends_was_not_run_and_one_that_its_limit_ends_failed(here, file):
    runner.run([stage(("a", 50, 51), ("b", 70, 60))], CPU, 100, file, quiet)
    assert here.ran == ["a / m", "b / m"] and here.limits == [50, 50]
    assert file.content["rows"]["s / a / m"] == {"run": "run", "error": "killed after 50 s"}
    assert file.content["rows"]["s / b / m"]["not_run"] == "50 s were left and not enough"


def test_a_turn_of_all_stages_comes_before_the_next(here, file):
    stages = [stage(("a", 1, 1), ("b", 1, 1), turns=(2, 1)), stage(("c", 1, 1), ("d", 1, 1), turns=(1, 3))]
    runner.run(stages, CPU, 10, file, quiet)
    assert here.ran == ["b / m", "c / m", "a / m", "d / m"] and here.made == 2


def test_a_row_of_a_rehearsal_may_take_what_is_left(here, file):
    """No processor of its own is promised to it."""
    runner.run([stage(("a", 50, 40), ("b", 70, 60), ("c", 1, 1))], Setup(CPU.device, toy=True), 100, file, quiet)
    assert here.ran == ["a / m", "b / m"] and "not_run" in file.content["rows"]["s / c / m"]


def test_a_stage_has_a_limit_of_its_own(here, file):
    stages = [stage(("a", 50, 40), ("b", 42, 1), seconds=60), Listed("t", stage(("c", 50, 1)).module)]
    runner.run(stages, CPU, 1000, file, quiet)
    assert here.ran == ["a / m", "c / m"]


def test_a_stage_that_does_not_import_takes_no_other_with_it(here, file):
    broken = Stage("broken", "benchmarks.no_such_module")
    outcomes = runner.run([broken, stage(("a", 1, 1))], CPU, 10, file, quiet)
    assert here.ran == ["a / m"] and "No module named 'benchmarks.no_such_module'" in outcomes[0]["error"]


@pytest.mark.slow
def test_the_stages_import_where_only_the_tools_of_a_gpu_are():
    absent = ["accelerate", "denoising_diffusion_pytorch", "diffusers", "matplotlib", "PIL", "transformers"]
    code = f"""
import sys, torch
imported = [name for name in sys.modules if name.split(".")[0] in {absent}]
sys.modules.update(dict.fromkeys([*imported, *{absent}]))  # importing them is an error
from benchmarks.gpu.rows import STAGES, Setup
from benchmarks.gpu import report
print(all(stage.rows(Setup(torch.device("cpu"), toy=True)) for stage in STAGES))
"""
    done = forked.run("-c", code, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stdout == "True\n", done.stderr


def test_without_budget_no_process_starts(here, file):
    runner.run([stage(("a", 1, 1))], CPU, 0, file, quiet)
    assert here.started == [] and "not_run" in file.content["rows"]["s / a / m"]


def test_rows_that_are_there_are_skipped(here, file):
    runner.run([stage(("a", 6, 6), ("b", 10, 1))], CPU, 10, file, quiet)  # no time is left for b
    again = Results(file.path, "run", MACHINE)
    runner.run([stage(("a", 6, 6), ("b", 10, 1))], CPU, 10, again, quiet)
    assert here.ran == ["a / m", "b / m"]


def test_a_row_that_failed_is_not_tried_again_by_the_same_code(here, file):
    def fails():
        raise RuntimeError("no")

    rows = Listed("s", [Row("a", "m", fails, 1)])
    for _ in range(2):
        runner.run([rows], CPU, 10, Results(file.path, "run", MACHINE), quiet)
    assert here.ran == ["a / m"]


def test_rows_of_other_code_are_measured_again(here, file):
    runner.run([stage(("a", 5, 1), ("b", 9, 1))], CPU, 10, file, quiet)
    later = Results(file.path, "later", MACHINE)
    runner.run([stage(("a", 5, 2), ("b", 14, 2))], CPU, 8, later, quiet)  # no time is left for b
    a, b = (results.read(file.path)["rows"][f"s / {name} / m"] for name in "ab")
    assert (a["run"], a["figures"]) == ("later", {"taken": 2})
    assert (b["run"], b["figures"]) == ("run", {"taken": 1})  # an older figure is not lost
    assert set(results.read(file.path)["runs"]) == {"run", "later"}


def test_each_row_is_written_at_once(here, file):
    """An interruption loses nothing that was measured before it."""

    def interrupted():
        raise KeyboardInterrupt

    first = stage(("a", 1, 1)).module[0]
    with pytest.raises(KeyboardInterrupt):
        runner.run([Listed("s", [first, Row("b", "m", interrupted, 1)])], CPU, 10, file, quiet)
    assert list(results.read(file.path)["rows"]) == ["s / a / m"]
    assert [path.name for path in file.path.parent.iterdir()] == [file.path.name]


def test_a_run_that_no_row_refers_to_is_forgotten(file):
    file.put("s / a / m", {"figures": {}})
    later = Results(file.path, "later", MACHINE)
    later.put("s / a / m", {"figures": {}})
    assert list(later.content["runs"]) == ["later"]


def test_the_run_stands_for_code_and_versions(monkeypatch, tmp_path):
    code = tmp_path / "kernels" / "noise.py"
    code.parent.mkdir()
    code.write_text("one")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    first = results.this_run()
    (tmp_path / "README.md").write_text("a page is not measured")
    assert results.this_run() == first
    code.write_text("two")
    second = results.this_run()
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert len({first, second, results.this_run()}) == 3


def test_another_file_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match=r"a\.json: expected a JSON object with 'runs' and 'rows'"):
        Results(tmp_path / "a.json", "run", MACHINE)


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled_kernels(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_the_command_writes_results_and_page(compiled_kernels, tmp_path, capsys):
    """Without any budget: every row of every stage is there, as not run."""
    assert kit.main(["--device", "cpu", "--budget", "0", "--out", str(tmp_path)]) == 0
    content = results.read(tmp_path / "cpu.json")
    assert {key.split(" / ")[0] for key in content["rows"]} == {stage.name for stage in STAGES}
    (machine,) = content["runs"].values()
    assert machine["torch"] == torch.__version__ and machine["triton"] == triton.__version__
    assert (tmp_path / "cpu.md").read_text() == report.markdown(content)
    assert "sampling / SD 1.5 U-Net, batch 1 / accelerate graph: not run" in capsys.readouterr().out


def test_the_command_runs_the_chosen_stage(compiled_kernels, here, monkeypatch, tmp_path):
    """The exit status says whether a row failed."""
    good, bad = stage(("a", 1, 1)), Listed("bad", [Row("b", "m", lambda: {"length": len(3)}, 1)])  # type: ignore[arg-type]
    monkeypatch.setattr(kit, "STAGES", [good, bad])
    command = ["--device", "cpu", "--out", str(tmp_path), "--stage"]
    assert kit.main([*command, "s"]) == 0 and here.ran == ["a / m"]
    assert kit.main([*command, "s", "bad"]) == 1 and here.ran == ["a / m", "b / m"]


def test_without_a_gpu(compiled_kernels, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        kit.main([])
    assert stop.value.code == 2 and "--device cpu rehearses" in capsys.readouterr().err


def test_the_interpreter_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        kit.main(["--device", "cpu", "--out", str(tmp_path)])


def test_wheels_are_put_on_the_path(monkeypatch, tmp_path):
    """For this process and for those that it starts, and only as long as the kit runs."""
    monkeypatch.setenv("PYTHONPATH", "before")
    with zipfile.ZipFile(tmp_path / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried/__init__.py", "value = 7\n")
    path = list(sys.path)
    with packages.on_path(tmp_path):
        command = [sys.executable, "-c", "import carried; print(carried.value)"]
        assert subprocess.run(command, capture_output=True, text=True).stdout == "7\n"
        assert sys.path[1:] == path and os.environ["PYTHONPATH"].endswith(os.pathsep + "before")
    assert sys.path == path and os.environ["PYTHONPATH"] == "before"


def test_a_machine_without_tools_or_home(monkeypatch):
    """What is missing is named, and Triton gets a folder to compile into, as long as the kit runs."""
    for name in ("CC", "TRITON_HOME", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    assert packages.lacking().startswith("a C compiler, ") and packages.lacking().endswith("nvidia-smi")
    with packages.with_home():
        assert "TRITON_HOME" not in os.environ
    monkeypatch.setenv("HOME", "/proc/none")
    with packages.with_home():
        home = Path(os.environ["TRITON_HOME"])
        assert os.access(home, os.W_OK)
    assert "TRITON_HOME" not in os.environ and not home.exists()


# --- the report ---------------------------------------------------------------------------------------------------


def job(per_s: float) -> dict:
    return {"figures": {"per_s": per_s, "kernels_per_step": 220.0, "off_float32": 0.004}}


@pytest.fixture
def reported(file):
    for method, per_s in (("diffusers eager", 5.0), ("diffusers max-autotune", 8.0), ("fastdiff graph", 12.0)):
        file.put(f"sampling / cifar10 U-Net, batch 1 / {method}", job(per_s))
    file.put("sampling / cifar10 U-Net, batch 16 / fastdiff graph", {"not_available": "no option\n'graph'"})
    file.put("operations / normal / float32 2x2", {"figures": {"fused": 0.5, "reference": 2.0, "copy": 0.25}})
    file.put("checks / tests / marked gpu", {"error": "RuntimeError: 1 failed"})
    file.put("host / normal / float32 2x2", {"not_run": "its limit is 20 s and 3 s were left"})
    return file


def test_the_page(reported):
    text = report.markdown(reported.content)
    assert text.startswith("# A GPU\n") and "- torch: 2.11.0" in text
    assert "| cifar10 U-Net, batch 1 | fastdiff graph | 12 | 220 | 0.004 |" in text
    assert "| normal | float32 2x2 | 0.5 | 2 | 0.25 | 4.00 | 0.50 |" in text
    assert "- cifar10 U-Net, batch 16 / fastdiff graph: not available: no option 'graph'\n" in text
    assert "- tests / marked gpu: FAILED: RuntimeError: 1 failed\n" in text
    assert "- normal / float32 2x2: not run: its limit" in text


def test_the_page_says_which_run_a_row_is_of(reported):
    Results(reported.path, "later", MACHINE).put("sampling / cifar10 U-Net, batch 1 / fastdiff graph", job(13.0))
    text = report.markdown(results.read(reported.path))
    assert "| fastdiff graph | 13 | 220 | 0.004 | `later` |" in text and "| 5 | 220 | 0.004 | `run` |" in text


def test_the_readme_gets_the_best_of_ours_and_of_the_others(reported, tmp_path):
    figures = {"fused": 0.5, "reference": 2.0, "compile": 1.5}
    reported.put("operations / forward_noising / bfloat16 256x3x256x256", {"figures": figures})
    readme = tmp_path / "README.md"
    readme.write_text(f"Before.\n{report.BEGIN}\nold\n{report.END}\nAfter.\n")
    report.write_all(tmp_path, readme)
    text = readme.read_text()
    assert "| sampling, cifar10 U-Net, batch 1 | 12 images/s | 8 images/s, diffusers max-autotune | 1.50x |" in text
    assert "| noising | 0.5 ms | 1.5 ms, torch.compile | 3.00x |" in text
    assert text.startswith(f"Before.\n{report.BEGIN}\n[A GPU](a-gpu.md)") and text.endswith(f"{report.END}\nAfter.\n")
    assert "old" not in text and "batch 16" not in text
    report.write_all(tmp_path, readme)
    assert readme.read_text() == text


def test_other_files_in_the_folder_are_left_alone(reported, tmp_path):
    (tmp_path / "other.json").write_text('{"rows": []}')
    (tmp_path / "README.md").write_text("")
    report.write_all(tmp_path, tmp_path / "README.md")
    assert sorted(path.name for path in tmp_path.glob("*.md")) == ["README.md", "a-gpu.md"]


def test_a_readme_without_the_marks_is_left_alone(reported, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("Nothing.\n")
    report.write_all(tmp_path, readme)
    assert readme.read_text() == "Nothing.\n" and (tmp_path / "a-gpu.md").exists()


@pytest.mark.parametrize("path", results.files(ROOT / "benchmarks" / "results"), ids=lambda path: path.stem)
def test_the_published_pages_are_those_of_their_results(path):
    assert path.with_suffix(".md").read_text(encoding="utf-8") == report.markdown(results.read(path))


def test_the_first_figures_are_readable():
    """Those of the kit before this one."""
    text = (ROOT / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3.md").read_text(encoding="utf-8")
    assert "| reverse_update | bfloat16 256x3x256x256 | 0.1004 |" in text and "SIGSEGV" in text
