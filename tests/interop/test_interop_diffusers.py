"""The diffusers schedulers against the stock ones, side by side from the same generator."""

import copy
import importlib
import inspect
import json
import math
import pickle
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from diffusers.utils.import_utils import DummyObject
from hypothesis import given
from hypothesis import strategies as st
from strategies import BACKENDS, DEVICE
from tolerance import assert_same_bits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from fastdiff import ops
from fastdiff.interop import diffusers as fused
from fastdiff.interop.diffusers import common, ddpm
from fastdiff.interop.diffusers.common import quantile
from fastdiff.rows import make_rows

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers with NumPy 2

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "ScoreSdeVeScheduler")
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "linspace", "trailing")
LIMITS: dict[str, dict[str, Any]] = {
    "none": {"clip_sample": False},
    "clip": {"clip_sample": True, "clip_sample_range": 0.8},
    "threshold": {"clip_sample": False, "thresholding": True, "sample_max_value": 2.0},
}
# Four roundings of a number of 16, about the largest that the tests have.
PARITY = 2e-6


def both(name: str, steps: int | None = None, **config: Any) -> tuple[Any, Any]:
    """The stock scheduler and ours."""
    pair = getattr(diffusers, name)(**config), getattr(fused, name)(**config)
    for scheduler in pair:
        if steps is not None:
            scheduler.set_timesteps(steps)
            if name == "ScoreSdeVeScheduler":
                scheduler.set_sigmas(steps)
    return pair


