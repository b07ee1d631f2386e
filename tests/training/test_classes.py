"""Class-conditional runs: training, what the checkpoint knows, and samples of a class."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import TINY, metadata_of, run

from fastdiff import DDPM, UNet, training
from fastdiff.cli import main
from fastdiff.training import Options, checkpoint, samples
from fastdiff.training.data import Arrays, open_source
from fastdiff.training.feed import changed, noted

CPU = "cpu"
ON_CPU = ["--device", CPU]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A run on a folder of two classes, an image each."""
    images, out = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("run")
    for name, shade in (("dark", 30), ("light", 220)):
        (images / name).mkdir()
        Image.new("L", (8, 8), shade).save(images / name / "a.png")
    run(out, data=str(images), steps=2, classes=True, workers=0)
    return out


def draw(model, out, *args):
    assert main(["sample", str(model), "--steps", "2", "--out", str(out), *ON_CPU, *args]) == 0
    return np.load(f"{out}.npy")


@pytest.mark.slow
def test_the_checkpoint_knows_the_names_of_the_classes(model):
    state = checkpoint.load(model / "model.safetensors")
    assert state.classes == ["dark", "light"] == metadata_of(model / "model.safetensors")["classes"]
    assert state.ema.config["num_class_embeds"] == 3  # and "no label"
    assert samples.number_of_classes(state.diffusion) == 2


def test_a_run_goes_on_with_its_classes_alone(model, tmp_path):
    state = checkpoint.load(model / "model.safetensors")
    options = {**state.options, "steps": 3}
    other = tmp_path / "dark"
    other.mkdir()
    Image.new("L", (8, 8)).save(other / "a.png")
    options["data"] = str(tmp_path)
    with pytest.raises(ValueError, match=r"data: expected the classes \['dark', 'light'\] of the run, got \['dark'\]"):
        training.train(Options(**options), tmp_path / "run", CPU, state)


@pytest.mark.slow
def test_a_run_that_goes_on_says_which_images_came_or_went(model, tmp_path, capsys):
    state = checkpoint.load(model / "model.safetensors")
    for name in ("dark/a.png", "light/a.png", "light/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / name)
    said = "fastdiff: warning: data: 2 images until step 2, 3 now; they come in another order"
    for steps, lines in ((3, [said]), (4, [])):  # the next checkpoint knows the new images
        options = {**state.options, "steps": steps, "data": str(tmp_path)}
        training.train(Options(**options), tmp_path / "run", CPU, state)
        assert [line for line in capsys.readouterr().out.splitlines() if "warning" in line] == lines
        state = checkpoint.load(tmp_path / "run")


def test_what_is_noted_of_the_data_tells_names_and_labels_and_not_the_place(tmp_path):
    names = ["1/a.png", "1/b.png", "2/a.png"]
    folders = {
        "here": names,
        "moved": names,
        "fewer": names[:2],
        "renamed": ["1/a.png", "1/c.png", "2/a.png"],
        "other class": ["1/a.png", "2/b.png", "2/a.png"],
    }
    found = {}
    for name, files in folders.items():
        data = str(tmp_path / name)
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).touch()
        found[name] = noted(open_source(data, (8, 8), 3, classes=True), f"{data}/")
    said = {name: changed(found["here"], now, 7) for name, now in found.items()}
    assert said["here"] == said["moved"] == changed({}, found["here"], 7) == ""
    assert said["fewer"] == "3 images until step 7, 2 now; they come in another order"
    names = "the images have other names than until step 7; they come in another order"
    assert said["renamed"] == said["other class"] == names
    first, second, none = (
        noted(Arrays(np.zeros((3, 1)), labels), "x.npy") for labels in (np.arange(3), np.arange(3)[::-1], None)
    )
    assert changed(first, second, 7) == changed(first, none, 7) == "the images have other labels than until step 7"


