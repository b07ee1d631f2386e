"""The command line: fastdiff train, sample, eval, ema. An error is one line on stderr and a non-zero exit."""

import argparse
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
from torch import Tensor

import fastdiff
from fastdiff.diffusion import Diffusion
from fastdiff.files import need, replacing, writable
from fastdiff.steps import SAMPLERS
from fastdiff.support.run_file import NAME
from fastdiff.training import DIGITS, Options, State, digits, digits_options, ranks, resumed_options, save_grid
from fastdiff.training import train as train_run
from fastdiff.training.checkpoint import load, load_model
from fastdiff.training.drawing import Batches, drawing_of, write_array
from fastdiff.training.evaluate import evaluate
from fastdiff.training.loop_flags import LOOP_HELP, ema_arguments, write_average
from fastdiff.training.options import LARGEST, OBJECTIVES, refuse_foreign

COMMANDS = ("train", "sample", "eval", "ema")
INTERRUPTED = 130
# Signals by which a scheduler of jobs asks for a checkpoint.
ASKING = ("SIGTERM", "SIGUSR1")
# Images that a grid shows at most.
GRID = 1024
# The sampler, and its steps, that suits a formulation unless one is named.
SUITED: dict[str, tuple[str, int]] = {
    "DDPM": ("ddim", 50),
    "NCSN": ("annealed_langevin", 10),
    "ScoreSDE": ("heun", 18),
}
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
        if ranks.speaks():
            complain("interrupted")
        return INTERRUPTED
    except FAILURES as error:
        if ranks.speaks():
            complain(f"error: {one_line(error)}")
        return 1


def one_line(error: BaseException) -> str:
    """What went wrong, on one line."""
    if ranks.lost_another(error):
        return "another process of the run has ended"
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
        self.exit(2, f"fastdiff: error: {message} (see {self.prog} --help)\n" if ranks.speaks() else None)


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

    train_arguments(add("train", train, "Train a diffusion model on the digits or on a folder of images."))
    command = add("sample", sample, "Draw images: PREFIX.png, a grid, and PREFIX.npy, float32 (N, C, H, W).")
    sample_arguments(command, n=64)
    command.add_argument("--out", type=path, required=True, metavar="PREFIX", help="start of the two names")
    ema_arguments(add("ema", write_average, "Write the weights of another average of a run, as a file for sample."))
    command = add("eval", evaluation, "Compare samples of a model of the digits with real digits.")
    sample_arguments(command, n=None)
    command.add_argument("--json", type=path, metavar="FILE", help="write the figures to FILE too")
    return root


TRAIN_HELP = {
    "size": "images are cropped to squares and resized to SIZE x SIZE",
    "gray": "one channel instead of RGB",
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
    **LOOP_HELP,
}


def train_arguments(command: argparse.ArgumentParser) -> None:
    """Arguments of `fastdiff train`."""
    command.add_argument("--data", help="digits, or a folder of images")
    command.add_argument("--out", type=path, required=True, metavar="RUN_DIR", help="for model.safetensors")
    text = "go on exactly from RUN_DIR/model.safetensors; auto: if it is there"
    command.add_argument("--resume", nargs="?", const="always", choices=("always", "auto"), help=text)
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
        command.add_argument(flag, type=type(field.default), metavar=field.name.upper(), help=text)


def sample_arguments(command: argparse.ArgumentParser, n: int | None) -> None:
    """Arguments of the commands that draw samples; n: how many by default."""
    command.add_argument("checkpoint", type=path, help="model.safetensors of a run, or the run's folder")
    text = "%(default)s" if n else "as many as real ones to train on"
    command.add_argument("--n", type=positive, default=n, help=f"images to draw (default: {text})")
    text = "the same as --n, which torchrun takes for an abbreviation of a flag of its own"
    command.add_argument("--count", dest="n", type=positive, default=argparse.SUPPRESS, help=text)
    names = ", ".join(f"{sampler} for {name}" for name, (sampler, _) in SUITED.items())
    command.add_argument("--sampler", choices=[*SAMPLERS, "ode"], help=f"(default: {names})")
    text = "of the sampler; for annealed_langevin at each level (default: that of the sampler, 50 for ddim)"
    command.add_argument("--steps", type=positive, help=text)
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
        device = ranks.local_device(torch.device(args.device))
        torch.empty(0, device=device)
        return device
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
    limit_threads(device, options.size)
    start = time.perf_counter()
    caught: list[int] = []
    done = train_run(options, args.out, device, state, caught)
    if done < options.steps:
        again = f"go on with: fastdiff train --out {shlex.quote(str(args.out))} --device {args.device} --resume"
        asked = signal.Signals(caught[0]).name in ASKING
        if leads():
            complain(f"{'stopped' if asked else 'interrupted'} at step {done} of {options.steps}; {again}")
        return 0 if asked else INTERRUPTED
    if leads():
        print(f"{path}: {done} steps, {time.perf_counter() - start:.1f} s")
    return 0


def leads() -> bool:
    """Whether this process is the one of its run that prints."""
    return ranks.launched("RANK", 0) == 0


