"""The command line: fastdiff train, sample, eval, plot, ema. An error is one line on stderr and a non-zero exit."""

import argparse
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import NoReturn, TextIO

import torch
from torch import Tensor

import fastdiff
from fastdiff.diffusion import Diffusion
from fastdiff.files import writable, write_json
from fastdiff.support.choices import did_you_mean
from fastdiff.support.run_file import NAME
from fastdiff.training import Options, State, digits_options, ema, ranks, resumed_options, save_grid
from fastdiff.training import train as train_run
from fastdiff.training.arguments import ema_arguments, path, sample_arguments, train_arguments
from fastdiff.training.checkpoint import load, load_model
from fastdiff.training.data.opening import KINDS, is_path
from fastdiff.training.drawing import FORMATS, Batches, drawing_of, drawn
from fastdiff.training.features import NAMES
from fastdiff.training.figures import figures
from fastdiff.training.flags import label_of, of_arrays, report_data
from fastdiff.training.options import refuse_foreign, refuse_idle
from fastdiff.training.presets import MNIST, PRESETS, read_config
from fastdiff.training.report import write_report
from fastdiff.training.samples import columns_of, conditions

COMMANDS = ("train", "sample", "eval", "plot", "ema")
EXAMPLES = """\
a first run:
  fastdiff train --data photos/ --size 64 --out runs/photos    (a folder of images)
  fastdiff train --out runs/photos --resume                    (goes on after a stop)
  fastdiff sample runs/photos --n 64 --out drawn               (writes drawn.png and drawn.npy)
  fastdiff eval runs/photos --n 10000                          (FID; --features pixels needs no download)

fastdiff COMMAND --help lists the options of a command.
"""
INTERRUPTED = 130
# Signals by which a scheduler of jobs asks for a checkpoint.
ASKING = ("SIGTERM", "SIGUSR1")
# Images that a grid shows at most.
GRID = 1024
# What can go wrong without a fault in this program.
FAILURES = (OSError, ValueError, TypeError, ImportError, MemoryError, RuntimeError, ArithmeticError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and say what failed in one line on stderr.

    Args:
        argv: the command and its arguments, by default those of the process.

    Returns: 0, 1 after an error, or 130 if it was interrupted. Wrong usage exits with 2.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError):  # a name that an output cannot encode must not end a command
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
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
        return "another process of the run has ended, or does not answer"
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
            f"unknown command {argv[0]!r}: expected one of {', '.join(COMMANDS)}{did_you_mean(argv[0], COMMANDS)}; "
            "in a checkout, python -m benchmarks measures the kernels"
        )
    args, unknown = root.parse_known_args(argv)
    if unknown:
        meant = did_you_mean(unknown[0], re.findall(r"--[\w-]+", args.command.format_usage()))
        args.command.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
    return args


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    root = Parser(
        prog="fastdiff",
        description="Train and sample diffusion models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    root.add_argument("--version", action="version", version=f"fastdiff {fastdiff.__version__}")
    commands = root.add_subparsers(required=True, metavar="{" + ",".join(COMMANDS) + "}")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(run=run, command=command)
        return command

    train_arguments(add("train", train, "Train a diffusion model on images."))
    command = add("sample", sample, "Draw images: PREFIX.png, a grid, and PREFIX.npy, float32 (N, C, H, W).")
    sample_arguments(command, n=64)
    text = "start of the two names; with --format png or webdataset a new folder"
    command.add_argument("--out", type=path, required=True, metavar="PREFIX", help=text)
    text = "npy; png, a folder of images; or webdataset, a folder of shards (default: %(default)s)"
    command.add_argument("--format", choices=FORMATS, default="npy", help=text)
    command = add("eval", evaluation, "Compare samples with real images.")
    sample_arguments(command, n=None)
    command.add_argument("--data", help=f"the real images: {KINDS} (default: those of the run)")
    text = f"what is compared: {NAMES} (default: inception; of mnist classifier, of digits pixels)"
    command.add_argument("--features", help=text)
    command.add_argument(
        "--reference", type=path, metavar="FILE.npz", help="mu and sigma of the real features: read, or written once"
    )
    command.add_argument("--json", type=path, metavar="FILE", help="write the figures to FILE too")
    command = add("plot", plot, "Draw the loss of a run and its grids of samples as one PNG.")
    command.add_argument("folder", type=path, metavar="RUN_DIR", help="the run's folder")
    command.add_argument("--out", type=path, metavar="FILE", help="the picture (default: RUN_DIR/report.png)")
    ema_arguments(add("ema", write_average, "Write the weights of another average of a run, as a file for sample."))
    return root


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
    limit_threads(device, max(options.sides))
    start = time.perf_counter()
    caught: list[int] = []
    done = train_run(options, args.out, device, state, caught)
    if done < options.steps:
        again = f"go on with: fastdiff train --out {shlex.quote(str(args.out))} --device {args.device} --resume"
        asked = signal.Signals(caught[0]).name in ASKING
        if ranks.leads():
            complain(f"{'stopped' if asked else 'interrupted'} at step {done} of {options.steps}; {again}")
        return 0 if asked else INTERRUPTED
    if ranks.leads():
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
    if args.resume == "always" or (args.resume and path.exists()):
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
    refuse_idle(options, given)
    return options, None


def plot(args: argparse.Namespace) -> int:
    """`fastdiff plot`. Returns: the exit status."""
    print(write_report(args.folder, args.out and writable(args.out)))
    return 0


def write_average(args: argparse.Namespace) -> int:
    """`fastdiff ema`. Returns: the exit status."""
    name = f"{ema.DECAY}={args.decay}" if args.sigma_rel is None else f"{ema.WIDTH}={args.sigma_rel}"
    ema.extract(args.folder, name, writable(args.out))
    print(f"{args.out}: the average {name}")
    return 0


# --- sample and eval --------------------------------------------------------------------------------------------


def ready(args: argparse.Namespace) -> Diffusion:
    """The model of the command's checkpoint on its device. Raises ValueError if it has no size of images."""
    model, device = load_model(args.checkpoint), device_of(args)
    shape = model.model.sample_shape
    if shape is None:
        raise ValueError(f"{args.checkpoint}: expected a network with a sample_size, which says how large images are")
    args.label = label_of(args.label, args.checkpoint)
    limit_threads(device, max(shape[1:]))  # type: ignore[index]
    return model.to(device)


def sample(args: argparse.Namespace) -> int:
    """`fastdiff sample`. Returns: the exit status."""
    if not args.out.name:
        raise ValueError(f"--out: expected the start of two file names, got {str(args.out)!r}")
    grid, array = (args.out.with_name(args.out.name + end) for end in (".png", ".npy"))
    places = [grid, array] if args.format == "npy" else [args.out]
    model, start = ready(args), time.perf_counter()  # first: without a checkpoint no folder is made
    if args.format == "npy":
        for place in places:
            writable(place)
    with ranks.joined(device_of(args)) as processes:
        processes.share(model)
        numbers = torch.arange(args.n).split(args.batch_size)
        batches = Batches(places[-1], drawing_of(args, model), numbers, processes, args.format)
        try:
            for i, images in drawn(args, model, batches.missing(), batches.left, processes.leads):
                batches.write(i, images, conditions(model, numbers[i], args.label).get("class_labels"))
        except ValueError:
            batches.discard()
            raise
        processes.largest(0)  # all batches are there
        if processes.leads:
            head = batches.finish(GRID)
            if args.format == "npy" and head.shape[1] in (1, 3):
                save_grid(grid, head, columns_of(model) if args.label is None else None)
            elif args.format == "npy":
                places.remove(grid)
            took = f"{args.n} images, {time.perf_counter() - start:.1f} s"
            print(f"{', '.join(map(str, places))}: {took}")
    return 0


def evaluation(args: argparse.Namespace) -> int:
    """`fastdiff eval`. Returns: the exit status."""
    for place in (args.json, args.reference):
        if place and (place is args.json or not place.exists()):
            writable(place)
    if "" not in sys.path:
        sys.path.insert(0, "")  # a module of --features may be in this folder, as for python -m
    model = ready(args)
    with ranks.joined(device_of(args)) as processes:
        processes.share(model)

        def draw(n: int) -> Iterator[tuple[int, Tensor]]:
            own = dict(list(enumerate(torch.arange(n).split(args.batch_size)))[processes.rank :: processes.size])
            return drawn(args, model, own, shown=processes.leads)

        report = figures(args, model, draw, processes)
    if not ranks.leads():
        return 0
    for name, value in report.items():
        print(f"{name:27}{value:.4f}" if isinstance(value, float) else f"{name:27}{value}")
    if args.json:
        write_json(args.json, report)
    return 0
