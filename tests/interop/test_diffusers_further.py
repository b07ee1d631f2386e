"""Schedulers of diffusers with several calls a step, and LMS and IPNDM, against stock's, step by step."""

import itertools
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from schedulers import PARITY, SPACINGS, both, seeded
from torch import Tensor

import fastdiff
from fastdiff import ops

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # diffusers with NumPy 2
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # diffusers of its older algorithms
]

SHAPE = (2, 3, 4, 4)
SINGLESTEP, LMS, IPNDM = "DPMSolverSinglestepScheduler", "LMSDiscreteScheduler", "IPNDMScheduler"
KDPM2, ANCESTRAL = "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
SDE = {"algorithm_type": "sde-dpmsolver++"}
SIGMAS: tuple[dict[str, Any], ...] = (
    {}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}
)  # fmt: skip
GRIDS = list(zip(itertools.cycle(SPACINGS), SIGMAS * 3, itertools.cycle((7, 20, 1, 9, 5)), strict=False))


@pytest.fixture(autouse=True)
def kernels_of_the_cpu() -> Iterator[None]:
    """What runs on a CPU outside of tests."""
    with fastdiff.backend("cpu"):
        yield


def level(scheduler: Any, i: int) -> tuple[float, float]:
    """(alpha, sigma) of the state that step i is given."""
    if isinstance(scheduler, diffusers.IPNDMScheduler):
        return float(scheduler.alphas[i]), float(scheduler.betas[i])
    if isinstance(scheduler, diffusers.DPMSolverSinglestepScheduler):
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[i])
        return float(alpha), float(sigma)
    if getattr(scheduler, "sample", None) is not None:
        return 1.0, float(scheduler.sigmas_interpol[i - ("Ancestral" in type(scheduler).__name__)])
    return 1.0, float(scheduler.sigmas[i])


def told(scheduler: Any, i: int, inputs: torch.Generator) -> tuple[Tensor, Tensor]:
    """A state of the level of step i, and what a model that knows x_0 says of it."""
    x0, eps = torch.randn(SHAPE, generator=inputs).clamp(-2, 2), torch.randn(SHAPE, generator=inputs)
    alpha, sigma = level(scheduler, i)
    scale = (alpha**2 + sigma**2) ** 0.5  # v is that of the state scaled to variance 1
    v = (alpha * eps - sigma * x0) / scale
    kinds = {"epsilon": eps, "sample": x0, "v_prediction": v, "flow_prediction": eps - x0}
    return alpha * x0 + sigma * eps, kinds[scheduler.config.get("prediction_type", "epsilon")]


def amplified(scheduler: Any, i: int) -> float:
    """How much stock's rounding of x_0 grows: a second half divides its distance from x by the small sigma."""
    if getattr(scheduler, "sigmas_interpol", None) is None or scheduler.sample is None:
        return 1.0
    return float(scheduler.sigmas[i - 1]) / level(scheduler, i)[1]


def follow(stock: Any, ours: Any, places: list[int], **options: Any) -> None:
    """Equal results, generators and counts in steps from equal states; ours gets what stock remembers."""
    for s in (stock, ours):
        s.set_begin_index(places[0])
    inputs, generators = seeded(1), [seeded(2), seeded(2)]
    random = type(stock).__name__ in (SINGLESTEP, ANCESTRAL)
    extra = [{**options, "generator": g} if random else options for g in generators]
    start = None
    for i in places:
        x, output = told(stock, i, inputs)
        size, stretch = max(float(v.abs().max()) for v in (x, start) if v is not None), amplified(stock, i)
        want, got = (
            s.step(output.clone(), stock.timesteps[i], x.clone(), **e)
            for s, e in zip((stock, ours), extra, strict=True)
        )
        assert type(got) is type(want) and got.keys() == want.keys() and ours.step_index == stock.step_index
        assert torch.equal(generators[0].get_state(), generators[1].get_state())
        for key in want:
            assert got[key].dtype == want[key].dtype and bool(want[key].isfinite().all())
            error = float((got[key] - want[key]).abs().max()) / max(1.0, size, float(want[key].abs().max()))
            assert error <= PARITY * max(1.0, stretch), (key, i, error, stock.config)
        for name in ("model_outputs", "derivatives", "ets"):
            theirs, mine = (getattr(s, name, []) for s in (stock, ours))
            for a, b in zip(reversed(mine), reversed(theirs), strict=False):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, size))
                    a.copy_(b)
        start = getattr(stock, "sample", None)
        if start is not None:
            assert ours.sample is not None
            ours.sample = start