def few(timesteps: Tensor) -> Tensor:
    """The timesteps, or of many the first, middle and last three."""
    n = len(timesteps)
    return timesteps if n <= 7 else torch.cat([timesteps[i : i + 3] for i in (0, n // 2, n - 3)])


def draw(generator: torch.Generator, shape: tuple[int, ...] = (2, 3, 4, 4), learned: bool = False) -> Any:
    """(x_t, model output) of independent normals; a learned variance is in (0, 1)."""
    x, output = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    if learned:
        output = torch.cat((output, torch.rand(shape, generator=generator)), 1)
    return x, output


def same_steps(stock: Any, ours: Any, timesteps: Tensor, exact: bool = False, **kwargs: Any) -> None:
    """Equal results and generator states at each of the timesteps, from the same input."""
    inputs = torch.Generator().manual_seed(1)
    generators = [torch.Generator().manual_seed(2) for _ in range(2)]
    learned = str(stock.config.get("variance_type")).startswith("learned")
    step = "step_pred" if hasattr(stock, "step_pred") else "step"
    for t in timesteps:
        x, output = draw(inputs, learned=learned)
        want, got = (
            getattr(s, step)(output.clone(), t, x.clone(), generator=g, **kwargs)
            for s, g in zip((stock, ours), generators, strict=True)
        )
        assert type(got) is type(want) and got.keys() == want.keys()
        assert torch.equal(generators[0].get_state(), generators[1].get_state())
        assert bool(want.prev_sample.isfinite().all())
        for key in want:
            assert got[key].dtype == want[key].dtype and got[key].shape == want[key].shape
            if exact:
                assert torch.equal(got[key], want[key]), (key, t)
            else:
                error = (got[key] - want[key]).abs() / want[key].abs().div(16).clamp(min=1)
                assert float(error.max()) <= PARITY, (key, int(t), float(error.max()))


# --- parity -----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "config",
    [
        {"solver_order": 1},
        {"solver_order": 3},
        {"solver_type": "heun"},
        {"algorithm_type": "sde-dpmsolver++"},
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_other_solvers_are_stock(config: dict[str, Any]) -> None:
    stock, ours = both("DPMSolverMultistepScheduler", 10, **config)
    same_steps(stock, ours, stock.timesteps, exact=True)


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


# --- add_noise and get_velocity -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_add_noise(name: str, dtype: torch.dtype) -> None:
    stock, ours = both(name, 20)
    x = torch.randn(4, 3, 4, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(4, 3, 4, 4, dtype=dtype, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0, 1, 7, 19]) if name == "ScoreSdeVeScheduler" else few(stock.timesteps)[[0, 3, 5, -1]]
    for timesteps in (t, t.int(), t[:1]):
        want, got = (s.add_noise(x, noise, timesteps) for s in (stock, ours))
        torch.testing.assert_close(got, want, rtol=1e-6 if name == NAMES[2] else 0, atol=0)
    if name in NAMES[:2]:
        for timesteps in (t, t[1]):
            assert_same_bits(ours.get_velocity(x, noise, timesteps), stock.get_velocity(x, noise, timesteps))
        assert_same_bits(ours.add_noise(x[:1], noise, t), stock.add_noise(x[:1], noise, t))


@given(t=st.lists(st.integers(0, 999), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_add_noise_gradient(t: list[int], seed: int) -> None:
    """Bits and gradients of stock at any timesteps."""
    generator = torch.Generator().manual_seed(seed)
    x, noise, weight = (torch.randn(len(t), 2, 3, generator=generator) for _ in range(3))
    results = []
    for scheduler in both("DDPMScheduler"):
        x_, noise_ = x.clone().requires_grad_(), noise.clone().requires_grad_()
        out = scheduler.add_noise(x_, noise_, torch.tensor(t))
        (out * weight).sum().backward()
        results.append((out.detach(), x_.grad, noise_.grad))
    for want, got in zip(*results, strict=True):
        assert_same_bits(got, want)


def test_add_noise_keeps_the_noise_of_bfloat16() -> None:
    """Stock adds none at t = 0..9, where alpha_bar rounds to 1 in bfloat16."""
    stock, ours = both("DDPMScheduler")
    x, noise = (a.bfloat16() for a in draw(torch.Generator().manual_seed(0), (10, 3, 4, 4)))
    t = torch.arange(10)
    assert torch.equal(stock.add_noise(x, noise, t), x)
    assert_same_bits(ours.add_noise(x, noise, t), stock.add_noise(x.float(), noise.float(), t).bfloat16())


def test_dpm_solver_add_noise_finds_its_place() -> None:
    """By timestep, the second of two and the last for a stranger, or by the steps of a pipeline."""
    stock, ours = both("DPMSolverMultistepScheduler")
    for s in (stock, ours):
        s.set_timesteps(timesteps=[900, 900, 500, 100])
        s.sigmas[0] += 1  # which the second 900 does not have
    x, noise = draw(torch.Generator().manual_seed(0), (4, 3, 4, 4))
    t = torch.tensor([900, 500, 100, 123])
    torch.testing.assert_close(ours.add_noise(x, noise, t), stock.add_noise(x, noise, t))
    for s in (stock, ours):
        s.set_begin_index(2)
    torch.testing.assert_close(ours.add_noise(x, noise, t), stock.add_noise(x, noise, t))
    same_steps(stock, ours, stock.timesteps[2:3])
    torch.testing.assert_close(ours.add_noise(x, noise, t), stock.add_noise(x, noise, t))


# --- what users do to schedulers --------------------------------------------------------------------------------


def changes(s: Any) -> Any:
    """Changes to a scheduler after which its next step must differ, one at a time."""
    s.alphas_cumprod = s.alphas_cumprod * 0.9
    yield
    s.alphas_cumprod.mul_(0.9)
    yield
    s.alphas_cumprod[s.timesteps] = s.alphas_cumprod[s.timesteps] * 0.9
    yield
    s.config.prediction_type = "v_prediction"
    yield
    s.config.clip_sample = False
    yield
    s.config.clip_sample, s.config.clip_sample_range = True, 0.3
    yield
    s.register_to_config(thresholding=True, sample_max_value=1e6)
    yield
    s.config.dynamic_thresholding_ratio = 0.5
    yield
    s.set_timesteps(5)
    yield


@pytest.mark.parametrize("name", NAMES[:2])
def test_every_change_is_seen(name: str) -> None:
    stock, ours = both(name, 10)
    x, output = draw(torch.Generator().manual_seed(0))
    seen = []
    for _ in zip(changes(stock), changes(ours), strict=True):
        t = 800
        assert t in stock.timesteps
        want, got = (
            s.step(output, t, x, **({"eta": 0.5} if name == "DDIMScheduler" else {}), generator=torch.Generator())
            for s in (stock, ours)
        )
        torch.testing.assert_close(got.prev_sample, want.prev_sample, rtol=0, atol=PARITY)
        noised = [s.add_noise(x, output, torch.tensor([t, 3])) for s in (stock, ours)]
        assert_same_bits(noised[1], noised[0])
        seen.append(got.prev_sample)
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_timesteps_and_their_owners_may_be_changed() -> None:
    stock, ours = both("DDPMScheduler", 10)
    for change in (
        lambda s: setattr(s, "timesteps", s.timesteps[3:]),
        lambda s: setattr(s, "timesteps", s.timesteps[::2]),
        lambda s: s.timesteps.add_(1),
        lambda s: setattr(s, "timesteps", torch.tensor([900, 600, 900, 300])),
        lambda s: setattr(s, "one", torch.tensor(0.9999)),
        lambda s: setattr(s, "num_inference_steps", None),
    ):
        for s in (stock, ours):
            change(s)
        same_steps(stock, ours, stock.timesteps[-2:])
    stock, ours = both("DDIMScheduler", 10)
    for change in (
        lambda s: setattr(s, "final_alpha_cumprod", torch.tensor(0.99999)),
        lambda s: s.final_alpha_cumprod.mul_(0.99999),
        lambda s: setattr(s, "num_inference_steps", 20),
    ):
        for s in (stock, ours):
            change(s)
        same_steps(stock, ours, torch.tensor([901, 50, 0]))
    stock, ours = both("DPMSolverMultistepScheduler", 10)
    for s in (stock, ours):
        s.sigmas[3:5] *= 1.1
    same_steps(stock, ours, stock.timesteps)
    stock, ours = both("ScoreSdeVeScheduler", 10)
    for s in (stock, ours):
        s.discrete_sigmas = s.discrete_sigmas * 0.5
    same_steps(stock, ours, stock.timesteps)


def test_variance_and_eta_may_change() -> None:
    stock, ours = both("DDPMScheduler", 10)
    for change in (
        lambda s: setattr(s.config, "variance_type", "fixed_large"),
        lambda s: setattr(s.config, "variance_type", "fixed_small_log"),
        lambda s: setattr(s, "variance_type", "fixed_small_log"),
    ):
        for s in (stock, ours):
            change(s)
        same_steps(stock, ours, stock.timesteps[:2], exact=True)
    stock, ours = both("DDIMScheduler", 10)
    for eta in (0.0, 0.5, 1.0):
        same_steps(stock, ours, stock.timesteps[:2], exact=True, eta=eta)


def test_tables_are_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    for module in (common, ddpm):
        monkeypatch.setattr(module, "make_rows", lambda *args, **kw: built.append(1) or make_rows(*args, **kw))
    _, ours = both("DDPMScheduler", 10)
    x, output = draw(torch.Generator().manual_seed(0))
    for t in ours.timesteps:
        x = ours.step(output, t, x).prev_sample
    assert len(built) == 2


def test_inference_mode() -> None:
    """Tensors made in inference mode have no version; their changes are seen all the same."""
    with torch.inference_mode():
        stock, ours = both("DDPMScheduler", 10)
        for s in (stock, ours):
            s.alphas_cumprod.mul_(0.9)
        same_steps(stock, ours, stock.timesteps[:2])
        for s in (stock, ours):
            s.alphas_cumprod.mul_(0.9)
        same_steps(stock, ours, stock.timesteps[:2])
    stock, ours = both("DDPMScheduler", 10)
    with torch.inference_mode():
        same_steps(stock, ours, stock.timesteps[:2])
    same_steps(stock, ours, stock.timesteps[:2])


def test_step_is_differentiable() -> None:
    x, output = draw(torch.Generator().manual_seed(0))
    for name, extra in (("DDPMScheduler", {}), ("DDIMScheduler", {"eta": 1.0})):
        gradients = []
        for s in both(name, 10):
            inputs = x.clone().requires_grad_(), output.clone().requires_grad_()
            result = s.step(inputs[1], 500, inputs[0], generator=torch.Generator(), **extra)
            result.prev_sample.square().sum().backward()
            gradients.append([i.grad for i in inputs])
        for want, got in zip(*gradients, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


# --- no waiting, no graph breaks ----------------------------------------------------------------------------------


class NoReads(TorchDispatchMode):
    """Refuses what would wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal"), name
        self.calls = [*getattr(self, "calls", []), name]
        return func(*args, **(kwargs or {}))


CASES = [
    ("DDPMScheduler", {}),
    ("DDPMScheduler", {"thresholding": True}),
    ("DDPMScheduler", {"variance_type": "learned_range"}),
    ("DDPMScheduler", {"variance_type": "learned"}),
    ("DDIMScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("ScoreSdeVeScheduler", {}),
]


def prepared(
    name: str, config: dict[str, Any], device: torch.device | str = "cpu", **kwargs: Any
) -> tuple[Any, Any, tuple[Tensor, Tensor, Tensor]]:
    """(scheduler, its step, arguments), after set_begin_index as in a pipeline."""
    scheduler = getattr(fused, name)(**config, **kwargs)
    scheduler.set_timesteps(10, device=device)
    if name == "ScoreSdeVeScheduler":
        scheduler.set_sigmas(10)
    if name == "DPMSolverMultistepScheduler":
        scheduler.set_begin_index(5)
    x, output = draw(torch.Generator().manual_seed(0), learned="variance_type" in config)
    step = scheduler.step_pred if name == "ScoreSdeVeScheduler" else scheduler.step
    return scheduler, step, (output.to(device), scheduler.timesteps[5], x.to(device))


@pytest.mark.parametrize("fused_noise", [False, True])
@pytest.mark.parametrize(("name", "config"), CASES)
def test_no_scalar_is_read(name: str, config: dict[str, Any], fused_noise: bool) -> None:
    scheduler, step, args = prepared(name, config, fused_noise=fused_noise)
    with NoReads():
        step(*args)  # builds its tables
    with NoReads() as second:
        step(*args)
        scheduler.add_noise(args[2], args[2], torch.tensor([3, 4]))
    assert len(second.calls) <= (45 if config.get("thresholding") else 25), second.calls
    if name == "DPMSolverMultistepScheduler":
        scheduler.set_timesteps(10)
        with NoReads():
            step(*args)  # which has to find its place


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 7, 3072, 1_000_003])
@pytest.mark.parametrize("q", [0.0, 0.1, 0.5, 0.995, 1.0])
def test_quantile(q: float, n: int, dtype: torch.dtype) -> None:
    values = torch.randn(4, n, generator=torch.Generator().manual_seed(n), dtype=dtype).abs()
    values[1, n // 2] = torch.nan
    values[2, n // 3] = torch.inf
    ours, theirs = quantile(values, q), torch.quantile(values, q, dim=1, keepdim=True)
    assert torch.equal(ours.nan_to_num(-1.0), theirs.nan_to_num(-1.0)), (ours, theirs)


@pytest.mark.parametrize("fused_noise", [False, True])
@pytest.mark.parametrize(("name", "config"), CASES)
def test_no_graph_break(name: str, config: dict[str, Any], fused_noise: bool) -> None:
    _, step, args = prepared(name, config, fused_noise=fused_noise)
    torch._dynamo.reset()
    explained = torch._dynamo.explain(step)(*args)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons


@pytest.mark.parametrize("variance", ["fixed_large", "learned", "learned_range"])
def test_compiled_step(variance: str) -> None:
    """A compiled loop with its timesteps in tensors gives the results of the eager one, no noise at t = 0 included."""
    _, ours = both("DDPMScheduler", 3, variance_type=variance)
    x, output = draw(torch.Generator().manual_seed(0), learned=variance != "fixed_large")
    torch._dynamo.reset()
    step = torch.compile(ours.step, backend="aot_eager", fullgraph=True)
    assert ours.timesteps[-1] == 0
    for t in ours.timesteps:
        torch.manual_seed(5)
        got = step(output, t, x).prev_sample
        torch.manual_seed(5)
        torch.testing.assert_close(got, ours.step(output, t, x).prev_sample, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_compiled_add_noise(name: str) -> None:
    _, ours = both(name, 10)
    x, noise = draw(torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    add = torch.compile(ours.add_noise, backend="aot_eager", fullgraph=True)
    assert_same_bits(add(x, noise, torch.tensor([3, 4])), ours.add_noise(x, noise, torch.tensor([3, 4])))


class Elsewhere(torch.Tensor):
    """A tensor that says it lies on a GPU, and may not be read."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda:0")

    def item(self) -> float:
        raise AssertionError("read")


def test_timesteps_elsewhere_are_known_by_their_place() -> None:
    _, ours = both("DDPMScheduler", 10)
    ours.timesteps = ours.timesteps.as_subclass(Elsewhere)
    assert [ours._number(t) for t in ours.timesteps] == ours.timesteps.tolist()
    assert [ours._number(t) for t in ours.timesteps[4:]] == ours.timesteps.tolist()[4:]
    assert ours._number(ours.timesteps[3].clone()) is None
    assert ours._number(ours.timesteps[:2]) is None
    whole = ours.timesteps
    ours.timesteps = whole[2:8:2]
    assert [ours._number(t) for t in whole[:6]] == [None, None, whole.tolist()[2], None, whole.tolist()[4], None]


# --- noise in the kernel ------------------------------------------------------------------------------------------


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("name", "config"), [c for c in CASES if c[0] != "DPMSolverMultistepScheduler"])
def test_fused_noise(name: str, config: dict[str, Any]) -> None:
    """It is z(seed, sample, timestep) of the stream of reverse noise, whatever the batch; the generator rests."""
    ours, step, (output, t, x) = prepared(name, config, fused_noise=True)
    extra = {"eta": 1.0} if name == "DDIMScheduler" else {}
    generator = seeded(7)
    before = generator.get_state()
    got = step(output, t, x, generator=generator, **extra).prev_sample
    assert torch.equal(generator.get_state(), before)
    one = step(output[:1], t, x[:1], generator=seeded(7), **extra).prev_sample
    assert torch.equal(one, got[:1])
    each = step(output, t, x, generator=[seeded(7), seeded(7)], **extra).prev_sample
    torch.testing.assert_close(each[:1], got[:1], rtol=0, atol=PARITY)
    same = step(torch.cat((output[:1],) * 2), t, torch.cat((x[:1],) * 2), generator=[seeded(7), seeded(7)], **extra)
    assert torch.equal(same.prev_sample[0], same.prev_sample[1])
    assert not torch.equal(step(output, t, x, generator=seeded(8), **extra).prev_sample, got)
    place = int(t * 9) if name == "ScoreSdeVeScheduler" else t
    z = ops.normal(x.shape, 7, step=place, stream=ops.REVERSE)
    quiet = getattr(fused, name)(**config)
    quiet.__dict__.update({k: v for k, v in ours.__dict__.items() if k != "fused_noise"})
    quiet._noise = lambda *args: {"noise": z}
    want = getattr(quiet, step.__name__)(output, t, x, **extra).prev_sample
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_fused_noise_gives_an_image_whatever_its_batch() -> None:
    unet = small_unet()
    images = []
    for batch in (1, 3):
        pipeline = diffusers.DDPMPipeline(unet, fused.DDPMScheduler(fused_noise=True))
        pipeline.set_progress_bar_config(disable=True)
        call = {"batch_size": batch, "num_inference_steps": 10, "output_type": "pt"}
        images.append(torch.as_tensor(pipeline(generator=seeded(4), **call).images))
    torch.testing.assert_close(images[1][:1], images[0], rtol=0, atol=1e-4)
    assert not torch.equal(images[1][0], images[1][1])


def test_fused_noise_without_a_generator() -> None:
    """torch.manual_seed rules, and every step has a seed of its own."""
    ours = fused.DDPMScheduler(fused_noise=True)
    x, output = draw(seeded(0))
    torch.manual_seed(3)
    first, second = (ours.step(output, 500, x).prev_sample for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(ours.step(output, 500, x).prev_sample, first)
    assert not torch.equal(first, second)


def test_fused_noise_warns_of_the_same_noise(recwarn: pytest.WarningsRecorder) -> None:
    """A generator that goes on to a second run; not one that is seeded for it, and not within a run."""
    pipeline = diffusers.DDPMPipeline(small_unet(), fused.DDPMScheduler(fused_noise=True))
    pipeline.set_progress_bar_config(disable=True)
    generator = seeded(4)
    pipeline(generator=generator, num_inference_steps=3)
    pipeline(generator=generator.manual_seed(4), num_inference_steps=3)
    pipeline(generator=seeded(5), num_inference_steps=3)
    pipeline(generator=generator.manual_seed(6), num_inference_steps=3)
    assert not [w for w in recwarn if "fused_noise" in str(w.message)]
    with pytest.warns(UserWarning, match="fused_noise: the noise of seed 6 again"):
        pipeline(generator=generator, num_inference_steps=3)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@pytest.mark.parametrize("fused_noise", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_kernels(name: str, fused_noise: bool, backend: str) -> None:
    """A step and the noising by the kernels, on a GPU where there is one, against plain PyTorch on the CPU."""
    results = []
    for kind, device in (("reference", torch.device("cpu")), (backend, DEVICE)):
        scheduler, step, args = prepared(name, {}, device, fused_noise=fused_noise)
        extra = {"eta": 1.0} if name == "DDIMScheduler" else {}
        t = torch.tensor([3, 4], device=device)
        with fastdiff.backend(kind):
            out = step(*args, generator=seeded(7), return_dict=False, **extra)
            results.append([o.cpu() for o in (*out, scheduler.add_noise(args[2], args[2].flip(0), t))])
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("fused_noise", [False, True])
@pytest.mark.parametrize(("name", "config"), CASES)
def test_no_wait_for_a_gpu(name: str, config: dict[str, Any], fused_noise: bool) -> None:
    _, step, args = prepared(name, config, DEVICE, fused_noise=fused_noise)
    with fastdiff.backend("triton"):
        step(*args)  # builds its tables
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_fused_noise_errors() -> None:
    ours = fused.DDPMScheduler(fused_noise=True)
    x, output = draw(seeded(0))
    with pytest.raises(ValueError, match="generator: expected a list of 2, one per sample, got 3"):
        ours.step(output, 500, x, generator=[seeded(i) for i in range(3)])


# --- files, configurations, signatures ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_files_both_ways(name: str, tmp_path: Any) -> None:
    config = {"num_train_timesteps": 123, **({} if name == "ScoreSdeVeScheduler" else {"beta_end": 0.01})}
    stock, ours = both(name, **config)
    ours.fused_noise = True
    for s, folder in ((stock, "stock"), (ours, "ours")):
        s.save_pretrained(tmp_path / folder)
    files = [(tmp_path / folder / "scheduler_config.json").read_text() for folder in ("stock", "ours")]
    assert files[0] == files[1]
    assert json.loads(files[1])["_class_name"] == name
    back = getattr(diffusers, name).from_pretrained(tmp_path / "ours")
    assert type(back) is getattr(diffusers, name) and back.to_json_string() == stock.to_json_string()
    there = getattr(fused, name).from_pretrained(tmp_path / "stock", fused_noise=True)
    assert type(there) is getattr(fused, name) and there.to_json_string() == files[0] and there.fused_noise
    assert not getattr(fused, name).from_config(ours.config).fused_noise


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_stock_class(name: str) -> None:
    """isinstance, compatibles, signatures (but for fused_noise), copies."""
    stock, ours = both(name)
    theirs = type(stock)
    assert isinstance(ours, theirs) and type(ours).__name__ == name
    assert {c.__name__ for c in ours.compatibles} == {c.__name__ for c in stock.compatibles}
    for compatible in ours.compatibles:
        if isinstance(compatible, DummyObject):  # needs a library that is not installed
            continue
        again = type(ours).from_config(compatible.from_config(ours.config).config)
        assert {k: v for k, v in again.config.items() if k in ours.config} == dict(ours.config)
    for method in ("step", "step_pred", "add_noise", "get_velocity", "set_timesteps"):
        if hasattr(theirs, method):
            parameters = (inspect.signature(getattr(c, method)).parameters for c in (theirs, type(ours)))
            want, got = ([(p.name, p.default, p.kind) for p in ps.values()] for ps in parameters)
            assert got == want
    assert list(inspect.signature(type(ours)).parameters) == [*inspect.signature(theirs).parameters, "fused_noise"]
    ours.set_timesteps(5)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is type(ours) and twin.config == ours.config and torch.equal(twin.timesteps, ours.timesteps)
    assert len(ours) == len(stock)


def test_a_class_of_the_users_keeps_its_module() -> None:
    class Mine(fused.DDPMScheduler):
        pass

    assert Mine().__module__ == __name__ and fused.DDPMScheduler.__module__ == "fastdiff.interop.diffusers"


def test_errors() -> None:
    x, output = draw(seeded(0))
    for name in NAMES[1:3]:
        stock, ours = both(name)
        for s in (stock, ours):
            with pytest.raises(ValueError, match="Number of inference steps is 'None'"):
                s.step(output, 1, x)
    for name in NAMES[:3]:
        stock, ours = both(name, 10, prediction_type="noise")
        for s in (stock, ours):
            with pytest.raises(ValueError, match="prediction_type given as noise must be one of"):
                s.step(output, 0 if name == "DDIMScheduler" else s.timesteps[0], x)
    for s in both("DDIMScheduler", 10):
        with pytest.raises(ValueError, match="Cannot pass both generator and variance_noise"):
            s.step(output, 1, x, eta=1.0, generator=seeded(0), variance_noise=x)
    ours = fused.DDPMScheduler(variance_type="learned_range")
    with pytest.raises(TypeError, match="model_output: expected 6 channels for variance_type 'learned_range', got 3"):
        ours.step(output, 5, x)
    ours.step(output, 0, x)
    ours.set_timesteps(10)
    with pytest.raises(ValueError, match=r"timestep: expected one of self.timesteps, got 5"):
        ours.step(output, 5, x)
    ours = fused.ScoreSdeVeScheduler()
    ours.timesteps = None
    with pytest.raises(ValueError, match=r"self.timesteps. is not set"):
        ours.step_pred(output, 0.5, x)


def test_without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "fastdiff.interop.diffusers")
    with pytest.raises(ImportError, match=r"pip install 'fastdiff-kernels\[diffusers\]'"):
        importlib.import_module("fastdiff.interop.diffusers")


# --- pipelines and training ---------------------------------------------------------------------------------------


def small_unet(**config: Any) -> diffusers.UNet2DModel:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **config,
    )


@pytest.mark.parametrize("kind", ["DDPM", "DDIM", "DDIM eta"])
def test_pipelines_give_the_same_images(kind: str) -> None:
    unet = small_unet()
    images = []
    for scheduler in both("DDPMScheduler" if kind == "DDPM" else "DDIMScheduler"):
        pipeline = getattr(diffusers, f"{kind[:4]}Pipeline")(unet, scheduler)
        pipeline.scheduler = scheduler  # DDIMPipeline has converted it
        pipeline.set_progress_bar_config(disable=True)
        extra = {"eta": 0.7} if kind == "DDIM eta" else {}
        call = {"batch_size": 2, "num_inference_steps": 30, "output_type": "np", **extra}
        images.append(torch.from_numpy(pipeline(generator=seeded(0), **call).images))
    assert torch.equal(images[1], images[0])


def test_pipelines_load_both_ways(tmp_path: Any) -> None:
    unet = small_unet()
    for mine in (True, False):
        folder = tmp_path / str(mine)
        scheduler = (fused if mine else diffusers).DDPMScheduler(num_train_timesteps=50)
        diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder)
        index = json.loads((folder / "model_index.json").read_text())
        assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
        assert "fastdiff" not in (folder / "scheduler" / "scheduler_config.json").read_text()
        pipeline = diffusers.DDPMPipeline.from_pretrained(folder)
        assert type(pipeline.scheduler) is diffusers.DDPMScheduler
        assert len(pipeline.scheduler) == 50
        scheduler = fused.DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        pipeline = diffusers.DDPMPipeline.from_pretrained(folder, scheduler=scheduler)
        assert pipeline.scheduler is scheduler and len(scheduler) == 50


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_training_recipe(prediction: str, tmp_path: Any) -> None:
    """diffusers' unconditional training: equal losses, and images of the saved EMA weights."""
    losses: list[list[float]] = []
    images = []
    for kind, scheduler in enumerate(both("DDPMScheduler", num_train_timesteps=100, prediction_type=prediction)):
        unet = small_unet()
        accelerator = Accelerator(cpu=True)
        unet, optimizer = accelerator.prepare(unet, torch.optim.AdamW(unet.parameters(), lr=1e-3))
        ema = EMAModel(unet.parameters(), decay=0.9, use_ema_warmup=True)
        torch.manual_seed(1)
        losses.append([])
        for _ in range(6):
            clean = torch.rand(4, 3, 8, 8) * 2 - 1
            noise = torch.randn_like(clean)
            t = torch.randint(0, scheduler.config.num_train_timesteps, (4,))
            output = unet(scheduler.add_noise(clean, noise, t), t).sample
            loss = torch.nn.functional.mse_loss(output, noise if prediction == "epsilon" else clean)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            ema.step(unet.parameters())
            losses[-1].append(loss.item())
        ema.copy_to(unet.parameters())
        folder = tmp_path / str(kind)
        diffusers.DDPMPipeline(accelerator.unwrap_model(unet), scheduler).save_pretrained(folder)
        loaded = type(scheduler).from_pretrained(folder, subfolder="scheduler")
        pipeline = diffusers.DDPMPipeline.from_pretrained(folder, scheduler=loaded)
        pipeline.set_progress_bar_config(disable=True)
        images.append(pipeline(batch_size=1, generator=seeded(0), num_inference_steps=20, output_type="np").images)
    assert losses[0] == losses[1] and all(math.isfinite(v) for v in losses[0])
    assert (images[0] == images[1]).all()


def test_examples(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples, and the scripts that a diffusers user had before: one import apart, the same losses and images.

    On the CPU, where equal bits are promised."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    losses, images = [], []
    for library in ("diffusers", "fastdiff.interop.diffusers"):
        out = tmp_path / library
        for name, argv in (
            ("training", ["--out", str(out), "--steps", "3", "--batch", "8"]),
            ("sampling", [str(out), "--out", str(out / "images"), "--images", "2"]),
        ):
            path = EXAMPLES / f"diffusers_{name}.py"
            source = path.read_text()
            assert source.count("fastdiff.interop") == 1
            monkeypatch.setattr(sys, "argv", [path.name, *argv])
            scope: dict[str, Any] = {"__name__": "__main__"}
            exec(compile(source.replace("fastdiff.interop.diffusers", library), path, "exec"), scope)
            losses += [scope["losses"]] if name == "training" else []
        images.append({p.relative_to(out): p.read_bytes() for p in sorted(out.rglob("*.png"))})
    assert losses[0] == losses[1] and len(losses[0]) == 3
    assert images[0] == images[1] and len(images[0]) == 6
