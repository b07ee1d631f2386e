"""The one loop under every sampler: seeds, batches, injected noise, callbacks, memory, compilation and errors."""

import functools
import itertools
import math
from typing import Any

import pytest
import torch
from counting import Allocations
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff import DDPM, NCSN, NoiseSchedule, ScoreSDE, ops, schedule, steps
from fastdiff.diffusion import Diffusion
from fastdiff.process import VE, VP
from fastdiff.steps import SAMPLERS

pytestmark = pytest.mark.filterwarnings("ignore:schedule. alpha_bar_T")
SHAPE = (4, 3, 5)


class Pointwise(nn.Module):
    """Each output depends on its own input alone, in the same arithmetic whatever the batch."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.gain * x - 0.001 * c.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


CHURNED = functools.partial(steps.heun, noise_scale=1.01)


def name_of(value: Any) -> str:
    return value if isinstance(value, str) else "churned"


RUNS: dict[str, Any] = {
    "chain": [name for name in SAMPLERS if name != "annealed_langevin"],
    "vp": [name for name in SAMPLERS if name != "annealed_langevin"],
    "ve": ["ddpm", "heun", "predictor_corrector", CHURNED],
    "ncsn": ["annealed_langevin", "ddpm", "euler_maruyama"],
}
EACH = pytest.mark.parametrize(("kind", "sampler"), [(k, s) for k, many in RUNS.items() for s in many], ids=name_of)


def made(kind: str, model: nn.Module | None = None, objective: str = "eps", clip: float | None = 1.0) -> Diffusion:
    model = Pointwise() if model is None else model
    if kind == "chain":
        return DDPM(model, "linear", 20, objective, clip=clip)
    if kind == "ncsn":
        return NCSN(model, 1.0, 0.1, 3, objective, clip=clip)
    return ScoreSDE(model, VE(0.01, 20.0) if kind == "ve" else VP(), objective, clip=clip)


def options(model: Diffusion, sampler: Any) -> dict[str, Any]:
    if sampler is CHURNED:
        return {"sampler": sampler, "steps": model.process.karras(4, churn=1.0)}
    n = {"ddpm": None, "euler_maruyama": None}.get(sampler, 2) if isinstance(model, NCSN) else 4
    return {"sampler": sampler, "steps": n}


@pytest.mark.slow
@EACH
def test_a_seed_gives_its_samples_in_whatever_batch(kind, sampler):
    model = made(kind)
    how = options(model, sampler)
    whole = model.sample((6, 3, 5), seed=11, **how)
    chosen = [2, 5, 0]
    assert torch.equal(model.sample((3, 3, 5), seed=11, sample_ids=chosen, **how), whole[chosen])
    assert torch.equal(model.sample((2, 3, 5), seed=11, **how), whole[:2])
    assert torch.equal(model.sample((6, 3, 5), seed=torch.tensor(11), **how), whole)
    assert not torch.equal(model.sample((6, 3, 5), seed=12, **how), whole)
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.slow
@EACH
def test_noise_may_be_given(kind, sampler):
    """As a tensor or as a function, and what the seed gives is among them."""
    model = made(kind)
    how = options(model, sampler)
    table = model.step_table(how["sampler"], how["steps"])
    expected = model.sample(SHAPE, seed=3, **how)
    x_T = table.start * ops.normal(SHAPE, 3)
    noise = torch.stack([ops.normal(SHAPE, 3, step=k, stream=ops.REVERSE) for k in range(len(table))])
    before, asked = x_T.clone(), []

    def draw(k: int) -> Tensor:
        asked.append(k)
        return noise[k]

    given = model.sample(SHAPE, x_T=x_T, noise=noise, **how)
    assert torch.equal(given, model.sample(SHAPE, x_T=x_T, noise=draw, **how)) and asked == list(range(len(table)))
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(x_T, before)
    if table.noisy:
        assert not torch.allclose(model.sample(SHAPE, x_T=x_T, noise=-noise, **how), given)
    with pytest.raises(ValueError, match="noise: expected shape"):
        model.sample(SHAPE, noise=noise[:-1], **how)


@EACH
def test_callback_and_trajectory(kind, sampler):
    model, seen = made(kind), []
    how = options(model, sampler)
    table = model.step_table(how["sampler"], how["steps"])
    result = model.sample(SHAPE, seed=1, callback=lambda *args: seen.append((*args[:2], args[2].clone())), **how)
    assert [call[0] for call in seen] == list(range(len(table)))
    assert [call[1] for call in seen] == table.levels[1:].tolist()
    path = model.sample(SHAPE, seed=1, return_trajectory=True, **how)
    assert path.shape == (len(table) + 1, *SHAPE) and torch.equal(path[-1], result)
    torch.testing.assert_close(path[0], table.start * ops.normal(SHAPE, 1))
    for k, call in enumerate(seen):
        assert torch.equal(call[2], path[k + 1])
    assert result.dtype == torch.float32 and not result.requires_grad and not result.is_inference()


def test_adding_noise_asks_no_model():
    calls = []
    model = made("ve")
    model.model.register_forward_hook(lambda *_: calls.append(1))
    how = options(model, CHURNED)
    table = model.step_table(how["sampler"], how["steps"])
    assert table.kinds.count("add") == 4
    model.sample(SHAPE, **how)
    assert len(calls) == len(table) - 4


class Fixed(nn.Module):
    def __init__(self, out: Tensor):
        super().__init__()
        self.out = out

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.out


@pytest.mark.parametrize(
    ("kind", "sampler"),
    [(k, s) for k, many in RUNS.items() for s in many if s != "predictor_corrector"],  # which measures noise and score
    ids=name_of,
)
def test_a_step_allocates_nothing_of_the_size_of_the_data(kind, sampler):
    """But the state, and what the sampler remembers."""
    shape = (4, 3, 64, 64)
    model = made(kind, Fixed(torch.zeros(shape)))
    how = options(model, sampler)
    keep = model.step_table(how["sampler"], how["steps"]).keep
    with Allocations(math.prod(shape)) as allocations:
        model.sample(shape, seed=0, **how)
    assert allocations.made == ["aten.empty.memory_format"] + ([] if keep == "none" else ["aten.zeros_like.default"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "sampler"), [("chain", "dpm++2m"), ("chain", "heun"), ("vp", "heun"), ("vp", "euler_maruyama"),
                          ("ve", CHURNED), ("ncsn", "annealed_langevin"), ("vp", "predictor_corrector"),
                          ("chain", "unipc")],
)  # fmt: skip
def test_compiled_equals_eager_without_recompiling(kind, sampler):
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import

    torch._dynamo.reset()
    model = Pointwise()
    plain, compiled = made(kind, model), made(kind, model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled.compile(backend=counter, fullgraph=True)
    how = options(plain, sampler)
    for seed in range(2):
        got = compiled.sample(SHAPE, seed=seed, return_trajectory=True, **how)
        assert torch.equal(got, plain.sample(SHAPE, seed=seed, return_trajectory=True, **how))
        assert counter.frame_count == 1  # for every step of every run


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vp", "ve", "ncsn"])
def test_compiled_loss_equals_eager(kind):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = Pointwise()
    plain, compiled = made(kind, model, "score"), made(kind, model, "score")
    counter = CompileCounterWithBackend("aot_eager")
    compiled.compile(backend=counter, fullgraph=True)
    x0 = torch.rand(SHAPE)
    for seed in range(3):
        values = []
        for each in (plain, compiled):
            torch.manual_seed(seed)
            values.append(each(x0))
        torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=0)
    assert counter.frame_count == 1


# --- errors, before the model is called or anything drawn -----------------------------------------------------------


class Forbidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, c: Tensor, y: Any = None) -> Tensor:
        raise AssertionError("called")


GAIN = NoiseSchedule.from_log_alpha_bar([0.0, -0.1, -0.1 - 2 * math.log(1.01e5)])
# alpha = 1e-6 at the end
STEEP = NoiseSchedule.from_betas([0.1, 1 - 1e-12])
ENDS = schedule.raised_cosine(10)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "annealed_langevin"])
@pytest.mark.parametrize("objective", ["eps", "score"])
def test_eps_and_score_say_nothing_where_the_signal_is_gone(objective, sampler):
    with pytest.raises(ValueError, match=f"objective: '{objective}' cannot determine x_0 at level 10"):
        DDPM(Forbidden(), ENDS, 10, objective)
    levels = torch.arange(10, -1, -1)
    for clip in (None, 1.0):
        with pytest.raises(ValueError, match=f"objective: '{objective}' cannot determine x_0 at level 10|finite sigma"):
            SAMPLERS[sampler](ENDS, levels, objective, clip)


@pytest.mark.parametrize("objective", ["eps", "score"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++2m", "heun"])
def test_steps_that_lose_x0_are_refused_unclipped(sampler, objective):
    model = DDPM(Forbidden(), GAIN, 2, objective, clip=None)
    with pytest.raises(ValueError, match=f"'{objective}' without clip loses x_0 from level 2 to 1, .*1.01e"):
        model.sample((2, 3), sampler=sampler, steps=[2, 1, 0])
    for fine in (DDPM(Forbidden(), GAIN, 2, objective, clip=1.0), DDPM(Forbidden(), GAIN, 2, "v", clip=None)):
        assert len(fine.step_table(sampler, [2, 1, 0])) >= 2


@pytest.mark.parametrize("objective", ["eps", "score"])
@pytest.mark.parametrize("sampler", ["euler_maruyama", "reverse_diffusion", "predictor_corrector"])
def test_denoising_at_once_from_nothing_is_refused_unclipped(sampler, objective):
    """These samplers use the score as it is, but for the last step, here from alpha = 1e-6."""
    model = DDPM(Forbidden(), STEEP, 2, objective, clip=None)
    with pytest.raises(ValueError, match=f"objective: '{objective}' without clip loses x_0 from level 2 to 0"):
        model.sample((2, 3), sampler=sampler, steps=[2, 0])


@pytest.mark.parametrize("objective", ["x0", "score"])
def test_data_cannot_be_encoded_by_x0_or_score(objective):
    for model in (DDPM(Forbidden(), "linear", 10, objective), NCSN(Forbidden(), objective=objective)):
        with pytest.raises(ValueError, match=f"objective: '{objective}' cannot be inverted from level 0"):
            model.encode(torch.zeros(2, 3))
    model = DDPM(Pointwise(), "linear", 10, objective)
    assert model.encode(torch.zeros(2, 3), steps=[10, 5, 1]).shape == (2, 3)
    assert NCSN(Pointwise(), objective="eps").encode(torch.zeros(2, 3)).shape == (2, 3)


@pytest.mark.parametrize("kind", ["chain", "vp", "ve"])
def test_wrong_eta(kind):
    model = made(kind, Forbidden())
    for eta in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="eta: expected a finite number of at least 0"):
            model.sample((2, 3), sampler="ddim", eta=eta, steps=3)
    with pytest.raises(ValueError, match=r"eta: 1\.5 asks for more noise than a level holds"):
        model.sample((2, 3), sampler="ddim", eta=1.5, steps=3)
    with pytest.raises(ValueError, match=r"eta: expected 0 with sampler 'heun', got 0\.5"):
        model.sample((2, 3), sampler="heun", eta=0.5, steps=3)


@pytest.mark.parametrize("beta", [0.0, -0.1, 1.1, math.nan, math.inf])
def test_wrong_beta(beta):
    with pytest.raises(ValueError, match=r"betas: expected values in \(0, 1\]"):
        DDPM(Forbidden(), [0.1, beta], 2)


@pytest.mark.parametrize("sampler", ["heun", "euler_maruyama", "probability_flow"])
def test_solvers_of_equations_need_a_finite_end(sampler):
    model = DDPM(Forbidden(), ENDS, 10, "v")
    said = f"'{sampler}' expected a finite sigma / alpha, got alpha = 0 at level 10"
    with pytest.raises(ValueError, match="sigma_max: expected a finite number" if sampler == "heun" else said):
        model.sample((2, 3), sampler=sampler)
    with pytest.raises(ValueError, match=said):
        model.sample((2, 3), sampler=sampler, steps=[10, 5, 0])
    below = DDPM(Pointwise(), ENDS, 10, "v").sample((2, 3), sampler=sampler, steps=[9, 5, 1, 0])
    assert below.isfinite().all()
    if sampler == "heun":
        grid = model.process.karras(3, sigma_max=40.0)
        assert DDPM(Pointwise(), ENDS, 10, "v").sample((2, 3), sampler=sampler, steps=grid).isfinite().all()


@pytest.mark.parametrize(
    ("sampler", "said"),
    [
        ("euler", "sampler: expected one of ddpm, .* or a function, got 'euler'"),
        ("annealed_langevin", r"sampler: 'annealed_langevin' expected"),
        (functools.partial(steps.annealed_langevin, eps=0.0), "sampler: 'annealed_langevin' expected|eps: expected"),
        (functools.partial(steps.ancestral, variance="beta~"), "variance: expected one of posterior, beta, learned"),
        (
            functools.partial(steps.ancestral, variance="learned"),
            "variance: expected 'posterior' or 'beta' for a model",
        ),
        (functools.partial(steps.lcm, scaling=math.nan), "scaling: expected a finite number above 0, got nan"),
        (functools.partial(steps.heun, noise_scale=-1.0), "noise_scale: expected a finite number of at least 0"),
        (functools.partial(steps.predictor_corrector, predictor="ddim"), "predictor: expected one of reverse"),
        (functools.partial(steps.predictor_corrector, corrections=0), "corrections: expected an integer of at least 1"),
        (functools.partial(steps.predictor_corrector, corrections=True), "corrections: expected an integer"),
        (functools.partial(steps.predictor_corrector, snr=0.0), "snr: expected a finite number above 0"),
        (functools.partial(steps.euler_maruyama, denoise=False), "steps: expected a step that does not end at level 0"),
    ],
)
def test_wrong_samplers(sampler, said):
    model, state = made("vp", Forbidden()), torch.get_rng_state()
    with pytest.raises(ValueError, match=said):
        model.sample((2, 3), sampler=sampler, steps=[0.5, 0.0])
    with pytest.raises(TypeError, match="sampler: expected a name or a function, got int"):
        model.sample((2, 3), sampler=3)
    with pytest.raises(TypeError, match="sampler: expected a function that returns a StepTable, got int"):
        model.sample((2, 3), sampler=lambda *given: 3, steps=[0.5, 0.0])
    assert torch.equal(torch.get_rng_state(), state)


def test_langevin_dynamics_wants_a_ladder():
    for model in (made("chain", Forbidden()), made("ve", Forbidden())):
        with pytest.raises(ValueError, match=r"sampler: 'annealed_langevin' expected"):
            model.sample((2, 3), sampler="annealed_langevin")
    with pytest.raises(ValueError, match=r"eps: expected a finite number above 0, got 0\.0"):
        made("ncsn", Forbidden()).sample((2, 3), sampler=functools.partial(steps.annealed_langevin, eps=0.0))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"guidance": math.nan, "y": 1, "uncond": {"y": 0}}, "guidance: expected a finite number, got nan"),
        ({"guidance": True, "y": 1, "uncond": {"y": 0}}, "guidance: expected a finite number, got True"),
        ({"guidance": torch.tensor(1.0), "y": 1, "uncond": {"y": 0}}, "guidance: expected a finite number"),
        ({"guidance": 2.0, "y": 1}, r"uncond: expected a dict of the model's arguments \['y'\], got None"),
        ({"guidance": 2.0, "y": 1, "uncond": {"z": 1}}, r"uncond: expected a dict .* \['y'\], got \['z'\]"),
        ({"guidance": 2.0, "uncond": {}}, r"uncond: expected a dict of the model's arguments \[\]"),
        ({"uncond": {"y": 1}, "y": 1}, "uncond: expected None without guidance"),
        ({"guidance": 2.0, "y": "a", "uncond": {"y": "b"}}, "uncond: expected y to be tensors of 2 samples"),
        ({"guidance": 2.0, "y": torch.zeros(2), "uncond": {"y": torch.zeros(2, 1)}}, r"uncond: .* of shape \(2,\)"),
    ],
)
def test_wrong_guidance(given, said):
    model, state = made("vp", Forbidden()), torch.get_rng_state()
    with pytest.raises(ValueError, match=said):
        model.sample((2, 3), steps=2, **given)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_chain_that_keeps_signal_warns(recwarn):
    with pytest.warns(UserWarning, match=r"schedule: alpha_bar_T = 0\.598 of the signal is left at the last level"):
        DDPM(Forbidden(), "proportional", 50)
    recwarn.clear()
    for name in ("linear", "cosine", "sigmoid"):
        DDPM(Forbidden(), name, 1000)
    DDPM(Forbidden(), "raised_cosine", 1000, "v")
    NCSN(Forbidden())
    assert not recwarn


class Beside(TorchDispatchMode):
    """The operations that launch something, but for those of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() not in ("aten::select.int", "aten::split.Tensor", "aten::_local_scalar_dense"):  # views
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("given", [{}, {"guidance": 2.0, "y": 1.0, "uncond": {"y": 0.0}}], ids=["plain", "guided"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_step_is_one_operation_beside_the_model(name, given):
    """With guidance the state is laid twice, for both branches. A corrector, which takes norms, has more."""

    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.out = nn.Parameter(torch.ones(())), {n: torch.zeros(n, 3) for n in (2, 4)}

        def forward(self, x: Tensor, c: Tensor, **_: Any) -> Tensor:
            assert len(c) == len(x)
            return self.out[len(x)]

    model = NCSN(Given(), levels=3) if name == "annealed_langevin" else ScoreSDE(Given(), "vp", "v")
    kinds, ends = model.step_table(name, 3).kinds, []
    with Beside() as mode:
        how = {"sampler": name, "steps": 3, "seed": 0, "callback": lambda *_: ends.append(len(mode.seen))}
        model.sample((2, 3), **how, **given)
    taken = [mode.seen[start:end] for start, end in itertools.pairwise(ends)]
    expected = ["aten::cat"] * bool(given) + ["fastdiff::update_"]
    assert len(taken) > 0
    assert all(step == expected for step, kind in zip(taken, kinds[1:], strict=True) if kind == "predict")
