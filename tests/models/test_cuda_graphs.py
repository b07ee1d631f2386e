"""What CudaGraphs does around PyTorch's captures, with a stand-in for torch.cuda that writes down what is called."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tape import Tape
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastdiff.graphs import (
    WAIT,
    WARM_UP,
    Captured,
    CudaGraphs,
    settings,
    what_forbids_arguments,
    what_forbids_here,
    what_forbids_model,
)
from fastdiff.ops.plan import capturing

CUDA = torch.device("cuda", 1)
PROTOTYPE = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"


class Stream:
    def __init__(self, name: Any = None) -> None:
        self.name = "side" if isinstance(name, torch.device) else name
        self.waited: list[Any] = []

    def wait_stream(self, other: "Stream") -> None:
        self.waited.append(other.name)


class Cuda:
    """torch.cuda with two devices: `device` and `streams` are the current ones."""

    def __init__(self) -> None:
        self.device, self.mode = 0, 0
        self.streams = {0: Stream("main 0"), 1: Stream("main 1")}
        self.calls: list[str] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in (
            "current_stream", "set_stream", "current_device", "graph", "CUDAGraph", "get_sync_debug_mode",
            "set_sync_debug_mode",
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", self.within)
        monkeypatch.setattr(torch.cuda, "device", self.on)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
        monkeypatch.setattr(torch, "zeros", lambda *_, device: self.calls.append(f"zeros on {device}"))
        for name in ("clearCublasWorkspaces", "endAllocateToPool", "releasePool"):
            note = lambda *_, name=name: self.calls.append(name)  # noqa: E731
            monkeypatch.setattr(torch._C, f"_cuda_{name}", note, raising=False)

    def current_device(self) -> int:
        return self.device

    def current_stream(self, device: torch.device | None = None) -> Stream:
        return self.streams[self.device if device is None else device.index]

    def set_stream(self, stream: Stream) -> None:
        self.device = int(stream.name[-1]) if stream.name[-1].isdigit() else 1  # as PyTorch does
        self.streams[self.device] = stream

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        before, self.device = self.device, device.index
        try:
            yield
        finally:
            self.device = before

    @contextmanager
    def within(self, stream: Stream) -> Iterator[None]:
        before, self.streams[1] = self.streams[1], stream
        try:
            yield
        finally:
            self.streams[1] = before

    class CUDAGraph:
        def replay(self) -> None: ...

    def graph(self, graph: Any, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> Any:
        @contextmanager
        def capture() -> Iterator[None]:
            assert self.device == 1 and stream.name == "side"
            self.set_stream(stream)
            self.calls.append("begin")
            yield  # an error leaves the stream
            self.calls.append("end")
            self.set_stream(self.main)

        self.main = self.current_stream()
        return capture()

    def get_sync_debug_mode(self) -> int:
        return self.mode

    def set_sync_debug_mode(self, mode: Any) -> None:
        warnings.warn(PROTOTYPE, stacklevel=2)
        self.mode = mode


@pytest.fixture
def cuda(monkeypatch) -> Cuda:
    made = Cuda()
    made.install(monkeypatch)
    return made


def wait() -> None:
    warnings.warn(f"{WAIT} (Triggered internally at CUDAFunctions.cpp)", stacklevel=2)


@pytest.mark.parametrize("filters", ["error", "ignore"])
def test_a_wait_is_told_and_shown_to_nobody(cuda, filters):
    recorder = CudaGraphs(CUDA)

    def function() -> None:
        assert cuda.mode == "warn" and cuda.current_stream(CUDA).name == "side"
        wait()

    with warnings.catch_warnings():
        warnings.simplefilter(filters)
        assert __file__ in str(recorder.warm_up(function, watched=True))
        assert recorder.warm_up(lambda: None, watched=True) is None
        assert recorder.warm_up(lambda: None) is None
    assert cuda.mode == 0 and cuda.streams[1].waited == ["side"] * 3 and recorder.stream.waited == ["main 1"] * 3


def test_waits_of_other_threads_do_not_count_and_other_warnings_are_shown(cuda):
    def function() -> None:
        other = threading.Thread(target=wait)
        other.start()
        other.join()
        warnings.warn("another", stacklevel=1)

    with pytest.warns(UserWarning, match="another") as shown:
        assert CudaGraphs(CUDA).warm_up(function, watched=True) is None
    assert len(shown) == 1


def wait_forbidden() -> None:
    raise RuntimeError("operation not permitted when stream is capturing")


def test_a_capture_leaves_device_and_streams(cuda):
    recorder = CudaGraphs(CUDA)
    recorder.record(lambda: cuda.calls.append("function"))
    assert cuda.calls == ["clearCublasWorkspaces", "begin", "function", "end", "clearCublasWorkspaces"]
    assert cuda.device == 0 and [s.name for s in cuda.streams.values()] == ["main 0", "main 1"]


def test_a_failed_capture_is_ended(cuda):
    recorder = CudaGraphs(CUDA)
    replay = recorder.record(lambda: None)
    pool = recorder.pool
    cuda.calls.clear()
    with pytest.raises(RuntimeError, match="not permitted"):
        recorder.record(wait_forbidden)
    assert cuda.calls[1:-1] == ["begin", "endAllocateToPool", "releasePool", "begin", "zeros on cuda:1", "end"]
    assert cuda.device == 0 and [s.name for s in cuda.streams.values()] == ["main 0", "main 1"]
    recorder.record(lambda: None)
    assert recorder.pool is not pool and replay is not None


def test_graphs_share_memory_with_those_that_live(cuda):
    """PyTorch takes none into the memory of graphs that are gone, while a tensor lies there that a layer keeps."""
    recorder, pools = CudaGraphs(CUDA), []

    def record() -> Any:
        replay = recorder.record(lambda: None)
        pools.append(recorder.pool)
        return replay

    kept = [record(), record()]
    kept.clear()
    kept.append(record())
    with pytest.raises(RuntimeError):
        recorder.record(wait_forbidden)
    record()
    assert pools[0] is pools[1] and len({*map(id, pools)}) == 3 and None not in pools


def test_a_call_on_another_stream_waits_for_the_call_before(cuda):
    recorder, other = CudaGraphs(CUDA), Stream("other 1")
    for stream in (cuda.streams[1], other, other, cuda.streams[1]):
        cuda.streams[1] = stream
        recorder.follow()
    assert other.waited == ["main 1"] and cuda.streams[1].waited == ["other 1"]


def test_one_thread_at_a_time_captures():
    entered, go_on = threading.Event(), threading.Event()

    class Slow(Tape):
        def record(self, function: Any) -> Any:
            entered.set()
            assert go_on.wait(30)
            return super().record(function)

    def nothing() -> None: ...

    def call(captured: Captured, times: int) -> None:
        for _ in range(times):
            captured(nothing, pytest.fail)

    slow, quick = Captured(Slow(CUDA)), Captured(Tape(CUDA))
    thread = threading.Thread(target=call, args=(slow, WARM_UP + 1))
    thread.start()
    assert entered.wait(30)
    call(quick, WARM_UP + 1)
    assert quick.replay is None and quick.recorder.warmed == WARM_UP + 1
    go_on.set()
    thread.join()
    call(quick, 2)
    assert slow.replay is not None and quick.replay is not None


def test_what_forbids_a_capture_here(monkeypatch):
    with FlopCounterMode(display=False):
        assert "sees nothing of a replay" in str(what_forbids_here(CUDA))
    monkeypatch.setattr("fastdiff.graphs.capturing", lambda: True)
    assert "captured as a part of something else" in str(what_forbids_here(CUDA))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "an NVIDIA GPU" in str(what_forbids_here(CUDA))
    network = nn.DataParallel(nn.Linear(2, 2), device_ids=[])
    assert "one GPU" in str(what_forbids_model(network, torch.device("cpu")))
    given = torch.zeros(2, requires_grad=True)
    assert "no gradient is wanted" in str(what_forbids_arguments([given], given.device))
    with torch.no_grad():
        assert what_forbids_arguments([given], given.device) is None


def test_a_cuda_build_of_pytorch_without_a_driver(monkeypatch):
    def fails() -> bool:
        raise RuntimeError("Found no NVIDIA driver on your system")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", fails)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    assert not capturing()


def test_settings_of_a_capture_are_told_by_pytorchs_newer_names_too(monkeypatch):
    def mixed() -> str:
        raise RuntimeError("you have used mix of the legacy and new APIs")

    before = settings()
    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: False)
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        assert len(settings()) == len(before) and settings() != before
