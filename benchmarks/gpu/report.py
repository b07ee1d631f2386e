"""The pages made from results: one for each device, and the table of the README."""

import os
import re
from pathlib import Path
from typing import Any

from fastdiff.files import replacing

from . import goals
from .columns import JOB
from .results import files, read
from .rows import STAGES

# Where the README's table stands.
BEGIN, END = "<!-- gpu figures -->", "<!-- end of gpu figures -->"

# What the columns of an operation are called, in their order.
WAYS = {
    "fused": "fastdiff",
    "fused_out": "into a buffer",
    "reference": "eager",
    "compile": "torch.compile",
    "copy": "copy",
}
# Columns that are made of two others.
RATIOS = {"eager / fastdiff": ("reference", "fused"), "of a copy": ("copy", "fused")}
TITLES: dict[str, tuple[str, str, dict[str, str]]] = {
    "smoke": ("Smoke", "Each kernel and small networks against float64, and what is captured.", {}),
    "sampling": ("Sampling", "DDIM, for SD 3.5 Euler, in bfloat16. Images a second; for SD, iterations a second.", JOB),
    "training": ("Training", "Images a second of whole steps under autocast to bfloat16.", JOB),
    "operations": ("Operations", "Milliseconds of the GPU's work, captured in a CUDA graph; beside it a copy.", WAYS),
    "host": ("The host", "Microseconds that a call holds up the program, while the GPU works on.", WAYS),
    "checks": ("Checks", "compute-sanitizer, tests, and a packaged step.", {}),
}
# Rows of the README: (what, unit, prefix of the keys, how the names of our methods begin). Best of ours, of the others.
JOBS = [
    ("sampling, cifar10 U-Net, batch 1", "images/s", "sampling / cifar10 U-Net, batch 1 / ", "fastdiff"),
    ("sampling, cifar10 U-Net, batch 16", "images/s", "sampling / cifar10 U-Net, batch 16 / ", "fastdiff"),
    ("sampling, cifar10 U-Net, batch 256", "images/s", "sampling / cifar10 U-Net, batch 256 / ", "fastdiff"),
    ("sampling, SD 1.5 U-Net, batch 1", "it/s", "sampling / SD 1.5 U-Net, batch 1 / ", "accelerate"),
    ("training, cifar10 U-Net, batch 16", "images/s", "training / cifar10 U-Net, batch 16 / ", "fastdiff"),
    ("training, cifar10 U-Net, batch 128", "images/s", "training / cifar10 U-Net, batch 128 / ", "fastdiff"),
]
# Where those are not measured: operations on 50 million elements.
OPERATIONS = [
    ("a sampler's step", "reverse_update"),
    ("noising", "forward_noising"),
    ("loss and its gradient", "loss_forward_backward"),
    ("group norm and SiLU with gradients", "group_norm_silu"),
]
HEADLINES = 6
WORDS = {"error": "FAILED", "not_available": "not available", "not_run": "not run"}
# Of the end of the output: failed rows, and characters of what one says.
MOST_FAILED, SHOWN = 20, 200

Rows = dict[str, dict[str, Any]]


def write_all(folder: Path, readme: Path) -> None:
    """The page of every results file in a folder, and the README's table of all of them."""
    contents = {write_page(path): read(path) for path in files(folder)}
    text = readme.read_text(encoding="utf-8")
    if BEGIN in text and END in text:
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        # First the devices that whole jobs were measured on.
        pages = sorted(contents, key=lambda page: not _jobs(contents[page]["rows"]))
        tables = "\n".join(headline_table(contents[page], page, readme.parent) for page in pages)
        _write(readme, f"{before}{BEGIN}\n{tables}{END}{after}")


def summary(content: dict[str, Any], run: str) -> list[str]:
    """Lines for the eye: how the rows of a run ended, which failed, and the goals by all rows."""
    rows = {key: row for key, row in content["rows"].items() if row["run"] == run}
    failed = {key: " ".join(row["error"].split())[:SHOWN] for key, row in rows.items() if "error" in row}
    counts = {word: sum(key in row for row in rows.values()) for key, word in {"figures": "measured", **WORDS}.items()}
    lines = ["", ", ".join(f"{count} {word}" for word, count in counts.items() if count)]
    lines += [f"FAILED {key}: {error}" for key, error in failed.items()][:MOST_FAILED]
    return [*lines, "", *goals.table(content["rows"])]


def write_page(path: Path) -> Path:
    """Write the page of a results file beside it. Returns the page's path."""
    page = path.with_suffix(".md")
    _write(page, markdown(read(path)))
    return page


