"""Many samples: drawn batch by batch by any number of processes, kept batch by batch, and put together at the end.

Sample i of a seed is the same noise everywhere. A network's rounding depends on the batch, so a batch is never split:
it gives the same bytes whichever process draws it, and a drawing that was killed goes on with what is missing.
"""

import argparse
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.diffusion import Diffusion
from fastdiff.files import need, replacing, write_json
from fastdiff.training.data.pictures import MODES, encoded, write_shard
from fastdiff.training.ranks import Ranks
from fastdiff.training.samples import conditions, suited

# What `fastdiff sample` writes.
FORMATS = ("npy", "png", "webdataset")
# What a folder of batches notes of the drawing that it is of.
ABOUT = "drawing.json"


def drawn(
    args: argparse.Namespace,
    model: Diffusion,
    batches: Mapping[int, Tensor],
    left: Callable[[], int] | None = None,
    shown: bool = True,
) -> Iterator[tuple[int, Tensor]]:
    """Draw batches one after another, with one progress bar of network calls.

    Args:
        args: of the command: checkpoint, sampler, steps, eta, seed, label, guidance.
        model: on the device where to compute.
        batches: the numbers of the samples (B,) by the number of the batch.
        left: how many batches the processes have yet to draw; None is those of this one.
        shown: whether this process shows the bar.

    Yields: (the number of a batch, float32 (B, C, H, W) on the CPU).
    Raises: ValueError if a sample is not finite.
    """
    sampler, steps = sampler_of(args, model)
    total = left() if left else len(batches)
    tqdm, bar, calls = need("tqdm").tqdm, None, 0

    def advance(*_: object) -> None:
        nonlocal bar  # made at the first step, so that it does not precede an error in the arguments
        bar = bar or tqdm(total=calls * total, desc="samples", unit="step", disable=not shown)
        bar.update()

    options: dict[str, Any] = {"steps": steps, "sampler": sampler, "eta": args.eta, "seed": args.seed}
    if sampler != "ode":
        calls = len(model.step_table(sampler, steps, args.eta))
        options["callback"] = advance
    device = next(model.parameters()).device
    try:
        for i, ids in batches.items():
            labels = conditions(model, ids.to(device), args.label, args.guidance)
            images = model.sample(len(ids), sample_ids=ids, **options, **labels).cpu()
            if wrong := int((~images.flatten(1).isfinite().all(1)).sum()):
                raise ValueError(
                    f"{args.checkpoint}: {wrong} of {len(ids)} images hold NaN or infinity, nothing was written"
                )
            yield i, images
            if bar and left:
                bar.n = calls * (total - left())
    finally:
        if bar:
            bar.close()


def sampler_of(args: argparse.Namespace, model: Diffusion) -> tuple[str, int | None]:
    """The sampler and its steps: those that are named, or what suits the formulation. None leaves the steps to it."""
    sampler, steps = suited(model)
    if args.steps is None and args.sampler in (None, sampler):
        return sampler, steps
    named = args.sampler or sampler
    return named, args.steps if named != "ddim" or args.steps else min(50, getattr(model, "timesteps", 50))


class Batches:
    """A folder with the files of a drawing until all are there. Batch i is drawn by process i modulo their number.

        npy           one array (N, C, H, W), put together from a file for each batch
        png           a folder of NUMBER.png
        webdataset    a folder of shards, one for each batch, of NUMBER.png and, with classes, NUMBER.cls

    Args:
        out: the array's file, or the folder.
        about: what the images depend on (JSON). A folder of another drawing is refused.
        batches: the numbers of the samples of each batch.
        ranks: the processes.
        kind: of FORMATS.

    Raises: ValueError if the folder is of another drawing; FileExistsError if `out` is a folder that is there.
    """

    def __init__(
        self, out: Path, about: dict[str, Any], batches: Sequence[Tensor], ranks: Ranks, kind: str = "npy"
    ) -> None:
        self.out, self.batches, self.ranks, self.kind = out, batches, ranks, kind
        self.folder = folder = out.with_name(f"{out.name}.parts")
        noted = folder / ABOUT
        if ranks.leads:
            if kind != "npy" and out.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(out))
            folder.mkdir(parents=True, exist_ok=True)
            if noted.exists() and json.loads(noted.read_text(encoding="utf-8")) != about:
                raise ValueError(f"{folder} holds images of another drawing: remove it, or choose another --out")
            write_json(noted, about)
        ranks.largest(0)  # the folder is there

    def missing(self) -> dict[int, Tensor]:
        """The batches of this process that no file holds yet."""
        own = range(self.ranks.rank, len(self.batches), self.ranks.size)
        return {i: self.batches[i] for i in own if not self._file(i).exists()}

    def left(self) -> int:
        """How many batches of all processes no file holds yet."""
        return sum(not self._file(i).exists() for i in range(len(self.batches)))

    def write(self, i: int, images: Tensor, labels: Tensor | None) -> None:
        """Write a batch (B, C, H, W), whose labels are (B,) or None."""
        if self.kind == "npy":
            with replacing(self._file(i)) as temporary, open(temporary, "wb") as file:
                np.save(file, images.numpy())
            return
        pictures = dict(zip(map(_key, self.batches[i].tolist()), encoded(images), strict=True))
        if self.kind == "webdataset":
            write_shard(self._file(i), pictures, None if labels is None else labels.tolist())
            return
        for key, picture in pictures.items():  # in order: the last one says that the batch is there
            with replacing(self.folder / f"{key}.png") as temporary:
                temporary.write_bytes(picture)

    def finish(self, first: int) -> Tensor:
        """Put the array together, or give the folder its name. One process calls it, when no batch is missing.

        Returns: the first images of an array, `first` of them at most; none of other formats, (0,).
        """
        if self.kind != "npy":
            os.replace(self.folder, self.out)
            (self.out / ABOUT).unlink()
            return torch.empty(0)
        arrays = [np.load(self._file(i), mmap_mode="r") for i in range(len(self.batches))]
        shape = (sum(len(array) for array in arrays), *arrays[0].shape[1:])
        with replacing(self.out) as temporary:
            joined = np.lib.format.open_memmap(temporary, mode="w+", dtype=arrays[0].dtype, shape=shape)
            at = 0
            for array in arrays:
                joined[at : at + len(array)] = array
                at += len(array)
            joined.flush()
            head = torch.from_numpy(np.array(joined[:first]))
            del joined
        self.discard()
        return head

    def discard(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, i: int) -> Path:
        """The last file of a batch."""
        if self.kind == "png":
            return self.folder / f"{_key(int(self.batches[i][-1]))}.png"
        return self.folder / (f"batch-{i:06d}.npy" if self.kind == "npy" else f"{i:06d}.tar")


def _key(number: int) -> str:
    """The name of a sample."""
    return f"{number:08d}"


def drawing_of(args: argparse.Namespace, model: Diffusion) -> dict[str, Any]:
    """What the images of `fastdiff sample` depend on: the weights, and the arguments but those that say where.

    Raises: ValueError if the images are of a shape that the format does not take.
    """
    shape: tuple[int, int, int] | None = model.model.sample_shape  # type: ignore[assignment]
    channels = shape[0] if shape else 0
    if args.format != "npy" and channels not in MODES:
        raise ValueError(f"--format: {args.format} takes images of 1 to 4 channels, got {channels}; use npy")
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(name.encode() + tensor.cpu().numpy().tobytes())
    given = {name: value for name, value in vars(args).items() if isinstance(value, str | int | float | None)}
    return {**given, "device": args.device.partition(":")[0], "weights": weights.hexdigest()}
