"""`python -m benchmarks`: rows that agree before they are timed, the table, its files and its errors."""

import functools
import json

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import fastdiff
from benchmarks import peers, pictures, table, timing
from benchmarks.__main__ import main
from benchmarks.kernel_workloads import KERNEL_TENSORS, KERNELS
from benchmarks.workloads import OPERATIONS, Row
from fastdiff import ops

# denoising-diffusion-pytorch compiles a function when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
CPU, SHAPE = torch.device("cpu"), (3, 3, 8, 8)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_agree_with_the_reference(operation, dtype):
    with fastdiff.backend("cpu"):
        rows = OPERATIONS[operation](SHAPE, dtype, CPU) | peers.peer_rows(operation, SHAPE, dtype, CPU)
        assert {"fused", "reference", "compile", "preallocated"} <= rows.keys()
        for name in rows.keys() - {"compile"}:
            rows[name].check()
            rows[name].run()


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rows_of_every_other_kernel_agree(kernel, dtype, backend):
    with fastdiff.backend(backend):
        rows = KERNELS[kernel](SHAPE, dtype, CPU)
        for name in ("fused", "reference"):
            rows[name].check()
            rows[name].run()
    assert rows.keys() == {"fused", "reference", "compile"} and kernel in KERNEL_TENSORS


def test_a_kernel_that_disagrees_is_refused(monkeypatch):
    def larger(function):
        """But in float64, which is the reference."""

        def call(*args, **kwargs):
            wide = any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in tree_leaves((args, kwargs)))
            return tree_map(lambda t: t if wide else 1.1 * t, function(*args, **kwargs))

        return functools.wraps(function)(call)

    for name in (name for name in ops.__all__ if callable(getattr(ops, name))):
        monkeypatch.setattr(ops, name, larger(getattr(ops, name)))
    for kernel in KERNELS:
        with pytest.raises(RuntimeError, match=f"{kernel} fused: part 0 is"):
            KERNELS[kernel](SHAPE, torch.float32, CPU)["fused"].check()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_row_that_disagrees_is_refused(operation, monkeypatch):
    def shifted(method):
        def call(*args):
            result = method(*args)
            return (result[0] + 0.1, *result[1:]) if isinstance(result, tuple) else result + 0.1

        return call

    for name in ("noising", "loss", "step"):
        monkeypatch.setattr(peers.Preallocated, name, shifted(getattr(peers.Preallocated, name)))
    rows = OPERATIONS[operation](SHAPE, torch.float32, CPU) | peers.peer_rows(operation, SHAPE, torch.float32, CPU)
    chosen = {name: rows[name] for name in ("fused", "preallocated")}
    with pytest.raises(RuntimeError, match=r"preallocated.* off the float64 reference"):
        table.measure(operation, chosen, torch.float32, SHAPE, CPU)


def test_a_library_that_does_not_import_is_named(monkeypatch):
    monkeypatch.setitem(peers.LIBRARIES, "diffusers", "no_such_module")
    peers.missing.cache_clear()
    try:
        assert peers.missing("diffusers") == "diffusers does not import: No module named 'no_such_module'"
        assert "diffusers" not in peers.peer_rows("reverse_update", SHAPE, torch.float32, CPU)
    finally:
        peers.missing.cache_clear()


@pytest.mark.slow
def test_measure():
    def sleepless(n: int) -> Row:
        x = torch.zeros(n)
        return Row(lambda: x.add_(1), lambda: None)

    rows = {"fused": sleepless(1000), "reference": sleepless(1_000_000)}
    line = table.measure("forward_noising", rows, torch.float32, (10, 100), CPU)
    assert line["bytes"] == 8 * 1000
    assert line["ms"].keys() == line["ns_per_element"].keys() == {"fused", "reference", "copy"}
    assert line["ratio"].keys() == {"reference"} and line["ratio"]["reference"] > 2
    assert line["ns_per_element"]["fused"] == pytest.approx(1e3 * line["ms"]["fused"])
    assert line["copy_fraction"] == pytest.approx(line["ms"]["copy"] / line["ms"]["fused"])


def test_peak_memory():
    """What a call allocates, whether it keeps it or not, and nothing that was there before."""
    kept: list[Tensor] = [torch.ones(2**24)]

    def call() -> None:
        torch.ones(2**24)
        kept.append(torch.ones(2**22))

    peak = timing.peak_memory(call, CPU)
    if peak is None:
        pytest.skip("needs /proc")
    assert abs(peak - 2**26) < 2**22  # the system counts in batches


@pytest.fixture
def quick(monkeypatch):
    """One small case, and a clock that says what each row takes."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(table, "cases", lambda device, size: [(torch.float32, SHAPE)])
    seconds = [1e-3, 0.5e-3, 4e-3, 2e-3, 3e-3, 6e-3]
    monkeypatch.setattr(table, "medians", lambda functions, *_, **__: [*seconds[: len(functions) - 1], 0.9e-3])


@pytest.mark.slow
def test_the_table_and_its_files(quick, tmp_path, capsys):
    """A line for each operation: 1 ms for 2 tensors of 576 float32, a copy in 0.9 ms, eager PyTorch 4 times as long."""
    with fastdiff.backend("reference"):
        assert main(["--device", "cpu", "--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    (noising,) = (line.split() for line in lines if line.startswith("forward_noising"))
    assert noising[:8] == ["forward_noising", "float32", "3x3x8x8", "1.000", "0.00", "0.90", "0.50", "4.00"]
    (loss,) = (line.split() for line in lines if line.startswith("loss_forward_backward"))
    assert loss[-2:] == ["-", "-"]  # the libraries have no loss of their own
    report = json.loads((tmp_path / "b.json").read_text())
    assert [row["operation"] for row in report["rows"]] == list(OPERATIONS)
    assert report["rows"][0]["ratio"]["reference"] == 4.0 and report["rows"][0]["bytes"] == 2 * 4 * 576
    with Image.open(tmp_path / "b.png") as image:
        assert image.size[0] == pictures.DPI * pictures.PAGE[0]


def test_a_disturbed_copy_is_named(quick, monkeypatch, capsys):
    monkeypatch.setattr(table, "medians", lambda functions, *_, **__: [1.0] * (len(functions) - 1) + [1.2])
    with fastdiff.backend("reference"):
        assert main(["--device", "cpu"]) == 0
    assert "Nothing is faster than a plain copy" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--static", "--dump"])
def test_options_of_the_static_roofline_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        main([option, "x"])
    assert f"unrecognized arguments: {option}" in capsys.readouterr().err


def test_the_interpreter_is_not_timed(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["--device", "cpu"]) == 1
    assert capsys.readouterr().err.startswith("benchmarks: error: TRITON_INTERPRET")


def test_a_file_that_cannot_be_written_is_named_first(quick, tmp_path, capsys):
    assert main(["--device", "cpu", "--json", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert str(tmp_path) in captured.err and not captured.out
