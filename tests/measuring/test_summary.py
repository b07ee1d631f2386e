"""The table that the benchmark suite ends with, and which of its rows run."""

import os
import re
import subprocess
from pathlib import Path

import forked
import pytest

from benchmarks import conftest, summary
from benchmarks.peers import peer_names
from benchmarks.workloads import OPERATIONS

ROOT = Path(__file__).resolve().parents[2]
NOISING = "forward_noising float32 64x3x64x64"
RESULTS = [
    (NOISING, {"row": "fused", "ns_per_element": 0.25, "copy_fraction": 0.91}),
    (NOISING, {"row": "reference", "ns_per_element": 2.5, "copy_fraction": 0.09}),
    (NOISING, {"row": "diffusers", "ns_per_element": 3.0, "copy_fraction": 0.08}),
    ("sampling ddpm small, batch 4, 8 steps", {"row": "reference", "images_per_s": 50.0}),
    ("sampling ddpm small, batch 4, 8 steps", {"row": "fused", "images_per_s": 75.0}),
    ("sampling ddim small, batch 4, 8 steps", {"row": "fused", "images_per_s": 80.0}),
]


def cells(lines, start):
    (line,) = (line for line in lines if line.startswith(start))
    return line[summary.LABEL :].split()


def test_groups_keep_what_is_compared_together():
    found = summary.groups(RESULTS)
    assert list(found) == [NOISING, *(f"sampling {s} small, batch 4, 8 steps" for s in ("ddpm", "ddim"))]
    assert found[NOISING].figures == {"fused": 0.25, "reference": 2.5, "diffusers": 3.0}
    assert found[NOISING].copy_fraction == 0.91


def test_a_ratio_is_time_over_the_time_of_fastdiff():
    """For a time and for a rate."""
    found = summary.groups(RESULTS)
    assert summary.ratios(found[NOISING]) == {"reference": 10.0, "diffusers": 12.0}
    assert summary.ratios(found["sampling ddpm small, batch 4, 8 steps"]) == {"reference": 1.5}


def test_the_table():
    lines = summary.table(summary.groups(RESULTS))
    assert cells(lines, NOISING) == ["0.250", "2.50", "10.0x", "3.00", "12.0x", "0.91"]
    assert cells(lines, "sampling ddpm") == ["75.0", "50.0", "1.50x"]
    assert cells(lines, "sampling ddim") == ["80.0", "-"]
    titles = [line.split() for line in lines if line.startswith(" ")]
    rates, times = ["fastdiff", "eager", "PyTorch"], ["fastdiff", "eager", "PyTorch", "diffusers", "of", "a", "copy"]
    assert titles == [rates, times]
    assert [line for line in lines if line.endswith("is better")] == [
        "images per second, higher is better", "nanoseconds per element, lower is better"
    ]  # fmt: skip
    assert max(map(len, lines)) <= 140


@pytest.mark.parametrize(("value", "text"), [(0.0123, "0.0123"), (1.5, "1.50"), (12.34, "12.3"), (1234.5, "1234")])
def test_three_digits(value, text):
    results = [("g", {"row": "fused", "us_per_call": value})]
    assert cells(summary.table(summary.groups(results)), "g ") == [text]


def test_without_timing_there_is_no_table():
    assert summary.table(summary.groups([("g", {"row": "fused", "ns_per_element": float("nan")}), ("h", {})])) == []


@pytest.mark.parametrize(
    "second", [{"row": "fused", "us_per_call": 1.0}, {"row": "reference", "images_per_s": 1.0}], ids=["row", "unit"]
)
def test_a_group_of_things_that_do_not_compare_is_refused(second):
    with pytest.raises(ValueError, match="group 'g': expected each row once and one unit"):
        summary.groups([("g", {"row": "fused", "us_per_call": 1.0}), ("g", second)])


SUITE = """
import pytest
from benchmarks.suite import full

@pytest.mark.parametrize("row", ["fused", pytest.param("diffusers", marks=full), "compile", "compiled"])
def test_row(benchmark, row):
    benchmark.group = "addition"
    benchmark(lambda: 1 + 1)
    benchmark.extra_info |= {"row": row, "us_per_call": {"fused": 2.0}.get(row, 5.0)}
"""
CONFTEST = """
from benchmarks import conftest
from benchmarks.conftest import *
conftest.COMPILE_SECONDS = 0
"""


def run_pytest(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    own = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTDIFF_BACKEND")}
    brief = ["--benchmark-max-time=0.01", "--benchmark-min-rounds=1"]
    command = ["-m", "pytest", "-rs", "-p", "no:cacheprovider", "--benchmark-only", *brief, ".", *options]
    return forked.run(*command, cwd=folder, env=own | {"PYTHONPATH": str(ROOT)})


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_rows.py").write_text(SUITE)
    return folder


@pytest.mark.slow
def test_the_suite_ends_with_the_table_and_bounds_compiling(suite):
    """The first row of torch.compile spends the budget of 0 s, so that the second one does not run."""
    done = run_pytest(suite)
    assert done.returncode == 0, done.stdout
    assert "2 passed, 1 skipped, 1 deselected" in done.stdout
    assert "rows of torch.compile have taken 0 s: run with --full" in done.stdout
    assert cells(done.stdout.splitlines(), "addition") == ["2.00", "5.00", "2.50x"]
    assert "More sizes and rows run with --full." in done.stdout
    assert "OPS" not in done.stdout and "warnings summary" not in done.stdout  # pytest-benchmark's own table


@pytest.mark.slow
def test_full_runs_everything(suite):
    done = run_pytest(suite, "--full")
    assert "4 passed" in done.stdout and "deselected" not in done.stdout, done.stdout
    assert cells(done.stdout.splitlines(), "addition") == ["2.00", *["5.00", "2.50x"] * 3]


def test_the_suite_does_not_time_the_interpreter(monkeypatch, pytestconfig):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(pytest.UsageError, match="TRITON_INTERPRET: expected it unset"):
        conftest.pytest_configure(pytestconfig)


@pytest.mark.slow
def test_the_rows_of_the_suite():
    """By default each operation has all of its peers, ddpm and ddim stand apart, and nothing runs twice."""
    done = run_pytest(ROOT / "benchmarks", "--collect-only", "-q")
    rows = [line.split("::")[1] for line in done.stdout.splitlines() if "::" in line]
    assert len(rows) == len(set(rows)) and 100 <= len(rows) <= 140, done.stdout
    for operation in OPERATIONS:
        for row in ("fused", "reference", "compile", *peer_names(operation)):
            assert f"test_operation[{operation}-float32-64x3x64x64-{row}]" in rows
    for sampler in ("ddpm", "ddim"):
        for row in ("fused", "reference", "compile"):
            assert any(re.fullmatch(rf"test_sampling\[small-\d+-{sampler}-{row}\]", name) for name in rows)
    assert not any("cifar10" in row or "first_call" in row for row in rows)
