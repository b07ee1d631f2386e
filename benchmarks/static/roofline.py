"""The static roofline: each kernel compiled for GPUs that need not be here, and what its instructions allow.

The predicted time of an element is the larger of two: its bytes over the memory bandwidth, and its instructions over
the rate at which the chip issues them. The fraction of the roofline is the first over the predicted time (Williams et
al. 2009, "Roofline"). Nothing is run, so latency, caches and launches do not count.
"""

import argparse
import itertools
import math
import multiprocessing
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fastdiff.files import writable, write_json

from .variants import NORMS, Variant, launch, variants

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Chip:
    """What limits a kernel on a GPU."""

    target: str
    bandwidth: float  # bytes per second
    processors: int
    clock: float  # Hz, under a tensor core load: the dense bfloat16 rate over the operations per clock
    source: str

    @property
    def issue_rate(self) -> float:
        """Instructions of single threads per second: four warps of 32 a clock and multiprocessor."""
        return 128 * self.processors * self.clock


CHIPS = {
    "A100": Chip("sm_80", 2.039e12, 108, 1.41e9, "NVIDIA A100 80GB SXM data sheet: 2,039 GB/s, 312 TFLOPS"),
    "H100": Chip("sm_90", 3.35e12, 132, 1.83e9, "NVIDIA H100 SXM data sheet: 3.35 TB/s, 989.4 TFLOPS"),
    "B200": Chip("sm_100", 8.0e12, 148, 1.85e9, "NVIDIA HGX B200 data sheet: 8 TB/s, 2.25 PFLOPS"),
}


def predicted(bytes_per_element: float, instructions_per_element: float) -> dict[str, float]:
    """The fraction of the memory roofline on each chip, in (0, 1]."""
    fractions = {}
    for name, chip in CHIPS.items():
        memory = bytes_per_element / chip.bandwidth
        fractions[name] = round(memory / max(memory, instructions_per_element / chip.issue_rate), 4)
    return fractions


# --- rows -------------------------------------------------------------------------------------------------------

CHUNK = 16  # cases that a process takes at a time
Case = tuple[Variant, str, bool]  # target; whether the polynomials stand in for NVIDIA's approximations


def cases(size: str) -> list[Case]:
    """The cases of a size.

    "full" has every variant on every target; "quick" has the common ones on sm_90, elsewhere the last of each kernel.
    Both have noising by the polynomials on sm_90, where it never runs, to compare it with the approximations.
    """
    if size == "full":
        chosen = [(v, target, False) for target in TARGETS for v in variants(common=False)]
    else:
        chosen = [(v, "sm_90", False) for v in variants(common=True)]
        typical = {v.kernel: v for v in variants(common=True) if v.noise != "given"}
        chosen += [(v, target, False) for target in TARGETS if target != "sm_90" for v in typical.values()]
    return chosen + [(Variant("noising", d, "generated", ""), "sm_90", True) for d in (torch.float32, torch.bfloat16)]


def compile_cases(cases: Sequence[Case], dump: Path | None) -> list[dict[str, Any]]:
    """The rows of some variants on one target."""
    from . import machine_code

    target = machine_code.target_of(cases[0][1])
    machine_code.plan_for(target)
    kernels, names, reading = [], [], []
    for v, target_name, polynomials in cases:
        with machine_code.compile_only(target, fast=target.backend == "cuda" and not polynomials) as compiled:
            launch(v)
        launched = [c for c in compiled if c[0].metadata.name == f"{v.kernel}_kernel"]
        if not launched and v.kernel in ("moments", "norm_sums"):
            continue  # a program of this target holds the whole group
        kernel, args = launched[0]
        kernels.append((kernel, machine_code.elements(args)))
        reading.append(reads(v, compiled) if v.kernel in NORMS else {})
        names.append(
            {
                "source": "fastdiff polynomials" if polynomials else "fastdiff",
                "kernel": v.kernel,
                "variant": v.options or "plain",
                "target": target_name,
                "dtype": str(v.dtype).removeprefix("torch."),
                "noise": v.noise,
            }
        )
    rows = rows_of(names, kernels, dump)
    return [row | more for row, more in zip(rows, reading, strict=True)]


