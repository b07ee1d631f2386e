"""A file of decoded images, memory-mapped: what was decoded once is read from there."""

import errno
import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdiff.training.data.sources import Source


class Cached:
    """A source whose items are kept, as uint8, in a file that all processes map and that later runs find again.

    The file has a byte for each item, whether it is there, and then the items. It fills as they are read.

    Args:
        source: of uint8 items.
        folder: where the file is; its name is a hash of the items' names and shape, and of the size and time
            of their files.

    Raises: OSError if the disk has no room for all items.
    """

    def __init__(self, source: Source, folder: str | Path) -> None:
        self._source, count, size = source, len(source), int(np.prod(source.shape))
        self.shape, self.white, self.labels, self.classes = source.shape, source.white, source.labels, source.classes
        key = hashlib.sha256(repr((count, source.shape)).encode())
        for index in range(count):
            about = f"{source.name(index)}\0{source.stamp(index)}\0"
            key.update(about.encode("utf-8", "surrogateescape"))
        path = Path(folder) / f"cache-{key.hexdigest()[:16]}.uint8"
        length = count * (1 + size)
        if not path.exists() or path.stat().st_size < length:
            path.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(path.parent).free < length:
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, the cache takes {length:,} bytes", str(path))
            _reserve(path, length)
        self._there = np.memmap(path, np.uint8, "r+", 0, (count,))
        self._items = np.memmap(path, np.uint8, "r+", count, (count, *source.shape))

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> Tensor:
        if self._there[index]:
            return torch.from_numpy(np.array(self._items[index]))
        item = self._source.read(index)
        self._items[index] = item.numpy()
        self._there[index] = 1  # last: another process that sees it finds the whole item
        return item

    def name(self, index: int) -> str:
        return self._source.name(index)

    def stamp(self, index: int) -> str:
        return self._source.stamp(index)


def _reserve(path: Path, length: int) -> None:
    """Make a file of zeros whose room on the disk is taken, so that a later write cannot fail."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, length)
        else:
            os.truncate(file, length)
    except OSError as error:
        os.unlink(path)
        raise OSError(error.errno, f"{error.strerror}, the cache takes {length:,} bytes", str(path)) from error
    finally:
        os.close(file)
