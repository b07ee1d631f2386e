import math
import pickle
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_run import CPU, TINY, assert_same_files, files_of, rewrite, run

from fastdiff import files, training
from fastdiff.training import DIGITS, Options, checkpoint, data, evaluate, loop

# data


def test_images_are_scaled_to_minus_one_and_one():
    images = data.Images(torch.tensor([0, 4, 8, 16], dtype=torch.uint8).reshape(4, 1, 1, 1), 16)
    assert images[:].flatten().tolist() == [-1.0, -0.5, 0.0, 1.0]
    assert data.Images(torch.tensor([[[[255]]]], dtype=torch.uint8))[torch.tensor([0])].item() == 1.0


def test_digits_are_two_fixed_stratified_disjoint_halves():
    from sklearn.datasets import load_digits

    train, labels, held_out, held_out_labels = data.digits()
    assert train.pixels.shape == (898, 1, 8, 8) and held_out.pixels.shape == (899, 1, 8, 8)
    both = torch.cat([train.pixels, held_out.pixels]).flatten(1)
    source = torch.from_numpy(load_digits().data).to(torch.uint8)
    # together they are the whole set and no two images in it are equal, so the halves are disjoint
    assert torch.equal(both.unique(dim=0), source.unique(dim=0)) and len(both.unique(dim=0)) == 1797
    counts = [torch.bincount(y, minlength=10) for y in (labels, held_out_labels)]
    assert (counts[0] - counts[1]).abs().max() <= 1
    assert labels[:12].tolist() == [8, 1, 4, 3, 1, 6, 2, 8, 6, 5, 2, 3]
    assert (train[:].amin().item(), train[:].amax().item()) == (-1.0, 1.0)


