"""Every operation, compiled for a GPU that is not here and executed by an emulator: against float64, and for faults.

    python -m benchmarks.emulator [--target sm_90] [NAME ...]

The rows are those of the smoke stage of benchmarks/gpu, and the launches that compute-sanitizer watches there. A fault
is an access outside the tensors of a launch, a misaligned one, or a race. So is a read of shared memory that nobody
wrote, and an instruction that the emulator does not know. Ties, where threads of a warp write different values to one
place of shared memory, are counted: any of them may stay. See machine.py, memory.py and arithmetic.py for what is
modelled and what is not. The tests of operations run so too: `FASTDIFF_EMULATOR=sm_90 pytest tests/ops -k triton`.
"""

import argparse
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

import fastdiff
from benchmarks import kernel_workloads, workloads
from benchmarks.gpu import launches, norms, smoke
from benchmarks.gpu.rows import Setup

from .driver import Emulator

TARGETS = ("sm_80", "sm_90", "sm_100")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")
T = TypeVar("T")


class First(Setup):
    """The first of the full sizes, which is the smallest and an odd one."""

    def size(self, full: T, toy: T) -> T:
        return full[:1]  # type: ignore[index]


def rows() -> dict[str, Callable[[], Any]]:
    """What is run, by its name and kind."""
    found: dict[str, Callable[[], Any]] = {}
    for row in smoke.rows(First(CPU, toy=True)):
        if row.method == "against float64":
            found[row.name] = row.run
    for name, dtype in itertools.product(launches.OPERATIONS, DTYPES):
        kind = f"{name} / {str(dtype).removeprefix('torch.')}"
        found[kind] = functools.partial(launch, name, dtype)
    return found


def launch(name: str, dtype: torch.dtype) -> None:
    for shape in launches.shapes_of(name):
        launches.launch(name, CPU, shape, [dtype])


def watched_agreement() -> list[float]:
    """A list that gets each distance from float64, in parts of what is allowed."""
    seen: list[float] = []
    agree = workloads.agree

    def watched(name: str, got: Sequence[Tensor], want: Sequence[Tensor], bound: float) -> None:
        for g, w in zip(got, want, strict=True):
            seen.append(((g.detach().double() - w).norm() / w.norm()).item() / bound)
        agree(name, got, want, bound)

    for module in (workloads, kernel_workloads, norms):
        module.agree = watched  # type: ignore[attr-defined]
    return seen


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if a row failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--target", choices=TARGETS, default="sm_90", help="(default: %(default)s)")
    parser.add_argument("names", nargs="*", metavar="NAME", help="rows whose names have one of these in them")
    args = parser.parse_args(argv)
    workloads.refuse_interpreter()
    torch.set_num_threads(1)
    chosen = {k: f for k, f in rows().items() if not args.names or any(name in k for name in args.names)}
    if not chosen:
        parser.error(f"NAME: expected a part of one of {', '.join(rows())}")
    distances, failed = watched_agreement(), 0
    print(f"{args.target:48s}{'launches':>9s}{'instructions':>13s}{'error / allowed':>16s}{'ties':>6s}{'seconds':>8s}")
    emulator = Emulator(args.target)
    with fastdiff.backend("triton"):
        for name, run in chosen.items():
            for kept in (distances, emulator.launches, emulator.instructions):
                kept.clear()
            torch.manual_seed(0)
            start, fault, emulator.ties = time.process_time(), "", 0
            try:
                run()
            except RuntimeError as error:
                fault, failed = f"  {error}", 1
            launched, executed = emulator.launches.total(), emulator.instructions.total()
            largest = f"{max(distances):.2f}" if distances and not math.isnan(max(distances)) else "-"
            seconds = time.process_time() - start
            print(
                f"{name:48s}{launched:9d}{executed:13,d}{largest:>16s}{emulator.ties:6d}{seconds:8.1f}{fault}",
                flush=True,
            )
    return failed


if __name__ == "__main__":
    sys.exit(main())
