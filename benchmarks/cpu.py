"""`python -m benchmarks.cpu`: the table of docs/performance.md for a CPU, in about a minute.

    python -m benchmarks.cpu [--out FOLDER]; then python docs/performance.py

One thread, and the processor's time, which other programs disturb less than that of a clock. The ways of a row take
turns. Each agrees with the float64 reference before it is timed.
"""

import argparse
import platform
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from fastdiff.files import writable, write_json

from .gpu.results import ROOT, machine
from .kernel_workloads import KERNELS
from .peers import diffusers_sampling, diffusers_training_step, missing, peer_rows
from .timing import medians
from .workloads import OPERATIONS, SMALL, Rows, refuse_interpreter, sampling, training_step

CPU = torch.device("cpu")
WAYS = ("fused", "reference", "diffusers")
SINGLE = "x".join(map(str, SMALL))
BATCH, STEPS = 64, 20  # of the digits that are drawn
TRAINED = 16  # images of a training step


def cases() -> dict[str, Rows]:
    """The rows of the table by "what / size"; of each the ways that there are here."""
    found: dict[str, Rows] = {}
    for name in ("forward_noising", "loss_forward_backward", "noising_and_loss", "reverse_update"):
        rows = OPERATIONS[name](SMALL, torch.float32, CPU) | peer_rows(name, SMALL, torch.float32, CPU)
        found[f"{name} / {SINGLE}"] = rows
    found[f"group_norm_silu / {SINGLE}"] = KERNELS["group_norm_silu"](SMALL, torch.float32, CPU)
    step, drawn = training_step(TRAINED, torch.float32, CPU), sampling(BATCH, "ddpm", STEPS, CPU, "digits")
    if missing("diffusers") is None:
        step["diffusers"] = diffusers_training_step(TRAINED, CPU)
        drawn["diffusers"] = diffusers_sampling(BATCH, STEPS, CPU, "digits", False)
    found[f"training_step / {TRAINED}x3x16x16"] = step
    found[f"sampling, {STEPS} steps / {BATCH}x1x8x8"] = drawn
    return {case: {way: rows[way] for way in WAYS if way in rows} for case, rows in found.items()}


def measure(rows: Rows, seconds: float) -> dict[str, float]:
    """Milliseconds of the processor by way, after each was checked."""
    for row in rows.values():
        row.check()
    taken = medians([row.run for row in rows.values()], CPU, seconds, lambda _: time.process_time())
    return {way: 1e3 * t for way, t in zip(rows, taken, strict=True)}


def processor() -> str:
    """The processor's name, such as AMD EPYC 7763."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8")) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def main(argv: list[str] | None = None) -> int:
    """Measure, print the rows, and write FOLDER/PROCESSOR.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "cpu", metavar="FOLDER")
    parser.add_argument("--seconds", type=float, default=12.0, help="of each row (default: %(default)s)")
    args = parser.parse_args(argv)
    refuse_interpreter()
    torch.set_num_threads(1)
    name = processor()
    path = args.out / (re.sub(r"\W+", "-", name.lower()).strip("-") + ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    writable(path)
    content: dict[str, Any] = {"processor": name, "machine": machine(CPU), "rows": {}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # chains of a few steps leave signal; their time counts, not their images
        for case, rows in cases().items():
            content["rows"][case] = measure(rows, args.seconds)
            print(f"{case:40}", *(f"{way} {t:.4g} ms" for way, t in content["rows"][case].items()), flush=True)
    write_json(path, content)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
