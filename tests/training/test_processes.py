"""Several processes, as torchrun starts them: they train and draw what one does, and end together."""

import json
import os
import re
import runpy
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import IO

import forked
import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from several import SAME, STEPS, TOLD, evaluate, importance
from tiny_run import assert_same_weights, run

from fastdiff.cli import main, one_line
from fastdiff.training import checkpoint, ranks

NAME = "model.safetensors"
ROOT = Path(__file__).parents[2]
PATH = os.pathsep.join((str(ROOT), str(ROOT / "tests" / "helpers")))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATH}


def start(processes: int, *args: object) -> tuple[forked.Program, IO[bytes]]:
    """torchrun, and what it and its processes say."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    read, write = os.pipe()
    program = forked.start(*launcher, *args, env=ENVIRONMENT, stdout=write, stderr=write)
    os.close(write)
    return program, os.fdopen(read, "rb", buffering=0)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def launch(processes: int, folder: Path, *args: object) -> str:
    """With the environment that torchrun gives its processes. What all say."""
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    with open(folder / "said", "w+b") as said:
        outputs = {"stdout": said.fileno(), "stderr": said.fileno()}
        environments = [ENVIRONMENT | shared | {"RANK": str(k), "LOCAL_RANK": str(k)} for k in range(processes)]
        codes = [p.wait() for p in [forked.start(*args, env=one, **outputs) for one in environments]]
        said.seek(0)
        text = said.read().decode()
    assert codes == [0] * processes, text
    return text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:schedule")
def test_two_processes_train_what_one_does(tmp_path):
    launch(2, tmp_path, ROOT / "tests" / "helpers" / "several.py", tmp_path)
    run(tmp_path / "one", steps=STEPS, **SAME)
    for name in ("replicated", "split"):
        assert checkpoint.load(tmp_path / name / NAME).step == STEPS
        assert_same_weights(tmp_path / "one" / NAME, tmp_path / name / NAME)
    run(tmp_path / "told alone", **TOLD)
    assert_same_weights(tmp_path / "told alone" / NAME, tmp_path / "told" / NAME)
    importance(tmp_path / "alone")
    alone, shared = (load_file(tmp_path / name / NAME) for name in ("alone", "importance"))
    assert torch.equal(alone["importance.seen"], shared["importance.seen"]) and alone["importance.seen"].sum() == 128
    torch.testing.assert_close(shared["importance.losses"], alone["importance.losses"], rtol=1e-4, atol=0)
    assert_same_weights(tmp_path / "alone" / NAME, tmp_path / "importance" / NAME)
    expected = checkpoint.load_model(tmp_path / "split").sample(3, steps=2, sampler="ddim", seed=1)
    torch.testing.assert_close(torch.load(tmp_path / "drawn.pt"), expected)
    assert checkpoint.load(tmp_path / "stopped" / NAME).step == 1
    assert evaluate(tmp_path / "replicated", tmp_path / "one.json") == 0
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-9) and two["n_samples"] == 9


@pytest.mark.slow
def test_a_killed_process_ends_the_run_which_goes_on(tmp_path):
    args = ["-m", "fastdiff", "train", "--data", "digits", "--out", tmp_path / "two", "--resume", "auto"]
    args += ["--device", "cpu", "--channels", 16, "--lr", 2e-4, "--batch-size", 16, "--timesteps", 20, "--warmup", 2]
    process, output = start(2, *args, "--steps", 10**6, "--save-every", 5)
    heard = b""
    while not (tmp_path / "two" / NAME).exists():
        read = output.read(1)
        assert read, heard.decode()
        heard += read
    os.kill(child_of(process.pid), signal.SIGKILL)
    said = (heard + output.read()).decode()
    output.close()
    assert process.wait() != 0
    lines = [line for line in said.replace("\r", "\n").splitlines() if "fastdiff: " in line]
    assert len([line for line in lines if "error" in line]) <= 1 and len(lines) <= 3, said
    done = checkpoint.load(tmp_path / "two" / NAME).step
    assert done % 5 == 0
    assert main([*map(str, args[2:]), "--steps", str(done + 5)]) == 0  # on another number of processes
    run(tmp_path / "one", steps=done + 5, **SAME)
    assert_same_weights(tmp_path / "one" / NAME, tmp_path / "two" / NAME)


def child_of(launcher: int) -> int:
    """A process that the launcher started."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                status = (entry / "status").read_text()
            except OSError:
                continue
            if re.search(rf"^PPid:\t{launcher}$", status, re.M) and "fastdiff" in (entry / "cmdline").read_text():
                return int(entry.name)
    raise AssertionError(f"{launcher} has no child")


