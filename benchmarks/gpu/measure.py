"""The figures of a job of several steps, and the times of a single call."""

import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import clock, medians

from .rows import Figures

# Seconds of repeated runs of a job. At least REPEATS of them count.
SECONDS, REPEATS = 2.0, 3


def job(run: Callable[[], object], device: torch.device, *, steps: int, units: int) -> Figures:
    """Figures of a run of `steps` steps that makes `units` images, or iterations.

    first_call_s: the first run, which compiles and captures; the second run is not counted.
    per_s: units a second. ms_per_step: until the device is done. host_ms_per_step: until the call returns. The host
    waits where it is far ahead of the device, so this is its own work only if it is below ms_per_step.
    gpu_ms_per_step, kernels_per_step: of the profiler; copies and fills of memory count as kernels. Not there, but
    what the profiler said, where it may not be used.
    peak_mb: memory that the process took on the device. On a CPU of the whole process since its start.
    graph_breaks, broken_by, cudagraph_skips: what torch.compile gave up, if it did: the places where it stopped to
    trace, the first of their reasons, and CUDA graphs of its own.
    """
    gc.collect()
    compiler_counters().clear()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    start = clock(device)
    run()
    first = clock(device) - start
    run()
    walls: list[float] = []
    hosts: list[float] = []
    while len(walls) < REPEATS or (sum(walls) < SECONDS and len(walls) < 50):
        start = clock(device)
        run()
        hosts.append(time.perf_counter() - start)
        walls.append(clock(device) - start)
    peak = peak_bytes(device)
    wall, host = statistics.median(walls), statistics.median(hosts)
    figures: Figures = {
        "per_s": units / wall,
        "ms_per_step": 1e3 * wall / steps,
        "host_ms_per_step": 1e3 * host / steps,
        "peak_mb": peak / 1e6,
        "first_call_s": first,
        **given_up(compiler_counters()),
    }
    try:
        kernels, busy = profiled(run, device)
    except Exception as error:  # where CUPTI is missing it is no RuntimeError; the other figures stay
        return figures | {"profiler": f"{type(error).__name__}: {error}".splitlines()[0]}
    if not kernels:
        return figures | {"profiler": "it saw no kernels"}
    return figures | {"gpu_ms_per_step": 1e3 * busy / steps, "kernels_per_step": kernels / steps}


def compiler_counters() -> Any:
    """What torch.compile counts in this process, by kind and reason; empty where it was never imported."""
    return getattr(sys.modules.get("torch._dynamo.utils"), "counters", {})


def given_up(counted: Any) -> Figures:
    """The part of a job's figures that is made of those counters."""
    breaks, skips = counted.get("graph_break", {}), counted.get("inductor", {}).get("cudagraph_skips", 0)
    found: Figures = {"cudagraph_skips": skips} if skips else {}
    if breaks:
        found |= {"graph_breaks": sum(breaks.values()), "broken_by": next(iter(breaks)).splitlines()[0][:100]}
    return found


def profiled(run: Callable[[], object], device: torch.device) -> tuple[int, float]:
    """(kernels, seconds of them) of a run. On a CPU those of PyTorch's operations."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        run()
        clock(device)
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    # Not found.events(), which takes seconds for the 100,000 kernels of a large network.
    results: Any = found.profiler
    events = [event for event in results.kineto_results.events() if event.device_type() == kind]
    # torch.compile marks its graphs by ranges, which the GPU's events have too.
    taken = [event.duration_ns() for event in events if not event.is_user_annotation()]
    return len(taken), sum(taken) / 1e9


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)  # the pools of CUDA graphs count here
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def milliseconds(functions: Sequence[Callable[[], object]], device: torch.device, seconds: float) -> list[float]:
    """Median milliseconds of each. On a GPU of its work alone: many calls are captured in one CUDA graph."""
    if device.type != "cuda":
        return [1e3 * t for t in medians(functions, device, seconds)]
    from triton.testing import do_bench_cudagraph

    each = max(1, round(1e3 * seconds / len(functions) / 10))  # it replays the graph ten times
    return [do_bench_cudagraph(function, rep=each, return_mode="median") for function in functions]


def host_microseconds(function: Callable[[], object], device: torch.device, calls: int = 20, rounds: int = 15) -> float:
    """Median time that a call holds up the program. The GPU works on meanwhile."""
    taken = []
    function()
    for _ in range(rounds):
        start = clock(device)
        for _ in range(calls):
            function()
        taken.append(1e6 * (time.perf_counter() - start) / calls)
    return statistics.median(taken)
