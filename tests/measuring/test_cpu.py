"""The table of a CPU: what is measured, and how the page shows it."""

import importlib.util
import json
from pathlib import Path

import torch

from benchmarks import cpu, workloads
from benchmarks.kernel_workloads import KERNELS
from benchmarks.workloads import Row

ROOT = Path(__file__).resolve().parents[2]


def page():
    spec = importlib.util.spec_from_file_location("performance", ROOT / "docs" / "performance.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_row_is_checked_timed_and_written(tmp_path, monkeypatch, capsys):
    checked, threads = [], torch.get_num_threads()
    rows = {way: Row(lambda: None, lambda way=way: checked.append(way)) for way in ("fused", "reference")}
    monkeypatch.setattr(cpu, "cases", lambda: {"reverse_update / 2x3": rows})
    monkeypatch.setattr(cpu, "medians", lambda functions, *_: [0.002, 0.006][: len(functions)])
    monkeypatch.setattr(cpu, "processor", lambda: "A Processor (R)")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    try:
        assert cpu.main(["--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    content = json.loads((tmp_path / "a-processor-r.json").read_text(encoding="utf-8"))
    assert checked == ["fused", "reference"] and content["rows"] == {
        "reverse_update / 2x3": {"fused": 2.0, "reference": 6.0}
    }
    assert "fused 2 ms reference 6 ms" in capsys.readouterr().out
    assert page().cpu_table(content["rows"])[2:] == ["| reverse update | 2x3 | 2 | 6 |  | 3.00 |  |"]


def test_the_page_names_every_case():
    """Each measured case has words on the page: none is shown by the name it has in the code."""
    performance = page()
    content = [json.loads(path.read_text("utf-8")) for path in (performance.RESULTS / "cpu").glob("*.json")]
    names = {key.partition(" / ")[0] for each in content for key in each["rows"]} | {*workloads.OPERATIONS, *KERNELS}
    assert names <= performance.OPERATIONS.keys() | performance.WHOLE.keys()
