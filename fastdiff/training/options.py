"""What defines a run: its options and their checks."""

import math
import operator
import os
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from numbers import Real
from typing import Any

from fastdiff.networks import NETWORKS
from fastdiff.ops.checks import check_choice
from fastdiff.support.scalars import as_not_negative, as_positive
from fastdiff.training.checkpoint import State
from fastdiff.training.data.opening import ARRAYS, KINDS, SETS, is_path
from fastdiff.training.ema import average_names

# What the network of each formulation predicts by default.
OBJECTIVES = {"ddpm": "v", "ncsn": "score", "vp": "v", "subvp": "v", "ve": "score", "flow": "flow", "edm": "edm"}
# The formulations that have an option; all have those that are not here.
OWNERS = {
    "schedule": ("ddpm",),
    "variance": ("ddpm",),
    "timesteps": ("ddpm", "ncsn"),
    "sigma_min": ("ncsn", "ve"),
    "sigma_max": ("ncsn", "ve"),
    "sigma_data": ("edm",),
}
# The formulations whose network is told sigma, which a U-Net embeds; a DiT embeds timesteps alone.
OF_SIGMA = ("ncsn", "ve")
# Options that runs of before do not have, and what they did.
LATER: dict[str, Any] = {"network": "unet", "patch": 0, "self_conditioning": False, "sigma_data": 0.5}
# Integers that count something, and the largest of them.
COUNTS = ("steps", "batch_size", "channels", "timesteps", "save_every", "keep", "accumulate", "max_bad_steps")
# Integers from 0.
AMOUNTS = ("warmup", "workers", "sample_every", "lr_hold", "patch")
# What may differ when a run goes on: how long it takes, what it keeps and shows, and how it is spread.
FREE = (
    *("steps", "save_every", "sample_every", "keep", "max_bad_steps", "workers", "cache", "log"),
    *("accumulate", "fsdp", "compile", "channels_last", "recompute"),
)
LOGS = ("csv", "tensorboard", "wandb")
LARGEST = 2**31 - 1
LR_SCHEDULES = ("constant", "cosine", "inverse_sqrt")


