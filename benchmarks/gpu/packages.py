"""What a lent machine may lack: packages, as wheels in the folder wheels/, which git ignores; tools; a home."""

import os
import shutil
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WHEELS = Path(__file__).parent / "wheels"


@contextmanager
def on_path(folder: Path = WHEELS) -> Iterator[None]:
    """Put the pure Python wheels of a folder on the path of this process and of those that it starts."""
    wheels = sorted(folder.glob("*-none-any.whl"))
    if not wheels:
        yield
        return
    before = os.environ.get("PYTHONPATH")
    with tempfile.TemporaryDirectory() as unpacked:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(unpacked)
        sys.path.insert(0, unpacked)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (unpacked, before)))
        try:
            yield
        finally:
            sys.path.remove(unpacked)
            if before is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = before


@contextmanager
def with_home() -> Iterator[None]:
    """Triton compiles into a folder of the user's home. Where that cannot be written it gets one for this time."""
    if os.access(Path("~").expanduser(), os.W_OK) or {"TRITON_HOME", "TRITON_CACHE_DIR"} & os.environ.keys():
        yield
        return
    with tempfile.TemporaryDirectory() as home:
        os.environ["TRITON_HOME"] = home
        try:
            yield
        finally:
            del os.environ["TRITON_HOME"]


def lacking() -> str | None:
    """The tools that are not there, of those that some rows need; None if all are. No kernel starts without the first
    two: Triton compiles its launchers in C."""
    found = {
        "a C compiler": os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"),
        "Python.h": (Path(sysconfig.get_path("include")) / "Python.h").exists(),
        "compute-sanitizer": shutil.which("compute-sanitizer"),
        "nvidia-smi": shutil.which("nvidia-smi"),
    }
    return ", ".join(name for name, there in found.items() if not there) or None
