"""A driver for Triton on a machine without a GPU: the whole path of a launch, on tensors of the CPU."""

import ctypes
import importlib
import os
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def without_gpu(folder: Path, capability: tuple[int, int] = (9, 0)) -> ctypes.CDLL:
    """Let Triton launch on CPU tensors, through a driver that does nothing; it is built in the folder.

    Args:
        capability: that of the GPU for which Triton compiles: 9, 0 is an H100.

    Returns: the driver, see host_driver.c.
    """
    os.environ.pop("TRITON_INTERPRET", None)
    library, source = folder / "libcuda.so.1", Path(__file__).with_name("host_driver.c")
    headers = Path(find_spec("triton").origin).parent / "backends" / "nvidia" / "include"  # type: ignore
    build = ["gcc", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{headers}"]
    subprocess.run([*build, str(source), "-o", str(library)], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    class Driver(CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device: capability

    driver.set_active(Driver())

    # What tells a GPU's tensor from a CPU's, at the price that it has on a GPU.
    dispatch: Any = importlib.import_module("fastdiff.ops.dispatch")
    dispatch.interpreting = lambda: True
    for file in ("launch", *dispatch.TRITON):
        kernels: Any = importlib.import_module(f"fastdiff.kernels.{file}")
        kernels.on_nvidia = lambda x: True
    quick: Any = importlib.import_module("fastdiff.ops.quick")
    here, stream = (lambda: -1), (lambda device: 0)
    quick.on_gpu = lambda x: x.is_cpu
    quick.stream_of = lambda x: stream(device) if x.is_cpu and (device := x.get_device()) == here() else None
    return loaded


def unchecked() -> None:
    """No operation looks at the values of its indices from here on, as on a GPU."""
    dispatch: Any = importlib.import_module("fastdiff.ops.dispatch")
    for file in dispatch.TRITON:
        op: Any = importlib.import_module(f"fastdiff.ops.{file}")
        op.check_range = lambda name, index, end: index is not None and index.is_cuda
