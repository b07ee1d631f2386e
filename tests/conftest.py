"""Where the kernels run, which implementation a test gets by default, and how many examples a property sees.

Without CUDA the Triton kernels run in Triton's interpreter on CPU tensors, which has to be asked for before anything
imports triton, and every launch of the suite is watched by the sanitizer. Child processes inherit both variables, so
that none of them interprets kernels by accident. FASTDIFF_EMULATOR=sm_90 executes compiled kernels instead, as
benchmarks/emulator does; it is for `pytest tests/ops -k triton`.
"""

import gc
import os
import sys
from collections.abc import Iterator

import cpu_times
import pytest

# Bytecode is kept whatever the environment says: compiling the tests takes each worker seconds, and the package each
# program that a test starts.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Inductor compiles its headers ahead by default, which takes longer than the few kernels of the tests.
os.environ.setdefault("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")

# A pytest that a test starts is no worker of pytest-xdist.
for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
    os.environ.pop(name, None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-times", type=float, metavar="SECONDS", help="list the tests that take more processor time")


def pytest_configure(config: pytest.Config) -> None:
    limit = config.getoption("--cpu-times")
    if limit is not None:
        config.pluginmanager.register(cpu_times.CpuTimes(limit))
    if not getattr(config.option, "numprocesses", None) or hasattr(config, "workerinput"):
        prepare()  # a process that hands the tests to workers runs none


def prepare() -> None:
    gc.disable()  # the imports and the collection of tests, which make no garbage
    import torch
    import torch.fx.traceback as stacks
    from hypothesis import HealthCheck, settings

    if target := os.environ.get("FASTDIFF_EMULATOR"):
        from benchmarks.emulator.driver import Emulator

        Emulator(target)
    elif not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["FASTDIFF_BACKEND"] = "reference"

        import quick_interpreter
        import sanitizer

        import fastdiff

        fastdiff.backend("reference")  # a conftest below may have imported it before the variable was set
        quick_interpreter.install()
        sanitizer.install()

    # Autograd notes the stack of each node of a graph that it traces, for messages alone, and spells it out each time.
    spelled = stacks.format_stack
    stacks.format_stack = lambda: spelled() if stacks.should_preserve_node_meta else []
    torch.set_num_threads(1)
    settings.register_profile("default", max_examples=20, deadline=None, derandomize=True)
    settings.register_profile("deep", max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_finish() -> None:
    """What was imported stays: a collection of garbage need not walk through it again. What the tests make mostly stays
    too, so that whole collections are rarer than by default."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # a keyword is also the name of a folder
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(autouse=True)
def reference_backend() -> Iterator[None]:
    """Plain PyTorch, unless the test asks for the kernels."""
    import fastdiff

    with fastdiff.backend("reference"):
        yield


@pytest.fixture
def cpu_kernels() -> Iterator[None]:
    """For hundreds of steps of a tiny network, whose time would be that of plain PyTorch's noise and updates. What they
    have no code for, such as float64, is plain PyTorch all the same."""
    import fastdiff

    with fastdiff.backend("cpu"):
        yield