def test_folder_reads_nested_images_and_names_what_it_leaves_out(tmp_path, capsys):
    (tmp_path / "a" / "b").mkdir(parents=True)
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 3:27] = (255, 0, 0)  # the left and right margins are black
    Image.fromarray(wide).save(tmp_path / "a" / "b" / "wide.png")
    Image.new("L", (9, 9), 255).save(tmp_path / "a" / "white.jpg")
    (tmp_path / "notes.txt").write_text("no image")
    whole = (tmp_path / "a" / "white.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    images = data.folder(tmp_path, 4)
    assert images.pixels.shape == (2, 3, 4, 4)
    red, white = images[torch.tensor([0, 1])]
    assert (white == 1).all()
    assert (red[0] == 1).all() and (red[1:] == -1).all()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastdiff: warning:")]
    assert len(lines) == 1 and "2 of 4" in lines[0] and "cut.jpg" in lines[0]
    assert data.folder(tmp_path, 4, gray=True).pixels.shape == (2, 1, 4, 4)


def test_folder_without_images_is_an_error(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="no readable image among the 1 files"):
        data.folder(tmp_path, 4)
    with pytest.raises(NotADirectoryError):
        data.folder(tmp_path / "notes.txt", 4)
    with pytest.raises(FileNotFoundError):
        data.folder(tmp_path / "missing", 4)


def test_grid_shows_each_image_magnified_in_reading_order(tmp_path):
    images = torch.full((3, 1, 8, 8), -1.0)
    images[1] = 1.0
    data.save_grid(tmp_path / "grid.png", images)
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    assert picture.shape == (100, 100)  # 2 x 2 tiles of 6 * 8 pixels and a frame of 1
    assert (picture[1:49, 1:49] == 0).all() and (picture[1:49, 51:99] == 255).all()
    assert (picture[51:99, 1:49] == 0).all() and (picture[50:, 50:] == 64).all()
    data.save_grid(tmp_path / "colour.png", torch.ones(1, 3, 64, 64))
    assert np.asarray(Image.open(tmp_path / "colour.png")).shape == (66, 66, 3)


# Frechet distance


def test_frechet_distance_of_commuting_gaussians():
    # common eigenvectors: |m1 - m2|^2 + sum (sqrt(a_i) - sqrt(b_i))^2; a zero is known to 1e-8, the root of eps
    m1, m2 = np.array([1.0, 2.0, 0.0]), np.array([0.0, 0.0, 0.0])
    a, b = np.array([4.0, 1.0, 0.0]), np.array([1.0, 9.0, 0.0])
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    s1, s2 = rotation * a @ rotation.T, rotation * b @ rotation.T
    assert evaluate.frechet_gaussian(m1, s1, m2, s2) == pytest.approx(5 + 1 + 4, abs=1e-6)
    assert evaluate.frechet_gaussian(m1, s1, m1, s1) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_non_commuting_gaussians():
    # 2x2: tr (S1 S2)^1/2 = sqrt(tr(S1 S2) + 2 sqrt(det S1 det S2)), by Cayley-Hamilton
    s1, s2 = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[5.0, -2.0], [-2.0, 1.0]])
    assert not np.allclose(s1 @ s2, s2 @ s1)
    cross = math.sqrt(np.trace(s1 @ s2) + 2 * math.sqrt(np.linalg.det(s1) * np.linalg.det(s2)))
    expected = 2 + np.trace(s1 + s2) - 2 * cross
    zero, one = np.zeros(2), np.ones(2)
    assert evaluate.frechet_gaussian(zero, s1, one, s2) == pytest.approx(expected, rel=1e-12)
    assert evaluate.frechet_gaussian(one, s2, zero, s1) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_images_fits_mean_and_covariance():
    images = torch.randn(50, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    assert evaluate.frechet_distance(images, images + 0.5) == pytest.approx(4 * 0.25, rel=1e-5)
    variance = np.var(images.flatten(1).numpy(), axis=0, ddof=1).sum()
    # S2 = 4 S1 and m2 = 2 m1: tr(S1 + 4 S1 - 2 * 2 S1) + |m1|^2
    mean = images.flatten(1).mean(0).square().sum().item()
    assert evaluate.frechet_distance(images, 2 * images) == pytest.approx(variance + mean, rel=1e-5)
    with pytest.raises(ValueError, match="one shape"):
        evaluate.frechet_distance(images, images[:, :, :1])


@pytest.mark.slow
def test_report_of_real_digits_and_of_one_class():
    train, labels, _, _ = data.digits()
    report = evaluate.evaluate(train[:])
    assert report.n_samples == 898 and report.classes_present == 10
    assert report.frechet_distance == pytest.approx(report.frechet_distance_real, abs=1e-9)
    assert report.classifier_accuracy > 0.95 and report.classifier_confidence_real > 0.95
    assert report.class_entropy == pytest.approx(math.log(10), abs=0.01)
    assert report.nearest_distance == pytest.approx(0, abs=1e-2) and report.nearest_distance_real > 1
    zeros = evaluate.evaluate(train[labels == 0])
    assert zeros.classes_present == 1 and zeros.class_counts[0] == 89 and zeros.class_entropy == 0
    assert zeros.frechet_distance > 10 * report.frechet_distance_real
    with pytest.raises(ValueError, match="samples: expected"):
        evaluate.evaluate(torch.zeros(4, 3, 8, 8))


# EMA and options


def test_update_ema_is_the_convex_sum():
    ema, model = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    expected = [0.9 * a + 0.1 * b for a, b in zip(ema.parameters(), model.parameters(), strict=True)]
    kept = [p.clone() for p in model.parameters()]
    loop.update_ema(ema, model, 0.9)
    torch.testing.assert_close(list(ema.parameters()), expected)
    torch.testing.assert_close(list(model.parameters()), kept, rtol=0, atol=0)


def test_ema_of_a_run_follows_the_weights(tmp_path):
    seen = []
    original = loop.update_ema

    def spy(ema, model, decay):
        seen.append(decay)
        original(ema, model, decay)

    loop.update_ema = spy
    try:
        run(tmp_path, steps=3, ema=0.2)
    finally:
        loop.update_ema = original
    assert seen == pytest.approx([1 / 10, 2 / 11, 0.2])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch_size", -1),
        ("ema", 1.0),
        ("lr", 0.0),
        ("lr", math.nan),
        ("clip_grad", math.inf),
        ("warmup", -1),
        ("channels", 12),
        ("size", 16),
        ("save_every", 0),
    ],
)
def test_options_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}: "):
        Options(**{**TINY, name: value})


