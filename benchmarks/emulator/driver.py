"""Triton's launches on tensors of the CPU, by a driver that executes the PTX of what is launched."""

import ctypes
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..without_gpu import without_gpu
from .machine import execute
from .memory import Fault, Memory, Range
from .ptx import parse

# The start of CUlaunchConfig: the grid, the block, and the bytes of shared memory.
CONFIG = struct.Struct("7I")
LAUNCHED = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))
FAILED = 719  # CUDA_ERROR_LAUNCH_FAILED


class Emulator:
    """Executes every launch of this process, from here on.

    launches: how many of each kernel; instructions: how many its warps executed; ties: see memory.py.
    """

    def __init__(self, target: str) -> None:
        """Args: what is compiled for, such as sm_90."""
        from triton import knobs

        number = int(target.removeprefix("sm_"))
        self.folder = tempfile.TemporaryDirectory()  # of the driver; goes with the process
        self.library = without_gpu(Path(self.folder.name), divmod(number, 10))
        self.kernels: dict[int, str] = {}
        self.launches: Counter[str] = Counter()
        self.instructions: Counter[str] = Counter()
        self.ties = 0
        self._launched = LAUNCHED(self._launch)
        ctypes.c_void_p.in_dll(self.library, "launched").value = ctypes.cast(self._launched, ctypes.c_void_p).value
        knobs.runtime.kernel_load_end_hook.add(self._loaded)

    def _loaded(self, module: Any, function: int, name: str, files: dict[str, str], key: str) -> None:
        self.kernels[function] = Path(files[f"{name}.ptx"]).read_text()

    def _launch(self, config: int, function: int, pointers: Any) -> int:
        try:
            self._run(CONFIG.unpack(ctypes.string_at(config, CONFIG.size)), function, pointers)
        except Exception as error:
            text = f"{type(error).__name__}: {error}".encode()[:899]
            ctypes.memmove(ctypes.addressof(ctypes.c_char.in_dll(self.library, "fault")), text + b"\0", len(text) + 1)
            return FAILED
        return 0

    def _run(self, config: tuple[int, ...], function: int, pointers: Any) -> None:
        kernel = parse(self.kernels[function])
        grid, block, shared = config[:3], config[3:6], config[6]
        if block != (kernel.threads, 1, 1):
            raise Fault(f"{kernel.name} is launched with {block} threads, compiled for {kernel.threads}")
        values = [ctypes.string_at(pointers[i], size) for i, (size, _) in enumerate(kernel.parameters.values())]
        given = {
            int.from_bytes(v, sys.byteorder) for v, (_, p) in zip(values, kernel.parameters.values(), strict=True) if p
        }
        memory = Memory([Range.of_host(*span, kernel.grain) for span in spans(given - {0})])
        self.launches[kernel.name] += 1
        executed, ties = execute(kernel, grid, values, shared, memory)
        self.instructions[kernel.name] += executed
        self.ties += ties


def spans(addresses: set[int]) -> set[tuple[int, int]]:
    """(start, end) of the storages in which addresses lie. A launch has only addresses: the tensors are those that the
    functions hold which led to it. Raises: Fault if an address is of no tensor."""
    found, left = set(), set(addresses)
    for t in _held():
        storage = t.untyped_storage()
        start, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        inside = {a for a in addresses if start <= a < end}
        if inside:
            found.add((start, end))
            left -= inside
    if left:
        raise Fault(f"{len(left)} addresses are of no tensor")
    return found


def _held() -> Iterator[Tensor]:
    frame = sys._getframe()
    while frame is not None:
        # What a plan keeps are globals of the function that it wrote.
        values = [*frame.f_locals.values(), *(frame.f_globals.values() if frame.f_code.co_name == "repeat" else ())]
        for value in values:
            parts = (
                value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
            )
            for part in parts:
                if isinstance(part, Tensor) and part.layout is torch.strided and part.is_cpu:
                    yield part
        frame = frame.f_back  # type: ignore[assignment]
