"""What the first call of each CPU kernel costs in a fresh process, with an empty and a filled cache of compiled code.

extra_info holds s_per_process, the time of the whole process with its imports; and cpu_seconds, the processor time of
the process in the first call of each op, without the imports.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.suite import full

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import time, torch, numba
from fastdiff import ops
x, pred, t = torch.zeros(1, 8), torch.zeros(1, 8, requires_grad=True), torch.zeros(1, dtype=torch.int64)
start = time.process_time()
ops.noising(x, t, torch.ones(1, 2))
first = time.process_time()
(3 * ops.loss(pred, t, torch.ones(1, 3), seed=1)).backward()
ops.update(x, x, torch.ones(1, 9), t)
ops.normal((1, 8))
print(first - start, time.process_time() - start)
"""


@pytest.mark.parametrize("row", ["empty", "filled"])
@full
def test_first_call(benchmark: BenchmarkFixture, row: str, tmp_path: Path) -> None:
    benchmark.group = "first call of each CPU kernel"
    seconds: list[tuple[float, ...]] = []

    def call() -> None:
        folder = str(tmp_path) if row == "filled" else tempfile.mkdtemp(dir=tmp_path)
        variables = {**os.environ, "NUMBA_CACHE_DIR": folder, "FASTDIFF_BACKEND": "cpu"}
        command = [sys.executable, "-c", SCRIPT]
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=True)
        seconds.append(tuple(float(number) for number in done.stdout.split()))

    benchmark.pedantic(call, rounds=3, warmup_rounds=int(row == "filled"))
    noising, every = (statistics.median(column) for column in zip(*seconds, strict=True))
    benchmark.extra_info |= {"row": row, "cpu_seconds": {"noising": noising, "every op": every}}
    if benchmark.stats is not None:
        benchmark.extra_info["s_per_process"] = benchmark.stats.stats.median
