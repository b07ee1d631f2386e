"""Overridden methods, changes in place and unusual arguments: a scheduler of ours does what stock's does."""

import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from schedulers import NAMES, PARITY, both, draw, seeded
from torch import Tensor

from fastdiff.interop import diffusers as fused
from fastdiff.interop.diffusers import FusedScheduler
from fastdiff.interop.stock import reached, stamp
from fastdiff.support.plain import as_defined

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers with NumPy 2

CONFIGS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {"thresholding": True, "clip_sample": False},
    "DDIMScheduler": {"thresholding": True, "clip_sample": False},
    "DPMSolverMultistepScheduler": {"thresholding": True},
    "ScoreSdeVeScheduler": {},
}
ENTRIES = ("step", "step_pred", "add_noise", "get_velocity")
# Every method that one of stock's methods calls.
USED = sorted(
    {
        (name, used)
        for name in NAMES
        for entry in ENTRIES
        if hasattr(getattr(diffusers, name), entry)
        for used, member in reached(getattr(diffusers, name), entry).items()
        if not isinstance(member, property)
    }
)


def walk(scheduler: Any) -> list[Tensor]:
    """Four steps from one input, and the noising of it."""
    x, output = draw(seeded(0))
    random, results = seeded(1), []
    extra = {"eta": 0.5} if "DDIM" in type(scheduler).__name__ else {}
    step = getattr(scheduler, "step_pred", None) or scheduler.step
    for t in scheduler.timesteps[3:7]:
        x = step(output, t, x, generator=random, **extra).prev_sample
        results.append(x)
    t = torch.tensor([2, 4]) if "SdeVe" in type(scheduler).__name__ else scheduler.timesteps[[2, 4]]
    return [*results, scheduler.add_noise(x, output, t)]


def ready(scheduler: Any) -> Any:
    scheduler.set_timesteps(10)
    if hasattr(scheduler, "set_sigmas"):
        scheduler.set_sigmas(10)
    return scheduler


def close(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=PARITY, atol=PARITY)


def changed(original: Callable[..., Any], calls: Counter[str]) -> Callable[..., Any]:
    """The method with its calls counted and a tensor it returns changed."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[original.__name__] += 1
        result = original(self, *args, **kwargs)
        return result * 0.9 if isinstance(result, Tensor) and result.is_floating_point() else result

    return method


@pytest.mark.parametrize("how", ["subclass", "object", "patched class", "patched stock"])
@pytest.mark.parametrize(("name", "method"), USED)
def test_overrides(name: str, method: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stock's methods call is called as often, and what it returns counts."""
    plain, counts, results = walk(ready(getattr(fused, name)(**CONFIGS[name]))), [], []
    for library in (diffusers, fused):
        calls: Counter[str] = Counter()
        kind = getattr(library, name)
        patched = getattr(diffusers, name) if how == "patched stock" else kind
        replacement = changed(getattr(patched, method), calls)
        if how == "subclass":
            kind = type(name, (kind,), {method: replacement})
        with monkeypatch.context() as patch:
            if how in ("patched class", "patched stock"):
                patch.setattr(patched, method, replacement)
            scheduler = ready(kind(**CONFIGS[name]))
            if how == "object":
                setattr(scheduler, method, types.MethodType(replacement, scheduler))
            results.append(walk(scheduler))
        counts.append(sum(calls.values()))
    assert counts[0] == counts[1]
    close(results[1], results[0])
    if counts[0] and method in ("_get_variance", "convert_model_output", "get_adjacent_sigma"):
        assert not all(torch.equal(a, b) for a, b in zip(results[1], plain, strict=True))


def test_a_step_that_was_patched_before_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the class that stands for stock's is made; and nothing of stock's is taken for patched."""
    for kind in fused.SCHEDULERS:
        methods = {n: m for n, m in vars(kind).items() if n in ENTRIES}
        assert methods and not [n for n in methods if as_defined(kind.stock, n) is None]
        assert not [n for entry in methods for n in reached(kind.stock, entry) if as_defined(kind.stock, n) is None]
    monkeypatch.setattr(diffusers.DDIMScheduler, "step", lambda self, *args: "patched")

    class Late(FusedScheduler, diffusers.DDIMScheduler, stock=diffusers.DDIMScheduler):
        def step(self, *args: Any) -> str:
            return "fused"

    assert Late().step() == "patched"


def test_every_method_that_users_override_is_among_them() -> None:
    """The names are read from stock's code; these are the ones in public use."""
    assert {
        ("DDPMScheduler", "_get_variance"),
        ("DDPMScheduler", "previous_timestep"),
        ("DDIMScheduler", "_get_variance"),
        ("DPMSolverMultistepScheduler", "convert_model_output"),
        ("DPMSolverMultistepScheduler", "dpm_solver_first_order_update"),
        ("DPMSolverMultistepScheduler", "multistep_dpm_solver_second_order_update"),
        ("DPMSolverMultistepScheduler", "index_for_timestep"),
        ("ScoreSdeVeScheduler", "get_adjacent_sigma"),
    } <= set(USED)


