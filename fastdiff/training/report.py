"""A picture of a run: the loss, in all and by quartile of t, and the row of its grids of samples."""

from pathlib import Path

import numpy as np

from fastdiff.files import need, replacing
from fastdiff.training.record import QUARTILES, grids, read_log

REPORT = "report.png"
# Grids of a row, at most: the first, the last, and those between at equal distances.
SHOWN = 6


def write_report(run: Path, out: Path | None = None) -> Path:
    """Draw a run.

    Args:
        run: its folder, with log.csv and samples/.
        out: the PNG, by default report.png in the folder.

    Returns: the path of the PNG.
    Raises: ValueError if the run has no log; ImportError without matplotlib.
    """
    rows, pictures, out = read_log(run), grids(run), out or run / REPORT
    if not rows and not pictures:
        raise ValueError(f"{run}: expected the folder of a run, with log.csv; it holds no row of a log")
    places = np.linspace(0, len(pictures) - 1, min(SHOWN, len(pictures))).round().astype(int)
    shown = [pictures[i] for i in places]
    figure = need("matplotlib.figure").Figure(figsize=(12, 6.5 if shown else 3.5), layout="constrained")
    need("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)  # no window, and no global state
    above, below = figure.subfigures(2, 1, height_ratios=[1, 1]) if shown else (figure, None)
    loss, norm, speed = above.subplots(1, 3, width_ratios=[2, 1, 1])
    steps = [row["step"] for row in rows]
    for k in range(QUARTILES):
        loss.plot(steps, smooth([row[f"loss_q{k + 1}"] for row in rows]), lw=0.8, label=f"t in quartile {k + 1}")
    loss.plot(steps, smooth([row["loss"] for row in rows]), "k", label="all")
    loss.set(title="loss", xlabel="step", yscale="log")
    loss.legend(fontsize=7)
    norm.plot(steps, smooth([row["grad_norm"] for row in rows]), lw=0.8)
    norm.set(title="gradient norm", xlabel="step")
    speed.plot(steps, [row["images_per_s"] for row in rows], lw=0.8)
    speed.set(title="images per second", xlabel="step", ylim=(0, None))
    for axes, path in zip(below.subplots(1, len(shown), squeeze=False)[0] if below else (), shown, strict=True):
        with need("PIL.Image").open(path) as picture:
            axes.imshow(np.asarray(picture.convert("RGB")))
        axes.set(title=f"step {int(path.stem)}", xticks=[], yticks=[])
    with replacing(out) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    return out


def smooth(values: list[float]) -> np.ndarray:
    """A running mean of 9 values, fewer at the ends; what is not a number is left out."""
    array = np.asarray(values, float)
    windows = (array[max(0, i - 4) : i + 5] for i in range(len(array)))
    return np.array([part[np.isfinite(part)].mean() if np.isfinite(part).any() else np.nan for part in windows])
