"""Which implementation runs an op, see `backend`; and which tensors skip PyTorch's dispatcher, see `plain`."""

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]
from torch.compiler import is_compiling

from ..files import install
from ..support import transforms
from ..support.versions import warn_if_untested
from .memory import keep_freed_memory

# Imported from the start, so that it notices a fork.
importlib.import_module("..kernels.openmp", __package__)
uninterrupted = importlib.import_module("..kernels.uninterrupted", __package__).uninterrupted

warn_if_untested("torch", torch.__version__)

BACKENDS = ("triton", "cpu", "reference")
# The launchers of Triton kernels, by their file in kernels/.
TRITON = {
    "noise": ["normal_"],
    "noising": ["noising"],
    "loss": ["loss", "scale_"],
    "vlb": ["vlb"],
    "update": ["update"],
    "inner": ["inner"],
    "gate": ["gated_gelu"],
    "group_norm": ["norm", "norm_grad"],
    "layer_norm": ["layer_norm"],
    "rotate": ["rotate"],
}


def _checked(name: str | None) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or None, got {name!r}")
    return name


_forced = _checked(os.environ.get("FASTDIFF_BACKEND") or None)


def forced() -> str | None:
    """The backend that was chosen by `backend` or by the environment; None if the tensor decides."""
    return _forced


class backend:
    """Force "triton", "cpu" or "reference" for every op of the process, from here on or within a `with` block.

    None undoes it. By default CUDA and ROCm tensors run the Triton kernels. CPU tensors run the kernels compiled by
    numba (extra `[cpu]`), or the reference in plain PyTorch if numba is missing. float64 tensors and those of other
    devices always run the reference. The environment variable FASTDIFF_BACKEND sets the backend from the start.
    "triton" on CPU tensors needs Triton's interpreter (TRITON_INTERPRET=1). With that it is the default too; it is for
    verification only.

    Raises: ValueError for any other name.
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
    """The launchers of a backend by name, imported at first use.

    "cpu" has normal_, noising, loss, scale_ and update alone.
    """
    if name == "cpu":
        keep_freed_memory()
        return uninterrupted(lambda: importlib.import_module("..kernels.cpu", __package__))
    warn_if_untested("triton", importlib.import_module("triton").__version__)
    files = {file: importlib.import_module(f"..kernels.{file}", __package__) for file in TRITON}
    return SimpleNamespace(**{name: getattr(files[file], name) for file, names in TRITON.items() for name in names})


@functools.cache
def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels. Read once: Triton itself only reads the variable at import."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def has_numba() -> bool:
    """Whether the kernels for CPU tensors can be compiled; warns once if not."""
    if importlib.util.find_spec("numba") is None:
        reason = f"{install('cpu')} adds compiled kernels"
    else:
        try:
            launchers("cpu")
            return True
        except Exception as error:  # a broken installation may raise anything
            reason = f"numba cannot be imported ({type(error).__name__}: {error})"
    warnings.warn(f"fastdiff runs CPU tensors in plain PyTorch; {reason}", stacklevel=2)
    return False


def backend_of(x: Tensor) -> str:
    """The backend that x asks for: "triton", "cpu" or "reference"."""
    if x.dtype == torch.float64:
        return "reference"
    if _forced:
        return _forced
    if x.is_cuda or (x.is_cpu and interpreting()):
        return "triton"
    return "cpu" if x.is_cpu else "reference"  # MPS, XPU and others: nothing here is compiled for them


def kernels_of(x: Tensor) -> Any:
    """The launchers that serve x; None if the reference has to.

    Raises: ValueError if a forced backend cannot run on the device of x.
    """
    name = backend_of(x)
    if name == "reference":
        return None
    if name == "triton":
        if not (x.is_cuda or interpreting()):
            raise ValueError(f"backend: 'triton' expected a GPU tensor or TRITON_INTERPRET=1, got device {x.device}")
        return launchers(name)
    if x.device.type != "cpu":
        raise ValueError(f"backend: 'cpu' expected a CPU tensor, got device {x.device}")
    if _forced is None and not has_numba():
        return None
    kernels = launchers(name)
    return kernels if x.dtype in kernels.CODES else None


def compiled_for_cpu(x: Tensor) -> bool:
    """Whether kernels that are compiled for CPU tensors serve x, if they take its type."""
    return backend_of(x) == "cpu" and (_forced == "cpu" or has_numba())


_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_PLAIN = _TENSORS | {type(None), int, float, str, bool}


def unwatched() -> bool:
    """Whether no compilation, mode, transform of functorch, trace or profiler is active."""
    return (
        not is_compiling()
        and _len_torch_dispatch_stack() == 0
        and _len_torch_function_stack() == 0
        and not transforms.active()
        and _get_tracing_state() is None
        and not _profiler_enabled()
    )


def plain(args: tuple[Any, ...]) -> bool:
    """Whether nothing but the op itself needs to see this call, whose first argument is a tensor.

    Nothing watches it. Its tensors lie on a CPU or GPU, and are no subclasses, views that negate, or zeros without
    memory.
    """
    return (
        unwatched()
        and _PLAIN.issuperset(map(type, args))
        and (args[0].is_cuda or args[0].is_cpu)
        and not any(a.is_neg() or a._is_zerotensor() for a in args if type(a) in _TENSORS)
    )


def launcher(name: str, x: Tensor) -> Callable[..., Any] | None:
    """The launcher `name` of the backend that serves x, on the device of x; None if the reference has to run."""
    launch = getattr(kernels_of(x), name, None)
    if launch is not None and x.is_cuda and x.get_device() != torch._C._cuda_getDevice():
        return functools.partial(_on_device, x.device, launch)
    return launch


def _on_device(device: torch.device, launch: Callable[..., Any], **operands: Any) -> Any:
    """Triton launches on the current device, which need not be the tensor's."""
    with torch.cuda.device(device):
        return launch(**operands)
