"""The command under faults: one line, whatever happens, and nothing that was trained is lost."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_run import files_of, metadata_of, rewrite, run

import fastdiff
from fastdiff.cli import main
from fastdiff.training import checkpoint

TINY = ["--sample-every", "0", "--channels", "8", "--batch-size", "8", "--timesteps", "20", "--device", "cpu"]


def refused(capsys, *args: object) -> str:
    """Run a command that must fail; the line that it says."""
    capsys.readouterr()
    try:
        status = main([str(arg) for arg in args])
    except SystemExit as error:
        status = error.code
    said = capsys.readouterr()
    assert status in (1, 2)
    lines = [line for line in said.err.replace("\r", "\n").splitlines() if line.startswith("fastdiff:")]
    assert len(lines) == 1 and lines[0].startswith("fastdiff: error: ") and "Traceback" not in said.err
    return lines[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("model")
    run(out, steps=1)
    return out / "model.safetensors"


@pytest.fixture
def copied(model, tmp_path) -> Path:
    path = tmp_path / "copy" / "model.safetensors"
    path.parent.mkdir()
    path.write_bytes(model.read_bytes())
    return path


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"fastdiff {fastdiff.__version__}\n"


LONG = "9" * 23


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["train", "--out", "x", "--data", ""], "or hf:NAME, got ''"),
        (["train", "--out", "x", "--data", "", "--resume"], "--data"),
        (["train", "--out", "", "--data", "digits"], "--out: expected a path, got ''"),
        *(
            (["train", "--out", "x", "--data", "digits", f"--{name}", LONG], f"{name.replace('-', '_')}: expected")
            for name in ("steps", "batch-size", "channels", "timesteps", "save-every", "warmup", "seed", "size")
        ),
        (["train", "--out", "x", "--data", "digits", "--lr", "1e999"], "lr: expected a finite number"),
        (["train", "--out", "x", "--data", "digits", "--no-gray"], "gray: the digits have one channel"),
        (["sample", "MODEL", "--out", "x", "--n", LONG], "--n: expected at least 1 and at most"),
        (["sample", "MODEL", "--out", "x", "--steps", LONG], "--steps: expected at least 1 and at most"),
        (["sample", "MODEL", "--out", "x", "--seed", LONG], "--seed: expected a number of 64 bits"),
        (["sample", "MODEL", "--out", "x", "--batch-size", LONG], "--batch-size: expected"),
        (["sample", "MODEL", "--out", ".", "--n", "1"], "--out: expected the start of two file names, got '.'"),
        (["sample", "", "--out", "x"], "expected a path"),
        (["sample", "missing", "--out", "new/x"], "missing: No such file"),
        (["eval", "MODEL", "--json", ""], "expected a path"),
    ],
)
def test_bad_arguments_are_one_line(model, tmp_path, monkeypatch, capsys, args, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *(model if arg == "MODEL" else arg for arg in args))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [OverflowError("too large"), MemoryError(), ImportError("no module"), OSError(28, "No space left on device")],
)
def test_every_expected_failure_is_one_line(model, tmp_path, monkeypatch, capsys, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("fastdiff.cli.load_model", fail)
    line = refused(capsys, "sample", model, "--out", tmp_path / "x", "--device", "cpu")
    assert line == f"fastdiff: error: {str(error).replace('[Errno 28] ', '') or 'MemoryError'}"


def test_a_run_folder_is_sampled_as_its_file(model, tmp_path):
    for name, path in (("a", model), ("b", model.parent)):
        args = ["sample", str(path), "--n", "2", "--steps", "2", "--device", "cpu", "--out", str(tmp_path / name)]
        assert main(args) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))


def test_weights_that_are_not_finite_are_not_sampled(copied, tmp_path, capsys):
    rewrite(copied, {"ema.conv_in.bias": load_file(copied)["ema.conv_in.bias"] * float("nan")})
    line = refused(capsys, "sample", copied, "--n", "2", "--steps", "2", "--out", tmp_path / "x", "--device", "cpu")
    assert str(copied) in line and "ema.conv_in.bias holds NaN or infinity" in line
    assert not (tmp_path / "x.npy").exists()


def test_images_that_are_not_finite_are_not_written(copied, tmp_path, capsys):
    rewrite(copied, {"ema.conv_out.weight": torch.full_like(load_file(copied)["ema.conv_out.weight"], 3e38)})
    line = refused(capsys, "sample", copied, "--n", "2", "--steps", "2", "--out", tmp_path / "x", "--device", "cpu")
    assert "2 of 2 images hold NaN or infinity, nothing was written" in line
    assert not (tmp_path / "x.npy").exists() and not (tmp_path / "x.png").exists()


@pytest.mark.slow
def test_damaged_metadata_is_one_line(copied, tmp_path, capsys):
    rewrite(copied, unet={**metadata_of(copied)["unet"], "layers_per_block": 10**30})
    assert str(copied) in refused(capsys, "sample", copied, "--out", tmp_path / "x", "--device", "cpu")
    unet, options = metadata_of(copied)["unet"] | {"layers_per_block": 1}, metadata_of(copied)["options"]
    rewrite(copied, unet={**unet, "sample_size": None})
    line = refused(capsys, "sample", copied, "--out", tmp_path / "x", "--device", "cpu")
    assert f"{copied}: expected a network with a sample_size" in line
    rewrite(copied, unet=unet, options={**options, "steps": "many"})
    line = refused(capsys, "train", "--out", copied.parent, "--resume", "--device", "cpu")
    assert "options are of wrong types: steps" in line


@pytest.mark.slow
def test_resume_where_the_images_have_moved(tmp_path, capsys):
    old, new, out = tmp_path / "old", tmp_path / "new", tmp_path / "run"
    old.mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (80 * i, 0, 0)).save(old / f"{i}.png")
    assert main(["train", "--data", str(old), "--out", str(out), "--size", "8", "--steps", "1", *TINY]) == 0
    old.rename(new)
    line = refused(capsys, "train", "--out", out, "--resume", "--steps", 2, "--device", "cpu")
    assert f"data: {old} is missing; say with --data where the images are now" in line
    line = refused(capsys, "train", "--out", out, "--resume", "--steps", 2, "--device", "cpu", "--data", "digits")
    assert "data: the run was started with" in line
    resumed = ["train", "--out", str(out), "--resume", "--steps", "2", "--device", "cpu", "--data", str(new)]
    assert main(resumed) == 0
    assert f"the run was started with the images of {old} and goes on with those of {new}" in capsys.readouterr().out
    assert checkpoint.load(out / "model.safetensors").options["data"] == str(new)


def test_a_folder_in_use_is_one_line(tmp_path, capsys):
    from fastdiff import files

    with files.locked(tmp_path):
        line = refused(capsys, "train", "--out", tmp_path, "--data", "digits", "--steps", 1, *TINY)
    assert line == f"fastdiff: error: {tmp_path}: another training runs in this folder"


@pytest.mark.slow
def test_a_disk_that_is_full_is_one_line(tmp_path):
    args = ["train", "--out", tmp_path, "--data", "digits", "--steps", 1, *TINY]
    process = forked.run("-m", "fastdiff", *args, file_size=100_000)  # a checkpoint takes 700 kB
    said = process.stderr.replace("\r", "\n")
    assert process.returncode == 1 and "Traceback" not in said
    last = said.splitlines()[-1]
    assert last.startswith(f"fastdiff: error: {tmp_path / 'model.safetensors'}: ") and "File too large" in last
    assert files_of(tmp_path) == set()


def read_until(stream, text: bytes) -> bytes:
    said = b""
    while text not in said:
        byte = stream.read(1)
        assert byte, said.decode()
        said += byte
    return said


@pytest.mark.slow
def test_a_hangup_saves_and_says_how_to_go_on(tmp_path):
    process = forked.start("-m", "fastdiff", "train", "--data", "digits", "--out", tmp_path, "--steps", 10**6, *TINY)
    read_until(process.stderr, b"loss")
    process.send_signal(signal.SIGHUP)
    said = process.stderr.read().decode()
    step = checkpoint.load(tmp_path / "model.safetensors").step
    assert process.wait() == 130 and "Traceback" not in said and step >= 10
    assert said.splitlines()[-1].startswith(f"fastdiff: interrupted at step {step} of 1000000; go on with:")


@pytest.mark.slow
def test_a_pipe_that_closes_loses_no_step(tmp_path):
    process = forked.start("-m", "fastdiff", "train", "--data", "digits", "--out", tmp_path, "--steps", 10**6, *TINY)
    read_until(process.stderr, b"loss")
    process.stderr.close()  # as `2>&1 | head` does
    out = process.stdout.read()
    assert process.wait() == 1 and b"Traceback" not in out
    assert checkpoint.load(tmp_path / "model.safetensors").step >= 10


@pytest.mark.slow
@pytest.mark.parametrize("target", ["/dev/full", "pipe"])
def test_an_output_that_takes_nothing_is_one_line(model, tmp_path, target):
    if target == "pipe":
        read, write = os.pipe()
        os.close(read)
    else:
        write = os.open(target, os.O_WRONLY)
    args = ["sample", model, "--n", 1, "--steps", 1, "--out", tmp_path / "x"]
    done = forked.run("-m", "fastdiff", *args, stdout=write)
    os.close(write)
    lines = [
        line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith(("fastdiff", "Exception"))
    ]
    reason = "Broken pipe" if target == "pipe" else "No space left on device"
    assert done.returncode == 1 and lines == [f"fastdiff: error: {reason}"]
    assert (tmp_path / "x.npy").exists()  # the images were written before


ENTRY = """
import os, signal, sys
sys.path.insert(0, {root!r})
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
import fastdiff_command
class Interrupt:
    def find_spec(self, name, *_):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
sys.argv = ["fastdiff", "--version"]
sys.exit(fastdiff_command.main())
"""


def test_an_interrupt_while_pytorch_is_imported_is_one_line():
    root = str(Path(fastdiff.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", ENTRY.format(root=root)], capture_output=True, text=True, check=False)
    assert done.returncode == 130 and done.stderr == "fastdiff: interrupted\n" and done.stdout == ""


def test_an_interrupt_before_the_first_step_is_one_line(model, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastdiff.training.loop.open_stream", interrupt)
    assert main(["train", "--out", str(tmp_path), "--data", "digits", "--steps", "1", *TINY]) == 130
    assert capsys.readouterr().err == "fastdiff: interrupted\n" and list(tmp_path.iterdir()) == []


def test_the_command_is_the_one_that_catches_interrupts():
    setup = (Path(fastdiff.__file__).parents[1] / "setup.py").read_text(encoding="utf-8")
    assert "fastdiff=fastdiff_command:main" in setup and 'py_modules=["fastdiff_command"]' in setup