def markdown(content: dict[str, Any]) -> str:
    """The whole page of a device."""
    runs = content["runs"]
    lines = [f"# {_device(content)}", "", "Made from the JSON file beside it by `python -m benchmarks.gpu report`.", ""]
    for name, machine in runs.items():
        lines += [f"Run `{name}`:", ""]
        lines += [f"- {key}: {value}" for key, value in machine.items() if key != "notes"]
        lines += [f"- {note}" for note in machine.get("notes", [])]
        lines.append("")
    lines += ["## Goals", "", "Ratios of the figures below.", "", *goals.table(content["rows"]), ""]
    for stage in STAGES:
        rows = {
            key.partition(" / ")[2]: row for key, row in content["rows"].items() if key.startswith(f"{stage.name} /")
        }
        if rows:
            title, text, columns = TITLES[stage.name]
            lines += [f"## {title}", "", text, "", *_table(rows, columns, len(runs) > 1), *_without_figures(rows)]
    return "\n".join(lines).rstrip() + "\n"


def _table(rows: Rows, columns: dict[str, str], several_runs: bool) -> list[str]:
    """The rows that have figures, one line each, in the columns that any of them has."""
    measured = {name: row for name, row in rows.items() if "figures" in row}
    if not measured:
        return []
    had = {key for row in measured.values() for key in row["figures"]}
    columns = {key: columns[key] for key in columns if key in had} | {key: key for key in sorted(had - {*columns})}
    ratios = {title: pair for title, pair in RATIOS.items() if had.issuperset(pair)}
    titles = ["", "", *columns.values(), *ratios, *["run"] * several_runs]
    lines = [_line(titles), "|---" * len(titles) + "|"]
    for name, row in measured.items():
        figures = row["figures"]
        numbers = [_number(figures.get(key)) for key in columns]
        quotients = [_ratio(figures, *pair) for pair in ratios.values()]
        lines.append(_line([*name.split(" / "), *numbers, *quotients, *[f"`{row['run']}`"] * several_runs]))
    return [*lines, ""]


def _without_figures(rows: Rows) -> list[str]:
    """A list of the rows that have none, and why."""
    found = []
    for name, row in rows.items():
        for key, word in WORDS.items():
            if key in row:
                found.append(f"- {name}: {word}: {' '.join(str(row[key]).split())[:500]}")
    return [*found, ""] if found else []


def headline_table(content: dict[str, Any], page: Path, beside: Path) -> str:
    """The README's table of a device: whole jobs first, then operations, six rows at most."""
    rows = content["rows"]
    lines = _jobs(rows)
    for what, name in OPERATIONS:
        figures = rows.get(f"operations / {name} / bfloat16 256x3x256x256", {}).get("figures")
        if figures:
            other, way = min((figures[way], WAYS[way]) for way in ("reference", "compile") if way in figures)
            own = figures["fused"]
            lines.append(_line([what, f"{own:.4g} ms", f"{other:.4g} ms, {way}", f"{other / own:.2f}x"]))
    if not lines:
        return ""
    title = f"[{_device(content)}]({os.path.relpath(page, beside)}), bfloat16, beside the fastest other way measured:"
    return "\n".join([title, "", "| | fastdiff | fastest other | |", "|---|---|---|---|", *lines[:HEADLINES]]) + "\n"


def _jobs(rows: Rows) -> list[str]:
    """The lines of the jobs of which ours and another's were measured."""
    lines = []
    for what, unit, prefix, ours in JOBS:
        if best := _best(rows, prefix, ours):
            own, other, way = best
            lines.append(_line([what, f"{own:.4g} {unit}", f"{other:.4g} {unit}, {way}", f"{own / other:.2f}x"]))
    return lines


def _best(rows: Rows, prefix: str, ours: str) -> tuple[float, float, str] | None:
    """(best of ours, best of the others) a second, and which of the others. None unless both were measured."""
    own: list[float] = []
    other: list[tuple[float, str]] = []
    for key, row in rows.items():
        if key.startswith(prefix) and "figures" in row:
            way, rate = key.removeprefix(prefix), row["figures"]["per_s"]
            if way.startswith(ours):
                own.append(rate)
            else:
                other.append((rate, way))
    return (max(own), *max(other)) if own and other else None


def _device(content: dict[str, Any]) -> str:
    """The device's name, such as NVIDIA H100 80GB HBM3."""
    device = next(iter(content["runs"].values()))["device"]
    inside = re.search(r"\((.*)\)", device)
    return inside[1] if inside else device


def _ratio(figures: dict[str, float], over: str, under: str) -> str:
    return f"{figures[over] / figures[under]:.2f}" if {over, under} <= figures.keys() else ""


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
