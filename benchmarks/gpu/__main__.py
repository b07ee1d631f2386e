"""The command of the kit.

`python -m benchmarks.gpu --budget SECONDS --stage NAME...` measures.
`python -m benchmarks.gpu report` writes the pages.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.workloads import refuse_interpreter

from . import packages, report
from .results import ROOT, Results, file_name, machine, this_run
from .rows import STAGES, Setup
from .runner import run


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, then write the report. Returns 1 if a row of this run failed."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__, formatter_class=raw)
    parser.add_argument("command", nargs="?", choices=["measure", "report"], default="measure")
    parser.add_argument("--budget", type=float, default=540, help="seconds in all (default: %(default)s)")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stage", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--device", default="cuda", help='"cpu" rehearses every row at toy size (default: %(default)s)')
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    args = parser.parse_args(arguments)
    if args.command == "report":
        report.write_all(args.out, ROOT / "README.md")
        return 0
    refuse_interpreter()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: no CUDA device was found; --device cpu rehearses the kit")
    chosen = [stage for stage in STAGES if stage.name in args.stage]
    if missing := packages.lacking():
        print(f"lacking: {missing}", flush=True)
    with packages.on_path(), packages.with_home():
        results = Results(args.out / file_name(device), this_run(), machine(device))
        setup = Setup(device, toy=device.type == "cpu")
        outcomes = run(chosen, setup, args.budget, results, lambda line: print(line, flush=True))
    if outcomes:
        report.write_page(results.path)
    # Last, as whoever runs this from afar may see the end of the output alone.
    print(*report.summary(results.content, results.run), f"results: {results.path}", sep="\n")
    return int(any("error" in outcome for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
