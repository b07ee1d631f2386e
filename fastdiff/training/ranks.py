"""The processes of a run: what each is, and what they tell each other.

torchrun, accelerate and SLURM's launchers start processes and tell each by RANK, WORLD_SIZE and LOCAL_RANK who it is.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Names that torch.distributed exports, though mypy does not see it.
distributed: Any = dist
# A process that waits this long for another's gradients, or to find it, gives up.
PATIENCE = timedelta(minutes=10)
# Before that, after so many seconds, it says that it waits.
ANNOUNCE = 30.0
# A process waits this long for another that may draw or write. One that has died is noticed at once.
LONG = timedelta(days=1)
# After an error, a process looks this long for the others.
GRACE = timedelta(seconds=10)
# Gloo's threads free the tensors of the last operations a little later, and need Python's lock for that. Whoever ends a
# group holds the lock and waits for the threads, for ever if they still wait for it. So they get this long first.
QUIET = 0.2
# The key under which processes that failed are counted.
FAILED = "fastdiff/failed"


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run.

    Args:
        rank: its number, 0 for the one that writes and prints.
        size: how many there are.
        patient: the group of torch.distributed in which they wait for each other.
    """

    rank: int = 0
    size: int = 1
    patient: Any = None

    @property
    def leads(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def part(self, start: int, stop: int) -> slice:
        """The share of this process in the numbers start..stop-1, one behind the other in the order of the ranks."""
        count = stop - start
        return slice(start + count * self.rank // self.size, start + count * (self.rank + 1) // self.size)

    def check_passes(self, batch_size: int, accumulate: int) -> None:
        """Raise ValueError unless every process has an image in every pass."""
        passes = accumulate * self.size
        if batch_size < passes:
            raise ValueError(
                f"batch_size: expected at least {passes}, one image for each of {self.size} processes in each of "
                f"{accumulate} passes, got {batch_size}"
            )

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, number: int) -> int:
        """The largest number that a process has. It waits for the other processes, and not for the device."""
        if self.size == 1:
            return number
        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.patient)
        return int(value)

    def gathered(self, parts: Mapping[int, Any]) -> list[Any]:
        """What all processes have, in the order of its numbers, on the one that writes; nothing elsewhere."""
        every: Any = [dict(parts)]
        if self.size > 1:
            every = [None] * self.size if self.leads else None
            distributed.gather_object(dict(parts), every)
        found = {number: part for one in every or () for number, part in one.items()}
        return [found[number] for number in sorted(found)]

    def share(self, network: nn.Module) -> None:
        """Give all processes the weights of the first one: a run may write others while they read."""
        for tensor in network.state_dict().values() if self.size > 1 else ():
            dist.broadcast(tensor, 0)

    def agree(self, name: str, number: int) -> None:
        """Raise ValueError naming what differs unless all processes have the same number."""
        low, high = -self.largest(-number), self.largest(number)
        if low != high:
            raise ValueError(
                f"{name}: expected the same in all processes, got {low} to {high}; do they share a file system?"
            )


ALONE = Ranks()


@contextmanager
def joined(device: torch.device, *, alone_too: bool = False) -> Iterator[Ranks]:
    """Be one of the processes that a launcher started, or of a group that exists; else be alone.

    Args:
        device: where this process computes; NCCL connects GPUs, gloo CPUs.
        alone_too: make a group of one process, which FSDP needs.

    Raises: ValueError if the launcher's variables are no numbers.
    """
    if dist.is_initialized():
        ranks = Ranks(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=LONG))
        yield ranks
        _end(ranks, ranks.patient)
        return
    size = launched("WORLD_SIZE", 1)
    if size == 1 and not alone_too:
        yield Ranks()
        return
    with waiting(ANNOUNCE):
        if size == 1:
            store, rank = distributed.HashStore(), 0
        else:
            store, rank, size = next(distributed.rendezvous("env://", timeout=PATIENCE))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        global _store
        _store = store
        ranks = Ranks(rank, size, dist.new_group(backend="gloo", timeout=LONG))
    yield ranks
    _end(ranks, None)
    _store = None


def _end(ranks: Ranks, group: Any) -> None:
    """End a group, or all if None. After an error others may be waiting: then the end of the process ends it."""
    dist.barrier(ranks.patient)
    time.sleep(QUIET)
    dist.destroy_process_group(group)


_store: Any = None


@contextmanager
def waiting(seconds: float) -> Iterator[None]:
    """Within the block, which waits for other processes in PyTorch's own code, SIGINT ends this one at once.

    If it takes longer than some seconds, a line on stderr says so: a process that never started tells nobody.
    """
    place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    size, minutes = launched("WORLD_SIZE", 1), PATIENCE.seconds // 60
    line = f"fastdiff: waiting for all of the {size} processes at {place}, {minutes} minutes at most"
    timer = threading.Timer(seconds, print, (line,), {"file": sys.stderr})
    timer.daemon = True
    timer.start()
    ours = threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.SIG_DFL) if ours else None
    try:
        yield
    finally:
        timer.cancel()
        if ours:
            signal.signal(signal.SIGINT, before)


def launched(name: str, default: int) -> int:
    """A number that a launcher put into the environment. Raises ValueError if it is no number."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise ValueError(f"{name}: expected a number in the environment, got {text!r}")
    return int(text)


def leads() -> bool:
    """Whether this process is the one of its run that prints."""
    return launched("RANK", 0) == 0


def speaks() -> bool:
    """Whether this process is the one of its run that says what failed: the first one that fails."""
    try:
        if launched("WORLD_SIZE", 1) == 1:
            return True
        store = _store or next(distributed.rendezvous("env://", timeout=GRACE))[0]
        return int(store.add(FAILED, 1)) == 1
    except (RuntimeError, ValueError):  # the store went with the process that held it
        return True


def lost_another(error: BaseException) -> bool:
    """Whether an error says that another process of the run has ended, or does not answer."""
    by_gloo = type(error) is RuntimeError and any(said in str(error) for said in ("by peer", "Timed out waiting"))
    return by_gloo or isinstance(error, dist.DistBackendError | dist.DistNetworkError)


def local_device(device: torch.device) -> torch.device:
    """The GPU of this process on its machine for "cuda", else the device as it is."""
    if device.type != "cuda" or device.index is not None or "LOCAL_RANK" not in os.environ:
        return device
    torch.cuda.set_device(launched("LOCAL_RANK", 0))
    return torch.device("cuda", launched("LOCAL_RANK", 0))