def test_a_step_that_calls_the_one_above_stays_fused() -> None:
    class Logged(fused.DDPMScheduler):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            return super().step(*args, **kwargs)

    scheduler = ready(Logged())
    close(walk(scheduler), walk(ready(fused.DDPMScheduler())))
    assert "steps" in scheduler._tables._entries


def test_fused_noise_warns_where_stock_draws() -> None:
    """An override, another solver, or shapes that broadcast: the noise is stock's, and a warning says so."""
    x, output = draw(seeded(0))

    class Quiet(fused.DDPMScheduler):
        def _get_variance(self, *args: Any, **kwargs: Any) -> Tensor:
            return torch.tensor(0.25)

    with pytest.warns(UserWarning, match=r"fused_noise: DDPMScheduler\.step runs here and draws the noise as stock"):
        Quiet(fused_noise=True).step(output, 500, x)
    with pytest.warns(UserWarning, match="fused_noise"):
        fused.DDPMScheduler(fused_noise=True).step(output[:1], 500, x)


# --- changes in place -------------------------------------------------------------------------------------------

SOURCES = [
    ("DDPMScheduler", "alphas_cumprod"),
    ("DDPMScheduler", "one"),
    ("DDIMScheduler", "alphas_cumprod"),
    ("DDIMScheduler", "final_alpha_cumprod"),
    ("DPMSolverMultistepScheduler", "sigmas"),
    ("ScoreSdeVeScheduler", "discrete_sigmas"),
]
EDITS: dict[str, Callable[[Tensor, float], Any]] = {
    "data": lambda t, factor: t.data.mul_(factor),
    "numpy": lambda t, factor: np.multiply(t.numpy(), np.float32(factor), out=t.numpy()),
    "storage": lambda t, factor: setattr(t, "data", t.data * factor),
    "in place": lambda t, factor: t.mul_(factor),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize(("name", "source"), SOURCES)
def test_every_change_in_place_is_seen(name: str, source: str, edit: str) -> None:
    pair, at_the_end = both(name, 10), source in ("one", "final_alpha_cumprod")
    factor = 0.99995 if at_the_end else 0.9  # alpha_bar still falls from step to step
    step = [getattr(s, "step_pred", None) or s.step for s in pair]
    (x, output), t = draw(seeded(0)), pair[0].timesteps[-1 if at_the_end else 3]
    extra = {"eta": 0.0} if name == "DDIMScheduler" else {}
    results = []
    for _ in range(2):
        if name == "DPMSolverMultistepScheduler":
            for s in pair:
                s._step_index = None
        close(*([s(output, t, x, generator=seeded(1), **extra).prev_sample] for s in reversed(step)))
        noised = torch.tensor([3, 4]) if name == "ScoreSdeVeScheduler" else pair[0].timesteps[[3, 4]]
        close(*([s.add_noise(x, output, noised)] for s in reversed(pair)))
        results.append(step[1](output, t, x, generator=seeded(1), **extra).prev_sample if "DPM" not in name else None)
        for s in pair:
            EDITS[edit](getattr(s, source), factor)
    if results[0] is not None:
        assert not torch.equal(*results)


@pytest.mark.parametrize("edit", ["data", "numpy"])
def test_timesteps_changed_in_place_are_seen(edit: str) -> None:
    pair = both("DDPMScheduler", 10)
    x, output = draw(seeded(0))
    for _ in range(2):
        t = pair[0].timesteps[4].clone()
        close(*([s.step(output, t, x, generator=seeded(1)).prev_sample] for s in reversed(pair)))
        for s in pair:
            s.timesteps.data.add_(7) if edit == "data" else np.add(s.timesteps.numpy(), 7, out=s.timesteps.numpy())


def test_stamps_of_any_tensor() -> None:
    """The bytes of its numbers in order, whatever the type, the layout and the gradient."""
    whole = torch.arange(12.0).reshape(3, 4)
    assert stamp(whole.T) == stamp(whole.T.contiguous()) != stamp(whole)
    assert stamp(torch.tensor(1.5)) == np.float32(1.5).tobytes()
    assert stamp(whole.bfloat16()) != stamp(whole.bfloat16() + 1)
    assert stamp(whole.clone().requires_grad_()) == stamp(whole)
    with torch.inference_mode():
        assert stamp(torch.ones(2)) == np.ones(2, np.float32).tobytes()
    meta = whole.to("meta")
    before = stamp(meta)
    assert before == stamp(meta) != stamp(meta.add_(1)) and before != stamp(whole.to("meta"))


# --- what stock takes ---------------------------------------------------------------------------------------------


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        return type(error)


SHAPES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "one output": lambda x, o: (x, o[:1]),
    "one sample": lambda x, o: (x[:1], o),
    "an output without a batch": lambda x, o: (x, o[0]),
    "one channel": lambda x, o: (x, o[:, :1]),
    "no batch": lambda x, o: (x[0, 0], o[0, 0]),
    "numbers": lambda x, o: (x[0, 0, 0, 0], o[0, 0, 0, 0]),
    "none": lambda x, o: (x[:0], o[:0]),
    "float64 output": lambda x, o: (x, o.double()),
    "whole numbers": lambda x, o: (x.round().int(), o),
}


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_types(name: str, shapes: str, prediction: str) -> None:
    """Both give the same, or neither takes them."""
    x, output = SHAPES[shapes](*draw(seeded(0)))
    config = {} if name == "ScoreSdeVeScheduler" else {"prediction_type": prediction}
    results = []
    for s in both(name, 10, **config):
        step = getattr(s, "step_pred", None) or s.step
        extra = {"eta": 0.7} if name == "DDIMScheduler" else {}
        call = lambda s=s, step=step, extra=extra: step(  # noqa: E731
            output, s.timesteps[5], x, generator=seeded(1), return_dict=False, **extra
        )
        results.append(outcome(call))
    want, got = results
    if isinstance(want, type):
        assert isinstance(got, type), (want, got)
    else:
        assert not isinstance(got, type), got
        close(list(got), list(want))


