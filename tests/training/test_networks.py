"""Runs of a transformer: what the options ask for, what the checkpoint knows, and everything that reads it."""

import numpy as np
import pytest
import torch
from tiny_run import TINY, assert_same_files, assert_same_weights, metadata_of, rewrite, run

from fastdiff import DDPM, DiT, FlowMatching, UNet
from fastdiff.cli import main
from fastdiff.training import Options, build, checkpoint, draws, loop, samples
from fastdiff.training.options import LATER

NAME = "model.safetensors"
DIT = {"network": "dit", "lr": 1e-3}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Two steps of flow matching with classes."""
    out = tmp_path_factory.mktemp("dit")
    flow = {"formulation": "flow", "timesteps": 1000}
    run(out, steps=2, save_every=1, keep=2, classes=True, ema_decays="0.5", **DIT, **flow)
    return out


@pytest.mark.slow
def test_a_run_of_a_transformer_is_read_by_all_that_reads_runs(model, tmp_path):
    stored = metadata_of(model / NAME)
    assert stored["dit"]["num_embeds_ada_norm"] == 10 and "unet" not in stored
    state = checkpoint.load(model / NAME)
    assert isinstance(state.ema, DiT) and isinstance(state.diffusion.model, DiT)
    assert samples.number_of_classes(state.diffusion) == 10
    flow = FlowMatching.from_pretrained(model)
    assert torch.equal(flow.model.proj_out_2.weight, state.ema.proj_out_2.weight)
    few = ["--n", "2", "--steps", "2", "--device", "cpu"]
    assert main(["sample", str(model), *few, "--out", str(tmp_path / "a")]) == 0
    assert np.load(tmp_path / "a.npy").shape == (2, 1, 8, 8)
    average = tmp_path / "average.safetensors"
    assert main(["ema", str(model), "--decay", "0.5", "--out", str(average)]) == 0
    tensors = dict(zip((name for name, _ in state.ema.named_parameters()), state.ema.parameters(), strict=True))
    loaded = dict(FlowMatching.from_pretrained(average).model.named_parameters())
    assert all(torch.equal(loaded[name], state.averages["decay=0.5"][name]) for name in tensors)


@pytest.mark.slow
def test_a_run_of_a_transformer_goes_on_bit_for_bit(model, tmp_path):
    (tmp_path / NAME).write_bytes((model / "checkpoints" / "step-00000001.safetensors").read_bytes())
    assert run(tmp_path, resume=True, **checkpoint.load(tmp_path / NAME).options | {"steps": 2}) == 2
    assert_same_files(model / NAME, tmp_path / NAME)


@pytest.mark.slow
def test_a_network_that_is_not_named_is_a_u_net(tmp_path):
    """Runs of before say nothing of networks."""
    run(tmp_path, steps=1)
    options = metadata_of(tmp_path / NAME)["options"]
    rewrite(tmp_path / NAME, options={k: v for k, v in options.items() if k not in LATER})
    assert isinstance(DDPM.from_pretrained(tmp_path).model, UNet)
    args = ["train", "--out", str(tmp_path), "--steps", "2", "--sample-every", "0", "--resume", "--device", "cpu"]
    assert main(args) == 0 and main([*args, "--network", "dit"]) == 1
    assert metadata_of(tmp_path / NAME)["options"]["network"] == "unet"


def test_the_file_of_two_networks_or_of_none_is_no_checkpoint(model, tmp_path):
    copied = tmp_path / NAME
    copied.write_bytes((model / NAME).read_bytes())
    for changes, count in (({"unet": {}}, 2), ({"dit": None}, 0)):
        rewrite(copied, **{"unet": None, "dit": {}} | changes)
        with pytest.raises(ValueError, match=rf"its metadata has {count} of \('unet', 'dit'\) of type dict"):
            checkpoint.load(copied)


@pytest.mark.parametrize(
    ("size", "channels", "expected"),
    [
        (8, 24, {"num_layers": 4, "patch_size": 2, "attention_head_dim": 48, "num_attention_heads": 3}),
        (32, 64, {"num_layers": 8, "patch_size": 2, "attention_head_dim": 64, "num_attention_heads": 6}),
        (64, 128, {"num_layers": 12, "patch_size": 4, "attention_head_dim": 64, "num_attention_heads": 12}),
    ],
)
def test_sizes_of_a_transformer(size, channels, expected):
    with torch.device("meta"):
        dit = build(Options(data="x", network="dit", size=size, channels=channels, variance="learned", loss="hybrid"))
    config = dit.model.config
    assert {name: config[name] for name in expected} == expected
    assert (config["out_channels"], config["num_embeds_ada_norm"], config["sample_size"]) == (6, 0, size)
    assert samples.number_of_classes(dit) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": 64, "patch": 3}, "size: expected a multiple of patch 3, got 64"),
        ({"size": 30, "patch": 4}, "size: expected a multiple of patch 4, got 30"),
        ({"size": 42}, "size: expected a multiple of patch 4, got 42"),
        ({"size": [8, 16]}, r"size: expected a square for network dit, got \[8, 16\]"),
        ({"patch": -1}, "patch: expected at least 0, got -1"),
        ({"formulation": "ncsn"}, "network: expected unet with formulation ncsn, got 'dit'"),
        ({"formulation": "ve"}, "network: expected unet with formulation ve, got 'dit'"),
        ({"network": "vit"}, r"network: expected one of unet, dit, got 'vit'; did you mean 'dit'\?"),
        ({"network": "unet", "patch": 2}, "patch: an option of network dit, which network unet does not have"),
    ],
)
def test_options_that_a_transformer_does_not_take_are_named(options, said):
    with pytest.raises(ValueError, match=f"^{said}$"):
        Options(**{"data": "x", "network": "dit", **options})
    assert "patch" not in Options(**TINY).used() and Options(**TINY | DIT).used()["patch"] == 2


@pytest.mark.slow
def test_half_of_the_steps_tell_the_network_its_estimate(tmp_path, monkeypatch):
    """Whether a step does is drawn by its number: not by the passes, or by where the run was stopped."""
    told, original = [], loop.own_estimate
    monkeypatch.setattr(loop, "own_estimate", lambda *args, **given: told.append(0) or original(*args, **given))
    options = {"self_conditioning": True, "lr": 1e-4, "channels": 16}
    steps = [k for k in range(4) if draws.uniforms(0, k, 1, draws.SELF_CONDITIONING) >= 0.5]
    assert 0 < len(steps) < 4
    run(tmp_path / "one", steps=4, **options)
    assert len(told) == len(steps)
    run(tmp_path / "parts", steps=2, accumulate=2, **options)
    run(tmp_path / "parts", resume=True, steps=4, accumulate=2, **options)
    assert len(told) == 3 * len(steps)
    assert_same_weights(tmp_path / "one" / NAME, tmp_path / "parts" / NAME)
    ddpm = DDPM.from_pretrained(tmp_path / "one")
    assert ddpm.self_conditioned and ddpm.sample(2, steps=2).shape == (2, 1, 8, 8)
    monkeypatch.setattr(loop, "own_estimate", lambda _, x0, **given: torch.zeros_like(x0))
    run(tmp_path / "zeros", steps=4, **options)
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "one" / NAME, tmp_path / "zeros" / NAME)
