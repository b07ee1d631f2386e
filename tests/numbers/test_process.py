"""Processes: times against levels, rates against derivatives, published figures, grids; and predictions converted."""

import itertools
import math

import mpmath
import pytest
import torch
from mpmath import mpf
from torch import Tensor, nn

from fastdiff import DDPM, NCSN, ScoreSDE, schedule
from fastdiff.edm import Preconditioned
from fastdiff.flow import Flow
from fastdiff.process import SDES, VE, VP, Chain, Ladder, Process, SubVP
from fastdiff.schedule import SCHEDULES, NoiseSchedule, make_schedule

pytestmark = pytest.mark.filterwarnings("ignore:schedule. alpha_bar_T")
PROCESSES = {
    "vp": VP(),
    "flat vp": VP(2.0, 2.0),
    "subvp": SubVP(),
    "ve": VE(),
    "edm": VE(0.002, 80.0),
    "flow": Flow(last=0.999),
    "preconditioned": Preconditioned(0.7),
    "linear": Chain(schedule.linear(1000)),
    "cosine": Chain(schedule.cosine(20)),
    "ladder": Ladder(),
    "spread": Chain(NoiseSchedule.from_alpha_sigma([0.9, 0.5, 0.1], [0.3, 0.8, 2.0])),
}
EACH = pytest.mark.parametrize("name", PROCESSES)
SDE = pytest.mark.parametrize("name", ["vp", "flat vp", "subvp", "ve", "edm"])


def some_times(process: Process, n: int = 23) -> Tensor:
    return torch.linspace(process.first, process.last, n, dtype=torch.float64)


def numbers(name: str, t: mpf) -> tuple[mpf, mpf]:
    """(log alpha, sigma^2) from Song et al. 2021, eq. 29 to 33, or as Chain says, in 40 digits."""
    process = PROCESSES[name]
    if isinstance(process, VP):
        low, high = mpf(process.beta_min), mpf(process.beta_max)
        total = low * t + (high - low) * t**2 / 2
        return -total / 2, (1 - mpmath.exp(-total)) ** (2 if name == "subvp" else 1)
    if isinstance(process, Flow):
        return mpmath.log(1 - t), t**2
    if isinstance(process, Preconditioned):
        n = t**2 + mpf(0.7) ** 2
        return -mpmath.log(n) / 2, t**2 / n
    if isinstance(process, VE):
        low, high = {"ve": (0.01, 50.0), "edm": (0.002, 80.0)}[name]
        return mpf(0), (mpf(low) * (mpf(high) / mpf(low)) ** t) ** 2
    made = process.schedule
    below = int(mpmath.floor(t)) if t < made.timesteps else made.timesteps - 1
    share = t - below
    log_alpha = (1 - share) * mpf(made.log_alpha[below].item()) + share * mpf(made.log_alpha[below + 1].item())
    if made.vp:
        return log_alpha, 1 - mpmath.exp(2 * log_alpha)
    ends = [mpmath.log(mpf(made.sigma[below + k].item())) for k in (0, 1)]
    return log_alpha, mpmath.exp(2 * ((1 - share) * ends[0] + share * ends[1]))


@EACH
def test_levels_are_the_published_formulas(name):
    times = some_times(PROCESSES[name])
    made = PROCESSES[name].at(times)
    assert made.vp == (name in ("vp", "flat vp", "linear", "cosine")) and made.log_alpha.dtype == torch.float64
    for k, t in enumerate(times.tolist()):
        log_alpha, var = numbers(name, mpf(t))
        assert made.log_alpha[k].item() == pytest.approx(float(log_alpha), rel=1e-12, abs=1e-15)
        assert made.sigma[k].item() == pytest.approx(float(mpmath.sqrt(var)), rel=1e-11)


