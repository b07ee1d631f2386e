"""Many samples: drawn batch by batch by any number of processes, kept batch by batch, and put together at the end.

Sample i of a seed is the same noise everywhere. A network's rounding depends on the batch, so a batch is never split:
it gives the same bytes whichever process draws it, and a drawing that was killed goes on with what is missing.
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.diffusion import Diffusion
from fastdiff.files import replacing
from fastdiff.training.ranks import Ranks

# What a folder of batches notes of the drawing that it is of.
ABOUT = "drawing.json"


class Batches:
    """A folder with a file for each batch of a drawing.

    Args:
        array: the .npy file that is to hold all images; the folder is beside it.
        about: what the images depend on (JSON). A folder of another drawing is refused.
        ranks: the processes; batch i is drawn by process i modulo their number.

    Raises: ValueError if the folder is of another drawing.
    """

    def __init__(self, array: Path, about: dict[str, Any], ranks: Ranks) -> None:
        self.array, self.ranks = array, ranks
        self.folder = folder = array.with_name(f"{array.name}.parts")
        noted = folder / ABOUT
        if ranks.leads:
            folder.mkdir(parents=True, exist_ok=True)
            if noted.exists() and json.loads(noted.read_text(encoding="utf-8")) != about:
                raise ValueError(f"{folder} holds images of another drawing: remove it, or choose another --out")
            with replacing(noted) as temporary:
                temporary.write_text(json.dumps(about), encoding="utf-8")
        ranks.largest(0)  # the folder is there

    def missing(self, count: int) -> list[int]:
        """The batches of this process, of `count` in all, that no file holds yet."""
        return [i for i in range(self.ranks.rank, count, self.ranks.size) if not self._file(i).exists()]

    def draw(self, numbers: Sequence[Tensor], one: Callable[[Tensor], Tensor]) -> None:
        """Draw what is missing, and wait for the other processes.

        Args:
            numbers: of the samples of each batch.
            one: draws a batch, (B, ...) on the CPU. A ValueError of it removes the folder.
        """
        for i in self.missing(len(numbers)):
            try:
                images = one(numbers[i])
            except ValueError:
                shutil.rmtree(self.folder, ignore_errors=True)
                raise
            write_array(self._file(i), images)
        self.ranks.largest(0)

    def join(self, count: int, first: int) -> Tensor:
        """Write the images of `count` batches into the array's file, and remove the folder.

        Returns: the first images, `first` of them at most.
        """
        files = [self._file(i) for i in range(count)]
        arrays = [np.load(file, mmap_mode="r") for file in files]
        shape = (sum(len(array) for array in arrays), *arrays[0].shape[1:])
        with replacing(self.array) as temporary:
            joined = np.lib.format.open_memmap(temporary, mode="w+", dtype=arrays[0].dtype, shape=shape)
            at = 0
            for array in arrays:
                joined[at : at + len(array)] = array
                at += len(array)
            joined.flush()
            head = torch.from_numpy(np.array(joined[:first]))
            del joined
        shutil.rmtree(self.folder, ignore_errors=True)
        return head

    def _file(self, i: int) -> Path:
        return self.folder / f"batch-{i:06d}.npy"


def write_array(path: Path, images: Tensor) -> None:
    """Write a .npy file, or leave the old one as it was."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, images.numpy())


def drawing_of(args: argparse.Namespace, model: Diffusion) -> dict[str, Any]:
    """What the images of `fastdiff sample` depend on: the weights, and the arguments but those that say where."""
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(name.encode() + tensor.cpu().numpy().tobytes())
    given = {name: value for name, value in vars(args).items() if isinstance(value, str | int | float | None)}
    return {**given, "device": args.device.partition(":")[0], "weights": weights.hexdigest()}