def begun(name: str, steps: int, **config: Any) -> tuple[Any, Any]:
    """Both, for a model of 20 levels: stock's constructors walk through all of them."""
    levels = {"num_train_timesteps": 20} if name == IPNDM else {"num_train_timesteps": 20, "beta_end": 0.6}
    pair = both(name, steps, **levels, **config)
    for s in pair:
        s.is_scale_input_called = True
    return pair


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(
    "config",
    [{}, {"solver_type": "heun"}, SDE, {**SDE, "solver_type": "heun"}, {"algorithm_type": "dpmsolver", **SIGMA_MIN}],
)
def test_singlestep(config: dict[str, Any], order: int, prediction: str) -> None:
    sigmas = SIGMAS[(order + len(prediction)) % 4]
    kind = {"solver_order": order, "prediction_type": prediction, **sigmas, **config}
    stock, ours = begun(SINGLESTEP, 7, **kind)
    follow(stock, ours, list(range(7)))


def test_singlestep_of_flow_and_thresholded() -> None:
    for config in (
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
        {"thresholding": True, "sample_max_value": 1.5},
        {"lower_order_final": True, "solver_order": 3, **SIGMA_MIN},
    ):
        follow(*begun(SINGLESTEP, 8, **config), list(range(8)))


def test_singlestep_starts_in_the_middle_of_a_step() -> None:
    """Without the calls before it a call starts a step, as in stock."""
    for begin in (1, 2):
        stock, ours = begun(SINGLESTEP, 9, solver_order=3)
        follow(stock, ours, list(range(begin, 9)))


@pytest.mark.parametrize(
    ("name", "prediction"),
    [(LMS, "sample"), *itertools.product((LMS, KDPM2, ANCESTRAL), ("epsilon", "v_prediction"))],  # stock refuses others
)
def test_sigmas(name: str, prediction: str) -> None:
    """On four of the grids of spacing, sigmas and number of steps."""
    first = 4 * ("sample", "epsilon", "v_prediction").index(prediction)
    for spacing, sigmas, steps in GRIDS[first : first + 4]:
        stock, ours = begun(name, steps, prediction_type=prediction, timestep_spacing=spacing, **sigmas)
        n = len(stock.timesteps)
        follow(stock, ours, list(range(n if n < 14 else 6)))


def test_lms_orders() -> None:
    """Each order, an order that changes, and a run from the middle, which lacks the first derivatives."""
    for orders in ((1, 2, 3), (4, 4, 4, 2, 1, 4, 4), (2, 4, 3)):
        stock, ours = begun(LMS, 9)
        for i, order in enumerate(orders):
            follow(stock, ours, [i], order=order)
            assert [len(s.derivatives) for s in (ours, stock)] == [
                min(3, len(stock.derivatives)),
                len(stock.derivatives),
            ]
    stock, ours = begun(LMS, 9)
    follow(stock, ours, list(range(4, 9)))


@pytest.mark.parametrize("steps", [50, 7, 1])
def test_ipndm(steps: int) -> None:
    for config in ({}, {"trained_betas": torch.linspace(0.99, 0.02, steps + 1).tolist()}):
        follow(*begun(IPNDM, steps, **config), list(range(min(steps, 7))))