@pytest.mark.slow
def test_images_are_the_same_bytes_on_any_number_of_processes(tmp_path):
    run(tmp_path, steps=1)
    args = ["sample", str(tmp_path), "--count", "11", "--batch-size", "4", "--sampler", "ddim", "--steps", "2"]
    args += ["--device", "cpu", "--out"]
    assert main([*args, str(tmp_path / "1")]) == 0
    said = launch(3, tmp_path, "-m", "fastdiff", *args, tmp_path / "3")
    assert said.count("11 images, ") == 1
    assert np.load(tmp_path / "1.npy").shape == (11, 1, 8, 8)
    assert (tmp_path / "1.npy").read_bytes() == (tmp_path / "3.npy").read_bytes()


# what each process says


def test_only_the_first_process_that_fails_says_so(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(ranks, "_store", dist.HashStore())
    assert [ranks.speaks() for _ in range(3)] == [True, False, False]
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="WORLD_SIZE: expected a number in the environment, got 'two'"):
        ranks.launched("WORLD_SIZE", 1)


def test_a_process_that_waits_for_others_says_where(monkeypatch, capfd):
    def never(*_, **__):
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # Python's handler would not run
        for timer in threading.enumerate():
            if isinstance(timer, threading.Timer):
                timer.join()
        raise dist.DistNetworkError("nobody")

    monkeypatch.setattr(ranks, "ANNOUNCE", 0)
    monkeypatch.setattr(ranks.distributed, "rendezvous", never)
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
    try:
        with pytest.raises(dist.DistNetworkError), ranks.joined(torch.device("cpu")):
            pass
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert capfd.readouterr().err == "fastdiff: waiting for all of the 2 processes at node1:29500, 10 minutes at most\n"


def test_a_lost_process_is_told_in_plain_words():
    gloo = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1. This is typically")
    late = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:129] Timed out waiting 600000ms for recv operation")
    said = "another process of the run has ended, or does not answer"
    assert one_line(gloo) == one_line(late) == one_line(dist.DistNetworkError("no route")) == said
    assert one_line(RuntimeError("out of memory")) == "out of memory"


def test_processes_that_differ_are_named():
    class Two(ranks.Ranks):
        def largest(self, number, of_other=iter((-3, 3))):  # noqa: B008
            return max(number, next(of_other))

    with pytest.raises(ValueError, match="step: expected the same in all processes, got 0 to 3; do they share a file"):
        Two(0, 2).agree("step", 0)


def test_accelerate_starts_processes_with_the_flags_that_the_page_names(monkeypatch):
    launcher = pytest.importorskip("accelerate.commands.launch")
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"accelerate (launch --multi_gpu .*)", page)
    started = []
    monkeypatch.setattr("torch.distributed.run.run", started.append)
    monkeypatch.setattr(sys, "argv", line.split())
    launcher.main()
    (asked,) = started
    assert (asked.nproc_per_node, asked.module, asked.training_script) == ("2", True, "fastdiff")
    assert asked.training_script_args[0] == "train"


# examples


@pytest.mark.slow
def test_examples_of_training_run(tmp_path, monkeypatch):
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    for name, few, environment in (("fsdp", ["--steps", "2"], alone), ("accelerate", ["--epochs", "1"], {})):
        if name == "accelerate":
            pytest.importorskip("accelerate")
        with monkeypatch.context() as patch:
            for key, value in environment.items():
                patch.setenv(key, value)
            patch.setattr(sys, "argv", [name, "--out", str(tmp_path / name), "--batch", "32", *few])
            runpy.run_path(str(ROOT / "examples" / f"train_{name}.py"), run_name="__main__")
        assert (tmp_path / name / "samples.png").stat().st_size > 500
