"""Predictions converted between eps, x0, v and score, for any level of any process."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from objectives import targets, x0_errors
from torch import Tensor, nn

from fastdiff import DDPM, NCSN, ScoreSDE, schedule
from fastdiff.diffusion import Diffusion
from fastdiff.objective import (
    OBJECTIVES,
    conversion_rows,
    needs_noise,
    needs_signal,
    target_rows,
    uses_noise,
    uses_x0,
    weights,
)
from fastdiff.process import VE, VP, Process, SubVP
from fastdiff.schedule import NoiseSchedule

pairs = st.sampled_from([(a, b) for a in OBJECTIVES for b in OBJECTIVES])
processes = st.sampled_from([VP(), SubVP(), VE()])
times = st.floats(1e-3, 1.0)
values = st.floats(-3, 3)


@pytest.mark.slow
@given(processes, times, pairs, values, values)
def test_any_prediction_gives_any_other(process: Process, t, pair, x0, z):
    made = process.at(torch.tensor([t], dtype=torch.float64))
    alpha, sigma = made.alpha.item(), made.sigma.item()
    known = targets(alpha, sigma, x0, z)
    u, v = (row.item() for row in conversion_rows(made, *pair))
    x_t = alpha * x0 + sigma * z
    # rounding of x_t and of the prediction, times what multiplies them
    bound = 1e-14 * (abs(u) * (abs(x_t) + 3) + abs(v) * (abs(known[pair[0]]) + 1) + 1)
    assert abs(u * x_t + v * known[pair[0]] - known[pair[1]]) <= bound


@given(processes, times, pairs)
def test_there_and_back_changes_nothing(process: Process, t, pair):
    made = process.at(torch.tensor([t], dtype=torch.float64))
    (u, v), (back_u, back_v) = conversion_rows(made, *pair), conversion_rows(made, *pair[::-1])
    assert (back_v * v).item() == pytest.approx(1, rel=1e-12)
    assert (back_u + back_v * u).item() == pytest.approx(0, abs=1e-12 * (1 + abs(back_u.item())))


def test_score_is_minus_eps_over_sigma():
    made = SubVP().at(torch.tensor([0.3], dtype=torch.float64))
    u, v = conversion_rows(made, "eps", "score")
    assert u == 0 and v.item() == pytest.approx(-1 / made.sigma.item(), rel=1e-15)
    p, q = target_rows(made, "score")
    assert p == 0 and q == v


def test_what_follows_from_the_row_of_an_objective():
    """Those that hold data and noise determine both at both ends."""
    assert [o for o in OBJECTIVES if uses_x0(o)] == ["x0", "v", "flow", "edm"]
    assert [o for o in OBJECTIVES if uses_noise(o)] == ["eps", "v", "score", "flow", "edm"]
    assert [o for o in OBJECTIVES if needs_signal(o)] == ["eps", "score"]
    assert [o for o in OBJECTIVES if needs_noise(o)] == ["x0", "score"]


# By end, what pred determines there: wanted = u x_t + v pred.
DATA, NOISE = (1.0, 0.0), (0.0, 2.0)
KNOWN = {
    (DATA, "eps", "x0"): (1, 0),
    (DATA, "eps", "v"): (0, 1),
    (DATA, "v", "x0"): (1, 0),
    (DATA, "v", "eps"): (0, 1),
    (DATA, "score", "x0"): (1, 0),
    (DATA, "score", "eps"): (0, 0),  # whose noise is 0, as its score is finite
    (DATA, "score", "v"): (0, 0),
    (DATA, "eps", "flow"): (-1, 1),
    (DATA, "v", "flow"): (-1, 1),
    (DATA, "score", "flow"): (-1, 0),
    (DATA, "flow", "x0"): (1, 0),
    (DATA, "flow", "eps"): (1, 1),
    (DATA, "flow", "v"): (1, 1),
    (DATA, "edm", "x0"): (1, 0),
    (DATA, "edm", "eps"): (0, -1),
    (DATA, "edm", "v"): (0, -1),
    (DATA, "edm", "flow"): (-1, -1),
    (DATA, "eps", "edm"): (0, -1),
    (DATA, "v", "edm"): (0, -1),
    (DATA, "score", "edm"): (0, 0),
    (DATA, "flow", "edm"): (-1, -1),
    (NOISE, "eps", "score"): (0, -0.5),
    (NOISE, "score", "eps"): (0, -2),
    (NOISE, "x0", "eps"): (0.5, 0),
    (NOISE, "x0", "v"): (0, -2),
    (NOISE, "v", "x0"): (0, -0.5),
    (NOISE, "v", "eps"): (0.5, 0),
    (NOISE, "x0", "score"): (-0.25, 0),
    (NOISE, "v", "score"): (-0.25, 0),
    (NOISE, "x0", "flow"): (0.5, -1),
    (NOISE, "v", "flow"): (0.5, 0.5),
    (NOISE, "flow", "x0"): (0.5, -1),
    (NOISE, "flow", "eps"): (0.5, 0),
    (NOISE, "flow", "v"): (-1, 2),
    (NOISE, "flow", "score"): (-0.25, 0),
    (NOISE, "edm", "x0"): (0, 0.5),
    (NOISE, "edm", "eps"): (0.5, 0),
    (NOISE, "edm", "v"): (0, -1),
    (NOISE, "edm", "flow"): (0.5, -0.5),
    (NOISE, "edm", "score"): (-0.25, 0),
    (NOISE, "x0", "edm"): (0, 2),
    (NOISE, "v", "edm"): (0, -1),
    (NOISE, "flow", "edm"): (1, -2),
}


def test_limits_at_data_and_in_pure_noise():
    """Finite where x_t and the prediction determine what is wanted, and only there."""
    for end in (DATA, NOISE):
        alpha, sigma = torch.tensor(end, dtype=torch.float64).split(1)
        made = NoiseSchedule(alpha.log(), sigma, vp=False)
        for have in OBJECTIVES:
            for wanted in OBJECTIVES:
                u, v = (row.item() for row in conversion_rows(made, have, wanted))
                if have == wanted:
                    assert (u, v) == (0, 1)
                elif (end, have, wanted) in KNOWN:
                    assert (u, v) == KNOWN[end, have, wanted], (end, have, wanted)
                else:
                    assert not (math.isfinite(u) and math.isfinite(v)), (end, have, wanted)


class Given(nn.Module):
    def __init__(self, out: Tensor):
        super().__init__()
        self.out = nn.Parameter(out)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.out


MODULES = {
    "ddpm": (lambda m, o: DDPM(m, "linear", 1000, o, clip=0.1), torch.tensor([1, 700, 1000])),
    "ncsn": (lambda m, o: NCSN(m, objective=o, clip=0.1), torch.tensor([1, 5, 10])),
    "vp": (lambda m, o: ScoreSDE(m, "vp", o, clip=0.1), torch.tensor([0.01, 0.5, 1.0], dtype=torch.float64)),
    "subvp": (lambda m, o: ScoreSDE(m, "subvp", o, clip=0.1), torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)),
    "ve": (lambda m, o: ScoreSDE(m, "ve", o, clip=0.1), torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", MODULES)
def test_predict(name, objective, dtype):
    make, t = MODULES[name]
    g = torch.Generator().manual_seed(0)
    x0, z = torch.randn(2, 3, 5, generator=g, dtype=torch.float64)
    probe: Diffusion = make(Given(x0.to(dtype)), objective)
    made = probe.process.at(t.double())
    alpha, sigma = made.alpha[:, None], made.sigma[:, None]
    known, x_t = targets(alpha, sigma, x0, z), alpha * x0 + sigma * z
    model = make(Given(known[objective].to(dtype)), objective)
    unit = 1e-13 if dtype == torch.float64 else 1e-6
    for wanted in OBJECTIVES:
        got = model.predict(x_t.to(dtype), t, wanted)
        assert got.dtype == dtype
        u, v = (row[:, None].abs() for row in conversion_rows(made, objective, wanted))
        bound = unit * (u * x_t.abs() + v * known[objective].abs() + 1)
        assert ((got.double() - known[wanted]).abs() <= bound).all(), wanted  # and unclipped
    one = model.predict(x_t.to(dtype), t[1], "eps")
    assert one.shape == (3, 5)


def test_predict_refuses():
    model = ScoreSDE(Given(torch.zeros(2, 3)))
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="wanted: expected one of eps, x0, v, score, flow, edm, got 'noise'"):
        model.predict(x, 0.5, "noise")
    for t in (0.0, 1.5, -1, float("nan")):
        with pytest.raises(ValueError, match=r"t: expected times in \(0, 1\]"):
            model.predict(x, t, "eps")
    with pytest.raises(ValueError, match=r"t: expected times in \(0, 1\]"):
        model.predict(x, torch.tensor([0.5, 2.0]), "eps")
    with pytest.raises(ValueError, match=r"t: expected shape \(\) or \(2,\)"):
        model.predict(x, torch.tensor([0.5, 0.2, 0.1]), "eps")
    for t in (True, "1"):
        with pytest.raises(TypeError, match="t: expected a number or a tensor"):
            model.predict(x, t, "eps")
    with pytest.raises(TypeError, match="t: expected a floating tensor"):
        model.predict(x, torch.tensor([1, 1]), "eps")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bound_weights_are_the_terms_of_the_bound(objective):
    """With posterior variance beta~ the term of level t > 1 is c^2 / (2 beta~) on the error of x_0 (Ho et al. 2020, eq.
    8); the error of the prediction is that of x_0 over b of x_0 = a x_t + b pred."""
    for made in (schedule.linear(50), NoiseSchedule.from_alpha_sigma([0.9, 0.5, 0.1], [0.3, 0.8, 2.0])):
        t = torch.arange(2, made.timesteps + 1)
        c, _, var = made.posterior(t, t - 1)
        b = conversion_rows(made, objective, "x0")[1]
        got = weights(made, objective, "vlb")
        torch.testing.assert_close(got[2:], c**2 / (2 * var) * b[2:] ** 2, rtol=1e-9, atol=0)
        assert got[1].item() == pytest.approx(0.5 / made.sigma[1].item() ** 2 * b[1].item() ** 2, rel=1e-9)
        assert got[0] == 0
    if objective in ("x0", "v"):
        assert weights(schedule.raised_cosine(1000), objective, "vlb").isfinite().all()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("process", [VP(), SubVP(), VE()])
def test_weights_of_sdes(process, objective):
    """Each is one weight on the error of eps, x0 or score, whatever the model predicts."""
    made = process.at(torch.tensor([0.05, 0.3, 1.0], dtype=torch.float64))
    alpha, sigma, g2 = made.alpha, made.sigma, made.g2
    error = x0_errors(alpha, sigma)[objective]
    on_score = g2 * (alpha / sigma**2 * error) ** 2
    torch.testing.assert_close(weights(made, objective, "likelihood"), on_score, rtol=1e-10, atol=0)
    cut = (alpha / sigma).square().clamp(max=5)
    torch.testing.assert_close(weights(made, objective, "min_snr"), cut * error**2, rtol=1e-10, atol=0)
    simple = sigma**2 if objective == "score" else torch.ones_like(sigma)
    torch.testing.assert_close(weights(made, objective, "simple"), simple, rtol=1e-12, atol=0)