def test_the_gradient_of_ipndm_at_its_first_level() -> None:
    """There x - sigma e is 0, and stock divides it by 1e-8: in float32 its gradient is rounded at 1e8."""
    grads = []
    for s, dtype in zip(begun(IPNDM, 7), (torch.float64, torch.float32), strict=True):
        x = torch.randn(SHAPE, generator=seeded(3)).to(dtype).requires_grad_()
        end = s.step(0.3 * x, s.timesteps[0], x).prev_sample
        grads += torch.autograd.grad(end.square().sum(), x)
    torch.testing.assert_close(grads[1], grads[0].float(), rtol=1e-5, atol=1e-5)


def test_the_noise_of_both_halves_is_one_launch_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call's part is one operation; noise beside x_t is one more, and so is LMS's prediction of x_0."""
    calls: list[str] = []
    for room, name in ((ops, "update"), (ops, "combine"), (torch, "addcmul")):
        original = getattr(room, name)
        monkeypatch.setattr(room, name, lambda *a, o=original, n=name, **kw: calls.append(n) or o(*a, **kw))
    one, noisy = ["update"], ["update", "update"]
    for name, config, expected in (
        (SINGLESTEP, {"solver_order": 3}, [*one, *one, *one]),
        (SINGLESTEP, {"solver_order": 3, **SDE}, [*one, *noisy, *noisy]),
        (KDPM2, {}, [*one, *one, *one]),
        (ANCESTRAL, {}, [*one, "addcmul", *one, *one]),
        (LMS, {}, ["combine", "update"] * 3),
        (IPNDM, {}, [*one, *one, *one]),
    ):
        ours = begun(name, 9, **config)[1]
        x, rings = torch.randn(SHAPE, generator=seeded(0)), set()
        calls.clear()
        for t in ours.timesteps[:3]:
            x = ours.step(0.3 * x, t, x).prev_sample
            rings.add(getattr(getattr(ours, "_ring", None), "data_ptr", int)())
        assert calls == expected and len(rings) == 1


@pytest.mark.parametrize("name", [KDPM2, ANCESTRAL, LMS])
def test_scaled_inputs(name: str) -> None:
    """Stock's bits in either half, also after a change that no version shows."""
    stock, ours = begun(name, 10)
    x = torch.randn(SHAPE, generator=seeded(0))
    for factor in (1.0, 0.9):
        for s in (stock, ours):
            s._step_index = s.sample = None
            s.sigmas.data.mul_(factor)
        for t in stock.timesteps[2:4]:
            want, got = (s.scale_model_input(x, t) for s in (stock, ours))
            assert torch.equal(got, want) and ours.step_index == stock.step_index
            for s in (stock, ours):
                s.step(0.3 * x, t, x)


@pytest.mark.parametrize(("name", "config"), [(ANCESTRAL, {}), (SINGLESTEP, SDE)])
def test_fused_noise(name: str, config: dict[str, Any]) -> None:
    """It is z(seed, sample, place) of the stream of reverse noise, in second halves too."""
    x = torch.randn(SHAPE, generator=seeded(0))
    ends = []
    for fused_noise in (True, False):
        ours = begun(name, 10, **config)[1]
        ours.fused_noise = fused_noise
        state = x
        for i, t in enumerate(ours.timesteps[:2]):
            if not fused_noise:
                z = ops.normal(x.shape, 7, step=i, stream=ops.REVERSE)
                ours._noise = lambda *args, z=z: {"noise": z}
            state = ours.step(0.3 * state, t, state, generator=seeded(7)).prev_sample
        ends.append(state)
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        *((name, source) for name in (KDPM2, ANCESTRAL) for source in ("sigmas", "sigmas_interpol")),
        *((name, source) for name in (SINGLESTEP, LMS) for source in ("sigmas",)),
        *((ANCESTRAL, source) for source in ("sigmas_up", "sigmas_down")),
        *((IPNDM, source) for source in ("betas", "alphas")),
    ],
)
def test_changes_are_seen(name: str, source: str) -> None:
    """Of each tensor that the rows are made of, through .data, which no version shows."""
    pair = begun(name, 10)
    x, seen = torch.randn(SHAPE, generator=seeded(0)), []
    for factor in (1.0, 0.9):
        ends = []
        for s in pair:
            getattr(s, source).data.mul_(factor)
            s.set_begin_index(4)
            s._step_index = s.sample = None
            torch.manual_seed(3)
            state = x
            for t in s.timesteps[4:6]:
                state = s.step(0.3 * state, t, state).prev_sample
            ends.append(state)
        torch.testing.assert_close(ends[1], ends[0], rtol=2e-5, atol=2e-5)
        seen.append(ends[1])
    assert not torch.allclose(*seen, rtol=1e-3)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", [SINGLESTEP, LMS, KDPM2, ANCESTRAL, IPNDM])
