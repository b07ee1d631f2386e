"""Write docs/performance.md and its pictures from benchmarks/results/*.json.

python docs/performance.py           writes them
python docs/performance.py --check   writes nothing; fails if they are not what the results say
"""

import json
import sys
from html import escape
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu.columns import JOB

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

# What an operation is called on the page.
OPERATIONS = {
    "forward_noising": "forward noising",
    "loss_forward_backward": "loss with gradient",
    "noising_and_loss": "noising, then loss with gradient",
    "reverse_update": "reverse update",
    "normal": "noise alone",
    "loss_without_gradient": "loss without gradient",
    "bound_forward_backward": "variational bound with gradients",
    "group_norm_silu": "group norm and SiLU, with gradient",
    "inner_products": "inner products for guidance",
    "gated_gelu": "gate of GEGLU",
    "layer_norm": "layer norm of a gated sum",
    "rotate": "norm and rotary embedding",
}
# The size that fills a GPU, for the picture.
LARGE = "256x3x256x256"
DTYPES = ("bfloat16", "float32")
NO_BREAK = "\u00a0"  # a space at which no line of a cell ends
WAYS = {"fused": "fastdiff", "reference": "eager", "compile": "torch.compile", "copy": "copy"}
# The cases of `python -m benchmarks.cpu` that are no operation, and its ways.
WHOLE = {
    "training_step": "training step of a U-Net",
    "sampling, 20 steps": "sampling of digits, 20 steps of DDPM",
}
CPU_WAYS = {"fused": "fastdiff", "reference": "eager", "diffusers": "diffusers"}
CPU_METHOD = """
`python -m benchmarks.cpu` measures these rows on your CPU in about a minute, and `python docs/performance.py`
writes them here. They are milliseconds of processor time on one thread; the ways take turns. In the last two columns
higher is better.

The loss alone draws its noise again, where eager PyTorch reads it. The row below it has noising and loss together.

The last two rows are whole jobs, in which the network is nearly all of the time. Their *eager* has eager arithmetic
around fastdiff's `UNet`. Their *diffusers* has diffusers' scheduler and network, with the same weights.
"""
TITLES = {
    "smoke": "Smoke test",
    "sampling": "Sampling",
    "training": "Training",
    "operations": "Operations: the GPU's time",
    "host": "Operations: the host's time",
    "checks": "Checks",
}
UNITS = {
    "sampling": "Images a second, for SD iterations: higher is better. DDIM, for SD 3.5 Euler, in bfloat16.",
    "training": "Images a second of whole steps under autocast to bfloat16: higher is better.",
    "operations": "Milliseconds of the GPU's work, lower is better. In the last two columns higher is better.",
    "host": "Microseconds that one call holds up the program, lower is better.",
}
METHOD = """# Performance

This page is made by `python docs/performance.py` from the files in `benchmarks/results/`. No figure is typed by hand.

## How it is measured

- `make gpu-check` measures on a machine with an NVIDIA GPU and writes one JSON file per device.
- Every row is compared with the float64 reference before it is timed. A row that disagrees has no figure.
- *The GPU's time* is that of calls captured in one CUDA graph, so no Python is in it.
- *The host's time* is how long one call holds up the Python program while the GPU works on.
- *Of a copy* compares with a plain copy that moves as many bytes as the operation has to move. At 1.00 the operation
  is as fast as memory.
- *Eager* is the same mathematics in eager PyTorch, with the noise of `torch.randn_like`.
- The small size, 64x3x64x64, stays in the cache of a GPU. The large one, 256x3x256x256, does not.

`python -m benchmarks` measures your own machine, and [a table](#on-a-cpu) shows a CPU.
[Measured quality](quality.md) compares the samplers.
"""

Rows = dict[str, dict[str, Any]]


def read(path: Path) -> dict[str, Any]:
    """{"runs": {name: machine}, "rows": {"stage / case / method": {"figures": {...}}}} of a results file."""
    return json.loads(path.read_text(encoding="utf-8"))


def stage_rows(content: dict[str, Any], stage: str) -> Rows:
    """The rows of a stage that have figures, by "case / method"."""
    prefix = f"{stage} / "
    found = {key.removeprefix(prefix): row for key, row in content["rows"].items() if key.startswith(prefix)}
    return {key: row["figures"] for key, row in found.items() if row.get("figures")}


def device_name(content: dict[str, Any]) -> str:
    """The device's name, such as NVIDIA H100 80GB HBM3."""
    name = next(iter(content["runs"].values()))["device"]
    return name.partition("(")[2].rstrip(")") or name


