"""Batches by their step: which images it sees, flipped or not, and with which labels. Workers read them ahead."""

import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastdiff.support.errors import reason
from fastdiff.support.scalars import as_count, as_integer, as_share
from fastdiff.training.data.order import FLIP, LABEL, draws, shuffled
from fastdiff.training.data.sources import Source, finite, scaled

# Items that are drawn at a time, at most, in the place of one that cannot be read.
SUBSTITUTES = 64
# Items that a process remembers as unreadable.
REMEMBERED = 2**16


class Batch(NamedTuple):
    """What a step trains on.

    images: float32 (B, ...).
    labels: int64 (B,), or None without classes; the number of classes stands for "no label".
    """

    images: Tensor
    labels: Tensor | None

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device, without waiting for it."""
        return Batch(*(None if x is None else x.to(device, non_blocking=True) for x in self))  # type: ignore[arg-type]


class Item(NamedTuple):
    """What a worker reads: an image by its number, mirrored or not, for a global sample number."""

    number: int
    flipped: bool
    sample: int


@dataclass(frozen=True)
class Reader:
    """The dataset of a DataLoader. An item that cannot be read is replaced by one that can, drawn by the sample number.

    The next one would not do: behind a folder of texts one image would be seen in place of each of them.

    What is no image, as a text beside one, is opened once. What the system or a network did not read may be there in
    the next epoch.
    """

    source: Source
    unreadable: dict[int, str] = field(default_factory=dict)

    def __getitems__(self, items: Sequence[Item]) -> tuple[Tensor, list[int], dict[int, str]]:
        """(the stacked values, the number of each item that was read, why others were not)."""
        values, numbers, skipped = [], [], {}
        for item in items:
            for number in self._candidates(item):
                if number in self.unreadable:
                    skipped[number] = self.unreadable[number]
                    continue
                try:
                    value = finite(self.source, number)
                except Exception as error:  # decoders of broken files raise whatever they meet
                    skipped[number] = reason(error)
                    if is_lasting(error) and len(self.unreadable) < REMEMBERED:
                        self.unreadable[number] = skipped[number]
                else:
                    values.append(value.flip(-1) if item.flipped else value)
                    numbers.append(number)
                    break
            else:
                return torch.empty(0), [], skipped
        return torch.stack(values), numbers, skipped

    def _candidates(self, item: Item) -> Iterator[int]:
        """The item, and then all of the source in an order of the sample's own."""
        yield item.number
        size, first, many = len(self.source), 0, 1
        while first < size:
            yield from shuffled(np.arange(first, min(first + many, size)), size, item.sample).tolist()
            first, many = first + many, min(2 * many, SUBSTITUTES)


