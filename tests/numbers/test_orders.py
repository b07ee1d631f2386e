"""How fast the errors of the samplers fall with the number of steps, and how far from the data they end."""

import functools
import math

import pytest
import torch
from gaussian import STD, exact, moments
from torch import Tensor, nn

from fastdiff import DDPM, FlowMatching, ScoreSDE, grids, steps
from fastdiff.diffusion import Diffusion
from fastdiff.flow import Flow
from fastdiff.process import VE, VP, Process
from fastdiff.rows import columns
from fastdiff.steps import SAMPLERS

VAR = torch.tensor(STD, dtype=torch.float64) ** 2
HIGH, LOW = 10.0, 0.2


def even(process: Process, n: int, doubling: bool = False) -> tuple:
    """n steps of one size in log(sigma / alpha). `doubling`: the first one in parts that double from 2^-12 of it. So a
    multistep rule has all its points while the errors are small."""
    parts = [2.0**-12, *(2.0 ** (k - 12) for k in range(12))] if doubling else [1.0]
    size = math.log(HIGH / LOW) / n
    place = math.log(HIGH) - size * torch.tensor([0.0, *parts, *[1.0] * (n - 1)], dtype=torch.float64).cumsum(0)
    made, levels = grids.given(process, place.exp())
    return made, levels[:-1]  # the step to data does not shrink with the others


def errors_of_flow(sampler, process: Process, n: int) -> Tensor:
    """The gain of the map from the start to the end, against that of the exact flow."""
    made, levels = even(process, n, doubling=True)
    _, std = moments(exact(ScoreSDE, process, objective="x0"), sampler, (made, levels))
    ends = [made.alpha[k] ** 2 * VAR + made.sigma[k] ** 2 for k in (levels[0], levels[-1])]
    return std / made.prior_std(int(levels[0])) - (ends[1] / ends[0]).sqrt()


