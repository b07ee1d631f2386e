"""The command line: fastdiff train, sample, eval. An error is one line on stderr and a non-zero exit."""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TextIO

import numpy as np
import torch
from torch import Tensor

import fastdiff
from fastdiff.diffusion import Diffusion
from fastdiff.files import need, replacing, writable
from fastdiff.steps import SAMPLERS
from fastdiff.support.run_file import NAME
from fastdiff.training import DIGITS, Options, State, digits_options, resumed_options, save_grid
from fastdiff.training import train as train_run
from fastdiff.training.checkpoint import load, load_model
from fastdiff.training.data.opening import KINDS, is_path
from fastdiff.training.features import NAMES
from fastdiff.training.figures import DIGITS_SAMPLES, SAMPLES, figures
from fastdiff.training.flags import label_of, of_arrays, report_data, size
from fastdiff.training.options import LARGEST, LOGS, OBJECTIVES, refuse_foreign
from fastdiff.training.presets import MNIST, PRESETS, read_config
from fastdiff.training.report import write_report
from fastdiff.training.samples import SUITED, columns_of, conditions, suited

COMMANDS = ("train", "sample", "eval", "plot")
INTERRUPTED = 130
# What can go wrong without a fault in this program.
FAILURES = (OSError, ValueError, ImportError, MemoryError, RuntimeError, ArithmeticError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and say what failed in one line on stderr.

    Args:
        argv: the command and its arguments, by default those of the process.

    Returns: 0, 1 after an error, or 130 if it was interrupted. Wrong usage exits with 2.
    """
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        status: int = args.run(args)
        sys.stdout.flush()  # an output that is full or closed shows here, not when the process ends
        return status
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED
    except FAILURES as error:
        complain(f"error: {one_line(error)}")
        return 1


def one_line(error: BaseException) -> str:
    """What went wrong, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def complain(text: str) -> None:
    """Write a line to stderr, if anybody still reads it."""
    settle(sys.stdout)
    with suppress(OSError):
        print(f"fastdiff: {text}", file=sys.stderr)
    settle(sys.stderr)


def settle(stream: TextIO) -> None:
    """Write what is buffered, or drop what cannot be written: Python would try once more when the process ends."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# --- the arguments ----------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are the one line that all errors of this program are."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fastdiff: error: {message} (see {self.prog} --help)\n")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The parsed arguments. Exits with 2 after wrong usage."""
    root = parser()
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        root.error(
            f"unknown command {argv[0]!r}: expected one of {', '.join(COMMANDS)}; "
            "in a checkout, python -m benchmarks measures the kernels"
        )
    return root.parse_args(argv)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    root = Parser(prog="fastdiff", description="Train and sample diffusion models.", allow_abbrev=False)
    root.add_argument("--version", action="version", version=f"fastdiff {fastdiff.__version__}")
    commands = root.add_subparsers(required=True, metavar="{" + ",".join(COMMANDS) + "}")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(run=run)
        return command

    train_arguments(add("train", train, "Train a diffusion model on images."))
    command = add("sample", sample, "Draw images: PREFIX.png, a grid, and PREFIX.npy, float32 (N, C, H, W).")
    sample_arguments(command, n=64)
    command.add_argument("--out", type=path, required=True, metavar="PREFIX", help="start of the two names")
    command = add("eval", evaluation, "Compare samples with real images.")
    sample_arguments(command, n=None)
    command.add_argument("--data", help=f"the real images: {KINDS} (default: those of the run)")
    command.add_argument("--features", help=f"what is compared: {NAMES} (default: inception, for the digits pixels)")
    command.add_argument(
        "--reference", type=path, metavar="FILE.npz", help="mu and sigma of the real features: read, or written once"
    )
    command.add_argument("--json", type=path, metavar="FILE", help="write the figures to FILE too")
    command = add("plot", plot, "Draw the loss of a run and its grids of samples as one PNG.")
    command.add_argument("folder", type=path, metavar="RUN_DIR", help="the run's folder")
    command.add_argument("--out", type=path, metavar="FILE", help="(default: RUN_DIR/report.png)")
    return root


TRAIN_HELP = {
    "size": "images are cropped and resized to SIZE, a side or HxW",
    "gray": "one channel instead of RGB",
    "image_channels": "of the images: 1 gray, 2 gray and alpha, 3 RGB, 4 RGB and alpha; arrays have their own",
    "classes": "train on the classes of the data: sub-folders, labels",
    "label_dropout": "share of the labels that training leaves out, for guidance",
    "flip": "mirror every second image, left to right",
    "workers": "processes that read images",
    "cache": "keep decoded images in a file of RUN_DIR",
    "steps": "optimizer steps in all",
    "batch_size": "images per step",
    "lr": "peak learning rate of AdamW",
    "warmup": "steps over which the learning rate rises",
    "ema": "decay of the moving average of the weights, in [0, 1)",
    "clip_grad": "largest norm of the gradient",
    "channels": "channels of the U-Net at full resolution, a multiple of 8",
    "formulation": "ddpm, ncsn (score-based), or a score SDE: vp, subvp or ve",
    "objective": "what the network predicts: eps, x0, v or score",
    "schedule": "noise schedule of ddpm: linear, scaled_linear, cosine, sigmoid, proportional or raised_cosine",
    "variance": "of ddpm's steps: posterior, beta or learned (with loss hybrid or vlb)",
    "timesteps": "length of ddpm's chain, or of ncsn's ladder",
    "sigma_min": "smallest noise of ncsn and ve",
    "sigma_max": "largest noise of ncsn and ve",
    "loss": "mse, l1 or huber; hybrid or vlb of ddpm",
    "weighting": "of the loss over noise levels: simple or min_snr; vlb of ddpm and ncsn; likelihood of SDEs",
    "seed": "of weights, batches and noise",
    "bf16": "autocast to bfloat16 (default: wherever CUDA supports it)",
    "save_every": "steps between checkpoints",
    "sample_every": "steps between grids of samples in RUN_DIR/samples; 0 draws none",
    "log": f"where figures go besides RUN_DIR/log.csv: {', '.join(LOGS)}",
}


def train_arguments(command: argparse.ArgumentParser) -> None:
    """Arguments of `fastdiff train`."""
    command.add_argument("--data", help=KINDS)
    command.add_argument("--preset", choices=PRESETS, help="options that suit such images; flags go over them")
    command.add_argument(
        "--config", type=path, metavar="FILE", help="options in YAML, or a run's config.json; flags go over them"
    )
    command.add_argument("--out", type=path, required=True, metavar="RUN_DIR", help="for model.safetensors")
    command.add_argument("--resume", action="store_true", help="go on exactly from RUN_DIR/model.safetensors")
    device_argument(command)
    for field in fields(Options):
        if field.name == "data":
            continue
        flag, text = "--" + field.name.replace("_", "-"), TRAIN_HELP[field.name]
        if isinstance(field.default, bool | None):
            command.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
            continue
        default = str(field.default) or ", ".join(f"{v} for {k}" for k, v in OBJECTIVES.items())
        if field.name in DIGITS:
            default += f", for the digits {DIGITS[field.name]}"
        text = f"{text} (default: {default})"
        kind = size if field.name == "size" else type(field.default)
        command.add_argument(flag, type=kind, metavar=field.name.upper(), help=text)


def sample_arguments(command: argparse.ArgumentParser, n: int | None) -> None:
    """Arguments of the commands that draw samples; n: how many by default."""
    command.add_argument("checkpoint", type=path, help="model.safetensors of a run, or the run's folder")
    text = "%(default)s" if n else f"{SAMPLES}, for the digits {DIGITS_SAMPLES}"
    command.add_argument("--n", type=positive, default=n, help=f"images to draw (default: {text})")
    names = ", ".join(f"{sampler} for {name}" for name, (sampler, _) in SUITED.items())
    command.add_argument("--sampler", choices=[*SAMPLERS, "ode"], help=f"(default: {names})")
    text = "of the sampler; for annealed_langevin at each level (default: that of the sampler, 50 for ddim)"
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


def device_of(args: argparse.Namespace) -> torch.device:
    """The device that --device names. Raises ValueError if it cannot be used."""
    try:
        torch.empty(0, device=args.device)
        return torch.device(args.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"--device: {args.device!r} cannot be used: {reason}") from error


def limit_threads(device: torch.device, size: int) -> None:
    """Use one CPU thread for 8x8 images.

    A second thread makes them a third faster. If another process holds a core, threads that wait for each other make
    them ten times slower.
    """
    if device.type == "cpu" and size <= 8:
        torch.set_num_threads(1)


# --- train ------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> int:
    """`fastdiff train`. Returns: the exit status."""
    path, device = args.out / NAME, device_of(args)
    options, state = train_options(args, path)
    limit_threads(device, max(options.sides))
    start = time.perf_counter()
    done = train_run(options, args.out, device, state)
    if done < options.steps:
        again = f"go on with: fastdiff train --out {shlex.quote(str(args.out))} --device {args.device} --resume"
        complain(f"interrupted at step {done} of {options.steps}; {again}")
        return INTERRUPTED
    print(f"{path}: {done} steps, {time.perf_counter() - start:.1f} s")
    return 0


def train_options(args: argparse.Namespace, path: Path) -> tuple[Options, State | None]:
    """The options that the arguments ask for, and the checkpoint to go on from, if any."""
    names = [field.name for field in fields(Options)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.config:
        given = {**read_config(args.config), **given}
    if not given.get("data", "unnamed"):
        raise ValueError(f"--data: expected {KINDS}, got ''")
    if is_path(given.get("data", "digits")):
        given["data"] = str(Path(given["data"]).resolve())
    if args.resume:
        state = load(path)
        options = resumed_options(state, given)
        report_data(options.data, state.options["data"])
        return options, state
    preset = PRESETS.get(args.preset, {})
    if "data" not in preset | given:
        raise ValueError(f"--data: expected {KINDS}, got nothing")
    formulation, data = given.get("formulation", Options.formulation), str((preset | given)["data"])
    suits = {"digits": digits_options(formulation), "mnist": MNIST}.get(data, {})
    options = Options(**{**suits, **preset, **of_arrays(data), **given})
    refuse_foreign(formulation, given)
    return options, None


def plot(args: argparse.Namespace) -> int:
    """`fastdiff plot`. Returns: the exit status."""
    print(write_report(args.folder, args.out and writable(args.out)))
    return 0


# --- sample and eval --------------------------------------------------------------------------------------------


def draw(args: argparse.Namespace, model: Diffusion, n: int) -> Tensor:
    """Draw `n` images, float32 (n, C, H, W) on the CPU, in batches with one progress bar of network calls."""
    device, shape = device_of(args), model.model.sample_shape
    if shape is None:
        raise ValueError(f"{args.checkpoint}: expected a network with a sample_size, which says how large images are")
    limit_threads(device, max(shape[1:]))  # type: ignore[index]
    model = model.to(device)
    sampler, steps = sampler_of(args, model)
    batches = torch.arange(n).split(args.batch_size)
    tqdm, bar = need("tqdm").tqdm, None

    def advance(*_: object) -> None:
        nonlocal bar  # made at the first step, so that it does not precede an error in the arguments
        bar = bar or tqdm(total=calls * len(batches), desc=f"{n} images", unit="step")
        bar.update()

    options: dict[str, Any] = {"steps": steps, "sampler": sampler, "eta": args.eta, "seed": args.seed}
    if sampler != "ode":
        calls = len(model.step_table(sampler, steps, args.eta))
        options["callback"] = advance
    labels = [conditions(model, ids.to(device), args.label, args.guidance) for ids in batches]
    drawn = torch.cat(
        [model.sample(len(i), sample_ids=i, **options, **k).cpu() for i, k in zip(batches, labels, strict=True)]
    )
    if bar:
        bar.close()
    if wrong := int((~drawn.flatten(1).isfinite().all(1)).sum()):
        raise ValueError(f"{args.checkpoint}: {wrong} of {n} images hold NaN or infinity, nothing was written")
    return drawn


def sampler_of(args: argparse.Namespace, model: Diffusion) -> tuple[str, int | None]:
    """The sampler and its steps: those that are named, or what suits the formulation. None leaves the steps to it."""
    sampler, steps = suited(model)
    if args.steps is None and args.sampler in (None, sampler):
        return sampler, steps
    named = args.sampler or sampler
    return named, args.steps if named != "ddim" or args.steps else min(50, getattr(model, "timesteps", 50))


def sample(args: argparse.Namespace) -> int:
    """`fastdiff sample`. Returns: the exit status."""
    if not args.out.name:
        raise ValueError(f"--out: expected the start of two file names, got {str(args.out)!r}")
    grid, array = (writable(args.out.with_name(args.out.name + end)) for end in (".png", ".npy"))
    model = load_model(args.checkpoint)
    args.label = label_of(args.label, args.checkpoint)
    start = time.perf_counter()
    images = draw(args, model, args.n)
    seconds = time.perf_counter() - start
    save_grid(grid, images, columns_of(model) if args.label is None else None)
    with replacing(array) as temporary, open(temporary, "wb") as file:
        np.save(file, images.numpy())
    print(f"{grid}, {array}: {args.n} images, {seconds:.1f} s")
    return 0


def evaluation(args: argparse.Namespace) -> int:
    """`fastdiff eval`. Returns: the exit status."""
    if args.json:
        writable(args.json)
    model = load_model(args.checkpoint)
    args.label = label_of(args.label, args.checkpoint)
    report = figures(args, model, lambda n: draw(args, model, n))
    for name, value in report.items():
        print(f"{name:27}{value:.4f}" if isinstance(value, float) else f"{name:27}{value}")
    if args.json:
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0
