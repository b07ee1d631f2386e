"""Networks that are told their own estimate of x_0: in every sampler that of the step before, and what takes it."""

import functools
import itertools
from typing import Any

import pytest
import torch
from small_models import SHAPE, Pointwise
from tape import Recorders
from torch import Tensor, nn

from fastdiff import DDPM, NCSN, DiT, Edm, FlowMatching, ScoreSDE, UNet, ops
from fastdiff.capture import Captures
from fastdiff.diffusion import Diffusion
from fastdiff.guidance import Rescaled, Thresholded, ZeroStar
from fastdiff.recipes import self_conditioned
from fastdiff.steps import SAMPLERS


class Told(nn.Module):
    """Leans on what it is told; remembers its calls in `seen`."""

    self_condition = True

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.4))
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None, y: float | Tensor = 0.0) -> Tensor:
        told = torch.zeros_like(x) if x_self_cond is None else x_self_cond
        if not torch.compiler.is_compiling():
            self.seen.append((x.detach().clone(), t, told.detach().clone()))
        return self.gain * x + 0.3 * told + (y.reshape(-1, 1, 1, 1) if isinstance(y, Tensor) else y)


DDPMS = functools.partial(DDPM, schedule="cosine", timesteps=50, objective="v")
VP = functools.partial(ScoreSDE, sde="vp", objective="v", clip=1.0)
CASES = [
    (DDPMS, "ddpm"), (DDPMS, "dpm++2m"), (DDPMS, "unipc"), (VP, "euler_maruyama"), (VP, "predictor_corrector"),
    (FlowMatching, "ddim"), (FlowMatching, "heun"), (Edm, "heun"), (Edm, "dpm++sde"),
]  # fmt: skip