@pytest.mark.parametrize(
    "timestep", [torch.tensor(501, dtype=torch.int32), np.int32(501), np.array(501), torch.tensor([501]), 501]
)
@pytest.mark.parametrize("name", NAMES[:2])
def test_kinds_of_integers(name: str, timestep: Any) -> None:
    x, output = draw(seeded(0))
    want, got = (s.step(output, timestep, x, generator=seeded(1)) for s in both(name, None if "DDPM" in name else 10))
    close([got.prev_sample], [want.prev_sample])


@pytest.mark.parametrize("name", NAMES[:2])
def test_timesteps_that_are_no_integers_are_refused(name: str) -> None:
    """As by stock, and not rounded down in silence."""
    x, output = draw(seeded(0))
    for s in both(name, 10):
        for call in (
            lambda s=s: s.step(output, torch.tensor(501.7), x),
            lambda s=s: s.add_noise(x, output, torch.tensor([3.5, 4.5])),
            lambda s=s: s.get_velocity(x, output, torch.tensor([3.5, 4.5])),
        ):
            with pytest.raises(IndexError):
                call()
        with pytest.raises((IndexError, RuntimeError)):
            s.step(output, True, x)


def test_given_noise_of_ddim_broadcasts() -> None:
    x, output = draw(seeded(0))
    want, got = (
        s.step(output, 501, x, eta=0.8, variance_noise=output[:1, :1]).prev_sample for s in both("DDIMScheduler", 10)
    )
    close([got], [want])


@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
def test_noise_of_other_shapes(method: str) -> None:
    x, noise = draw(seeded(0))
    t = torch.tensor([3, 900], dtype=torch.int32)
    for a, b in ((x, noise[:1]), (x[:1], noise), (x, noise[0]), (x[0], noise), (x, noise.double()), (x.int(), noise)):
        want, got = (outcome(lambda s=s, a=a, b=b: getattr(s, method)(a, b, t)) for s in both("DDPMScheduler"))
        if isinstance(want, type):
            assert isinstance(got, type)
        else:
            close([got], [want])