@dataclass
class Options:
    """The options of a run; its checkpoints keep them. The defaults suit a folder of images, `DIGITS` the digits.

    Args:
        data: what fastdiff.training.data.open_source takes: "digits", a folder of images, ...
        size: side of the images in pixels, or [H, W].
        gray: one channel instead of RGB.
        image_channels: of the data; 0 is 1 with `gray`, else 3. Image files have 1 to 4.
        classes: train a class-conditional network on the labels of the data.
        label_dropout: share of the labels that is replaced by "no label", for guidance.
        flip: mirror half of the images, left to right.
        workers: processes that read images ahead of the training; arrays need none.
        cache: keep decoded images in a file of the run's folder.
        steps, batch_size: optimizer steps in all; images per step.
        lr, warmup: peak learning rate of AdamW; steps over which it rises.
        ema: decay of the moving average of the weights, in [0, 1).
        clip_grad: largest norm of the gradient.
        network: "unet" or "dit", see `fastdiff.training.build`.
        channels: of the U-Net at full resolution, a multiple of 8; a DiT's tokens have 6 times as many.
        patch: side of a DiT's patches in pixels; 0 is 2 for images up to 32x32, else 4.
        self_conditioning: tell the network its own estimate of the image, see `fastdiff.recipes.self_conditioned`.
        formulation: "ddpm", "ncsn", an SDE ("vp", "subvp", "ve"), "flow" (flow matching), or "edm".
        objective, loss, weighting: as in fastdiff.DDPM; objective "" is the one that suits the formulation.
        schedule, variance: of ddpm; variance "learned" doubles the network's output channels.
        timesteps: length of ddpm's chain, or of ncsn's ladder.
        sigma_min, sigma_max: smallest and largest noise of ncsn and ve.
        sigma_data: of edm, the standard deviation of the data in [-1, 1]; 0 lets `train` measure it.
        offset_noise: strength of `fastdiff.recipes.offset_noise`.
        seed: of weights, batches and noise.
        bf16: autocast to bfloat16; None means wherever CUDA supports it.
        save_every: steps between checkpoints.
        keep: checkpoints of the run that remain.
        accumulate: passes into which a step's images are split, for less memory; the update is that of one pass.
        fsdp: split weights, gradients and optimizer over the processes, for networks that do not fit on one GPU.
        max_bad_steps: steps in a row whose loss or gradient is not finite, each left out, after which the run stops.
        lr_schedule: after the warm-up, "constant", "cosine" (down to 0 at the last step), or "inverse_sqrt".
        lr_hold: steps before the learning rate falls.
        weight_decay, beta1, beta2: of AdamW.
        ema_decays, ema_sigma_rel: further averages to keep, like "0.99,0.999"; see fastdiff.training.ema.
        compile: compile the network. channels_last: lay out its convolutions channels last, without fsdp; None does so
            for a unet on CUDA.
        recompute: keep the inputs of the blocks alone for the backward pass, for less memory.
        sample_every: steps between grids of samples; 0 draws none.
        log: where figures go besides log.csv: "csv" (nowhere else), "tensorboard" or "wandb".

    Raises: TypeError or ValueError naming the option that is of a wrong type, out of its range, or of another
        formulation.
    """

    data: str
    size: int | list[int] = 64
    gray: bool = False
    image_channels: int = 0
    classes: bool = False
    label_dropout: float = 0.1
    flip: bool = False
    workers: int = 2
    cache: bool = False
    steps: int = 100_000
    batch_size: int = 64
    lr: float = 2e-4
    warmup: int = 1000
    ema: float = 0.9999
    clip_grad: float = 1.0
    network: str = "unet"
    channels: int = 64
    patch: int = 0
    self_conditioning: bool = False
    formulation: str = "ddpm"
    objective: str = ""
    schedule: str = "cosine"
    variance: str = "posterior"
    timesteps: int = 1000
    sigma_min: float = 0.01
    sigma_max: float = 50.0
    sigma_data: float = 0.0
    loss: str = "mse"
    weighting: str = "simple"
    offset_noise: float = 0.0
    seed: int = 0
    bf16: bool | None = None
    save_every: int = 1000
    keep: int = 1
    accumulate: int = 1
    fsdp: bool = False
    max_bad_steps: int = 5
    lr_schedule: str = "constant"
    lr_hold: int = 0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    ema_decays: str = ""
    ema_sigma_rel: str = ""
    compile: bool = False
    channels_last: bool | None = None
    recompute: bool = False
    sample_every: int = 1000
    log: str = "csv"

    def __post_init__(self) -> None:
        for field in fields(self):
            setattr(self, field.name, typed(field.name, field.type, getattr(self, field.name)))
        if not self.data:
            raise ValueError(f"data: expected {KINDS}, got ''")
        if self.gray and self.image_channels > 1:
            raise ValueError(f"gray: expected False with {self.image_channels} image_channels, got True")
        check_choice("log", self.log, LOGS)
        check_choice("network", self.network, NETWORKS)
        check_choice("formulation", self.formulation, OBJECTIVES)
        self.objective = self.objective or OBJECTIVES[self.formulation]
        changed = [f.name for f in fields(self) if f.default is not MISSING and getattr(self, f.name) != f.default]
        refuse_foreign(self.formulation, changed)
        self._check_numbers()
        self._check_network()

    def _check_numbers(self) -> None:
        for name, smallest in (*((name, 1) for name in COUNTS), *((name, 0) for name in AMOUNTS)):
            if getattr(self, name) < smallest:
                raise ValueError(f"{name}: expected at least {smallest}, got {getattr(self, name)}")
            if getattr(self, name) > LARGEST:
                raise ValueError(f"{name}: expected at most {LARGEST}, got {getattr(self, name)}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed: expected a number of 64 bits, got {self.seed}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema: expected a decay in [0, 1), got {self.ema}")
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout: expected a share in [0, 1), got {self.label_dropout}")
        for name in ("offset_noise", "sigma_data"):
            as_not_negative(name, getattr(self, name))
        self._check_optimizer()
        for name in ("lr", "clip_grad"):
            as_positive(name, getattr(self, name))

    def _check_optimizer(self) -> None:
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate: expected at most the batch size {self.batch_size}, got {self.accumulate}")
        if self.fsdp and self.channels_last:
            raise ValueError("channels_last: expected False with fsdp, which splits contiguous weights, got True")
        check_choice("lr_schedule", self.lr_schedule, LR_SCHEDULES)
        if self.lr_schedule == "inverse_sqrt" and not self.lr_hold:
            raise ValueError("lr_hold: expected at least 1 with lr_schedule inverse_sqrt, got 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number in [0, 1), got {getattr(self, name)}")
        as_not_negative("weight_decay", self.weight_decay)
        average_names(self.ema_decays, self.ema_sigma_rel)

    def _check_network(self) -> None:
        if self.data in SETS and self.sides != SETS[self.data][1:]:
            raise ValueError(f"size: the {self.data} are {'x'.join(map(str, SETS[self.data][1:]))}, got {self.size}")
        if self.data in SETS and self.shape[0] != 1:
            raise ValueError(f"gray: the {self.data} have one channel, got False")
        largest = 4 if _are_files(self.data) else LARGEST
        if not 0 <= self.image_channels <= largest:
            raise ValueError(f"image_channels: expected 0 to {largest}, got {self.image_channels}")
        if self.channels % 8:
            raise ValueError(f"channels: expected a multiple of 8, got {self.channels}")
        if self.network == "dit":
            self._check_patches()
            return
        if self.patch:
            raise ValueError(f"patch: an option of network dit, which network {self.network} does not have")
        factor = 2 ** (resolutions(max(self.sides)) - 1)
        if any(side % factor for side in self.sides):
            raise ValueError(f"size: expected a multiple of {factor}, got {self.size}")

    def _check_patches(self) -> None:
        if self.formulation in OF_SIGMA:
            raise ValueError(f"network: expected unet with formulation {self.formulation}, got {self.network!r}")
        if isinstance(self.size, list):
            raise ValueError(f"size: expected a square for network dit, got {self.size}")
        self.patch = self.patch or (2 if self.size <= 32 else 4)
        if self.size % self.patch:
            raise ValueError(f"size: expected a multiple of patch {self.patch}, got {self.size}")

    def learning_rate(self, step: int) -> float:
        """The learning rate of step `step`, from 0: it rises over `warmup` steps, and falls after `lr_hold`.

        inverse_sqrt is lr / sqrt(max(step / lr_hold, 1)) (Karras et al. 2024, arXiv:2312.02696).
        """
        rate = self.lr * min(1.0, (step + 1) / (self.warmup + 1))
        if self.lr_schedule == "inverse_sqrt":
            return rate / math.sqrt(max(step / self.lr_hold, 1.0))
        if self.lr_schedule == "cosine" and step > self.lr_hold:
            return rate * (1 + math.cos(math.pi * (step - self.lr_hold) / (self.steps - self.lr_hold))) / 2
        return rate

    def used(self) -> dict[str, Any]:
        """The options that the formulation and the network have, by name."""
        given = {k: v for k, v in asdict(self).items() if self.formulation in OWNERS.get(k, (self.formulation,))}
        return given if self.network == "dit" else {k: v for k, v in given.items() if k != "patch"}

    def lies_channels_last(self, device: str) -> bool:
        """Whether convolutions have channels last on a type of device: a U-Net's on CUDA, unless it is split."""
        suits = device == "cuda" and self.network == "unet" and not self.fsdp
        return suits if self.channels_last is None else self.channels_last

    @property
    def sides(self) -> tuple[int, int]:
        """(height, width) of an image."""
        height, width = self.size if isinstance(self.size, list) else (self.size, self.size)
        return height, width

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        return (self.image_channels or (1 if self.gray else 3), *self.sides)


