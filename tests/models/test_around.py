"""What happens around a walk along a process: the mode of the model, gradients, what the user's code may do."""

import math
import threading

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastdiff import DDPM, NCSN, Edm, FlowMatching, ScoreSDE
from fastdiff.diffusion import Diffusion
from fastdiff.process import VE, VP, Chain, Ladder
from fastdiff.recipes import self_conditioned
from fastdiff.schedule import NoiseSchedule, linear, make_schedule
from fastdiff.steps import SAMPLERS
from fastdiff.support.modes import evaluating

pytestmark = pytest.mark.filterwarnings("ignore:schedule. alpha_bar_T")
SHAPE = (2, 3)


class Net(nn.Module):
    """Remembers the modes and types that it was called in, and keeps a table from its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.kept = nn.Linear(3, 3), None
        self.modes: list[bool] = []
        self.dtypes: list[torch.dtype] = []

    def forward(self, x: Tensor, t: Tensor, y: object = None) -> Tensor:
        self.modes.append(self.training)
        self.dtypes.append(x.dtype)
        if self.kept is None:
            self.kept = torch.arange(3.0).cos().to(x)
        return self.linear(x) * self.kept


class Pointwise(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.3 * x - 0.01 * t.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


MAKERS = {
    "ddpm": lambda net: DDPM(net, timesteps=12),
    "ncsn": lambda net: NCSN(net, levels=4),
    "sde": lambda net: ScoreSDE(net),
    "flow": lambda net: FlowMatching(net),
    "edm": lambda net: Edm(net),
}
WALKS = {
    "sample": lambda m, x: m.sample(tuple(x.shape), steps=2),
    "bits_per_dim": lambda m, x: m.bits_per_dim(x, steps=2),
    "log_likelihood": lambda m, x: m.log_likelihood(x, tolerance=0.1),
    "encode": lambda m, x: m.encode(x, steps=2),
    "interpolate": lambda m, x: m.interpolate(x, x),
    "ode": lambda m, x: m.sample(tuple(x.shape), sampler="ode"),
}


def walks(kind: str) -> dict[str, object]:
    left_out = {"ncsn": ("encode", "interpolate"), "sde": ("interpolate",), "edm": ("interpolate",)}
    return {name: walk for name, walk in WALKS.items() if name not in left_out.get(kind, ())}


# --- tables of the network ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "walk"), [(k, w) for k in MAKERS for w in walks(k)])
def test_what_a_model_keeps_from_a_walk_is_trained_on(kind, walk):
    net, x = Net(), torch.rand(SHAPE) * 2 - 1
    model = MAKERS[kind](net)
    WALKS[walk](model, x)
    assert not any(net.modes) and model.training and net.linear.training
    model(x).backward()
    assert net.linear.weight.grad.isfinite().all() and net.modes[-1]


# --- modes and threads --------------------------------------------------------------------------------------------


def test_the_last_walk_gives_the_mode_back():
    """Two walks that overlap, in either order of leaving, over nested modules that share a part."""
    shared, other = nn.Linear(2, 2), nn.Linear(2, 2).eval()
    one, two = nn.Sequential(shared, other), nn.Sequential(shared)
    for first, second in ((one, two), (two, one), (one, one)):
        a, b = evaluating(first), evaluating(second)
        a.__enter__()
        b.__enter__()
        assert not any(m.training for m in (shared, other, first, second))
        a.__exit__(None, None, None)
        assert not shared.training and not second.training
        b.__exit__(None, None, None)
        assert shared.training and one.training and two.training and not other.training


def test_an_override_of_eval_is_not_called():
    class Merging(nn.Linear):
        def train(self, mode: bool = True) -> nn.Module:
            with torch.no_grad():
                self.weight.add_(1.0)
            return super().train(mode)

    net = nn.Sequential(Merging(2, 2))
    before = net[0].weight.clone()
    with evaluating(net):
        assert not net[0].training
    assert net[0].training and torch.equal(net[0].weight, before)


def test_threads_that_share_a_model_draw_what_one_draws():
    """One thread's walk begins and ends within the other's, at every call."""

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.inside = nn.Dropout(0.5), None

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            if self.inside is not None and threading.current_thread() is threading.main_thread():
                worker = threading.Thread(target=self.inside)
                worker.start()
                worker.join()
            return self.drop(torch.ones_like(x)) * 0.1

    net = Dropped()
    model = DDPM(net, timesteps=12)
    want = model.sample(SHAPE, seed=1, steps=4)
    within: list[Tensor] = []
    net.inside = lambda: within.append(model.sample(SHAPE, seed=1, steps=4))
    assert torch.equal(model.sample(SHAPE, seed=1, steps=4), want) and model.training and net.drop.training
    assert len(within) == 4 and all(torch.equal(one, want) for one in within)


# --- callbacks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++2m", "heun", "predictor_corrector"])
def test_a_callback_may_take_gradients_and_return_a_state(sampler):
    model = DDPM(Net(), timesteps=12)

    def guidance(x: Tensor, level: float) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            energy = (model.predict_x0(leaf, max(1, round(level))) - 0.5).square().sum()
            return 0.1 * torch.autograd.grad(energy, leaf)[0]

    def in_place(k: int, level: float, x: Tensor) -> None:
        assert not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        x.sub_(guidance(x, level))

    def returned(k: int, level: float, x: Tensor) -> Tensor:
        return x - guidance(x, level)

    options = {"sampler": sampler, "seed": 1} | ({"steps": 4} if sampler != "heun" else {"steps": 3})
    plain = model.sample(SHAPE, **options)
    changed = model.sample(SHAPE, callback=in_place, **options)
    assert not torch.allclose(plain, changed)
    assert torch.equal(model.sample(SHAPE, callback=returned, **options), changed)
    path = model.sample(SHAPE, callback=returned, return_trajectory=True, **options)
    assert torch.equal(path[-1], changed)


def test_inpainting_by_a_callback():
    """What is known is written at every level; what is left belongs to it, and the known part comes out exactly."""
    model, known = DDPM(Pointwise(), timesteps=12), torch.rand(SHAPE) * 2 - 1
    mask = torch.tensor([[True, False, True]])

    def inpaint(k: int, level: float, x: Tensor) -> None:
        state = known if level == 0 else model.q_sample(known, int(level), seed=3)
        x.copy_(torch.where(mask, state, x))

    for sampler in ("ddpm", "ddim", "dpm++2m"):
        path = model.sample(SHAPE, sampler=sampler, seed=1, callback=inpaint, return_trajectory=True)
        assert torch.equal(path[-1][:, [0, 2]], known[:, [0, 2]])
        assert torch.equal(path[3][:, [0, 2]], model.q_sample(known, 9, seed=3)[:, [0, 2]])


@pytest.mark.parametrize(
    ("new", "error", "said"),
    [
        (3.0, TypeError, "return None or a tensor, got float"),
        (torch.zeros(3), ValueError, r"shape \(2, 3\), got \(3,\)"),
    ],
)
def test_a_callback_that_returns_something_else(new, error, said):
    with pytest.raises(error, match=f"callback: expected .*{said}"):
        DDPM(Pointwise(), timesteps=12).sample(SHAPE, callback=lambda k, level, x: new)


# --- types and devices --------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """A frozen part of another type before the network."""

    def __init__(self, first: torch.dtype, second: torch.dtype) -> None:
        super().__init__()
        self.encoder, self.net = nn.Embedding(4, 3).to(first), nn.Linear(3, 3).to(second)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append(x.dtype)
        return self.net(x.to(self.net.weight.dtype)).to(x.dtype) + self.encoder(t % 4).to(x.dtype)


@pytest.mark.parametrize("second", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_where_types_are_mixed_the_state_stays_as_it_is(first, second):
    if torch.float8_e4m3fn in (first, second):
        net: nn.Module = Pointwise()
        net.scale = nn.Parameter(torch.zeros(2).to(first), requires_grad=False)
    else:
        net = Mixed(first, second)
    model, x = DDPM(net, timesteps=12), torch.rand(SHAPE)
    uniform = first == second
    assert model.sample(SHAPE, steps=2).dtype == torch.float32
    model(x)
    model.bits_per_dim(x, steps=2)
    assert set(getattr(net, "seen", [])) <= {second if uniform else torch.float32}


def test_models_without_weights_follow_the_data():
    model = DDPM(Pointwise(), timesteps=12)
    assert model.sample(SHAPE, steps=2).device.type == "cpu"
    assert model.sample(SHAPE, steps=2, device="meta").device.type == "meta"
    assert model.sample(SHAPE, steps=2, x_T=torch.zeros(SHAPE, device="meta")).device.type == "meta"
    assert model.encode(torch.zeros(SHAPE, device="meta"), steps=2).device.type == "meta"
    with torch.device("meta"):
        assert model.sample(SHAPE, steps=2).device.type == "meta"


@pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload"])
def test_offloaded_weights(offload, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    net, x = Net(), torch.rand(SHAPE)
    model = DDPM(net, timesteps=12)
    want, loss = model.sample(SHAPE, steps=4, seed=1), model.eval()(x, t=3, seed=1)
    places = (tmp_path,) if offload == "disk_offload" else ()
    getattr(accelerate, offload)(net, *places, execution_device=torch.device("cpu"))
    assert all(p.device.type == "meta" for p in net.parameters()) and model.device.type == "cpu"
    assert torch.equal(model.sample(SHAPE, steps=4, seed=1), want) and torch.equal(model(x, t=3, seed=1), loss)


# --- networks that look levels up ---------------------------------------------------------------------------------


class Embeds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 3)

    def forward(self, x: Tensor, t: Tensor, wrong: bool = False) -> Tensor:
        if wrong:
            raise RuntimeError("something else")
        return 0.1 * x + self.table(t)


def test_a_network_of_whole_times_is_not_asked_between_levels():
    model = DDPM(Embeds(), timesteps=12)
    said = "model: expected a network of real times, since sampler 'heun'"
    for call in (
        lambda: model.sample(SHAPE, sampler="heun"),
        lambda: model.sample(SHAPE, sampler="ode"),
        lambda: model.log_likelihood(torch.zeros(SHAPE)),
        lambda: model.sample(SHAPE, sampler="ddim", steps=model.process.karras(5)),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    for sampler in ("ddpm", "heun"):  # as the error says
        assert model.sample(SHAPE, sampler=sampler, steps=model.process.grid(4)).isfinite().all()
    with pytest.raises(RuntimeError, match="something else"):
        model.sample(SHAPE, sampler="heun", wrong=True)
    with pytest.raises(RuntimeError, match="something else"):
        model.sample(SHAPE, wrong=True)


# --- corners ------------------------------------------------------------------------------------------------------


def test_a_bound_of_levels_that_do_not_reach_data_is_refused():
    x = torch.zeros(SHAPE)
    for model in (DDPM(Pointwise(), timesteps=12), NCSN(Pointwise(), levels=12)):
        with pytest.raises(ValueError, match=r"steps: expected levels that end at 0 \(data\), got \[10, 5, 3\]"):
            model.bits_per_dim(x, steps=[10, 5, 3])
        assert model.bits_per_dim(x, steps=[12, 5, 3, 0], seed=1).terms.shape == (2, 3)
    with pytest.raises(ValueError, match="x0: expected at least one image"):
        model.bits_per_dim(x[:0])


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4,), (1,), (0,), (0, 3), (2, 1), (2, 1, 3), (2, 3, 1, 1, 1)])
@pytest.mark.parametrize("timesteps", [1, 2, 12])
def test_every_method_takes_every_shape_and_length(shape, timesteps):
    model = DDPM(Pointwise(), torch.linspace(0.3, 0.9, timesteps), timesteps, "v")
    x = torch.rand(shape) * 2 - 1
    for sampler in SAMPLERS:
        if sampler == "annealed_langevin":
            continue
        steps_of = None if sampler == "heun" else timesteps
        got = model.sample(shape, sampler=sampler, steps=steps_of, seed=1, sample_ids=range(shape[0]))
        assert got.shape == shape and got.isfinite().all()
    assert model.sample(shape, sampler="ode").shape == shape
    assert model.log_likelihood(x).shape == model.log_likelihood(x, trace="exact").shape == shape[:1]
    assert model.encode(x).shape == shape
    for sampler in ("ddpm", "ddim"):
        assert model.interpolate(x, x, sampler=sampler).shape == shape
    assert model.q_sample(x, 1).shape == model.p_sample(x, 1).shape == model.predict_x0(x, 1).shape == shape
    mean, variance = model.q_posterior(x, x, 1)
    assert (mean.shape == shape and variance.shape == (shape[0], *[1] * (len(shape) - 1))) or shape[0] > 1
    if x.numel():
        assert model.bits_per_dim(x).total.shape == shape[:1]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2,)])
def test_the_other_formulations_take_every_shape_too(shape):
    x, net = torch.rand(shape), Pointwise()
    for model, samplers in (
        (ScoreSDE(net), ("euler_maruyama", "predictor_corrector", "heun", "ode")),
        (NCSN(net, levels=3), ("annealed_langevin", "predictor_corrector", "ddpm")),
    ):
        t = 0.5 if isinstance(model, ScoreSDE) else 2
        for sampler in samplers:
            options = {} if sampler == "ode" else {"steps": 2}
            assert model.sample(shape, sampler=sampler, **options).shape == shape
        assert model.q_sample(x, t).shape == model.predict_x0(x, t).shape == model.predict(x, t, "v").shape == shape
        assert model(x, t=t, reduction="none").shape == shape[:1] and model.log_likelihood(x).shape == shape[:1]


@pytest.mark.slow
def test_one_number_a_sample_is_a_vector_of_one():
    """Shape (B,) gives what (B, 1) gives."""
    model, x = DDPM(Pointwise(), timesteps=12), torch.rand(4) * 2 - 1
    for sampler in ("ddpm", "predictor_corrector", "ode"):
        flat, column = (model.sample(s, sampler=sampler, seed=1) for s in ((4,), (4, 1)))
        torch.testing.assert_close(flat, column[:, 0], rtol=1e-5, atol=1e-6)
    for method in (model.log_likelihood, lambda x, seed: model.bits_per_dim(x, seed=seed).total):
        torch.testing.assert_close(method(x, seed=1), method(x[:, None], seed=1), rtol=1e-5, atol=1e-5)
    a, b = (model.interpolate(x.reshape(s), -x.reshape(s), sampler="ddim") for s in ((4,), (4, 1)))
    torch.testing.assert_close(a, b[:, 0], rtol=1e-4, atol=1e-5)


def test_a_flow_over_one_level_is_the_prior():
    model = DDPM(Pointwise(), torch.tensor([0.6]), 1, "v")
    x = torch.rand(SHAPE)
    want = torch.distributions.Normal(0, 1).log_prob(x).sum(1)
    torch.testing.assert_close(model.log_likelihood(x), want)


@pytest.mark.parametrize("timesteps", [2, 4, 8, 50])
def test_no_ratio_beyond_the_last_level_with_signal_is_a_level(timesteps):
    process = Chain(make_schedule("raised_cosine", timesteps))
    end = process.largest_ratio()
    assert end == pytest.approx(process.schedule.sigma[-2].item() / process.schedule.alpha[-2].item(), rel=1e-12)
    if end < 1e100:
        for beyond in (end * 1.001, end * 10):
            with pytest.raises(ValueError, match="sigma: expected levels from"):
                process.time_of(torch.tensor([beyond], dtype=torch.float64))
            with pytest.raises(ValueError, match="sigma: expected levels from"):
                process.karras(4, sigma_max=beyond)
    top = min(end, 80.0)
    made, levels = process.karras(5, sigma_max=top)
    ratio = (made.sigma / made.alpha)[levels]
    assert ratio[0].item() == pytest.approx(top, rel=1e-9) and (ratio.diff() < 0).all()


def test_a_chain_of_noise_alone_has_no_ratio():
    process = Chain(make_schedule("raised_cosine", 1))
    for options in ({}, {"sigma_max": 5.0}, {"sigma_min": 1e-6, "sigma_max": 1e6}):
        with pytest.raises(ValueError, match=r"^sigma"):
            process.karras(6, **options)


@pytest.mark.parametrize("churn", [0.5, 40.0, math.inf])
def test_churn_stays_within_a_chain(churn):
    """README's recipe on chains whose noise ends below 80: raised levels reach the last one at most."""
    for process in (
        Ladder(1.0, 0.01, 10), Chain(make_schedule("scaled_linear", 1000)), Chain(linear(1000)),
        Chain(make_schedule("cosine", 50)), VE(), VP(),
    ):  # fmt: skip
        plain, where = process.karras(18)
        ratio = (plain.sigma / plain.alpha)[where]
        made, levels = process.karras(18, churn=churn)
        raised = (made.sigma / made.alpha)[levels]
        down = [r for r, before in zip(raised.tolist(), [math.inf, *raised.tolist()], strict=False) if r < before]
        assert down == pytest.approx(ratio.tolist(), rel=1e-9)
        assert raised.max().item() <= process.largest_ratio() * (1 + 1e-9)
        assert len(raised) > len(ratio) + 15
    model = NCSN(Pointwise())
    assert model.sample(SHAPE, sampler="heun", steps=model.process.karras(18, churn=40)).isfinite().all()


