"""Checkpoints that a thread writes: of the right step, one after another, and no error is lost."""

import threading

import pytest
from safetensors.torch import load_file, save_file
from tiny_run import assert_same_files, files_of, run

from fastdiff.training import checkpoint, loop, saver

NAME = "model.safetensors"


@pytest.fixture
def steps(monkeypatch):
    """An event for each of the first steps, set when the step is done."""
    done = [threading.Event() for _ in range(6)]
    original, events = loop.update_ema, iter(done)

    def update(*args):
        original(*args)
        next(events).set()

    monkeypatch.setattr(loop, "update_ema", update)
    return done


@pytest.mark.slow
def test_steps_go_on_while_a_checkpoint_of_the_step_is_written(tmp_path, monkeypatch, steps):
    late = []

    def patient(tensors, name, metadata):
        late.append(steps[3].wait(60) if not late else True)
        save_file(tensors, name, metadata)

    monkeypatch.setattr("safetensors.torch.save_file", patient)
    run(tmp_path / "one", steps=6, save_every=2, keep=3)
    assert late == [True] * 3  # the first was written after step 4
    monkeypatch.undo()
    run(tmp_path / "two", steps=2)
    assert_same_files(tmp_path / "one" / "checkpoints" / "step-00000002.safetensors", tmp_path / "two" / NAME)


@pytest.mark.slow
def test_an_error_of_the_thread_ends_the_run_at_its_next_step(tmp_path, monkeypatch, steps):
    def full(tensors, name, metadata):
        if '"step": 4' in metadata["fastdiff"]:
            raise OSError(28, "No space left on device", str(name))
        save_file(tensors, name, metadata)

    monkeypatch.setattr("safetensors.torch.save_file", full)
    original = saver.Saver.check

    def check(self):
        if self._writing:
            self._writing.exception()
        original(self)

    monkeypatch.setattr(saver.Saver, "check", check)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, steps=6, save_every=2)
    assert steps[4].is_set() and not steps[5].is_set()
    assert checkpoint.load(tmp_path / NAME).step == 2 and files_of(tmp_path) == {NAME}


@pytest.mark.slow
def test_data_that_are_lost_lose_no_step(tmp_path, monkeypatch):
    original = loop.Run._next

    def lose(self):
        if self.step == 2:
            raise ValueError("no readable image")
        return original(self)

    monkeypatch.setattr(loop.Run, "_next", lose)
    with pytest.raises(ValueError, match="no readable image"):
        run(tmp_path / "lost", steps=4)
    monkeypatch.undo()
    run(tmp_path / "lost", steps=4, resume=True)
    run(tmp_path / "whole", steps=4)
    assert_same_files(tmp_path / "lost" / NAME, tmp_path / "whole" / NAME)


@pytest.mark.slow
def test_an_error_of_the_loop_waits_for_the_thread_and_hides_nothing(tmp_path, monkeypatch, capsys, steps):
    def fail(self):
        if steps[1].is_set():
            raise RuntimeError("the loop")
        original(self)

    original = loop.Run.advance
    monkeypatch.setattr(loop.Run, "advance", fail)
    with pytest.raises(RuntimeError, match="the loop"):
        run(tmp_path, steps=6, save_every=1)
    assert checkpoint.load(tmp_path / NAME).step == 2
    before = load_file(tmp_path / NAME)

    def full(*_):
        raise OSError("the disk")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    steps[1].clear()
    with pytest.raises(RuntimeError, match="the loop"), saver.Saver(tmp_path / NAME, 1, checkpoint.ALONE, False) as it:
        it.save(checkpoint.load(tmp_path / NAME))
        raise RuntimeError("the loop")
    assert "fastdiff: warning: no checkpoint was written: the disk" in capsys.readouterr().err
    assert load_file(tmp_path / NAME).keys() == before.keys()
