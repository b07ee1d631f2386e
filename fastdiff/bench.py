"""`fastdiff bench`: the library against eager PyTorch, on this machine, in a table."""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import _backend, ops, roofline
from ._workloads import OPERATIONS, TENSORS, Rows, refuse_interpreter
from .checkpoint import replacing, writable
from .cli import device_argument, device_of

# Shortest round, so that the clock and the wait for the device do not count.
ROUND = 0.005
# A larger fraction of a copy's rate is none: the copy was held up.
DISTURBED = 1.1
SMALL, MEDIUM, LARGE, HUGE = (64, 3, 32, 32), (16, 3, 256, 256), (64, 3, 256, 256), (256, 3, 256, 256)

Case = tuple[torch.dtype, tuple[int, ...]]


def cases(device: torch.device, size: str) -> list[Case]:
    """The data types and shapes to measure, size "quick" or "full"; fewer on a CPU, where each takes longer."""
    single, half = torch.float32, torch.bfloat16
    if device.type == "cpu" and size == "quick":
        return [(single, SMALL), (single, MEDIUM), (half, SMALL)]
    shapes = [SMALL, MEDIUM, LARGE] if device.type == "cpu" else [SMALL, MEDIUM, HUGE]
    if device.type != "cpu" and size == "full":
        shapes.insert(2, LARGE)
    return [(dtype, shape) for dtype in (single, half) for shape in shapes]


def clock(device: torch.device) -> float:
    """Seconds, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def calibrate(function: Callable[[], object], device: torch.device) -> tuple[int, float]:
    """(calls to a round, seconds of a round), after a call that may compile."""
    function()
    start = clock(device)
    function()
    once = clock(device) - start
    calls = max(1, round(ROUND / once))
    return calls, calls * once


def medians(functions: Sequence[Callable[[], object]], device: torch.device, seconds: float) -> list[float]:
    """Median seconds of a call of each function, over at least three interleaved rounds and about `seconds` in all."""
    calls, lengths = zip(*(calibrate(function, device) for function in functions), strict=True)
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(max(3, min(50, round(seconds / sum(lengths))))):
        for function, n, taken in zip(functions, calls, times, strict=True):
            start = clock(device)
            for _ in range(n):
                function()
            taken.append((clock(device) - start) / n)
    return [statistics.median(taken) for taken in times]


def copier(traffic: int, device: torch.device) -> Callable[[], object]:
    """A copy into an existing buffer that reads and writes `traffic` bytes in all."""
    source = torch.ones(traffic // 8, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=["quick", "full"], default="quick", help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE too")
    device_argument(parser)
    parser.add_argument("--static", action="store_true", help="predict from machine code instead, for GPUs not here")
    parser.add_argument("--dump", type=Path, metavar="DIR", help="with --static: all compiled code to DIR")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="with --static: a PNG of the predictions")


def main(args: argparse.Namespace) -> int:
    """Print the table. Raises RuntimeError where a row disagrees with the float64 reference, ValueError for options."""
    refuse_interpreter()
    if args.static:
        return roofline.main(args)
    for name in ("dump", "plot"):
        if getattr(args, name):
            raise ValueError(f"--{name}: expected --static with it")
    device = device_of(args)
    if args.json:
        writable(args.json)
    machine = describe(device)
    print("\n".join(f"{name + ':':9}{value}" for name, value in machine.items()))
    print("GB/s:    of fused, by the bytes that must move at least; of copy: that over the rate of a plain copy\n")
    print(f"{'operation':23}{'dtype':10}{'shape':>15}{'fused ms':>11}{'eager ms':>11}{'ratio':>8}", end="")
    print(f"{'GB/s':>9}{'of copy':>9}")
    lines = []
    for operation, workload in OPERATIONS.items():
        for dtype, shape in cases(device, args.size):
            line = measure(operation, workload(shape, dtype, device), dtype, shape, device)
            lines.append(line)
            size = "x".join(map(str, shape))
            print(f"{operation:23}{line['dtype']:10}{size:>15}{line['fused_ms']:11.4f}{line['eager_ms']:11.4f}", end="")
            print(f"{line['ratio']:8.2f}{line['gb_per_s']:9.2f}{line['copy_fraction']:9.2f}", flush=True)
    if any(line["copy_fraction"] > DISTURBED for line in lines):
        print("\nNothing is faster than a plain copy: other work disturbed the times above; repeat on an idle machine.")
    if args.json:
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps({**machine, "rows": lines}, indent=2) + "\n", encoding="utf-8")
    return 0


def describe(device: torch.device) -> dict[str, str]:
    """The machine, and the implementation that "fused" stands for."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads"
    backend = _backend.forced() or ("triton" if cuda else "cpu" if ops._has_numba() else "reference")
    return {"device": f"{device} ({name})", "torch": torch.__version__, "backend": backend}


def measure(
    operation: str, rows: Rows, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> dict[str, Any]:
    """One line of the table, after both implementations were found to agree with the float64 reference."""
    fused, eager = rows["fused"], rows["reference"]
    fused.check()
    eager.check()
    traffic = TENSORS[operation] * dtype.itemsize * torch.Size(shape).numel()
    times = medians([fused.run, eager.run, copier(traffic, device)], device, seconds=1.0)
    return {
        "operation": operation,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
        "bytes": traffic,
        "fused_ms": times[0] * 1e3,
        "eager_ms": times[1] * 1e3,
        "copy_ms": times[2] * 1e3,
        "ratio": times[1] / times[0],
        "gb_per_s": traffic / times[0] / 1e9,
        "copy_fraction": times[2] / times[0],
    }