def test_a_range_of_one_ratio_is_one_level():
    for process in (Chain(linear(1)), Chain(NoiseSchedule.from_alpha_sigma(torch.ones(1), torch.ones(1)))):
        made, levels = process.karras(18)
        assert levels.tolist() == [1, 0] and made.time[1].item() == pytest.approx(1.0)


BAD = {
    "q_sample": lambda m, x: m.q_sample(5, 3),
    "q_step": lambda m, x: m.q_step(None, 3),
    "q_posterior": lambda m, x: m.q_posterior(x, 5, 3),
    "q_posterior x0": lambda m, x: m.q_posterior(5, x, 3),
    "p_sample": lambda m, x: m.p_sample([1.0], 3),
    "predict": lambda m, x: m.predict(x, 3, 5),
    "loss": lambda m, x: m(None),
    "loss t": lambda m, x: m(x, t="3"),
    "shape": lambda m, x: m.sample("ab"),
    "shape None": lambda m, x: m.sample(None),
    "shape float": lambda m, x: m.sample((2.0, 3)),
    "log_likelihood inf": lambda m, x: m.log_likelihood(x / 0),
    "log_likelihood tolerance": lambda m, x: m.log_likelihood(x, tolerance="small"),
    "eta": lambda m, x: m.sample(SHAPE, sampler="ddim", eta="1"),
    "steps": lambda m, x: m.sample(SHAPE, steps=object()),
    "interpolate": lambda m, x: m.interpolate(x, x, t="3"),
    "encode": lambda m, x: m.encode([1.0]),
    "guidance": lambda m, x: m.sample(SHAPE, guidance="2", y=1, uncond={"y": 2}),
    "device": lambda m, x: m.sample(SHAPE, device="gpu"),
    "noise": lambda m, x: m.sample(SHAPE, noise=lambda k: None),
    "uncond": lambda m, x: m.sample(SHAPE, guidance=2, y=np.ones(3), uncond={"y": np.zeros(3)}),
}


