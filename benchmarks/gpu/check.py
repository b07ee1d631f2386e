"""Everything that only a GPU can show, in one report: `make gpu-check`, or `python benchmarks/gpu_check.py`.

Runs the test suite's kernel tests on the compiled kernels, compute-sanitizer over launches of each kernel where it is
installed, times every operation and whole sampling (also as a CUDA graph) against eager PyTorch, torch.compile and a
plain copy, and writes benchmarks/results/<device>.json and .md. A part that fails is named there and stops no other.
`--device cpu` rehearses it without a GPU.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernel_workloads import KERNEL_TENSORS, KERNELS
from benchmarks.table import cases
from benchmarks.timing import clock, copier, describe, medians
from benchmarks.workloads import OPERATIONS, TENSORS, network, refuse_interpreter
from fastdiff import DDPM
from fastdiff.files import replacing

ROOT = Path(__file__).resolve().parents[2]
TESTS = ("noise", "kernels", "bound", "ops", "group_norm", "guards", "graphs")
LAUNCHES = """
import sys, torch
from fastdiff import ops
device = torch.device(sys.argv[1])
for dtype in (torch.float32, torch.bfloat16):
    for shape in ((3, 5, 7, 11), (2, 3, 64, 64)):
        x = torch.randn(shape, device=device).to(dtype).requires_grad_()
        t = torch.zeros(shape[0], dtype=torch.int64, device=device)
        ops.normal(shape, 1, dtype=dtype, device=device)
        ops.noising(x, t, torch.ones(1, 2, device=device))
        (3 * ops.loss(x, t, torch.ones(1, 3, device=device), seed=1)).backward()
        for decoder in (0.0, 1.0):
            rows = torch.tensor([[1.0, 1.0, 1.0, 0.0, 1.0, decoder]], device=device)
            (3 * ops.vlb(x, x.detach(), x.detach(), t, rows, raw_variance=x, clip=1.0).sum()).backward()
        ops.update(x.detach(), x.detach(), torch.ones(1, 9, device=device), t, clip=1.0, inplace=True)
    for shape in ((2, 4, 5, 7), (1, 4, 33, 67)):  # a group in one part, and in several
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape, device=device).to(dtype, memory_format=layout).requires_grad_()
            one, rows = torch.ones(4, device=device), torch.ones(2, *shape[:2], device=device)
            for scale, shift in ((None, None), rows):
                ops.group_norm_silu(x, 1, one, one, 1e-5, scale, shift).sum().backward()
"""


def tests() -> dict[str, Any]:
    """Outcome counts of the tests of the kernels, which run on the GPU where there is one."""
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in TESTS]
    # Most of the time is compilation, one processor for each worker.
    workers = ["-n", "auto"] if find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers, *files]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1]
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)}
    failures = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return {"exit": done.returncode, **counts, "failures": failures, "seconds": round(time.perf_counter() - start)}


def sanitizer(device: torch.device) -> dict[str, Any]:
    """What compute-sanitizer's memcheck and racecheck say of launches of each kernel."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or device.type != "cuda":
        return {"exit": 0, "ran": False, "reason": "no CUDA device" if tool else "compute-sanitizer is not installed"}
    found: dict[str, Any] = {"exit": 0, "ran": True}
    # Each tensor its own allocation: within a block of PyTorch's cache an access beside a tensor is none beside memory.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-c", LAUNCHES, str(device)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", done.stdout + done.stderr)
        found[check] = summary[-1] if summary else f"no summary: {done.stderr.strip()[-200:]}"
        found["exit"] = found["exit"] or done.returncode
    return found


def milliseconds(functions: Sequence[Callable[[], object]], device: torch.device, seconds: float) -> list[float]:
    """Median milliseconds of each: on a GPU of its work alone, many calls captured in one CUDA graph."""
    if device.type != "cuda":
        return [1e3 * t for t in medians(functions, device, seconds)]
    from triton.testing import do_bench_cudagraph

    each = round(1e3 * seconds / len(functions) / 10)  # it replays the graph ten times
    return [do_bench_cudagraph(function, rep=each, return_mode="median") for function in functions]


def host_microseconds(function: Callable[[], object], device: torch.device, calls: int = 20) -> float:
    """Median time that a call holds up the program; the GPU works on meanwhile."""
    taken = []
    for _ in range(15):
        start = clock(device)
        for _ in range(calls):
            function()
        taken.append(1e6 * (time.perf_counter() - start) / calls)
    return statistics.median(taken)