def test_folder_options_build_a_network_with_attention():
    ddpm = training.build(Options(data="x", size=16, channels=8, objective="eps", schedule="linear", timesteps=7))
    assert ddpm.model.sample_shape == (3, 16, 16)
    assert ddpm.model.config["down_block_types"] == ["AttnDownBlock2D"] * 3
    assert (ddpm.config["objective"], ddpm.config["schedule"], ddpm.config["timesteps"]) == ("eps", "linear", 7)
    assert ddpm(torch.zeros(2, 3, 16, 16)).isfinite()


# training


@pytest.mark.slow
def test_training_reduces_the_loss(tmp_path):
    def loss(ddpm):
        torch.manual_seed(1)
        with torch.no_grad():
            return ddpm(data.digits()[2][:512]).item()

    torch.manual_seed(0)
    before = loss(training.build(Options(**TINY)))
    assert run(tmp_path, steps=60, ema=0.9) == 60
    state = checkpoint.load(tmp_path / "model.safetensors")
    assert loss(state.diffusion) < 0.7 * before
    assert loss(checkpoint.load_model(tmp_path / "model.safetensors")) < 0.7 * before


@pytest.mark.slow
def test_resume_is_exact_in_every_bit(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole, steps=5) == 5
    assert run(parts, steps=2) == 2
    assert run(parts, steps=5, resume=True) == 5
    assert_same_files(whole / "model.safetensors", parts / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on_exactly(tmp_path, monkeypatch, number):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, steps=4)
    original, handler = loop.update_ema, signal.getsignal(number)

    def raise_at_second_step(*args):
        original(*args)
        if args[2] == pytest.approx(2 / 11):
            signal.raise_signal(number)

    monkeypatch.setattr(loop, "update_ema", raise_at_second_step)
    assert run(parts, steps=4) == 2
    assert signal.getsignal(number) is handler
    monkeypatch.undo()
    assert checkpoint.load(parts / "model.safetensors").step == 2
    assert run(parts, steps=4, resume=True) == 4
    assert_same_files(whole / "model.safetensors", parts / "model.safetensors")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path):
    run(tmp_path, steps=2)
    before = (tmp_path / "model.safetensors").read_bytes()
    state = checkpoint.load(tmp_path / "model.safetensors")
    with torch.no_grad():
        next(state.diffusion.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match="loss is nan at step 4"):
        training.train(Options(**{**TINY, "steps": 4}), tmp_path, CPU, state)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_resume_refuses_other_options(tmp_path):
    run(tmp_path, steps=1)
    state = checkpoint.load(tmp_path / "model.safetensors")
    assert training.resumed_options(state, {"steps": 9, "lr": DIGITS["lr"]}).steps == 9
    with pytest.raises(ValueError, match=r"^lr: the run was started with 0\.003, got 0\.1"):
        training.resumed_options(state, {"lr": 0.1})
    state.options.pop("lr")
    with pytest.raises(ValueError, match="options"):
        training.resumed_options(state, {})


