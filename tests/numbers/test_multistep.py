"""Samplers that remember: rings of slots, starts without signal, launches, and options that cannot be right."""

import functools
import math

import pytest
import torch
from gaussian import exact, moments
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff import DDPM, ScoreSDE, schedule, steps
from fastdiff.process import VP, Chain
from fastdiff.rows import columns, history_columns
from fastdiff.schedule import NoiseSchedule
from fastdiff.steps import SAMPLERS, make_steps
from fastdiff.steps.weights import exponential_moments, phi, ring, weights_of

pytestmark = pytest.mark.filterwarnings("ignore:schedule. alpha_bar_T")
STARTS_IN_NOISE = ["dpm++2m", "dpm++2m_sde", "dpm++3m_sde", "unipc", "euler_ancestral", "consistency", "lcm", "tcd"]
NEEDS_SIGNAL = ["deis", "lms", "plms", "dpm2", "dpm2_ancestral", "dpm++2s", "dpm++2s_ancestral", "dpm++sde"]
ENDS = schedule.raised_cosine(12)


# --- weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("z", [-30.0, -1.5, -0.9, -1e-3, 0.0, 1e-3, 0.9, 1.5, 8.0])
def test_phi(z):
    """Against the integral of e^((1 - u) z) u^(k - 1) / (k - 1)! over u from 0 to 1."""
    u = torch.linspace(0, 1, 200001, dtype=torch.float64)
    for k in (1, 2, 3, 4):
        want = torch.trapezoid(torch.exp((1 - u) * z) * u ** (k - 1), u).item() / math.factorial(k - 1)
        assert phi(k, z) == pytest.approx(want, rel=1e-7)
    assert phi(0, z) == pytest.approx(math.exp(z), rel=1e-14)


def test_weights_integrate_polynomials():
    nodes, h = [0.0, -0.7, -1.1], 0.4
    weights = weights_of(nodes, exponential_moments(3, h))
    for power in range(3):
        u = torch.linspace(0, h, 100001, dtype=torch.float64)
        want = torch.trapezoid(torch.exp(u - h) * (u / h) ** power, u).item()
        assert sum(w * node**power for w, node in zip(weights, nodes, strict=True)) == pytest.approx(want, rel=1e-8)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_a_ring_is_a_queue(slots):
    """Walked over a list of slots, it gives what a queue of the last tensors gives."""
    by_age = torch.rand(9, slots, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept = torch.tensor([True, slots == 1, True, True, slots == 1, True, True, True, True])
    made = ring(by_age, None if slots == 1 else kept)
    shares = torch.stack([made[name] for name in ("from_hist", "from_hist2", "from_hist3")[:slots]], 1)
    held, queue = torch.zeros(slots, dtype=torch.float64), [0.0] * slots
    for k in range(9):
        assert (shares[k] * held).sum().item() == pytest.approx(
            sum(a * b for a, b in zip(by_age[k].tolist(), queue, strict=True))
        )
        slot = int(made["slot"][k]) if slots > 1 else 0
        assert (slot >= 0) == bool(kept[k])
        if slot >= 0:
            held[slot], queue = k + 1.0, [k + 1.0, *queue[:-1]]


# --- the start ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", STARTS_IN_NOISE)
def test_a_start_without_signal_is_the_limit_of_little_signal(sampler):
    """Where x_T says nothing, the step after it sees one estimate, and x_T is but noise."""
    almost = ENDS.log_alpha.clone()
    almost[-1] = -300.0
    almost = NoiseSchedule.from_log_alpha_bar(2 * almost)
    levels = torch.arange(12, -1, -1)
    got, want = (SAMPLERS[sampler](made, levels, "v", None).rows for made in (ENDS, almost))
    assert got.isfinite().all()
    if sampler == "unipc":  # its corrector would use the first estimate, at lambda = -300
        fresh = SAMPLERS[sampler](ENDS, levels[1:], "v", None).rows
        for name in ("from_x0", "from_x"):
            torch.testing.assert_close(getattr(columns(got[1:]), name), getattr(columns(fresh), name))
        assert columns(got).from_x0[0] == ENDS.alpha[11] and columns(got).from_x[0] == ENDS.sigma[11]
    else:
        torch.testing.assert_close(got, want, rtol=1e-9, atol=4e-3)  # h / h_before vanishes as 1 / 300
        torch.testing.assert_close(got[3:], want[3:], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["x0", "v"])
@pytest.mark.parametrize("sampler", STARTS_IN_NOISE)
def test_gaussian_data_from_pure_noise(sampler, objective):
    """All are finite, and those of the SDE end near the data's spread."""
    mean, std = moments(exact(DDPM, "raised_cosine", 200, objective=objective), sampler, 200)
    assert mean.isfinite().all() and std.isfinite().all()
    if sampler not in ("consistency", "lcm", "tcd"):
        torch.testing.assert_close(std[::2], torch.tensor([0.5, 1.0], dtype=torch.float64), rtol=0.07, atol=0)


@pytest.mark.parametrize("sampler", NEEDS_SIGNAL)
def test_others_say_that_they_need_signal(sampler):
    model = DDPM(Still(torch.zeros(2, 3)), ENDS, 12, "v")
    with pytest.raises(ValueError, match=r"expected a finite sigma / alpha, got alpha = 0 at level 12; start below it"):
        model.sample((2, 3), sampler=sampler)
    assert model.sample((2, 3), sampler=sampler, steps=[11, 7, 3, 0], seed=0).isfinite().all()


# --- launches -----------------------------------------------------------------------------------------------------


aten = torch.ops.aten
VIEWS = {aten.select.int, aten.unsqueeze.default, aten.expand.default, aten.detach.default}


class Still(nn.Module):
    """Predicts what it was made with, without any operation."""

    def __init__(self, prediction: Tensor):
        super().__init__()
        self.prediction = prediction

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.prediction


@pytest.mark.parametrize(
    "sampler", [name for name in SAMPLERS if name not in ("annealed_langevin", "predictor_corrector")]
)
def test_a_step_is_one_launch_beside_the_model(sampler):
    """Of all that PyTorch is asked for, only the update works on tensors of the size of the data, once a row."""
    shape, seen = (5, 3, 16, 16), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func not in VIEWS and any(isinstance(a, Tensor) and a.numel() >= 5 * 3 * 16 * 16 for a in args):
                seen.append(str(func))
            return func(*args, **(kwargs or {}))

    model = ScoreSDE(Still(torch.zeros(shape)), VP(), "v", clip=1.0)
    x_T = torch.zeros(shape)
    table = model.step_table(sampler, 6)
    with Watch():
        model.sample(shape, x_T=x_T, sampler=sampler, steps=6, seed=1)
    updates = [name for name in seen if "update" in name]
    assert len(updates) == len(table)
    first, last = seen.index(updates[0]), len(seen) - 1 - seen[::-1].index(updates[-1])
    assert set(seen[first : last + 1]) == set(updates), seen


# --- what cannot be right -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (functools.partial(steps.unipc, order=4), "order: expected 1, 2 or 3, got 4"),
        (functools.partial(steps.unipc, order=1.5), "order: expected 1, 2 or 3, got 1.5"),
        (functools.partial(steps.unipc, variant="bh3"), "variant: expected one of bh1, bh2, got 'bh3'"),
        (functools.partial(steps.deis, order=0), "order: expected 1, 2, 3 or 4, got 0"),
        (functools.partial(steps.lms, order=5), "order: expected 1, 2, 3 or 4, got 5"),
        (functools.partial(steps.dpm_solver_pp_2m_sde, eta=-1.0), "eta: expected a finite number of at least 0"),
        (functools.partial(steps.dpm_solver_pp_3m_sde, eta=math.nan), "eta: expected a finite number of at least 0"),
        (functools.partial(steps.dpm2_ancestral, eta=1.5), r"eta: 1\.5 asks for more noise than a level holds"),
        (functools.partial(steps.dpm_solver_pp_sde, eta=1.5), r"eta: 1\.5 asks for more noise than a level holds"),
        (functools.partial(steps.dpm_solver_pp_2s_ancestral, eta=-0.5), "eta: expected a finite number of at least 0"),
        (functools.partial(steps.dpm2_ancestral, eta=math.nan), "eta: expected a finite number of at least 0"),
        (functools.partial(steps.euler_ancestral, eta=1.5), r"eta: 1\.5 asks for more noise than a level holds"),
    ],
)
def test_wrong_options(make, said):
    for process in (Chain(schedule.linear(1000)), VP()):
        with pytest.raises(ValueError, match=said):
            make_steps(process, make, 5, "eps", None)