class Stream:
    """Batches of a source in a random order that is a function of (seed, epoch, sample number) alone.

    Step k has the global sample numbers k B to k B + B - 1. So a run that goes on sees the batches that it would have
    seen, and many processes that share a step see those of one.

    Args:
        source: the data.
        batch_size: B, of all processes together.
        seed: of the order, the flips and the dropped labels.
        flip: mirror half of the images, drawn by the seed, left to right.
        label_dropout: the share of labels that is replaced by "no label", the number of classes.
        workers: processes that read ahead; 0 reads in this one.
        warn: told (name, reason, how many so far) of each item that cannot be read.

    Attributes:
        skipped: the items that could not be read so far, by number, and why.

    Raises: TypeError or ValueError, naming the argument.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int = 0,
        *,
        flip: bool = False,
        label_dropout: float = 0.0,
        workers: int = 0,
        warn: Callable[[str, str, int], None] | None = None,
    ) -> None:
        if not hasattr(source, "read"):
            raise TypeError(f"source: expected one of fastdiff.data, such as Arrays, got {type(source).__name__}")
        as_count("batch_size", batch_size)
        as_integer("seed", seed, -(2**63), 2**64 - 1)
        as_integer("workers", workers, 0, 2**15)
        as_share("label_dropout", label_dropout)
        self.source, self.batch_size, self.seed, self.flip = source, batch_size, seed, flip
        self.label_dropout, self.workers, self.warn = label_dropout, workers, warn
        self.skipped: dict[int, str] = {}
        self._reader = Reader(source)

    def __len__(self) -> int:
        """How many items the source has."""
        return len(self.source)

    def batch(self, step: int, part: range | slice | None = None) -> Batch:
        """The batch of a step, read in this process; as in `batches`."""
        numbers = self._numbers(step, part)
        return self._batch(numbers, self._reader.__getitems__(self._items(numbers)))

    def batches(self, start: int = 0, parts: Sequence[range | slice] | None = None) -> Generator[Batch]:
        """The batches from step `start` on, without end.

        Args:
            start: the first step.
            parts: the ranges of samples of each step, within 0 to B - 1, that this process sees; a batch for each. None
                is all in one.

        Raises: ValueError if nothing can be read; OSError if a worker ends.
        """
        every = parts or [range(self.batch_size)]
        if self.workers == 0:
            yield from (self.batch(step, part) for step in count(start) for part in every)
        loader: DataLoader[Any] = DataLoader(
            self._reader,  # type: ignore[arg-type]
            batch_sampler=map(self._items, self._asked(start, every)),
            collate_fn=_same,  # the dataset has stacked them
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_leave_signals,
            generator=torch.Generator(),  # else it draws from the default one, and a run that goes on differs
        )
        try:
            for numbers, values in zip(self._asked(start, every), loader, strict=False):
                yield self._batch(numbers, values)
        except RuntimeError as error:  # the loader's own: a worker was killed, or had no memory
            raise OSError(f"data: a process that reads images has ended: {reason(error)}") from error

    def _asked(self, start: int, parts: Sequence[range | slice]) -> Iterator[np.ndarray]:
        """The global sample numbers of one batch after another."""
        return (self._numbers(step, part) for step in count(start) for part in parts)

    def _numbers(self, step: int, part: range | slice | None) -> np.ndarray:
        """The global sample numbers of a part of a step."""
        part = range(self.batch_size) if part is None else part
        if not 0 <= part.start <= part.stop <= self.batch_size:
            raise ValueError(f"part: expected a range within 0 to {self.batch_size}, got {part}")
        first = as_integer("step", step, 0, 2**62 // self.batch_size) * self.batch_size
        return first + np.arange(part.start, part.stop)

    def _items(self, numbers: np.ndarray) -> list[Item]:
        """What to read for these sample numbers."""
        indices = shuffled(numbers, len(self.source), self.seed).tolist()
        flips = draws(self.seed, FLIP, numbers) < 0.5 if self.flip else np.zeros(len(numbers), bool)
        return [Item(*item) for item in zip(indices, flips.tolist(), numbers.tolist(), strict=True)]

    def _batch(self, numbers: np.ndarray, read: tuple[Tensor, list[int], dict[int, str]]) -> Batch:
        """The batch of what was read, after a word about what could not be."""
        values, indices, skipped = read
        for index, why in skipped.items():
            if index not in self.skipped:
                self.skipped[index] = why
                if self.warn:
                    self.warn(self.source.name(index), why, len(self.skipped))
        if not indices:
            first, why = next(iter(skipped.items()))
            raise ValueError(
                f"data: no readable image among the {len(self.source)} files, as {self.source.name(first)}: {why}"
            )
        labels = None
        if self.source.labels is not None and self.source.classes is not None:
            dropped = draws(self.seed, LABEL, numbers) < self.label_dropout
            kept = np.where(dropped, len(self.source.classes), self.source.labels[indices])
            labels = torch.from_numpy(kept)
        return Batch(scaled(values, self.source.white), labels)


def is_lasting(error: Exception) -> bool:
    """Whether another try would fail too: the content is at fault, not the system or a network. The first is PIL's."""
    return type(error).__name__ == "UnidentifiedImageError" or isinstance(error, ValueError)


def _same(read: Any) -> Any:
    return read


def _leave_signals(_: int) -> None:
    """A worker leaves signals to its parent, which saves the run and ends the workers."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
