"""Packages that a machine without a network lacks: wheels in the folder wheels/, which git ignores."""

import os
import sys
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
