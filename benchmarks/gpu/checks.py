"""Slow checks: compute-sanitizer over launches of every kernel, the tests marked gpu, and a packaged step."""

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from .launches import OPERATIONS
from .results import ROOT
from .rows import Figures, NotAvailable, Row, Setup


def sanitizer(tool: str, name: str, setup: Setup) -> Figures:
    """What a tool of compute-sanitizer says of the launches of an operation."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise NotAvailable("compute-sanitizer is not installed")
    # Each tensor its own allocation: within a block of PyTorch's cache an access beside a tensor is not found.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    launches = [sys.executable, "-m", "benchmarks.gpu.launches", name, str(setup.device)]
    command = [program, "--tool", tool, "--error-exitcode", "9", *launches]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", done.stdout + done.stderr)
    summary = found[-1] if found else f"no summary: {done.stderr.strip()[-500:]}"
    if done.returncode:
        raise RuntimeError(summary)
    return {"summary": summary}


def tests(arguments: Sequence[str]) -> Figures:
    """Outcome counts of tests, which run on the GPU where there is one, and the files that could not be imported.

    arguments: which, for pytest.
    """
    # Most of the time is compilation, one processor for each worker.
    workers = ["-n", "auto"] if find_spec("xdist") else []
    # A file that imports what is not there does not keep the others from running.
    options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    command = [sys.executable, "-m", "pytest", *options, *workers, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-500:]])[-1]
    failures = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    files = [name for name in failures if "::" not in name]  # that import what is not there
    counts: Figures = {word: int(count) for count, word in re.findall(r"(\d+) (passed|skipped)", last)}
    if done.returncode and not (failures == files and counts.get("passed")):
        raise RuntimeError("\n".join([last, *failures]))
    return counts | ({"not imported": ", ".join(files)} if files else {})


def packaged_step(device: str, kind: str, setup: Setup) -> Figures:
    """A packaged step of stock PyTorch or of fastdiff, in a process of its own: it may die."""
    how = setup.size([], ["quickly"])
    command = [sys.executable, "-m", "benchmarks.gpu.packaged_step", device, kind, *how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        _, _, error = done.stderr.strip().rpartition("RuntimeError: ")
        raise RuntimeError(f"exit code {done.returncode}: {error[:1800]}")
    return {"runs": True}


def rows(setup: Setup) -> list[Row]:
    def sanitized(tool: str) -> list[Row]:
        return [Row(tool, name, functools.partial(sanitizer, tool, name, setup), 120, turn=3) for name in OPERATIONS]

    def tested(case: str, method: str, arguments: list[str], seconds: float) -> Row:
        chosen = setup.size(arguments, ["--version"])
        return Row(case, method, functools.partial(tests, chosen), seconds, turn=3)

    packaged = "tests/models/test_graphs.py::test_a_packaged_step_runs_in_another_process"
    devices = dict.fromkeys(["cpu", setup.device.type])
    packages = [
        Row("packaged step", f"{kind}, {device}", functools.partial(packaged_step, device, kind, setup), 180, turn=3)
        for kind in setup.size(["stock", "fastdiff"], ["stock"])
        for device in devices
    ]
    return [
        *sanitized("racecheck"),
        tested("tests", "marked gpu", ["-m", "gpu", "tests"], 180),
        *packages,
        tested("packaged step", "fastdiff's test", [packaged], 120),
        *sanitized("memcheck"),
        tested("tests", "ops and kernels", ["-m", "not gpu", "tests/ops", "tests/kernels"], 300),
    ]
