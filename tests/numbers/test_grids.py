"""Grids of levels against their formulas and other libraries."""

import itertools
import math

import numpy as np
import pytest
import torch

from fastdiff import DDPM, grids, schedule
from fastdiff.flow import Flow
from fastdiff.process import VE, VP, Chain, Ladder, Process
from fastdiff.steps import make_steps

pytestmark = pytest.mark.filterwarnings("ignore:schedule. alpha_bar_T")
LINEAR = Chain(schedule.scaled_linear(1000))
PROCESSES = {"chain": LINEAR, "vp": VP(), "ve": VE(0.002, 80.0), "ladder": Ladder(50.0, 0.01, 20)}
each = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def ratios(grid: tuple) -> list[float]:
    made, levels = grid
    return (made.sigma / made.alpha)[levels].tolist()


@each
def test_given_sigmas_are_visited_and_then_data(process: Process):
    wanted = [9.0, 3.0, 0.5, 0.02]
    assert ratios(grids.given(process, wanted)) == pytest.approx([*wanted, 0.0], rel=1e-9)
    assert ratios(grids.given(process, torch.tensor([*wanted, 0.0], dtype=torch.float64))) == pytest.approx(
        [*wanted, 0.0], rel=1e-9
    )


@each
def test_exponential_is_even_in_lambda(process: Process):
    found = ratios(grids.exponential(process, 7, sigma_min=0.05, sigma_max=9.0))
    assert found == pytest.approx([9.0 * (0.05 / 9.0) ** (i / 6) for i in range(7)] + [0.0], rel=1e-9)
    low, high = process.sigma_range()
    assert ratios(grids.exponential(process, 3))[0] == pytest.approx(min(high, 80.0), rel=1e-9)
    assert ratios(grids.exponential(process, 3))[2] == pytest.approx(max(low, 0.002), rel=1e-9)
    assert len(grids.exponential(process, 1)[1]) == 2


@pytest.mark.parametrize(("alpha", "beta"), [(0.6, 0.6), (1.0, 1.0), (0.5, 2.5), (3.0, 0.7)])
def test_beta_has_the_quantiles_of_scipy(alpha, beta):
    stats = pytest.importorskip("scipy.stats")
    want = 0.03 + (14.0 - 0.03) * stats.beta.ppf(1 - np.linspace(0, 1, 12), alpha, beta)
    found = ratios(grids.beta(LINEAR, 12, alpha=alpha, beta=beta, sigma_min=0.03, sigma_max=14.0))
    assert found == pytest.approx([*want, 0.0], rel=1e-9)


@pytest.mark.parametrize("model", grids.ALIGN_YOUR_STEPS)
def test_align_your_steps(model):
    known = grids.ALIGN_YOUR_STEPS[model]
    process = LINEAR if model != "svd" else VE(0.002, 700.0)
    high = process.sigma_range()[1]
    assert ratios(grids.align_your_steps(process, model)) == pytest.approx(
        [*(min(k, high) for k in known[:-1]), 0.0], rel=1e-8
    )
    half = ratios(grids.align_your_steps(process, model, 20))
    assert len(half) == 21 and half[2] == pytest.approx(known[1], rel=1e-8)
    assert half[3] == pytest.approx(math.sqrt(known[1] * known[2]), rel=1e-8)


def test_align_your_steps_are_the_levels_of_diffusers():
    """Their sigmas have three digits and one per cent, and their timesteps are those of Stable Diffusion."""
    utils = pytest.importorskip("diffusers.schedulers.scheduling_utils")
    for model, name in (("sd", "StableDiffusion"), ("sdxl", "StableDiffusionXL"), ("svd", "StableDiffusionVideo")):
        want = utils.AysSchedules[f"{name}Sigmas"]
        process = LINEAR if model != "svd" else VE(0.002, 700.0)
        assert ratios(grids.align_your_steps(process, model)) == pytest.approx(want, rel=1.5e-2)
    made, levels = grids.align_your_steps(LINEAR, "sd")
    assert (made.time[levels[:-1]] - 1).round().tolist() == utils.AysSchedules["StableDiffusionTimesteps"]


