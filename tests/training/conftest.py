import signal
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def hangups_are_heard() -> Iterator[None]:
    """A suite that was started by nohup ignores SIGHUP, and so would the trainings that it starts."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


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
