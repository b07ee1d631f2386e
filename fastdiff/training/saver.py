"""Checkpoints that are written while the training goes on: the loop stands still for a copy, and a thread writes it."""

import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import Tensor

from fastdiff.training.checkpoint import Snapshot, State, snapshot, write
from fastdiff.training.ranks import Ranks


class Saver:
    """Writes the checkpoints of a run, one after another. All processes of the run have one.

    At the end of a `with` block what is being written is on the disk, or its error is raised.

    Args:
        path: the file.
        keep: how many checkpoints of the run remain.
        ranks: the processes.
        shared: whether FSDP splits the network over them.
    """

    def __init__(self, path: Path, keep: int, ranks: Ranks, shared: bool) -> None:
        self._path, self._keep, self._ranks = path, keep, ranks
        # The threads talk about shares in a group of their own, while the loops exchange gradients.
        self._group: Any = dist.new_group(backend="gloo") if shared else None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._buffers: dict[str, Tensor] = {}

    def save(self, state: State) -> None:
        """Copy a state and begin to write it, after the one before.

        Raises: what writing that met.
        """
        self.wait()
        self._writing = self._thread.submit(self._write, snapshot(state, self._ranks, self._buffers))

    def check(self) -> None:
        """Raise what the last writing met, if it has ended."""
        if self._writing and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until all is written.

        Raises: ValueError if the weights are not finite; OSError if the disk does not take the file. The last good
            checkpoint is then as it was.
        """
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._thread.shutdown()
        try:
            self.wait()
        except Exception as met:
            if error is None:
                raise
            print(f"fastdiff: warning: no checkpoint was written: {met}", file=sys.stderr)

    def _write(self, taken: Snapshot) -> None:
        try:
            write(self._path, taken, self._keep, self._ranks, self._group)
        except ValueError as error:
            raise ValueError(f"{error} at step {taken.step}, nothing was written; try a lower --lr") from error
