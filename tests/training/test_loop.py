"""The loop under faults: updates that are not finite, two runs in one folder, signals, an output that is closed."""

import errno
import io
import math
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tiny_run import CPU, TINY, assert_same_files, files_of, run

from fastdiff import files, training
from fastdiff.training import Options, checkpoint, logs, loop

NAME = "model.safetensors"


# numbers that are not finite


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_never_saved(tmp_path, value):
    run(tmp_path, steps=2)
    before = (tmp_path / NAME).read_bytes()
    state = checkpoint.load(tmp_path / NAME)
    next(state.diffusion.parameters()).register_hook(lambda g: g * value)  # the loss itself stays finite
    with pytest.raises(ValueError, match=r"holds NaN or infinity at step 3, nothing was written; try a lower --lr"):
        training.train(Options(**{**TINY, "steps": 3}), tmp_path, CPU, state)
    assert (tmp_path / NAME).read_bytes() == before and files_of(tmp_path) == {NAME}


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_long_before_the_next_checkpoint(tmp_path, monkeypatch):
    steps = []
    original = loop.update_ema

    def spoil(ema, model, decay):
        original(ema, model, decay)
        steps.append(decay)
        with torch.no_grad():
            model.conv_in.bias.fill_(math.nan)

    monkeypatch.setattr(loop, "update_ema", spoil)
    with pytest.raises(ValueError, match="the loss is nan at step 10"):
        run(tmp_path, steps=1000, save_every=1000)
    assert len(steps) == 10 and files_of(tmp_path) == set()


# one run, one folder


def test_a_folder_in_use_is_refused(tmp_path):
    with files.locked(tmp_path), pytest.raises(BlockingIOError, match="another training runs in this folder"):
        run(tmp_path, steps=1)
    assert run(tmp_path, steps=1) == 1


def test_the_folder_is_free_again_after_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        run(tmp_path, data=str(tmp_path / "missing"), gray=False)
    assert run(tmp_path, steps=1) == 1


def test_the_folder_is_locked_while_it_trains(tmp_path, monkeypatch):
    original, refused = loop.update_ema, []

    def intrude(*args):
        original(*args)
        try:
            run(tmp_path, steps=1)
        except BlockingIOError as error:
            refused.append(error)

    monkeypatch.setattr(loop, "update_ema", intrude)
    assert run(tmp_path, steps=2) == 2 and len(refused) == 2


@pytest.mark.slow
def test_another_runs_checkpoint_is_not_overwritten(tmp_path):
    run(tmp_path, steps=1)
    before, early = (tmp_path / NAME).read_bytes(), checkpoint.load(tmp_path / NAME)
    with pytest.raises(ValueError, match="exists: go on with --resume"):
        run(tmp_path, steps=3)
    assert (tmp_path / NAME).read_bytes() == before
    assert run(tmp_path, steps=2, resume=True) == 2
    later = (tmp_path / NAME).read_bytes()
    with pytest.raises(ValueError, match="is of step 2, expected 1: another training went on from it"):
        training.train(Options(**{**TINY, "steps": 3}), tmp_path, CPU, early)
    assert (tmp_path / NAME).read_bytes() == later


@pytest.mark.slow
def test_a_checkpoint_goes_on_in_another_folder_too(tmp_path):
    run(tmp_path / "a", steps=1)
    state = checkpoint.load(tmp_path / "a" / NAME)
    assert training.train(Options(**{**TINY, "steps": 2}), str(tmp_path / "b"), "cpu", state) == 2


def test_what_a_killed_run_left_is_swept(tmp_path):
    folders = {"samples", "averages", "checkpoints"}
    names = (f".{NAME}.4711.tmp", ".config.json.4711.tmp", *(f"{name}/.0000001.png.4711.tmp" for name in folders))
    for left in (tmp_path / name for name in names):
        left.parent.mkdir(exist_ok=True)
        left.write_bytes(b"half")
    run(tmp_path, steps=1)
    assert files_of(tmp_path) == {NAME, *folders} and not any(any((tmp_path / name).iterdir()) for name in folders)


def test_without_locks_nothing_is_swept(tmp_path, monkeypatch):
    import fcntl

    def unsupported(*_):
        raise OSError(errno.ENOTSUP, "no locks here")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    (tmp_path / f".{NAME}.4711.tmp").touch()  # may be another run's
    assert run(tmp_path, steps=1) == 1
    assert files_of(tmp_path) == {NAME, f".{NAME}.4711.tmp"}


# signals


def at_step(monkeypatch, number):
    """Raise a signal in the second step."""
    original = loop.update_ema

    def update(*args):
        original(*args)
        if args[2] == pytest.approx(2 / 11):
            signal.raise_signal(number)

    monkeypatch.setattr(loop, "update_ema", update)


@pytest.mark.slow
def test_a_hangup_saves_as_other_signals_do(tmp_path, monkeypatch):
    run(tmp_path / "whole", steps=3)
    handler = signal.getsignal(signal.SIGHUP)
    at_step(monkeypatch, signal.SIGHUP)
    assert run(tmp_path / "parts", steps=3) == 2
    assert signal.getsignal(signal.SIGHUP) is handler
    monkeypatch.undo()
    assert run(tmp_path / "parts", steps=3, resume=True) == 3
    assert_same_files(tmp_path / "whole" / NAME, tmp_path / "parts" / NAME)


