"""Guidance beyond one number: a weight of each step, rules, and another network."""

import itertools
import math
from collections import deque

import pytest
import torch
from strategies import BACKENDS, DEVICE
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from fastdiff import DDPM, FlowMatching, ScoreSDE, guidance
from fastdiff.guidance import Projected, Rescaled, Thresholded, ZeroStar
from fastdiff.rows import WIDTH, Row, columns

SHAPE = (3, 2, 5)
pytestmark = pytest.mark.filterwarnings("ignore:schedule. alpha_bar_T")


class Curved(nn.Module):
    """Float64; not affine in x."""

    def __init__(self, gain: float = 0.8):
        super().__init__()
        self.gain, self.calls = nn.Parameter(torch.tensor(gain, dtype=torch.float64)), 0

    def forward(self, x: Tensor, c: Tensor, y: Tensor | float = 0.0) -> Tensor:
        self.calls += 1
        y = y.view(-1, 1, 1) if isinstance(y, Tensor) else y
        return self.gain * torch.tanh(x + 0.3 + y) + 0.01 * c.to(x.dtype).view(-1, 1, 1)


class Combined(nn.Module):
    """Both predictions, made one by a plain function of x, cond, uncond and the level."""

    def __init__(self, model: nn.Module, combine, cond: Tensor, uncond: Tensor):
        super().__init__()
        self.model, self.combine, self.cond, self.uncond = model, combine, cond, uncond

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        cond, uncond = self.model(x, c, y=self.cond), self.model(x, c, y=self.uncond)
        return torch.stack([self.combine(*one) for one in zip(x, cond, uncond, c, strict=True)])


COND, UNCOND = torch.tensor([1.0, -2.0, 0.5]), torch.zeros(3)
BRANCHES = {"y": COND, "uncond": {"y": UNCOND}}


def chain(model: nn.Module) -> DDPM:
    return DDPM(model, "linear", 20, "v", clip=None)


@pytest.mark.parametrize("sampler", ["ddpm", "unipc", "heun", "dpm++sde"])
def test_a_weight_of_each_step(sampler):
    """As many numbers as rows, or a function of the row and the level: outside of an interval the condition alone."""
    diffusion = chain(Curved())
    how = {"sampler": sampler, "steps": 5, "seed": 1}
    levels = diffusion.step_table(sampler, 5).levels[:-1].tolist()
    numbers = [3.0 if 5 < level < 18 else 1.0 for level in levels]
    assert {1.0, 3.0} == set(numbers)
    asked = []

    def weight(k: int, level: float) -> float:
        asked.append((k, level))
        return numbers[k]

    want = diffusion.sample(SHAPE, guidance=numbers, **BRANCHES, **how)
    assert torch.equal(diffusion.sample(SHAPE, guidance=weight, **BRANCHES, **how), want)
    assert asked == list(enumerate(levels))
    same = diffusion.sample(SHAPE, guidance=[3.0] * len(levels), **BRANCHES, **how)
    assert torch.equal(same, diffusion.sample(SHAPE, guidance=3.0, **BRANCHES, **how))
    assert not torch.allclose(same, want)
    with torch.device("meta"):  # nothing follows the default device
        assert torch.equal(diffusion.sample(SHAPE, guidance=numbers, **BRANCHES, **how), want)


def test_a_step_of_the_list_is_guided_by_its_number():
    diffusion = chain(Curved())
    path = diffusion.sample(
        SHAPE, guidance=[2.0, -1.0, 0.0], steps=3, sampler="ddim", seed=1, return_trajectory=True, **BRANCHES
    )
    levels = diffusion.step_table("ddim", 3).levels.tolist()
    for k, w in enumerate((2.0, -1.0, 0.0)):
        alone = diffusion.sample(SHAPE, x_T=path[k], steps=levels[k : k + 2], sampler="ddim", guidance=w, **BRANCHES)
        torch.testing.assert_close(alone, path[k + 1], rtol=1e-12, atol=1e-12)


def rescaled(w: float, share: float):
    def combine(x: Tensor, cond: Tensor, uncond: Tensor, c: Tensor) -> Tensor:
        p = uncond + w * (cond - uncond)
        return share * p * (cond.std() / p.std()) + (1 - share) * p

    return combine


