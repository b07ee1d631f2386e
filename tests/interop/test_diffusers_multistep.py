"""Multistep schedulers of diffusers, PNDM and DDIM's inversion against stock's, step by step."""

import copy
import inspect
import itertools
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from schedulers import PREDICTIONS, SPACINGS, both, seeded
from strategies import BACKENDS, DEVICE
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.interop import diffusers as fused

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # diffusers with NumPy 2
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # diffusers of its older algorithms
    pytest.mark.filterwarnings("ignore:.*scale_model_input"),  # these states need none
]

SHAPE = (2, 3, 4, 4)
# Relative above 1: some tens of roundings of terms of a few units.
PARITY = 2e-6
DPM, DEIS, UNIPC = "DPMSolverMultistepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler"
PNDM, INVERSE = "PNDMScheduler", "DDIMInverseScheduler"
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
BH1_ON_BETA = {"solver_type": "bh1", "use_beta_sigmas": True, **SIGMA_MIN}
SOLVERS: list[tuple[str, dict[str, Any]]] = [
    *((DPM, {"solver_order": order, "solver_type": kind}) for order in (1, 2, 3) for kind in ("midpoint", "heun")),
    *((DPM, {"algorithm_type": "dpmsolver", "solver_order": order, **SIGMA_MIN}) for order in (1, 2, 3)),
    *((DPM, {"algorithm_type": "sde-dpmsolver++", "solver_order": order}) for order in (1, 2, 3)),
    (DPM, {"algorithm_type": "sde-dpmsolver", "solver_type": "heun", **SIGMA_MIN}),
    (DPM, {"euler_at_final": True, **SIGMA_MIN}),
    *((DEIS, {"solver_order": order}) for order in (1, 2, 3)),
    *((UNIPC, {"solver_order": order, "solver_type": "bh2"}) for order in (1, 2, 3)),
    *((UNIPC, {"solver_order": order, "solver_type": "bh1", **SIGMA_MIN}) for order in (2, 3)),
    (UNIPC, {"predict_x0": False, "disable_corrector": [1, 2], **SIGMA_MIN}),
]
SIGMAS: list[dict[str, Any]] = [
    {},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
]
GRIDS = list(zip(itertools.cycle(SPACINGS), SIGMAS * 3, itertools.cycle((50, 7, 1, 1000, 7)), strict=False))


def target(scheduler: Any, i: int, x: Tensor, x0: Tensor) -> Tensor:
    """What a model that knows x_0 says of x at step i. So every m is of the size of data."""
    alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[i])
    eps = (x - alpha * x0) / sigma
    kinds = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0, "flow_prediction": eps - x0}
    return kinds[scheduler.config.prediction_type]


def close(got: Tensor, want: Tensor, where: Any = None, terms: float = 1.0) -> None:
    """Equal to PARITY, relative above `terms`, the size of what stock adds up."""
    assert got.dtype == want.dtype and got.shape == want.shape
    error = (got - want).abs() / want.abs().clamp(min=max(terms, 1.0))
    assert bool(want.isfinite().all()) and float(error.max()) <= PARITY, (where, float(error.max()))


def walk(stock: Any, ours: Any, places: list[int], elsewhere: bool = False) -> None:
    """Steps from the same states: ours is set to stock's, or gets other tensors, which stock's corrector ignores."""
    inputs, generators = seeded(1), [seeded(2), seeded(2)]
    extra = [{"generator": g} if "DPM" in type(stock).__name__ else {} for g in generators]
    algorithm = stock.config.get("algorithm_type", "" if stock.config.get("predict_x0") else "eps")
    of_noise = algorithm in ("dpmsolver", "sde-dpmsolver", "deis", "eps")
    levels = (1 / stock._sigma_to_alpha_sigma_t(stock.sigmas)[0]).tolist()
    x = mine = None
    for before, i in zip([None, *places], places, strict=False):
        if before is not None and i != before + 1:
            stock._step_index = ours._step_index = i
        if x is None or elsewhere:
            x = torch.randn(SHAPE, generator=inputs)
            mine = x.clone()
        output = target(stock, i, x, torch.randn(SHAPE, generator=inputs).clamp(-2, 2))
        t = stock.timesteps[i]
        want = stock.step(output.clone(), t, x, **extra[0])
        got = ours.step(output.clone(), t, mine, **extra[1])
        assert type(got) is type(want)
        # Solvers of eps subtract from x grown by this much what is nearly that.
        growth = levels[i] / levels[i + 1] if of_noise else 1.0
        close(got.prev_sample, want.prev_sample, (i, stock.config), terms=growth * float(x.abs().max()))
        assert torch.equal(generators[0].get_state(), generators[1].get_state())
        assert (ours.step_index, ours.lower_order_nums) == (stock.step_index, stock.lower_order_nums)
        for a, b in zip(ours.model_outputs, stock.model_outputs, strict=True):
            assert (a is None) == (b is None)
        x, mine = want.prev_sample, got.prev_sample
        mine.copy_(x)  # in place, as UniPC knows it again