HALF = (torch.arange(SHAPE[-1]) < SHAPE[-1] // 2).float().expand(SHAPE)


def given(guided: bool) -> dict[str, Any]:
    return {"guidance": 2.5, "y": 0.3, "uncond": {"y": -0.1}} if guided else {}


@pytest.mark.slow
@pytest.mark.parametrize(("make", "sampler"), CASES)
@pytest.mark.parametrize("rule", [None, Rescaled()])
def test_a_step_is_told_the_estimate_of_the_step_before(make: Any, sampler: str, rule: Any) -> None:
    """By the guided prediction, as the network's own update takes it."""
    model = make(Told())
    table = model.step_table(sampler, 4)
    model.sample(SHAPE, sampler=sampler, steps=4, seed=1, graph=False, guidance_rule=rule, **given(True))
    asked = [k for k, kind in enumerate(table.kinds) if kind != "add"]
    seen, n, want = list(model.model.seen), SHAPE[0], torch.zeros(SHAPE)
    assert len(seen) == len(asked)
    for k, (x, t, told) in zip(asked, seen, strict=True):
        assert torch.equal(told[:n], told[n:])
        torch.testing.assert_close(told[:n], want, rtol=1e-4, atol=1e-5)
        if table.kinds[k] == "predict":
            level = table.levels[k].item()
            cond, uncond = (model.model(x[:n], t[:n], told[:n], y) for y in (0.3, -0.1))
            p = uncond + 2.5 * (cond - uncond)
            if rule:
                p = p * (0.7 * (cond.flatten(1).std(1) / p.flatten(1).std(1)).reshape(-1, 1, 1, 1) + 0.3)
            fixed = type(model)(Predicting(p), **model.config)
            want = fixed.predict_x0(x[:n], level).detach()


# Those that keep several tensors, or another one than x0hat, make the estimate by an operation of its own.
APART = {"dpm++3m_sde", "unipc", "deis", "lms", "plms", "heun", "dpm2", "dpm2_ancestral", "dpm++2s",
         "dpm++2s_ancestral", "dpm++sde"}  # fmt: skip


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_to_tell_costs_no_launch_where_the_step_makes_the_estimate(
    name: str, guided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = NCSN(Told(), levels=3) if name == "annealed_langevin" else ScoreSDE(Told(), "vp", "v")
    table, update, made = model.step_table(name, 3), ops.update, []
    monkeypatch.setattr(ops, "update", lambda *args, **how: made.append(how) or update(*args, **how))
    model.sample(SHAPE, sampler=name, steps=3, seed=1, **given(guided))
    launches = [1 + (kind == "correct" or (kind == "predict" and name in APART)) for kind in table.kinds]
    assert len(made) == sum(launches)


SHARED = {
    "ddpm": (DDPMS, {"sampler": "ddpm"}),
    "direct": (ScoreSDE, {"sampler": "probability_flow", **given(True)}),
    "corrected": (VP, {"sampler": "predictor_corrector"}),
    # Hist would have other numbers here, and the estimate is apart.
    "noise comes back": (VP, {"sampler": "ddim", "x_init": torch.ones(SHAPE), "known": HALF, "resample": 2}),
    "rule sees rows": (ScoreSDE, {"sampler": "probability_flow", "guidance_rule": Thresholded(0.5), **given(True)}),
    "stands still": (FlowMatching, {"sampler": "ddim", "guidance_rule": ZeroStar(1), **given(True)}),
}


@pytest.mark.parametrize("case", SHARED)
def test_an_estimate_from_hist_has_the_bits_of_one_apart(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, how = SHARED[case]
    model = make(Told(), objective="v") if make is ScoreSDE else make(Told())
    got = model.sample(SHAPE, steps=3, seed=1, **how)
    monkeypatch.setattr("fastdiff.diffusion.with_own_estimates", lambda table, *_: table)
    assert torch.equal(got, model.sample(SHAPE, steps=3, seed=1, **how))


@pytest.mark.slow
def test_a_compiled_step_tells_what_is_in_hist() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import

    torch._dynamo.reset()
    plain, compiled, counter = DDPMS(Told()), DDPMS(Told()), CompileCounterWithBackend("aot_eager")
    compiled.compile(backend=counter, fullgraph=True)
    want, got = (model.sample(SHAPE, sampler="ddim", steps=4, seed=1) for model in (plain, compiled))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert counter.frame_count == 1  # for all steps


class Predicting(nn.Module):
    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = out

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out


def test_what_the_caller_tells_stays() -> None:
    model, told = DDPMS(Told()), torch.full(SHAPE, 0.7)
    model.sample(SHAPE, sampler="ddim", steps=3, seed=1, x_self_cond=told)
    assert all(torch.equal(seen, told) for *_, seen in model.model.seen)


@pytest.mark.slow
@pytest.mark.parametrize("make", [DDPMS, functools.partial(NCSN, objective="eps")])
def test_an_inversion_tells_the_data_and_then_estimates(make: Any) -> None:
    """Also where no level stands for data, as on a ladder."""
    model, x0 = make(Told()), torch.rand(SHAPE)
    model.encode(x0, steps=3)
    (_, _, first), (_, _, second), (_, _, third) = model.model.seen
    assert not first.any() and torch.allclose(second, x0, atol=1e-6) and not torch.allclose(third, x0, atol=1e-3)


def test_each_run_begins_with_zeros_and_captures_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdiff.capture.what_forbids", lambda *_: None)
    monkeypatch.setattr(Captures.__init__, "__defaults__", (Recorders(),))
    model = Edm(Told())
    for sampler, sigma_max in itertools.product(("heun", "ddim"), (80.0, 10.0)):  # the rows are those of each run
        for guided in (False, True):
            steps = model.process.karras(4, sigma_max=sigma_max)
            how: dict[str, Any] = {"sampler": sampler, "steps": steps, "seed": 3, **given(guided)}
            want = model.sample(SHAPE, graph=False, **how)
            assert torch.equal(model.sample(SHAPE, **how), want)


def test_gradients_go_through_what_is_told() -> None:
    model = FlowMatching(Told().double())
    drawn = functools.partial(model.sample, SHAPE, steps=3, seed=1, grad_steps=3)
    gain = model.model.gain
    (grad,) = torch.autograd.grad(drawn().square().sum(), gain)
    with torch.no_grad():
        h = 1e-5
        sums = []
        for sign in (1, -1):
            gain.add_(sign * h)
            sums.append(drawn().square().sum().item())
            gain.sub_(sign * h)
    assert (sums[0] - sums[1]) / (2 * h) == pytest.approx(grad.item(), rel=1e-7)


@pytest.mark.parametrize("make", [DDPMS, FlowMatching])
def test_the_estimate_of_training_is_that_of_its_own_noise(make: Any) -> None:
    """Also where samples have numbers: the states of both passes are the same."""
    model: Diffusion = make(Told())
    x0 = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    t = torch.tensor([10, 20, 30, 40]) if make is DDPMS else torch.tensor([0.2, 0.4, 0.6, 0.8])
    loss = self_conditioned(model, x0, t=t, seed=3, sample_ids=[7, 1, 5, 2], share=1.0)
    (first, _, zeros), (second, _, told) = model.model.seen
    assert torch.equal(first, second) and not zeros.any() and loss.requires_grad
    torch.testing.assert_close(told, model.predict_x0(first, t).detach())


BLOCKS = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
NETWORKS = {
    "unet": functools.partial(UNet, sample_size=4, in_channels=2, out_channels=2, norm_num_groups=4, **BLOCKS),
    "dit": functools.partial(DiT, 2, 8, in_channels=2, num_layers=1, sample_size=4, num_embeds_ada_norm=3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_take_an_estimate(name: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    plain, net = NETWORKS[name](), NETWORKS[name](self_condition=True)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    assert plain.config == {k: v for k, v in net.config.items() if k != "self_condition"}
    assert net.sample_shape == (2, 4, 4) and type(net)(**net.config).config == net.config
    x, t, told = torch.randn(SHAPE), torch.arange(4), torch.randn(SHAPE)
    assert torch.equal(net(x, t), net(x, t, x_self_cond=torch.zeros(SHAPE)))
    assert not torch.allclose(net(x, t), net(x, t, x_self_cond=told))
    with pytest.raises(
        ValueError, match=r"^x_self_cond: expected shape \(4, 2, 4, 4\), got torch.float32 \(4, 1, 4, 4\)"
    ):
        net(x, t, x_self_cond=told[:, :1])
    with pytest.raises(ValueError, match=r"^x_self_cond: expected None, as self_condition is False, got a tensor$"):
        plain(x, t, x_self_cond=told)
    with pytest.raises(ValueError, match=r"^self_condition: expected False, as diffusers has no network"):
        (DDPM(net) if name == "unet" else net).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    want = plain(x, t)
    del plain.self_condition  # as in pickles of 0.1
    assert plain.sample_shape == (2, 4, 4) and torch.equal(plain(x, t), want)
    model = FlowMatching(net)
    drawn = [model.sample(4, steps=3, seed=1, dtype=dtype) for dtype in (None, torch.bfloat16)]
    torch.testing.assert_close(*drawn, rtol=0.1, atol=0.1)


def test_another_network_of_guidance_is_told_the_same() -> None:
    model, other = DDPMS(Told()), Told()
    model.sample(SHAPE, sampler="ddim", steps=3, seed=1, guidance=2.0, uncond=other)
    assert all(torch.equal(a[2], b[2]) for a, b in zip(model.model.seen, other.seen, strict=True))
    assert model.model.seen[-1][2].any()


@pytest.mark.parametrize("first", [True, False])
def test_of_two_networks_of_guidance_one_may_take_no_estimate(first: bool) -> None:
    told = Told()
    model, other = (told, Pointwise()) if first else (Pointwise(), told)
    DDPMS(model).sample(SHAPE, sampler="ddim", steps=3, seed=1, guidance=2.0, uncond=other)
    assert [bool(seen.any()) for *_, seen in told.seen] == [False, True, True]
