import contextlib
import io
import json
import signal
import subprocess
from pathlib import Path

import forked
import numpy as np
import pytest
from PIL import Image

from fastdiff.cli import main
from fastdiff.training import checkpoint

TINY = ["--sample-every", "0", "--channels", "8", "--batch-size", "8", "--timesteps", "20", "--device", "cpu"]


def call(*args: object) -> subprocess.CompletedProcess[str]:
    return forked.run("-m", "fastdiff", *args)


def refused(capsys, *args: object) -> str:
    """Run a command that must fail; the line that it says."""
    capsys.readouterr()
    try:
        status = main([str(arg) for arg in args])
    except SystemExit as error:
        status = error.code
    said = capsys.readouterr()
    assert status in (1, 2) and said.out == ""
    assert said.err.startswith("fastdiff: error: ") and said.err.count("\n") == 1
    return said.err


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    told, shown = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(shown):
        assert main(["train", "--data", "digits", "--out", str(out), "--steps", "3", *TINY]) == 0
    assert "3/3" in shown.getvalue() and "images/s" not in told.getvalue()
    return out / "model.safetensors"


@pytest.mark.slow
def test_train_resume_needs_only_the_folder(model, tmp_path, capsys):
    (tmp_path / "model.safetensors").write_bytes(model.read_bytes())
    assert main(["train", "--out", str(tmp_path), "--resume", "--steps", "4", "--device", "cpu"]) == 0
    assert checkpoint.load(tmp_path / "model.safetensors").step == 4
    assert "4 steps" in capsys.readouterr().out
    line = refused(capsys, "train", "--out", tmp_path, "--resume", "--channels", 16, "--device", "cpu")
    assert "channels: the run was started with 8, got 16" in line


@pytest.mark.slow
def test_train_on_a_folder_of_images(tmp_path, capsys):
    for i in range(3):
        Image.new("RGB", (20, 10), (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
    with contextlib.suppress(OSError):  # a system that takes no such name
        Path(tmp_path, "broken-\udcff.png").write_bytes(b"no image")
    size = ["--size", "8", "--steps", "2", *TINY]
    out = tmp_path / "run"
    assert main(["train", "--data", str(tmp_path), "--out", str(out), "--bf16", *size]) == 0
    state = checkpoint.load(out / "model.safetensors")
    assert state.ema.sample_shape == (3, 8, 8) and state.step == 2 and state.options["bf16"]
    pixels = ["eval", str(out), "--device", "cpu", "--n", "6", "--steps", "1", "--features", "pixels"]
    (tmp_path / "4.png").write_bytes((tmp_path / "2.png").read_bytes())
    assert main([*pixels, "--reference", str(tmp_path / "real.npz")]) == 0
    first, said = capsys.readouterr()
    assert f"files: {out}: the folder of a run" in said
    assert "precision" in first and "frechet_distance" in first and np.load(tmp_path / "real.npz")["mu"].shape == (192,)
    assert main([*pixels, "--reference", str(tmp_path / "real.npz")]) == 0
    again = capsys.readouterr().out
    assert [line for line in first.splitlines() if "frechet" in line] == [
        line for line in again.splitlines() if "frechet" in line
    ]
    line = refused(capsys, "eval", out, "--device", "cpu", "--features", "pixel")
    assert "features: expected inception, dinov2, pixels" in line
    line = refused(capsys, "eval", out, "--device", "cpu", "--features", "pixels", "--reference", tmp_path / "0.png/x")
    assert "0.png" in line  # before anything is drawn
    line = refused(capsys, "sample", tmp_path, "--out", tmp_path / "x")
    assert line == f"fastdiff: error: {tmp_path}: Is a directory without model.safetensors\n"


@pytest.mark.slow
def test_sample_writes_grid_and_array(model, tmp_path):
    prefix = tmp_path / "new" / "v1.5"
    how = ["--sampler", "ddim", "--steps", 4, "--eta", 0.5, "--seed", 3]
    done = call("sample", model, "--n", 5, *how, "--out", prefix)
    assert done.returncode == 0, done.stderr
    assert "4/4" in done.stderr
    images = np.load(f"{prefix}.npy")
    assert images.shape == (5, 1, 8, 8) and images.dtype == np.float32
    assert np.abs(images).max() <= 1 and images.std() > 0
    grid = np.asarray(Image.open(f"{prefix}.png"))
    assert grid.shape == (2 * 50, 3 * 50)
    assert grid[1, 1] == round((images[0, 0, 0, 0] + 1) * 127.5)
    assert sorted(p.name for p in prefix.parent.iterdir()) == ["v1.5.npy", "v1.5.png"]


@pytest.mark.slow
def test_samples_depend_on_the_seed_and_not_on_the_batch(model, tmp_path):
    def draw(name: str, *args: str) -> np.ndarray:
        base = ["sample", str(model), "--n", "5", "--steps", "3", "--device", "cpu", "--out", str(tmp_path / name)]
        assert main([*base, *args]) == 0
        return np.load(tmp_path / f"{name}.npy")

    one = draw("a")
    np.testing.assert_array_equal(draw("b"), one)
    np.testing.assert_allclose(draw("c", "--batch-size", "2"), one, atol=1e-5)
    assert np.abs(draw("d", "--seed", "1") - one).max() > 0.1
    assert np.abs(one[0] - one[2]).max() > 0.1


@pytest.mark.slow
def test_eval_reports_and_writes_json(model, tmp_path, capsys):
    args = ["eval", model, "--n", 12, "--steps", 2, "--json", tmp_path / "eval.json", "--device", "cpu"]
    assert main([*map(str, args)]) == 0
    report = json.loads((tmp_path / "eval.json").read_text())
    assert report["n_samples"] == 12 and sum(report["class_counts"]) == 12
    assert report["frechet_distance"] > 3 * report["frechet_distance_real"] > 0.5
    assert report["class_entropy_max"] == pytest.approx(np.log(10))
    assert 0 <= report["class_entropy"] <= report["class_entropy_max"]
    assert 0.1 <= report["classifier_confidence"] <= 1 and 1 <= report["classes_present"] <= 10
    assert f"frechet_distance           {report['frechet_distance']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bench", "benchmark", "sampel"])
