"""benchmarks/gpu_check.py: each part in a cheap form, and its way on a GPU with stand-ins for what is not here."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import triton

from benchmarks import workloads as _workloads
from benchmarks.static import roofline

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def gpu_check(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "benchmarks" / "gpu" / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # a minute of it elsewhere
    return module


@pytest.fixture
def short(gpu_check, monkeypatch):
    """Parts that take no time, and the report that they give."""
    monkeypatch.setattr(gpu_check, "cases", lambda device, size: [(torch.float32, (2, 3, 4, 4))])
    monkeypatch.setattr(gpu_check, "medians", lambda functions, *_: [0.25 for f in functions for _ in (f(),)])
    monkeypatch.setattr(gpu_check, "tests", lambda: {"exit": 0, "passed": 3, "failures": [], "seconds": 1})
    return gpu_check


def report_of(folder: Path, name: str) -> tuple[dict, str]:
    return json.loads((folder / f"{name}.json").read_text()), (folder / f"{name}.md").read_text()


def test_the_rehearsal(short, tmp_path, capsys):
    """Everything but the test suite and the clock: checks against the reference, sampling, both files, exit status."""
    assert short.main(["--device", "cpu", "--size", "quick", "--out", str(tmp_path / "new")]) == 0
    report, text = report_of(tmp_path / "new", "cpu")
    assert report["errors"] == {} and report["tests"]["passed"] == 3 and not report["sanitizer"]["ran"]
    assert report["machine"]["triton"] == triton.__version__ and report["machine"]["torch"] == torch.__version__
    assert [line["operation"] for line in report["operations"]] == [*short.OPERATIONS, *short.KERNELS]
    assert all(line[key] == 250.0 for line in report["operations"] for key in ("fused", "reference", "compile", "copy"))
    assert report["sampling"] == {"steps": 5, "eager": 250.0, "compiled": 250.0}
    rows = text.count("| 2x3x4x4 | 250.0000 | 250.0000 | 250.0000 | 1.00 | 1.00 | - | - | - |")
    assert rows == len(short.OPERATIONS | short.KERNELS)
    assert text in capsys.readouterr().out


def test_a_part_that_fails_is_named_and_stops_no_other(short, monkeypatch, tmp_path):
    class Wrong(torch.nn.Module):
        sample_shape = (3, 4, 4)

        def __init__(self):
            super().__init__()
            self.calls = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x, t):
            self.calls.data += 0.01
            return x * self.calls

    monkeypatch.setattr(short, "network", lambda device: Wrong())
    assert short.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    report, text = report_of(tmp_path, "cpu")
    assert report["sampling"] is None and "compiled sampling is" in report["errors"]["sampling"]
    assert len(report["operations"]) == len(short.OPERATIONS | short.KERNELS)
    assert "sampling FAILED: RuntimeError" in text


def test_an_interruption_loses_no_part_before_it(short, monkeypatch, tmp_path):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(short, "operations", interrupted)
    with pytest.raises(KeyboardInterrupt):
        short.main(["--device", "cpu", "--out", str(tmp_path)])
    report, text = report_of(tmp_path, "cpu")
    assert report["tests"]["passed"] == 3 and "operations" not in report and "'passed': 3" in text


def test_a_result_that_is_not_the_reference_is_not_timed(short, monkeypatch, tmp_path):
    monkeypatch.setitem(_workloads.BOUND, torch.float32, 0.0)
    assert short.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    report, text = report_of(tmp_path, "cpu")
    assert all("off the float64 reference" in line["error"] and "fused" not in line for line in report["operations"])
    assert text.count("FAILED: RuntimeError") == len(short.OPERATIONS | short.KERNELS)


def test_a_test_that_fails_is_the_exit_status(short, monkeypatch, tmp_path):
    monkeypatch.setattr(short, "tests", lambda: {"exit": 1, "failed": 1, "failures": ["tests/test_x.py::test"]})
    for part in ("operations", "sampling"):
        monkeypatch.setattr(short, part, lambda *args: None)
    assert short.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "tests/test_x.py::test" in report_of(tmp_path, "cpu")[1]


TOOL = """#!/bin/sh
echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" >> "$0.log"
[ "$2" = memcheck ] && echo "==== ERROR SUMMARY: 0 errors" && exit
echo "==== RACECHECK SUMMARY: 2 hazards displayed"
exit 9
"""


def test_on_a_gpu(short, monkeypatch, tmp_path):
    """What is asked of PyTorch, Triton and compute-sanitizer where there is a GPU."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(TOOL)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(
        triton.testing, "do_bench_cudagraph", lambda f, rep, return_mode: asked.append((rep, return_mode)) or f()
    )
    monkeypatch.setattr(short, "clock", lambda device: time.perf_counter())

    def timed(device: torch.device, _: object) -> None:
        assert short.milliseconds([lambda: 3.0] * 4, device, 1.0) == [3.0] * 4
        assert 1000 <= short.host_microseconds(lambda: time.sleep(0.001), device, calls=2) < 100_000

    for part in ("operations", "sampling"):
        monkeypatch.setattr(short, part, timed)
    assert short.main(["--out", str(tmp_path)]) == 1  # for the hazards
    report, text = report_of(tmp_path, "nvidia-h100-80gb-hbm3")
    assert asked == [(25, "median")] * 8
    said = report["sanitizer"]
    assert said["ran"] and said["exit"] == 9 and said["memcheck"] == "ERROR SUMMARY: 0 errors"
    assert said["racecheck"] == "RACECHECK SUMMARY: 2 hazards displayed"
    assert "cuda (NVIDIA H100 80GB HBM3)" in text and "2 hazards" in text
    first, _ = (tmp_path / "compute-sanitizer.log").read_text().split("1 --tool racecheck")
    assert first.startswith(f"1 --tool memcheck --error-exitcode 9 {sys.executable} -c") and first.endswith("cuda\n")


def test_without_a_gpu(gpu_check, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        gpu_check.main([])
    assert stop.value.code == 2 and "--device cpu rehearses" in capsys.readouterr().err


def test_what_the_sanitizer_is_given_launches_every_kernel(gpu_check):
    script = gpu_check.LAUNCHES.replace("64, 64", "8, 32")
    script = "import triton.runtime.interpreter as i\nrun, seen = i.GridExecutor.__call__, set()\n" + (
        "def call(self, *args, **kwargs):\n    seen.add(self.fn.__name__)\n    run(self, *args, **kwargs)\n"
        f"i.GridExecutor.__call__ = call\n{script}\nprint(*sorted(seen))\n"
    )
    environment = {"TRITON_INTERPRET": "1", "FASTDIFF_BACKEND": "triton", "PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", script, "cpu"], env=environment, capture_output=True, text=True)
    known = {f"{kernel}_kernel" for kernel, _, _ in roofline.COMMON + roofline.RARE}
    assert done.stdout.split() == sorted(known), done.stderr


def test_the_outcome_of_the_tests_is_read(gpu_check, monkeypatch, tmp_path):
    assert all((ROOT / "tests" / f"test_{name}.py").is_file() for name in gpu_check.TESTS)
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_small.py").write_text("def test_a(): pass\n\n\ndef test_b(): assert False\n")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "TESTS", ["small"])
    found = gpu_check.tests()
    assert {**found, "seconds": 0} == {
        "exit": 1, "passed": 1, "failed": 1, "failures": ["tests/test_small.py::test_b"], "seconds": 0,
    }  # fmt: skip