def few(n: int) -> list[int]:
    return list(range(n)) if n <= 7 else [*range(4), *range(n // 2, n // 2 + 3), *range(n - 4, n)]


@pytest.mark.slow
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("name", "config"), SOLVERS)
def test_steps(name: str, config: dict[str, Any], prediction: str) -> None:
    """Every solver on four of the grids of spacing, sigmas and number of steps; together they see all."""
    first = 4 * ((SOLVERS.index((name, config)) + PREDICTIONS.index(prediction)) % 3)
    for spacing, sigmas, steps in GRIDS[first : first + 4]:
        settings = {"timestep_spacing": spacing, "prediction_type": prediction, **sigmas, **config}
        if name == UNIPC and spacing == "leading" and steps == 1000:
            steps = 999  # stock divides by the steps and one more
        stock, ours = both(name, steps, **settings)
        n = len(stock.timesteps)
        undefined = name == DPM and "sigma_min" in config.values() and stock.sigmas[-1] == stock.sigmas[-2]
        walk(stock, ours, few(n)[: -1 if undefined else None])  # 0/0 in some of stock's


@pytest.mark.parametrize("config", [{"algorithm_type": "dpmsolver", "solver_order": 3}, {"solver_type": "heun"}])
def test_a_step_to_the_same_level_changes_nothing(config: dict[str, Any]) -> None:
    """Stock divides by its length, 0."""
    stock, ours = both(DPM, 20, use_karras_sigmas=True, **config, **SIGMA_MIN)
    walk(stock, ours, list(range(19)))
    x = torch.randn(SHAPE, generator=seeded(0))
    for s, fine in ((stock, False), (ours, True)):
        ended = s.step(0.5 * x, s.timesteps[-1], x).prev_sample
        assert torch.equal(ended, x) == fine == bool(ended.isfinite().all())


@pytest.mark.parametrize("name", [DPM, DEIS, UNIPC])
def test_flow_and_lu_sigmas(name: str) -> None:
    settings: list[dict[str, Any]] = [
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    ]
    settings += [{"use_lu_lambdas": True}] if name == DPM else []
    # Only stock's DEIS finds eps of v by way of x_0, which differs where alpha^2 + sigma^2 is not 1.
    settings += [] if name == UNIPC else [{"use_flow_sigmas": True, "prediction_type": "v_prediction"}]
    # Stock's DEIS divides by the flow's sigma on every grid.
    settings += [{"prediction_type": "flow_prediction", "thresholding": t} for t in (False, True)]
    for config in settings:
        stock, ours = both(name, 9, **config)
        walk(stock, ours, list(range(9)))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("name", "config"), [(DPM, {"algorithm_type": "dpmsolver", **SIGMA_MIN}), (DEIS, {}), (UNIPC, {"solver_order": 3})]
)
def test_thresholding(name: str, config: dict[str, Any], prediction: str) -> None:
    stock, ours = both(name, 7, thresholding=True, prediction_type=prediction, sample_max_value=1.5, **config)
    walk(stock, ours, list(range(7)))


def test_unipc_bh1_ends_at_data() -> None:
    """Stock multiplies a change of 0 by B = -inf."""
    stock, ours = both(UNIPC, 7, solver_type="bh1")
    walk(stock, ours, list(range(6)))
    x, output = (torch.randn(SHAPE, generator=seeded(k)) for k in range(2))
    want, got = (s.step(output, s.timesteps[-1], x).prev_sample for s in (stock, ours))
    assert bool(want.isnan().all()) and bool(got.isfinite().all())
    close(got, ours.model_outputs[-1])  # x_0 is the end


def test_unipc_given_other_samples() -> None:
    """Stock corrects the state that it returned, whatever sample it is given: by a mask, a callback or a copy."""
    for order, steps in itertools.product((1, 2, 3), (7, 50)):
        stock, ours = both(UNIPC, steps, solver_order=order)
        walk(stock, ours, list(range(6)), elsewhere=True)
        close(ours.last_sample, stock.last_sample)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", [DPM, DEIS, UNIPC])
