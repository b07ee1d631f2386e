"""The arguments of the command line, and what each says in --help."""

import argparse
from dataclasses import fields
from pathlib import Path

import torch

from fastdiff.steps import SAMPLERS
from fastdiff.steps.names import name_to_use
from fastdiff.training.data.opening import KINDS
from fastdiff.training.figures import SAMPLES
from fastdiff.training.options import DIGITS, LARGEST, LOGS, OBJECTIVES, Options
from fastdiff.training.presets import PRESETS
from fastdiff.training.samples import SUITED

TRAIN_HELP = {
    "size": "images are cropped and resized to SIZE, a side or HxW",
    "gray": "one channel instead of RGB",
    "image_channels": "1 gray, 2 gray and alpha, 3 RGB, 4 RGB and alpha; arrays have their own",
    "classes": "train on the classes of the data: sub-folders, labels",
    "label_dropout": "share of the labels that training leaves out, for guidance",
    "flip": "mirror half of the images, left to right",
    "workers": "processes that read images",
    "cache": "keep decoded images in a file of RUN_DIR",
    "steps": "optimizer steps in all",
    "batch_size": "images per step",
    "lr": "peak learning rate of AdamW",
    "warmup": "steps over which the learning rate rises",
    "ema": "decay of the moving average of the weights, in [0, 1)",
    "clip_grad": "largest norm of the gradient",
    "network": "unet, or dit, a transformer",
    "channels": "channels of the U-Net at full resolution, a multiple of 8; of a dit the sixth part of its width",
    "patch": "side of the patches of a dit, in pixels; 0 is 2 for images up to 32x32, else 4",
    "self_conditioning": "tell the network its own estimate of the image; half of the steps take one more pass",
    "formulation": "ddpm, ncsn (score-based), a score SDE (vp, subvp or ve), flow (flow matching) or edm",
    "objective": "what the network predicts: eps, x0, v, score, flow or edm",
    "schedule": "noise schedule of ddpm: linear, scaled_linear, cosine, sigmoid, proportional or raised_cosine",
    "variance": "of ddpm's steps: posterior, beta or learned (with loss hybrid or vlb)",
    "timesteps": "length of ddpm's chain, or of ncsn's ladder",
    "sigma_min": "smallest noise of ncsn and ve",
    "sigma_max": "largest noise of ncsn and ve",
    "sigma_data": "of edm, the standard deviation of the data in [-1, 1]",
    "loss": "mse, l1 or huber; hybrid or vlb of ddpm",
    "weighting": "of noise levels: simple or min_snr (min_snr:3 for gamma 3); vlb of ddpm and ncsn; likelihood of SDEs",
    "offset_noise": "strength of noise that all pixels of a channel share, for darker and brighter images",
    "seed": "of weights, batches and noise",
    "bf16": "autocast to bfloat16 (default: wherever CUDA supports it)",
    "save_every": "steps between checkpoints",
    "keep": "checkpoints that remain; those but the last are in RUN_DIR/checkpoints",
    "accumulate": "passes into which a step's images are split, for less memory",
    "fsdp": "split weights and optimizer over the processes, for networks that do not fit on one GPU",
    "max_bad_steps": "stop after so many steps in a row whose loss or gradient is not finite; each is left out",
    "lr_schedule": "constant, cosine (down to 0 at the last step) or inverse_sqrt",
    "lr_hold": "steps before the learning rate falls",
    "weight_decay": "of AdamW",
    "beta1": "of AdamW",
    "beta2": "of AdamW",
    "ema_decays": "decays of further averages, as in 0.999,0.9999",
    "ema_sigma_rel": "relative widths of power-function averages, as in 0.05,0.1",
    "compile": "compile the network",
    "channels_last": "lay out convolutions channels last (default: of a unet on CUDA, without --fsdp)",
    "recompute": "compute the blocks again in the backward pass, for less memory",
    "sample_every": "steps between grids of samples in RUN_DIR/samples; 0 draws none",
    "log": f"where figures go besides RUN_DIR/log.csv: {', '.join(LOGS)}",
}

# Defaults that the value of the option does not say.
DEFAULTS = {
    "image_channels": "3, with --gray 1",
    "objective": ", ".join(f"{objective} for {name}" for name, objective in OBJECTIVES.items()),
    "sigma_data": "0, which measures it",
    "ema_decays": "none",
    "ema_sigma_rel": "none",
}


