"""The training loop: one optimizer step after another, with averages of the weights and checkpoints, on any number of
processes.

All that is drawn is a function of the seed, the step and the sample's number in it. So any number of processes trains
the same weights to rounding, and a run goes on from a checkpoint bit for bit.
"""

import copy
import errno
import itertools
from collections.abc import Callable
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastdiff.cast import channels_last_convolutions
from fastdiff.denoiser import TOLD
from fastdiff.files import locked, sweep, writable
from fastdiff.networks import Network
from fastdiff.recipes import offset_noise, own_estimate
from fastdiff.support import walk
from fastdiff.support.run_file import NAME
from fastdiff.training.build import build
from fastdiff.training.checkpoint import FOLDER as CHECKPOINTS
from fastdiff.training.checkpoint import State, check_free, importance, read_shares, rng_state, set_rng_state
from fastdiff.training.draws import LEVELS, SELF_CONDITIONING, noise_key, uniforms
from fastdiff.training.ema import FOLDER as AVERAGES
from fastdiff.training.ema import average_names, update_averages, update_ema, warmed
from fastdiff.training.feed import changed, measured, noted, open_stream
from fastdiff.training.layout import exchanging, laid_out, recompute_blocks, replicate, shard, whole
from fastdiff.training.logs import EVERY, Progress, Silent
from fastdiff.training.options import Options
from fastdiff.training.ranks import Ranks, joined, local_device
from fastdiff.training.record import SAMPLES, Record, grids
from fastdiff.training.report import write_report
from fastdiff.training.samples import averaged, draw_grid
from fastdiff.training.saver import Saver
from fastdiff.training.step import TrainingStep, leave_out
from fastdiff.training.surroundings import gpu_settings, has_bfloat16, interrupts

# Where a run that was killed may have left temporary files.
FOLDERS = (".", SAMPLES, AVERAGES, CHECKPOINTS)
# In place of a signal's number: nobody reads the output of the run any more.
LOST = 1000


def train(
    options: Options,
    out: str | Path,
    device: str | torch.device,
    resume: State | None = None,
    caught: list[int] | None = None,
) -> int:
    """Train until step `options.steps`, together with the other processes if a launcher started several.

    Writes out/model.safetensors every `save_every` steps, at the end, and on SIGINT, SIGTERM, SIGHUP or SIGUSR1. The
    steps go on while a thread writes a copy of the weights. A run that is interrupted and resumed ends with the same
    bits as one that is not. On another number of processes it ends with the same weights to rounding. So it does on a
    GPU, where the sums of some gradients are of no fixed order.

    Args:
        options: what to train, and for how long.
        out: the run's folder, made if it is missing. No other training may run in it.
        device: where to train; of several processes each has its own.
        resume: the checkpoint to go on from. Without it the folder must not hold one.
        caught: takes the number of the signal that ended the run, wherever it was sent.

    Returns: the steps done, fewer than `options.steps` after a signal.
    Raises: ValueError if the loss or the gradient is not finite for `max_bad_steps` steps in a row, or the weights are
        not; the last checkpoint is then kept. OSError if the folder is in use, the checkpoint cannot be written, or
        nobody reads the output any more. Steps done by then are saved.
    """
    if not isinstance(options, Options):
        raise TypeError(f"options: expected fastdiff.training.Options, got {type(options).__name__}")
    path, device = Path(out) / NAME, local_device(torch.device(device))
    caught = [] if caught is None else caught
    with gpu_settings(device), joined(device, alone_too=options.fsdp) as ranks:
        ranks.check_passes(options.batch_size, options.accumulate)
        if ranks.leads:
            writable(path)
        ranks.agree("step", resume.step if resume else 0)
        with locked(path.parent) if ranks.leads else nullcontext(False) as alone:
            if alone:
                for name in FOLDERS:
                    sweep(path.parent / name / "*")
            if ranks.leads:
                check_free(path, resume)
            torch.manual_seed(options.seed)
            run = Run(options, path.parent, device, resume, ranks)
            record = Record(path.parent, run.options, run.step) if ranks.leads else Silent()
            progress = Progress(run.step, options.steps, options.batch_size) if ranks.leads else Silent()
            saver = Saver(path, options.keep, ranks, options.fsdp)
            # Workers that read ahead end here too.
            with closing(run.batches), closing(record), closing(progress), interrupts() as signals, saver:
                progress.say(run.summary())
                if run.changed:
                    progress.say(f"fastdiff: warning: data: {run.changed}")
                run.stream.warn = progress.left_out
                take_steps(run, record, progress, saver, signals, caught)
                if run.step > run.saved:
                    run.save(saver)
                saver.wait()
                if ranks.leads and grids(path.parent):
                    write_report(path.parent)
                ranks.largest(0)  # no process returns before the file is there
    if LOST in caught and run.step < options.steps:
        lost = f" ({progress.lost.strerror})" if progress.lost else ""
        raise OSError(errno.EPIPE, f"the output is lost{lost}, training stopped at step {run.step}")
    return run.step


