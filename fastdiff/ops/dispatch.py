"""Which implementation runs an op: see `backend`."""

import functools
import importlib
import importlib.util
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .memory import keep_freed_memory

# From the start, so that it notices a fork.
importlib.import_module("..kernels.openmp", __package__)

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


@functools.cache
def launchers(name: str) -> Any:
    """The launchers normal_, noising, loss, scale_ and update of a backend, and vlb, norm and norm_grad but for "cpu",
    imported at first use."""
    if name == "cpu":
        keep_freed_memory()
        return importlib.import_module("..kernels.cpu", __package__)
    noise, noising, loss, vlb, update, group_norm = (
        importlib.import_module(f"..kernels.{file}", __package__)
        for file in ("noise", "noising", "loss", "vlb", "update", "group_norm")
    )
    return SimpleNamespace(
        normal_=noise.normal_,
        noising=noising.noising,
        loss=loss.loss,
        scale_=loss.scale_,
        vlb=vlb.vlb,
        update=update.update,
        norm=group_norm.norm,
        norm_grad=group_norm.norm_grad,
    )


@functools.cache
def interpreting() -> bool:
    """Of the first op: Triton itself looks once, when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def has_numba() -> bool:
    found = importlib.util.find_spec("numba") is not None
    if not found:
        warnings.warn(
            "fastdiff runs CPU tensors in plain PyTorch; pip install fastdiff[cpu] adds compiled kernels", stacklevel=2
        )
    return found


def kernels_of(x: Tensor) -> Any:
    """The launchers that serve x, or None for the reference."""
    name = forced()
    if x.dtype == torch.float64 or name == "reference":
        return None
    if name is None:
        if x.is_cuda or interpreting():
            name = "triton"
        elif has_numba():
            name = "cpu"
        else:
            return None
    if name == "triton" and not (x.is_cuda or interpreting()):
        raise ValueError(f"backend: 'triton' expected a GPU tensor or TRITON_INTERPRET=1, got device {x.device}")
    if name == "cpu":
        if x.device.type != "cpu":
            raise ValueError(f"backend: 'cpu' expected a CPU tensor, got device {x.device}")
        kernels = launchers(name)
        return kernels if x.dtype in kernels.CODES else None
    return launchers(name)


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()
