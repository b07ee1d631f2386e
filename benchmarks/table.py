"""`fastdiff bench`: the library against eager PyTorch and other libraries, on this machine, in a table and a plot."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastdiff.cli import device_argument, device_of, limit_threads
from fastdiff.files import need, replacing, writable

from . import quality
from .peers import LIBRARIES, missing, peer_rows
from .static import roofline
from .timing import copier, describe, medians
from .workloads import OPERATIONS, TENSORS, Rows, refuse_interpreter

# A larger fraction of a copy's rate is none: the copy was held up.
DISTURBED = 1.1
SMALL, LARGE, HUGE = (64, 3, 64, 64), (64, 3, 256, 256), (256, 3, 256, 256)
# What rows are called in the table and the plot; a row that is not here is not shown.
TITLES = {
    "fused": "fastdiff",
    "fused_out": "fastdiff, own buffer",
    "reference": "eager PyTorch",
    "preallocated": "eager, own buffers",
    "diffusers": "diffusers",
    "denoising-diffusion-pytorch": "denoising-diffusion-pytorch",
}

Case = tuple[torch.dtype, tuple[int, ...]]


def cases(device: torch.device, size: str) -> list[Case]:
    """The data types and shapes to measure, size "quick" or "full"; fewer on a CPU, where each takes longer."""
    single, half = torch.float32, torch.bfloat16
    if device.type == "cpu" and size == "quick":
        return [(single, SMALL), (single, LARGE), (half, SMALL)]
    shapes = [SMALL, LARGE] if device.type == "cpu" else [SMALL, HUGE]
    if device.type != "cpu" and size == "full":
        shapes.insert(1, LARGE)
    return [(dtype, shape) for dtype in (single, half) for shape in shapes]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=["quick", "full"], default="quick", help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE too")
    device_argument(parser)
    parser.add_argument("--static", action="store_true", help="predict from machine code instead, for GPUs not here")
    parser.add_argument("--dump", type=Path, metavar="DIR", help="with --static: all compiled code to DIR")
    text = "instead: images per second against Frechet distance of a DDPM of the digits, sampler by sampler"
    parser.add_argument("--quality", type=Path, metavar="CHECKPOINT", help=text)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a PNG of the figures, or of the predictions")


def main(args: argparse.Namespace) -> int:
    """Print the table. Raises RuntimeError where a row disagrees with the float64 reference, ValueError for options."""
    refuse_interpreter()
    if args.static:
        return roofline.main(args)
    if args.dump:
        raise ValueError("--dump: expected --static with it")
    device = device_of(args)
    for path in (args.json, args.plot):
        if path:
            writable(path)
    if args.quality:
        limit_threads(device, 8)
        return quality.main(args, device)
    machine = describe(device)
    print("\n".join(f"{name + ':':9}{value}" for name, value in machine.items()))
    for name in LIBRARIES:
        if reason := missing(name):
            print(f"without: {reason}")
    names = [name for name in TITLES if name == "fused" or missing(name) is None]
    print("\nfastdiff's time, GB/s by the bytes that must move at least, and that over the rate of a plain copy; then")
    print("how many times as long the others take\n")
    print(f"{'operation':23}{'dtype':10}{'shape':>15}{'ms':>10}{'GB/s':>8}{'of copy':>9}", end="")
    print("".join(f"{TITLES[name]:>{len(TITLES[name]) + 2}}" for name in names[1:]))
    lines = []
    for operation, workload in OPERATIONS.items():
        for dtype, shape in cases(device, args.size):
            rows = workload(shape, dtype, device) | peer_rows(operation, shape, dtype, device)
            line = measure(operation, {name: rows[name] for name in names if name in rows}, dtype, shape, device)
            lines.append(line)
            size = "x".join(map(str, shape))
            print(f"{operation:23}{line['dtype']:10}{size:>15}{line['ms']['fused']:10.3f}", end="")
            print(f"{line['gb_per_s']:8.2f}{line['copy_fraction']:9.2f}", end="")
            for name in names[1:]:
                ratio = f"{line['ratio'][name]:.2f}" if name in line["ratio"] else "-"
                print(f"{ratio:>{len(TITLES[name]) + 2}}", end="")
            print(flush=True)
    if any(line["copy_fraction"] > DISTURBED for line in lines):
        print("\nNothing is faster than a plain copy: other work disturbed the times above; repeat on an idle machine.")
    if args.json:
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps({**machine, "rows": lines}, indent=2) + "\n", encoding="utf-8")
    if args.plot:
        plot(lines, machine["device"], args.plot)
    return 0


def measure(
    operation: str, rows: Rows, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> dict[str, Any]:
    """One line of the table, after every row was found to agree with the float64 reference."""
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


def plot(lines: Sequence[dict[str, Any]], machine: str, path: Path) -> None:
    """A PNG: for each line of the table a group of bars of nanoseconds per element, to the scale of the slowest."""
    image_module, draw_module, font_module = (need(f"PIL.{m}") for m in ("Image", "ImageDraw", "ImageFont"))
    font, high, left, length = font_module.load_default(14), 20, 230, 460
    height = high * (2 + sum(len(line["ratio"]) + 3 for line in lines))
    image = image_module.new("RGB", (left + length + 210, height), "white")
    draw = draw_module.Draw(image)
    draw.text((8, 4), f"Nanoseconds per element, {machine}", "black", font)
    top = 2 * high
    for line in lines:
        size = "x".join(map(str, line["shape"]))
        draw.text((8, top), f"{line['operation'].replace('_', ' ')}, {line['dtype']}, {size}", "black", font)
        taken = {name: line["ns_per_element"][name] for name in ("fused", *line["ratio"])}
        for name, nanoseconds in taken.items():
            top += high
            width = length * nanoseconds / max(taken.values())
            draw.text((24, top), TITLES[name], "black", font)
            colour = "#3465a4" if name.startswith("fused") else "#cc7722"
            draw.rectangle((left, top + 2, left + width, top + high - 4), colour)
            ratio = "" if name == "fused" else f", {line['ratio'][name]:.2g} times fastdiff"
            draw.text((left + width + 6, top), f"{nanoseconds:.2f}{ratio}", "black", font)
        top += 2 * high
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")
