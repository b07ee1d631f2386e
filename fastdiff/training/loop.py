"""The training loop: one optimizer step after another, with a moving average of the weights and checkpoints."""

import copy
import errno
import math
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from fastdiff.files import locked, sweep, writable
from fastdiff.support.run_file import NAME, RunFile
from fastdiff.training.checkpoint import State, rng_state, save, set_rng_state
from fastdiff.training.feed import open_stream
from fastdiff.training.logs import EVERY, Progress
from fastdiff.training.options import Options, build
from fastdiff.training.record import Record, grids
from fastdiff.training.report import write_report
from fastdiff.training.samples import averaged
from fastdiff.unet import UNet


def train(options: Options, out: str | Path, device: str | torch.device, resume: State | None = None) -> int:
    """Train until step `options.steps`.

    Writes out/model.safetensors every `save_every` steps, at the end, and on SIGINT, SIGTERM or SIGHUP. A run that is
    interrupted and resumed ends with the same bits as one that is not.

    Args:
        options: what to train, and for how long.
        out: the run's folder, made if it is missing. No other training may run in it.
        device: where to train.
        resume: the checkpoint to go on from. Without it the folder must not hold one.

    Returns: the steps done, fewer than `options.steps` after a signal.
    Raises: ValueError if the loss or the weights stop being finite; the last checkpoint is then kept. OSError if the
        folder is in use, the checkpoint cannot be written, or nobody reads the output any more. Steps done
        by then are saved.
    """
    path, device = writable(Path(out) / NAME), torch.device(device)
    with locked(path.parent) as alone:
        if alone:
            sweep(path)
        check_free(path, resume)
        torch.manual_seed(options.seed)
        run = Run(options, path.parent, device, resume)
        record = Record(path.parent, options, run.step)
        with (
            closing(record),
            closing(Progress(run.step, options.steps, options.batch_size)) as progress,
            interrupts() as caught,
        ):
            progress.say(run.summary())
            run.stream.warn = lambda name, why, count: progress.say(
                f"fastdiff: warning: left out {name}: {why} ({count} so far)"
            )
            while run.step < options.steps and not caught and not progress.lost:
                run.advance(record)
                progress.advance(run.step, run.loss)
                if run.step % EVERY == 0:
                    run.check_loss()
                if run.step % options.save_every == 0 and run.step < options.steps:
                    run.save(path)
                if options.sample_every and (run.step % options.sample_every == 0 or run.step == options.steps):
                    record.grid(run.step, run.averaged)
            if run.step > run.start:
                run.save(path)
                if grids(path.parent):
                    write_report(path.parent)
    if progress.lost and run.step < options.steps:
        raise OSError(
            errno.EPIPE, f"the output is lost ({progress.lost.strerror}), training stopped at step {run.step}"
        )
    return run.step


def check_free(path: Path, resume: State | None) -> None:
    """Raise ValueError if training would overwrite another run's checkpoint, or a later one of this run."""
    if not path.exists():
        return
    if resume is None:
        raise ValueError(f"{path} exists: go on with --resume, or train into another --out")
    step = RunFile.open(path).step
    if step != resume.step:
        raise ValueError(f"{path} is of step {step}, expected {resume.step}: another training went on from it")


class Run:
    """A run between two steps: data, networks, optimizer, and `loss`, the mean of the last 50 losses or so."""

    def __init__(self, options: Options, folder: Path, device: torch.device, resume: State | None) -> None:
        self.options, self.device = options, device
        self.stream = open_stream(options, folder)
        self.classes = self.stream.source.classes or []
        if resume and resume.classes != self.classes:
            raise ValueError(f"data: expected the classes {resume.classes} of the run, got {self.classes}")
        built = resume.diffusion if resume else build(options, len(self.classes))
        self.diffusion = built.to(device).train()
        self.ema = resume.ema.to(device) if resume else cast(UNet, copy.deepcopy(self.diffusion.model))
        self.optimizer = torch.optim.AdamW(self.diffusion.parameters(), lr=options.lr, fused=True)
        self.averaged = averaged(self.diffusion, self.ema)
        self.start = self.step = resume.step if resume else 0
        self.batches = self.stream.batches(self.start)
        self.loss = torch.zeros((), device=device)
        cuda_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        self.bf16 = cuda_bf16 if options.bf16 is None else options.bf16
        if resume:
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": resume.optimizer})
            set_rng_state(resume.rng, device)

    def advance(self, record: Record) -> None:
        """One step of the optimizer and of the moving average, noted in the record."""
        options, step = self.options, self.step
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * min(1.0, (step + 1) / (options.warmup + 1))
        x0, labels = next(self.batches).to(self.device)
        t = self.diffusion.checked_times("x0", x0, None)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            given = {} if labels is None else {"class_labels": labels}
            losses: Tensor = self.diffusion(x0, t=t, reduction="none", **given)
        loss = losses.mean()
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.diffusion.parameters(), options.clip_grad)
        self.optimizer.step()
        # The decay grows from 0.1, so that the random weights of the start are soon forgotten.
        update_ema(self.ema, self.diffusion.model, min(options.ema, (1 + step) / (10 + step)))
        self.loss = self.loss.lerp(loss.detach(), 1 / min(step - self.start + 1, 50))
        self.step += 1
        record.step(self.step, losses, t / getattr(self.diffusion, "timesteps", 1), norm, group["lr"])

    def summary(self) -> str:
        """What is trained, on one line."""
        parameters = sum(parameter.numel() for parameter in self.diffusion.parameters())
        images, shape = len(self.stream), "x".join(map(str, self.options.shape))
        return (
            f"fastdiff: {self.options.formulation} of {parameters:,} parameters, {images:,} images of {shape}, on "
            f"{self.device}, steps {self.start} to {self.options.steps}"
        )

    def check_loss(self) -> None:
        """Raise ValueError if the loss is not finite."""
        if not math.isfinite(loss := self.loss.item()):
            raise ValueError(f"the loss is {loss} at step {self.step}, nothing was written; try a lower --lr")

    def save(self, path: Path) -> None:
        """Write the checkpoint of this step. Raises ValueError, and writes nothing, if it is not finite."""
        self.check_loss()
        optimizer, rng = self.optimizer.state_dict()["state"], rng_state(self.device)
        state = State(self.diffusion, self.ema, optimizer, rng, asdict(self.options), self.step, self.classes)
        try:
            save(path, state)
        except ValueError as error:
            raise ValueError(f"{error} at step {self.step}, nothing was written; try a lower --lr") from error


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """In place, for each parameter: ema <- decay ema + (1 - decay) model."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Yield a list that collects SIGINT, SIGTERM and SIGHUP, which then do not end the process.

    A SIGHUP that is ignored, as nohup arranges, stays ignored. In a thread, where Python takes no signals, the list
    stays empty.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
        numbers.append(hangup)
    old = {number: signal.signal(number, lambda n, _: caught.append(n)) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