def zero_star(w: float):
    def combine(x: Tensor, cond: Tensor, uncond: Tensor, c: Tensor) -> Tensor:
        s = (cond * uncond).sum() / (uncond**2).sum()
        return (1 - w) * s * uncond + w * cond

    return combine


def projected(w: float, parallel: float, radius: float, momentum: float = 0.0):
    """In estimates of x_0, as published: x_0 = alpha x - sigma v. The samples come in turn, step after step."""
    made, before = chain(nn.Identity()).schedule, deque([torch.zeros(())] * len(COND))

    def combine(x: Tensor, cond: Tensor, uncond: Tensor, c: Tensor) -> Tensor:
        alpha, sigma = made.alpha[int(c) + 1], made.sigma[int(c) + 1]
        x0, other = alpha * x - sigma * cond, alpha * x - sigma * uncond
        d = x0 - other + momentum * before.popleft()
        before.append(d)
        d = d * min(1.0, radius / float(d.norm()))
        unit = x0 / x0.norm()
        along = (d * unit).sum() * unit
        x0 = x0 + (w - 1) * (d - along + parallel * along)
        return (alpha * x - x0) / sigma

    return combine


@pytest.mark.parametrize("w", [4.0, 1.0, 0.0, -1.5])
@pytest.mark.parametrize("sampler", ["ddpm", "dpm++2m", "unipc"])
@pytest.mark.parametrize(
    ("rule", "combine"),
    [
        (Rescaled(0.7), lambda w: rescaled(w, 0.7)),
        (Rescaled(0.0), lambda w: rescaled(w, 0.0)),
        (ZeroStar(), zero_star),
        (Projected(), lambda w: projected(w, 0.0, math.inf)),
        (Projected(0.3, 0.05), lambda w: projected(w, 0.3, 0.05)),
        (Projected(0.3, 0.05, -0.75), lambda w: projected(w, 0.3, 0.05, -0.75)),
    ],
    ids=["rescaled", "not rescaled", "zero star", "projected", "projected, bounded", "projected, momentum"],
)
def test_a_rule_is_its_formula(rule, combine, sampler, w):
    model = Curved()
    how = {"sampler": sampler, "steps": 5, "seed": 3}
    want = chain(Combined(model, combine(w), COND, UNCOND)).sample(SHAPE, **how)
    got = chain(model).sample(SHAPE, guidance=w, guidance_rule=rule, **BRANCHES, **how)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++2m", "heun", "unipc"])
