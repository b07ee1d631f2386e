"""What the stage smoke finds wrong with graphs, on tapes instead of a GPU."""

import functools

import pytest
import torch
from tape import Recorders, Tape

import fastdiff
from benchmarks.gpu import smoke
from benchmarks.gpu.rows import NotAvailable, Setup
from benchmarks.gpu.small import made
from fastdiff.capture import Captures
from fastdiff.graphs import CapturedCall
from fastdiff.interop.diffusers.layers import ahead
from fastdiff.interop.diffusers.layers.attention import Attention
from fastdiff.ops.plan import Plan
from fastdiff.ops.quick import forget

SETUP = Setup(torch.device("cpu"), toy=True)
CAPTURED = {
    "sample": smoke.graph,
    "network": functools.partial(smoke.network, "cifar10 U-Net"),
    "training step": smoke.training_step,
    "failed capture": smoke.refused,
}


class Idle(Tape):
    """A graph that does nothing after its first replay: results are those of a call before."""

    def record(self, function):
        replay = super().record(function)

        def once():
            if not self.replayed:
                replay()

        return once


class Deaf(CapturedCall):
    """A graph that does not get the arguments of later calls."""

    def __call__(self, values):
        return super().__call__(values if self.captured.replay is None else self.own)


class Faulty(Recorders):
    kind = Tape

    def __call__(self, device):
        self.append(self.kind(device))
        return self[-1]


@pytest.fixture
def taped(monkeypatch) -> Faulty:
    recorders = Faulty()
    # Not the list itself: a model that holds what grows changes with each recorder.
    monkeypatch.setattr(Captures.__init__, "__defaults__", (lambda device: recorders(device),))
    monkeypatch.setattr("fastdiff.capture.what_forbids", lambda *_: None)
    for module in ("interop.replay", "training.step"):
        monkeypatch.setattr(f"fastdiff.{module}.CudaGraphs", recorders)
        monkeypatch.setattr(f"fastdiff.{module}.what_forbids_here", lambda device: None)
    monkeypatch.setattr("fastdiff.graphs.what_forbids_here", lambda device: None)
    with fastdiff.backend("reference"):
        yield recorders


@pytest.mark.slow
@pytest.mark.parametrize("row", CAPTURED)
def test_graphs_that_are_right_pass(row, taped):
    assert CAPTURED[row](SETUP)["equal_bits"]
    assert sum(tape.replayed for tape in taped) > 1


@pytest.mark.slow
@pytest.mark.parametrize("row", ["sample", "network", "training step"])
def test_a_graph_that_does_nothing_is_found(row, taped):
    taped.kind = Idle
    with pytest.raises((RuntimeError, AssertionError), match=r"off|Tensor-likes"):
        CAPTURED[row](SETUP)


@pytest.mark.slow
@pytest.mark.parametrize("row", ["network", "training step"])
def test_a_graph_with_old_arguments_is_found(row, taped, monkeypatch):
    monkeypatch.setattr("fastdiff.graphs.CapturedCall", Deaf)
    with pytest.raises((RuntimeError, AssertionError), match=r"off|Tensor-likes"):
        CAPTURED[row](SETUP)


@pytest.mark.slow
@pytest.mark.parametrize("row", ["network", "training step"])
def test_a_graph_that_overwrites_its_results_is_found(row, taped, monkeypatch):
    monkeypatch.setattr("fastdiff.graphs.tree_map_only", lambda kind, function, tree: tree)
    with pytest.raises((RuntimeError, AssertionError), match=r"off|Tensor-likes"):
        CAPTURED[row](SETUP)


@pytest.mark.slow
def test_an_accelerated_network_that_is_further_from_float64_is_found(monkeypatch):
    def wrong(net, **options):
        smoke.change(net)
        return fastdiff.interop.accelerate.Accelerated()

    monkeypatch.setattr(smoke, "accelerate", wrong)
    with pytest.raises(RuntimeError, match="times as far from float64 as stock's"):
        smoke.network("Flux transformer", SETUP)


def test_on_a_gpu_a_capture_that_is_not_made_is_an_error():
    def forbidden(setup: Setup) -> dict[str, bool]:
        raise ValueError("graph: expected a network that can be captured")

    def lacking(setup: Setup) -> dict[str, bool]:
        raise NotAvailable("diffusers does not import")

    with pytest.raises(RuntimeError, match="can be captured"):
        smoke.required(forbidden, Setup(torch.device("cuda"), toy=True))
    with pytest.raises(ValueError, match="can be captured"):
        smoke.required(forbidden, SETUP)
    with pytest.raises(NotAvailable):
        smoke.required(lacking, Setup(torch.device("cuda"), toy=True))


@pytest.mark.slow
def test_a_repeated_launch_that_writes_nothing_is_found(monkeypatch):
    monkeypatch.setattr(Plan, "_launches", lambda *_: ([], []))
    forget()
    with fastdiff.backend("cpu"), pytest.raises(RuntimeError, match="off the float64 reference"):
        smoke.operation("forward_noising", SETUP)
    forget()
    assert not torch.are_deterministic_algorithms_enabled()


@torch.no_grad()
def test_the_small_network_of_stable_diffusion_takes_what_large_ones_take():
    net, given = made("SD 1.5 U-Net", torch.device("cpu"))
    fastdiff.accelerate(net, channels_last=True)
    blocks = [part for part in net.modules() if isinstance(part, Attention)]
    assert len(ahead.keys_and_values(blocks, given["encoder_hidden_states"])) == len(ahead.of_text(blocks)) > 1
