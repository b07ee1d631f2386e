"""How Triton kernels are launched: grid, block size, and launches that are repeated.

A launcher names the operands of its kernel: `launch(kernel, grid, x_ptr=x, size=size, BLOCK=block, num_warps=4)`.

Triton needs longer to look up the compiled kernel than a small kernel runs. So the launches of a call can be noted
(`noted`) and repeated with other tensors (`Launch.repeat`), as long as nothing but their addresses is different.
"""

import copy
import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from .notes import Text, note, noted, noting

__all__ = ["noted"]

# Grid axes 1 and 2 hold at most 65,535 programs; a power of two keeps the product exact.
MAX_GRID_Y = 32768
WARP = 64 if torch.version.hip else 32  # threads
# The arithmetic is written for fused multiply-adds; Triton 3.10 stops contracting by default.
FUSED = {"enable_fp_fusion": True}
# Decorates what is launched. The numbers of samples, tokens and rows, and the address of a number, change from step to
# step and from call to call. A kernel compiled for each of them gains nothing, and would be compiled within a sampling
# loop or the capture of a CUDA graph.
kernel = functools.partial(
    triton.jit,
    do_not_specialize=["batch", "rows", "tokens", "levels", "steps", "first"],
    do_not_specialize_on_alignment=[
        f"{name}_ptr" for name in ("t", "step", "table", "rows", "seed", "ids", "incoming", "guidance")
    ],
)


def launch(kernel: Any, grid: tuple[int, int, int], **operands: Any) -> None:
    """kernel[grid](**operands): parameters and compiler options by name."""
    compiled = kernel[grid](**operands)
    if noting():
        note(Noted(compiled, grid, [operands[name] for name in kernel.arg_names]))


class Noted(NamedTuple):
    """A launch that was made: the compiled kernel, the grid, and all parameters in their order; see notes."""

    compiled: CompiledKernel
    grid: tuple[int, int, int]
    parameters: list[Any]
    aligned: bool = True  # Triton compiles other kernels for addresses that are not multiples of 16

    @property
    def repeatable(self) -> bool:
        """Whether there is a compiled kernel: the interpreter has none."""
        return self.compiled is not None

    @staticmethod
    def written(launches: "list[Noted]", parameter: Text, constant: Text) -> tuple[list[str], list[str]]:
        """See notes. A profiler's hooks are asked for once."""
        lines, with_hooks, without = [], [f"if {constant(hooked)}():"], ["else:"]
        for i, made in enumerate(launches):
            launch = Launch(made)
            lines.append(f"x{i} = ({', '.join(map(parameter, made.parameters))},)")
            with_hooks.append(f" {constant(launch.with_hooks)}(x{i}, stream)")
            fixed = [*map(constant, launch.before), "stream", *map(constant, launch.between)]
            without.append(f" {constant(launch.run)}({', '.join(fixed)}, {'' if launch.packed else '*'}x{i})")
        return [], lines + with_hooks + without


class Launch:
    """A launch to be repeated, with the kernel's arguments in a tuple, addresses for tensors:

    run(*before, stream, *between, arguments), if packed; else run(*before, stream, *between, *arguments).
    """

    def __init__(self, made: Noted) -> None:
        self.compiled, self.grid = made.compiled, made.grid
        fixed = made.compiled.function, made.compiled.packed_metadata, None, None, None
        self.run, self.before, self.between, self.packed = direct(made.compiled.run, made.grid, fixed)

    def with_hooks(self, arguments: tuple[Any, ...], stream: int) -> None:
        """Launch, and call the profiler's hooks."""
        self.compiled[self.grid](*arguments, stream=stream)


def hooked() -> Any:
    """What a profiler wants to be called at launches, if anything."""
    enter, leave = _hooks.launch_enter_hook, _hooks.launch_exit_hook
    return getattr(enter, "calls", enter) or getattr(leave, "calls", leave)


def direct(run: Any, grid: tuple[int, int, int], fixed: tuple[Any, ...]) -> tuple[Any, ...]:
    """(function, what it takes before the stream, what between that and the kernel's arguments, whether it takes these
    as one tuple): what run(*grid, stream, *fixed, *arguments) comes to.

    That is Triton's launcher, which adds what is the same in every launch and calls a function in C. Versions of Triton
    differ in what they add, so it is looked at here. If it does more, it is not gone around.
    """
    unknown = run, grid, fixed, False
    if not hasattr(run, "launch") or any(getattr(run, f"{kind}_scratch_size", 0) for kind in ("global", "profile")):
        return unknown
    seen: list[Any] = []
    watched, stream, arguments = copy.copy(run), object(), (object(), object())
    watched.launch = lambda *given: seen.extend(given)
    watched(*grid, stream, *fixed, *arguments)
    packed = seen[-1:] == [arguments]
    if stream not in seen or not (packed or seen[-2:] == [*arguments]):
        return unknown
    at = seen.index(stream)
    return run.launch, seen[:at], seen[at + 1 : -1 if packed else -2], packed


_hooks: Any = triton.knobs.runtime if hasattr(triton, "knobs") else CompiledKernel


def block_of(size: int, channels: int, generated: bool, *tensors: Tensor | None) -> dict[str, Any]:
    """CHANNELS, BLOCK, VEC and the compiler's options, for samples of `size` elements.

    A thread makes one 16-byte access of the narrowest type at a time. It has 16 elements, or 32 if no noise is
    generated: then the work before the first element weighs more.
    """
    return _block_of(size, channels, generated, min(t.element_size() for t in tensors if t is not None))


@functools.lru_cache
def _block_of(size: int, channels: int, generated: bool, narrowest: int) -> dict[str, Any]:
    per_thread = 16 if generated else 32
    block = min(128 * per_thread, max(256, triton.next_power_of_2(size)))
    vec = 8 if narrowest == 2 and channels == 1 else 4
    warps = max(1, block // (32 * per_thread))
    return {"CHANNELS": channels, "BLOCK": block, "VEC": vec, "num_warps": warps} | FUSED


def grid_of(batch: int, size: int, block: int) -> tuple[int, int, int]:
    """The grid in which every block of every sample has a program; see `tile.owner`."""
    return -(-size // block), min(batch, MAX_GRID_Y), -(-batch // MAX_GRID_Y)


def warps_of(elements: int, held: int) -> int:
    """The warps of a program with so many elements at a time, of which a thread holds `held`."""
    return max(1, elements // (WARP * held))


def on_nvidia(x: Tensor) -> bool:
    """Whether x lies on an NVIDIA GPU: there the hardware's approximations replace the noise's polynomials (FAST)."""
    return x.is_cuda and torch.version.hip is None