@EACH
def test_rates_are_the_derivatives(name):
    """f = d log alpha / dt, g^2 = d sigma^2 / dt - 2 f sigma^2, by central differences in 40 digits."""
    process, h = PROCESSES[name], mpf(10) ** -12
    whole = isinstance(process, Chain)
    times = some_times(process)
    times = (times[:-1].floor() + 0.37) if whole else times
    if whole:  # where the first level's rates are those of the interval above
        here, above = (process.at(torch.tensor([t], dtype=torch.float64)) for t in (process.first, 1.5))
        if not here.vp:
            assert here.drift == above.drift and here.rates[1].isfinite()
    made = process.at(times)
    f, g2 = made.rates
    assert torch.equal(made.time, times)
    with mpmath.workdps(40):
        for k, t in enumerate(map(mpf, times.tolist())):
            (la, va), (lb, vb) = numbers(name, t - h), numbers(name, t + h)
            rate = (lb - la) / (2 * h)
            assert f[k].item() == pytest.approx(float(rate), rel=1e-9, abs=1e-15)
            growth = (vb - va) / (2 * h) - 2 * rate * numbers(name, t)[1]
            assert g2[k].item() == pytest.approx(float(growth), rel=1e-9)


def test_a_chain_without_rates_says_so():
    with pytest.raises(ValueError, match="schedule: expected the levels of an SDE, got a chain without rates"):
        _ = schedule.linear(10).rates


@EACH
def test_time_of_is_the_inverse_of_at(name):
    process, times = PROCESSES[name], some_times(PROCESSES[name])
    made = process.at(times)
    ratio = made.sigma / made.alpha
    torch.testing.assert_close(process.time_of(ratio), times, rtol=1e-9, atol=1e-12)
    back = process.at(process.time_of(ratio))
    torch.testing.assert_close(back.sigma / back.alpha, ratio, rtol=1e-10, atol=0)
    low, high = process.sigma_range()
    assert high == pytest.approx(ratio[-1].item(), rel=1e-12)
    if not isinstance(process, VE):  # which may be asked down to t = 0
        assert low == pytest.approx(ratio[0].item(), rel=1e-12)


def test_time_of_keeps_its_digits_near_data():
    for process in (VP(), SubVP()):
        for t in (1e-8, 1e-5):
            made = process.at(torch.tensor([t], dtype=torch.float64))
            assert process.time_of(made.sigma / made.alpha).item() == pytest.approx(t, rel=1e-12, abs=0)


def test_sigma_ranges():
    assert VE().sigma_range() == pytest.approx((0.01, 50.0), rel=1e-12)
    assert Ladder(1.0, 0.01, 10).sigma_range() == pytest.approx((0.01, 1.0), rel=1e-12)
    beta, first = 1e-4, schedule.linear(1000)
    low, high = Chain(first).sigma_range()
    assert low == pytest.approx(math.sqrt(beta / (1 - beta)), rel=1e-9)
    assert high == pytest.approx(4.035993e-05**-0.5, rel=1e-6)
    assert Chain(schedule.raised_cosine(10)).sigma_range()[1] == math.inf
    total = 0.1 * 1e-3 + 19.9 * 1e-6 / 2
    assert VP().sigma_range()[0] == pytest.approx(math.sqrt(math.expm1(total)), rel=1e-12)


def test_vp_is_the_limit_of_ddpm_and_not_equal():
    """alpha_bar at the end: exp(-10.05) for the SDE, 4.0358e-5 for the chain, and in between as T grows."""
    end = torch.tensor([1.0], dtype=torch.float64)
    limit = VP().at(end).alpha_bar.item()
    assert limit == pytest.approx(4.3186e-5, abs=0.5e-9) and limit == pytest.approx(math.exp(-10.05), rel=1e-12)
    chain = Chain(schedule.linear(1000))
    assert chain.at(1000 * end).alpha_bar.item() == pytest.approx(4.0358e-5, abs=0.5e-9)
    gaps = []
    for n in (1000, 2000, 4000):
        betas = (0.1 + 19.9 * torch.linspace(0, 1, n, dtype=torch.float64)) / n
        gaps.append(limit - NoiseSchedule.from_betas(betas).alpha_bar[-1].item())
    assert all(1.8 < a / b < 2.2 for a, b in itertools.pairwise(gaps)) and gaps[-1] > 0


