"""Which implementation runs an op: see `backend`."""

import os

BACKENDS = ("triton", "cpu", "reference")


def _checked(name: str | None) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or None, got {name!r}")
    return name


_forced = _checked(os.environ.get("FASTDIFF_BACKEND") or None)


def forced() -> str | None:
    return _forced


class backend:
    """Force "triton", "cpu" or "reference" for every op of the process from here on, or within a `with` block; None
    undoes it.

    By default CUDA and ROCm tensors run the Triton kernels, and CPU tensors the kernels compiled by numba (extra
    `[cpu]`), or the reference in plain PyTorch where numba is missing; float64 tensors always run the reference. The
    environment variable FASTDIFF_BACKEND sets it from the start. "triton" on CPU tensors needs Triton's interpreter
    (TRITON_INTERPRET=1), which then is the default too and is for verification only. ValueError for any other name.
    """

    def __init__(self, name: str | None) -> None:
        global _forced
        _checked(name)
        self.before, _forced = _forced, name

    def __enter__(self) -> "backend":
        return self

    def __exit__(self, *error: object) -> None:
        global _forced
        _forced = self.before