# checkpoints


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="disk"), files.replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError("disk full")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]
    with open(path) as reader:
        with files.replacing(path) as temporary:
            temporary.write_text("new")
            assert path.read_text() == "old"
        assert reader.read() == "old"  # who has the file open sees all of the old one
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    run(tmp_path, steps=1)
    path = tmp_path / "model.safetensors"
    before, state = path.read_bytes(), checkpoint.load(path)

    def save_half(tensors, name, metadata):
        Path(name).write_bytes(before[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", save_half)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(path, state)
    assert path.read_bytes() == before and files_of(tmp_path) == {path.name}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-10]), "cut short"),
        (lambda p: p.write_bytes(p.read_bytes()[:20]), "cut short"),
        (lambda p: p.write_bytes(np.random.default_rng(0).bytes(4096)), "cut short"),
        (lambda p: p.write_bytes(b""), "cut short"),
        (lambda p: save_file(load_file(p), p), "no fastdiff metadata"),
        (lambda p: save_file(load_file(p), p, {"fastdiff": "{"}), "usable fastdiff checkpoint"),
        (lambda p: save_file(load_file(p), p, {"fastdiff": "[" * 100_000}), "usable fastdiff checkpoint"),
        (lambda p: save_file(load_file(p), p, {"fastdiff": "[1]"}), "'version'"),
        (lambda p: rewrite(p, version=1), "format version 1, expected 2"),
        (lambda p: rewrite(p, unet={"block_out_channels": "x"}), "usable fastdiff checkpoint"),
        (lambda p: rewrite(p, unet={"colour": 1}), "usable fastdiff checkpoint"),
        (lambda p: rewrite(p, config={"schedule": "none"}), "usable fastdiff checkpoint"),
        (lambda p: rewrite(p, model="Other"), "model 'Other', expected one of DDPM, NCSN, ScoreSDE, FlowMatching, Edm"),
        (lambda p: rewrite(p, {"ema.conv_in.weight": torch.zeros(16, 1, 3, 3)}), "conv_in.weight"),
        (
            lambda p: rewrite(p, {"optimizer.0.exp_avg": torch.zeros(3)}),
            "optimizer.0.exp_avg: the config",
        ),
        (lambda p: rewrite(p, {"optimizer.999.step": torch.zeros(())}), "unknown tensor 'optimizer.999.step'"),
        (lambda p: rewrite(p, {"other": torch.zeros(3)}), "unknown tensor 'other'"),
        (lambda p: rewrite(p, {"rng.cpu": torch.zeros(3)}), "usable fastdiff checkpoint"),
        (lambda p: rewrite(p, {"optimizer.0.step": None}), "no tensor 'optimizer.0.step'"),
    ],
)
def test_foreign_and_spoiled_checkpoints_are_told_in_one_line(tmp_path, tiny, spoil, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(tiny.read_bytes())
    assert checkpoint.load(path).step == 1
    spoil(path)
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.load(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_load_model_takes_the_moving_average(tiny):
    stored = load_file(tiny)
    assert not torch.equal(stored["ema.conv_in.weight"], stored["model.conv_in.weight"])
    ddpm = checkpoint.load_model(tiny)
    assert not ddpm.training and ddpm.config == checkpoint.load(tiny).diffusion.config
    for name, tensor in ddpm.model.state_dict().items():
        assert torch.equal(tensor, stored[f"ema.{name}"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tiny")
    run(out, steps=1)
    return out / "model.safetensors"


class Trap:
    def __reduce__(self):
        return (Path("unpickled").touch, ())


def test_a_pickle_is_never_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model.pt").write_bytes(pickle.dumps(Trap()))
    torch.save({"model": Trap()}, "torch.pt")
    for name in ("model.pt", "torch.pt"):
        with pytest.raises(ValueError, match="not a safetensors file"):
            checkpoint.load(Path(name))
    assert not Path("unpickled").exists()


def test_writable_finds_what_cannot_be_written(tmp_path):
    assert files.writable(tmp_path / "a" / "b.txt") == tmp_path / "a" / "b.txt"
    assert list((tmp_path / "a").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        files.writable(tmp_path / "file" / "b.txt")
    with pytest.raises(IsADirectoryError):
        files.writable(tmp_path / "a")


def test_a_missing_dependency_names_the_extra():
    for extra, args in (("train", ()), ("ode", ("ode",))):
        with pytest.raises(ImportError) as error:
            files.need("no_such_module", *args)
        command = f"pip install 'fastdiff-kernels[{extra}]' (in a clone '.[{extra}]')"
        assert str(error.value) == f"no_such_module is not installed: {command}"


def test_old_paths_lead_to_what_moved():
    import fastdiff.checkpoint
    import fastdiff.data

    assert fastdiff.checkpoint.load_model is checkpoint.load_model
    assert fastdiff.data.save_grid is data.save_grid and fastdiff.data.digits is data.digits