# --- chains -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SCHEDULES, "ladder", "spread"])
def test_a_chain_at_whole_times_is_its_schedule(name):
    made = make_schedule(name, 30) if name in SCHEDULES else PROCESSES[name].schedule
    first = 0 if made.vp else 1
    for times in (torch.arange(first, made.timesteps + 1), torch.arange(first, made.timesteps + 1).double()):
        here = Chain(made).at(times)
        assert torch.equal(here.log_alpha, made.log_alpha[first:])
        assert torch.equal(here.sigma, made.sigma[first:])
    for wrong in (first - 0.5, made.timesteps + 0.5, math.nan):
        with pytest.raises(ValueError, match=f"times: expected them from {first} to {made.timesteps}, got"):
            Chain(made).at(torch.tensor([wrong], dtype=torch.float64))


def test_a_chain_is_interpolated_in_the_logarithm():
    made = NoiseSchedule.from_betas([0.1, 0.2, 0.4])
    here = Chain(made).at(torch.tensor([0.25, 1.5], dtype=torch.float64))
    kept = torch.tensor([0.9**0.25, 0.9 * 0.8**0.5], dtype=torch.float64)
    torch.testing.assert_close(here.alpha_bar, kept, rtol=1e-13, atol=0)
    torch.testing.assert_close(here.sigma**2, 1 - kept, rtol=1e-13, atol=0)
    f, g2 = here.rates
    assert g2.tolist() == pytest.approx([-math.log(0.9), -math.log(0.8)], rel=1e-12)
    assert f.tolist() == pytest.approx([math.log(0.9) / 2, math.log(0.8) / 2], rel=1e-12)


def test_increments():
    """Euler's f dt and g^2 dt with the rates at t; in a chain, what log alpha and sigma^2 gain: for a VP chain they are
    the integrals, -log(alpha_s / alpha_t) and -log(1 - beta)."""
    process, t, s = VP(), torch.tensor([3, 2]), torch.tensor([2, 1])
    made = process.discretize(torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64))
    drift, g2 = made.increments(t, s)
    beta = [0.1 + 19.9 * 1.0, 0.1 + 19.9 * 0.5]
    assert g2.tolist() == pytest.approx([0.5 * beta[0], 0.4 * beta[1]], rel=1e-12)
    assert drift.tolist() == pytest.approx([-0.25 * beta[0], -0.2 * beta[1]], rel=1e-12)
    chain = NoiseSchedule.from_betas([0.1, 0.2, 0.4])
    drift, g2 = chain.increments(t, s)
    assert g2.tolist() == pytest.approx([-math.log(0.6), -math.log(0.8)], rel=1e-12)
    assert drift.tolist() == pytest.approx([math.log(0.6) / 2, math.log(0.8) / 2], rel=1e-12)
    ladder = NoiseSchedule.from_alpha_sigma(torch.ones(3), [0.1, 0.5, 2.0])
    drift, g2 = ladder.increments(t, s)
    assert g2.tolist() == pytest.approx([4 - 0.25, 0.25 - 0.01], rel=1e-12) and (drift == 0).all()
    spread = PROCESSES["spread"].schedule
    drift, g2 = spread.increments(t, s)
    assert drift.tolist() == pytest.approx([math.log(0.1 / 0.5), math.log(0.5 / 0.9)], rel=1e-12)
    want = [4 - 0.64 - 2 * math.log(0.2) * 4, 0.64 - 0.09 - 2 * math.log(0.5 / 0.9) * 0.64]
    assert g2.tolist() == pytest.approx(want, rel=1e-12)