@pytest.mark.parametrize("sampler", sorted({*steps.SAMPLERS} - {"heun", "dpm++2m", "consistency", "lcm", "tcd"}))
def test_samplers_need_decreasing_levels(sampler):
    """Those of churn rise."""
    process = Chain(schedule.linear(1000))
    with pytest.raises(ValueError, match=r"sampler: '.*' expected decreasing levels, got \["):
        make_steps(process, sampler, process.karras(6, churn=3.0), "eps", None)


def test_a_sampler_need_not_be_hashable():
    class Own(dict):
        def __call__(self, *arguments):
            return steps.ddim(*arguments)

    assert len(make_steps(VP(), Own(), 3, "eps", None)) == 4


def test_singlestep_samplers_need_their_middles():
    linear = schedule.linear(1000)
    for sampler in (steps.dpm2, steps.dpm_solver_pp_2s, steps.dpm_solver_pp_sde):
        with pytest.raises(
            ValueError, match="levels: expected decreasing levels, and the middle of the way after each"
        ):
            sampler(linear, torch.tensor([1000, 500, 0]), "eps")
        with pytest.raises(
            ValueError, match=r"levels: expected sigma / alpha = \d+\.\d+ at level 900, the middle of the way"
        ):
            sampler(linear, torch.tensor([1000, 900, 100, 0]), "eps")
    # in the middle of level 100 and 1000, and a step that ends above data
    process = Chain(linear)
    table = make_steps(process, "dpm2", [1000, 100], "eps", None)
    assert table.levels.tolist() == pytest.approx([1000.0, float(process.time_of(middle(linear))), 100.0])


def middle(made: NoiseSchedule) -> Tensor:
    ratio = made.sigma / made.alpha
    return (ratio[1000] * ratio[100]).sqrt()[None]


def test_what_plms_keeps():
    """Four rows ago lies the first estimate: the one at Euler's guess has no slot."""
    table = make_steps(Chain(schedule.linear(1000)), "plms", 6, "eps", None)
    assert history_columns(table.rows).slot.tolist() == [0, -1, 1, 2, 0, 1, 2]
    assert table.levels.tolist()[:4] == [1000, 833, 833, 667]
