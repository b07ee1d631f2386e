"""What a model keeps beside its weights survives all that is done to modules: averaging, casting, the meta device,
copies and checkpoints. Options that are set later act as if they had been given at first."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastdiff import DDPM, NCSN, Edm, FlowMatching, ScoreSDE
from fastdiff.bound import LossSecondMoment
from fastdiff.continuous import ContinuousDiffusion
from fastdiff.diffusion import Diffusion
from fastdiff.edm import Preconditioned
from fastdiff.flow import Flow
from fastdiff.process import VE, VP, Chain, Ladder
from fastdiff.schedule import linear

pytestmark = pytest.mark.filterwarnings("ignore:schedule. alpha_bar_T")
SHAPE = (3, 2, 4, 4)


class Net(nn.Module):
    def __init__(self, outputs: int = 2):
        super().__init__()
        self.conv = nn.Conv2d(2, outputs, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv(x) + 1e-3 * t.to(x.dtype).view(-1, 1, 1, 1)


FORMULATIONS = {
    "ddpm": lambda: DDPM(Net(), "cosine", 40, "v", weighting="min_snr"),
    "beta": lambda: DDPM(Net(), "linear", 40, variance="beta", loss="vlb"),
    "learned": lambda: DDPM(Net(4), "linear", 40, variance="learned", loss="hybrid"),
    "ncsn": lambda: NCSN(Net(), levels=12),
    "sde": lambda: ScoreSDE(Net(), "vp"),
    "flow": lambda: FlowMatching(Net(), shift=3.0),
    "edm": lambda: Edm(Net(), 0.7),
}


def x0() -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def answers(model: Diffusion) -> list[Tensor]:
    """All that follows from tables: the loss, noised states, predictions, single steps, samples and the bound."""
    t = torch.tensor([0.2, 0.5, 0.9]) if isinstance(model, ContinuousDiffusion) else torch.tensor([2, 7, 12])
    x = x0()
    got = [model(x, t=t, seed=1), model.q_sample(x, t, seed=1), model.predict_x0(x, t), model.predict(x, t, "score")]
    # Heun's rule from sigma 80 to 0.002 at once would magnify roundings.
    got += [model.sample(SHAPE, steps=2, seed=2, sampler="ddim" if isinstance(model, Edm) else None)]
    if isinstance(model, DDPM):
        got += [model.p_sample(x, t, seed=1), model.q_step(x, t, seed=1), *model.q_posterior(x, x, t)]
        got += [model.bits_per_dim(x, steps=5, seed=1).terms]
    return [v.detach() for v in got]


def trained(model: Diffusion) -> Tensor:
    """The loss at levels that training draws."""
    torch.manual_seed(0)
    return model(x0()).detach()


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(v, w) for v, w in zip(a, b, strict=True))


def averaged(model: Diffusion) -> Diffusion:
    made = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True)
    for _ in range(50):
        made.update_parameters(model)
    return made.module


def averaged_by_hand(model: Diffusion) -> Diffusion:
    """As callbacks do: every tensor of the state, whatever its type."""
    made = copy.deepcopy(model)
    state = made.state_dict()
    for name, value in model.state_dict().items():
        state[name].copy_(state[name] * 0.9 + value * 0.1)
    for buffer, other in zip(made.buffers(), model.buffers(), strict=True):
        buffer.copy_(buffer * 0.9 + other * 0.1)
    return made


def through_meta(model: Diffusion, how: str) -> Diffusion:
    """The model emptied, and its state loaded into it; or built without values from the start."""
    state = model.state_dict()
    if how == "moved":
        made = copy.deepcopy(model).to("meta")
    else:
        alike = (make for make in FORMULATIONS.values() if make().config == model.config)
        with FakeTensorMode() if how == "fake" else torch.device("meta"):
            made = next(alike)()
    if how not in ("assign", "fake"):
        made.to_empty(device="cpu")
    made.load_state_dict(state, assign=how in ("assign", "fake"))
    return made


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "half and back": lambda m: m.half().float(),
    "bfloat16 and back": lambda m: m.to(torch.bfloat16).float(),
    "double and back": lambda m: m.double().float(),
    "to_empty": lambda m: through_meta(m, "to_empty"),
    "moved": lambda m: through_meta(m, "moved"),
    "assign": lambda m: through_meta(m, "assign"),
    "fake": lambda m: through_meta(m, "fake"),
    "averaged": averaged,
    "averaged by hand": averaged_by_hand,
}


@pytest.mark.slow
@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FORMULATIONS)
@pytest.mark.parametrize("used", [False, True])
def test_tables_survive(name, way, used):
    torch.manual_seed(0)
    model = FORMULATIONS[name]()
    weights = {k: v.half().float() for k, v in model.state_dict().items()}  # which every type here holds
    weights = {k: v.bfloat16().float() for k, v in weights.items()}
    model.load_state_dict(weights)
    want = answers(copy.deepcopy(model))
    if used:
        answers(model)
    got = answers(WAYS[way](model))
    if "averaged" in way:  # its weights are rounded
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(got, want, strict=True))
        t = 0.5 if isinstance(model, ContinuousDiffusion) else 7
        assert torch.equal(WAYS[way](model).q_sample(x0(), t, seed=1), model.q_sample(x0(), t, seed=1))
    else:
        assert same(got, want)


@pytest.mark.parametrize("name", FORMULATIONS)
def test_the_meta_device_gives_shapes(name):
    with torch.device("meta"):
        model = FORMULATIONS[name]()
        data = torch.empty(SHAPE)
    t = 0.5 if isinstance(model, ContinuousDiffusion) else 3
    assert model(data).shape == () and model(data, t=t, reduction="none").shape == (3,)
    assert model.q_sample(data, t).shape == model.predict_x0(data, t).shape == SHAPE
    drawn = model.sample(SHAPE, steps=2)
    assert drawn.shape == SHAPE and drawn.device.type == "meta"


@pytest.mark.slow
def test_two_models_do_not_share_a_compiled_table():
    """A graph takes the tables as inputs: another chain, and an option that was set, are seen."""
    torch._dynamo.reset()
    x, t = x0(), torch.tensor([3, 9, 12])

    @torch.compile(backend="eager", fullgraph=True)
    def all_of(model: DDPM, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        single = model.p_sample(x, t, seed=3), model.q_step(x, t, seed=3), *model.q_posterior(x, x, t)
        return *single, model.predict_x0(x, t), model.q_sample(x, t, seed=3)

    def eager(model: DDPM) -> list[Tensor]:
        single = model.p_sample(x, t, seed=3), model.q_step(x, t, seed=3), *model.q_posterior(x, x, t)
        return [*single, model.predict_x0(x, t), model.q_sample(x, t, seed=3)]

    net = Net()
    with torch.no_grad():
        models = [DDPM(net, "linear", 20, "v"), DDPM(net, "cosine", 20, "v")]  # neither has made a table
        for model in (*models, *models):
            for a, b in zip(all_of(model, x, t), eager(model), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        models[0].schedule = "sigmoid"
        for a, b in zip(all_of(models[0], x, t), eager(DDPM(net, "sigmoid", 20, "v")), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# --- the history of importance sampling -------------------------------------------------------------------------------


def told(model: DDPM) -> DDPM:
    torch.manual_seed(0)
    for _ in range(12):
        model.importance.update(torch.arange(1, 9), 300 * torch.rand(8) ** 2)  # squares beyond float16
    return model


HISTORY_WAYS = {k: v for k, v in WAYS.items() if k not in ("to_empty", "moved", "assign", "fake", "averaged by hand")}


@pytest.mark.parametrize("way", HISTORY_WAYS)
def test_the_history_survives(way):
    model = told(DDPM(Net(), timesteps=8, importance=True))
    p, seen = model.importance.probabilities(), model.importance.seen.clone()
    other = HISTORY_WAYS[way](copy.deepcopy(model))
    assert torch.equal(other.importance.probabilities(), p) and torch.equal(other.importance.seen, seen)


def test_the_history_is_loaded_where_it_has_no_values():
    model = told(DDPM(Net(), timesteps=8, importance=True))
    state = model.state_dict()
    assert {"importance.losses", "importance.seen"} < state.keys()
    for without, assign in ((torch.device("meta"), False), (torch.device("meta"), True), (FakeTensorMode(), True)):
        with without:
            empty = DDPM(Net(), timesteps=8, importance=True)
        if not assign:
            empty.to_empty(device="cpu")
        assert empty.importance.seen.sum() == 0
        empty.load_state_dict(state, assign=assign)
        assert torch.equal(empty.importance.probabilities(), model.importance.probabilities())
    for wrong in ({k: v for k, v in state.items() if k != "importance.seen"}, {**state, "importance.more": p0()}):
        with pytest.raises(RuntimeError, match=r"importance\.(seen|more)"):
            empty.load_state_dict(wrong)
    with pytest.raises(RuntimeError, match=r"importance\.losses: expected shape \(8, 10\), got \(9, 10\)"):
        empty.load_state_dict({**state, "importance.losses": torch.zeros(9, 10)})
    assert not list(LossSecondMoment(3).buffers())


def p0() -> Tensor:
    return torch.zeros(1)


# --- options that are set by hand -------------------------------------------------------------------------------------

SETTINGS = [
    ({"objective": "v"}, {"objective": "x0"}),
    ({"objective": "x0"}, {"objective": "score"}),
    ({"weighting": "simple"}, {"weighting": "min_snr"}),
    ({"clip": 1.0}, {"clip": None}),
    ({"variance": "posterior"}, {"variance": "beta"}),
    ({"schedule": "linear"}, {"schedule": "cosine"}),
    ({"loss": "mse"}, {"loss": "l1"}),
    ({"loss": "vlb"}, {"loss": "huber"}),
]


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize(("first", "then"), SETTINGS)
def test_an_option_of_ddpm_that_is_set_is_an_option_that_was_given(first, then, used):
    net = Net()
    model, want = DDPM(net, timesteps=40, **first), DDPM(net, timesteps=40, **then)
    if used:
        answers(model)
    for name, value in then.items():
        setattr(model, "loss_kind" if name == "loss" else name, value)
    assert model.config == want.config and same(answers(model), answers(want))


@pytest.mark.slow
def test_other_formulations_follow_too():
    net = Net()
    for model, name, value, want in (
        (NCSN(net, levels=12), "objective", "x0", NCSN(net, levels=12, objective="x0")),
        (NCSN(net), "process", Ladder(3.0, 0.1, 12), NCSN(net, 3.0, 0.1, 12)),
        (NCSN(net, levels=12), "weighting", "min_snr", NCSN(net, levels=12, weighting="min_snr")),
        (ScoreSDE(net), "objective", "v", ScoreSDE(net, objective="v")),
        (ScoreSDE(net), "weighting", "likelihood", ScoreSDE(net, weighting="likelihood")),
        (ScoreSDE(net), "process", VE(0.1, 3.0), ScoreSDE(net, VE(0.1, 3.0))),
        (FlowMatching(net), "process", Flow(3.0), FlowMatching(net, shift=3.0)),
        (FlowMatching(net), "objective", "x0", FlowMatching(net, "x0")),
        (FlowMatching(net), "times", "mode", FlowMatching(net, times="mode")),
        (Edm(net), "process", Preconditioned(0.7), Edm(net, 0.7)),
        (Edm(net), "P_mean", -0.4, Edm(net, P_mean=-0.4)),
        (DDPM(net, timesteps=20), "process", Chain(linear(30)), DDPM(net, linear(30), 30)),
        (DDPM(net, timesteps=20), "schedule", linear(30).betas, DDPM(net, linear(30), 30)),
    ):
        if model.process.last >= 12 or isinstance(model, ContinuousDiffusion):
            answers(model)
        setattr(model, name, value)
        assert same(answers(model), answers(want)) and same([trained(model)], [trained(want)])
    model = ScoreSDE(net)
    model.process = VP()
    with pytest.raises(ValueError, match="config: expected an SDE given by name"):
        _ = model.config


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("objective", "noise", "objective: expected one of"),
        ("clip", 0, "clip: expected a number above 0"),
        ("clip", "dynamic", "clip: expected a number, got str"),
        ("variance", "fixed", "variance: expected one of"),
        ("variance", "learned", "loss: expected 'hybrid' or 'vlb'"),
        ("weighting", "sqrt", "weighting: expected one of"),
        ("loss_kind", "hybrid", "variance: expected 'learned' with loss 'hybrid'"),
        ("loss_kind", "l3", "loss: expected one of"),
        ("schedule", "raised_cosine", "objective: 'eps' cannot determine x_0"),
        ("schedule", "straight", "schedule: expected one of"),
        ("process", VP(), "process: expected a Chain, got VP"),
        ("process", None, "process: expected a fastdiff.process.Process, got NoneType"),
    ],
)
def test_a_setting_that_cannot_be_changes_nothing(name, value, said):
    model = DDPM(Net(), timesteps=40)
    want = answers(model)
    with pytest.raises((TypeError, ValueError), match=said):
        setattr(model, name, value)
    assert same(answers(model), want) and model.config == DDPM(Net(), timesteps=40).config


@pytest.mark.parametrize("name", ["ddpm", "beta", "learned", "ncsn"])
def test_a_change_of_the_schedule_in_place_is_seen(name):
    """Everything follows, as if it had been given: no table is kept from before."""
    torch.manual_seed(0)
    model = FORMULATIONS[name]()
    other = copy.deepcopy(model)
    before = answers(model)
    for each in (model, other):  # the second has no tables yet
        each.schedule.log_alpha[1:].mul_(0.9)
        sigma = torch.expm1(2 * each.schedule.log_alpha).abs().sqrt() if each.schedule.vp else each.schedule.sigma * 0.9
        each.schedule.sigma.copy_(sigma)
    assert same(answers(model), answers(other)) and not torch.equal(answers(model)[1], before[1])


def test_what_follows_from_options_is_not_set():
    for model, name in (
        (DDPM(Net()), "timesteps"), (DDPM(Net()), "learns_variance"), (DDPM(Net()), "schedule_name"),
        (NCSN(Net()), "sigma_max"), (NCSN(Net()), "sigma_min"), (ScoreSDE(Net()), "sde"), (DDPM(Net()), "config"),
    ):  # fmt: skip
        with pytest.raises(AttributeError, match=name):
            setattr(model, name, 1)
    with pytest.raises(AttributeError, match="schedule"):
        DDPM(Net()).process.schedule = linear(10)
    for process, name in (
        (VP(), "beta_max"),
        (VE(), "sigma_min"),
        (Ladder(), "sigma_max"),
        (NCSN(Net()).process, "sigma_min"),
    ):
        before = getattr(process, name)
        with pytest.raises(AttributeError, match=f"{name}: expected to stay as it was made; make another"):
            setattr(process, name, 2.0)
        assert getattr(copy.deepcopy(process), name) == getattr(pickle.loads(pickle.dumps(process)), name) == before
    with pytest.raises(TypeError, match="process: expected a Ladder"):
        NCSN(Net()).schedule = linear(10)
    model = DDPM(Net(), timesteps=20, importance=True)
    model.schedule = linear(30)
    assert len(model.importance.seen) == model.timesteps == 30
