"""Steps of the diffusers schedulers against stock's, from the same generator."""

from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from schedulers import LIMITS, NAMES, PARITY, PREDICTIONS, SPACINGS, VARIANCES, both, draw, few, same_steps, seeded
from tolerance import assert_same_bits

import fastdiff
from fastdiff.interop import diffusers as fused

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers with NumPy 2


# --- parity -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", VARIANCES)
def test_ddpm_step(variance: str, prediction: str, limit: str) -> None:
    """To the bit, but for the exponential of a learned range, whose argument stock rounds once more."""
    exact = variance != "learned_range"
    for spacing in SPACINGS:
        config = {"prediction_type": prediction, "timestep_spacing": spacing, **LIMITS[limit]}
        for steps in (1000, 50, 7):
            stock, ours = both("DDPMScheduler", steps, variance_type=variance, **config)
            same_steps(stock, ours, few(stock.timesteps), exact)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_step(prediction: str, limit: str) -> None:
    for spacing in SPACINGS:
        config = {"prediction_type": prediction, "timestep_spacing": spacing, **LIMITS[limit]}
        for steps, eta, corrected in ((1000, 0.0, True), (50, 0.5, False), (7, 1.0, True), (7, 0.0, False)):
            stock, ours = both("DDIMScheduler", steps, **config, set_alpha_to_one=eta == 0)
            same_steps(stock, ours, few(stock.timesteps), exact=True, eta=eta, use_clipped_model_output=corrected)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", NAMES[:2])
def test_cpu_kernels_give_the_stock_bits(name: str, prediction: str) -> None:
    """One multiplication fused with an addition, and DDIM is 1e-4 off after 20 steps."""
    stock, ours = both(name, 7, prediction_type=prediction)
    x, noise = draw(torch.Generator().manual_seed(0))
    with fastdiff.backend("cpu"):
        same_steps(stock, ours, stock.timesteps, exact=True, **({"eta": 0.5} if name == "DDIMScheduler" else {}))
        for method in ("add_noise", "get_velocity"):
            got, want = (getattr(s, method)(x, noise, torch.tensor([3, 900])) for s in (ours, stock))
            assert_same_bits(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("thresholding", [False, True])
@pytest.mark.parametrize("prediction", [*PREDICTIONS, "flow_prediction"])
def test_dpm_solver_step(prediction: str, thresholding: bool) -> None:
    limit = LIMITS["threshold"] | {"thresholding": thresholding}
    del limit["clip_sample"]
    extra = {"use_flow_sigmas": True} if prediction == "flow_prediction" else {}
    for spacing in SPACINGS:
        for steps, final in ((50, "zero"), (7, "sigma_min"), (1, "zero")):
            config = {"timestep_spacing": spacing, "final_sigmas_type": final, **limit, **extra}
            stock, ours = both("DPMSolverMultistepScheduler", steps, prediction_type=prediction, **config)
            same_steps(stock, ours, stock.timesteps)
            assert (ours.step_index, ours.lower_order_nums) == (stock.step_index, stock.lower_order_nums)
            for got, want in zip(ours.model_outputs, stock.model_outputs, strict=True):
                assert (got is None and want is None) or torch.allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("config", [{"use_karras_sigmas": True}, {"use_lu_lambdas": True}, {"euler_at_final": True}])
def test_dpm_solver_sigmas(config: dict[str, Any]) -> None:
    stock, ours = both("DPMSolverMultistepScheduler", 12, **config)
    same_steps(stock, ours, stock.timesteps)


def test_dpm_solver_beyond_its_last_step_is_stocks_error() -> None:
    """Where a timestep occurs twice, stock starts at the second, and a loop over all of them takes a step too many."""
    x, ended = torch.ones(1, 3, 2, 2), []
    for scheduler in both("DPMSolverMultistepScheduler"):
        scheduler.set_timesteps(timesteps=[900, 900, 500, 100])
        for t in scheduler.timesteps[:-1]:
            x = scheduler.step(0.1 * x, t, x).prev_sample
        with pytest.raises(IndexError) as error:
            scheduler.step(0.1 * x, scheduler.timesteps[-1], x)
        ended.append((str(error.value), scheduler.step_index))
    assert ended[0] == ended[1]


def test_dpm_solver_starts_where_stock_does() -> None:
    """At a timestep in the middle, at a begin index, and at the second of two equal timesteps."""
    for start, timesteps in ((3, None), (1, [900, 900, 500, 100])):
        stock, ours = both("DPMSolverMultistepScheduler", prediction_type="sample")
        for s in (stock, ours):
            s.set_timesteps(**({"num_inference_steps": 10} if timesteps is None else {"timesteps": timesteps}))
        same_steps(stock, ours, stock.timesteps[start:])
    for s in (stock, ours):
        s.set_timesteps(10)
        s.set_begin_index(4)
    same_steps(stock, ours, stock.timesteps[4:])


@pytest.mark.parametrize("steps", [1000, 50, 7])
def test_sde_ve_step(steps: int) -> None:
    stock, ours = both("ScoreSdeVeScheduler", steps)
    inputs = torch.Generator().manual_seed(1)
    generators = [torch.Generator().manual_seed(2) for _ in range(2)]
    for t in few(stock.timesteps):
        x, output = draw(inputs)
        for step, args in (("step_pred", (output, t, x)), ("step_correct", (output, x))):
            want, got = (getattr(s, step)(*args, generator=g) for s, g in zip((stock, ours), generators, strict=True))
            assert type(got) is type(want)
            for key in want:
                torch.testing.assert_close(got[key], want[key], rtol=2e-7, atol=1e-6)
            assert torch.equal(generators[0].get_state(), generators[1].get_state())


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "scaled_linear", "steps_offset": 1},
        {"trained_betas": [0.01, 0.1, 0.2, 0.3, 0.9], "num_train_timesteps": 5},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    ],
)
@pytest.mark.parametrize("name", NAMES[:2])
def test_schedules(name: str, config: dict[str, Any]) -> None:
    stock, ours = both(name, 5, **config)
    same_steps(stock, ours, stock.timesteps, exact=True, **({"eta": 0.5} if name == "DDIMScheduler" else {}))


