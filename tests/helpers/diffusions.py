"""GaussianDiffusion, stock and ours side by side, with a small network and comparisons of calls and losses."""

import random
from typing import Any

import torch
from hypothesis import strategies as st
from strategies import DEVICE
from torch import Tensor, nn

from benchmarks.torchvision_standin import stock as import_stock
from fastdiff.interop.denoising_diffusion import GaussianDiffusion

stock = import_stock()
SIZE = (4, 6)
SHAPE = (3, 2, *SIZE)
# Four roundings of a number of 16, about the largest that the tests have.
PARITY = 2e-6


class Net(nn.Module):
    """A small network with the attributes and the call of their Unet, which draws a number as dropout does."""

    channels = out_dim = 2

    def __init__(self, self_condition: bool = False) -> None:
        super().__init__()
        self.self_condition = self_condition
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4 if self_condition else 2, 2, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        assert t.shape == (len(x),) and t.dtype == torch.int64
        if self.self_condition:
            x = torch.cat((torch.zeros_like(x) if x_self_cond is None else x_self_cond, x), 1)
        return self.conv(x) * torch.cos(t / 7)[:, None, None, None] + 0.1 * torch.rand(1, device=x.device)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "image_size": SIZE,
        "timesteps": draw(st.sampled_from((21, 50, 1000))),
        "objective": draw(st.sampled_from(("pred_noise", "pred_x0", "pred_v"))),
        "beta_schedule": draw(st.sampled_from(("linear", "cosine", "sigmoid"))),
        "auto_normalize": draw(st.booleans()),
        "min_snr_loss_weight": draw(st.booleans()),
        "min_snr_gamma": draw(st.sampled_from((1, 5))),
        "offset_noise_strength": draw(st.sampled_from((0.0, 0.1))),
    }


def both(self_condition: bool = False, mixin: type = object, **config: Any) -> list[Any]:
    """The stock diffusion and ours, of equal networks; mixin: of subclasses with its methods."""
    config = {"image_size": SIZE, "timesteps": 50} | config
    classes = [stock.GaussianDiffusion, GaussianDiffusion]
    if mixin is not object:
        classes = [type("Derived", (mixin, c), {}) for c in classes]
    return [c(Net(self_condition), **config) for c in classes]


def data(n: int, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(n)]


def seeded(call: Any, seed: int = 5) -> tuple[Any, Any]:
    """(result, state of all generators afterwards)."""
    torch.manual_seed(seed)
    random.seed(seed)
    result = call()
    on_gpu = torch.cuda.get_rng_state().tolist() if DEVICE.type == "cuda" else None
    return result, (torch.get_rng_state().tolist(), on_gpu, random.getstate())


def same(got: Any, want: Any, exact: bool = True) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    if exact:
        assert torch.equal(got, want)
    else:
        error = (got - want).detach().abs() / want.detach().abs().div(16).clamp(min=1)
        assert float(error.max()) <= PARITY, float(error.max())


def same_calls(pair: list[Any], call: Any, exact: bool = True) -> None:
    """call(diffusion) gives the same tensors and leaves the generators in the same state."""
    (want, state), (got, our_state) = (seeded(lambda d=d: call(d)) for d in pair)
    assert our_state == state
    if isinstance(want, Tensor):
        want, got = (want,), (got,)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        same(a, b, exact)


def same_losses(pair: list[Any], call: Any) -> None:
    """The same losses, and the same gradients relative to the largest."""
    results = []
    for d in pair:
        d.zero_grad()
        loss, state = seeded(lambda d=d: call(d))
        loss.sum().backward()
        results.append((loss.detach(), torch.cat([p.grad.flatten() for p in d.parameters()]), state))
    (want, want_grad, state), (got, got_grad, our_state) = results
    assert our_state == state
    assert got.shape == want.shape
    assert float((got - want).abs().max()) <= PARITY * float(want.abs().max())
    assert float((got_grad - want_grad).abs().max()) <= PARITY * float(want_grad.abs().max())
    assert float(want_grad.abs().max()) > 0
