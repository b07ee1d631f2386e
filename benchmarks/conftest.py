"""Options of `pytest benchmarks/`, what runs without --full, and the table at the end."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import summary
from benchmarks.workloads import refuse_interpreter

# Seconds that the rows of torch.compile may take together, unless --full: compiling takes longer than all timing.
COMPILE_SECONDS = 150
COMPILED = ("compile", "compiled", "diffusers compiled")
# Warnings that say nothing about what is measured, each by the start of its text.
IGNORED = (
    "schedule. alpha_bar_T = :UserWarning",  # chains of a few steps leave signal; their time counts, not their images
    "__array__ implementation doesn't accept a copy:DeprecationWarning",  # diffusers makes an array of a tensor
    "`torch.jit.script_method` is deprecated:DeprecationWarning",  # Inductor's import of mkldnn modules
)
Results = list[tuple[str, Mapping[str, Any]]]
RESULTS = pytest.StashKey[Results]()
SPENT = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="every row and size, without a limit on torch.compile")


def pytest_configure(config: pytest.Config) -> None:
    try:
        refuse_interpreter()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    config.addinivalue_line("markers", "full: runs with --full only")
    for warning in IGNORED:
        config.addinivalue_line("filterwarnings", f"ignore:{warning}")
    config.option.benchmark_quiet = True  # pytest-benchmark's own table; --benchmark-verbose brings it back
    config.stash[RESULTS], config.stash[SPENT] = [], 0.0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    rare = [item for item in items if "full" in item.keywords]
    config.hook.pytest_deselected(items=rare)
    items[:] = [item for item in items if "full" not in item.keywords]


@pytest.fixture(autouse=True)
def keep_figures(benchmark: BenchmarkFixture, pytestconfig: pytest.Config) -> Iterator[None]:
    """Give the figures of a benchmark to the table."""
    yield
    pytestconfig.stash[RESULTS].append((benchmark.group, dict(benchmark.extra_info)))


@pytest.fixture(autouse=True)
def limit_compiling(request: pytest.FixtureRequest) -> Iterator[None]:
    """Skip a row of torch.compile once such rows have taken COMPILE_SECONDS, and start each one without old code."""
    config = request.config
    if request.node.callspec.params.get("row") not in COMPILED:
        yield
        return
    if config.stash[SPENT] > COMPILE_SECONDS and not config.getoption("--full"):
        pytest.skip(f"rows of torch.compile have taken {COMPILE_SECONDS} s: run with --full")
    torch.compiler.reset()
    start = time.perf_counter()
    yield
    config.stash[SPENT] += time.perf_counter() - start


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    results: Results = config.stash[RESULTS]
    if groups := summary.groups(results):
        terminalreporter.section("fastdiff and what it is compared with")
        for line in summary.table(groups):
            terminalreporter.write_line(line)
        if not config.getoption("--full"):
            terminalreporter.write_line("More sizes and rows run with --full.")