def refuse_idle(options: Options, names: Iterable[str]) -> None:
    """Raise ValueError naming the first option that changes nothing beside the others."""
    idle = {
        "label_dropout": (not options.classes, "classes"),
        "lr_hold": (options.lr_schedule == "constant", "lr_schedule cosine or inverse_sqrt"),
    }
    for name in names:
        if name in idle and idle[name][0] and getattr(options, name) != getattr(Options, name):
            raise ValueError(f"{name}: expected {idle[name][1]} with it, got {getattr(options, name)} alone")


def _are_files(data: str) -> bool:
    """Whether the data are image files, which have at most 4 channels."""
    return is_path(data) and not data.endswith(ARRAYS)


def as_size(value: Any) -> int | list[int]:
    """A side in pixels, or [H, W]; a square's side is one number. Raises TypeError or ValueError naming `size`."""
    pair = [value, value] if not isinstance(value, list | tuple) else list(value)
    if len(pair) != 2 or any(isinstance(side, bool) or not hasattr(side, "__index__") for side in pair):
        raise TypeError(f"size: expected a side in pixels or [H, W], got {value!r}")
    height, width = (operator.index(side) for side in pair)
    for side in (height, width):
        if not 1 <= side <= LARGEST:
            raise ValueError(f"size: expected at least 1 and at most {LARGEST}, got {side}")
    return height if height == width else [height, width]