@pytest.mark.slow
def test_samples_of_a_class_by_number_and_by_name(model, tmp_path):
    one = draw(model, tmp_path / "a", "--n", "3", "--label", "1")
    np.testing.assert_array_equal(one, draw(model, tmp_path / "b", "--n", "3", "--label", "light"))
    other = draw(model, tmp_path / "c", "--n", "3", "--label", "dark")
    assert np.abs(one - other).max() > 0
    each = draw(model, tmp_path / "d", "--n", "4")  # each class in turn
    np.testing.assert_allclose(each[1], one[1], atol=1e-5)
    np.testing.assert_allclose(each[2], other[2], atol=1e-5)
    guided = draw(model, tmp_path / "e", "--n", "3", "--label", "1", "--guidance", "3")
    np.testing.assert_allclose(
        draw(model, tmp_path / "f", "--n", "3", "--label", "1", "--guidance", "1"), one, atol=1e-5
    )
    assert np.abs(guided - one).max() > 1e-5


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--label", "2"], "label: expected 0 to 1, got 2"),
        (["--label", "grey"], "--label: expected a number or one of dark, light, got 'grey'"),
    ],
)
def test_labels_that_there_are_not_are_one_line(model, tmp_path, capsys, args, said):
    assert main(["sample", str(model), "--out", str(tmp_path / "x"), *ON_CPU, *args]) == 1
    assert said in capsys.readouterr().err


def test_a_model_without_classes_takes_no_label(tmp_path, capsys):
    run(tmp_path, steps=1)
    assert metadata_of(tmp_path / "model.safetensors")["classes"] == []
    for args in (["--label", "1"], ["--guidance", "2"]):
        assert main(["sample", str(tmp_path), "--out", str(tmp_path / "x"), *ON_CPU, *args]) == 1
        assert "label, guidance: expected a class-conditional model" in capsys.readouterr().err


def test_conditions_give_each_class_in_turn():
    blocks = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    model = DDPM(
        UNet(sample_size=8, norm_num_groups=8, num_class_embeds=4, **blocks),
        timesteps=10,
        schedule="cosine",
        objective="v",
    )
    ids = torch.arange(5)
    given = samples.conditions(model, ids, guidance=2.0)
    assert given["class_labels"].tolist() == [0, 1, 2, 0, 1] and given["uncond"]["class_labels"].tolist() == [3] * 5
    assert samples.conditions(model, ids, label=2)["class_labels"].tolist() == [2] * 5
    assert samples.draw_grid(model, 0).shape == (63, 3, 8, 8)  # 21 rows of 3 classes


@pytest.mark.slow
def test_dropped_labels_train_the_unconditional_branch(tmp_path):
    run(tmp_path, steps=5, classes=True, label_dropout=0.5)
    state = checkpoint.load(tmp_path / "model.safetensors")
    moments = [
        state.optimizer[i]["exp_avg"]
        for i, (name, _) in enumerate(state.diffusion.model.named_parameters())
        if name == "class_embedding.weight"
    ]
    assert len(moments) == 1 and (moments[0].abs().sum(1) > 0).all()  # each of 11 rows has had a gradient
    assert json.loads((tmp_path / "config.json").read_text())["label_dropout"] == 0.5 != TINY.get("label_dropout")


@pytest.mark.slow
def test_mnist_from_training_to_figures(small_mnist, tmp_path):
    few = ["--steps", "1", "--batch-size", "4", "--channels", "8", "--sample-every", "0"]
    assert main(["train", "--preset", "mnist28", "--out", str(tmp_path), *few, *ON_CPU]) == 0
    assert main(["eval", str(tmp_path), "--steps", "1", "--json", str(tmp_path / "eval.json"), *ON_CPU]) == 0
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["n_samples"] == 20  # as many as the half that is trained on
    assert found["frechet_distance"] > 10 * found["frechet_distance_real"] >= 0
    assert found["inception_score"] >= 1 and 0 <= found["label_accuracy"] <= 1  # of the classifier
