"""Schedulers of diffusers that count their steps: Euler and others, LCM and TCD, against stock from one generator."""

import copy
import itertools
import logging
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from schedulers import COUNTING, PARITY, SPACINGS, both, draw, noised, seeded, small_unet
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.interop import diffusers as fused
from fastdiff.interop.stock import reached

pytestmark = [
    pytest.mark.usefixtures("kernels_of_the_cpu"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # diffusers with NumPy 2
]

EULER, ANCESTRAL, HEUN, EDM, FLOW, LCM, TCD = COUNTING
LEVELS = (LCM, TCD)
SIGMAS: tuple[dict[str, Any], ...] = (
    {}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}
)  # fmt: skip
CHURN = {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}


def step(scheduler: Any, output: Tensor, t: Any, x: Tensor, generator: Any = None, **options: Any) -> Any:
    if HEUN not in type(scheduler).__name__:
        options["generator"] = generator
    return scheduler.step(output, t, x, **options)


def places(scheduler: Any) -> list[int]:
    """Where to start so that three steps see the beginning, the middle and the end; Heun's at a first half."""
    n = len(scheduler.timesteps)
    return [0] if n <= 7 else [0, n // 4 * 2 + 1 if scheduler.order == 2 else n // 2, n - 3]


def worst(got: Tensor, want: Tensor, amplified: float = 1.0) -> float:
    """Relative above 1."""
    return float(((got - want).abs() / want.abs().clamp(min=1)).max()) / max(amplified, 1)


def same_runs(stock: Any, ours: Any, scaled: bool = True, **options: Any) -> None:
    """Equal results, generators and counts in steps from unrelated inputs, x as large as it is at its level."""
    for start in places(stock):
        inputs, generators = seeded(1), [seeded(2) for _ in range(2)]
        for s in (stock, ours):
            s.set_begin_index(start)
            s._step_index = s.dt = s.prev_derivative = None
        for i in range(start, min(start + 7, len(stock.timesteps))):
            x, output = draw(inputs)
            sigma = float(stock.sigmas[i]) if hasattr(stock, "sigmas") else 0.0
            second = getattr(stock, "dt", None) is not None
            # Stock rounds x_0, and then divides its distance from x by sigma.
            amplified = float(stock.dt.abs()) / sigma / 2 if second else 1.0
            if scaled and type(stock).__name__ != FLOW:
                x = x * (sigma**2 + 1) ** 0.5
            results = []
            for s, generator in zip((stock, ours), generators, strict=True):
                s.is_scale_input_called = True
                results.append(step(s, output.clone(), stock.timesteps[i], x.clone(), generator, **options))
            want, got = results
            assert type(got) is type(want) and got.keys() == want.keys() and stock.step_index == ours.step_index
            assert torch.equal(generators[0].get_state(), generators[1].get_state())
            for key in want:
                assert got[key].dtype == want[key].dtype and bool(want[key].isfinite().all())
                error = worst(got[key] / x.abs().max().clamp(min=1), want[key] / x.abs().max().clamp(min=1), amplified)
                assert error <= PARITY, (key, i, error)


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", [EULER, ANCESTRAL, HEUN])
def test_sigmas(name: str, prediction: str) -> None:
    if name == ANCESTRAL and prediction == "sample":
        return  # stock has none, see test_errors
    for k, spacing in enumerate(SPACINGS):
        for sigmas in SIGMAS if name != ANCESTRAL else SIGMAS[:1]:
            for steps in (1000, 50, 7, 1) if not sigmas else (50, 7, 1)[k:]:
                config = {"timestep_spacing": spacing, "prediction_type": prediction, **sigmas}
                if name == HEUN and sigmas:  # its constructor finds the sigmas of all of them
                    config["num_train_timesteps"] = 100
                same_runs(*both(name, steps, **config))
    same_runs(*both(name, 7, prediction_type=prediction), scaled=False)


@pytest.mark.parametrize("churn", [{}, CHURN])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_and_churning(prediction: str, churn: dict[str, Any]) -> None:
    for steps in (1000, 50, 7, 1):
        for schedule in ("karras", "exponential"):
            same_runs(*both(EDM, steps, prediction_type=prediction, sigma_schedule=schedule), **churn)
        config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        same_runs(*both(EULER, steps, prediction_type=prediction, **config), **churn)


def test_less_than_no_churn() -> None:
    """Stock lowers sigma and draws nothing."""
    for name in (EULER, EDM):
        same_runs(*both(name, 7), s_churn=-1.0)


@pytest.mark.parametrize("stochastic", [False, True])
def test_flow_matching(stochastic: bool) -> None:
    for config in (*SIGMAS, {"shift": 3.0}, {"invert_sigmas": True}, {"shift_terminal": 0.1}):
        for steps in (1000, 50, 7, 1) if "use_beta_sigmas" not in config else (7, 2):
            if steps > 1 or "shift_terminal" not in config:
                same_runs(*both(FLOW, steps, stochastic_sampling=stochastic, **config))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_lcm(prediction: str) -> None:
    limits: tuple[dict[str, Any], ...] = ({}, {"clip_sample": True}, {"thresholding": True})
    limits += ({"clip_sample": True, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True},)  # from alpha = 0
    for config in (*limits, {"set_alpha_to_one": False, "timestep_scaling": 3.0}):
        for steps in (50, 7, 1):
            same_runs(*both(LCM, steps, prediction_type=prediction, **config))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_tcd(prediction: str) -> None:
    for eta, steps in itertools.product((0.0, 0.3, 1.0), (50, 7, 1)):
        same_runs(*both(TCD, steps, prediction_type=prediction), eta=eta)
    pair = both(TCD, prediction_type=prediction)
    for s in pair:
        s.set_timesteps(timesteps=[999, 759, 499, 259], strength=0.6)  # draws in its last step too
    same_runs(*pair)


@pytest.mark.slow
def test_heun_clips_and_is_nearer_to_the_truth() -> None:
    """Stock amplifies its rounding of x_0 by dt / 2 sigma, which is 40 in the last step here."""
    same_runs(*both(HEUN, 7, clip_sample=True))
    for prediction in ("epsilon", "v_prediction"):
        config = {"prediction_type": prediction, "use_beta_sigmas": True}
        stock, ours = both(HEUN, 7, **config)
        exact = copy.deepcopy(stock)
        exact.sigmas, inputs, errors = exact.sigmas.double(), seeded(1), [0.0, 0.0]
        for t in stock.timesteps:
            x, output = draw(inputs)
            want = exact.step(output.double(), t, x.double()).prev_sample
            for k, s in enumerate((stock, ours)):
                errors[k] = max(errors[k], worst(s.step(output, t, x).prev_sample.double(), want))
        assert errors[1] <= PARITY / 2 < errors[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", COUNTING)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    """Results have stock's types, also where only the output of the model has another."""
    exact = both(name, 10)[0]
    stock, ours = both(name, 10)
    x, output = draw(seeded(0))
    for given in (x.to(dtype), x):
        for s in (exact, stock, ours):
            s.set_begin_index(3)
            s._step_index = s.dt = None
        for t in stock.timesteps[3:5]:
            better = step(exact, output.to(dtype).double(), t, given.double(), seeded(7))
            # Noise that is drawn as float64 is other noise.
            better, want, got = (
                better if s is exact else step(s, output.to(dtype), t, given, seeded(7)) for s in (exact, stock, ours)
            )
            for key in want:
                assert got[key].dtype == want[key].dtype
                if name in (EULER, HEUN, EDM, FLOW):
                    error, theirs = worst(got[key].double(), better[key]), worst(want[key].double(), better[key])
                    assert error <= max(theirs, torch.finfo(got[key].dtype).eps) + PARITY
                else:
                    torch.testing.assert_close(got[key], want[key], rtol=0.02, atol=0.02)


# --- places -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COUNTING)
def test_they_start_where_stock_does(name: str) -> None:
    """At a timestep in the middle, at the second of two equal ones, and at a number of any kind."""
    for repeated in (False, True):
        for kind in (lambda t: t, lambda t: t[None], lambda t: t.item(), lambda t: t.numpy()[()], lambda t: t.numpy()):
            pair, x = both(name, 10), draw(seeded(0))
            t = pair[0].timesteps[3]
            if name not in LEVELS and isinstance(kind(t), int):
                continue
            for s in pair:
                if repeated:
                    s.timesteps[6] = s.timesteps[3]
            want, got = (step(s, x[1], kind(t), x[0], seeded(0)) for s in pair)
            assert pair[0].step_index == pair[1].step_index != 0
            assert name == HEUN or pair[1].step_index == (7 if repeated else 4)
            assert worst(got[0], want[0]) <= PARITY


def test_errors() -> None:
    x, output = draw(seeded(0))
    for name in COUNTING:
        for s in both(name, 10):
            with pytest.raises(IndexError):
                step(s, output, 123 if name in LEVELS else 123.25, x)
            if name not in (*LEVELS, HEUN):
                with pytest.raises(ValueError, match="Passing integer indices"):
                    step(s, output, 3, x)
            if name not in LEVELS:
                s.set_begin_index(len(s.timesteps))
                with pytest.raises(IndexError):
                    step(s, output, s.timesteps[-1], x)
    for name, prediction in ((EULER, "noise"), (ANCESTRAL, "sample"), (HEUN, "noise"), (LCM, "noise"), (TCD, "noise")):
        for s in both(name, 10, prediction_type=prediction):
            with pytest.raises((ValueError, NotImplementedError), match="prediction_type"):
                step(s, output, s.timesteps[0], x)
    for s in (*both(LCM), *both(TCD)):
        with pytest.raises(ValueError, match="Number of inference steps is 'None'"):
            s.step(output, 1, x)


@pytest.mark.parametrize("name", COUNTING)
def test_noising(name: str) -> None:
    """By timestep, at the begin index, and at the step of a pipeline."""
    stock, ours = both(name, 10)
    x, noise = draw(seeded(0), (4, 3, 4, 4))
    t = stock.timesteps[[3, 0, 9, 3]]
    for begin, done in ((None, None), (4, None), (4, 6)):
        for s in (stock, ours):
            s._begin_index, s._step_index = begin, done
        for dtype in (torch.float32, torch.float64):
            want, got = (noised(s, x.to(dtype), noise.to(dtype), t) for s in (stock, ours))
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    for s in (stock, ours):
        s._begin_index = None
        if name not in LEVELS:
            with pytest.raises((IndexError, ValueError)):
                noised(s, x, noise, t + 0.25)


# --- what runs stock's code ---------------------------------------------------------------------------------------


def test_options_without_a_kernel_say_so() -> None:
    x, output = torch.randn(2, 5, 3, generator=seeded(0)), torch.randn(2, 5, 3, generator=seeded(1))
    tokens = torch.full((2, 5), 700.0)
    stock, ours = both(FLOW, 10)
    want = stock.step(output, stock.timesteps[3], x, per_token_timesteps=tokens)
    with pytest.warns(UserWarning, match="per_token_timesteps: the step of diffusers runs"):
        got = ours.step(output, ours.timesteps[3], x, per_token_timesteps=tokens)
    assert torch.equal(got[0], want[0])
    stock, ours = both(EDM, 10)
    want = stock.step(output, stock.timesteps[3], x, pred_original_sample=0.1 * x)
    with pytest.warns(UserWarning, match="pred_original_sample: the step of diffusers runs"):
        got = ours.step(output, ours.timesteps[3], x, pred_original_sample=0.1 * x)
    assert torch.equal(got[0], want[0])


@pytest.mark.parametrize("name", COUNTING)
def test_shapes_that_broadcast(name: str) -> None:
    x, output = draw(seeded(0))
    for a, b in ((x, output[:1]), (x, output[0]), (x[:1], output)):
        want, got = (step(s, b, s.timesteps[3], a, seeded(1)) for s in both(name, 10))
        assert all(torch.equal(got[k], want[k]) for k in want)


def test_heun_hands_a_half_step_over() -> None:
    """The second half may be stock's, in either direction."""
    x, output = draw(seeded(0))
    pair = both(HEUN, 10)
    for first, second in ((output, output[:1]), (output[:1], output)):
        for s in pair:
            s.set_timesteps(10)
        for t, out in ((pair[0].timesteps[0], first), (pair[0].timesteps[1], second)):
            want, got = (s.step(out, t, x).prev_sample for s in pair)
            assert worst(got, want) <= PARITY


def test_a_step_of_heun_past_the_end() -> None:
    """It is a second half of stock's, from level 0: no number, but no error either."""
    x, output = draw(seeded(0))
    for s in both(HEUN, 3):
        ends = [s.step(output, t, x).prev_sample for t in (*s.timesteps, s.timesteps[-1])]
        assert bool(ends[-2].isfinite().all()) and not bool(ends[-1].isfinite().any())


def members(name: str) -> list[str]:
    kind = getattr(diffusers, name)
    return sorted(n for n, m in reached(kind, "step").items() if not isinstance(m, property))


@pytest.mark.parametrize(("name", "method"), [(name, method) for name in COUNTING for method in members(name)])
@pytest.mark.parametrize("how", ["subclass", "object", "patched stock"])
def test_overrides(name: str, method: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a method returns counts, if it is one that stock's step calls."""
    counts, results = [], []
    for library in (diffusers, fused):
        calls: Counter[str] = Counter()
        kind = getattr(library, name)
        original = getattr(diffusers, name).__dict__[method]

        def changed(
            self: Any, *args: Any, original: Callable[..., Any] = original, calls: Counter[str] = calls, **kw: Any
        ) -> Any:
            calls[""] += 1
            result = original(self, *args, **kw)
            return result * 0.9 if isinstance(result, Tensor) else result

        with monkeypatch.context() as patch:
            if how == "patched stock":
                patch.setattr(getattr(diffusers, name), method, changed)
            elif how == "subclass":
                kind = type(name, (kind,), {method: changed})
            scheduler = kind(**({"thresholding": True} if name == LCM else {}))
            scheduler.set_timesteps(10)
            if how == "object":
                setattr(scheduler, method, types.MethodType(changed, scheduler))
            x, output = draw(seeded(0))
            results.append([step(scheduler, output, t, x, seeded(1))[0] for t in scheduler.timesteps[3:6]])
        counts.append(calls[""])
    assert counts[0] == counts[1] > 0
    assert max(worst(a, b) for a, b in zip(*reversed(results), strict=True)) <= PARITY


def test_a_reminder_of_scale_model_input(caplog: pytest.LogCaptureFixture) -> None:
    logging.disable(logging.NOTSET)
    x, output = draw(seeded(0))
    logger = logging.getLogger("diffusers")
    for name in (EULER, ANCESTRAL, EDM):
        for s in both(name, 10):
            for expected in (1, 0):
                caplog.clear()
                logger.addHandler(caplog.handler)
                step(s, output, s.timesteps[0], x)
                logger.removeHandler(caplog.handler)
                assert sum("scale_model_input" in r.message for r in caplog.records) == expected
                s.scale_model_input(x, s.timesteps[1])


@pytest.mark.parametrize("name", COUNTING)
def test_accelerate_picks_them(name: str) -> None:
    """In the middle of a run, with their count and tables; restore puts stock's back."""
    runs = []
    for change in (lambda pipeline: None, fastdiff.accelerate, fastdiff.restore):
        pipeline = diffusers.DDPMPipeline(small_unet(), both(name, 10)[change is fastdiff.restore])
        x, generator = draw(seeded(0))[0], seeded(1)
        for i, t in enumerate(pipeline.scheduler.timesteps[2:5]):
            if i == 2:
                change(pipeline)
            x = step(pipeline.scheduler, 0.1 * x, t, x, generator).prev_sample
        library = fused if change is fastdiff.accelerate else diffusers
        assert type(pipeline.scheduler) is getattr(library, name)
        runs.append(x)
    assert max(worst(x, runs[0]) for x in runs[1:]) <= PARITY


@pytest.mark.parametrize("name", [EULER, ANCESTRAL, *LEVELS])
def test_a_dit_pipeline_gives_the_same_images(name: str) -> None:
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, out_channels=4, num_layers=1, norm_num_groups=2, sample_size=4,
        num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, layers_per_block=1, sample_size=4).eval()
    images = []
    for change in (lambda pipeline: None, fastdiff.accelerate):
        pipeline = diffusers.DiTPipeline(transformer, vae, both(name)[0])
        pipeline.set_progress_bar_config(disable=True)
        change(pipeline)
        torch.manual_seed(5)  # the pipeline gives its steps no generator
        call = pipeline([1, 2], generator=seeded(0), num_inference_steps=4, output_type="np")
        images.append(torch.from_numpy(call.images))
    assert type(pipeline.scheduler) is getattr(fused, name)
    torch.testing.assert_close(images[1], images[0], rtol=0, atol=1e-4)
    assert float(images[0].std()) > 0.01


# --- changes, gradients, noise ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COUNTING)
def test_changes_are_seen(name: str) -> None:
    """Of the tensors, in place and through .data, and of the configuration."""
    pair = both(name, 10)
    source = "alphas_cumprod" if name in LEVELS else "sigmas"
    x, output = draw(seeded(0))
    changes: tuple[Callable[[Any], Any], ...] = (
        lambda s: None,
        lambda s: getattr(s, source).mul_(0.9),
        lambda s: getattr(s, source).data.mul_(0.9),
        lambda s: setattr(s, source, getattr(s, source) * 0.9),
        lambda s: s.register_to_config(prediction_type="v_prediction", stochastic_sampling=True, sigma_data=0.7),
        lambda s: s.set_timesteps(11),
    )
    seen = []
    for change in changes:
        for s in pair:
            change(s)
            s._step_index = s.dt = s.prev_derivative = None
        want, got = (step(s, output, s.timesteps[3], x, seeded(0))[0] for s in pair)
        assert worst(got, want) <= PARITY
        seen.append(got)
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(seen))


@pytest.mark.parametrize("name", COUNTING)
def test_gradients(name: str) -> None:
    x, output = draw(seeded(0))
    gradients = []
    for s in both(name, 10):
        inputs = x.clone().requires_grad_(), output.clone().requires_grad_()
        results = [step(s, inputs[1], t, inputs[0], seeded(0)) for t in s.timesteps[3:5]]
        sum((r[k] * (1 + i)).square().sum() for i, r in enumerate(results) for k in r).backward()
        gradients.append([i.grad for i in inputs])
    for want, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "config"), [(ANCESTRAL, {}), (LCM, {}), (FLOW, {"stochastic_sampling": True})])