def typed(name: str, kind: Any, value: Any) -> Any:
    """The value as the plain Python type of an option. Raises TypeError for a value of another kind."""
    if name == "size":
        return as_size(value)
    if kind is str and isinstance(value, str | os.PathLike):
        return os.fspath(value)
    if kind is int and hasattr(value, "__index__") and not isinstance(value, bool):
        return operator.index(value)
    if kind is float and isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    if kind not in (int, float, str) and isinstance(value, kind):
        return value
    raise TypeError(f"{name}: expected {getattr(kind, '__name__', kind)}, got {value!r}")


def refuse_foreign(formulation: str, names: Iterable[str]) -> None:
    """Raise ValueError naming the first option that the formulation does not have."""
    for name in names:
        if formulation not in OWNERS.get(name, (formulation,)):
            owners = " and ".join(OWNERS[name])
            raise ValueError(f"{name}: an option of {owners}, which formulation {formulation} does not have")


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
    "sample_every": 350,
}
# Distances between digits are about 8, and neighbouring levels should overlap in 64 dimensions (Song & Ermon 2020,
# arXiv:2006.09011, techniques 1 and 2).
DIGITS_LADDER: dict[str, Any] = {"sigma_max": 8.0, "timesteps": 28}


def digits_options(formulation: str) -> dict[str, Any]:
    """The options that suit the digits, by name."""
    return DIGITS | (DIGITS_LADDER if formulation == "ncsn" else {})


def resumed_options(state: State, given: dict[str, Any]) -> Options:
    """The options of a run that goes on.

    Args:
        state: the checkpoint, whose options hold.
        given: options by name. Only those of FREE, and the place of `data`, may differ from the checkpoint's.

    Raises: ValueError naming an option that differs, or saying that the checkpoint's are not those of a run.
    """
    known, before = {field.name for field in fields(Options)}, {**LATER, **state.options}
    if set(before) != known:
        raise ValueError(f"the checkpoint's options are {sorted(before)}, expected {sorted(known)}")
    refuse_foreign(before["formulation"], given)
    for name, value in given.items():
        moved = name == "data" and value and all(map(is_path, (value, before["data"])))
        if name not in FREE and not moved and value != before[name]:
            raise ValueError(
                f"{name}: the run was started with {before[name]!r}, got {value!r}; "
                "leave the option out, or train into another folder"
            )
    unused = {name for name, owners in OWNERS.items() if before["formulation"] not in owners}
    try:
        options = Options(**{**{k: v for k, v in before.items() if k not in unused}, **given})
    except TypeError as error:
        raise ValueError(f"the checkpoint's options are of wrong types: {error}") from error
    if (shape := state.ema.sample_shape) not in (None, options.shape):
        raise ValueError(f"the checkpoint's options ask for images of {options.shape}, its network draws {shape}")
    return options


def resolutions(size: int) -> int:
    """How many resolutions the U-Net has: 2 for 8x8 images, 3 up to 32, else 4."""
    return 2 if size <= 8 else 3 if size <= 32 else 4