def test_outputs_of_another_type(name: str, kind: torch.dtype) -> None:
    """Results have the type that stock's have. Stock's bfloat16 is rounded more often."""
    x, output = (torch.randn(SHAPE, generator=seeded(k)) for k in range(2))
    pair = both(name, 7, solver_order=3)
    bound = 2 * torch.finfo(kind).eps if kind == torch.bfloat16 else PARITY
    count = 1 if (name, kind) == (UNIPC, torch.float64) else 4  # stock's second order refuses it
    for t in pair[0].timesteps[:count]:
        want, got = (s.step(output.to(kind), t, x).prev_sample for s in pair)
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=bound, atol=bound)
        x = want.to(x.dtype)


def test_settings_that_stock_refuses() -> None:
    """Also if they come after the constructor, which looks at them."""
    x = torch.randn(SHAPE, generator=seeded(0))
    for s in both(UNIPC, 7):
        s.register_to_config(solver_type="heun")
        with pytest.raises(NotImplementedError):
            s.step(x, s.timesteps[0], x)
            s.step(x, s.timesteps[1], x)


def test_variance_of_the_solver() -> None:
    """A learned variance is left out; given noise is taken; a list of generators draws sample by sample."""
    x, output = torch.randn(SHAPE, generator=seeded(0)), torch.randn(2, 6, 4, 4, generator=seeded(1))
    for config, extra in (
        ({"variance_type": "learned_range"}, {}),
        ({"algorithm_type": "sde-dpmsolver++"}, {"variance_noise": x.flip(0)}),
        ({"algorithm_type": "sde-dpmsolver++"}, {"generator": [4, 5]}),
    ):
        pred = output if "variance_type" in config else output[:, :3]
        results = []
        for s in both(DPM, 7, **config):
            given = {k: [seeded(i) for i in v] if k == "generator" else v for k, v in extra.items()}
            results.append(s.step(pred, s.timesteps[3], x, **given).prev_sample)
        close(results[1], results[0])


