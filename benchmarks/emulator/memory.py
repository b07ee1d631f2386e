"""Memory of the machine, and who touched what: accesses outside, misaligned ones, races, and reads of nothing.

A race is two accesses of one cell by two warps, one of them a write of something else, that nothing puts in order: the
warps are of two programs, or no barrier is between the accesses.
"""

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[Any]
NAMES = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
EPOCHS = 1 << 20  # more than the barriers of a program
SEVERAL = -1  # in place of a warp, or of the time of its program


class Fault(RuntimeError):
    """What compute-sanitizer would report."""


class Range:
    """Bytes from `start` to `end`, in cells of `grain` bytes.

    Of each cell: the warp that wrote it last and when, a warp that read it and when. A time is a number of a program's
    barrier; times of two programs differ. 0 is nobody and never.

    Threads of one warp may write different values into a cell of shared memory at once. CUDA keeps any of them, here
    the last; `ties` counts the others.
    """

    def __init__(self, start: int, end: int, grain: int, data: NDArray[np.uint8], known: bool) -> None:
        self.start, self.end, self.grain, self.known = start, end, grain, known
        self.first = start - start % 16  # where `data` begins
        self.views = {size: data.view(kind) for size, kind in NAMES.items()}
        cells = len(data) // grain
        self.writer, self.wrote, self.reader, self.read_at = (np.zeros(cells, np.int64) for _ in range(4))
        self.ties = 0

    @classmethod
    def of_host(cls, start: int, end: int, grain: int) -> "Range":
        """Memory of this process."""
        first, last = start - start % 16, end + -end % 16
        memory = memoryview((ctypes.c_char * (last - first)).from_address(first)).cast("B")
        return cls(start, end, grain, np.frombuffer(memory, np.uint8), True)

    @classmethod
    def empty(cls, size: int, grain: int) -> "Range":
        """New memory, which holds nothing to be read yet."""
        return cls(0, size, grain, np.zeros(size + -size % 16, np.uint8), False)

    def _cells(self, at: Ints, warps: Ints, times: Ints, size: int) -> tuple[Ints, Ints, Ints]:
        count = max(1, size // self.grain)
        cells = ((at - self.first) // self.grain)[:, None] + np.arange(count)
        return cells.ravel(), np.repeat(warps, count), np.repeat(times, count)

    def read(self, at: Ints, warps: Ints, times: Ints, size: int) -> Ints:
        cells, warps, times = self._cells(at, warps, times, size)
        writer, wrote = self.writer[cells], self.wrote[cells]
        if not self.known and not wrote.all():
            raise Fault("reads shared memory that nobody wrote")
        if (_unordered(wrote, times) & (writer != warps) & (wrote != 0)).any():
            raise Fault("reads what another warp wrote, with no barrier between")
        before, then = self.reader[cells], self.read_at[cells]
        later = (before == 0) | (before == warps) | ((then // EPOCHS == times // EPOCHS) & (then < times))
        elsewhere = (then != 0) & (then // EPOCHS != times // EPOCHS)
        self.reader[cells] = np.where(later & ~elsewhere, warps, SEVERAL)
        self.read_at[cells] = np.where(elsewhere, SEVERAL, times)
        # Warps that read a cell together: the last of them was noted.
        together = (self.reader[cells] != warps) & (self.reader[cells] != SEVERAL)
        self.reader[cells[together]] = SEVERAL
        together = (self.read_at[cells] // EPOCHS != times // EPOCHS) & (self.read_at[cells] != SEVERAL)
        self.read_at[cells[together]] = SEVERAL
        return self.views[size][(at - self.first) // size]

    def write(self, at: Ints, value: Ints, warps: Ints, times: Ints, size: int) -> None:
        cells, warps, times = self._cells(at, warps, times, size)
        reader, read_at, writer, wrote = (a[cells] for a in (self.reader, self.read_at, self.writer, self.wrote))
        if (_unordered(read_at, times) & (reader != warps) & (read_at != 0)).any():
            raise Fault("writes what another warp read, with no barrier between")
        view, place = self.views[size], (at - self.first) // size
        other = (_unordered(wrote, times) & (writer != warps) & (wrote != 0)).reshape(len(at), -1).any(1)
        different = other & (view[place] != value)
        view[place], self.writer[cells], self.wrote[cells] = value, warps, times
        lost = view[place] != value
        elsewhere = (self.writer[cells] != warps).reshape(len(at), -1).any(1)
        if (different | (lost & (self.known | elsewhere))).any():
            raise Fault("writes what another thread wrote, another value, with no barrier between")
        self.ties += int(lost.sum())


def _unordered(then: Ints, now: Ints) -> Ints:
    """Whether no barrier stands between two times: they are of two programs, or the same."""
    return (then == now) | (then // EPOCHS != now // EPOCHS)


class Memory:
    """Several ranges: the tensors of a launch, or one, the shared memory of its programs."""

    def __init__(self, ranges: list[Range]) -> None:
        self.ranges = sorted(ranges, key=lambda r: r.start)
        self.starts = np.array([r.start for r in self.ranges], np.int64)

    def _split(self, at: Ints, size: int, aligned: int) -> list[tuple[Range, Any]]:
        """The ranges of addresses (n, elements), and which of them lie in each."""
        if (at[:, 0] % aligned).any():
            raise Fault(f"an access of {aligned} bytes at an address that is no multiple of them")
        place = np.searchsorted(self.starts, at, "right") - 1
        found = []
        for i in np.unique(place):
            mine = at if (whole := (place == i).all()) else at[place == i]
            if i < 0 or mine.max() + size > self.ranges[i].end:
                bad = mine if i < 0 else mine[mine + size > self.ranges[i].end]
                raise Fault(f"{len(bad.ravel())} of {at.size} elements lie outside the memory of the launch")
            found.append((self.ranges[i], ... if whole else place == i))
        return found

    def read(self, at: Ints, who: tuple[Ints, Ints], size: int, aligned: int) -> Ints:
        """The elements of `size` bytes at addresses (n, elements); who: warps and their times, (n,)."""
        warps, times = (np.broadcast_to(w[:, None], at.shape) for w in who)
        value = np.empty(at.shape, NAMES[size])
        for part, mine in self._split(at, size, aligned):
            places, by, when = (a[mine].ravel() for a in (at, warps, times))
            value[mine] = part.read(places, by, when, size).reshape(value[mine].shape)
        return value

    def write(self, at: Ints, value: Ints, who: tuple[Ints, Ints], size: int, aligned: int) -> None:
        warps, times = (np.broadcast_to(w[:, None], at.shape) for w in who)
        for part, mine in self._split(at, size, aligned):
            places, given, by, when = (a[mine].ravel() for a in (at, value, warps, times))
            part.write(places, given, by, when, size)
