"""What `fastdiff bench` measures: rows that agree before they are timed, memory, the plot."""

import pytest
import torch
from PIL import Image
from torch import Tensor

import fastdiff
from benchmarks import peers as _peers
from benchmarks import table as bench
from benchmarks.kernel_workloads import KERNEL_TENSORS, KERNELS
from benchmarks.workloads import OPERATIONS, Row
from fastdiff import ops

CPU, SHAPE = torch.device("cpu"), (3, 3, 8, 8)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_agree_with_the_reference(operation, dtype):
    with fastdiff.backend("cpu"):
        rows = OPERATIONS[operation](SHAPE, dtype, CPU) | _peers.peer_rows(operation, SHAPE, dtype, CPU)
        assert {"fused", "reference", "compile", "preallocated"} <= rows.keys()
        for name in rows.keys() - {"compile"}:
            rows[name].check()
            rows[name].run()


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
        return lambda *args, **kwargs: 1.1 * function(*args, **kwargs)

    for name in ("normal", "loss", "vlb", "group_norm_silu"):
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
        monkeypatch.setattr(_peers.Preallocated, name, shifted(getattr(_peers.Preallocated, name)))
    rows = OPERATIONS[operation](SHAPE, torch.float32, CPU) | _peers.peer_rows(operation, SHAPE, torch.float32, CPU)
    chosen = {name: rows[name] for name in ("fused", "preallocated")}
    with pytest.raises(RuntimeError, match=r"preallocated.* off the float64 reference"):
        bench.measure(operation, chosen, torch.float32, SHAPE, CPU)


def test_a_library_that_does_not_import_is_named(monkeypatch):
    monkeypatch.setitem(_peers.LIBRARIES, "diffusers", "no_such_module")
    _peers.missing.cache_clear()
    try:
        assert _peers.missing("diffusers") == "diffusers does not import: No module named 'no_such_module'"
        assert "diffusers" not in _peers.peer_rows("reverse_update", SHAPE, torch.float32, CPU)
    finally:
        _peers.missing.cache_clear()


def test_measure():
    def sleepless(n: int) -> Row:
        x = torch.zeros(n)
        return Row(lambda: x.add_(1), lambda: None)

    rows = {"fused": sleepless(1000), "reference": sleepless(1_000_000)}
    line = bench.measure("forward_noising", rows, torch.float32, (10, 100), CPU)
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

    peak = bench.peak_memory(call, CPU)
    if peak is None:
        pytest.skip("needs /proc")
    assert abs(peak - 2**26) < 2**22  # the system counts in batches


def test_plot(tmp_path):
    line = {"operation": "forward_noising", "dtype": "float32", "shape": [2, 3], "ratio": {"reference": 4.0}}
    line |= {"ns_per_element": {"fused": 1.0, "reference": 4.0, "copy": 0.5}}
    bench.plot([line], "cpu", tmp_path / "bench.png")
    with Image.open(tmp_path / "bench.png") as image:
        colours = {colour: count for count, colour in image.convert("RGB").getcolors(1 << 20)}
    own, other = colours[0x34, 0x65, 0xA4], colours[0xCC, 0x77, 0x22]
    assert other == pytest.approx(4 * own, rel=0.02)