@pytest.mark.parametrize(
    ("spacing", "n", "offset"),
    [*itertools.product(grids.SPACINGS, [1, 7, 50, 1000], [0]), ("leading", 7, 1), ("leading", 50, 1)],
)
def test_timesteps_of_diffusers(spacing, n, offset):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(num_train_timesteps=1000, timestep_spacing=spacing, steps_offset=offset)
    theirs.set_timesteps(n)
    made, levels = grids.spaced(LINEAR, n, spacing, offset)
    assert made is LINEAR.schedule and levels.tolist() == [int(t) + 1 for t in theirs.timesteps] + [0]


def test_with_middles():
    for process in (LINEAR, VP(), VE(0.002, 80.0)):
        made, levels = grids.with_middles(process, process.grid(3), torch.tensor([2.0, 0.3], dtype=torch.float64))
        plain = ratios(process.grid(3))
        assert ratios((made, levels)) == pytest.approx([plain[0], 2.0, plain[1], 0.3, *plain[2:]], rel=1e-9)


@pytest.mark.parametrize("sampler", ["dpm2", "dpm++2s_ancestral", "dpm++sde"])
def test_the_least_noise_of_an_exploding_process_is_no_data(sampler):
    """Its time is 0, and may be below; the middle of the way to it is visited."""
    process = VE(0.002, 80.0)
    for least in (0.002, 0.001):
        table = make_steps(process, sampler, process.karras(4, sigma_min=least), "x0", None)
        assert len(table) == 7 and table.levels[-1] == 0
        assert process.at(table.levels[-2:-1]).sigma.item() == pytest.approx(least, rel=1e-12)


def test_flows_from_pure_noise_have_a_largest_sigma():
    for last, high in ((1.0, 80.0), (0.9, 9.0)):
        for made in (grids.exponential(Flow(last=last), 5), grids.beta(Flow(last=last), 5), Flow(last=last).karras(5)):
            assert ratios(made)[0] == pytest.approx(high, rel=1e-9)


def test_samples_on_every_grid():
    class Zero(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return 0 * x

    ddpm = DDPM(Zero(), "scaled_linear", 1000, "v")
    made = [
        grids.exponential(ddpm.process, 4), grids.beta(ddpm.process, 4), grids.align_your_steps(ddpm.process, "sd"),
        grids.spaced(ddpm.process, 4, "leading"), grids.given(ddpm.process, [5.0, 1.0]),
    ]  # fmt: skip
    for grid in made:
        assert ddpm.sample((2, 3), sampler="unipc", steps=grid, seed=0).isfinite().all()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: grids.given(LINEAR, [1.0, 2.0]), r"sigmas: expected decreasing numbers, got \[1\.0, 2\.0\]"),
        (lambda: grids.given(LINEAR, []), "sigmas: expected one or more finite numbers above 0"),
        (lambda: grids.given(LINEAR, [1.0, -1.0]), "sigmas: expected one or more finite numbers above 0"),
        (lambda: grids.given(LINEAR, [math.inf, 1.0]), "sigmas: expected one or more finite numbers above 0"),
        (lambda: grids.given(LINEAR, [1e9, 1.0]), "sigma: expected levels from"),
        (lambda: grids.exponential(LINEAR, 0), "steps: expected an integer of at least 1, got 0"),
        (lambda: grids.exponential(LINEAR, 3, sigma_min=2.0, sigma_max=1.0), "sigma_min, sigma_max: expected 0 <"),
        (lambda: grids.beta(LINEAR, 3, alpha=0.0), r"alpha, beta: expected finite numbers above 0, got 0\.0 and 0\.6"),
        (lambda: grids.align_your_steps(LINEAR, "flux"), "model: expected one of sd, sdxl, svd, got 'flux'"),
        (lambda: grids.spaced(VP(), 4, "leading"), "process: expected a chain, which has timesteps, got VP"),
        (lambda: grids.spaced(LINEAR, 4, "even"), "spacing: expected one of trailing, leading, linspace, got 'even'"),
        (lambda: grids.spaced(LINEAR, 1001, "leading"), "steps: expected an integer from 1 to 1000, got 1001"),
        (lambda: grids.spaced(LINEAR, 1000, "leading", 1), "offset: expected levels from 1 to 1000, got 2 to 1001"),
    ],
)
def test_what_is_no_grid_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
