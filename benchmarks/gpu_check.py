"""Everything that only a GPU can show, in one report: `make gpu-check`, or `python benchmarks/gpu_check.py`.

Runs the test suite's kernel tests on the compiled kernels, compute-sanitizer over one launch of each kernel where it is
installed, times every operation and whole sampling (also as a CUDA graph) against eager PyTorch, torch.compile and a
plain copy, and writes benchmarks/results/<device>.json and .md. `--device cpu` rehearses it without a GPU.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastdiff import DDPM
from fastdiff._workloads import OPERATIONS, TENSORS, network, refuse_interpreter
from fastdiff.bench import cases, copier, describe, medians
from fastdiff.checkpoint import replacing

ROOT = Path(__file__).resolve().parent.parent
LAUNCHES = """
import torch
from fastdiff import ops
device = torch.device("{device}")
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
"""


def tests() -> dict[str, Any]:
    """Outcome counts of the tests of the kernels, which run on the GPU where there is one."""
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in ("noise", "kernels", "bound", "ops", "guards")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1]
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)}
    failures = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return {"exit": done.returncode, **counts, "failures": failures, "seconds": round(time.perf_counter() - start)}


def sanitizer(device: torch.device) -> dict[str, Any]:
    """What compute-sanitizer's memcheck and racecheck say of one launch of each kernel."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or device.type != "cuda":
        return {"ran": False, "reason": "no CUDA device" if tool else "compute-sanitizer is not installed"}
    found: dict[str, Any] = {"ran": True}
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, sys.executable, "-c", LAUNCHES.format(device=device)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", done.stdout + done.stderr)
        found[check] = summary[-1] if summary else f"no summary, exit {done.returncode}"
    return found


def operations(device: torch.device, size: str) -> list[dict[str, Any]]:
    """Median milliseconds of each operation by the library, eager PyTorch, torch.compile and a copy of its traffic."""
    lines = []
    for operation, workload in OPERATIONS.items():
        for dtype, shape in cases(device, size):
            rows = workload(shape, dtype, device)
            for row in rows.values():
                row.check()
            traffic = TENSORS[operation] * dtype.itemsize * torch.Size(shape).numel()
            runs = [row.run for row in rows.values()]
            times = medians([*runs, copier(traffic, device)], device, seconds=1.0)
            milliseconds = dict(zip((*rows, "copy"), (1e3 * t for t in times), strict=True))
            lines.append({"operation": operation, "dtype": str(dtype), "shape": list(shape), **milliseconds})
    return lines


def sampling(device: torch.device, steps: int) -> dict[str, float]:
    """Milliseconds to draw 16 images in `steps` steps: as it is, and compiled (on a GPU, as a CUDA graph)."""
    ddpm = DDPM(network(device)).to(device)
    shape = (16, *(ddpm.model.sample_shape or ()))
    plain = ddpm.sample(shape, steps=steps, seed=1)
    eager = medians([lambda: ddpm.sample(shape, steps=steps, seed=1)], device, seconds=2.0)[0]
    ddpm.compile()
    graphed = ddpm.sample(shape, steps=steps, seed=1)
    if (graphed - plain).abs().max().item() > 2e-2:
        raise RuntimeError(f"compiled sampling is {(graphed - plain).abs().max().item():.1e} off")
    compiled = medians([lambda: ddpm.sample(shape, steps=steps, seed=1)], device, seconds=2.0)[0]
    return {"steps": steps, "eager_ms": 1e3 * eager, "compiled_ms": 1e3 * compiled}


def markdown(report: dict[str, Any]) -> str:
    lines = [f"# {report['machine']['device']}", ""]
    lines += [f"- {name}: {value}" for name, value in report["machine"].items()]
    lines += [f"- tests: {report['tests']}", f"- compute-sanitizer: {report['sanitizer']}"]
    lines += [f"- sampling 16 images: {report['sampling']}", ""]
    lines += ["| operation | dtype | shape | fused ms | eager ms | compile ms | eager / fused | of copy bandwidth |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for line in report["operations"]:
        fused, eager, compiled, copy = (line[key] for key in ("fused", "reference", "compile", "copy"))
        size = "x".join(map(str, line["shape"]))
        lines.append(
            f"| {line['operation']} | {line['dtype'].removeprefix('torch.')} | {size} | {fused:.4f} | {eager:.4f} "
            f"| {compiled:.4f} | {eager / fused:.2f} | {copy / fused:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=["quick", "full"], default="full")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    refuse_interpreter()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device was found; --device cpu rehearses the report")
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    report = {
        "machine": {**describe(device), "triton": triton, "python": sys.version.split()[0]},
        "tests": tests(),
        "sanitizer": sanitizer(device),
        "operations": operations(device, args.size),
        "sampling": sampling(device, 50 if device.type == "cuda" else 5),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    stem = args.out / re.sub(r"\W+", "-", name.lower())
    for suffix, text in ((".json", json.dumps(report, indent=2) + "\n"), (".md", markdown(report))):
        with replacing(stem.with_suffix(suffix)) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(markdown(report))
    print(f"written: {stem}.json, {stem}.md")
    return report["tests"]["exit"]


if __name__ == "__main__":
    raise SystemExit(main())
