"""The picture of paths, and quality per second, from a model that has hardly been trained."""

import argparse
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import quality
from fastdiff import training

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pictures")
    few = {"channels": 8, "steps": 1, "timesteps": 100}
    training.train(training.Options(**{**training.DIGITS, "data": "digits", **few}), out, CPU)
    return out / "model.safetensors"


def test_paths(model, tmp_path):
    example = runpy.run_path(str(ROOT / "examples" / "paths.py"))
    example["main"](model, tmp_path / "paths.png")
    picture = np.asarray(Image.open(tmp_path / "paths.png"))
    rows, columns = len(example["SAMPLERS"]), example["SHOWN"]
    assert picture.shape == (50 * rows, 50 * columns)  # 6 * 8 pixels and a frame of 1
    starts = picture[:, :50].reshape(rows, 50, 50)
    assert (starts == starts[0]).mean() > 0.5  # all from one draw, heun from another spread of it


def test_bound(model, monkeypatch, capsys):
    example = runpy.run_path(str(ROOT / "examples" / "bound.py"))
    monkeypatch.setitem(example["main"].__globals__, "IMAGES", 2)
    example["main"](model)
    lines = capsys.readouterr().out.splitlines()
    figures = {line.split()[1]: [float(v) for v in line.split()[2:]] for line in lines[1:]}
    assert list(figures) == ["posterior", "beta"]
    assert figures["posterior"][0] > figures["beta"][0] > 0  # hardly trained: the larger variance errs less
    assert figures["posterior"][1] == figures["beta"][1] < 1e-3


def test_quality(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "RUNS", [("ddpm", 6), ("ddim", 3), ("dpm++2m", 2)])
    args = argparse.Namespace(quality=model, json=tmp_path / "q.json", plot=tmp_path / "q.png")
    assert quality.main(args, CPU) == 0
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "q.json").read_text())
    assert [(row["sampler"], row["steps"]) for row in report["rows"]] == quality.RUNS
    assert report["real"] == pytest.approx(0.2932, abs=1e-4)
    assert all(row["images_per_s"] > 0 and row["frechet_distance"] > 1 for row in report["rows"])
    assert "dpm++2m" in said and "1.0x" in said
    picture = np.asarray(Image.open(tmp_path / "q.png").convert("RGB"))
    for colour in quality.COLOURS.values():  # a dot for each
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (picture == rgb).all(2).sum() > 20


def test_quality_wants_the_digits(tmp_path):
    options = {**training.DIGITS, "data": "digits", "formulation": "vp", "channels": 8, "steps": 1}
    training.train(training.Options(**options), tmp_path, CPU)
    args = argparse.Namespace(quality=tmp_path / "model.safetensors", json=None, plot=None)
    with pytest.raises(ValueError, match="expected a DDPM of the 8x8 digits with 1,000 timesteps"):
        quality.main(args, CPU)
