"""The command line: fastdiff train, sample, eval, bench. An error is one line on stderr and a non-zero exit."""

import argparse
import importlib
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from fastdiff.diffusion import Diffusion
from fastdiff.files import need, replacing, writable
from fastdiff.steps import SAMPLERS
from fastdiff.training import checkpoint, data, evaluate
from fastdiff.training import loop as training

INTERRUPTED = 130
# The sampler, and its steps, that suits a formulation unless one is named.
SUITED: dict[str, tuple[str, int]] = {
    "DDPM": ("ddim", 50),
    "NCSN": ("annealed_langevin", 10),
    "ScoreSDE": ("heun", 18),
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are the one line that all errors of this program are."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fastdiff: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `argv` (default: sys.argv[1:]). Returns 0, 1 (error) or 130 (interrupted); bad usage exits with 2."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parser(with_bench=argv[:1] == ["bench"]).parse_args(argv)
        return args.run(args)
    except KeyboardInterrupt:
        print("fastdiff: interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except (ValueError, ImportError, MemoryError, RuntimeError) as error:
        message = str(error) or type(error).__name__
    print(f"fastdiff: error: {' '.join(message.split())}", file=sys.stderr)
    return 1


def parser(with_bench: bool = False) -> argparse.ArgumentParser:
    """The parser of all subcommands; that of bench has its options only `with_bench`, which imports it."""
    root = Parser(prog="fastdiff", description="Train and sample diffusion models.", allow_abbrev=False)
    commands = root.add_subparsers(required=True, metavar="{train,sample,eval,bench}")

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(run=run)
        return command

    train_arguments(add("train", train, "Train a diffusion model on the digits or on a folder of images."))
    command = add("sample", sample, "Draw images: PREFIX.png, a grid, and PREFIX.npy, float32 (N, C, H, W).")
    sample_arguments(command, n=64)
    command.add_argument("--out", type=Path, required=True, metavar="PREFIX", help="start of the two names")
    command = add("eval", evaluation, "Compare samples of a model of the digits with real digits.")
    sample_arguments(command, n=None)
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE too")
    command = add("bench", bench, "Measure the kernels.")
    if with_bench:
        importlib.import_module("fastdiff.bench").add_arguments(command)
    return root


def device_argument(command: argparse.ArgumentParser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    command.add_argument("--device", default=default, help="cpu, cuda or cuda:N (here: %(default)s)")


def device_of(args: argparse.Namespace) -> torch.device:
    """The device named by --device. Raises ValueError where there is none of that name."""
    try:
        torch.empty(0, device=args.device)
        return torch.device(args.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"--device: {args.device!r} cannot be used: {reason}") from error


def limit_threads(device: torch.device, size: int) -> None:
    """One CPU thread for 8x8 images: a second gains a third, and threads that wait for each other lose it tenfold
    where another process holds a core."""
    if device.type == "cpu" and size <= 8:
        torch.set_num_threads(1)


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
    "bf16": "autocast to bfloat16 (default: where CUDA supports it)",
    "save_every": "steps between checkpoints",
}


def train_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data", help="digits, or a folder of images")
    command.add_argument("--out", type=Path, required=True, metavar="RUN_DIR", help="for model.safetensors")
    command.add_argument("--resume", action="store_true", help="go on exactly from RUN_DIR/model.safetensors")
    device_argument(command)
    for field in fields(training.Options):
        if field.name == "data":
            continue
        flag, text = "--" + field.name.replace("_", "-"), TRAIN_HELP[field.name]
        if isinstance(field.default, bool | None):
            command.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
            continue
        default = str(field.default) or ", ".join(f"{v} for {k}" for k, v in training.OBJECTIVES.items())
        if field.name in training.DIGITS:
            default += f", for the digits {training.DIGITS[field.name]}"
        text = f"{text} (default: {default})"
        command.add_argument(flag, type=type(field.default), metavar=field.name.upper(), help=text)


def train(args: argparse.Namespace) -> int:
    names = [field.name for field in fields(training.Options)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if "data" in given and given["data"] != "digits":
        given["data"] = str(Path(given["data"]).resolve())
    path, state = args.out / "model.safetensors", None
    device = device_of(args)
    if args.resume:
        state = checkpoint.load(path)
        options = training.resumed_options(state, given)
    elif "data" not in given:
        raise ValueError("--data: expected digits or a folder of images, got nothing")
    elif path.exists():
        raise ValueError(f"{path} exists: go on with --resume, or train into another --out")
    else:
        suited = training.digits_options(given.get("formulation", "ddpm")) if given["data"] == "digits" else {}
        options = training.Options(**{**suited, **given})
    limit_threads(device, options.size)
    start = time.perf_counter()
    done = training.train(options, args.out, device, state)
    if done < options.steps:
        again = f"go on with: fastdiff train --out {shlex.quote(str(args.out))} --device {args.device} --resume"
        print(f"fastdiff: interrupted at step {done} of {options.steps}; {again}", file=sys.stderr)
        return INTERRUPTED
    print(f"{path}: {done} steps, {time.perf_counter() - start:.1f} s")
    return 0


def sample_arguments(command: argparse.ArgumentParser, n: int | None) -> None:
    command.add_argument("checkpoint", type=Path, help="model.safetensors of a run")
    text = "%(default)s" if n else "as many as real ones to train on"
    command.add_argument("--n", type=positive, default=n, help=f"images to draw (default: {text})")
    names = ", ".join(f"{sampler} for {name}" for name, (sampler, _) in SUITED.items())
    command.add_argument("--sampler", choices=[*SAMPLERS, "ode"], help=f"(default: {names})")
    text = "of the sampler; for annealed_langevin at each level (default: that of the sampler, 50 for ddim)"
    command.add_argument("--steps", type=positive, help=text)
    command.add_argument("--eta", type=float, default=0.0, help="noise of ddim, 0 to 1 (default: 0)")
    command.add_argument("--seed", type=int, default=0, help="image i of a seed is always the same")
    command.add_argument("--batch-size", type=positive, default=256, help="images at a time (default: 256)")
    device_argument(command)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def draw(args: argparse.Namespace, model: Diffusion, n: int) -> Tensor:
    """Draw `n` images, float32 (n, C, H, W) on the CPU, in batches with one progress bar of network calls."""
    device = device_of(args)
    limit_threads(device, max(model.model.sample_shape[1:]))  # type: ignore[index]
    model = model.to(device)
    suited, few = SUITED[type(model).__name__]
    sampler, steps = args.sampler or suited, args.steps
    if steps is None and sampler in (suited, "ddim"):
        steps = few if sampler == suited else 50
        steps = min(steps, getattr(model, "timesteps", steps)) if sampler == "ddim" else steps
    batches = [torch.arange(n)[i : i + args.batch_size] for i in range(0, n, args.batch_size)]
    tqdm, bar = need("tqdm").tqdm, None

    def advance(*_: object) -> None:
        nonlocal bar  # made at the first step, so that it does not precede an error in the arguments
        bar = bar or tqdm(total=calls * len(batches), desc=f"{n} images", unit="step")
        bar.update()

    how: dict[str, Any] = {"steps": steps, "sampler": sampler, "eta": args.eta, "seed": args.seed}
    if sampler != "ode":
        calls = len(model.step_table(sampler, steps, args.eta))
        how["callback"] = advance
    drawn = [model.sample(len(ids), sample_ids=ids, **how).cpu() for ids in batches]
    if bar:
        bar.close()
    return torch.cat(drawn)


def sample(args: argparse.Namespace) -> int:
    grid, array = (writable(args.out.with_name(args.out.name + end)) for end in (".png", ".npy"))
    model = checkpoint.load_model(args.checkpoint)
    start = time.perf_counter()
    images = draw(args, model, args.n)
    seconds = time.perf_counter() - start
    data.save_grid(grid, images)
    with replacing(array) as temporary, open(temporary, "wb") as file:
        np.save(file, images.numpy())
    print(f"{grid}, {array}: {args.n} images, {seconds:.1f} s")
    return 0


def evaluation(args: argparse.Namespace) -> int:
    if args.json:
        writable(args.json)
    model = checkpoint.load_model(args.checkpoint)
    shape = model.model.sample_shape
    if shape != (1, 8, 8):
        raise ValueError(f"{args.checkpoint}: expected a model of the 8x8 digits, it draws {shape}")
    report = evaluate.evaluate(draw(args, model, args.n or len(data.digits()[0])))
    for name, value in asdict(report).items():
        print(f"{name:27}{value:.4f}" if isinstance(value, float) else f"{name:27}{value}")
    if args.json:
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    return 0


def bench(args: argparse.Namespace) -> int:
    return importlib.import_module("fastdiff.bench").main(args)