def take_steps(run: "Run", record: Any, progress: Any, saver: Saver, signals: list[int], caught: list[int]) -> None:
    """Steps to the last one, or until a process gets a signal or loses its output; `caught` takes which it was."""
    options = run.options
    while run.step < options.steps and not caught:
        try:
            run.advance()
        except (OSError, ValueError):  # of the data; the steps before are good
            if run.ranks.size == 1 and run.step > run.saved:
                with suppress(OSError, ValueError):
                    run.save(saver)
            raise
        progress.advance(run.step, run.loss)
        record.step(run.step, run.losses, run.noisiness(), run.norm, options.learning_rate(run.step - 1))
        saver.check()
        if run.step % EVERY == 0:
            run.check()
            run.tell(progress.say)
        if run.step % options.save_every == 0 and run.step < options.steps:
            run.save(saver)
        if options.sample_every and (run.step % options.sample_every == 0 or run.step == options.steps):
            progress.doing("draws samples")
            run.show(record)
        if reason := run.ranks.largest(signals[0] if signals else LOST if progress.lost else 0):
            caught.append(reason)
    run.tell(progress.say)


class Run:
    """A run between two steps: data, networks, optimizer, and what the last steps gave.

    losses (B,) and levels (B,) are those of all samples of the last step; `norm` (), the norm of its gradient before it
    is clipped; `loss` (), the mean of the last 50 losses or so; `bad` () and `skipped` (), the steps in a row, and in
    all, that were left out because the loss or the gradient was not finite. The checkpoint is of the step `saved`.
    """

    def __init__(
        self, options: Options, folder: Path, device: torch.device, resume: State | None, ranks: Ranks
    ) -> None:
        self.device, self.ranks = device, ranks
        self.stream = open_stream(options, folder)
        self.options = options = options if resume else measured(options, self.stream.source)
        self.classes = self.stream.source.classes or []
        ranks.agree("data", len(self.stream))
        if resume and resume.classes != self.classes:
            raise ValueError(f"data: expected the classes {resume.classes} of the run, got {self.classes}")
        self.data = noted(self.stream.source, options.data)
        self.changed = changed(resume.data, self.data, resume.step) if resume else ""
        place = torch.device("cpu") if options.fsdp else device  # FSDP brings each process its share alone
        self.diffusion = (resume.diffusion if resume else build(options, len(self.classes))).to(place).train()
        self.ema = resume.ema.to(place) if resume else cast(Network, copy.deepcopy(self.diffusion.model))
        if history := importance(self.diffusion):
            history.to_device(device)
        self.channels_last = options.lies_channels_last(device.type)
        self.trained = self._lay_out()
        self.optimizer = torch.optim.AdamW(
            self.diffusion.parameters(),
            lr=options.lr,
            betas=(options.beta1, options.beta2),
            weight_decay=options.weight_decay,
            fused=True,
        )
        self.names = [name for name, _ in self.diffusion.model.named_parameters()]
        self.averages = {
            name: [parameter.detach().clone() for parameter in self.diffusion.model.parameters()]
            for name in average_names(options.ema_decays, options.ema_sigma_rel)
        }
        self.averaged = averaged(self.diffusion, self.ema)
        self.start = self.step = self.saved = resume.step if resume else 0
        cuts = [options.batch_size * k // options.accumulate for k in range(options.accumulate + 1)]
        self.parts = [ranks.part(start, stop) for start, stop in itertools.pairwise(cuts)]
        self.batches = self.stream.batches(self.start, self.parts)
        self.losses = self.levels = torch.zeros(options.batch_size, device=device)
        self.loss, self.norm, self.bad, self.skipped = torch.zeros(4, device=device)
        self.reported = 0  # of the steps that were left out
        self.bf16 = has_bfloat16(device) if options.bf16 is None else options.bf16
        if resume:
            self._take_over(resume)
        self.take = self._captured_step()

    def _lay_out(self) -> nn.Module:
        """Bring the networks into the form that trains. Returns: what is called, with the gradients of all ranks."""
        options, network = self.options, self.diffusion.model
        if self.channels_last:
            for each in (network, self.ema):
                channels_last_convolutions(each)
        if options.recompute:
            recompute_blocks(network)
        if options.fsdp:
            for each in (network, self.ema):
                shard(each, self.device)
        if options.compile:
            self.diffusion.compile()
        if options.fsdp or self.ranks.size == 1:
            return self.diffusion
        return replicate(self.diffusion, self.device)

    def _captured_step(self) -> TrainingStep | None:
        """A step in one pass of one process, which may be a CUDA graph; None if steps are of another kind."""
        options = self.options
        if self.ranks.size > 1 or options.accumulate > 1 or options.fsdp or importance(self.diffusion):
            return None
        return TrainingStep(
            self.diffusion,
            self.optimizer,
            average=lambda decay: update_ema(self.ema, self.diffusion.model, decay),
            clip_grad=options.clip_grad,
            autocast=torch.bfloat16 if self.bf16 else None,
        )

    def _take_over(self, resume: State) -> None:
        """What a checkpoint holds beside the networks, split and laid out as they are."""
        parameters = dict(enumerate(self.diffusion.parameters()))
        if isinstance(resume.optimizer, Path):
            moments = ("exp_avg", "exp_avg_sq")
            state = {i: {key: torch.zeros_like(p.detach()) for key in moments} for i, p in parameters.items()}
            for tensors in state.values():
                tensors["step"] = torch.zeros(())
            read_shares(resume.optimizer, state)
        else:
            state = {
                i: {key: t if key == "step" else laid_out(t, parameters[i].detach()) for key, t in tensors.items()}
                for i, tensors in resume.optimizer.items()
            }
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        for name, average in self.averages.items():
            for key, tensor in zip(self.names, average, strict=True):
                tensor.copy_(laid_out(resume.averages[name][key], tensor))
        set_rng_state(resume.rng, self.device)

    def advance(self) -> None:
        """One step of the optimizer and of the averages."""
        options, step = self.options, self.step
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate(step)
        bad = self._step_in_parts() if self.take is None else self._step(self.take)
        if self.averages:
            update_averages(self.averages, walk.parameters(self.diffusion.model), step)
        self.skipped, self.bad = self.skipped + bad, (self.bad + 1) * bad
        good = (step + 1 - self.start - self.skipped).clamp(1, 50)
        self.loss = torch.where(bad, self.loss, self.loss.lerp(self.losses.mean(), 1 / good))
        self.step += 1

    def _step(self, take: TrainingStep) -> Tensor:
        """One pass, and the update. Returns: (), whether it was left out."""
        size, decay = self.options.batch_size, warmed(self.options.ema, self.step)
        seed, ids = noise_key(self.options.seed, self.step * size, size)
        self.levels = self._draw_levels()[0]
        x0, classes = self._next()
        given = {"t": self.levels, **self._noise(x0, seed, ids), **classes}
        self.losses = take(x0, decay=decay, reduction="none", **given, **self._told(x0, given))
        self.norm = take.norm
        return take.bad

    def _next(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The images of the next pass, and the arguments that go with them."""
        x0, labels = next(self.batches).to(self.device)
        if self.channels_last:
            x0 = x0.contiguous(memory_format=torch.channels_last)
        return x0, {} if labels is None else {"class_labels": labels}

    def _noise(self, x0: Tensor, seed: int, ids: Tensor) -> dict[str, Any]:
        """The arguments of the loss that say what its noise is."""
        ids = ids.to(self.device, non_blocking=True)  # else the host would wait for the step before
        if not self.options.offset_noise:
            return {"seed": seed, "sample_ids": ids}
        return {"noise": offset_noise(x0, self.options.offset_noise, seed=seed, sample_ids=ids)}

    def _told(self, x0: Tensor, given: dict[str, Any]) -> dict[str, Tensor]:
        """What a self-conditioned network is told: in half of the steps its own estimate of x_0, else zeros."""
        if not self.options.self_conditioning:
            return {}
        if uniforms(self.options.seed, self.step, 1, SELF_CONDITIONING).item() < 0.5:
            return {TOLD: torch.zeros_like(x0)}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return {TOLD: own_estimate(self.diffusion, x0, **given)}

    def _step_in_parts(self) -> Tensor:
        """The passes of all ranks, and the update. Returns: (), whether it was left out."""
        self._backward()
        self.norm = whole(nn.utils.clip_grad_norm_(self.diffusion.parameters(), self.options.clip_grad))
        bad: Tensor = ~(self.losses.isfinite().all() & self.norm.isfinite())
        leave_out(self.optimizer, bad)
        self.optimizer.step()
        update_ema(self.ema, self.diffusion.model, warmed(self.options.ema, self.step))
        return bad

    def _backward(self) -> None:
        """The gradient of the mean loss over the step's samples, in `accumulate` passes; `losses` and `levels`."""
        options, ranks, size = self.options, self.ranks, self.options.batch_size
        seed, ids = noise_key(options.seed, self.step * size, size)
        self.levels, weight = self._draw_levels()
        losses = torch.zeros(size, device=self.device)
        self.optimizer.zero_grad()
        for k, part in enumerate(self.parts):
            x0, classes = self._next()
            given = {"t": self.levels[part], **self._noise(x0, seed, ids[part]), **classes}
            told = self._told(x0, given)
            with exchanging(self.trained, self.diffusion.model, k == options.accumulate - 1):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                    own: Tensor = self.trained(x0, reduction="none", **given, **told)
                # The mean over the ranks of this is the sum over their samples by the size of the whole batch.
                (own.mul(weight[part]).sum() * (ranks.size / size)).backward()
            losses[part] = own.detach()
        self.losses = ranks.sum(losses)
        if history := importance(self.diffusion):
            history.update(self.levels, self.losses)

    def _draw_levels(self) -> tuple[Tensor, Tensor]:
        """(times, weights), each (B,), of the step's samples."""
        options = self.options
        quantiles = uniforms(options.seed, self.step, options.batch_size, LEVELS).to(self.device, non_blocking=True)
        history = importance(self.diffusion)
        if history is not None:
            return history.sample_at(quantiles)
        return self.diffusion.times_at(quantiles), torch.ones(len(quantiles), device=self.device)

    def summary(self) -> str:
        """What is trained, on one line."""
        parameters = sum(parameter.numel() for parameter in self.diffusion.parameters())
        images, shape = len(self.stream), "x".join(map(str, self.options.shape))
        shared = f" in {self.ranks.size} processes" if self.ranks.size > 1 else ""
        classes = f" in {len(self.classes)} classes" if self.classes else ""
        sigma_data = getattr(self.diffusion.process, "sigma_data", None)
        spread = "" if sigma_data is None else f", sigma_data {sigma_data:g}"
        return (
            f"fastdiff: {self.options.formulation} of {parameters:,} parameters{spread}, {images:,} images of {shape}"
            f"{classes}, on {self.device}{shared}, steps {self.start} to {self.options.steps}"
        )

    def noisiness(self) -> Tensor:
        """(B,) in (0, 1], of the last step."""
        return self.diffusion.process.noisiness(self.levels)

    def show(self, record: Any) -> None:
        """Draw the grid of this step. Of a network that is split, all ranks draw."""
        if self.ranks.leads:
            record.grid(self.step, self.averaged)
        elif self.options.fsdp:
            draw_grid(self.averaged, self.options.seed)

    def check(self) -> None:
        """Raise ValueError after too many steps in a row without a finite loss and gradient."""
        if int(self.bad) >= self.options.max_bad_steps:
            self._give_up()

    def tell(self, say: Callable[[str], object]) -> None:
        """Say how many steps were left out, if there are more than before."""
        if (skipped := int(self.skipped)) > self.reported:
            self.reported = skipped
            say(f"fastdiff: warning: left out {skipped} steps so far, whose loss or gradient is not finite")

    def _give_up(self) -> None:
        mean = self.losses.mean().item()
        what = f"the loss is {mean}" if not torch.isfinite(self.losses).all() else "the gradient holds NaN or infinity"
        raise ValueError(f"{what} at step {self.step}, nothing was written; try a lower --lr")

    def save(self, saver: Saver) -> None:
        """Have the checkpoint of this step written. All ranks call it.

        Raises: ValueError, and writes nothing, if no step since the start was good; what an earlier writing met.
        """
        self.check()
        if int(self.skipped) == self.step - self.start:
            self._give_up()
        saver.save(
            State(
                self.diffusion,
                self.ema,
                self.optimizer.state_dict()["state"],
                rng_state(self.device),
                asdict(self.options),
                self.step,
                {name: dict(zip(self.names, tensors, strict=True)) for name, tensors in self.averages.items()},
                self.classes,
                self.data,
            )
        )
        self.saved = self.step
