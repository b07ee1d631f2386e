"""azula's samplers against ours: the same network, times, start and noise, in float64."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdiff import FlowMatching, ScoreSDE, steps

azula = pytest.importorskip("azula.sample")
SHAPE = (3, 2, 4)
NOISE = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return 0.5 * self.linear(torch.tanh(x)) + 0.1 * torch.sin(c).view(-1, 1, 1)


MODELS = {
    "flow": lambda: FlowMatching(Net()),
    "vp": lambda: ScoreSDE(Net(), "vp", "v"),
    "ve": lambda: ScoreSDE(Net(), "ve", "eps"),
}
# azula's sampler, ours, and our eta: its eta multiplies the variance.
PAIRS: dict[str, tuple[Any, Any, float]] = {
    "ddpm": (azula.DDPMSampler, "ddpm", 0.0),
    "ddim": (partial(azula.DDIMSampler, eta=0.25), "ddim", 0.5),
    "euler": (azula.EulerSampler, "ddim", 0.0),
    "heun": (azula.HeunSampler, "heun", 0.0),
    "lms": (partial(azula.zABSampler, order=3), partial(steps.lms, order=3), 0.0),
    "deis": (partial(azula.zEABSampler, order=3), partial(steps.deis, order=3), 0.0),
}


class Denoiser(nn.Module):
    """A model of ours as they know it: levels by time, and the estimate of x_0."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
        made = self.model.process.at(t.reshape(-1))
        return made.alpha.reshape(t.shape), made.sigma.reshape(t.shape)

    def forward(self, x: Tensor, t: Tensor) -> Any:
        made = type("Posterior", (), {})()
        made.mean = self.model.predict_x0(x, t)
        return made


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pair", PAIRS)
def test_their_samplers_are_ours(pair, name, monkeypatch):
    theirs, ours, eta = PAIRS[pair]
    model = MODELS[name]()
    drawn = iter(NOISE)
    monkeypatch.setattr(torch, "randn_like", lambda like: next(drawn))
    sampler = theirs(Denoiser(model), start=0.9, stop=0.05, steps=6, silent=True, dtype=torch.float64)
    x_T = model.prior_std() * NOISE[0].flip(0)
    want = sampler(x_T)
    given = {"noise": NOISE} if pair in ("ddpm", "ddim") else {}
    times = sampler.timesteps.tolist()
    got = model.sample(SHAPE, sampler=ours, steps=times, stop_at=times[-1], eta=eta, x_T=x_T, **given)
    assert next(drawn, None) is None or not given  # as many draws as steps
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