FLOWS = {
    "dpm++2m": ("dpm++2m", 2),
    "dpm++3m_sde, eta 0": (functools.partial(steps.dpm_solver_pp_3m_sde, eta=0.0), 2),
    "dpm2": ("dpm2", 2),
    "dpm++2s": ("dpm++2s", 2),
    "plms": ("plms", 2),
    "deis 1": (functools.partial(steps.deis, order=1), 1),
    "deis 2": (functools.partial(steps.deis, order=2), 2),
    "deis": ("deis", 3),
    "deis 4": (functools.partial(steps.deis, order=4), 4),
    "lms 3": (functools.partial(steps.lms, order=3), 3),
    "lms": ("lms", 4),
    "unipc 1 bh1": (functools.partial(steps.unipc, order=1, variant="bh1"), 2),
    "unipc 1 bh2": (functools.partial(steps.unipc, order=1, variant="bh2"), 2),
    "unipc 2 bh2": (functools.partial(steps.unipc, order=2, variant="bh2"), 3),
    "unipc": ("unipc", 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("run", FLOWS)
def test_order_of_convergence(run):
    sampler, order = FLOWS[run]
    process = VP() if run in ("plms", "dpm2") else VE(0.002, 80.0)
    coarse, fine = (errors_of_flow(sampler, process, n) for n in ((512, 1024) if order == 3 else (256, 512)))
    moving = coarse.abs() > 1e-12  # VP's flow leaves N(0, 1) where it is
    rate = (coarse / fine).abs().log2()
    assert ((rate - order).abs() < 0.1)[moving].all() and moving.sum() >= 3, rate


def error_of_variance(sampler, n: int) -> Tensor:
    """After the reverse SDE of Gaussian data from N(0, HIGH^2): y_s given y_t has the gain K, and its own variance."""
    process = VE(0.002, 80.0)
    made, levels = even(process, n)
    _, std = moments(exact(ScoreSDE, process, objective="x0"), sampler, (made, levels))
    gain = (VAR + LOW**2) / (VAR + HIGH**2)
    return std**2 - (gain**2 * HIGH**2 + VAR + LOW**2 - gain**2 * (VAR + HIGH**2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "order"), [("euler_ancestral", 1), ("dpm++sde", 2), ("dpm++2m_sde", 2), ("dpm++3m_sde", 2)]
)
def test_order_of_convergence_of_the_variance(sampler, order):
    coarse, fine = (error_of_variance(sampler, n) for n in (128, 256))
    rate = (coarse / fine).abs().log2()
    # The error of 2M SDE changes its sign with the spread of the data, and 3M SDE's third-order part is large.
    assert ((rate - order).abs() < 0.13).sum() >= 3, rate


# --- a mixture of two Gaussians -----------------------------------------------------------------------------------

WEIGHTS, CENTERS, SPREADS = (0.4, 0.6), (-0.5, 0.5), (0.15, 0.2)


def density(x: Tensor, variance: Tensor | float = 0.0) -> Tensor:
    parts = (
        w / math.sqrt(2 * math.pi) / (s**2 + variance) ** 0.5 * torch.exp(-((x - m) ** 2) / 2 / (s**2 + variance))
        for w, m, s in zip(WEIGHTS, CENTERS, SPREADS, strict=True)
    )
    return sum(parts)


class Mixture(nn.Module):
    """E[x_0 | x_t] of the mixture."""

    def __init__(self):
        super().__init__()
        self.like = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        made = self.process.at(c.double()[:1] / 1000 if isinstance(self.process, Flow) else c.double()[:1] + 1)
        alpha, var = made.alpha, made.sigma**2
        shares, means = [], []
        for w, m, s in zip(WEIGHTS, CENTERS, SPREADS, strict=True):
            total = alpha**2 * s**2 + var
            shares.append(math.log(w) - 0.5 * total.log() - (x - alpha * m) ** 2 / 2 / total)
            means.append((alpha * s**2 * x + var * m) / total)
        return (torch.stack(shares).softmax(0) * torch.stack(means)).sum(0)


def mixture(diffusion: Diffusion | None = None) -> Diffusion:
    """A diffusion whose model predicts exactly; that of DDPM if None is given."""
    made = DDPM(Mixture(), "linear", 1000, "x0", clip=None) if diffusion is None else diffusion
    made.model.process = made.process
    return made


def divergence(x: Tensor, found: Tensor) -> float:
    """KL(found || data) by the trapezoid rule over increasing x."""
    integrand = torch.where(found > 1e-300, found * (found / density(x)).log(), 0.0)
    assert torch.trapezoid(found, x).item() == pytest.approx(1, abs=1e-3)
    return torch.trapezoid(integrand, x).item()


@pytest.mark.parametrize(
    ("sampler", "most"), [("unipc", 1e-2), ("dpm++2m", 1e-2), ("deis", 1e-2), ("ddim", 5e-2), ("flow", 1e-2)]
)
def test_a_mixture_by_the_ode(sampler, most):
    """The map of the start is increasing, so that the density of the end is that of the start over the slope."""
    if sampler == "flow":
        made, how = mixture(FlowMatching(Mixture(), "x0")), {"sampler": "ddim", "steps": 50}
    else:
        made = mixture()
        how = {"sampler": sampler, "steps": grids.exponential(made.process, 50)}
    start = torch.linspace(-5, 5, 8001, dtype=torch.float64)
    end = made.sample((8001, 1), x_T=start[:, None], **how).flatten()
    assert (end.diff() > 0).all()
    slope = torch.gradient(end, spacing=(start,))[0]
    normal = torch.exp(-(start**2) / 2) / math.sqrt(2 * math.pi)
    assert divergence(end, normal / slope) < most


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["dpm++2m_sde", "dpm++3m_sde", "dpm++sde"])
def test_a_mixture_by_the_sde(sampler):
    """The state before the last step is the mean over many runs of the Gaussian that the last noise makes; the estimate
    there, an increasing function of it, is the sample."""
    ddpm, batch = mixture(), 20000
    grid = grids.exponential(ddpm.process, 50)
    table = ddpm.step_table(sampler, grid)
    last, before = len(table) - 2, {}
    drawn = torch.Generator().manual_seed(0)

    def noise(k: int) -> Tensor:
        return torch.randn(batch, 1, generator=drawn, dtype=torch.float64) * (k != last)

    def keep(k: int, level: float, x: Tensor) -> None:
        before[k] = x.clone() if k == last else None

    ddpm.sample((batch, 1), sampler=sampler, steps=grid, noise=noise, callback=keep)
    std = columns(table.rows).noise[last]
    x = torch.linspace(-1.5, 1.8, 600, dtype=torch.float64)
    found = torch.exp(-((x - before[last]) ** 2) / (2 * std**2)).mean(0) / (std * math.sqrt(2 * math.pi))
    end = ddpm.model(x[:, None], torch.full((600,), float(table.levels[-2]) - 1)).flatten()
    assert divergence(end, found / torch.gradient(end, spacing=(x,))[0]) < 1e-2


def test_every_sampler_has_an_order_here_or_beside_the_older_ones():
    measured = {sampler for sampler, _ in FLOWS.values() if isinstance(sampler, str)}
    measured |= {"euler_ancestral", "dpm++sde", "dpm++2m_sde", "dpm++3m_sde"}
    older = {"ddpm", "ddim", "heun", "euler_maruyama", "probability_flow", "annealed_langevin", "reverse_diffusion"}
    first = {"predictor_corrector", "dpm2_ancestral", "dpm++2s_ancestral"}
    none = {"consistency", "lcm", "tcd"}
    assert measured | older | first | none == set(SAMPLERS)
