"""Files of runs that are hostile or damaged, and what a checkpoint must bring back."""

import copy
import errno
import json
import math
import os
import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import TINY, assert_same_files, metadata_of, rewrite, run

from fastdiff import DDPM, NCSN, Edm, FlowMatching, ScoreSDE, UNet, files, training
from fastdiff.support import run_file, weights
from fastdiff.training import Options, State, checkpoint


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tiny")
    run(out, steps=1)
    return out / "model.safetensors"


@pytest.fixture
def spoiled(tiny, tmp_path) -> Path:
    """A copy to spoil."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(tiny.read_bytes())
    return path


def message(path: Path) -> str:
    """What loading says, in one line that names the file; no network is built on the way."""
    with pytest.raises(ValueError) as error:
        checkpoint.load(path)
    with pytest.raises(ValueError):
        checkpoint.load_model(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("block_out_channels", [4000, 8000]),
        ("block_out_channels", [8] * 100_000),
        ("layers_per_block", 20_000),
        ("layers_per_block", 10**30),
        ("in_channels", 10**9),
        ("in_channels", 10**18),
        ("in_channels", 10**30),
        ("out_channels", 2),
        ("time_embedding_dim", 10**9),
        ("num_class_embeds", 10**9),
        ("norm_num_groups", 10**30),
        ("attention_head_dim", "many"),
        ("down_block_types", {"a": 1}),
        ("sample_size", [8, 8, 8]),
        ("colour", 1),
    ],
)
def test_a_network_that_does_not_fit_is_never_built(spoiled, nothing_built, name, value):
    rewrite(spoiled, unet={**metadata_of(spoiled)["unet"], name: value})
    assert "usable fastdiff checkpoint" in message(spoiled)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"timesteps": 10**9}, "timesteps: expected an integer of at most"),
        ({"timesteps": 10**40}, "timesteps"),
        ({"timesteps": "20"}, "timesteps"),
        ({"timesteps": -1}, "timesteps"),
        ({"schedule": ["cosine"]}, "betas"),
        ({"schedule": None}, "betas"),
        ({"objective": 3}, "objective"),
        ({"clip": "far"}, ""),
        ({"importance": True}, None),
        ({"colour": 1}, "colour"),
    ],
)
def test_a_configuration_of_wrong_values_is_one_line(spoiled, changes, said):
    rewrite(spoiled, config={**metadata_of(spoiled)["config"], **changes})
    if said is None:  # without a history it begins anew, and says so
        with pytest.warns(UserWarning, match="no history of importance sampling"):
            assert checkpoint.load(spoiled).diffusion.importance.seen.sum() == 0
    else:
        assert said in message(spoiled)


@pytest.mark.parametrize("name", ["schedule", "timesteps", "objective", "variance"])
def test_a_configuration_is_not_completed_by_defaults(spoiled, name):
    config = metadata_of(spoiled)["config"]
    del config[name]
    rewrite(spoiled, config=config)
    assert f"has no '{name}'" in message(spoiled)


@pytest.mark.parametrize(
    "changes",
    [{"step": -1}, {"step": True}, {"step": "1"}, {"step": 1.5}, {"unet": []}, {"options": None}, {"model": {}}],
    ids=str,
)
def test_metadata_of_wrong_types_is_one_line(spoiled, changes):
    rewrite(spoiled, **changes)
    assert next(iter(changes)) in message(spoiled)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.int64, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", ["ema.conv_in.weight", "model.conv_in.weight", "optimizer.0.exp_avg"])
def test_weights_of_no_floating_type_are_refused(spoiled, name, dtype):
    rewrite(spoiled, {name: load_file(spoiled)[name].to(dtype)})
    with pytest.raises(ValueError, match=f"{name}: expected a tensor of type F64, F32, F16, BF16, got"):
        checkpoint.load(spoiled)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_any_floating_type_are_taken(spoiled, dtype):
    before = load_file(spoiled)["ema.conv_in.weight"].to(dtype)
    rewrite(spoiled, {"ema.conv_in.weight": before})
    assert torch.equal(checkpoint.load_model(spoiled).model.conv_in.weight, before.float())


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["ema.conv_in.bias", "model.conv_in.bias", "optimizer.0.exp_avg_sq"])
def test_what_is_not_finite_is_refused_by_name(spoiled, name, value):
    tensor = load_file(spoiled)[name]
    tensor.view(-1)[-1] = value
    rewrite(spoiled, {name: tensor})
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinity"):
        checkpoint.load(spoiled)


def test_a_tensor_too_much_or_too_few_is_named(spoiled):
    rewrite(spoiled, {"ema.extra": torch.zeros(1)})
    assert "unknown tensor 'extra'" in message(spoiled)
    rewrite(spoiled, {"ema.extra": None, "ema.conv_in.bias": None})
    assert "no tensor 'conv_in.bias'" in message(spoiled)


def test_options_of_wrong_types_do_not_resume(spoiled):
    state = checkpoint.load(spoiled)
    for name, value in (("steps", "9"), ("lr", None), ("gray", 1), ("size", 8.0), ("data", 3), ("formulation", [])):
        broken = copy.copy(state)
        broken.options = {**state.options, name: value}
        with pytest.raises(ValueError, match=name):
            training.resumed_options(broken, {})


def test_options_of_another_formulation_do_not_resume(spoiled):
    state = checkpoint.load(spoiled)
    with pytest.raises(ValueError, match="sigma_max: an option of ncsn and ve"):
        training.resumed_options(state, {"sigma_max": Options.sigma_max})


def test_a_run_of_before_goes_on_with_the_deviation_it_had(spoiled):
    state = checkpoint.load(spoiled)
    state.options.update(formulation="edm", objective="edm")
    del state.options["sigma_data"]
    assert training.resumed_options(state, {}).sigma_data == 0.5
    with pytest.raises(ValueError, match=r"sigma_data: the run was started with 0.5, got 0.75"):
        training.resumed_options(state, {"sigma_data": 0.75})


def test_options_that_do_not_fit_the_network_do_not_resume(spoiled):
    state = checkpoint.load(spoiled)
    state.options.update(data="/images", size=16, gray=False)
    with pytest.raises(ValueError, match=r"images of \(3, 16, 16\), its network draws \(1, 8, 8\)"):
        training.resumed_options(state, {})


def test_the_folder_of_images_may_move_and_nothing_else(spoiled):
    state = checkpoint.load(spoiled)
    state.options.update(data="/old", size=8, gray=True)
    assert training.resumed_options(state, {"data": "/new"}).data == "/new"
    for other in ("digits", ""):
        with pytest.raises(ValueError, match=r"^data: the run was started with '/old'"):
            training.resumed_options(state, {"data": other})
    state.options["data"] = "digits"
    with pytest.raises(ValueError, match=r"^data: the run was started with 'digits'"):
        training.resumed_options(state, {"data": "/new"})


# what comes back


def importance_state() -> State:
    """The start of a run whose levels are drawn by their losses."""
    torch.manual_seed(3)
    ddpm = DDPM(training.build(Options(**TINY)).model, timesteps=2, objective="v", schedule="cosine", importance=True)
    options = Options(**{**TINY, "timesteps": 2, "batch_size": 64})
    rng = {"cpu": torch.get_rng_state()}
    return State(ddpm, copy.deepcopy(ddpm.model), {}, rng, vars(options), 0)


def go_on(out: Path, state: State, steps: int) -> int:
    return training.train(Options(**{**state.options, "steps": steps}), str(out), "cpu", state)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:schedule")
def test_importance_sampling_resumes_exactly(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert go_on(whole, importance_state(), 4) == 4
    assert go_on(parts, importance_state(), 2) == 2
    state = checkpoint.load(parts / "model.safetensors")
    # both levels have their ten losses, so the next levels are drawn by them
    assert (state.diffusion.importance.seen >= 10).all()
    assert state.diffusion.importance.probabilities()[0] != 0.5
    assert go_on(parts, state, 4) == 4
    assert_same_files(whole / "model.safetensors", parts / "model.safetensors")
    assert load_file(whole / "model.safetensors")["importance.losses"].shape == (2, 10)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:schedule")
def test_a_history_must_fit_its_chain(tmp_path):
    go_on(tmp_path, importance_state(), 1)
    path = tmp_path / "model.safetensors"
    good = path.read_bytes()
    wrong = [
        ({"importance.losses": torch.zeros(3, 10)}, "losses"),
        ({"importance.seen": torch.zeros(2)}, "importance.seen: expected torch.int64"),
        ({"importance.seen": None}, "seen"),
        ({"importance.more": torch.zeros(2)}, "more"),
    ]
    for tensors, said in wrong:
        path.write_bytes(good)
        rewrite(path, tensors)
        with pytest.raises(ValueError, match=said):
            checkpoint.load(path)
    path.write_bytes(good)
    rewrite(path, config={**metadata_of(path)["config"], "importance": False})
    with pytest.raises(ValueError, match="does not use"):
        checkpoint.load(path)


@pytest.mark.slow
def test_a_run_folder_is_read_as_its_file(tiny):
    for path in (tiny, str(tiny), tiny.parent, str(tiny.parent)):
        assert torch.equal(checkpoint.load_model(path).model.conv_in.bias, load_file(tiny)["ema.conv_in.bias"])
    assert run_file.find(tiny.parent / "nothing") is None and run_file.find(tiny.parent.parent) is None


def test_a_run_file_tells_what_builds_it(tiny):
    stored = run_file.RunFile.open(tiny)
    ddpm = DDPM(stored.network(UNet), **stored.config)
    assert stored.model == "DDPM" and ddpm.config == checkpoint.load_model(tiny).config
    trained = stored.network(UNet, "model").conv_in.weight
    assert torch.equal(trained, load_file(tiny)["model.conv_in.weight"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("formulation", "kind"),
    [
        ("ddpm", DDPM),
        ("ncsn", NCSN),
        ("vp", ScoreSDE),
        ("subvp", ScoreSDE),
        ("ve", ScoreSDE),
        ("flow", FlowMatching),
        ("edm", Edm),
    ],
)
def test_from_pretrained_reads_a_run_of_its_kind(tmp_path, formulation, kind):
    fitting = {k: v for k, v in TINY.items() if k != "timesteps" or formulation in ("ddpm", "ncsn")}
    training.train(Options(**{**fitting, "formulation": formulation, "steps": 1}), tmp_path, "cpu")
    expected = checkpoint.load_model(tmp_path)
    for path in (tmp_path, str(tmp_path / "model.safetensors")):
        model = kind.from_pretrained(path)
        assert type(model) is kind and model.config == expected.config and not model.training
        for name, tensor in expected.model.state_dict().items():
            assert torch.equal(model.model.state_dict()[name], tensor)
    for other in {DDPM, NCSN, ScoreSDE, FlowMatching, Edm} - {kind}:
        with pytest.raises(ValueError, match=f"is the run of a {kind.__name__}, expected a {other.__name__}"):
            other.from_pretrained(tmp_path)


def test_from_pretrained_of_nothing_is_an_os_error(tmp_path):
    for kind in (DDPM, NCSN, ScoreSDE, FlowMatching, Edm):
        with pytest.raises(OSError, match="nowhere"):
            kind.from_pretrained(tmp_path / "nowhere")


# writing


def test_nothing_that_is_not_finite_is_saved(tiny, tmp_path):
    path = tmp_path / "model.safetensors"
    checkpoint.save(str(path), checkpoint.load(str(tiny)))
    before = path.read_bytes()
    state = checkpoint.load(tiny)
    with torch.no_grad():
        state.ema.conv_in.bias[0] = math.nan
    with pytest.raises(ValueError, match=r"ema\.conv_in\.bias holds NaN or infinity"):
        checkpoint.save(path, state)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_an_os_error(tmp_path, monkeypatch):
    import safetensors

    def full(*_):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match=r"x\.safetensors: .*No space left on device"):
        weights.save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, {})
    with pytest.raises(OSError, match="No space left") as error, files.replacing(tmp_path / "y"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write does, without a name
    assert error.value.filename == str(tmp_path / "y") and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, umask):
    before = os.umask(umask)
    try:
        weights.save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, {})
        with files.replacing(str(tmp_path / "x.npy")) as temporary:
            np.save(temporary.open("wb"), np.zeros(1))
    finally:
        os.umask(before)
    for name in ("x.safetensors", "x.npy"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask


def test_temporary_names_are_unique_and_swept(tmp_path):
    path = tmp_path / "model.safetensors"
    with files.replacing(path) as first, files.replacing(path) as second:
        assert first != second
    (tmp_path / ".model.safetensors.123.tmp").touch()  # as older versions named them
    (tmp_path / ".model.safetensors.0a1b2c.tmp").touch()
    (tmp_path / ".other.safetensors.0a1b2c.tmp").touch()
    files.sweep(path)
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors", ".other.safetensors.0a1b2c.tmp"}


def test_a_locked_folder_is_refused_until_it_is_free(tmp_path):
    with files.locked(tmp_path) as alone:
        assert alone and list(tmp_path.iterdir()) == []
        with pytest.raises(BlockingIOError, match="another training runs in this folder") as error:
            files.locked(tmp_path).__enter__()
        assert error.value.filename == str(tmp_path)
    with files.locked(tmp_path) as alone:
        assert alone


@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")
def test_a_fork_does_not_hold_the_lock(tmp_path):
    """A worker that lives on for seconds after its run was killed would keep the next run out."""
    with files.locked(tmp_path):
        child = os.fork()
        if not child:
            opened = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
            os._exit(str(tmp_path) in opened)
        assert os.waitpid(child, 0)[1] == 0
        with pytest.raises(BlockingIOError):
            files.locked(tmp_path).__enter__()


# PyTorch's own files


def test_a_zip_that_inflates_is_told_from_one_of_pytorch(tmp_path):
    torch.save({"a": torch.zeros(10_000)}, tmp_path / "good.bin")
    weights.check_stored(tmp_path / "good.bin")
    (tmp_path / "no.bin").write_bytes(b"no zip")
    weights.check_stored(tmp_path / "no.bin")
    with zipfile.ZipFile(tmp_path / "bomb.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))
    with pytest.raises(ValueError, match=r"bomb\.bin: .* got a zip file that inflates to 1000000 bytes"):
        weights.check_stored(tmp_path / "bomb.bin")


def test_metadata_survives_as_json(tiny):
    assert json.loads(json.dumps(metadata_of(tiny))) == metadata_of(tiny)
    assert metadata_of(tiny)["version"] == run_file.VERSION
