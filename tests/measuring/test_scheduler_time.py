"""The table of the schedulers' time on the host."""

import json
import sys

import pytest

pytest.importorskip("diffusers")

from benchmarks import scheduler_time


def test_a_row_for_each_scheduler_and_shape(tmp_path, monkeypatch, capsys):
    file, names = tmp_path / "rows.json", ["FlowMatchEulerDiscreteScheduler", "ScoreSdeVeScheduler"]
    monkeypatch.setattr(sys, "argv", ["scheduler_time.py", "--rounds", "1", "--json", str(file), "--only", *names])
    assert scheduler_time.main() == 0
    rows = json.loads(file.read_text(encoding="utf-8"))
    assert [(r["scheduler"], tuple(r["shape"])) for r in rows] == [(n, s) for n in names for s in scheduler_time.SHAPES]
    assert all(r["ours_us"] > 0 and r["ratio"] == r["ours_us"] / r["stock_us"] for r in rows)
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)


def test_every_scheduler_has_a_row():
    from fastdiff.interop.diffusers import SCHEDULERS

    assert [kind.__name__ for kind in SCHEDULERS] == scheduler_time.SCHEDULERS