@pytest.mark.parametrize("call", BAD)
def test_bad_calls_end_in_our_words(call):
    model: Diffusion = DDPM(Pointwise(), timesteps=12)
    with pytest.raises((TypeError, ValueError), match=r"^\w+: expected"):
        BAD[call](model, torch.ones(SHAPE))


REFUSED = {
    "mask": lambda m, x: m(x, mask=torch.ones(5)),
    "reduction": lambda m, x: m(x, reduction="sum"),
    "noise": lambda m, x: m(x, noise=x[:1]),
    "seed": lambda m, x: m(x, seed="1"),
    "seed and noise": lambda m, x: m(x, seed=1, noise=x),
    "sample_ids": lambda m, x: m(x, sample_ids=[-1, 2]),
    "told, mask": lambda m, x: self_conditioned(m, x, mask=torch.ones(5)),
    "told, seed": lambda m, x: self_conditioned(m, x, seed="1"),
    "p_sample": lambda m, x: m.p_sample(x, 3, noise=x[:1]),
    "out": lambda m, x: m.p_sample(x, 3, out=x),
    "predict_x0": lambda m, x: m.predict_x0(x, 3, out=x[:1]),
    "predict": lambda m, x: m.predict(x, 3, "v", out=x),
    "bits_per_dim": lambda m, x: m.bits_per_dim(x, model_kwargs=1),
}


@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("call", REFUSED)
def test_a_refused_call_draws_nothing_and_asks_no_network(call, importance):
    model = DDPM(Net(), timesteps=12, importance=importance)
    before = torch.get_rng_state()
    with pytest.raises((TypeError, ValueError), match=r"^\w+: expected"):
        REFUSED[call](model, torch.ones(SHAPE))
    assert torch.equal(torch.get_rng_state(), before) and not model.model.modes


def test_a_bound_has_no_mask():
    model = DDPM(Net(), timesteps=12, loss="vlb")
    with pytest.raises(ValueError, match="mask: expected None with loss 'vlb'"):
        model(torch.ones(SHAPE), mask=torch.ones(SHAPE))
    assert not model.model.modes


def test_a_learned_variance_needs_channels():
    class Two(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.cat((x, x))

    with pytest.raises(ValueError, match=r"x: expected channels, \(B, C, \.\.\.\), with a learned variance"):
        DDPM(Two(), timesteps=12, variance="learned", loss="vlb").sample((4,))
