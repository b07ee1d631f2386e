"""What a run leaves to look at: its options, its log, its grids, and their picture."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import TINY, run

from fastdiff.cli import main
from fastdiff.training import Options, checkpoint, loop, record, samples
from fastdiff.training.logs import Progress, Silent
from fastdiff.training.record import COLUMNS, Record, grids, read_log
from fastdiff.training.report import smooth, write_report


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    monkeypatch.setattr(samples, "IMAGES", 4)


@pytest.mark.slow
def test_a_run_leaves_options_log_grids_and_a_report(tmp_path, capsys):
    run(tmp_path, steps=20, sample_every=10)
    assert "draws samples" in capsys.readouterr().err  # the bar stands still meanwhile
    assert Options(**json.loads((tmp_path / "config.json").read_text())) == Options(
        **{**TINY, "steps": 20, "sample_every": 10}
    )
    rows = read_log(tmp_path)
    assert [row["step"] for row in rows] == [10, 20] and all(set(row) == set(COLUMNS) for row in rows)
    for row in rows:
        assert all(row[name] > 0 for name in COLUMNS) and row["memory_mb"] > 50
        assert row["loss_q1"] != row["loss_q4"]
    assert [path.name for path in grids(tmp_path)] == ["0000010.png", "0000020.png"]
    first, last = (np.asarray(Image.open(path)) for path in grids(tmp_path))
    assert first.shape == (100, 100) and (first != last).any()
    assert Image.open(tmp_path / "report.png").size == (1200, 650)


@pytest.mark.slow
def test_a_log_goes_on_where_the_run_does(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "write_report", lambda folder: None)  # its picture takes longer than the steps
    run(tmp_path, steps=20, sample_every=10)
    model = (tmp_path / "model.safetensors").read_bytes()
    run(tmp_path, steps=30, resume=True, sample_every=10)
    with open(tmp_path / "log.csv", "ab") as log:
        log.write(b"\0\xff\n40,0.5,0")  # the machine lost its power here
    (tmp_path / "model.safetensors").write_bytes(model)
    assert [row["step"] for row in read_log(tmp_path)] == [10, 20, 30]
    run(tmp_path, steps=21, resume=True, sample_every=10)  # goes on from step 20
    assert [row["step"] for row in read_log(tmp_path)] == [10, 20]
    assert [int(path.stem) for path in grids(tmp_path)] == [10, 20, 21]


@pytest.mark.slow
def test_the_grid_does_not_change_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "write_report", lambda folder: None)
    run(tmp_path / "a", steps=4, sample_every=2)
    run(tmp_path / "b", steps=4)
    a, b = (checkpoint.load(tmp_path / name / "model.safetensors") for name in "ab")
    assert torch.equal(a.rng["cpu"], b.rng["cpu"])
    for one, other in zip(a.ema.parameters(), b.ema.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_row_is_the_mean_since_the_last(tmp_path, monkeypatch):
    clock = iter([0.0, 5.0, 6.0])
    monkeypatch.setattr(record.time, "perf_counter", lambda: next(clock))
    log = Record(tmp_path, Options(**TINY), 0)
    for step in range(1, 21):
        value = 1.0 if step <= 10 else 2.0
        losses, noisiness = torch.tensor([1.0, 2.0, 3.0]) * value, torch.tensor([0.01, 0.25, 1.0])
        log.step(step, losses, noisiness, torch.tensor(value * step), 0.1 * value)
    first, second = read_log(tmp_path)
    assert (first["loss"], second["loss"]) == (2.0, 4.0)
    assert (first["loss_q1"], first["loss_q4"], second["loss_q1"]) == (1.5, 3.0, 3.0) and math.isnan(first["loss_q2"])
    assert (first["grad_norm"], second["grad_norm"]) == pytest.approx((5.5, 31.0))
    assert (first["lr"], second["lr"]) == (0.1, 0.2)
    assert (first["images_per_s"], second["images_per_s"]) == pytest.approx((10 * 16 / 5, 10 * 16))


@pytest.mark.parametrize(("log", "module"), [("tensorboard", "tensorboard"), ("wandb", "wandb")])
def test_a_log_that_is_not_installed_says_how_to_install_it(tmp_path, monkeypatch, log, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{module} is not installed: pip install 'fastdiff-kernels\[data\]'"):
        run(tmp_path, steps=1, log=log)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.slow
def test_wandb_gets_the_rows_and_the_grids(tmp_path, monkeypatch):
    calls = []
    module = type("wandb", (), {
        "init": staticmethod(lambda **given: calls.append(given["config"]["log"])),
        "log": staticmethod(lambda row, step: calls.append((step, sorted(row)))),
        "Image": staticmethod(lambda path: path),
        "finish": staticmethod(lambda: calls.append("finished")),
    })  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(loop, "write_report", lambda folder: None)
    run(tmp_path, steps=10, sample_every=10, log="wandb")
    assert calls == ["wandb", (10, sorted(COLUMNS[1:])), (10, ["samples"]), "finished"]


@pytest.mark.slow
def test_tensorboard_gets_the_rows_and_the_grids(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, steps=10, sample_every=10, log="tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(COLUMNS[1:]) and events.Tags()["images"] == ["samples"]
    assert events.Scalars("loss")[0].value == pytest.approx(read_log(tmp_path)[0]["loss"], rel=1e-4)


@pytest.mark.slow
def test_plot_draws_a_run_and_refuses_what_is_none(tmp_path, capsys):
    Record(tmp_path / ".", Options(**TINY), 0)
    assert main(["plot", str(tmp_path)]) == 1
    assert "expected the folder of a run, with log.csv" in capsys.readouterr().err
    row = ",".join(["10", *["0.5"] * (len(COLUMNS) - 1)])
    with open(tmp_path / "log.csv", "a") as log:
        log.write(row + "\n")
    assert main(["plot", str(tmp_path), "--out", str(tmp_path / "new" / "x.png")]) == 0
    assert Image.open(tmp_path / "new" / "x.png").size == (1200, 350)
    for step in range(9):
        Image.new("L", (20, 20), 20 * step).save(
            tmp_path.joinpath("samples").mkdir(exist_ok=True) or tmp_path / "samples" / f"{step:07}.png"
        )
    assert Image.open(write_report(tmp_path)).size == (1200, 650)


def test_a_log_that_the_disk_does_not_take_is_named(tmp_path):
    log = Record(tmp_path, Options(**TINY), 0)
    (tmp_path / "log.csv").unlink()
    (tmp_path / "log.csv").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*log\.csv'"):
        log.step(record.EVERY, torch.ones(4), torch.ones(4), torch.ones(()), 0.1)


def test_smoothing_leaves_out_what_is_no_number():
    assert smooth([1.0, math.nan, 3.0]).tolist() == [2.0, 2.0, 2.0]
    assert smooth([0.0] * 4 + [9.0] + [0.0] * 8)[[3, 4, 8, 9]].tolist() == [9 / 8, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("kind", [lambda: Progress(0, 1, 1), Silent])
def test_of_many_items_that_cannot_be_read_the_first_are_named(kind, capsys):
    """By every process: no other one reads its items."""
    progress = kind()
    for count in range(1, 401):
        progress.left_out("a\nb", "broken", count)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "fastdiff: warning: left out a b: broken (1 so far)"
    assert [int(line.split("(")[1].split()[0]) for line in said] == [*range(1, 101), 200, 300, 400]