def test_a_zero_start_is_a_velocity_of_0(sampler):
    """In the first two rows, for samplers that remember too."""
    model, calls = Curved(), itertools.count()

    class Standing(Combined):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return torch.zeros_like(x) if next(calls) < 2 else super().forward(x, c)

    how = {"sampler": sampler, "steps": 5, "seed": 3, "return_trajectory": True}
    want = FlowMatching(Standing(model, zero_star(2.0), COND, UNCOND)).sample(SHAPE, **how)
    got = FlowMatching(model).sample(SHAPE, guidance=2.0, guidance_rule=ZeroStar(2), **BRANCHES, **how)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
    if sampler == "ddim":
        torch.testing.assert_close(got[2], got[0], rtol=1e-12, atol=1e-12)
    if sampler == "heun":  # a row that adds noise comes first
        grid = FlowMatching(model).process.karras(4, churn=2)
        how = {"sampler": sampler, "steps": grid, "seed": 3, "return_trajectory": True}
        path = FlowMatching(model).sample(SHAPE, guidance=2.0, guidance_rule=ZeroStar(2), **BRANCHES, **how)
        torch.testing.assert_close(path[2], path[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", [Thresholded(0.7), Projected(0.2, 0.5, -0.5)], ids=str)
@pytest.mark.parametrize("sampler", ["euler_maruyama", "probability_flow"])
def test_a_rule_changes_the_estimate_of_samplers_along_the_score(sampler, rule):
    """As through x0hat, where a clip that changes nothing leads; a callback that is told x0hat changes nothing."""
    model = Curved()
    how = {"sampler": sampler, "steps": [0.9, 0.5, 0.2, 0.0], "seed": 3, "guidance": 4.0, **BRANCHES}
    got = ScoreSDE(model, "vp", "v").sample(SHAPE, guidance_rule=rule, **how)
    through_x0 = ScoreSDE(model, "vp", "v", clip=1e6).sample(SHAPE, guidance_rule=rule, **how)
    torch.testing.assert_close(got, through_x0, rtol=1e-9, atol=1e-9)
    told = ScoreSDE(model, "vp", "v").sample(SHAPE, guidance_rule=rule, callback=lambda k, level, x, x0hat: None, **how)
    assert torch.equal(told, got)


def test_rules_of_nothing_are_finite():
    """Predictions of 0; samples of one element, of no dimension, and none."""

    class Nothing(nn.Module):
        def forward(self, x: Tensor, c: Tensor, y: float) -> Tensor:
            return 0 * x

    model = DDPM(Nothing(), "linear", 5, "eps")
    for rule in (Rescaled(), ZeroStar(), Projected(radius=1.0)):
        for shape in ((2, 1, 1), (2,), (0,), (0, 3)):
            got = model.sample(shape, guidance=2.0, guidance_rule=rule, y=1.0, uncond={"y": 1.0})
            assert got.shape == shape and got.isfinite().all()


@pytest.mark.parametrize("rule", [None, ZeroStar()])
@pytest.mark.parametrize("y", [None, COND])
def test_another_network_is_the_other_branch(rule, y):
    model, weak = Curved(), Curved(0.3)
    given = {} if y is None else {"y": y}
    combine = zero_star(2.5) if rule else (lambda x, cond, uncond, c: uncond + 2.5 * (cond - uncond))

    class Both(nn.Module):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            one, other = model(x, c, **given), weak(x, c, **given)
            return torch.stack([combine(*parts) for parts in zip(x, one, other, c, strict=True)])

    want = ScoreSDE(Both(), "vp", "eps").double().sample(SHAPE, steps=4, seed=2, device="cpu", dtype=None)
    diffusion = ScoreSDE(model, "vp", "eps")
    model.calls = weak.calls = 0
    weak.train()
    got = diffusion.sample(SHAPE, guidance=2.5, guidance_rule=rule, uncond=weak, steps=4, seed=2, **given)
    torch.testing.assert_close(got, want.to(got), rtol=1e-5, atol=1e-5)
    rows = len(diffusion.step_table(diffusion.default_sampler, 4))
    assert model.calls == weak.calls == rows and weak.training
    assert [name for name, _ in diffusion.named_modules()] == ["", "model"]  # it is not a part of the model


@pytest.mark.parametrize("uncond", ["arguments", "network"])
def test_arguments_in_dicts_and_lists_have_two_branches(uncond):
    """As those of SDXL and ControlNets are given; what is equal in both branches is stacked too."""

    class Nested(Curved):
        def forward(self, x: Tensor, c: Tensor, added: dict, parts: list) -> Tensor:
            assert added["kind"] == "text" and len(added["y"]) == len(parts[0]) == len(x)
            return super().forward(x, c, added["y"]) + parts[0]

    def given(y: Tensor) -> dict:
        return {"added": {"y": y, "kind": "text"}, "parts": [COND.view(-1, 1, 1)]}

    diffusion, how = chain(Nested()), {"steps": 3, "seed": 1, "guidance": 3.0}
    if uncond == "arguments":
        got = diffusion.sample(SHAPE, uncond=given(UNCOND), **given(COND), **how)
        diffusion.model.forward = lambda x, c, y, part: Curved.forward(diffusion.model, x, c, y) + part.view(-1, 1, 1)
        plain = {"part": COND, "uncond": {"y": UNCOND, "part": COND}}
        assert torch.equal(got, diffusion.sample(SHAPE, y=COND, **plain, **how))
    else:
        got = diffusion.sample(SHAPE, uncond=diffusion.model, **given(COND), **how)
        torch.testing.assert_close(got, diffusion.sample(SHAPE, steps=3, seed=1, **given(COND)))
    with pytest.raises(ValueError, match="uncond: expected added to be tensors of 3 samples, or the same"):
        chain(Nested()).sample(SHAPE, uncond={**given(UNCOND), "added": {"y": COND[:1]}}, **given(COND), **how)


def operands(w: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Row]:
    """x, cond and uncond with gradients, and a row of a step through x0hat."""
    generator = torch.Generator().manual_seed(1)
    tensors = (torch.randn(SHAPE, generator=generator).to(DEVICE, dtype).requires_grad_() for _ in range(3))
    numbers = torch.zeros(1, WIDTH, dtype=dtype, device=DEVICE)
    columns(numbers).x0_from_x[:], columns(numbers).x0_from_pred[:], columns(numbers).guidance[:] = 0.8, -0.6, w
    return *tensors, Row(*(c.reshape(1, 1, 1) for c in columns(numbers)))


class Passes(TorchDispatchMode):
    """The operations that read something of the size of the data, and any that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        large = any(isinstance(a, Tensor) and a.numel() == math.prod(SHAPE) for a in args)
        if (large and not func.is_view) or "local_scalar" in func.name():
            self.seen.append(func.name().partition("::")[2].partition(".")[0])
        return result


@pytest.mark.parametrize(
    ("rule", "passes"),
    [
        (Rescaled(), "lerp inner mul"),
        (ZeroStar(), "inner mul lerp"),
        (Projected(radius=1.0), "mul addcmul sub inner addcmul addcmul"),
    ],
    ids=str,
)
def test_a_rule_reads_the_data_few_times(rule, passes):
    x, cond, uncond, row = operands(3.0)
    with torch.no_grad(), Passes() as mode:
        rule(x, cond, uncond, row)
    assert mode.seen == passes.split()


RULES = (Rescaled(), ZeroStar(), Projected(), Projected(0.3, radius=0.5), Thresholded(0.9))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_rule_has_the_gradient_of_its_formula(rule):
    *tensors, row = operands(3.0)
    assert torch.autograd.gradcheck(lambda *three: rule(*three, row), tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_rule_in_float32_is_that_in_float64(rule, backend):
    """By the kernel, and where a gradient is wanted."""
    results = []
    for dtype in (torch.float64, torch.float32):
        *tensors, row = operands(3.0, dtype)
        with fastdiff.backend(backend):
            with torch.no_grad():
                plain = rule(*tensors, row)
            pred = rule(*tensors, row)
        results.append((plain, pred.detach(), *torch.autograd.grad(pred.square().sum(), tensors[1:])))
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_gradients_are_finite_where_predictions_are_equal_constant_or_nothing(rule):
    ramp = torch.arange(6.0, device=DEVICE).view(2, 3)
    ones, nothing = torch.ones(2, 1, device=DEVICE), torch.zeros(2, 3, device=DEVICE)
    for three in ([ones] * 3, [nothing] * 3, [ramp, nothing + 1, ramp]):
        leaves = [given.clone().requires_grad_() for given in three]
        row = Row(*(c.reshape(1, 1) for c in operands(2.0, torch.float32)[-1]))
        for grad in torch.autograd.grad(rule(*leaves, row).sum(), leaves, allow_unused=True):  # of x, by some
            assert grad is None or grad.isfinite().all()


def test_equal_rules_are_one_kind():
    assert Rescaled(0.5) == Rescaled(0.5) != Rescaled(0.6) and len({Projected(), Projected(), ZeroStar()}) == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"guidance": [1.0, 2.0]}, "guidance: expected a number for each of 3 steps, got 2 of them"),
        ({"guidance": torch.ones(2)}, "guidance: expected a number for each of 3 steps, got 2 of them"),
        ({"guidance": [1.0, math.nan, 1.0]}, "guidance: expected a finite number, got nan"),
        ({"guidance": lambda k, level: "2"}, "guidance: expected a finite number, got '2'"),
        ({"guidance": "two"}, "guidance: expected a finite number, got 'two'"),
        (
            {"guidance": 2.0, "uncond": nn.Identity(), "dtype": torch.bfloat16},
            "dtype: expected None with another network",
        ),
    ],
)
def test_wrong_guidance(given, said):
    with pytest.raises(ValueError, match=said):
        chain(Curved()).sample(SHAPE, steps=3, **{**BRANCHES, **given})


def test_wrong_networks():
    class Wide(Curved):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return torch.cat((x, x), 1)

    diffusion = chain(Curved())
    with pytest.raises(ValueError, match=r"uncond: expected a network whose output has shape .*, got \(3, 4, 5\)"):
        diffusion.sample(SHAPE, steps=3, guidance=2.0, uncond=Wide())
    with pytest.raises(TypeError, match="uncond: expected a network, got DDPM; give its `model`"):
        diffusion.sample(SHAPE, steps=3, guidance=2.0, uncond=chain(Curved()))


def test_wrong_rules():
    with pytest.raises(ValueError, match="guidance_rule: expected None without guidance"):
        chain(Curved()).sample(SHAPE, steps=3, guidance_rule=ZeroStar())
    for wrong in (3, "Rescaled", Rescaled):
        with pytest.raises(TypeError, match=r"guidance_rule: expected a rule, such as Rescaled\(\), got"):
            chain(Curved()).sample(SHAPE, steps=3, guidance=2.0, guidance_rule=wrong, **BRANCHES)
    with pytest.raises(ValueError, match=r"share: expected a number from 0 to 1, got 1\.5"):
        Rescaled(1.5)
    with pytest.raises(ValueError, match="parallel: expected a number from 0 to 1, got -1"):
        Projected(-1)
    with pytest.raises(ValueError, match=r"radius: expected a number above 0 or None, got 0\.0"):
        Projected(radius=0.0)
    with pytest.raises(ValueError, match=r"momentum: expected a number between -1 and 1, got 1\.0"):
        Projected(momentum=1.0)
    for wrong in (-1, 1.5):
        with pytest.raises(ValueError, match="zero_start: expected an integer of at least 0"):
            ZeroStar(wrong)
    how = {"steps": 3, "guidance": 2.0, "guidance_rule": ZeroStar(1), **BRANCHES}
    with pytest.raises(ValueError, match="zero_start: expected 0 but for FlowMatching, got one with Chain"):
        chain(Curved()).sample(SHAPE, **how)
    with pytest.raises(ValueError, match="zero_start: expected 0 with this sampler"):
        FlowMatching(Curved(), last=0.9).sample(SHAPE, sampler="euler_maruyama", **how)
    assert guidance.Projected is Projected


class Plain(nn.Module):
    """Without a counter, which would be compiled anew at every call."""

    def forward(self, x: Tensor, c: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(x + y.view(-1, 1, 1))


@pytest.mark.slow
def test_rules_compile():
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import

    torch._dynamo.reset()
    plain, compiled = chain(Plain()), chain(Plain())
    counter = CompileCounterWithBackend("aot_eager")
    compiled.compile(backend=counter, fullgraph=True)
    for rule in (Rescaled(0.5), Projected(radius=1.0), Projected(momentum=-0.5)):
        how = {"guidance": [2.0, 1.0, 3.0], "guidance_rule": rule, "steps": 3, "seed": 1, **BRANCHES}
        torch.testing.assert_close(compiled.sample(SHAPE, **how), plain.sample(SHAPE, **how), rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 3  # one of each rule, for all steps


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_thresholding_brings_the_estimate_back(share):
    diffusion = chain(Curved())
    told = []
    how = {"steps": 4, "seed": 1, "guidance": 6.0, **BRANCHES}
    for rule in (None, Thresholded(share)):
        diffusion.sample(
            SHAPE, guidance_rule=rule, callback=lambda k, level, x, x0hat: told.append(x0hat.clone()), **how
        )
    plain, brought = told[0], told[4]
    assert plain.abs().amax() > 2  # at the first step, whose state is the same
    size = plain.flatten(1).abs().sort(1).values
    s = size[:, max(1, math.ceil(share * size.shape[1])) - 1].clamp(min=1)[:, None, None]
    assert torch.allclose(brought, torch.minimum(torch.maximum(plain, -s), s) / s, rtol=1e-9)
    assert all(x0.abs().amax() <= 1 + 1e-9 for x0 in told[4:])
    with pytest.raises(ValueError, match=r"^share: expected a number above 0 and up to 1, got 0$"):
        Thresholded(0)
    x, row = torch.zeros(2, 0), Row(*torch.ones(WIDTH, 1, 1))
    assert Thresholded(share)(x, x, x, row).shape == (2, 0)
