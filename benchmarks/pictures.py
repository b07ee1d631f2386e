"""The pictures of the figures, by matplotlib. Each fits a printed page and says which direction is better."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdiff.files import replacing

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator
except ImportError as error:
    raise ImportError("--plot needs matplotlib: pip install 'fastdiff-kernels[dev]'") from error

PAGE = (8.0, 11.0)  # inches: the largest picture
DPI = 110
OWN, OTHER, NEUTRAL = "#3465a4", "#cc7722", "#888888"


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def operations(lines: Sequence[Mapping[str, Any]], machine: str, titles: Mapping[str, str]) -> Figure:
    """Bars of nanoseconds per element: a row of panels for each operation, a column for each data type and shape.

    Args:
        lines: as `table.measure` returns them.
        machine: what was measured on.
        titles: the name of each row, in the order of the bars.
    """
    shown = {  # the rows of each operation
        name: [r for r in titles if any(r in line["ns_per_element"] for line in lines if line["operation"] == name)]
        for name in dict.fromkeys(line["operation"] for line in lines)
    }
    kinds = list(dict.fromkeys((line["dtype"], tuple(line["shape"])) for line in lines))
    counts = [2 + len(rows) for rows in shown.values()]
    figure = Figure(figsize=(PAGE[0], min(PAGE[1], 1.0 + 0.22 * sum(counts))), layout="constrained")
    text = "Nanoseconds per element: shorter is better. In brackets: times as long as fastdiff."
    figure.suptitle(f"{text}\n{machine}", fontsize=9)
    panels = figure.subplots(len(shown), len(kinds), squeeze=False, sharey="row", height_ratios=counts)
    for line in lines:
        rows, kind = shown[line["operation"]], (line["dtype"], tuple(line["shape"]))
        panel = panels[list(shown).index(line["operation"])][kinds.index(kind)]
        taken = [line["ns_per_element"].get(row, 0.0) for row in rows]
        bars = panel.barh(range(len(rows)), taken, color=[OWN if row.startswith("fused") else OTHER for row in rows])
        panel.bar_label(bars, [_time(row, line) for row in rows], padding=2, fontsize=7)
        panel.set_yticks(range(len(rows)), [titles[row] for row in rows], fontsize=7)
        panel.set_xlim(0, 1.5 * max(taken))
        panel.tick_params(axis="x", labelsize=7)
        name = line["operation"].replace("_", " ")
        panel.set_title(f"{name}\n{kind[0]}, {'x'.join(map(str, kind[1]))}", fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[-1]:
        panel.set_xlabel("ns per element", fontsize=8)
    for first, *others in panels:
        first.invert_yaxis()  # fastdiff on top; a row of panels shares this axis
        for panel in others:
            panel.tick_params(axis="y", length=0)
    return figure


def _time(row: str, line: Mapping[str, Any]) -> str:
    """0.26, or 2.52 (9.7x fastdiff's time), or a dash if the library has no such operation."""
    if row not in line["ns_per_element"]:
        return "-"
    ratio = line["ratio"].get(row)
    return f"{line['ns_per_element'][row]:.2f}" + ("" if ratio is None else f" ({ratio:.2g}x)")


def quality(rows: Sequence[Mapping[str, Any]], real: float) -> Figure:
    """Frechet distance over calls of the model: a row of panels for each model, a column for each group of samplers.

    Each panel has the curves of its group in colour, and those of the model's other samplers in grey.

    Args:
        rows: as `quality.main` makes them. The points of a curve are in the order of their numbers of model calls.
        real: the distance between two halves of the real images, which no sampler has to beat.
    """
    models, groups = ({row[key]: None for row in rows} for key in ("model", "group"))
    figure = Figure(figsize=(PAGE[0], min(PAGE[1], 2.4 + 1.8 * max(2, len(models)))), layout="constrained")
    calls = sorted({row["calls"] for row in rows})
    text = f"Down and to the left is better. Points of a curve: at most {', '.join(map(str, calls))} model calls."
    figure.suptitle(f"{text}\nCurves that leave at the top go on above.", fontsize=9)
    panels = figure.subplots(len(models), len(groups), squeeze=False, sharex=True, sharey=True)
    for place, group in zip(panels.T, groups, strict=True):
        own = [row for row in rows if row["group"] == group]
        worst_first = sorted(own, key=lambda row: (-row["calls"], -row["frechet_distance"]))
        samplers = dict.fromkeys(row["sampler"] for row in worst_first if row["model"] == own[0]["model"])
        samplers |= dict.fromkeys(row["sampler"] for row in own)
        for panel, model in zip(place, models, strict=True):
            of_model = [row for row in rows if row["model"] == model]
            for sampler in dict.fromkeys(row["sampler"] for row in of_model if row["group"] != group):
                panel.plot(*_curve(of_model, sampler), color="#dddddd", linewidth=0.6, zorder=1)
            for k, sampler in enumerate(samplers):
                style: Any = {"color": f"C{k}", "marker": "osD^v<>ph*"[k % 10], "markersize": 3.5, "linewidth": 1}
                panel.plot(*_curve(of_model, sampler), label=sampler, **style)
            panel.axhline(real, color=NEUTRAL, linewidth=0.8, linestyle="--", label="two halves of the real digits")
            panel.set(xscale="log", yscale="log", ylim=(0.9 * real, 10 * real))  # some are thousands off in few calls
            for axis, ticks in ((panel.xaxis, calls), (panel.yaxis, (0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.5, 2, 3))):
                axis.set_major_locator(FixedLocator(ticks))
                axis.set_major_formatter("{x:g}")
                axis.set_minor_locator(NullLocator())
            panel.tick_params(labelsize=7)
            panel.spines[["top", "right"]].set_visible(False)
        place[0].set_title(group, fontsize=8)
        place[-1].set_xlabel("model calls an image", fontsize=7)
        place[-1].legend(loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=5, fontsize=6.5, frameon=False)
    for panel, model in zip(panels[:, 0], models, strict=True):
        panel.set_ylabel(model, fontsize=9, fontweight="bold")
    figure.supylabel("Frechet distance to held-out digits", fontsize=8)
    return figure


def _curve(rows: Sequence[Mapping[str, Any]], sampler: str) -> tuple[list[float], list[float]]:
    """The numbers of calls and the distances of a sampler."""
    own = [row for row in rows if row["sampler"] == sampler]
    return [row["model_calls"] for row in own], [row["frechet_distance"] for row in own]


def roofline(bars: Sequence[tuple[str, str, float]]) -> Figure:
    """A bar for each compiled kernel: the predicted fraction of the H100's memory roofline.

    Args:
        bars: (source, label, fraction in (0, 1]) of each kernel.
    """
    figure = Figure(figsize=(PAGE[0], min(PAGE[1], 1.0 + 0.16 * len(bars))), layout="constrained")
    axes = figure.subplots()
    colours = [{"fastdiff": OWN, "inductor": OTHER}.get(source, NEUTRAL) for source, _, _ in bars]
    drawn = axes.barh(range(len(bars)), [100 * fraction for _, _, fraction in bars], color=colours)
    axes.bar_label(drawn, [f"{fraction:.0%}" for _, _, fraction in bars], padding=2, fontsize=6)
    axes.set_yticks(range(len(bars)), [f"{source}: {label}" for source, label, _ in bars], fontsize=6)
    axes.set_xlabel("predicted % of the memory roofline of an H100 SXM (longer is better)", fontsize=8)
    axes.set_xlim(0, 110)
    axes.margins(y=0.005)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    return figure
