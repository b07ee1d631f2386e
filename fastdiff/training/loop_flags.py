"""Flags of the command line for the optimizer, for many processes, and for averages of the weights."""

import argparse
from pathlib import Path

from fastdiff.files import writable
from fastdiff.training import ema

LOOP_HELP = {
    "keep": "checkpoints that remain; those but the last are in RUN_DIR/checkpoints",
    "accumulate": "passes into which a step's images are split, for less memory",
    "fsdp": "split weights and optimizer over the processes, for networks that do not fit on one GPU",
    "max_bad_steps": "stop after so many steps in a row whose loss or gradient is not finite; each is left out",
    "lr_schedule": "constant, cosine (down to 0 at the last step) or inverse_sqrt",
    "lr_hold": "steps before the learning rate falls",
    "weight_decay": "of AdamW",
    "beta1": "of AdamW",
    "beta2": "of AdamW",
    "ema_decays": "decays of further averages, with commas between them",
    "ema_sigma_rel": "relative widths of power-function averages, as in 0.05,0.1",
    "compile": "compile the network",
    "channels_last": "lay out convolutions channels last",
    "recompute": "compute the blocks again in the backward pass, for less memory",
}


def ema_arguments(command: argparse.ArgumentParser) -> None:
    """Arguments of `fastdiff ema`."""
    command.add_argument("folder", type=Path, metavar="RUN_DIR", help="the run's folder")
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--decay", type=float, help="one of the run's --ema-decays")
    which.add_argument("--sigma-rel", type=float, help="any width below 0.288, of a run with --ema-sigma-rel")
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="for the weights, .safetensors")


def write_average(args: argparse.Namespace) -> int:
    """`fastdiff ema`. Returns: the exit status."""
    name = f"{ema.DECAY}={args.decay}" if args.sigma_rel is None else f"{ema.WIDTH}={args.sigma_rel}"
    ema.extract(args.folder, name, writable(args.out))
    print(f"{args.out}: the average {name}")
    return 0