def train_arguments(command: argparse.ArgumentParser) -> None:
    """Arguments of `fastdiff train`."""
    command.add_argument("--data", help=KINDS)
    command.add_argument("--preset", choices=PRESETS, help="options that suit such images; flags go over them")
    command.add_argument(
        "--config", type=path, metavar="FILE", help="options in YAML, or a run's config.json; flags go over them"
    )
    command.add_argument("--out", type=path, required=True, metavar="RUN_DIR", help="the folder of the run")
    text = "go on exactly from RUN_DIR/model.safetensors; auto: if it is there"
    command.add_argument("--resume", nargs="?", const="always", choices=("always", "auto"), help=text)
    device_argument(command)
    for field in fields(Options):
        if field.name == "data":
            continue
        flag, text = "--" + field.name.replace("_", "-"), TRAIN_HELP[field.name]
        if isinstance(field.default, bool | None):
            text += " (default: off)" if field.default is False else ""
            command.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
            continue
        default = DEFAULTS.get(field.name, str(field.default))
        if field.name in DIGITS:
            default += f", for the digits {DIGITS[field.name]}"
        text = f"{text} (default: {default})"
        kind = size if field.name == "size" else type(field.default)
        command.add_argument(flag, type=kind, metavar=field.name.upper(), help=text)
    text = "the same as --log, which torchrun takes for an abbreviation of a flag of its own"
    command.add_argument("--log-to", dest="log", default=argparse.SUPPRESS, help=text)


def sample_arguments(command: argparse.ArgumentParser, n: int | None) -> None:
    """Arguments of the commands that draw samples; n: how many by default."""
    command.add_argument("checkpoint", type=path, help="model.safetensors of a run, or the run's folder")
    text = "%(default)s" if n else f"{SAMPLES}; of digits and mnist as many as the train half has"
    command.add_argument("--n", type=positive, default=n, help=f"images to draw (default: {text})")
    text = "the same as --n, which torchrun takes for an abbreviation of a flag of its own"
    command.add_argument("--count", dest="n", type=positive, default=argparse.SUPPRESS, help=text)
    names = ", ".join(f"{sampler} for {name}" for name, (sampler, _) in SUITED.items())
    text = f"{', '.join(SAMPLERS)} or ode (default: {names})"
    command.add_argument("--sampler", type=sampler, help=text)
    names = ", ".join(f"{steps} for {sampler}" for sampler, steps in dict(SUITED.values()).items())
    others = "else all levels, 1000 of an SDE, 50 of flow, 18 of edm"
    text = f"of the sampler; for annealed_langevin at each level (default: {names}; {others})"
    command.add_argument("--steps", type=positive, help=text)
    command.add_argument("--label", help="the class of all images, by name or number (default: each in turn)")
    command.add_argument("--guidance", type=float, help="of the class: 1 is none, more is closer to the class")
    command.add_argument("--eta", type=float, default=0.0, help="noise of ddim, 0 to 1 (default: 0)")
    command.add_argument("--seed", type=seed, default=0, help="image i of a seed is always the same")
    command.add_argument("--batch-size", type=positive, default=256, help="images at a time (default: 256)")
    device_argument(command)


def path(text: str) -> Path:
    """An argument that names a file or a folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got ''")
    return Path(text)


def sampler(text: str) -> str:
    """An argument that names a sampler."""
    if text not in (*SAMPLERS, "ode"):
        names = ", ".join(SAMPLERS)
        raise argparse.ArgumentTypeError(f"expected one of {names} or ode, got {text!r}{name_to_use(text, SAMPLERS)}")
    return text


def positive(text: str) -> int:
    """An argument that counts something."""
    value = int(text)
    if not 1 <= value <= LARGEST:
        raise argparse.ArgumentTypeError(f"expected at least 1 and at most {LARGEST}, got {value}")
    return value


def seed(text: str) -> int:
    """An argument of 64 bits."""
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected a number of 64 bits, got {value}")
    return value


def device_argument(command: argparse.ArgumentParser) -> None:
    """--device, by default a GPU if there is one."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    command.add_argument("--device", default=default, help="cpu, cuda or cuda:N (here: %(default)s)")


def ema_arguments(command: argparse.ArgumentParser) -> None:
    """Arguments of `fastdiff ema`."""
    command.add_argument("folder", type=path, metavar="RUN_DIR", help="the run's folder")
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--decay", type=float, help="one of the run's --ema-decays")
    which.add_argument("--sigma-rel", type=float, help="any width below 0.288, of a run with --ema-sigma-rel")
    command.add_argument("--out", type=path, required=True, metavar="FILE", help="for the weights, .safetensors")


def size(text: str) -> int | list[int]:
    """An argument that is a side in pixels, or HxW."""
    sides = [int(side) for side in text.lower().split("x")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"expected a side in pixels or HxW, got {text!r}")
    return sides[0] if len(sides) == 1 else sides
