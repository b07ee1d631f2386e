"""What a CUDA graph cannot record: values that come from the host, or go there. The meta device stands for a GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdiff import DDPM, NCSN, Edm, FlowMatching, ScoreSDE, UNet
from fastdiff.capture import Captures
from fastdiff.guidance import Projected, Rescaled, Thresholded, ZeroStar

META, SHAPE = torch.device("meta"), (2, 3, 4, 4)


class Watch(TorchDispatchMode):
    """Notes the operators that read on one device and write on another. One that reads a number of the meta device
    fails by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if len({t.device for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}) > 1:
            self.copies.append(str(func))
        return out


class Recorder:
    """Runs each step under the same watch."""

    watch = Watch()

    def __init__(self, device: torch.device) -> None: ...

    def follow(self) -> None: ...

    def warm_up(self, function: Any, watched: bool = False) -> None:
        with self.watch:
            function()

    def record(self, function: Any) -> Any:
        return lambda: self.warm_up(function)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.conv(x) + 0.001 * t.to(x.dtype).reshape(-1, 1, 1, 1)


def unet() -> UNet:
    return UNet(
        sample_size=4, block_out_channels=(4, 8), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), layers_per_block=1, norm_num_groups=2,
        attention_head_dim=4,
    )  # fmt: skip


MODELS = {
    "ddpm": lambda: DDPM(unet(), "cosine", 9, objective="v"),
    "ncsn": lambda: NCSN(Net(), levels=4),
    "vp": lambda: ScoreSDE(Net(), "vp", "v", clip=1.0),
    "ve": lambda: ScoreSDE(Net(), "ve", "score"),
    "flow": lambda: FlowMatching(Net()),
    "edm": lambda: Edm(Net()),
}


@pytest.mark.slow
def test_the_watch_sees_a_copy():
    with Watch() as watch:
        torch.ones(2).to(META)
    assert len(watch.copies) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_loss_and_its_gradient(name):
    model = MODELS[name]().to(META)
    x0, ids = torch.empty(SHAPE, device=META), torch.zeros(2, dtype=torch.int64, device=META)

    def step() -> None:
        model(x0).backward()
        model(
            x0, t=model.times_at(torch.rand(2, device=META)), seed=3, sample_ids=ids, reduction="none"
        ).sum().backward()

    step()  # makes the tables
    with Watch() as watch:
        step()
    assert not watch.copies


Y = torch.empty(2, device=META)
GUIDED = [
    {"guidance": 2.0, "guidance_rule": rule, "y": Y, "uncond": {"y": Y}}
    for rule in (None, Rescaled(0.5), ZeroStar(), Projected(radius=1.0, momentum=-0.5), Thresholded())
]
RUNS: list[tuple[str, dict[str, Any]]] = [
    ("ddpm", {"sampler": "unipc", "dtype": torch.bfloat16, "steps": 3}),
    ("ncsn", {"steps": 1}),
    ("vp", {"sampler": "predictor_corrector", "steps": 3}),
    ("flow", {"sampler": "dpm++2m_sde", "steps": 3}),
    ("edm", {"sampler": "dpm++sde", "steps": 3}),
    *[("vp", {"sampler": "ddim", "steps": 3, **how}) for how in GUIDED],
]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(RUNS)))
def test_a_captured_step(monkeypatch, number):
    name, how = RUNS[number]
    monkeypatch.setattr("fastdiff.capture.what_forbids", lambda *_: None)
    monkeypatch.setattr(Captures.__init__, "__defaults__", (Recorder,))
    Recorder.watch = Watch()
    MODELS[name]().to(META).sample(SHAPE, seed=1, **how)
    assert not Recorder.watch.copies
