"""add_noise and get_velocity against stock's, and schedulers that are changed between calls."""

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from schedulers import NAMES, PARITY, both, draw, few, same_steps
from tolerance import assert_same_bits
from torch import Tensor

from fastdiff.interop import diffusers as fused
from fastdiff.interop.diffusers import EulerDiscreteScheduler, common, ddpm
from fastdiff.rows import make_rows

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers with NumPy 2


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


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4), (2, 3, 4, 4), (2, 1, 3, 4, 4), (1, 2, 3, 4, 4)])
@pytest.mark.parametrize("name", NAMES)
def test_add_noise_to_data_of_any_shape(name: str, shape: tuple[int, ...]) -> None:
    """What stock takes is taken, and gives the shape that it gives there."""
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    for t in (torch.tensor([3, 5]), torch.tensor([5])):
        results = []
        for scheduler in both(name, 20):
            try:
                at = t if name == "ScoreSdeVeScheduler" else scheduler.timesteps[t].long()
                results.append(scheduler.add_noise(x, noise, at))
            except (RuntimeError, IndexError) as error:
                results.append(error)
        if isinstance(results[0], Tensor):
            torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)


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


def test_tables_outlive_a_run_but_no_change_of_levels_or_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = EulerDiscreteScheduler._steps
    monkeypatch.setattr(EulerDiscreteScheduler, "_steps", lambda self, *args: made.append(1) or original(self, *args))
    scheduler, x = EulerDiscreteScheduler(), torch.ones(1, 2)

    def run(steps: int) -> int:
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps[:2]:
            scheduler.step(x, t, x)
        return len(made)

    assert [run(5), run(5), run(6)] == [1, 1, 2]
    scheduler.sigmas.data.mul_(2)
    scheduler.step(x, scheduler.timesteps[2], x)
    assert len(made) == 3
    scheduler.register_to_config(beta_start=0.1)  # which an option may be that levels do not show
    assert [run(6), run(6)] == [4, 4]


@pytest.mark.parametrize("name", ["DPMSolverMultistep", "DEISMultistep", "UniPCMultistep", "PNDM"])
def test_tensors_decide_where_a_step_is_taken_and_not_the_default_device(name: str) -> None:
    results = []
    for default in ("cpu", "meta"):
        x, output = draw(torch.Generator().manual_seed(0))
        scheduler = getattr(fused, f"{name}Scheduler")()
        scheduler.set_timesteps(5)
        random = "generator" in inspect.signature(scheduler.step).parameters
        options = {"generator": torch.Generator().manual_seed(1)} if random else {}
        with torch.device(default):
            for t in scheduler.timesteps:
                x = scheduler.step(output, t, x, **options).prev_sample
        results.append(x)
    assert torch.equal(*results)