def test_a_hangup_that_nohup_ignores_stays_ignored(tmp_path, monkeypatch):
    at_step(monkeypatch, signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run(tmp_path, steps=3) == 3
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_thread_trains_without_signals(tmp_path):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, tmp_path, steps=1).result() == 1


# what it says


class Closed(io.StringIO):
    """An output whose reader goes away after `room` writes."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def write(self, text: str) -> int:
        self.room -= 1
        if self.room < 0:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        return super().write(text)


@pytest.mark.slow
@pytest.mark.parametrize("room", [1, 5, 60])
def test_a_closed_output_ends_the_run_and_loses_no_step(tmp_path, monkeypatch, room):
    monkeypatch.setattr(sys, "stdout", Closed(10**6))
    monkeypatch.setattr(sys, "stderr", Closed(room))
    monkeypatch.setattr(logs, "BAR_SECONDS", 0.0)  # the bar is written at every step
    with pytest.raises(OSError, match="the output is lost") as error:
        run(tmp_path, steps=1000, save_every=1000)
    saved = tmp_path / NAME
    done = checkpoint.load(saved).step if saved.exists() else 0
    assert done < 1000 and f"stopped at step {done}" in str(error.value)
    if room == 60:
        assert done > 0


@pytest.mark.slow
def test_a_run_says_what_it_trains_and_how_long_it_takes(tmp_path, capsys, monkeypatch):
    clock = iter(range(0, 10**6, 60))  # each look at the clock is a minute after the last
    monkeypatch.setattr(logs.time, "perf_counter", lambda: float(next(clock)))
    run(tmp_path, steps=5)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fastdiff:")]
    assert len(lines) == 2
    parameters = sum(p.numel() for p in checkpoint.load_model(tmp_path).parameters())
    assert lines[0] == (f"fastdiff: ddpm of {parameters:,} parameters, 898 images of 1x8x8, on cpu, steps 0 to 5")
    # after the third step: a minute a step, two are left
    assert lines[1] == "fastdiff: about 2 min for the 2 steps that are left"


@pytest.mark.parametrize(
    ("first", "then", "said"), [(0.5, 0.1, "about 8 s for the 80"), (4.0, 2.0, "about 3 min for the 94")]
)
def test_the_time_is_estimated_from_steps_that_are_warm(capsys, monkeypatch, first, then, said):
    """The first step takes 100 s, and some after it longer than the rest; the loss is read at every tenth."""
    clock = [0.0]
    monkeypatch.setattr(logs.time, "perf_counter", lambda: clock[0])
    progress = logs.Progress(0, 100, batch_size=4)
    for step in range(1, 31):
        clock[0] += 100.0 if step == 1 else first if step <= 3 else then
        progress.advance(step, torch.zeros(()))
    progress.close()
    out = capsys.readouterr().out
    assert out.count("about") == 1 and said in out


def test_the_bar_says_what_holds_up_the_steps_until_the_next_one(capsys, monkeypatch):
    monkeypatch.setattr(logs, "BAR_SECONDS", 0.0)
    progress = logs.Progress(0, 2, batch_size=4)
    progress.doing("draws samples")
    assert "draws samples" in capsys.readouterr().err
    progress.advance(1, torch.zeros(()))
    progress.close()
    assert "draws samples" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (9000, "2.5 h"), (1.2e6, "14 days")],
)
def test_durations_are_told_in_the_unit_that_suits(seconds, text):
    assert logs.duration(seconds) == text


# options


def test_numbers_of_numpy_are_plain_numbers():
    options = Options(**{**TINY, "steps": np.int64(3), "lr": np.float32(0.5), "ema": 0})
    assert type(options.steps) is int and type(options.lr) is float and type(options.ema) is float
    assert options == Options(**{**TINY, "steps": 3, "lr": 0.5, "ema": 0.0})


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 2.0), ("steps", "2"), ("steps", True), ("lr", "1"), ("gray", 1), ("data", 3), ("bf16", "yes")],
)
def test_options_of_wrong_types_are_named(name, value):
    with pytest.raises(TypeError, match=f"^{name}: expected "):
        Options(**{**TINY, name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("data", ""), ("steps", 10**22), ("seed", 2**63), ("warmup", 10**22), ("gray", False), ("sigma_max", 5.0)],
)
def test_more_options_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}: "):
        Options(**{**TINY, name: value})


@pytest.mark.parametrize(
    ("formulation", "name", "value"),
    [
        ("vp", "schedule", "linear"),
        ("ncsn", "variance", "beta"),
        ("ve", "timesteps", 10),
        ("ddpm", "sigma_min", 0.5),
        ("subvp", "sigma_max", 5.0),
    ],
)
def test_options_of_another_formulation_are_refused(formulation, name, value):
    options = {k: v for k, v in TINY.items() if k != "timesteps"}
    with pytest.raises(ValueError, match=f"^{name}: an option of .*, which formulation {formulation} does not have"):
        Options(**options, formulation=formulation, **{name: value})