@pytest.mark.parametrize("name", [DPM, DEIS, UNIPC])
def test_one_operation_a_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the model a step is one launch, after the first; nothing is copied in or out of what it remembers."""
    _, ours = both(name, 7, solver_order=3)
    calls = []
    original = ops.update
    monkeypatch.setattr(ops, "update", lambda *args, **kwargs: calls.append(kwargs) or original(*args, **kwargs))
    monkeypatch.setattr(ops, "combine", lambda *args, **kwargs: pytest.fail("a second operation"))
    x, rings = torch.randn(SHAPE, generator=seeded(0)), set()
    for t in ours.timesteps:
        x = ours.step(0.3 * x, t, x).prev_sample
        rings.add(ours._ring.data_ptr())
    assert len(calls) == 7 and len(rings) == 1


def test_one_operation_a_step_of_pndm(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = both(PNDM, 7, skip_prk_steps=True)
    calls = []
    original = ops.update
    monkeypatch.setattr(ops, "update", lambda *args, **kwargs: calls.append(kwargs) or original(*args, **kwargs))
    x, rings = torch.randn(SHAPE, generator=seeded(0)), set()
    for t in ours.timesteps:
        x = ours.step(0.3 * x, t, x).prev_sample
        rings.add(ours._ring.data_ptr())
    assert len(calls) == 8 and len(rings) == 1


# --- PNDM and DDIM's inversion ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("skip", [True, False])
def test_pndm_steps(skip: bool, prediction: str) -> None:
    for spacing, steps, one in itertools.product(SPACINGS, (1000, 50, 7, 1), (False, True)):
        if steps == 1 and not skip:
            continue  # stock's set_timesteps fails
        settings = {"prediction_type": prediction, "timestep_spacing": spacing, "set_alpha_to_one": one}
        stock, ours = both(PNDM, steps, skip_prk_steps=skip, **settings)
        inputs = seeded(1)
        for t in [*stock.timesteps[:14], *stock.timesteps[-2:]] if steps > 1 else stock.timesteps[:1]:
            x, output = (torch.randn(SHAPE, generator=inputs) for _ in range(2))
            want, got = (s.step(output.clone(), t, x.clone()).prev_sample for s in (stock, ours))
            # The step starts from x grown by this much, of which little is left if v is all of it.
            growth = float(stock.alphas_cumprod[t] ** -0.5) if steps == 1 else 1.0
            close(got, want, (settings, int(t)), terms=growth * float(x.abs().max()) if steps == 1 else 1.0)
            assert stock.counter == ours.counter and type(stock.cur_model_output) is type(ours.cur_model_output)
            assert all(torch.equal(a, b) for a, b in zip(stock.ets, ours.ets, strict=True))


def test_pndm_past_the_end_of_one_step_is_stocks_error() -> None:
    x = torch.randn(SHAPE, generator=seeded(0))
    for s in both(PNDM, 1, skip_prk_steps=True):
        s.step(x, s.timesteps[0], x)
        with pytest.raises(IndexError):
            s.step(x, s.timesteps[0], x)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_inversion_steps(prediction: str) -> None:
    grid = itertools.product(("leading", "trailing"), (1000, 50, 7, 1), (True, False), (True, False))
    for spacing, steps, clip, one in grid:
        settings = {"timestep_spacing": spacing, "clip_sample": clip, "set_alpha_to_one": one}
        stock, ours = both(INVERSE, steps, prediction_type=prediction, **settings)
        inputs = seeded(1)
        for t in [*stock.timesteps[:2], *stock.timesteps[-2:]]:
            if prediction == "sample" and one and int(t) < 1000 // steps:
                continue  # stock divides by sigma = 0
            x, output = (torch.randn(SHAPE, generator=inputs) for _ in range(2))
            want, got = (s.step(output, t, x) for s in (stock, ours))
            for key in want:
                close(got[key], want[key], (settings, key, int(t)))
    stock, ours = both(INVERSE, 10, prediction_type=prediction)
    for s in (stock, ours):
        s.register_to_config(num_train_timesteps=500)  # no step starts at a later one
        assert int(s.timesteps[-1]) > 500
    want, got = (s.step(output, stock.timesteps[-1], x).prev_sample for s in (stock, ours))
    close(got, want)


# --- what it remembers --------------------------------------------------------------------------------------------

ALL: list[tuple[str, dict[str, Any]]] = [
    (DPM, {"solver_order": 3}),
    (DEIS, {"solver_order": 3}),
    (UNIPC, {"solver_order": 3}),
    (PNDM, {"skip_prk_steps": True}),
    (PNDM, {"skip_prk_steps": False}),
    (INVERSE, {"clip_sample": False}),
    ("DPMSolverSinglestepScheduler", {"solver_order": 3}),
    ("LMSDiscreteScheduler", {}),
    ("KDPM2DiscreteScheduler", {"num_train_timesteps": 10}),  # stock's constructor walks through all of them
    ("KDPM2AncestralDiscreteScheduler", {"num_train_timesteps": 10}),
    ("IPNDMScheduler", {"trained_betas": torch.linspace(0.9, 0.1, 10).tolist()}),
]


def drawn(scheduler: Any, output: Tensor, t: Any, x: Tensor) -> Tensor:
    """The next state, with noise of the default generator if the step draws."""
    torch.manual_seed(5)
    found: Tensor = scheduler.step(output, t, x).prev_sample
    return found


def images(scheduler: Any, change: Any = None) -> Tensor:
    """A run, in which `change` may make the scheduler another after four steps."""
    scheduler.set_timesteps(9)
    x = torch.randn(SHAPE, generator=seeded(3))
    for k, t in enumerate(scheduler.timesteps):
        if change is not None and k == 4:
            scheduler = change(scheduler)
        x = drawn(scheduler, 0.3 * x, t, x)
    return x


class Pipeline:
    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.components = {"scheduler": scheduler}


@pytest.mark.parametrize(("name", "config"), ALL)
def test_it_goes_on_as_a_copy_or_as_stock(name: str, config: dict[str, Any]) -> None:
    """In the middle of a run: deepcopy, accelerate, restore, and inference mode."""

    def accelerated(scheduler: Any) -> Any:
        pipeline = Pipeline(scheduler)
        assert "scheduler" in fastdiff.accelerate(pipeline)
        return pipeline.scheduler

    def restored(scheduler: Any) -> Any:
        pipeline = Pipeline(scheduler)
        fastdiff.restore(pipeline)
        assert type(pipeline.scheduler) is getattr(diffusers, name)
        return pipeline.scheduler

    stock, ours = (getattr(library, name) for library in (diffusers, fused))
    want = images(stock(**config))
    for start, change in ((ours, None), (ours, copy.deepcopy), (stock, accelerated), (ours, restored)):
        torch.testing.assert_close(images(start(**config), change), want, rtol=1e-5, atol=1e-5)
    again = ours(**config)
    with torch.inference_mode():
        images(again)
    torch.testing.assert_close(images(again), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "config"), ALL)
def test_gradients_through_steps(name: str, config: dict[str, Any]) -> None:
    grads = []
    for s in both(name, 9, **config):
        x = start = torch.randn(SHAPE, generator=seeded(3)).requires_grad_()
        for t in s.timesteps[:4]:
            x = drawn(s, 0.3 * x, t, x)
        grads += torch.autograd.grad(x.square().sum(), start)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@pytest.mark.parametrize(("name", "config"), ALL)
def test_kernels(name: str, config: dict[str, Any], backend: str) -> None:
    want = getattr(fused, name)(**config)
    got = copy.deepcopy(want)
    x = torch.randn(SHAPE, generator=seeded(3))
    results = []
    for s, kind, device in ((want, "reference", "cpu"), (got, backend, DEVICE)):
        s.set_timesteps(5, device=device)
        y = x.to(device)
        with fastdiff.backend(kind):
            for t in s.timesteps[:4]:
                y = drawn(s, 0.3 * y, t, y)
        results.append(y.cpu())
    torch.testing.assert_close(results[1], results[0], rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("name", [DPM, DEIS, UNIPC, PNDM, "DPMSolverSinglestepScheduler"])
def test_an_overridden_method_is_called(name: str) -> None:
    method = "_get_prev_sample" if name == PNDM else "convert_model_output"
    kind = getattr(fused, name)
    called = []

    def instead(self: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(1)
        return getattr(kind.stock, method)(self, *args, **kwargs)

    config = {"skip_prk_steps": True} if name == PNDM else {}
    torch.testing.assert_close(
        images(type(name, (kind,), {method: instead})(**config)), images(kind.stock(**config)), rtol=0, atol=0
    )
    assert len(called) == (10 if name == PNDM else 9)


def test_what_is_not_fused_is_said_once(recwarn: pytest.WarningsRecorder) -> None:
    for _ in range(2):
        images(fused.UniPCMultistepScheduler(solver_p=diffusers.DPMSolverMultistepScheduler()))
        images(fused.UniPCMultistepScheduler(solver_order=4))
        images(fused.UniPCMultistepScheduler(**BH1_ON_BETA))
    said = [str(w.message) for w in recwarn if "stock's step runs" in str(w.message)]
    assert len(said) == len(set(said)) <= 3


def test_bh1_on_beta_sigmas_has_the_bits_of_stock() -> None:
    ours, stock = (images(library.UniPCMultistepScheduler(**BH1_ON_BETA)) for library in (fused, diffusers))
    torch.testing.assert_close(ours, stock, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "config"), ALL)
def test_files_and_signatures(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    """What ours saves is stock's file; methods have stock's signatures; nothing is added to what users call."""
    stock, ours = both(name, **{**config, "num_train_timesteps": 13})
    ours.save_pretrained(tmp_path)
    back = getattr(diffusers, name).from_pretrained(tmp_path)
    assert type(back) is type(stock) and back.to_json_string() == stock.to_json_string()
    assert type(type(ours).from_pretrained(tmp_path, fused_noise=True)) is type(ours)
    for method in ("step", "step_plms", "step_prk", "add_noise", "set_timesteps"):
        assert hasattr(stock, method) == hasattr(ours, method)
        if hasattr(stock, method):
            want, got = (inspect.signature(getattr(s, method)).parameters.values() for s in (stock, ours))
            assert [(p.name, p.default, p.kind) for p in got] == [(p.name, p.default, p.kind) for p in want]
    public = {m for m in dir(ours) if not m.startswith("_")} - {"fused_noise", "stock"}
    assert public <= {m for m in dir(stock) if not m.startswith("_")} | {"last_sample"}


@pytest.mark.parametrize("name", [DPM, DEIS, UNIPC, PNDM])
def test_noising(name: str) -> None:
    x, noise = (torch.randn(SHAPE, generator=seeded(k)) for k in range(2))
    stock, ours = both(name, 10)
    for t in (stock.timesteps[[3, 4]], stock.timesteps[:1]):
        close(ours.add_noise(x, noise, t), stock.add_noise(x, noise, t))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("name", "config"), ALL)
def test_types(name: str, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Results have stock's type. Low ones are no further from float64's than stock's; float64 has float32's rows."""
    ends = []
    exact = getattr(diffusers, name)(**config)
    exact.set_timesteps(9)
    for s, kind in zip((*both(name, 9, **config), exact), (dtype, dtype, torch.float64), strict=True):
        x = torch.randn(SHAPE, generator=seeded(3)).to(dtype).to(kind)
        for t in s.timesteps[:4]:
            x = drawn(s, (0.3 * x).to(kind), t, x)
        assert x.dtype == kind
        ends.append(x.double())
    want, got, right = ends
    if dtype == torch.float64:
        close(got, want)
    else:
        assert float((got - right).abs().max()) <= 1.5 * float((want - right).abs().max())