def test_outputs_of_another_type(name: str, kind: torch.dtype) -> None:
    """Results have the type that stock's have, also if a second half is given another type than the first."""
    pair = begun(name, 8, **({"solver_order": 2} if name == SINGLESTEP else {}))
    x, output = (torch.randn(SHAPE, generator=seeded(k)) for k in range(2))
    bound = 4 * torch.finfo(kind).eps if kind == torch.bfloat16 else 1e-5
    for given in ((x, output.to(kind)), (x.to(kind), output.to(kind)), (x, output.to(kind)), (x, output)):
        results = []
        for s in pair:
            torch.manual_seed(3)
            results.append(s.step(given[1], s.timesteps[0 if s.step_index is None else s.step_index], given[0]))
        for key in results[0]:
            assert results[1][key].dtype == results[0][key].dtype
            torch.testing.assert_close(results[1][key], results[0][key], rtol=bound, atol=20 * bound)


@pytest.mark.parametrize("name", [SINGLESTEP, LMS, KDPM2, ANCESTRAL, IPNDM])
def test_what_stock_does_with_the_rest(name: str, recwarn: pytest.WarningsRecorder) -> None:
    """Shapes that broadcast have stock's bits; past the end is stock's error; so is an unknown prediction."""
    x, output = (torch.randn(SHAPE, generator=seeded(k)) for k in range(2))
    pair = begun(name, 10)
    for a, b in ((x, output[:1]), (x[:1], output)):
        for s in pair:
            s.set_timesteps(10)
        want, got = (s.step(b, s.timesteps[2], a) for s in pair)
        assert all(torch.equal(got[k], want[k]) for k in want)
    for s in pair:
        s.set_timesteps(10)
        s.set_begin_index(1000)
        with pytest.raises(IndexError):
            s.step(output, s.timesteps[-1], x)
        if name != IPNDM:
            s.set_timesteps(10)
            s.register_to_config(prediction_type="noise")
            with pytest.raises(ValueError, match="prediction_type"):
                s.step(output, s.timesteps[0], x)
    if name == LMS:
        for _ in range(2):
            want, got = (s.step(output, s.timesteps[0], x, order=5) for s in begun(LMS, 10))
            assert torch.equal(got[0], want[0])
        assert sum("order=5: stock's step runs" in str(w.message) for w in recwarn) <= 1


def test_second_halves_of_dpm2_are_nearer_to_the_truth() -> None:
    """Stock's rounding of x_0 grows by sigma_t / sigma_m."""
    exact, (stock, ours) = begun(KDPM2, 5, use_beta_sigmas=True)[0], begun(KDPM2, 5, use_beta_sigmas=True)
    inputs, growth, errors = seeded(1), 1.0, [0.0, 0.0]
    for i, t in enumerate(stock.timesteps):
        x, output = told(stock, i, inputs)
        growth, size = (
            max(growth, amplified(stock, i)),
            1.0 if stock.sample is None else float(stock.sample.abs().max()),
        )
        want = exact.step(output.double(), t, x.double()).prev_sample
        for k, s in enumerate((stock, ours)):
            error = (s.step(output, t, x).prev_sample.double() - want).abs().max() / max(size, float(want.abs().max()))
            errors[k] = max(errors[k], float(error))
    assert growth > 4 and errors[1] < PARITY / 4 and errors[1] <= errors[0]
