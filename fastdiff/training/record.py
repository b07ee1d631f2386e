"""What a run leaves to look at: config.json, log.csv, grids of samples, and the same in TensorBoard or W&B."""

import csv
import math
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.diffusion import Diffusion
from fastdiff.files import need, replacing, write_json
from fastdiff.training.data import save_grid
from fastdiff.training.options import Options
from fastdiff.training.samples import columns_of, draw_grid

CONFIG, LOG, SAMPLES = "config.json", "log.csv", "samples"
QUARTILES = 4
COLUMNS = ("step", "loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4", "grad_norm", "lr", "images_per_s", "memory_mb")
# A row is written every so many steps.
EVERY = 10


class Record:
    """The log of a run, a row every EVERY steps, and its grids.

    A row has the means since the last one: the loss, the loss by quartile of t (q1: the least noise), the norm of the
    gradient before it is clipped; the learning rate, images a second, and the peak of memory in MB.

    Args:
        folder: of the run.
        options: of the run, written to config.json.
        start: the step that the run goes on from. Rows and grids of later steps are dropped.

    Raises: ImportError if what `options.log` or the report needs is not installed; OSError if the folder takes no file.
    """

    def __init__(self, folder: Path, options: Options, start: int) -> None:
        self._folder, self._options = folder, options
        self._writer = _Writer(folder, options)
        if options.sample_every:
            need("matplotlib")  # the report at the end needs it: better to know now
        write_json(folder / CONFIG, options.used())
        kept = [row for row in read_log(folder) if row["step"] <= start] if start else []
        with replacing(folder / LOG) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(COLUMNS)
            table.writerows([_shown(row[name]) for name in COLUMNS] for row in kept)
        for grid in grids(folder):
            if int(grid.stem) > start:
                grid.unlink()
        self._sums: Tensor | None = None
        self._steps, self._clock = 0, time.perf_counter()
        self._paused = 0.0  # seconds of drawing, which are no training

    def step(self, step: int, losses: Tensor, noisiness: Tensor, norm: Tensor, lr: float) -> None:
        """Note that `step` is done.

        Args:
            step: from 1.
            losses: (B,), of the samples.
            noisiness: (B,) in (0, 1], how far their times are from data, see Process.noisiness.
            norm: (), of the gradient.
            lr: the learning rate.
        """
        if self._sums is None:  # the losses and their number by quartile, and the sum of norms, on the device
            self._sums = torch.zeros(2 * QUARTILES + 1, device=losses.device)
        quartile = (noisiness * QUARTILES).ceil().long().clamp(1, QUARTILES) - 1
        self._sums.index_add_(0, quartile, losses.detach().float())
        self._sums.index_add_(0, quartile + QUARTILES, torch.ones_like(losses, dtype=torch.float32))
        self._sums[-1] += norm.detach()
        self._steps += 1
        if step % EVERY == 0:
            self._write(step, lr)

    def grid(self, step: int, model: Diffusion) -> None:
        """Draw the samples of the step and write them as PNG. model: with the averaged weights."""
        begun = time.perf_counter()
        path = self._folder / SAMPLES / f"{step:07}.png"
        if self._options.shape[0] in (1, 3):  # others are no pictures
            drawn = draw_grid(model, self._options.seed)
            path.parent.mkdir(exist_ok=True)
            save_grid(path, drawn.nan_to_num(), columns_of(model))
            self._writer.image(step, path)
        self._paused += time.perf_counter() - begun

    def close(self) -> None:
        """End what writes elsewhere."""
        self._writer.close()

    def _write(self, step: int, lr: float) -> None:
        assert self._sums is not None
        sums = self._sums.tolist()
        losses, counts, now = sums[:QUARTILES], sums[QUARTILES:-1], time.perf_counter()
        row: dict[str, float] = {"step": step, "loss": sum(losses) / sum(counts), "grad_norm": sums[-1] / self._steps}
        row |= {f"loss_q{k + 1}": losses[k] / counts[k] if counts[k] else math.nan for k in range(QUARTILES)}
        seconds = max(now - self._clock - self._paused, 1e-9)
        row |= {"lr": lr, "images_per_s": self._steps * self._options.batch_size / seconds}
        row["memory_mb"] = memory(self._sums.device) / 2**20
        self._sums, self._steps, self._clock, self._paused = None, 0, now, 0.0
        # Appended: a row that is cut short is dropped when the run goes on.
        with open(self._folder / LOG, "a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow([_shown(row[name]) for name in COLUMNS])
        self._writer.numbers(step, {name: value for name, value in row.items() if name != "step"})


class _Writer:
    """TensorBoard or W&B, or neither."""

    def __init__(self, folder: Path, options: Options) -> None:
        self._board: Any = None
        self._wandb: Any = None
        if options.log == "tensorboard":
            need("tensorboard", "data")  # torch's own error does not say how to install it
            self._board = need("torch.utils.tensorboard", "data").SummaryWriter(str(folder / "tensorboard"))
        elif options.log == "wandb":
            self._wandb = need("wandb", "data")
            self._wandb.init(project="fastdiff", dir=str(folder), config=options.used(), resume="allow")

    def numbers(self, step: int, row: dict[str, float]) -> None:
        for name, value in row.items() if self._board else ():
            self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(row, step=step)

    def image(self, step: int, path: Path) -> None:
        if self._board:
            pixels = need("PIL.Image").open(path).convert("RGB")
            values = torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8)
            self._board.add_image("samples", values.reshape(pixels.height, pixels.width, 3), step, dataformats="HWC")
        if self._wandb:
            self._wandb.log({"samples": self._wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()


def read_log(folder: Path) -> list[dict[str, float]]:
    """The rows of log.csv, without one that is cut short; none if there is no such file."""
    rows = []
    with suppress(FileNotFoundError), open(folder / LOG, newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(file):
            with suppress(TypeError, ValueError, KeyError):
                rows.append({name: float(row[name]) for name in COLUMNS})
    return rows


def grids(folder: Path) -> list[Path]:
    """The grids of samples of a run, in the order of their steps."""
    return sorted(path for path in (folder / SAMPLES).glob("*.png") if path.stem.isdigit())


def _shown(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else f"{value:.6g}"


def memory(device: torch.device) -> int:
    """The peak of memory in bytes: what PyTorch holds of a GPU, or the resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows has none
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
