import logging
from collections.abc import Iterator

import pytest
import torch
from tape import Recorders

import fastdiff


@pytest.fixture
def taped(monkeypatch) -> Iterator[Recorders]:
    """Networks are captured on the CPU, on tapes."""
    recorders = Recorders()
    monkeypatch.setattr("fastdiff.interop.replay.CudaGraphs", recorders)
    for module in ("graphs", "interop.replay"):
        monkeypatch.setattr(f"fastdiff.{module}.what_forbids_here", lambda device: None)
    with fastdiff.backend("reference"), torch.no_grad():
        yield recorders


@pytest.fixture
def kernels_of_the_cpu() -> Iterator[None]:
    """What runs on a CPU outside of tests. Stock's reminders to call scale_model_input are of no interest here."""
    logging.disable(logging.WARNING)
    with fastdiff.backend("cpu"):
        yield
    logging.disable(logging.NOTSET)
