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
from fastdiff import FlowMatching, training
from fastdiff.training import checkpoint, data

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def trained(out: Path, **more) -> Path:
    few = {"channels": 8, "steps": 1, "timesteps": 100, "sample_every": 0, **more}
    training.train(training.Options(**{**training.DIGITS, "data": "digits", **few}), out, CPU)
    return out / "model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def model_of_classes(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("classes"), classes=True)


@pytest.mark.slow
def test_paths(model, tmp_path):
    example = runpy.run_path(str(ROOT / "examples" / "paths.py"))
    example["main"](model, tmp_path / "paths.png")
    picture = np.asarray(Image.open(tmp_path / "paths.png"))
    rows, columns = len(example["SAMPLERS"]), example["SHOWN"]
    assert picture.shape == (50 * rows, 50 * columns)  # 6 * 8 pixels and a frame of 1
    starts = picture[:, :50].reshape(rows, 50, 50)
    assert (starts == starts[0]).mean() > 0.5  # all from one draw, heun from another spread of it


@pytest.mark.slow
def test_editing(model, tmp_path, monkeypatch):
    example = runpy.run_path(str(ROOT / "examples" / "editing.py"))
    monkeypatch.setitem(example["main"].__globals__, "STEPS", 3)
    example["main"](model, tmp_path / "editing.png")
    picture = np.asarray(Image.open(tmp_path / "editing.png"))
    assert picture.shape == (50 * 6, 50 * example["SHOWN"])
    rows = picture.reshape(6, 50, 50 * example["SHOWN"])
    assert (rows[0, :24] == rows[4, :24]).all() and (rows[0, :24] == rows[5, :24]).all()  # the upper half stays
    assert (rows[0] != rows[1]).any() and (rows[4] != rows[5]).any()


@pytest.mark.slow
def test_inversion(model_of_classes, tmp_path, monkeypatch):
    example = runpy.run_path(str(ROOT / "examples" / "inversion.py"))
    monkeypatch.setitem(example["main"].__globals__, "STEPS", 10)
    example["main"](model_of_classes, tmp_path / "inversion.png")
    picture = np.asarray(Image.open(tmp_path / "inversion.png"))
    assert picture.shape == (50 * 6, 50 * 10)
    images, back, *others = picture.reshape(6, 50, 500).astype(float)
    assert np.corrcoef(images.ravel(), back.ravel())[0, 1] > 0.95  # they come back, as well as 10 steps can tell
    assert all((back[:, 50 * k :] != other[:, 50 * k :]).any() for k, other in enumerate(others))


@pytest.mark.slow
def test_bound(model, monkeypatch, capsys):
    example = runpy.run_path(str(ROOT / "examples" / "bound.py"))
    monkeypatch.setitem(example["main"].__globals__, "IMAGES", 2)
    example["main"](model)
    lines = capsys.readouterr().out.splitlines()
    figures = {line.split()[1]: [float(v) for v in line.split()[2:]] for line in lines[1:]}
    assert list(figures) == ["posterior", "beta"]
    assert figures["posterior"][0] > figures["beta"][0] > 0  # hardly trained: the larger variance errs less
    assert figures["posterior"][1] == figures["beta"][1] < 1e-3


@pytest.mark.slow
def test_quality(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "SAMPLERS", dict.fromkeys(("ddim", "heun", "annealed_langevin")))
    monkeypatch.setattr(quality, "CALLS", (1, 2, 3))
    monkeypatch.setattr(quality, "HALF", ("ddim", 2))
    args = argparse.Namespace(quality=[model], json=tmp_path / "q.json", plot=tmp_path / "q.png")
    assert quality.main(args, CPU) == 0
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "q.json").read_text())
    runs = [(row["sampler"], row["calls"], row["steps"]) for row in report["rows"]]
    whole = [("ddim", 1, 1), ("ddim", 2, 2), ("ddim", 3, 3), ("heun", 1, 1), ("heun", 2, 1), ("heun", 3, 2)]
    assert runs == [*whole, ("ddim, bfloat16", 2, 2)]
    assert report["real"] == pytest.approx(0.2932, abs=1e-4)
    assert [row["model_calls"] for row in report["rows"]] == [1, 2, 3, 1, 1, 3, 2]
    assert all(row["cost"] > 0 and row["frechet_distance"] > 1 for row in report["rows"])
    kinds = {row["sampler"]: row["group"] for row in report["rows"]}
    assert kinds["ddim"] == kinds["ddim, bfloat16"] == "no noise, one call a step"
    assert kinds["heun"] == "no noise, several calls a step"
    assert "heun" in said and "DDPM" in said and "cost / calls" in said
    with Image.open(tmp_path / "q.png") as picture:
        assert len(picture.getcolors(1 << 20)) > 20


@pytest.mark.slow
def test_quality_of_a_model_of_classes_is_that_of_all_classes(model_of_classes):
    model, held_out = checkpoint.load_model(model_of_classes), data.digits()[2][:]
    asked = []
    model.model.register_forward_pre_hook(
        lambda net, args, given: asked.append(given["class_labels"]), with_kwargs=True
    )
    quality.measure(model, "ddim", 2, 12, held_out)
    assert all(labels.tolist() == [*range(10), 0, 1] for labels in asked) and len(asked) == 2 + 1 + 2


def test_steps_of_a_number_of_calls():
    flow = FlowMatching(torch.nn.Identity())
    assert [quality.steps_of(flow, "heun", calls) for calls in (5, 10, 20)] == [3, 5, 10]
    assert quality.steps_of(flow, "ddim", 20) == 20
    assert quality.steps_of(flow, "euler_maruyama", 20) is None  # it cannot start in pure noise
    assert quality.steps_of(flow, "annealed_langevin", 20) is None


@pytest.mark.slow
def test_quality_wants_the_digits(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (8, 8)).save(data / "black.png")
    options = {**training.DIGITS, "data": str(data), "gray": False, "channels": 8, "steps": 1, "sample_every": 0}
    training.train(training.Options(**options), tmp_path, CPU)
    args = argparse.Namespace(quality=[tmp_path / "model.safetensors"], json=None, plot=None)
    with pytest.raises(ValueError, match="expected a model of the 8x8 digits, it draws"):
        quality.main(args, CPU)