def test_conditions():
    """999 t, sigma, or the index t - 1."""
    times = torch.tensor([0.25, 1.0], dtype=torch.float64)
    assert VP().condition(times).tolist() == [249.75, 999.0] and SubVP().condition(times).tolist() == [249.75, 999.0]
    assert VE().condition(times).tolist() == pytest.approx([0.01 * 5000**0.25, 50.0], rel=1e-12)
    ladder = Ladder(1.0, 0.01, 3)
    assert ladder.condition(torch.tensor([3, 2, 1])).tolist() == pytest.approx([1.0, 0.1, 0.01], rel=1e-12)
    assert Flow().condition(times).tolist() == [250.0, 1000.0]
    quarter = math.log(0.25) / 4
    assert Preconditioned().condition(times).tolist() == pytest.approx([quarter, 0.0], rel=1e-12)
    told = Chain(schedule.linear(10)).condition(torch.tensor([10, 1, 0]))
    assert told.dtype == torch.int64 and told.tolist() == [9, 0, 0]
    assert Chain(schedule.linear(10)).condition(torch.tensor([1.5, 0.5])).tolist() == [0.5, 0.0]


@EACH
def test_times_on_another_device_are_not_waited_for(name):
    """A tensor without values cannot be looked at, and a GPU's should not."""
    times = some_times(PROCESSES[name]).to("meta")
    made = PROCESSES[name].at(times)
    assert {v.device.type for v in (made.log_alpha, made.sigma, *made.rates)} == {"meta"}
    assert PROCESSES[name].condition(times).device.type == "meta"


class Listens(nn.Module):
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        self.told = c
        return self.weight * x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_models_are_told_numbers_in_the_type_of_the_state(dtype):
    model = Listens(dtype)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.zeros(2, 3)
    for made in (ScoreSDE(model, "vp"), ScoreSDE(model, "ve"), NCSN(model), DDPM(model, "linear", 20, "x0")):
        t = 0.5 if isinstance(made, ScoreSDE) else 3
        calls = [lambda m, t=t: m(x, t=t), lambda m, t=t: m.predict_x0(x, t), lambda m, t=t: m.predict(x, t, "eps")]
        for call in (*calls, lambda m: m.sample((2, 3), steps=1), lambda m: m.sample((2, 3), steps=2, sampler="heun")):
            call(made)
            heard = model.told.dtype
            assert heard == state or (heard == torch.int64 and isinstance(made, DDPM))
    assert heard == state  # the levels of heun lie between those of a chain


# --- grids --------------------------------------------------------------------------------------------------------


@SDE
def test_grid_of_an_sde(name):
    process = PROCESSES[name]
    made, levels = process.grid(None)
    assert len(levels) == 1002 and levels[0] == 1001 and levels[-1] == 0
    made, levels = process.grid(7)
    times = made.times(levels)
    want = [1 - (1 - process.first) * k / 7 for k in range(8)] + [0.0]
    assert times.tolist() == pytest.approx(want, rel=1e-12, abs=1e-15)
    same = process.at(times[:-1])
    for got, expected in ((made.log_alpha, same.log_alpha), (made.sigma, same.sigma), (made.g2, same.g2)):
        torch.testing.assert_close(got[levels][:-1], expected, rtol=1e-12, atol=1e-12)
    assert made.log_alpha[0] == 0 and made.sigma[0] == 0 and made.vp == same.vp
    for given_times in ([1.0, 0.3, 0.1], (1.0, 0.3, 0.1, 0.0), torch.tensor([1.0, 0.3, 0.1]), iter([1, 0.3, 0.1])):
        made, levels = process.grid(given_times)
        assert made.times(levels).tolist() == pytest.approx([1.0, 0.3, 0.1, 0.0], rel=1e-6)
    assert process.grid([0.5, 0.0])[1].tolist() == [1, 0]