def test_an_unknown_command_names_the_others_and_where_measuring_is(name, capsys):
    line = refused(capsys, name, "--rounds", "3")
    assert f"unknown command {name!r}: expected one of train, sample, eval" in line
    assert "python -m benchmarks" in line


def test_the_help_says_the_defaults_that_no_value_says(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "as in 0.999,0.9999 (default: none)" in text and "(default: 3, with --gray 1)" in text
    assert "score, flow or edm (default: v for ddpm, score for ncsn," in text


@pytest.mark.slow
def test_interrupt_keeps_a_checkpoint_and_tells_how_to_resume(tmp_path):
    out = tmp_path / "a run"
    args = ["train", "--data", "digits", "--out", out, "--steps", 10**6, *TINY]
    process = forked.start("-m", "fastdiff", *args)
    said = b""
    while b"loss" not in said:  # the bar shows the loss after ten steps
        byte = process.stderr.read(1)
        assert byte, said.decode()
        said += byte
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read().decode()
    assert process.wait() == 130
    last = rest.splitlines()[-1]
    state = checkpoint.load(out / "model.safetensors")
    assert state.step >= 10 and "Traceback" not in rest
    assert last.startswith(f"fastdiff: interrupted at step {state.step} of 1000000; go on with: fastdiff train")
    assert f"--out '{out}'" in last and last.endswith("--resume")


@pytest.mark.slow
def test_a_traceback_is_never_shown(model, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(model.read_bytes()[:-1])
    done = call("sample", cut, "--out", tmp_path / "x")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"fastdiff: error: {cut} is not a safetensors file") and done.stderr.count("\n") == 1
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "arguments are required"),
        (["fly"], "unknown command 'fly'"),
        (["smaple"], "did you mean 'sample'?"),
        (["train", "--out", "x", "--learning-rate", "1"], "did you mean '--lr'? (see fastdiff train --help)"),
        (["train"], "--out"),
        (["train", "--out", "x"], "--data"),
        (["train", "--out", "x", "--data", "missing"], "missing: No such file or directory"),
        (["train", "--out", "x", "--data", "digits", "--steps", "many"], "--steps"),
        (["train", "--out", "x", "--data", "digits", "--steps", "0"], "steps: expected at least 1, got 0"),
        (["train", "--out", "x", "--data", "digits", "--size", "9"], "size: the digits are 8x8, got 9"),
        (["train", "--out", "x", "--data", "digits", "--objective", "y"], "objective"),
        (["train", "--out", "x", "--data", "digits", "--schedule", "steep"], "schedule"),
        (["train", "--out", "x", "--data", "digits", "--device", "abacus"], "--device: 'abacus'"),
        (["train", "--out", "x", "--resume"], "model.safetensors: No such file or directory"),
        (["train", "--out", "file/x", "--data", "digits"], "file"),
        (["sample", "missing", "--out", "x"], "missing: No such file or directory"),
        (["sample", ".", "--out", "x"], "Is a directory"),
        (["sample", "file", "--out", "x"], "file is not a safetensors file"),
        (["sample", "MODEL", "--out", "file/x"], "file"),
        (["sample", "MODEL", "--out", "x", "--n", "0"], "expected at least 1"),
        (["sample", "MODEL", "--out", "x", "--sampler", "magic"], "--sampler"),
        (["sample", "MODEL", "--out", "x", "--sampler", "euler"], "got 'euler'; use 'ddim'"),
        (["sample", "MODEL", "--out", "x", "--steps", "21"], "steps"),
        (["sample", "MODEL", "--out", "x", "--sampler", "ddim", "--eta", "-1"], "eta"),
        (["eval", "MODEL", "--json", "folder"], "folder: Is a directory"),
    ],
)
def test_bad_input_is_one_clear_line(model, tmp_path, monkeypatch, capsys, args, said):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("no checkpoint")
    Path("folder").mkdir()
    assert said in refused(capsys, *(model if arg == "MODEL" else arg for arg in args))


