"""Options by name and from files, and what flags mean."""

import json

import numpy as np
import pytest
import torch

from fastdiff.cli import parse, train_options
from fastdiff.data import Arrays
from fastdiff.training import Options, build, digits, resumed_options, train
from fastdiff.training.checkpoint import load
from fastdiff.training.feed import measured, spread
from fastdiff.training.options import as_size
from fastdiff.training.presets import PRESETS, read_config


def options_of(tmp_path, *flags) -> Options:
    return train_options(parse(["train", "--out", str(tmp_path / "run"), *map(str, flags)]), tmp_path)[0]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_networks(tmp_path, name):
    options = options_of(tmp_path, "--preset", name, "--data", PRESETS[name].get("data", tmp_path))
    assert {key: getattr(options, key) for key in PRESETS[name]} == PRESETS[name]
    with torch.device("meta"):
        assert build(options).model.sample_shape == options.shape


def test_edm_is_told_the_standard_deviation_of_the_data(tmp_path, capsys):
    edm = options_of(tmp_path, "--preset", "digits", "--formulation", "edm", "--steps", 1, "--sample-every", 0)
    train(edm, tmp_path / "run", "cpu")
    assert "parameters, sigma_data 0.75, 898 images of 1x8x8 in 10 classes" in capsys.readouterr().out
    assert digits()[0][:].std().item() == pytest.approx(0.75, rel=0.01)
    assert read_config(tmp_path / "run" / "config.json")["sigma_data"] == 0.75
    state = load(tmp_path / "run")
    assert state.diffusion.process.sigma_data == state.options["sigma_data"] == 0.75
    assert resumed_options(state, {}).sigma_data == 0.75
    assert options_of(tmp_path, "--data", tmp_path, "--formulation", "edm", "--sigma-data", 0.6).sigma_data == 0.6
    with pytest.raises(ValueError, match=r"^sigma_data: expected a finite number of at least 0, got -1\.0"):
        options_of(tmp_path, "--data", "digits", "--formulation", "edm", "--sigma-data", -1)


def test_spread_of_a_part_and_of_one_number():
    alternating = np.resize([-0.3, 0.3], (4000, 1)).astype(np.float32)
    alternating[7] = np.nan
    assert spread(Arrays(alternating)) == 0.3
    assert spread(Arrays(alternating + 1e4)) == 0.3
    grey = Options("grey", formulation="edm", size=8)
    with pytest.raises(ValueError, match="sigma_data: expected images that differ, to measure it"):
        measured(grey, Arrays(np.full((3, 5), 0.1, np.float32)))


def test_flags_go_over_a_file_and_a_file_over_a_preset(tmp_path):
    config = tmp_path / "options.yaml"
    config.write_text("batch_size: 7\nsteps: 11\nclasses: true\nlr: 2e-4\n")  # a text to YAML
    options = options_of(tmp_path, "--preset", "digits", "--config", config, "--steps", 5)
    assert (options.data, options.batch_size, options.steps, options.classes) == ("digits", 7, 5, True)
    assert options.channels == PRESETS["digits"]["channels"] and options.lr == 2e-4


def test_the_options_of_a_run_start_another(tmp_path):
    first = options_of(tmp_path, "--data", tmp_path, "--size", "16x24", "--lr", "0.1")
    (tmp_path / "config.json").write_text(json.dumps(first.used()))
    assert first.size == [16, 24]
    assert options_of(tmp_path, "--config", tmp_path / "config.json") == first


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.yaml", "colour: 1", "unknown option 'colour'"),
        ("a.yaml", "- 1", "expected options by name, got list"),
        ("a.yaml", "{", "a.yaml: "),
        ("a.yaml", "data: 5", "a.yaml: data: expected str, got 5"),
        ("a.yaml", "lr: fast", "a.yaml: lr: expected float, got 'fast'"),
        ("a.yaml", "steps: {a: 1}", "a.yaml: steps: expected int, got {'a': 1}"),
        ("a.json", "{", "a.json: "),
    ],
)
def test_files_of_options_that_are_none_are_named(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        read_config(tmp_path / name)


@pytest.mark.parametrize(("given", "size"), [(8, 8), ([8, 8], 8), ((8, 16), [8, 16]), (np.int64(4), 4)])
def test_sizes_are_a_side_or_two(given, size):
    assert as_size(given) == size


@pytest.mark.parametrize("given", [True, "8", [8], [8, 8, 8], 0, [8, -1], 2.0])
def test_sizes_that_are_none_are_named(given):
    with pytest.raises((TypeError, ValueError), match=r"^size: expected"):
        as_size(given)


def test_non_square_images_of_any_channels_build_a_network(tmp_path):
    options = options_of(tmp_path, "--data", tmp_path, "--size", "16x24", "--image-channels", 4, "--channels", 8)
    assert build(options).model.sample_shape == (4, 16, 24) == options.shape


def test_arrays_bring_their_own_shape(tmp_path):
    np.save(tmp_path / "latents.npy", np.zeros((3, 4, 8, 16), np.float32))
    options = options_of(tmp_path, "--data", tmp_path / "latents.npy")
    assert options.shape == (4, 8, 16)
    np.save(tmp_path / "signals.npy", np.zeros((3, 128), np.float32))
    with pytest.raises(ValueError, match=r"data: expected images \(N, C, H, W\) in .*, got items of \(128,\)"):
        options_of(tmp_path, "--data", tmp_path / "signals.npy")
    np.save(tmp_path / "last.npy", np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"got items of \(8, 8, 3\), whose channels come last"):
        options_of(tmp_path, "--data", tmp_path / "last.npy")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--image-channels", 5), "image_channels: expected 0 to 4, got 5"),
        (("--image-channels", 3, "--gray"), "gray: expected False with 3 image_channels"),
        (("--label-dropout", 1), r"label_dropout: expected a share in \[0, 1\), got 1"),
        (("--label-dropout", 0.2), "label_dropout: expected classes with it, got 0.2 alone"),
        (("--lr-hold", 9), "lr_hold: expected lr_schedule cosine or inverse_sqrt with it, got 9 alone"),
        (("--log", "paper"), "log: expected one of csv, tensorboard, wandb, got 'paper'"),
        (("--size", "16x10"), r"size: expected a multiple of 4, got \[16, 10\]"),
    ],
)
def test_flags_out_of_range_are_named(tmp_path, flags, said):
    with pytest.raises(ValueError, match=said):
        options_of(tmp_path, "--data", tmp_path, *flags)
