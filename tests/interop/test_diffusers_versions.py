"""What other versions of diffusers get: the installed one under their numbers."""

import importlib
import sys
from types import ModuleType, SimpleNamespace
from unittest import mock

import diffusers
import pytest
from diffusers.models.resnet import ResnetBlock2D
from small_transformers import made
from torch import nn

import fastdiff
from fastdiff.interop import diffusers as fused


@pytest.fixture
def under(monkeypatch):
    """A function that imports the drop-ins anew under a version."""
    monkeypatch.setattr(fastdiff.interop, "diffusers", fused)  # put back afterwards
    with mock.patch.dict(sys.modules):
        for name in [name for name in sys.modules if name.startswith(fused.__name__)]:
            del sys.modules[name]

        def load(version: str) -> ModuleType:
            monkeypatch.setattr(diffusers, "__version__", version)
            return importlib.import_module(fused.__name__)

        yield load


def replaced(net: nn.Module) -> set[str]:
    fastdiff.accelerate(net)
    return {type(part).__name__ for part in net.modules() if type(part).__module__.startswith("fastdiff.")}


def test_a_version_before_the_schedulers(under):
    """Layers of U-Nets are fused, a scheduler stays, and its import says why."""
    older = under("0.31.0")
    assert older.SCHEDULERS == ()
    with pytest.raises(ImportError, match=r"DDPMScheduler needs diffusers 0\.32 or later, got 0\.31\.0"):
        from fastdiff.interop.diffusers import DDPMScheduler  # noqa: F401
    with pytest.raises(AttributeError, match="no attribute 'DDPM'"):
        older.DDPM  # noqa: B018
    parts = {"scheduler": diffusers.DDPMScheduler(), "unet": ResnetBlock2D(in_channels=4, groups=2)}
    pipeline = SimpleNamespace(components=parts, **parts)
    with pytest.warns(UserWarning, match="DDPMScheduler has no fused scheduler"):
        assert fastdiff.accelerate(pipeline) == ["unet"]
    assert replaced(made("flux")[0]) == set()
    assert fastdiff.restore(pipeline) == ["unet"]


def test_a_version_between(under):
    """What it lacks, or defines otherwise, stays stock."""
    older = under("0.34.0")
    assert len(fused.SCHEDULERS) - len(older.SCHEDULERS) == 1
    with pytest.raises(ImportError, match=r"LTXEulerAncestralRFScheduler needs diffusers 0\.37"):
        from fastdiff.interop.diffusers import LTXEulerAncestralRFScheduler  # noqa: F401
    assert replaced(made("flux")[0]) == {"AdaLayerNormZero", "AdaLayerNormZeroSingle", "AdaLayerNormContinuous"}
    assert "JointTransformerBlock" in replaced(made("sd3")[0])


def test_versions_that_nobody_looked_at(under):
    with pytest.raises(ImportError, match=r"needs diffusers 0\.30 or later, got 0\.29\.2"):
        under("0.29.2")
    with pytest.warns(UserWarning, match=r"tested with diffusers below 0\.43"):
        later = under("0.43.0.dev0")
    assert len(later.SCHEDULERS) == len(fused.SCHEDULERS)
