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
from fastdiff.training.data import training_images
from fastdiff.training.logs import EVERY, Progress
from fastdiff.training.options import Options, build
from fastdiff.training.step import TrainingStep
from fastdiff.unet import UNet


def train(options: Options, out: str | Path, device: str | torch.device, resume: State | None = None) -> int:
    """Train until step `options.steps`.

    Writes out/model.safetensors every `save_every` steps, at the end, and on SIGINT, SIGTERM or SIGHUP. A run that is
    interrupted and resumed ends with the same bits as one that is not. That holds on a CPU: on a GPU the sums of some
    gradients are of no fixed order, and convolutions are tried out. There a step is a captured graph, see TrainingStep.

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
    with gpu_settings(device), locked(path.parent) as alone:
        if alone:
            sweep(path)
        check_free(path, resume)
        torch.manual_seed(options.seed)
        run = Run(options, device, resume)
        with closing(Progress(run.step, options.steps, options.batch_size)) as progress, interrupts() as caught:
            progress.say(run.summary())
            while run.step < options.steps and not caught and not progress.lost:
                run.advance()
                progress.advance(run.step, run.loss)
                if run.step % EVERY == 0:
                    run.check_loss()
                if run.step % options.save_every == 0 and run.step < options.steps:
                    run.save(path)
            if run.step > run.start:
                run.save(path)
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
    """A run between two steps: images, networks, optimizer, and `loss`, the mean of the last 50 losses or so."""

    def __init__(self, options: Options, device: torch.device, resume: State | None) -> None:
        self.options, self.device = options, device
        self.images = training_images(options.data, options.size, options.gray)
        self.diffusion = (resume.diffusion if resume else build(options)).to(device).train()
        self.ema = resume.ema.to(device) if resume else cast(UNet, copy.deepcopy(self.diffusion.model))
        self.optimizer = torch.optim.AdamW(self.diffusion.parameters(), lr=options.lr, fused=True)
        self.start = self.step = resume.step if resume else 0
        self.loss = torch.zeros((), device=device)
        cuda_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        self.bf16 = cuda_bf16 if options.bf16 is None else options.bf16
        if resume:
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": resume.optimizer})
            set_rng_state(resume.rng, device)
        self.take = TrainingStep(
            self.diffusion,
            self.optimizer,
            average=lambda decay: update_ema(self.ema, self.diffusion.model, decay),
            clip_grad=options.clip_grad,
            autocast=torch.bfloat16 if self.bf16 else None,
        )

    def advance(self) -> None:
        """One step of the optimizer and of the moving average."""
        options, step = self.options, self.step
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * min(1.0, (step + 1) / (options.warmup + 1))
        x0 = self.images[torch.randint(len(self.images), (options.batch_size,))].to(self.device)
        # The decay grows from 0.1, so that the random weights of the start are soon forgotten.
        loss = self.take(x0, decay=min(options.ema, (1 + step) / (10 + step)))
        self.loss = self.loss.lerp(loss, 1 / min(step - self.start + 1, 50))
        self.step += 1

    def summary(self) -> str:
        """What is trained, on one line."""
        parameters = sum(parameter.numel() for parameter in self.diffusion.parameters())
        images, shape = len(self.images), "x".join(map(str, self.options.shape))
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
        state = State(self.diffusion, self.ema, optimizer, rng, asdict(self.options), self.step)
        try:
            save(path, state)
        except ValueError as error:
            raise ValueError(f"{error} at step {self.step}, nothing was written; try a lower --lr") from error


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float | Tensor) -> None:
    """In place, for each parameter: ema <- decay ema + (1 - decay) model. A tensor () of decay stays on its device."""
    averages: list[Tensor] = [*ema.parameters()]
    weights: list[Tensor] = [*model.parameters()]
    if isinstance(decay, Tensor):  # of which lerp has no form for many tensors at once
        change = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(change, 1 - decay)
        torch._foreach_add_(averages, change)
    else:
        torch._foreach_lerp_(averages, weights, 1 - decay)


@contextmanager
def gpu_settings(device: torch.device) -> Iterator[None]:
    """Settings of the process that training on a GPU wants: TF32 products, and convolutions that are tried out."""
    if device.type != "cuda":
        yield
        return
    precision, benchmark = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.benchmark = benchmark


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
