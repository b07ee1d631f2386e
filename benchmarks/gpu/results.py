"""The results of a device: one JSON file, which is whole at every moment.

    {"runs": {RUN: {device, torch, triton, ..., commit}}, "rows": {"stage / case / method": OUTCOME + {"run": RUN}}}

RUN stands for the code and the versions that a row was measured with. OUTCOME is one of {"figures": {...}},
{"not_available": why}, {"error": what} and {"not_run": why}.
"""

import hashlib
import json
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import describe
from fastdiff.files import write_json

from .packages import lacking

ROOT = Path(__file__).resolve().parents[2]
MEASURED_CODE = ("fastdiff", "kernels", "benchmarks")


class Results:
    """The rows of a file, for a run that adds to them."""

    def __init__(self, path: Path, run: str, machine: dict[str, Any]) -> None:
        self.path, self.run, self.machine = path, run, machine
        self.content: dict[str, Any] = read(path) if path.exists() else {"runs": {}, "rows": {}}

    def has(self, key: str) -> bool:
        """Whether a row was tried with this code and these versions."""
        row = self.content["rows"].get(key)
        return row is not None and row["run"] == self.run and "not_run" not in row

    def put(self, key: str, outcome: dict[str, Any]) -> None:
        """Record a row and write the file. An older row is not lost to one that was not run."""
        rows = self.content["rows"]
        if "not_run" in outcome and "not_run" not in rows.get(key, outcome):
            return
        rows[key] = {"run": self.run, **outcome}
        used = {row["run"] for row in rows.values()}
        runs = {**self.content["runs"], self.run: self.machine}
        self.content["runs"] = {name: machine for name, machine in runs.items() if name in used}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.content)


def files(folder: Path) -> list[Path]:
    """The results files of a folder. Other JSON files are left out."""
    return [path for path in sorted(folder.glob("*.json")) if _is_results(json.loads(path.read_text("utf-8")))]


def read(path: Path) -> dict[str, Any]:
    """The content of a results file. Raises ValueError if it is another file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not _is_results(content):
        raise ValueError(f"{path}: expected a JSON object with 'runs' and 'rows'")
    return content


def _is_results(content: Any) -> bool:
    return isinstance(content, dict) and {"runs", "rows"} <= set(content)


def this_run() -> str:
    """A short name of the code that is measured and of the versions of PyTorch and Triton."""
    digest = hashlib.sha256(f"{torch.__version__} {_version('triton')}".encode())
    for folder in MEASURED_CODE:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def machine(device: torch.device) -> dict[str, Any]:
    """What a reader of the figures wants to know of the machine, and the commit if git knows it."""
    found = {
        **describe(device),
        "triton": _version("triton"),
        "diffusers": _version("diffusers"),
        "cuda": str(torch.version.cuda),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "python": platform.python_version(),
        "lacking": lacking() if device.type == "cuda" else None,  # tools of a GPU
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"),
    }
    return {name: value for name, value in found.items() if value not in (None, "None")}


def file_name(device: torch.device) -> str:
    """Such as nvidia-h100-80gb-hbm3.json."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return re.sub(r"\W+", "-", name.lower()) + ".json"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """The first line that a command prints. None if it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None
