"""The training loop: one optimizer step after another, with a moving average of the weights and checkpoints."""

import copy
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from fastdiff.files import need, writable
from fastdiff.training.checkpoint import State, rng_state, save, set_rng_state
from fastdiff.training.data import training_images
from fastdiff.training.options import Options, build
from fastdiff.unet import UNet


def train(options: Options, out: Path, device: torch.device, resume: State | None = None) -> int:
    """Train until step `options.steps`.

    Writes out/model.safetensors every `save_every` steps, at the end, and on SIGINT or SIGTERM. A run that is
    interrupted and resumed ends with the same bits as one that is not.

    Args:
        options: what to train, and for how long.
        out: the run's folder, made if it is missing.
        device: where to train.
        resume: the checkpoint to go on from.

    Returns: the steps done, fewer than `options.steps` after a signal.
    Raises: ValueError if the loss stops being finite; the last checkpoint is then kept.
    """
    path = writable(out / "model.safetensors")
    torch.manual_seed(options.seed)
    run = Run(options, device, resume)
    bar = need("tqdm").tqdm(total=options.steps, initial=run.step, unit="step", mininterval=0.5)
    with interrupts() as caught, bar:
        while run.step < options.steps and not caught:
            run.advance()
            bar.update()
            if run.step % 10 == 0:
                rate = options.batch_size * (bar.format_dict["rate"] or 0)
                bar.set_postfix_str(f"loss {run.loss.item():.4f}, {rate:.0f} images/s", refresh=False)
            if run.step % options.save_every == 0 and run.step < options.steps:
                run.save(path)
        if run.step > run.start:
            run.save(path)
    return run.step


class Run:
    """A run between two steps: images, networks, optimizer, and `loss`, the mean of the last 50 steps or so."""

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

    def advance(self) -> None:
        """One step of the optimizer and of the moving average."""
        options, step = self.options, self.step
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * min(1.0, (step + 1) / (options.warmup + 1))
        x0 = self.images[torch.randint(len(self.images), (options.batch_size,))].to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss: Tensor = self.diffusion(x0)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.diffusion.parameters(), options.clip_grad)
        self.optimizer.step()
        # The decay grows from 0.1, so that the random weights of the start are soon forgotten.
        update_ema(self.ema, self.diffusion.model, min(options.ema, (1 + step) / (10 + step)))
        self.loss = self.loss.lerp(loss.detach(), 1 / min(step - self.start + 1, 50))
        self.step += 1

    def save(self, path: Path) -> None:
        """Write the checkpoint of this step. Raises ValueError, and writes nothing, if the loss is not finite."""
        if not math.isfinite(loss := self.loss.item()):
            raise ValueError(f"the loss is {loss} at step {self.step}, nothing was written; try a lower --lr")
        optimizer, rng = self.optimizer.state_dict()["state"], rng_state(self.device)
        save(path, State(self.diffusion, self.ema, optimizer, rng, asdict(self.options), self.step))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """In place, for each parameter: ema <- decay ema + (1 - decay) model."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Yield a list that collects SIGINT and SIGTERM, which then do not end the process."""
    caught: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    old = {number: signal.signal(number, lambda n, _: caught.append(n)) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
