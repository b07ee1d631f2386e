"""The table of `python -m benchmarks`: each operation by fastdiff, by eager PyTorch and by other libraries."""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fastdiff.files import write_json

from .peers import LIBRARIES, missing, peer_rows
from .timing import copier, describe, medians
from .workloads import OPERATIONS, TENSORS, Rows, cases, refuse_interpreter

# Nothing is faster than a copy: above this fraction of its rate, other work has slowed the copy down.
DISTURBED = 1.1
# What rows are called in the table and the picture. A row that is not here is not shown.
TITLES = {
    "fused": "fastdiff",
    "fused_out": "fastdiff, own buffer",
    "reference": "eager PyTorch",
    "preallocated": "eager, own buffers",
    "diffusers": "diffusers",
    "denoising-diffusion-pytorch": "denoising-diffusion-pytorch",
}
EXPLANATION = """
GB/s and the fraction of a plain copy's rate are fastdiff's, by the bytes that have to move at least.
Then how many times as long as fastdiff the others take: above 1 fastdiff is faster.
"""


def main(args: argparse.Namespace, device: torch.device) -> int:
    """Measure, print a line for each operation, data type and shape, and write the files that are asked for.

    Args:
        args: size ("quick" or "full"), json and plot (a path or None).

    Raises: RuntimeError if a row disagrees with the float64 reference.
    """
    refuse_interpreter()
    machine = describe(device)
    print("\n".join(f"{name + ':':9}{value}" for name, value in machine.items()))
    for name in LIBRARIES:
        if reason := missing(name):
            print(f"without: {reason}")
    print(EXPLANATION)
    names = [name for name in TITLES if missing(name) is None]
    print(header(names))
    lines = []
    for line in measured(names, args.size, device):
        print(text(line, names), flush=True)
        lines.append(line)
    if any(line["copy_fraction"] > DISTURBED for line in lines):
        print("\nNothing is faster than a plain copy: other work disturbed the times above. Repeat on an idle machine.")
    if args.json:
        write_json(args.json, {**machine, "rows": lines})
    if args.plot:
        from . import pictures

        pictures.save(pictures.operations(lines, machine["device"], TITLES), args.plot)
    return 0


def measured(names: Sequence[str], size: str, device: torch.device) -> Iterator[dict[str, Any]]:
    """The lines of the table, each once it is measured; `names` are the rows to measure."""
    for operation, workload in OPERATIONS.items():
        for dtype, shape in cases(device, size):
            rows = workload(shape, dtype, device) | peer_rows(operation, shape, dtype, device)
            chosen = {name: rows[name] for name in names if name in rows}
            yield measure(operation, chosen, dtype, shape, device)


def measure(
    operation: str, rows: Rows, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> dict[str, Any]:
    """One line of the table, after each row was found to agree with the float64 reference."""
    for row in rows.values():
        row.check()
    elements = torch.Size(shape).numel()
    traffic = TENSORS[operation] * dtype.itemsize * elements
    times = medians([*(row.run for row in rows.values()), copier(traffic, device)], device, seconds=1.0)
    seconds = dict(zip((*rows, "copy"), times, strict=True))
    return {
        "operation": operation,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
        "bytes": traffic,
        "ms": {name: 1e3 * taken for name, taken in seconds.items()},
        "ns_per_element": {name: 1e9 * taken / elements for name, taken in seconds.items()},
        "ratio": {name: seconds[name] / seconds["fused"] for name in rows if name != "fused"},
        "gb_per_s": traffic / seconds["fused"] / 1e9,
        "copy_fraction": seconds["copy"] / seconds["fused"],
    }


def header(names: Sequence[str]) -> str:
    titles = "".join(f"{TITLES[name]:>{len(TITLES[name]) + 2}}" for name in names[1:])
    return f"{'operation':23}{'dtype':10}{'shape':>15}{'ms':>10}{'GB/s':>8}{'of copy':>9}" + titles


def text(line: dict[str, Any], names: Sequence[str]) -> str:
    """A line as `measure` returns it, under `header`. A library without the operation has a dash."""
    size = "x".join(map(str, line["shape"]))
    own = f"{line['ms']['fused']:10.3f}{line['gb_per_s']:8.2f}{line['copy_fraction']:9.2f}"
    ratios = (f"{line['ratio'][name]:.2f}" if name in line["ratio"] else "-" for name in names[1:])
    others = "".join(f"{ratio:>{len(TITLES[name]) + 2}}" for name, ratio in zip(names[1:], ratios, strict=True))
    return f"{line['operation']:23}{line['dtype']:10}{size:>15}{own}{others}"