def operation(name: str, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """Median milliseconds by the library, eager PyTorch, torch.compile and a copy of its traffic."""
    rows = (OPERATIONS | KERNELS)[name](shape, dtype, device)
    for row in rows.values():
        row.check()
    traffic = (TENSORS | KERNEL_TENSORS)[name] * dtype.itemsize * torch.Size(shape).numel()
    runs = [row.run for row in rows.values()]
    line = dict(zip((*rows, "copy"), milliseconds([*runs, copier(traffic, device)], device, seconds=1.0), strict=True))
    if device.type != "cuda":
        return line
    return line | {"host": {name: host_microseconds(row.run, device) for name, row in rows.items()}}


def operations(device: torch.device, size: str) -> list[dict[str, Any]]:
    lines = []
    for name in OPERATIONS | KERNELS:
        for dtype, shape in cases(device, size):
            line = {"operation": name, "dtype": str(dtype).removeprefix("torch."), "shape": list(shape)}
            try:
                lines.append(line | operation(name, dtype, shape, device))
            except Exception as error:
                traceback.print_exc()
                lines.append(line | {"error": f"{type(error).__name__}: {error}"})
    return lines


def sampling(device: torch.device, steps: int) -> dict[str, float]:
    """Milliseconds to draw 16 images in `steps` steps: as it is, and compiled (on a GPU, as a CUDA graph)."""
    ddpm = DDPM(network(device)).to(device)
    shape = (16, *(ddpm.model.sample_shape or ()))

    def draw() -> torch.Tensor:
        return ddpm.sample(shape, steps=steps, seed=1)

    plain = draw()
    eager = 1e3 * medians([draw], device, 2.0)[0]
    ddpm.compile()
    off = (draw() - plain).abs().max().item()
    if not off <= 2e-2:
        raise RuntimeError(f"compiled sampling is {off:.1e} off")
    return {"steps": steps, "eager": eager, "compiled": 1e3 * medians([draw], device, 2.0)[0]}


def markdown(report: dict[str, Any]) -> str:
    lines = [f"# {report['machine']['device']}", ""]
    lines += [f"- {name}: {value}" for name, value in report["machine"].items()]
    lines += [f"- {part} FAILED: {error}" for part, error in report["errors"].items()]
    lines += [f"- tests: {report.get('tests')}", f"- compute-sanitizer: {report.get('sanitizer')}"]
    lines += [f"- milliseconds to sample 16 images: {report.get('sampling')}", ""]
    titles = ["operation", "dtype", "shape", "fused ms", "eager ms", "compile ms", "eager / fused", "of copy bandwidth"]
    titles += ["host us: fused", "eager", "compile"]
    lines += ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for line in report.get("operations") or []:
        size = "x".join(map(str, line["shape"]))
        if "error" in line:
            lines.append(f"| {line['operation']} | {line['dtype']} | {size} | FAILED: {line['error']} |")
            continue
        host = line.get("host", {})
        fused, eager, compiled, copy = (line[key] for key in ("fused", "reference", "compile", "copy"))
        held = " | ".join(f"{host[name]:.0f}" if host else "-" for name in ("fused", "reference", "compile"))
        lines.append(
            f"| {line['operation']} | {line['dtype']} | {size} | {fused:.4f} | {eager:.4f} "
            f"| {compiled:.4f} | {eager / fused:.2f} | {copy / fused:.2f} | {held} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report; 1 where a test, the sanitizer or a part failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=["quick", "full"], default="full")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(arguments)
    refuse_interpreter()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device was found; --device cpu rehearses the report")
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    report: dict[str, Any] = {
        "machine": {
            **describe(device), "cuda": str(torch.version.cuda), "triton": triton, "python": sys.version.split()[0]
        },
        "errors": {},
    }  # fmt: skip
    parts: dict[str, Callable[[], Any]] = {
        "tests": tests,
        "sanitizer": lambda: sanitizer(device),
        "operations": lambda: operations(device, args.size),
        "sampling": lambda: sampling(device, 50 if device.type == "cuda" else 5),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    title = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    stem = args.out / re.sub(r"\W+", "-", title.lower())
    for name, part in parts.items():
        try:
            report[name] = part()
        except Exception as error:
            traceback.print_exc()
            report[name], report["errors"][name] = None, f"{type(error).__name__}: {error}"
        # After each part: a later one that is interrupted takes nothing with it.
        for suffix, text in ((".json", json.dumps(report, indent=2) + "\n"), (".md", markdown(report))):
            with replacing(stem.with_suffix(suffix)) as temporary:
                temporary.write_text(text, encoding="utf-8")
    print(markdown(report))
    print(f"written: {stem}.json, {stem}.md")
    ran = [report[name]["exit"] for name in ("tests", "sanitizer") if report[name]]
    wrong = [line for line in report["operations"] or [] if "error" in line]
    return int(bool(report["errors"] or wrong) or any(ran))


if __name__ == "__main__":
    raise SystemExit(main())