def train_options(args: argparse.Namespace, path: Path) -> tuple[Options, State | None]:
    """The options that the arguments ask for, and the checkpoint to go on from, if any."""
    names = [field.name for field in fields(Options)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if not given.get("data", "unnamed"):
        raise ValueError("--data: expected digits or a folder of images, got ''")
    if given.get("data", "digits") != "digits":
        given["data"] = str(Path(given["data"]).resolve())
    if args.resume == "always" or (args.resume and path.exists()):
        state = load(path)
        options = resumed_options(state, given)
        report_data(options.data, state.options["data"])
        return options, state
    if "data" not in given:
        raise ValueError("--data: expected digits or a folder of images, got nothing")
    formulation = given.get("formulation", Options.formulation)
    suited = digits_options(formulation) if given["data"] == "digits" else {}
    options = Options(**{**suited, **given})
    refuse_foreign(formulation, given)
    return options, None


def report_data(data: str, before: str) -> None:
    """Say that a run goes on with other images. Raises ValueError if they are missing."""
    if data != "digits" and not Path(data).is_dir():
        raise ValueError(f"data: {data} is missing; say with --data where the images are now")
    if data != before and leads():
        print(f"fastdiff: the run was started with the images of {before} and goes on with those of {data}")


# --- sample and eval --------------------------------------------------------------------------------------------


def draw(args: argparse.Namespace, model: Diffusion, n: int, kept: Batches | None = None) -> Tensor:
    """Draw `n` images, float32 (n, C, H, W) on the CPU, in batches with one progress bar of network calls.

    kept: takes the batches of this process; then nothing is returned, (0,).
    """
    device, shape = device_of(args), model.model.sample_shape
    if shape is None:
        raise ValueError(f"{args.checkpoint}: expected a network with a sample_size, which says how large images are")
    limit_threads(device, max(shape[1:]))  # type: ignore[index]
    model = model.to(device)
    sampler, steps = sampler_of(args, model)
    batches = torch.arange(n).split(args.batch_size)
    own = len(batches if kept is None else kept.missing(len(batches)))
    tqdm, bar = need("tqdm").tqdm, None

    def advance(*_: object) -> None:
        nonlocal bar  # made at the first step, so that it does not precede an error in the arguments
        bar = bar or tqdm(total=calls * own, desc=f"{n} images", unit="step", disable=not leads())
        bar.update()

    options: dict[str, Any] = {"steps": steps, "sampler": sampler, "eta": args.eta, "seed": args.seed}
    if sampler != "ode":
        calls = len(model.step_table(sampler, steps, args.eta))
        options["callback"] = advance

    def one(ids: Tensor) -> Tensor:
        drawn = model.sample(len(ids), sample_ids=ids, **options).cpu()
        if wrong := int((~drawn.flatten(1).isfinite().all(1)).sum()):
            raise ValueError(f"{args.checkpoint}: {wrong} of {n} images hold NaN or infinity, nothing was written")
        return drawn

    images = torch.empty(0)
    if kept is None:
        images = torch.cat([one(ids) for ids in batches])
    else:
        kept.draw(batches, one)
    if bar:
        bar.close()
    return images


def sampler_of(args: argparse.Namespace, model: Diffusion) -> tuple[str, int | None]:
    """The sampler and its steps: those that are named, or what suits the formulation. None leaves the steps to it."""
    suited, few = SUITED[type(model).__name__]
    sampler = args.sampler or suited
    if args.steps is not None or sampler not in (suited, "ddim"):
        return sampler, args.steps
    steps = few if sampler == suited else 50
    return sampler, min(steps, getattr(model, "timesteps", steps)) if sampler == "ddim" else steps


def sample(args: argparse.Namespace) -> int:
    """`fastdiff sample`. Returns: the exit status."""
    if not args.out.name:
        raise ValueError(f"--out: expected the start of two file names, got {str(args.out)!r}")
    grid, array = (writable(args.out.with_name(args.out.name + end)) for end in (".png", ".npy"))
    model, start = load_model(args.checkpoint), time.perf_counter()
    with ranks.joined(device_of(args)) as processes:
        if processes.size == 1 and args.n <= args.batch_size:
            images = draw(args, model, args.n)
            write_array(array, images)
        else:
            batches = Batches(array, drawing_of(args, model), processes)
            draw(args, model, args.n, batches)
            images = batches.join(-(-args.n // args.batch_size), GRID) if processes.leads else torch.empty(0)
    if processes.leads:
        save_grid(grid, images[:GRID])
        print(f"{grid}, {array}: {args.n} images, {time.perf_counter() - start:.1f} s")
    return 0


def evaluation(args: argparse.Namespace) -> int:
    """`fastdiff eval`. Returns: the exit status."""
    if args.json:
        writable(args.json)
    model = load_model(args.checkpoint)
    shape = model.model.sample_shape
    if shape != (1, 8, 8):
        raise ValueError(f"{args.checkpoint}: expected a model of the 8x8 digits, it draws {shape}")
    report = asdict(evaluate(draw(args, model, args.n or len(digits()[0]))))
    for name, value in report.items():
        print(f"{name:27}{value:.4f}" if isinstance(value, float) else f"{name:27}{value}")
    if args.json:
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0
