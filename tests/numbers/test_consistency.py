"""Samplers of distilled models against their formulas and, where it is installed, against diffusers."""

import functools
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from fastdiff import DDPM, ScoreSDE, schedule, steps
from fastdiff.process import VE
from fastdiff.rows import columns
from fastdiff.steps import make_steps

T = 1000
pytestmark = pytest.mark.filterwarnings("ignore:schedule. alpha_bar_T")
LINEAR = schedule.scaled_linear(T)


class Network(nn.Module):
    """Predicts eps; not linear in x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.weight * torch.tanh(x) + 0.1 * (t.double() / T).reshape(-1, 1, 1, 1)


def state(table, k: int, x: Tensor, x0: Tensor, z: Tensor) -> Tensor:
    row = columns(table.rows[k : k + 1])
    return row.from_x0 * x0 + row.from_x * x + row.noise * z


@pytest.mark.parametrize("sigma_data", [0.5, 0.0])
def test_lcm_is_its_formula(sigma_data):
    levels = [1000, 3, 2, 1, 0]
    table = steps.lcm(LINEAR, torch.tensor(levels), "x0", sigma_data=sigma_data)
    x, x0, z = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for k, (t, s) in enumerate(itertools.pairwise(levels)):
        tau, alpha, sigma = 10.0 * (t - 1), float(LINEAR.alpha[s]), float(LINEAR.sigma[s])
        if tau or sigma_data:
            skip, out = sigma_data**2 / (tau**2 + sigma_data**2), tau / math.hypot(tau, sigma_data)
        else:
            skip, out = 1.0, 0.0
        torch.testing.assert_close(
            state(table, k, x, x0, z), alpha * (skip * x + out * x0) + sigma * z, rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_tcd_is_its_formula(gamma):
    levels = [1000, 750, 500, 250, 0]
    table = steps.tcd(LINEAR, torch.tensor(levels), "x0", gamma=gamma)
    x, x0, z = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alpha, sigma = LINEAR.alpha.tolist(), LINEAR.sigma.tolist()
    for k, (t, s) in enumerate(itertools.pairwise(levels)):
        u = math.floor((1 - gamma) * (s - 1)) + 1 if s else 0
        at_u = alpha[u] * x0 + sigma[u] * (x - alpha[t] * x0) / sigma[t]
        ratio = alpha[s] / alpha[u]
        want = ratio * at_u + math.sqrt(max(0.0, 1 - ratio**2)) * z  # diffusers' form, for a chain that keeps variance
        torch.testing.assert_close(state(table, k, x, x0, z), want, rtol=1e-9, atol=1e-9)
    if gamma == 0:
        torch.testing.assert_close(
            table.rows, steps.ddim(LINEAR, torch.tensor(levels), "x0").rows, rtol=1e-9, atol=1e-9
        )


def test_between_levels_there_are_no_timesteps():
    process = VE(0.01, 50.0)
    plain, lcm = (make_steps(process, name, 4, "x0", None) for name in ("consistency", "lcm"))
    assert torch.equal(plain.rows, lcm.rows)
    made, levels = process.grid(4)
    t, s = levels[:-1], levels[1:]
    x, x0, z = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = make_steps(process, functools.partial(steps.tcd, gamma=0.4), 4, "x0", None)
    for k in range(len(table)):
        here, after = made.sigma[t[k]], made.sigma[s[k]]
        want = x0 + 0.6 * after * (x - x0) / here + after * math.sqrt(1 - 0.36) * z
        torch.testing.assert_close(state(table, k, x, x0, z), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "ours"), [("LCMScheduler", "lcm"), ("TCDScheduler", "tcd")])
def test_steps_of_diffusers(name, ours):
    diffusers = pytest.importorskip("diffusers")
    theirs = getattr(diffusers, name)(num_train_timesteps=T, beta_schedule="scaled_linear", clip_sample=False)
    theirs.set_timesteps(4)
    levels = [int(t) + 1 for t in theirs.timesteps]
    network, generator = Network(), torch.Generator().manual_seed(0)
    x_T = torch.randn(2, 1, 4, 4, generator=generator, dtype=torch.float64)
    z = torch.randn(4, 2, 1, 4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    drawn = torch.Generator().manual_seed(5)
    seen, x = [], x_T
    with torch.no_grad():
        for t in theirs.timesteps[:-1]:
            x = theirs.step(network(x, t.expand(2)), t, x, generator=drawn)[0]
            seen.append(x)
    path = DDPM(network, LINEAR, T, clip=None).sample(
        tuple(x_T.shape), x_T=x_T, sampler=ours, steps=[*levels, 0], noise=z, return_trajectory=True
    )
    for got, want in zip(path[1:], seen, strict=False):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)  # their tables are float32


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (functools.partial(steps.tcd, gamma=1.1), r"gamma: expected a number from 0 to 1, got 1\.1"),
        (functools.partial(steps.tcd, gamma=-0.1), r"gamma: expected a number from 0 to 1, got -0\.1"),
        (functools.partial(steps.lcm, sigma_data=-1.0), "sigma_data: expected a finite number of at least 0"),
        (functools.partial(steps.consistency, least=-1.0), "least: expected a finite number of at least 0"),
    ],
)
def test_wrong_options(make, said):
    with pytest.raises(ValueError, match=said):
        ScoreSDE(Network(), "vp", "v").sample((2, 1, 4, 4), sampler=make, steps=3)