# Sums and means of absolute values that diffusers' own tests expect of these loops.
LOOPS = [
    ("DDPMScheduler", None, {"variance_type": "fixed_small"}, 258.9606, 0.3372),
    ("DDPMScheduler", None, {"variance_type": "fixed_small", "prediction_type": "v_prediction"}, 202.0296, 0.2631),
    ("DDIMScheduler", 10, {}, 172.0067, 0.223967),
    ("DDIMScheduler", 10, {"prediction_type": "v_prediction"}, 52.5302, 0.0684),
    ("DDIMScheduler", 10, {"set_alpha_to_one": True, "beta_start": 0.01}, 149.8295, 0.1951),
    ("DPMSolverMultistepScheduler", 10, {}, None, 0.3301),
    ("DPMSolverMultistepScheduler", 10, {"prediction_type": "v_prediction"}, None, 0.2251),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps", "config", "total", "mean"), LOOPS)
def test_full_loops(name: str, steps: int | None, config: dict[str, Any], total: float | None, mean: float) -> None:
    config = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", **config}
    if name == "DPMSolverMultistepScheduler":
        config |= {"final_sigmas_type": "sigma_min", "lower_order_final": False}
    ends = []
    for scheduler in both(name, steps, **config):
        x = torch.arange(4 * 3 * 8 * 8).reshape(3, 8, 8, 4) / (4 * 3 * 8 * 8)
        x, generator = x.permute(3, 0, 1, 2), torch.Generator().manual_seed(0)
        for t in reversed(range(1000)) if steps is None else scheduler.timesteps:
            extra = {"eta": 0.0} if name == "DDIMScheduler" else {}
            x = scheduler.step(x * t / (t + 1), t, x, generator=generator, **extra).prev_sample
        ends.append(x)
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-5)
    assert total is None or abs(float(ends[1].abs().sum()) - total) < 1e-2
    assert abs(float(ends[1].abs().mean()) - mean) < 1e-3


def test_ddpm_without_and_with_custom_timesteps() -> None:
    stock, ours = both("DDPMScheduler")
    same_steps(stock, ours, torch.tensor([999, 500, 1, 0]))
    for s in (stock, ours):
        s.set_timesteps(timesteps=[900, 333, 50, 3])
    same_steps(stock, ours, stock.timesteps)


@pytest.mark.slow
@given(
    betas=st.lists(st.floats(1e-4, 0.5), min_size=2, max_size=12),
    prediction=st.sampled_from(PREDICTIONS),
    variance=st.sampled_from(VARIANCES[:3]),
    data=st.data(),
)
def test_any_betas(betas: list[float], prediction: str, variance: str, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, len(betas)))
    config = {"trained_betas": betas, "num_train_timesteps": len(betas), "prediction_type": prediction}
    stock, ours = both("DDPMScheduler", steps, **config, variance_type=variance)
    same_steps(stock, ours, stock.timesteps, exact=True)
    stock, ours = both("DDIMScheduler", steps, **config)
    same_steps(stock, ours, stock.timesteps, exact=True, eta=data.draw(st.sampled_from((0.0, 0.3, 1.0))))


