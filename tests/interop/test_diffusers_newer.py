"""Schedulers of diffusers for flow matching, consistency models, video, EDM's solver and inversion, against stock's."""

import copy
import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from schedulers import PARITY, NoReads, both, noised, seeded
from strategies import BACKENDS, DEVICE
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.interop import diffusers as fused
from fastdiff.interop.diffusers.common import drawn

pytestmark = [
    pytest.mark.usefixtures("kernels_of_the_cpu"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # diffusers with NumPy 2
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # diffusers of its older algorithms
]

SHAPE = (2, 3, 4, 4)
EDM, INVERSE = "EDMDPMSolverMultistepScheduler", "DPMSolverMultistepInverseScheduler"
HEUN, LCM = "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"
SCM, LTX, COG = "SCMScheduler", "LTXEulerAncestralRFScheduler", "CogVideoXDDIMScheduler"
CM = "CMStochasticIterativeScheduler"
PLAIN = (EDM, INVERSE, HEUN, LCM, SCM, LTX, COG, CM)
SDE = {"algorithm_type": "sde-dpmsolver++"}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((EDM, {"solver_order": order, "solver_type": kind}) for order in (2, 3) for kind in ("midpoint", "heun")),
    (
        EDM,
        {"prediction_type": "v_prediction", "sigma_schedule": "exponential", "thresholding": True, "solver_order": 1},
    ),
    (EDM, {**SDE, "final_sigmas_type": "sigma_min", "euler_at_final": True}),
    (INVERSE, {"solver_order": 3, "use_karras_sigmas": True}),
    (INVERSE, {"algorithm_type": "dpmsolver", "prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    (INVERSE, {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}),
    (INVERSE, {"prediction_type": "sample", "use_beta_sigmas": True, "thresholding": True, "solver_type": "heun"}),
    (HEUN, {"shift": 3.0}),
    (LCM, {"shift": 3.0, "use_karras_sigmas": True}),
    (LCM, {"invert_sigmas": True}),
    (SCM, {"sigma_data": 0.7}),
    (CM, {"clip_denoised": False, "s_noise": 1.01}),
    (CM, {"sigma_max": 9.0, "num_train_timesteps": 20}),
    *((LTX, {"eta": eta, "s_noise": s_noise}) for eta, s_noise in ((1.0, 1.0), (0.5, 0.9), (0.0, 1.0))),
    (COG, {"prediction_type": "epsilon", "set_alpha_to_one": False}),
    (COG, {"prediction_type": "sample", "snr_shift_scale": 1.0}),
    (COG, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
]


def begin(scheduler: Any, steps: int = 7, device: torch.device | str | None = None) -> list[Tensor]:
    """The timesteps of a run. SCM's end with where the run ends."""
    ends = isinstance(scheduler, diffusers.SCMScheduler)
    scheduler.set_timesteps(steps, device=device, **({"intermediate_timesteps": None} if ends else {}))
    return list(scheduler.timesteps)[: -1 if ends else None]


def begun(name: str, steps: int = 7, **config: Any) -> tuple[Any, Any]:
    pair = both(name, **config)
    for s in pair:
        begin(s, steps)
    return pair


def step(scheduler: Any, output: Tensor, t: Any, x: Tensor, seed: int = 5) -> Any:
    """A step; noise is that of the seed."""
    given = {"generator": seeded(seed)} if "generator" in inspect.signature(scheduler.step).parameters else {}
    return scheduler.step(output, t, x, **given)


def grown(scheduler: Any, i: int) -> float:
    """How much larger than x what stock adds up, or its rounding, is."""
    if isinstance(scheduler, diffusers.DPMSolverMultistepInverseScheduler):
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas)
        return float(max(sigma[i + 1] / sigma[i], alpha[i + 1] / alpha[i], 1 / alpha[i]))
    if getattr(scheduler, "dt", None) is not None:  # stock divides its rounding of x_0 by sigma
        return max(1.0, float(-scheduler.dt) / 2 / float(scheduler.sigmas[i]))
    return 1.0


def error(got: Tensor, want: Tensor, size: float) -> float:
    assert got.dtype == want.dtype and got.shape == want.shape and bool(want.isfinite().all())
    return float((got - want).abs().max()) / max(1.0, size, float(want.abs().max()))


@pytest.mark.parametrize(("name", "config"), CASES)
def test_steps(name: str, config: dict[str, Any]) -> None:
    """Equal results, generators and counts from equal states, in runs of many steps, few, and one."""
    for steps in (20, 7, 1):
        stock, ours = begun(name, steps, **config)
        inputs, generators = seeded(1), [seeded(2), seeded(2)]
        draws = "generator" in inspect.signature(stock.step).parameters
        x = torch.randn(SHAPE, generator=inputs) * getattr(stock, "init_noise_sigma", 1.0)
        for i, t in enumerate(begin(stock, steps)):
            if name == INVERSE and stock.sigmas[i + 1] == stock.sigmas[i]:
                break  # 0/0 in stock
            output, bound = torch.randn(SHAPE, generator=inputs), grown(stock, i) * float(x.abs().max())
            want, got = (
                s.step(output.clone(), t, x.clone(), **({"generator": g} if draws else {}))
                for s, g in zip((stock, ours), generators, strict=True)
            )
            assert type(got) is type(want) and got.keys() == want.keys()
            assert torch.equal(generators[0].get_state(), generators[1].get_state())
            for key in want:
                assert error(got[key], want[key], bound) <= PARITY, (key, i, steps)
            for state in ("step_index", "lower_order_nums", "dt", "_init_size"):
                assert getattr(ours, state, None) == getattr(stock, state, None)
            if getattr(stock, "prev_derivative", None) is not None:
                # It comes from the difference of two states.
                torch.testing.assert_close(ours.prev_derivative, stock.prev_derivative, rtol=1e-4, atol=1e-4)
            x = want.prev_sample


def test_explicit_sigmas_and_mu() -> None:
    """Dynamic shifting of flow matching, and levels of the user's, two of which are equal."""
    x, output = (torch.randn(SHAPE, generator=seeded(k)) for k in range(2))
    for name, config, given in (
        (LCM, {"use_dynamic_shifting": True}, {"num_inference_steps": 5, "mu": 1.1}),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, {"num_inference_steps": 5, "mu": 1.1}),
        ("UniPCMultistepScheduler", {"use_dynamic_shifting": True, "use_flow_sigmas": True}, {"mu": 1.1}),
        (LTX, {}, {"sigmas": [1.0, 0.99, 0.99, 0.7, 0.3, 0.05, 0.0]}),
    ):
        flow = {"prediction_type": "flow_prediction"} if name.startswith("UniPC") else {}
        pair = both(name, **config, **flow)
        for s in pair:
            s.set_timesteps(**({"num_inference_steps": 5} if flow else {}), **given)
        for t in pair[0].timesteps[:5]:
            if t == pair[0].timesteps[1] == pair[0].timesteps[2] and pair[0].step_index == 2:
                continue
            want, got = (step(s, output, t, x).prev_sample for s in pair)
            assert error(got, want, float(x.abs().max())) <= PARITY, name
            x = want


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types(dtype: torch.dtype) -> None:
    """Results have stock's types, also where the output alone has another. Small ones are rounded less often."""
    bound = 1e-6 if dtype == torch.float64 else 6 * torch.finfo(dtype).eps
    for name in PLAIN:
        for kind in (dtype, torch.float32):
            stock, ours = begun(name)
            x = torch.randn(SHAPE, generator=seeded(3)).to(kind)
            for i, t in enumerate(stock.timesteps[2:4]):
                output = torch.randn(SHAPE, generator=seeded(4)).to(dtype)
                want, got = (step(s, output, t, x) for s in (stock, ours))
                for key in want:
                    size = float(x.abs().max()) * (20 if name == INVERSE else 4)  # stock's rounded x_0 is the larger
                    assert error(got[key], want[key], size) <= bound, (name, key, i)
                x = want.prev_sample.to(kind)


def test_second_halves_are_nearer_to_the_truth() -> None:
    """Stock takes v from a rounded difference, and divides it by sigma."""
    exact, pair = begun(HEUN, 2)[0], begun(HEUN, 2)
    states = [torch.randn(SHAPE, generator=seeded(k)) for k in range(4)]
    for t, x, output in zip(exact.timesteps[:2], states[:2], states[2:], strict=True):
        ends = [s.step(output, t, x).prev_sample for s in pair]
        exact.sigmas = exact.sigmas.double()
        want = exact.step(output.double(), t, x).prev_sample
    errors = [float((end - want).abs().max()) for end in ends]
    assert errors[1] <= 1e-6 < errors[0]


@pytest.mark.parametrize("name", PLAIN)
def test_what_stock_does_with_the_rest(name: str) -> None:
    """Shapes that broadcast have stock's bits; errors are stock's."""
    x, output = (torch.randn(SHAPE, generator=seeded(k)) for k in range(2))
    for a, b in ((x, output[:1]), (x[:1], output)):
        want, got = (step(s, b, s.timesteps[2], a) for s in begun(name))
        assert all(torch.equal(got[k], want[k]) for k in want)
    for s in both(name):
        if name not in (HEUN, LCM, LTX, CM):
            with pytest.raises(ValueError, match="Number of inference steps is 'None'"):
                step(s, output, 1, x)
            begin(s)
            s.register_to_config(prediction_type="noise")
            with pytest.raises(ValueError, match="noise"):
                step(s, output, s.timesteps[0], x)
        elif name != LTX:
            begin(s)
            with pytest.raises(ValueError, match="Passing integer indices"):
                step(s, output, 3, x)
            s.set_begin_index(len(s.sigmas))
            with pytest.raises(IndexError):
                step(s, output, s.timesteps[0], x)
    if name == EDM:
        for s in begun(EDM, solver_order=3, **SDE):
            with pytest.raises(UnboundLocalError):  # it has no third order of it
                for t in s.timesteps[:3]:
                    step(s, output, t, x)


def test_what_is_left_to_stock_is_said() -> None:
    """Churning of Heun's rule, in either half, and sizes that grow."""
    x, output = (torch.randn(SHAPE, generator=seeded(k)) for k in range(2))
    for churned in ((True, False), (False, True)):
        stock, ours = begun(HEUN)
        for t, churn in zip(stock.timesteps, churned, strict=False):
            given = {"s_churn": 3.0} if churn else {}
            want = stock.step(output, t, x, generator=seeded(0), **given).prev_sample
            if churn:
                with pytest.warns(UserWarning, match="s_churn: the step of diffusers runs"):
                    got = ours.step(output, t, x, generator=seeded(0), **given).prev_sample
            else:
                got = ours.step(output, t, x, generator=seeded(0)).prev_sample
            assert error(got, want, 4.0) <= PARITY
    stock, ours = begun(LCM, scale_factors=[0.5] * 6, upscale_mode="nearest")
    with pytest.warns(UserWarning, match="scale_factors: the step of diffusers runs"):
        got = step(ours, output, ours.timesteps[0], x)[0]
    assert got.shape == (2, 3, 2, 2) and torch.equal(got, step(stock, output, stock.timesteps[0], x)[0])


@pytest.mark.parametrize("name", [EDM, INVERSE, HEUN, LCM, COG, CM])
def test_noising(name: str) -> None:
    """By timestep, at the begin index, and at the step of a pipeline."""
    stock, ours = begun(name)
    x, noise = (torch.randn(SHAPE, generator=seeded(k)) for k in range(2))
    t = stock.timesteps[[3, 5]] if name != HEUN else stock.timesteps[3]
    for begin_index, done in ((None, None), (4, None), (4, 6)) if name != INVERSE else ((None, None),):
        for s in (stock, ours):
            s._step_index = done
            if name not in (INVERSE, COG):
                s._begin_index = begin_index
        want, got = (noised(s, x, noise, t) for s in (stock, ours))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        assert getattr(ours, "step_index", None) == getattr(stock, "step_index", None)


class Pipeline:
    def __init__(self, scheduler: Any) -> None:
        self.components = {"scheduler": scheduler}
        self.scheduler = scheduler


def run(scheduler: Any, change: Any = None) -> Tensor:
    """A run in which `change` makes the scheduler another, in the second half of a step of Heun's."""
    x = torch.randn(SHAPE, generator=seeded(3))
    for k, t in enumerate(begin(scheduler, 6)):
        scheduler = change(scheduler) if change is not None and k == 3 else scheduler
        x = step(scheduler, 0.3 * x, t, x, seed=k).prev_sample
    return x


def changed(change: Any) -> Any:
    def instead(scheduler: Any) -> Any:
        pipeline = Pipeline(scheduler)
        assert "scheduler" in change(pipeline)
        return pipeline.scheduler

    return instead


@pytest.mark.parametrize("name", PLAIN)
def test_it_goes_on_as_a_copy_or_as_stock(name: str, tmp_path: Path) -> None:
    """In the middle of a run; and files, configurations and signatures are stock's."""
    stock, ours = (getattr(library, name) for library in (diffusers, fused))
    want = run(stock())
    for start, change in (
        (ours, copy.deepcopy), (stock, changed(fastdiff.accelerate)), (ours, changed(fastdiff.restore))
    ):  # fmt: skip
        torch.testing.assert_close(run(start(), change), want, rtol=1e-5, atol=1e-5)
    mine = ours(num_train_timesteps=30)
    mine.save_pretrained(tmp_path)
    assert stock.from_pretrained(tmp_path).to_json_string() == stock(num_train_timesteps=30).to_json_string()
    back = ours.from_config(stock.from_config(mine.config).config)
    assert type(back) is ours and back.to_json_string() == mine.to_json_string()
    if hasattr(stock, "_compatibles"):
        assert mine.compatibles == stock().compatibles
    for method in ("step", "add_noise", "scale_noise", "set_timesteps", "get_velocity", "set_begin_index"):
        assert hasattr(stock, method) == hasattr(ours, method)
        if hasattr(stock, method):
            theirs, own = (inspect.signature(getattr(c, method)).parameters.values() for c in (stock, ours))
            assert [(p.name, p.default, p.kind) for p in own] == [(p.name, p.default, p.kind) for p in theirs]
    assert {m for m in dir(mine) if m[0] != "_"} - {"fused_noise", "stock"} <= {*dir(stock()), "prev_derivative"}


@pytest.mark.parametrize("name", PLAIN)
def test_changes_are_seen(name: str) -> None:
    """Of what the rows are made of, through .data, and of the configuration in place."""
    pair = begun(name)
    x, output = (torch.randn(SHAPE, generator=seeded(k)) for k in range(2))
    source = {COG: "alphas_cumprod", SCM: "timesteps"}.get(name, "sigmas")
    setting = {**dict.fromkeys((EDM, SCM, CM), ("sigma_data", 0.7)), LTX: ("eta", 0.3), HEUN: None, LCM: None}
    option = setting.get(name, ("prediction_type", "v_prediction"))
    seen = []
    for change in (
        lambda s: None,
        lambda s: getattr(s, source).data.mul_(0.9),
        *([] if option is None else [lambda s: setattr(s.config, *option)]),
    ):
        for s in pair:
            change(s)
            s._step_index, s.dt = 2, None
        want, got = (step(s, output, s.timesteps[2], x)[0] for s in pair)
        assert error(got, want, grown(pair[0], 2) * 4) <= PARITY
        seen.append(got)
    assert not any(torch.equal(a, b) for k, a in enumerate(seen) for b in seen[:k])


@pytest.mark.parametrize("name", PLAIN)
def test_gradients(name: str) -> None:
    grads = []
    for s in begun(name):
        x = start = torch.randn(SHAPE, generator=seeded(3)).requires_grad_()
        for t in s.timesteps[2:4]:
            x = step(s, 0.3 * x, t, x).prev_sample
        grads += torch.autograd.grad(x.square().sum(), start)
    torch.testing.assert_close(grads[1], grads[0], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_a_step_is_one_operation_that_reads_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that would wait for a device, from the second step on, and one launch."""
    ours, calls = begun(name)[1], []
    original = ops.update
    monkeypatch.setattr(ops, "update", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    monkeypatch.setattr(ops, "combine", lambda *args, **kwargs: pytest.fail("a second operation"))
    x = torch.randn(SHAPE, generator=seeded(0))
    with fastdiff.backend("reference"):
        for k, t in enumerate(ours.timesteps[:4]):
            output = 0.3 * x
            if k < 2:
                x = ours.step(output, t, x).prev_sample
            else:
                with NoReads():
                    x = ours.step(output, t, x).prev_sample
    assert len(calls) == 4


@pytest.mark.parametrize("name", [LCM, SCM, LTX, CM])
def test_fused_noise(name: str) -> None:
    """It is z(seed, sample, place) of the stream of reverse noise."""
    x, ends = torch.randn(SHAPE, generator=seeded(0)), []
    for fused_noise in (True, False):
        ours = begun(name)[1]
        ours.fused_noise = fused_noise
        if not fused_noise:
            z = ops.normal(x.shape, 7, step=2, stream=ops.REVERSE)
            ours._noise = lambda *args, z=z: {"noise": z}
        ends.append(step(ours, 0.3 * x, ours.timesteps[2], x, seed=7).prev_sample)
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)


def begun_on_device(name: str, device: torch.device | str, backend: str) -> tuple[Any, Tensor]:
    """(scheduler, state) after two steps, as in a pipeline."""
    ours = getattr(fused, name)()
    begin(ours, 7, device)
    if hasattr(ours, "set_begin_index"):
        ours.set_begin_index(0)
    x = torch.randn(SHAPE, generator=seeded(3)).to(device)
    with fastdiff.backend(backend):
        for k, t in enumerate(ours.timesteps[:2]):
            x = step(ours, 0.3 * x, t, x, seed=k).prev_sample
    return ours, x


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@pytest.mark.parametrize("name", PLAIN)
def test_kernels(name: str, backend: str) -> None:
    """On a GPU where there is one, against plain PyTorch on the CPU."""
    want, got = begun_on_device(name, "cpu", "reference")[1], begun_on_device(name, DEVICE, backend)[1]
    torch.testing.assert_close(got.cpu(), want, rtol=2e-6, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PLAIN)
def test_no_wait_for_a_gpu(name: str) -> None:
    ours, x = begun_on_device(name, DEVICE, "triton")
    with fastdiff.backend("triton"):
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours.step(x, ours.timesteps[2], x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_noise_without_a_generator_is_stocks() -> None:
    """Also for a sample that lies in memory in another order, or is part of another."""
    plain = torch.zeros(2, 3, 4, 4)
    for like in (plain, plain.to(memory_format=torch.channels_last), plain[..., ::2], plain.double()):
        torch.manual_seed(3)
        want = torch.randn(like.shape, dtype=like.dtype)
        torch.manual_seed(3)
        assert torch.equal(drawn(like, None), want)


@pytest.mark.slow
def test_no_graph_break() -> None:
    """LTX reads on the host whether a step draws; not under the compiler."""
    ours = begun(LTX)[1]
    ours.set_begin_index(0)
    x = torch.randn(SHAPE, generator=seeded(0))
    ours.step(x, ours.timesteps[0], x)
    explained = torch._dynamo.explain(ours.step)(x, ours.timesteps[1], x)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons


# --- CogVideoX's form of DPM, whose step is given the prediction before ------------------------------------------


COG_DPM: list[dict[str, Any]] = [
    {"prediction_type": "epsilon", "set_alpha_to_one": False},
    {"prediction_type": "sample", "snr_shift_scale": 1.0},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
]


def cog(scheduler: Any, steps: int, dtype: torch.dtype = torch.float32, change: Any = None) -> list[Tensor]:
    """The states and predictions of a run, and what its generator draws next."""
    scheduler.set_timesteps(steps)
    generator, inputs = seeded(2), seeded(1)
    x, old, before, results = torch.randn(SHAPE, generator=inputs).to(dtype), None, None, []
    for k, t in enumerate(scheduler.timesteps):
        scheduler = change(scheduler) if change is not None and k == 3 else scheduler
        output = torch.randn(SHAPE, generator=inputs).to(dtype)
        x, old = scheduler.step(output, old, t, before, x, generator=generator)
        before = t
        results += [x, old]
    return [*results, torch.randn(3, generator=generator)]


@pytest.mark.parametrize("config", COG_DPM)
def test_cogvideox_dpm(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs from the same noise, also with a change within; each step is at most two launches."""
    stock, ours = diffusers.CogVideoXDPMScheduler, fused.CogVideoXDPMScheduler
    for steps in (20, 7, 1):
        pairs = zip(cog(ours(**config), steps), cog(stock(**config), steps), strict=True)
        assert max(error(got, want, 4.0) for got, want in pairs) <= 4 * PARITY
    for dtype, bound in ((torch.bfloat16, 0.05), (torch.float64, 1e-5)):  # float64 has float32's rows
        pairs = zip(cog(ours(**config), 7, dtype), cog(stock(**config), 7, dtype), strict=True)
        assert max(error(got, want, 4.0) for got, want in pairs) <= bound
    want = cog(stock(**config), 7)
    for start, change in (
        (ours, copy.deepcopy), (stock, changed(fastdiff.accelerate)), (ours, changed(fastdiff.restore))
    ):  # fmt: skip
        torch.testing.assert_close(cog(start(**config), 7, change=change), want, rtol=2e-5, atol=2e-5)
    calls, scheduler = [], ours(**config)
    original = ops.update
    monkeypatch.setattr(ops, "update", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    cog(scheduler, 7)
    # The first step, and the last one if it ends at data, is of first order.
    assert len(calls) == 7 + sum(int(t) >= 1000 // 7 for t in scheduler.timesteps[1:])


def test_what_cogvideox_dpm_leaves_to_stock() -> None:
    """Timesteps that are no neighbours of the run, and shapes that broadcast: stock's bits."""
    x, output, old = (torch.randn(SHAPE, generator=seeded(k)) for k in range(3))
    for t, before, prediction in ((3, 1, old), (3, 2, old[:1]), (3, None, None)):
        ends = []
        for s in both("CogVideoXDPMScheduler", 7):
            back = None if before is None else s.timesteps[before]
            given = output if prediction is not None else output[:1]
            ends.append(s.step(given, prediction, s.timesteps[t], back, x, generator=seeded(0)))
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    for s in both("CogVideoXDPMScheduler"):
        with pytest.raises(ValueError, match="Number of inference steps is 'None'"):
            s.step(output, None, 3, None, x)


def test_fused_noise_of_cogvideox_dpm() -> None:
    x, output, old = (torch.randn(SHAPE, generator=seeded(k)) for k in range(3))
    for prediction in (None, old):
        ends = []
        for fused_noise in (True, False):
            ours = both("CogVideoXDPMScheduler", 7)[1]
            ours.fused_noise = fused_noise
            if not fused_noise:
                z = ops.normal(x.shape, 7, step=2, stream=ops.REVERSE)
                ours._noise = lambda *args, z=z: {"noise": z}
            t = ours.timesteps
            ends.append(ours.step(output, prediction, t[2], t[1], x, generator=seeded(7))[0])
        torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)
