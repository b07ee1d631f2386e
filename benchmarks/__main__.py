"""`python -m benchmarks`: fastdiff beside eager PyTorch and other libraries here, or the samplers' quality."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import quality, table
from benchmarks.workloads import refuse_interpreter
from fastdiff.cli import device_of, limit_threads
from fastdiff.files import writable
from fastdiff.training.arguments import device_argument


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, allow_abbrev=False)
    root.add_argument("--size", choices=["quick", "full"], default="quick", help="(default: %(default)s)")
    root.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE too")
    device_argument(root)
    root.add_argument("--plot", type=Path, metavar="FILE", help="draw the figures as a PNG")
    text = "instead: Frechet distance and cost of models of the digits, sampler by sampler"
    root.add_argument("--quality", type=Path, nargs="+", metavar="CHECKPOINT", help=text)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run `argv` (default: sys.argv[1:]). Returns 0, or 1 after one line on stderr; bad usage exits with 2."""
    args = parser().parse_args(argv)
    try:
        refuse_interpreter()
        device = device_of(args)
        for path in filter(None, (args.json, args.plot)):
            writable(path)
        if args.plot:
            importlib.import_module("benchmarks.pictures")  # without matplotlib, say so before measuring
        if args.quality:
            limit_threads(device, 8)
            return quality.main(args, device)
        return table.main(args, device)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        print(f"benchmarks: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