@pytest.mark.parametrize("name", NAMES)
def test_kinds_of_timesteps(name: str) -> None:
    """Numbers, NumPy's numbers and tensors of one element mean the same; return_dict=False gives the same tensors."""
    _, ours = both(name, 10)
    step = ours.step_pred if name == "ScoreSdeVeScheduler" else ours.step
    t, (x, output) = ours.timesteps[4], draw(torch.Generator().manual_seed(0))
    results = []
    for kind in (t, t[None], t.item(), t.numpy()[()]):
        if name == "DPMSolverMultistepScheduler":
            ours.set_timesteps(10)
        results.append(step(output, kind, x, generator=torch.Generator().manual_seed(0), return_dict=False))
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


def test_list_of_generators() -> None:
    x, output = draw(torch.Generator().manual_seed(0))
    want, got = (
        s.step(output, 500, x, generator=[torch.Generator().manual_seed(i) for i in range(2)])
        for s in both("DDPMScheduler", 10)
    )
    torch.testing.assert_close(got.prev_sample, want.prev_sample, rtol=0, atol=PARITY)


def test_fixed_large_log_is_fixed_large() -> None:
    """Stock takes the root of a logarithm."""
    x, output = draw(torch.Generator().manual_seed(0))
    want, got = (
        scheduler(variance_type=kind).step(output, 500, x, generator=torch.Generator().manual_seed(3))
        for scheduler, kind in (
            (diffusers.DDPMScheduler, "fixed_large"),
            (fused.DDPMScheduler, "fixed_large_log"),
        )
    )
    torch.testing.assert_close(got.prev_sample, want.prev_sample, rtol=0, atol=PARITY)
    stock = diffusers.DDPMScheduler(variance_type="fixed_large_log")
    assert bool(stock.step(output, 500, x).prev_sample.isnan().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    """Results have stock's dtype (float32 of ScoreSdeVe's half precision); the low ones are nearer to float64's."""
    x, output = draw(torch.Generator().manual_seed(0))
    x, output = x.to(dtype), output.to(dtype)
    stock, ours = both(name, 10)
    (want, got, better) = (
        (s.step_pred if name == "ScoreSdeVeScheduler" else s.step)(
            o, stock.timesteps[5], i, return_dict=False, **({"generator": [g] * 2} if name == "DDPMScheduler" else {})
        )[-1]
        for s, o, i, g in (
            (stock, output, x, torch.Generator()),
            (ours, output, x, torch.Generator()),
            (both(name, 10)[0], output.double(), x.double(), torch.Generator()),
        )
    )
    assert got.dtype == want.dtype
    assert (got - better).abs().max() <= (want - better).abs().max() + PARITY


@pytest.mark.parametrize("limit", ["none", "clip", "threshold"])
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_epsilon_at_alpha_0(name: str, limit: str) -> None:
    """Where stock divides by 0 and clips infinity, the clip finds the sign in half precision too."""
    settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", **LIMITS[limit]}
    for dtype in (torch.float32, torch.float16):
        x, output = (t.to(dtype) for t in draw(torch.Generator().manual_seed(0)))
        # The type in which stock's product with sigma, 1, is exact.
        want, got = (s.step(output, 999, x, generator=seeded(2)) for s in both(name, 10, **settings))
        assert bool(want.pred_original_sample.isnan().any()) == (limit == "threshold")
        torch.testing.assert_close(got.pred_original_sample, want.pred_original_sample, equal_nan=True)


def test_flow_matching_draws_float32() -> None:
    """Whatever the type of the sample."""
    stock, ours = both("FlowMatchEulerDiscreteScheduler", 10, stochastic_sampling=True)
    x, output = (t.double() for t in draw(seeded(0)))
    generators = [seeded(7), seeded(7)]
    want, got = (
        s.step(output, s.timesteps[3], x, generator=g).prev_sample
        for s, g in zip((stock, ours), generators, strict=True)
    )
    torch.testing.assert_close(got, want, rtol=PARITY, atol=PARITY)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


@pytest.mark.parametrize("name", NAMES)
def test_mixed_dtypes(name: str) -> None:
    """A model under autocast: noise, generator and the type of the result are stock's."""
    x, output = draw(torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(2) for _ in range(2)]
    results = []
    for scheduler, generator in zip(both(name, 10), generators, strict=True):
        step = scheduler.step_pred if name == "ScoreSdeVeScheduler" else scheduler.step
        extra = {"eta": 1.0} if name == "DDIMScheduler" else {}
        results.append(step(output.bfloat16(), scheduler.timesteps[5], x, generator=generator, **extra).prev_sample)
    assert results[0].dtype == results[1].dtype == torch.float32
    torch.testing.assert_close(results[1], results[0], rtol=2**-7, atol=2**-7)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