def test_a_run_is_not_overwritten(model, capsys):
    before = model.read_bytes()
    line = refused(capsys, "train", "--data", "digits", "--out", model.parent, *TINY)
    assert "exists: go on with --resume" in line and model.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "kind", "sampler"),
    [
        (["--formulation", "ncsn", "--timesteps", "4", "--sigma-max", "2"], "NCSN", "ddpm"),
        (["--formulation", "vp"], "ScoreSDE", "euler_maruyama"),
        (["--formulation", "ve", "--sigma-max", "5"], "ScoreSDE", "predictor_corrector"),
        (["--formulation", "subvp", "--objective", "eps"], "ScoreSDE", "ddim"),
        (["--formulation", "flow"], "FlowMatching", "heun"),
        (["--formulation", "edm", "--objective", "x0", "--sigma-data", "0.6"], "Edm", "ddim"),
        (["--variance", "learned", "--loss", "hybrid"], "DDPM", "ddpm"),
    ],
)
def test_every_formulation_is_trained_resumed_and_sampled(options, kind, sampler, tmp_path):
    run, tiny = tmp_path / "run", ["--sample-every", "0", "--channels", "8", "--batch-size", "8", "--device", "cpu"]
    tiny += ["--timesteps", "20"] if kind == "DDPM" else []
    assert main(["train", "--data", "digits", "--out", str(run), "--steps", "2", *tiny, *options]) == 0
    assert main(["train", "--out", str(run), "--resume", "--steps", "3", "--device", "cpu"]) == 0
    state = checkpoint.load(run / "model.safetensors")
    assert type(state.diffusion).__name__ == kind and state.step == 3
    if "--sigma-max" in options:
        assert state.diffusion.process.sigma_range()[1] == pytest.approx(float(options[-1]))
    if "--sigma-data" in options:
        assert state.diffusion.process.sigma_data == state.options["sigma_data"] == 0.6
    for more in ([], ["--sampler", sampler]):  # its own sampler, and another
        prefix = tmp_path / f"drawn{len(more)}"
        command = ["sample", str(run / "model.safetensors"), "--n", "2", "--out", str(prefix), "--device", "cpu"]
        assert main([*command, "--steps", "2", *more]) == 0
        images = np.load(f"{prefix}.npy")
        assert images.shape == (2, 1, 8, 8) and np.isfinite(images).all()


def test_formulations_refuse_what_is_not_theirs(capsys, tmp_path):
    train = ["train", "--data", "digits", "--device", "cpu", "--out", tmp_path / "run"]
    assert "formulation: expected one of ddpm, ncsn, vp, subvp, ve, flow, edm, got 'sde'" in refused(
        capsys, *train, "--formulation", "sde"
    )
    foreign = [
        ("vp", "--variance", "learned"),
        ("vp", "--variance", "posterior"),  # the default too: it is refused, not ignored
        ("ncsn", "--schedule", "linear"),
        ("vp", "--timesteps", "10"),
        ("ve", "--timesteps", "10"),
        ("ddpm", "--sigma-max", "5"),
        ("subvp", "--sigma-min", "0.1"),
        ("flow", "--schedule", "linear"),
        ("edm", "--sigma-max", "5"),
        ("ddpm", "--sigma-data", "0.5"),
    ]
    for formulation, flag, value in foreign:
        line = refused(capsys, *train, "--formulation", formulation, flag, value)
        assert f"{flag[2:].replace('-', '_')}: an option of " in line and f"{formulation} does not have" in line
    assert "weighting: expected one of simple, likelihood, min_snr" in refused(
        capsys, *train, "--formulation", "vp", "--weighting", "vlb"
    )
    assert not (tmp_path / "run" / "model.safetensors").exists()
