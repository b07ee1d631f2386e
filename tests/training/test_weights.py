"""Directories of diffusers that are hostile or damaged: refused before a network is built, in a line with the file."""

import json
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdiff import DDPM, UNet

WEIGHTS = "unet/diffusion_pytorch_model"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    unet = UNet(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=8,
    )
    folder = tmp_path_factory.mktemp("good")
    DDPM(unet, schedule="linear").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "copy")


def change(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def pickled(folder, content):
    """Put what torch.save writes in place of the weights."""
    (folder / f"{WEIGHTS}.safetensors").unlink()
    path = folder / f"{WEIGHTS}.bin"
    torch.save(content, path)
    return path


def message(folder, kind=DDPM):
    with pytest.raises(ValueError) as error:
        kind.from_pretrained(folder)
    assert str(error.value).startswith(str(folder)) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("block_out_channels", [4000, 8000]),
        ("block_out_channels", [8] * 100_000),
        ("layers_per_block", 20_000),
        ("in_channels", 10**9),
        ("in_channels", 10**30),
        ("time_embedding_dim", 10**9),
        ("num_class_embeds", 10**9),
        ("norm_eps", []),
        ("down_block_types", 3),
    ],
)
def test_a_network_that_does_not_fit_is_never_built(folder, nothing_built, name, value):
    change(folder / "unet" / "config.json", **{name: value})
    message(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_train_timesteps": 10**9},
        {"num_train_timesteps": 10**9, "beta_schedule": "sigmoid"},
        {"num_train_timesteps": 10**9, "beta_start": 1e-3},
        {"num_train_timesteps": "many"},
        {"num_train_timesteps": None},
        {"prediction_type": []},
        {"variance_type": {}},
        {"beta_start": "small", "beta_schedule": "sigmoid"},
        {"trained_betas": {"a": 1}},
        {"clip_sample_range": "far"},
    ],
    ids=str,
)
def test_a_scheduler_of_wrong_values_is_one_line(folder, changes):
    change(folder / "scheduler" / "scheduler_config.json", **changes)
    assert "scheduler_config.json: " in message(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"_class_name": ', "\0", "[]", "3", '{"a": ' * 100_000])
@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_json_of_any_kind_is_one_line(folder, name, text):
    (folder / name).write_text(text)
    assert name in message(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
@pytest.mark.parametrize("end", ["safetensors", "bin"])
def test_weights_of_no_floating_type_are_refused(folder, dtype, end):
    tensors = load_file(folder / f"{WEIGHTS}.safetensors")
    tensors["conv_in.bias"] = tensors["conv_in.bias"].to(dtype)
    if end == "bin":
        pickled(folder, tensors)
    else:
        save_file(tensors, folder / f"{WEIGHTS}.safetensors")
    assert f"{end}: expected floating tensors by name, got 'conv_in.bias': {dtype}" in message(folder)


def test_a_zip_bomb_is_refused_before_it_inflates(folder):
    path = pickled(folder, {})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/version", "3")
        archive.writestr("archive/data.pkl", bytes(10**7))
    assert "inflates to 100000" in message(folder)


def test_tensors_that_repeat_their_numbers_are_refused(folder):
    pickled(folder, {"conv_in.bias": torch.zeros(1).expand(10**9)})
    assert "tensors of 4000000000 bytes" in message(folder)


def test_pickled_weights_are_read(folder):
    tensors = load_file(folder / f"{WEIGHTS}.safetensors")
    pickled(folder, tensors)
    assert torch.equal(DDPM.from_pretrained(folder).model.conv_in.bias, tensors["conv_in.bias"])


def test_cut_and_scrambled_files_are_one_line(folder):
    path = pickled(folder, load_file(folder / f"{WEIGHTS}.safetensors"))
    whole = path.read_bytes()
    for cut in (whole[:100], whole[: len(whole) // 2], b"", b"\x80\x02}q\x00.", whole[::-1]):
        path.write_bytes(cut)
        assert "diffusion_pytorch_model.bin" in message(folder, UNet)