def test_grid_of_a_chain():
    process = Chain(schedule.linear(10))
    for given_levels in ([10, 6, 1, 0], torch.tensor([10, 6, 1, 0]), (10.0, 6.0, 1.0, 0.0)):
        made, levels = process.grid(given_levels)
        assert made is process.schedule and levels.dtype == torch.int64 and levels.tolist() == [10, 6, 1, 0]
    assert process.grid(5)[1].tolist() == [10, 8, 6, 4, 2, 0] and process.grid(None)[1].tolist() == [*range(10, -1, -1)]
    assert process.ladder(2)[1].tolist() == [v for k in range(10, 0, -1) for v in (k, k)] + [1, 0]
    assert len(process.ladder(None)[1]) == 1002


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (0, "steps: expected an integer"),
        (True, "steps: expected an integer"),
        (2.5, "steps: expected an integer"),
        ([1.0], "steps: expected a number, or two or more decreasing times"),
        ([0.5, 0.5], "decreasing times"),
        ([0.5, 1.0], "decreasing times"),
        ([1.0, math.nan], "decreasing times"),
        ([[1.0, 0.5]], "decreasing times"),
        ([2000.0, 0.5], "steps: expected times from"),
        ([1.0, -0.5], "steps: expected times from"),
    ],
)
def test_wrong_steps(steps, said):
    for process in (VP(), Chain(schedule.linear(1000))):
        with pytest.raises(ValueError, match=said):
            process.grid(steps)
    with pytest.raises(ValueError, match="steps: expected whole levels"):
        Chain(schedule.linear(1000)).grid([10.5, 1.0])
    for wrong in ("5", [None]):
        with pytest.raises(TypeError, match="steps: expected numbers"):
            VP().grid(wrong)


@pytest.mark.parametrize("timesteps", [2, 7, 20, 50, 100, 333, 1000])
@pytest.mark.parametrize("name", [n for n in SCHEDULES if n != "raised_cosine"])
def test_karras_grids_end_where_their_chain_does(name, timesteps):
    process = Chain(make_schedule(name, timesteps))
    low, high = process.sigma_range()
    for n in (1, 2, 18):
        made, levels = process.karras(n)
        ratio = made.sigma[levels] / made.alpha[levels]
        assert ratio[0].item() == pytest.approx(min(high, 80.0), rel=1e-9)
        assert n == 1 or ratio[-2].item() == pytest.approx(max(low, 0.002), rel=1e-9)
        assert (made.time <= timesteps).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps: expected an integer of at least 1"),
        ({"sigma_max": math.inf}, "sigma_min, sigma_max: expected 0 < sigma_min <= sigma_max < inf"),
        ({"sigma_min": 0.0}, "sigma_min, sigma_max: expected 0 < sigma_min"),
        ({"sigma_min": 9.0, "sigma_max": 1.0}, "sigma_min, sigma_max: expected"),
        ({"rho": 0.0}, "rho: expected a finite number above 0"),
        ({"rho": math.nan}, "rho: expected a finite number above 0"),
        ({"rho": 1e-3}, "rho: expected a larger number for sigmas from 0.01.* to 80, got 0.001"),
        ({"churn_min": math.nan}, "churn_min, churn_max: expected numbers, got nan and inf"),
        ({"churn": -1.0}, "churn: expected a number of at least 0"),
        ({"churn": math.nan}, "churn: expected a number of at least 0"),
        ({"sigma_max": 400.0}, "sigma: expected levels from 0.01 to 157.4, those of the schedule"),
    ],
)
def test_wrong_karras(options, said):
    with pytest.raises(ValueError, match=said):
        Chain(schedule.linear(1000)).karras(**options)


def test_wrong_processes():
    for low, high in ((0.0, 1.0), (2.0, 1.0), (-1.0, 1.0), (0.1, math.inf), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="beta_min, beta_max: expected"):
            VP(low, high)
        for made in (VE, Ladder):
            with pytest.raises(ValueError, match="sigma_min, sigma_max: expected 0 < sigma_min < sigma_max"):
                made(*((low, high) if made is VE else (high, low)))
    with pytest.raises(ValueError, match="levels: expected at least 2, from sigma_min to sigma_max, got 1"):
        Ladder(levels=1)
    with pytest.raises(ValueError, match="sampler: 'annealed_langevin' expected the levels of a ladder"):
        VP().ladder(3)
    assert set(SDES) == {"vp", "subvp", "ve"}