def number(value: Any) -> str:
    """Three digits, without an exponent."""
    if not isinstance(value, float | int):
        return str(value)
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def table(stage: str, rows: Rows) -> list[str]:
    """A Markdown table of the rows of a stage."""
    names = WAYS | JOB
    columns = [name for name in names if any(name in figures for figures in rows.values())]
    columns += sorted({key for figures in rows.values() for key in figures} - {*names, "fused_out"})
    both = {"fused", "reference"} <= set(columns)
    copied = "copy" in columns and "fused" in columns
    titles = ["operation" if both else "case", "", *(names.get(key, key.replace("_", " ")) for key in columns)]
    titles += ["eager / fastdiff"] * both + ["of a copy"] * copied
    lines = ["| " + " | ".join(titles) + " |", "|---" * 2 + "|---:" * (len(titles) - 2) + "|"]
    for key, figures in rows.items():
        case, _, method = key.partition(" / ")
        cells = [OPERATIONS.get(case, case), method.replace(" ", NO_BREAK)]
        cells += [number(figures.get(column, "")) for column in columns]
        has = figures.keys()
        cells += [f"{figures['reference'] / figures['fused']:.2f}" if {"fused", "reference"} <= has else ""] * both
        cells += [f"{figures['copy'] / figures['fused']:.2f}" if {"fused", "copy"} <= has else ""] * copied
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def cpu_table(rows: Rows) -> list[str]:
    """A Markdown table of what `python -m benchmarks.cpu` found."""
    others = {way: title for way, title in CPU_WAYS.items() if way != "fused"}
    titles = ["operation", "float32", *CPU_WAYS.values(), *(f"{title} / fastdiff" for title in others.values())]
    lines = ["| " + " | ".join(titles) + " |", "|---" * 2 + "|---:" * (len(titles) - 2) + "|"]
    for key, times in rows.items():
        case, _, size = key.partition(" / ")
        cells = [(OPERATIONS | WHOLE).get(case, case), size, *(number(times.get(way, "")) for way in CPU_WAYS)]
        cells += [f"{times[way] / times['fused']:.2f}" if way in times else "" for way in others]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def speedups(content: dict[str, Any], dtype: str) -> dict[str, tuple[float, float]]:
    """(eager's time over ours, the copy's time over ours) of every operation at the large size."""
    rows = stage_rows(content, "operations")
    found = {}
    for name in OPERATIONS:
        figures = rows.get(f"{name} / {dtype} {LARGE}", {})
        if {"fused", "reference", "copy"} <= figures.keys():
            found[name] = figures["reference"] / figures["fused"], figures["copy"] / figures["fused"]
    return found


def picture(content: dict[str, Any]) -> str:
    """An SVG of bars: how many times faster than eager PyTorch each operation is, by type."""
    colours = {"bfloat16": "#3f51b5", "float32": "#9fa8da"}
    found = {dtype: speedups(content, dtype) for dtype in DTYPES}
    names = sorted(found["bfloat16"], key=lambda name: -found["bfloat16"][name][0])
    most = max(ratio for values in found.values() for ratio, _ in values.values())
    left, width, height, top = 250, 390, 15, 62
    unit = width / most
    bottom = top + len(names) * (2 * height + 12)
    title = f"{device_name(content)}: how many times faster than eager PyTorch (longer is better)"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {bottom + 34}"',
        ' font-family="sans-serif" font-size="13">',
        f"<title>{escape(title)}</title>",
        f'<rect width="720" height="{bottom + 34}" fill="#ffffff"/>',
        f'<text x="16" y="24" font-size="15" font-weight="bold">{escape(title.partition(" (")[0])}</text>',
        '<text x="16" y="44" fill="#555">GPU time, 50 million elements. Longer is better.</text>',
    ]
    for k, dtype in enumerate(DTYPES):
        x = 470 + 110 * k
        parts.append(f'<rect x="{x}" y="33" width="12" height="12" fill="{colours[dtype]}"/>')
        parts.append(f'<text x="{x + 18}" y="44">{dtype}</text>')
    for i, name in enumerate(names):
        y = top + i * (2 * height + 12)
        parts.append(f'<text x="{left - 8}" y="{y + height + 4}" text-anchor="end">{OPERATIONS[name]}</text>')
        for k, dtype in enumerate(DTYPES):
            ratio = found[dtype][name][0]
            length = max(ratio * unit, 1)
            at, size = f'x="{left}" y="{y + k * height}"', f'width="{length:.1f}" height="{height - 1}"'
            parts.append(f'<rect {at} {size} fill="{colours[dtype]}"/>')
            at = f'x="{left + length + 5:.1f}" y="{y + k * height + 12}"'
            parts.append(f'<text {at} font-size="12">{ratio:.1f}x</text>')
    parts.append(f'<line x1="{left + unit:.1f}" y1="{top - 6}" x2="{left + unit:.1f}" y2="{bottom}" stroke="#c62828"/>')
    parts.append(f'<text x="{left + unit:.1f}" y="{bottom + 16}" fill="#c62828">1x: eager PyTorch</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def pages() -> dict[Path, str]:
    """Every file that this command makes, and its text."""
    made: dict[Path, str] = {}
    text = METHOD
    for path in sorted(RESULTS.glob("*.json")):
        content = read(path)
        name = device_name(content)
        text += f"\n## {name}\n\n"
        for machine in content["runs"].values():
            text += "".join(f"- {key}: {value}\n" for key, value in machine.items() if key != "notes")
        if all(speedups(content, dtype) for dtype in DTYPES):
            made[ROOT / "docs" / f"{path.stem}.svg"] = picture(content)
            text += f"\n![{name}: times faster than eager PyTorch]({path.stem}.svg)\n"
        for stage, title in TITLES.items():
            if rows := stage_rows(content, stage):
                unit = f"{UNITS[stage]}\n\n" if stage in UNITS else ""
                text += f"\n### {title}\n\n{unit}" + "\n".join(table(stage, rows)) + "\n"
    if found := sorted((RESULTS / "cpu").glob("*.json")):
        text += f"\n## On a CPU\n{CPU_METHOD}"
    for path in found:
        content = read(path)
        text += f"\n### {content['processor']}\n\n"
        text += "".join(f"- {key}: {value}\n" for key, value in content["machine"].items())
        text += "\n" + "\n".join(cpu_table(content["rows"])) + "\n"
    made[ROOT / "docs" / "performance.md"] = text
    return made


def main(check: bool) -> int:
    """Write the files, or with `check` compare them. Returns 1 if they differ."""
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if check and stale:
        names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
        print(f"{names}: not what benchmarks/results says; run: python docs/performance.py", file=sys.stderr)
        return 1
    if not check:
        made = pages()
        for path in stale:
            path.write_text(made[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
