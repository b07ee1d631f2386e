"""Training: one loop over batches, with EMA weights, and checkpoints from which it goes on exactly."""

import copy
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fastdiff import files
from fastdiff.ddpm import DDPM
from fastdiff.diffusion import Diffusion
from fastdiff.score import NCSN, ScoreSDE
from fastdiff.training import checkpoint, data
from fastdiff.unet import UNet

# What the network predicts unless told otherwise.
OBJECTIVES = {"ddpm": "v", "ncsn": "score", "vp": "v", "subvp": "v", "ve": "score"}


@dataclass
class Options:
    """What defines a run; kept in its checkpoints. The defaults suit a folder of images, `DIGITS` the digits.

    data        "digits", or the path of a folder of images
    size, gray  side of the images in pixels; one channel instead of RGB
    steps, batch_size, lr (peak of AdamW), warmup (steps of linear rise of the rate)
    ema         decay of the moving average of the weights, in [0, 1)
    clip_grad   largest norm of the gradient
    channels    of the U-Net at full resolution, a multiple of 8
    formulation "ddpm", "ncsn", or an SDE: "vp", "subvp", "ve"
    objective, loss, weighting: see fastdiff.ddpm.DDPM; "" is the objective that suits the formulation
    schedule, variance  of ddpm; "learned" doubles the network's output channels
    timesteps   of ddpm, or the levels of ncsn
    sigma_min, sigma_max  of ncsn and ve
    bf16        autocast to bfloat16; None: where CUDA supports it
    save_every  steps between checkpoints
    Raises ValueError naming the option that is out of its range.
    """

    data: str
    size: int = 64
    gray: bool = False
    steps: int = 100_000
    batch_size: int = 64
    lr: float = 2e-4
    warmup: int = 1000
    ema: float = 0.9999
    clip_grad: float = 1.0
    channels: int = 64
    formulation: str = "ddpm"
    objective: str = ""
    schedule: str = "cosine"
    variance: str = "posterior"
    timesteps: int = 1000
    sigma_min: float = 0.01
    sigma_max: float = 50.0
    loss: str = "mse"
    weighting: str = "simple"
    seed: int = 0
    bf16: bool | None = None
    save_every: int = 1000

    def __post_init__(self) -> None:
        if self.formulation not in OBJECTIVES:
            raise ValueError(f"formulation: expected one of {', '.join(OBJECTIVES)}, got {self.formulation!r}")
        self.objective = self.objective or OBJECTIVES[self.formulation]
        if self.variance != "posterior" and self.formulation != "ddpm":
            raise ValueError(f"variance: expected 'posterior' but for ddpm, got {self.variance!r}")
        for name in ("size", "steps", "batch_size", "channels", "timesteps", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema: expected a decay in [0, 1), got {self.ema}")
        for name in ("lr", "clip_grad"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name}: expected a finite number above 0, got {getattr(self, name)}")
        if self.warmup < 0:
            raise ValueError(f"warmup: expected at least 0, got {self.warmup}")
        if self.data == "digits" and self.size != 8:
            raise ValueError(f"size: the digits are 8x8, got {self.size}")
        if self.channels % 8:
            raise ValueError(f"channels: expected a multiple of 8, got {self.channels}")
        if self.size % 2 ** (levels(self.size) - 1):
            raise ValueError(f"size: expected a multiple of {2 ** (levels(self.size) - 1)}, got {self.size}")


DIGITS: dict[str, Any] = {
    "size": 8,
    "gray": True,
    "steps": 1400,
    "batch_size": 64,
    "lr": 3e-3,
    "warmup": 50,
    "ema": 0.998,
    "channels": 24,
    "save_every": 350,
}
# Distances between digits are about 8, and neighbouring levels should overlap in 64 dimensions (Song & Ermon 2020,
# arXiv:2006.09011, techniques 1 and 2).
DIGITS_LADDER: dict[str, Any] = {"sigma_max": 8.0, "timesteps": 28}


def digits_options(formulation: str) -> dict[str, Any]:
    """The options that suit the digits."""
    return DIGITS | (DIGITS_LADDER if formulation == "ncsn" else {})


def training_images(options: Options) -> data.Images:
    """The train half of the digits, or the images of a folder."""
    if options.data == "digits":
        return data.digits()[0]
    return data.folder(Path(options.data), options.size, options.gray)


def levels(size: int) -> int:
    """Resolutions of the U-Net: 2 for 8x8 images, 3 up to 32, else 4."""
    return 2 if size <= 8 else 3 if size <= 32 else 4


def build(options: Options) -> Diffusion:
    """The untrained model of a run. Channels double once; levels of 16x16 and below attend, but not for 8x8."""
    count, channels = levels(options.size), 1 if options.gray else 3
    attends = [options.size > 8 and options.size >> level <= 16 for level in range(count)]
    unet = UNet(
        sample_size=options.size,
        in_channels=channels,
        out_channels=channels * (2 if options.variance == "learned" else 1),
        block_out_channels=tuple(options.channels * min(2, level + 1) for level in range(count)),
        layers_per_block=1 if options.size <= 8 else 2,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        norm_num_groups=8,
        # Where the model is told sigma; its output is divided by it, as a score wants.
        time_embedding_type="fourier" if options.formulation in ("ncsn", "ve") else "positional",
    )
    same: dict[str, Any] = {"objective": options.objective, "loss": options.loss, "weighting": options.weighting}
    sigmas: dict[str, Any] = {"sigma_min": options.sigma_min, "sigma_max": options.sigma_max}
    if options.formulation == "ddpm":
        return DDPM(
            unet, schedule=options.schedule, timesteps=options.timesteps, variance=options.variance, **same
        )
    if options.formulation == "ncsn":
        return NCSN(unet, levels=options.timesteps, **sigmas, **same)
    return ScoreSDE(unet, options.formulation, **same, **(sigmas if options.formulation == "ve" else {}))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """In place, for each parameter: ema <- decay ema + (1 - decay) model."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in the list it yields instead of dying of them."""
    caught: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    old = {number: signal.signal(number, lambda n, _: caught.append(n)) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def train(options: Options, out: Path, device: torch.device, resume: checkpoint.State | None = None) -> int:
    """Train to `options.steps`, from `resume` if given, and return the steps done: fewer after a signal.

    Writes out/model.safetensors every `save_every` steps, at the end, and on SIGINT or SIGTERM.
    Raises ValueError if the loss stops being finite; the last checkpoint is then kept.
    """
    path = files.writable(out / "model.safetensors")
    torch.manual_seed(options.seed)
    images = training_images(options)
    diffusion = (resume.diffusion if resume else build(options)).to(device).train()
    ema = resume.ema.to(device) if resume else cast(UNet, copy.deepcopy(diffusion.model))
    optimizer = torch.optim.AdamW(diffusion.parameters(), lr=options.lr, fused=True)
    start = step = resume.step if resume else 0
    if resume:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": resume.optimizer})
        checkpoint.set_rng_state(resume.rng, device)

    def save() -> None:
        if not math.isfinite(smooth.item()):
            raise ValueError(f"the loss is {smooth.item()} at step {step}, nothing was written; try a lower --lr")
        state, rng = optimizer.state_dict()["state"], checkpoint.rng_state(device)
        checkpoint.save(path, checkpoint.State(diffusion, ema, state, rng, asdict(options), step))

    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported() if options.bf16 is None else options.bf16
    smooth = torch.zeros((), device=device)  # the loss, averaged over the last steps for the eye
    bar = files.need("tqdm").tqdm(total=options.steps, initial=step, unit="step", mininterval=0.5)
    with interrupts() as caught, bar:
        while step < options.steps and not caught:
            for group in optimizer.param_groups:
                group["lr"] = options.lr * min(1.0, (step + 1) / (options.warmup + 1))
            x0 = images[torch.randint(len(images), (options.batch_size,))].to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = diffusion(x0)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(diffusion.parameters(), options.clip_grad)
            optimizer.step()
            # the decay grows from 0.1, so that the random weights of the start are soon forgotten
            update_ema(ema, diffusion.model, min(options.ema, (1 + step) / (10 + step)))

            smooth = smooth.lerp(loss.detach(), 1 / min(step - start + 1, 50))
            step += 1
            bar.update()
            if step % 10 == 0:
                rate = options.batch_size * (bar.format_dict["rate"] or 0)
                bar.set_postfix_str(f"loss {smooth.item():.4f}, {rate:.0f} images/s", refresh=False)
            if step % options.save_every == 0 and step < options.steps:
                save()
        if step > start:
            save()
    return step


def resumed_options(state: checkpoint.State, given: dict[str, Any]) -> Options:
    """The options of a checkpoint; of those given now only `steps` and `save_every` may differ from them."""
    known = {field.name for field in fields(Options)}
    if set(state.options) != known:
        raise ValueError(f"the checkpoint's options are {sorted(state.options)}, expected {sorted(known)}")
    for name, value in given.items():
        if name not in ("steps", "save_every") and value != state.options[name]:
            raise ValueError(
                f"{name}: the run was started with {state.options[name]!r}, got {value!r}; "
                "leave the option out, or train into another folder"
            )
    try:
        return Options(**{**state.options, **given})
    except TypeError as error:
        raise ValueError(f"the checkpoint's options are of wrong types: {error}") from error