def test_fused_noise(name: str, config: dict[str, Any]) -> None:
    """It is z(seed, sample, place) of the stream of reverse noise, whatever the batch; the generator rests."""
    x, output = draw(seeded(0))

    def run(x: Tensor, output: Tensor, generator: Any, z: Tensor | None = None) -> Tensor:
        scheduler = getattr(fused, name)(**config, fused_noise=True)
        scheduler.set_timesteps(10)
        if z is not None:
            scheduler._noise = lambda *args: {"noise": z}
        with fastdiff.backend("reference"):
            return scheduler.step(output, scheduler.timesteps[4], x, generator=generator).prev_sample

    generator = seeded(7)
    before, got = generator.get_state(), run(x, output, generator)
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(run(x[:1], output[:1], seeded(7)), got[:1])
    each = run(x, output, [seeded(7), seeded(7)])
    torch.testing.assert_close(each[:1], got[:1], rtol=1e-6, atol=1e-6)
    z = ops.normal(x.shape, 7, step=4, stream=ops.REVERSE)
    torch.testing.assert_close(run(x, output, None, z), got, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "config"), [(name, {}) for name in COUNTING] + [(FLOW, {"stochastic_sampling": True})]
)
def test_a_step_is_one_operation(name: str, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first half of Heun's step a lerp comes after it."""
    calls = []
    original = ops.update
    add = torch.add  # is what flow matching's is, by a number of the host
    monkeypatch.setattr(ops, "update", lambda *args, **kw: calls.append(1) or original(*args, **kw))
    monkeypatch.setattr(torch, "add", lambda *args, **kw: calls.append(1) or add(*args, **kw))
    monkeypatch.setattr(ops, "combine", None)
    scheduler, (x, output) = getattr(fused, name)(**config), draw(seeded(0))
    scheduler.set_timesteps(10)
    for t in scheduler.timesteps[3:5]:
        step(scheduler, output, t, x)
    assert len(calls) == 2


def test_a_step_of_flow_matching_rounds_once() -> None:
    """In small types too, where torch.add rounds the product as well."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ours, (x, output) = both(FLOW, 3)[1], (a.to(dtype) for a in draw(seeded(0), (8, 3, 8, 8)))
        sigma, to = ours.sigmas[1:3]
        exact = x.double() + (to - sigma).double() * output.double()
        got = ours.step(output, ours.timesteps[1], x).prev_sample.double()
        half = torch.finfo(dtype).eps / 2 * (1 + 1e-3)
        assert bool(((got - exact).abs() <= half * exact.abs() + 1e-7).all())


@pytest.mark.parametrize("name", [EULER, ANCESTRAL, HEUN, EDM])
def test_scaled_inputs(name: str) -> None:
    """Stock's bits and types, from any place, and after a change that no version shows."""
    stock, ours = both(name, 10)
    for factor in (1.0, 0.9):
        for start in (0, 7):
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                x, t = draw(seeded(0))[0].to(dtype), stock.timesteps[start]
                for s in (stock, ours):
                    s._step_index = None
                    s.sigmas.data.mul_(factor)
                want, got = (s.scale_model_input(x, t) for s in (stock, ours))
                assert got.dtype == want.dtype and torch.equal(got, want)
                assert ours.step_index == stock.step_index
