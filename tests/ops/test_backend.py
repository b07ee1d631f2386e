"""Which implementation of an op runs."""

import os
import subprocess
import sys

import forked
import pytest
import torch
from cpu_operands import rows
from torch import Tensor

import fastdiff
from fastdiff import ops, reference
from fastdiff.ops import dispatch as _backend
from fastdiff.ops import quick

X, META = torch.zeros(2, 3), torch.zeros(2, 3, device="meta")
DOUBLE = torch.zeros(2, 3, dtype=torch.float64)


@pytest.fixture
def interpreter(monkeypatch):
    """Sets TRITON_INTERPRET, as a process would start with it."""

    def set_to(value: str | None) -> None:
        if value is None:
            monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        else:
            monkeypatch.setenv("TRITON_INTERPRET", value)
        _backend.interpreting.cache_clear()

    yield set_to
    _backend.interpreting.cache_clear()


@pytest.fixture
def chosen(monkeypatch):
    """Which implementation ran each op since the last look, instead of running it."""
    seen = []

    class Launchers:
        def __init__(self, name):
            self.CODES = {torch.float32: 0}
            self.noising = lambda **operands: seen.append(name)

    def plain(x0, *args):
        seen.append("reference")
        return x0.clone()

    monkeypatch.setattr(_backend, "launchers", Launchers)
    monkeypatch.setattr(reference, "noising", plain)

    def look(x: Tensor = X) -> str:
        quick.forget()  # a plan repeats the launches that were noted, and these launch nothing
        ops.noising(x, 0, rows(2, torch.float32), seed=1)
        return seen.pop()

    return look


def test_backend_forces_an_implementation(chosen, interpreter):
    interpreter("1")
    for name in ("triton", "cpu", "reference"):
        with fastdiff.backend(name):
            assert chosen() == name
            assert chosen(DOUBLE) == "reference"


def test_backends_nest_and_end_with_their_block(chosen):
    with fastdiff.backend("cpu"):
        with pytest.raises(KeyError), fastdiff.backend("reference"):
            assert chosen() == "reference"
            raise KeyError
        assert chosen() == "cpu"
        before = fastdiff.backend("reference")
        assert chosen() == "reference"
        before.__exit__()
        assert chosen() == "cpu"


def test_the_default_backend_of_cpu_tensors(chosen, interpreter, monkeypatch):
    with fastdiff.backend(None):
        interpreter("1")
        assert chosen() == "triton"
        interpreter(None)
        assert chosen() == "cpu"
        monkeypatch.setitem(sys.modules, "numba", None)
        _backend.has_numba.cache_clear()
        try:
            with pytest.warns(UserWarning, match=r"pip install 'fastdiff-kernels\[cpu\]'") as caught:
                assert chosen() == chosen() == "reference"
            assert len(caught) == 1, "one hint is enough"
        finally:
            _backend.has_numba.cache_clear()


def test_backends_that_cannot_be(interpreter):
    with pytest.raises(ValueError, match="backend: expected one of triton, cpu, reference or None, got 'cuda'"):
        fastdiff.backend("cuda")
    interpreter(None)
    with fastdiff.backend("triton"), pytest.raises(ValueError, match="TRITON_INTERPRET=1, got device cpu"):
        ops.noising(X, 0, rows(2), seed=1)
    with (
        fastdiff.backend("cpu"),
        pytest.raises(ValueError, match="backend: 'cpu' expected a CPU tensor, got device meta"),
    ):
        _backend.kernels_of(META)


def own_variables() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTDIFF_BACKEND")}


@pytest.mark.slow
def test_import_needs_no_optional_package():
    optional = ("triton", "numba", "safetensors", "tqdm", "sklearn", "PIL")
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import fastdiff, fastdiff.ddpm, fastdiff.unet, fastdiff.schedule, fastdiff.steps\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        f"print(sorted(new & set({optional})), len(new) > 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=own_variables(), capture_output=True, text=True)
    assert done.stdout.strip() == "[] True", done.stderr


@pytest.mark.slow
def test_the_environment_chooses_the_backend():
    script = (
        "import torch, fastdiff\n"
        "from fastdiff import ops\n"
        "print(fastdiff.ops.dispatch.forced())\n"
        "try: ops.normal((1, 4), 1)\n"
        "except ValueError as error: print(error)\n"
    )
    done = forked.run("-c", script, env=own_variables() | {"FASTDIFF_BACKEND": "triton"})
    assert done.stdout.splitlines() == [
        "triton",
        "backend: 'triton' expected a GPU tensor or TRITON_INTERPRET=1, got device cpu",
    ], done.stderr
    done = forked.run("-c", script, env=own_variables() | {"FASTDIFF_BACKEND": "fast"})
    assert done.returncode == 1 and "ValueError: backend: expected one of triton, cpu, reference" in done.stderr
