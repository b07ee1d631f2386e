"""Optional imports, and files that are written whole or not at all."""

import errno
import importlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def install(extra: str) -> str:
    """The command that installs an extra, from PyPI and in a clone."""
    return f"pip install 'fastdiff-kernels[{extra}]' (in a clone '.[{extra}]')"


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
        raise ImportError(f"{module} is not installed: {install(extra)}") from error


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Give an error of the system in the block the name of the file: a write names none."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary file beside `path`, which takes the place of `path` when the block ends without error.

    Its name is unique, and its mode is the one that the umask gives to new files, whatever the block does to it.

    Raises: OSError naming the file if the disk does not take it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    file = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        mode = os.fstat(file).st_mode & 0o777
    finally:
        os.close(file)
    try:
        with naming(path):
            yield temporary
            with open(temporary, "r+b") as written:
                os.fsync(written.fileno())  # the new bytes are on the disk before the name is
            os.chmod(temporary, mode)
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON, or leave the old file as it was. Raises: as `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def sweep(path: Path) -> None:
    """Remove the temporary files of `path`, also a pattern, that killed processes left. Hold a lock on its folder."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        with suppress(OSError):
            left.unlink()


# Locks that this process holds. A fork would hold them too, and longer than its parent if that is killed.
_held: set[int] = set()


def _let_go() -> None:
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold a lock on a folder. The system drops it when the process ends, and no file is left.

    Yields: True, or False where there are no locks: on Windows and some network file systems.
    Raises: BlockingIOError if somebody else holds the lock.
    """
    try:
        import fcntl
    except ImportError:
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    _held.add(handle)
    try:
        yield _lock(fcntl, handle, folder)
    finally:
        if handle in _held:
            _held.remove(handle)
            os.close(handle)


def _lock(fcntl: Any, handle: int, folder: Path) -> bool:
    """Whether the open folder is locked now. Raises BlockingIOError if somebody else holds it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(error.errno, "another training runs in this folder", str(folder)) from error
    except OSError:
        return False
    return True


def writable(path: str | Path) -> Path:
    """Make the folder of `path` and check that a file can be put there.

    Returns: `path`.
    Raises: OSError if no file can be written there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with tempfile.TemporaryFile(dir=path.parent):
        return path
