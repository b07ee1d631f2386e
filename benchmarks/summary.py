"""The one table at the end of `pytest benchmarks/ --benchmark-only`: a line for each group of rows.

A group is what one compares: the same operation, shape and data type, done by each of the rows. A cell holds the row's
figure and how many times as long as fastdiff the row takes; above 1 fastdiff is faster.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Unit:
    """A figure in extra_info: what it says, and whether a larger one is better."""

    title: str
    larger_is_better: bool = False


UNITS = {
    "images_per_s": Unit("images per second, higher is better", larger_is_better=True),
    "ns_per_element": Unit("nanoseconds per element, lower is better"),
    "us_per_call": Unit("microseconds per call, lower is better"),
    "us_per_element": Unit("microseconds per call on one element, lower is better"),
    "s_per_process": Unit("seconds of a whole process, lower is better"),
}
# The rows in the order of their columns. The first one that a group has is what the others are compared with.
TITLES = {
    "fused": "fastdiff",
    "channels_last": "channels_last",
    "compiled": "compiled",
    "reference": "eager PyTorch",
    "compile": "torch.compile",
    "preallocated": "own buffers",
    "diffusers": "diffusers",
    "diffusers compiled": "and compiled",
    "denoising-diffusion-pytorch": "lucidrains",
    "direct": "direct",
    "op": "op",
    "public": "public",
    "custom_op": "custom_op",
    "empty": "empty cache",
    "filled": "filled cache",
}
NOTES = (
    "fastdiff's bare figure comes first. Behind another figure stands how many times as long as fastdiff it takes.",
    "of a copy: a plain copy's time over fastdiff's time, for the bytes that have to move at least.",
    "channels_last, compiled: fastdiff too. own buffers: eager PyTorch that writes into tensors it has.",
    "lucidrains: denoising-diffusion-pytorch. and compiled: diffusers with its U-Net compiled.",
)
LABEL, CELL, COPY = 46, 15, 11


@dataclass
class Group:
    """The figures of one group by row, all in one unit."""

    unit: str
    figures: dict[str, float] = field(default_factory=dict)
    copy_fraction: float | None = None


def groups(results: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, Group]:
    """The groups by name, in the order in which they were measured.

    Args:
        results: (group, extra_info) of each benchmark; extra_info holds "row", one key of UNITS, and in an operation
            "copy_fraction". A benchmark without a figure, as when timing is disabled, is left out.

    Raises: ValueError if a group holds the same row twice, or figures in two units.
    """
    found: dict[str, Group] = {}
    for name, info in results:
        unit = next((unit for unit in UNITS if unit in info), None)
        if unit is None or math.isnan(info[unit]):
            continue
        group = found.setdefault(name, Group(unit))
        if unit != group.unit or info["row"] in group.figures:
            raise ValueError(f"group {name!r}: expected each row once and one unit, got {info['row']!r} in {unit}")
        group.figures[info["row"]] = info[unit]
        if info["row"] == "fused":
            group.copy_fraction = info.get("copy_fraction")
    return found


def ratios(group: Group) -> dict[str, float]:
    """How many times as long as the first row (fastdiff) each of the others takes."""
    first, *others = (row for row in TITLES if row in group.figures)
    own, larger = group.figures[first], UNITS[group.unit].larger_is_better
    return {row: own / group.figures[row] if larger else group.figures[row] / own for row in others}


def table(found: Mapping[str, Group]) -> list[str]:
    """The lines of the table, one part for each unit."""
    lines: list[str] = []
    for unit in UNITS:
        part = {name: group for name, group in found.items() if group.unit == unit}
        rows = [row for row in TITLES if any(row in group.figures for group in part.values())]
        if not part:
            continue
        titles = [f"{TITLES[row]:>{CELL}}" for row in rows]
        if any(group.copy_fraction is not None for group in part.values()):
            titles.append(f"{'of a copy':>{COPY}}")
        lines += [UNITS[unit].title, " " * LABEL + "".join(titles)]
        for name, group in part.items():
            times = ratios(group)
            cells = "".join(f"{_cell(group.figures.get(row), times.get(row)):>{CELL}}" for row in rows)
            fraction = "" if group.copy_fraction is None else f"{group.copy_fraction:>{COPY}.2f}"
            lines.append(f"{name:{LABEL}}{cells}{fraction}")
        lines.append("")
    return [*lines, *NOTES] if lines else []


def _cell(figure: float | None, ratio: float | None) -> str:
    if figure is None:
        return "-"
    return _number(figure) + ("" if ratio is None else f"{f'{ratio:.2f}' if ratio < 10 else _number(ratio)}x".rjust(7))


def _number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if 0 < value < 100 else f"{value:.0f}"
