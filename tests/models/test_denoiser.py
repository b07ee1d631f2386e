"""A denoiser by itself: its likelihoods need no formulation; and what a network may do ahead of the loop."""

import math

import pytest
import torch
from gaussian import MEAN, STD, Exact
from torch import Tensor, nn

from fastdiff import DDPM, ScoreSDE, UNet, bound, ode
from fastdiff.denoiser import Denoiser
from fastdiff.objective import OBJECTIVES
from fastdiff.process import VP, Chain
from fastdiff.schedule import linear

X0 = torch.tensor([[0.25, -0.5, 0.125, 0.0], [0.5, -0.25, 1.0, 0.25]], dtype=torch.float64)


def exact(process, objective: str) -> Denoiser:
    model = Exact(torch.float64)
    model.process, model.objective = process, objective
    return Denoiser(model, process, objective)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_denoiser_predicts_and_has_likelihoods(objective):
    """Those of Gaussian data under its exact prediction, by a plain Denoiser."""
    denoiser = exact(VP(), objective)
    assert denoiser.dtype == torch.float64 and denoiser.device.type == "cpu" and denoiser.prior_std() == 1
    made = VP().at(torch.tensor([0.5], dtype=torch.float64))
    alpha, sigma = made.alpha.item(), made.sigma.item()
    mean, std = torch.tensor(MEAN, dtype=torch.float64), torch.tensor(STD, dtype=torch.float64)
    score = (alpha * mean - X0) / (alpha**2 * std**2 + sigma**2)
    torch.testing.assert_close(denoiser.predict(X0, 0.5, "score"), score, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(denoiser.predict_x0(X0, 0.5), (X0 + sigma**2 * score) / alpha, rtol=1e-9, atol=1e-9)
    first = VP().at(torch.tensor([VP.first], dtype=torch.float64))
    var = first.alpha_bar * std**2 + first.sigma**2
    want = (-0.5 * (X0 - first.alpha * mean) ** 2 / var - 0.5 * (2 * math.pi * var).log()).sum(1)
    # alpha_T = 6.6e-3 of the signal is left where the ODE ends and the prior begins.
    torch.testing.assert_close(ode.log_likelihood(denoiser, X0, trace="exact"), want, rtol=0, atol=2e-2)


def test_a_bound_of_a_denoiser_is_that_of_the_formulation():
    denoiser = exact(Chain(linear(1000)), "v")
    got = bound.evaluate(denoiser, X0, steps=20, seed=3)
    want = DDPM(denoiser.model, objective="v", clip=None).bits_per_dim(X0, steps=20, seed=3)
    assert torch.equal(got.terms, want.terms) and torch.equal(got.prior, want.prior)


def test_wrong_denoisers():
    net, process = nn.Linear(2, 2), VP()
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got function"):
        Denoiser(lambda x, t: x, process, "eps")
    with pytest.raises(ValueError, match="objective: expected one of eps, x0, v, score, flow, edm, got 'noise'"):
        Denoiser(net, process, "noise")
    with pytest.raises(ValueError, match="clip: expected a number above 0 or None, got 0"):
        Denoiser(net, process, "eps", 0)


class Ahead(nn.Module):
    """Declares what it does before the loop, and counts how often."""

    def __init__(self):
        super().__init__()
        self.embedding, self.calls, self.seen = nn.Linear(1, 3), 0, []

    def time_arguments(self, t: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        return {"shift": self.embedding(t.float()[:, None])}

    def forward(self, x: Tensor, t: Tensor, shift: Tensor | None = None) -> Tensor:
        self.seen.append(None if shift is None else tuple(shift.shape))
        return x + (self.embedding(t.float()[:, None]) if shift is None else shift)


class Plain(nn.Module):
    """The same without declaring it."""

    def __init__(self, ahead: Ahead):
        super().__init__()
        self.inner = ahead

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.inner(x, t)


@pytest.mark.parametrize("sampler", ["ddim", "heun", "predictor_corrector"])
def test_any_network_may_do_what_depends_on_time_before_the_loop(sampler):
    torch.manual_seed(0)
    net = Ahead()
    plain, ahead = ScoreSDE(Plain(net), objective="v"), ScoreSDE(net, objective="v")
    want = plain.sample((2, 3), sampler=sampler, steps=4, seed=1)
    assert net.calls == 0
    net.seen.clear()
    torch.testing.assert_close(ahead.sample((2, 3), sampler=sampler, steps=4, seed=1), want, rtol=1e-5, atol=1e-5)
    assert net.calls == 1 and set(net.seen) == {(1, 3)}
    given = torch.zeros(1, 3)
    assert not torch.allclose(ahead.sample((2, 3), sampler=sampler, steps=4, seed=1, shift=given), want)


@pytest.mark.slow
def test_the_unet_declares_its_embedding():
    torch.manual_seed(0)
    net = UNet(
        sample_size=4, block_out_channels=(4, 8), down_block_types=["DownBlock2D"] * 2,
        up_block_types=["UpBlock2D"] * 2, layers_per_block=1, norm_num_groups=2,
    ).eval()  # fmt: skip
    t = torch.tensor([3, 7, 500])
    ahead, x = net.time_arguments(t), torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        for k in range(3):
            row = {name: value[k : k + 1] for name, value in ahead.items()}
            torch.testing.assert_close(net(x, t[k], **row), net(x, t[k]), rtol=1e-5, atol=1e-6)
