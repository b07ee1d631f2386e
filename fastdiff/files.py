"""Optional imports, and files that are written whole or not at all."""

import errno
import importlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def need(module: str, extra: str = "train") -> Any:
    """Import an optional dependency.

    Args:
        module: the name to import.
        extra: the extra of this package that installs it.

    Raises: ImportError with the command that installs the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is not installed: pip install 'fastdiff-kernels[{extra}]'") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, which takes the place of `path` when the block ends without error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())  # the new bytes are on the disk before the name is
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def writable(path: Path) -> Path:
    """Make the folder of `path` and check that a file can be put there.

    Returns: `path`.
    Raises: OSError if no file can be written there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with tempfile.TemporaryFile(dir=path.parent):
        return path