def reads(v: Variant, compiled: Sequence[tuple[Any, dict[str, Any]]]) -> dict[str, Any]:
    """How often all launches of a norm load x, and whether its least slab fits a program, which then loads it once.

    The least slab is whole groups, wide enough for accesses of 128 bits.
    """
    from fastdiff.kernels.group_norm import LIMITS

    from . import machine_code

    backward, size = v.kernel in ("norm_sums", "norm_grad"), v.dtype.itemsize
    launched = {kernel.metadata.name: (kernel, args) for kernel, args in compiled if "PIXELS" in args}
    loaded = 0.0
    for kernel, args in launched.values():
        threads = kernel.metadata.num_warps * kernel.metadata.target.warp_size
        loaded += machine_code.tensor_bytes(kernel.asm["ttgir"], threads)["load"] / machine_code.elements(args)
    _, args = launched[f"{v.kernel}_kernel"]
    slab = math.lcm(args["DEPTH"], 16 // size if args["LAST"] else 1) * args["PIXELS"]
    fits = slab <= (LIMITS.backward if backward else LIMITS.forward) * LIMITS.warp * LIMITS.held
    return {"reads": loaded / (size * (2 if backward else 1)), "fits": "yes" if fits else "no"}


def rows_of(
    names: Sequence[dict[str, str]], kernels: Sequence[tuple[Any, int]], dump: Path | None
) -> list[dict[str, Any]]:
    """Each of `names` with the counts of its compiled kernel, one program of which owns so many elements."""
    from . import machine_code

    rows = []
    for name, (kernel, _), counts in zip(names, kernels, machine_code.measure(kernels), strict=True):
        assembly = counts.pop("assembly")
        if dump:
            stem = re.sub(r"\W+", "-", "-".join(name.values()))
            for ending, code in {**kernel.asm, "s": assembly}.items():
                data = code if isinstance(code, bytes) else str(code).encode()
                (dump / f"{stem}.{ending}").write_bytes(data)
        fractions = predicted(counts["bytes_per_element"], counts["instructions_per_element"])
        known = name["target"].startswith("sm_")
        rows.append({**name, **counts, "predicted_roofline": fractions if known else dict.fromkeys(fractions)})
    return rows


def inductor_rows(dump: Path | None) -> list[dict[str, Any]]:
    """The rows of torch.compile's kernels for the same operations.

    With a release of PyTorch where this does not work there are none, and a line on stderr says why.
    """
    from . import inductor

    names, kernels = [], []
    try:
        for dtype in (torch.float32, torch.bfloat16):
            for kernel, variant, noise, function, arguments in inductor.operations(dtype):
                compiled = inductor.kernels(function, *arguments)
                for i in range(len(compiled)):
                    name = {"source": "inductor", "kernel": kernel, "variant": variant, "target": inductor.TARGET}
                    name |= {"dtype": str(dtype).removeprefix("torch."), "noise": noise}
                    if len(compiled) > 1:
                        name["variant"] += f" ({i + 1} of {len(compiled)})"
                    names.append(name)
                kernels += compiled
        return rows_of(names, kernels, dump)
    except Exception as error:
        reason = str(error).split("\n")[0]
        print(f"fastdiff: torch {torch.__version__}: no rows of torch.compile: {reason}", file=sys.stderr)
        return []


def all_rows(size: str, dump: Path | None = None) -> list[dict[str, Any]]:
    """The rows of the table, compiled in as many processes as there are cores."""
    by_target = [list(group) for _, group in itertools.groupby(cases(size), key=lambda case: case[1])]
    chunks = [group[i : i + CHUNK] for group in by_target for i in range(0, len(group), CHUNK)]
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        inductor = pool.submit(inductor_rows, dump)
        rows = list(itertools.chain(*pool.map(compile_cases, chunks, [dump] * len(chunks))))
        return rows + inductor.result()


# --- output -----------------------------------------------------------------------------------------------------

COLUMNS = {  # key: heading, width, format
    "source": ("source", -21, "s"),
    "kernel": ("kernel", -11, "s"),
    "variant": ("variant", -26, "s"),
    "target": ("target", -7, "s"),
    "dtype": ("dtype", -9, "s"),
    "noise": ("noise", -10, "s"),
    "bytes_per_element": ("B/el", 5, ".4g"),
    "reads": ("reads", 6, ".3g"),
    "fits": ("fits", 5, "s"),
    "load_bits": ("load", 5, ""),
    "store_bits": ("store", 6, ""),
    "instructions_per_element": ("ins/el", 7, ".2f"),
    "mufu_per_element": ("mufu", 6, ".2f"),
    "integer_multiply_per_element": ("imul", 6, ".2f"),
    "registers": ("regs", 5, "d"),
    "stack": ("stack", 6, "d"),
    "spills": ("spills", 7, "d"),
    "shared": ("shared", 7, "d"),
    "barriers": ("bar", 4, "d"),
    "occupancy": ("occ", 5, ".0%"),
}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Fixed-width text; the last column is the predicted fraction of the memory roofline of the target's chip."""
    chip_of = {chip.target: name for name, chip in CHIPS.items()}
    lines = ["".join(f"{title:{'<' if w < 0 else '>'}{abs(w)}}" for title, w, _ in COLUMNS.values()) + "  predicted"]
    for r in rows:
        cells = []
        for key, (_, width, form) in COLUMNS.items():
            text = "-" if r.get(key) is None else f"{r[key]:{form}}"
            cells.append(f"{text:{'<' if width < 0 else '>'}{abs(width)}}")
        chip = chip_of.get(r["target"])
        lines.append("".join(cells) + (f"{r['predicted_roofline'][chip]:6.0%} {chip}" if chip else f"{'-':>6}"))
    return "\n".join(lines)


def bars(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, float]]:
    """(source, label, predicted fraction of the H100's memory roofline) of the common kernels on sm_90."""
    common = {(v.kernel, v.options or "plain") for v in variants(common=True)}
    chosen = [r for r in rows if r["source"] == "inductor" or (r["kernel"], r["variant"]) in common]
    return [
        (r["source"], f"{r['kernel']} {r['variant']}, {r['dtype']}, noise {r['noise']}", fractions["H100"])
        for r in chosen
        if (fractions := r["predicted_roofline"]) and r["target"] == "sm_90"
    ]


def main(args: argparse.Namespace) -> int:
    """Compile, print the table, and write what is asked for.

    Args:
        args: size ("quick" or "full"); json, dump and plot (a path or None).

    Raises: RuntimeError, after all that, if a kernel of the library in the full table spills registers.
    """
    for path in (args.json, args.plot):
        if path:
            writable(path)
    if args.dump:
        args.dump.mkdir(parents=True, exist_ok=True)
    rows = all_rows(args.size, args.dump)
    print(f"triton {version('triton')}; predicted from machine code, nothing was run; chips:")
    for name, chip in CHIPS.items():
        print(f"  {name}: {chip.processors} multiprocessors at {chip.clock / 1e9:.2f} GHz; {chip.source}")
    print("\n" + table(rows))
    if args.json:
        write_json(args.json, rows)
    if args.plot:
        from benchmarks import pictures

        pictures.save(pictures.roofline(bars(rows)), args.plot)
    spilling = sum(bool(r["stack"] or r["spills"]) for r in rows if r["source"] != "inductor")
    if spilling and args.size == "full":  # the tests read the rows of the quick one
        raise RuntimeError(f"{spilling} kernels spill registers: see the columns stack and spills")
    return 0
