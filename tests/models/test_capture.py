"""Captured steps: the same bits as the plain loop, what a capture is kept for, and what forbids one.

On a CPU a tape stands for a CUDA graph; the tests marked `gpu` use CUDA's own.
"""

import copy
import functools
import pickle
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tape import Recorders, Tape
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastdiff
from fastdiff import DDPM, NCSN, ScoreSDE, UNet, ops, steps
from fastdiff.capture import Captures, what_forbids
from fastdiff.diffusion import Diffusion
from fastdiff.graphs import MOST_CAPTURES, WARM_UP
from fastdiff.guidance import Projected, Rescaled

SHAPE = (2, 3, 4, 4)
SAMPLERS: list[Any] = [
    "ddpm",
    "ddim",
    "dpm++2m",
    "heun",
    "euler_maruyama",
    "predictor_corrector",
    "unipc",
    "plms",
    "dpm++sde",
    functools.partial(steps.heun, noise_scale=1.01),
]
# No address stands in a test's name: the workers of pytest-xdist must collect the same names.
NAMES = [sampler if isinstance(sampler, str) else "heun with churn" for sampler in SAMPLERS]


class Net(nn.Module):
    """Counts the calls of its Python."""

    def __init__(self):
        super().__init__()
        self.conv, self.calls = nn.Conv2d(3, 3, 3, padding=1), 0

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, gain: float = 1.0) -> Tensor:
        self.calls += 1
        h = self.conv(x) + 0.001 * t.to(x.dtype)[:, None, None, None]
        return h * gain if y is None else h * gain + y[:, None, None, None]


def unet() -> UNet:
    return UNet(
        sample_size=4, block_out_channels=(4, 8), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), layers_per_block=1, norm_num_groups=2,
        attention_head_dim=4,
    )  # fmt: skip


@pytest.fixture
def taped(monkeypatch) -> Recorders:
    """Diffusion.sample captures on the CPU, on tapes."""
    torch.manual_seed(0)
    recorders = Recorders()
    monkeypatch.setattr("fastdiff.capture.what_forbids", lambda *_: None)
    monkeypatch.setattr(Captures.__init__, "__defaults__", (recorders,))
    return recorders


def options(model: Diffusion, sampler: Any) -> dict[str, Any]:
    churned = isinstance(sampler, functools.partial)
    return {"sampler": sampler, "steps": model.process.karras(5, churn=2.0) if churned else 5}


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS, ids=NAMES)
@pytest.mark.parametrize("net", [Net, unet])
def test_captured_steps_give_the_bits_of_the_plain_loop(taped, net, sampler):
    model = ScoreSDE(net(), "vp", "v", clip=1.0)
    how = options(model, sampler)
    kinds = set(model.step_table(how["sampler"], how["steps"]).kinds)
    for seed in range(2):
        for more in ({}, {"return_trajectory": True}):
            want = model.sample(SHAPE, seed=seed, graph=False, **how, **more)
            assert torch.equal(model.sample(SHAPE, seed=seed, **how, **more), want)
    assert len(taped) == 1 and taped.recorded == len(kinds)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "steps"),
    [(lambda n: DDPM(n, "cosine", 9), None), (lambda n: NCSN(n, levels=3, clip=1.0), 7)],
)
def test_inputs_of_a_run_are_copied_into_its_capture(taped, make, steps):
    model = make(Net())
    n = len(model.step_table(model.default_sampler, steps))
    seen: list[Tensor] = []
    for salt in range(2):
        y, x_T = ops.normal((2,), salt), ops.normal(SHAPE, 5 + salt)
        noise = ops.normal((n, *SHAPE), 7 + salt)
        runs: list[dict[str, Any]] = [
            {"seed": salt, "sample_ids": [salt, 9]},
            {"seed": salt, "y": y},
            {"x_T": x_T, "noise": noise},
            {"x_T": x_T, "noise": lambda k, noise=noise: noise[k]},
            {"seed": salt, "guidance": 1.5 + salt, "y": y, "uncond": {"y": 0 * y}},
        ]
        for run in runs:
            got = model.sample(SHAPE, steps=steps, **run)
            assert torch.equal(got, model.sample(SHAPE, steps=steps, graph=False, **run)), sorted(run)
            seen.append(got)
    assert len(taped) == taped.recorded == 4  # a tensor and a function of noise are one kind of run
    assert len({t.sum().item() for t in seen}) == len(seen) - 2
    assert all(torch.equal(a, b) for a, b in zip(seen, [t.clone() for t in seen], strict=True))


@pytest.mark.slow
def test_editing_and_estimates_are_captured(taped):
    model = DDPM(Net(), "cosine", 9)
    image, known = ops.normal(SHAPE, 3).clamp(-1, 1), torch.tensor([1.0, 1.0, 0.0, 0.0])[None, None, None]
    for run in (
        {"x_init": image, "strength": 0.5},
        {"x_init": image, "known": known},
        {"x_init": image, "known": known, "resample": 2, "sampler": "ddim"},
        {"stop_at": 3, "sampler": "dpm++2m"},
    ):
        told: list[list[Tensor]] = [[], []]
        ends = []
        for graph, estimates in zip((None, False), told, strict=True):

            def tell(k: int, level: float, x: Tensor, x0hat: Tensor | None, estimates: Any = estimates) -> None:
                estimates += [x.clone()] if x0hat is None else [x.clone(), x0hat.clone()]

            ends.append(model.sample(SHAPE, seed=1, graph=graph, callback=tell, **run))
        assert torch.equal(*ends) and len(told[0]) > 4
        assert all(torch.equal(a, b) for a, b in zip(*told, strict=True))


@pytest.mark.slow
def test_guidance_of_every_kind_is_captured(taped):
    """A rule is a kind of its own; the weights of the steps, and who the other network is beside, are not."""
    model, weak = DDPM(Net(), "cosine", 6), Net()
    y = ops.normal((2,), 1)
    branches = {"y": y, "uncond": {"y": 0 * y}}
    runs: list[dict[str, Any]] = [
        {"guidance": [1.0, 2.0, 3.0, 0.0, -1.0, 1.5], **branches},
        {"guidance": lambda k, level: 0.5 * k, **branches},
        {"guidance": 2.0, "guidance_rule": Rescaled(0.5), **branches},
        {"guidance": 2.0, "guidance_rule": Projected(radius=1.0, momentum=-0.5), **branches},
        {"guidance": 2.0, "y": y, "uncond": weak},
        {"guidance": 3.0, "y": y, "uncond": weak},
    ]
    for seed in range(2):
        for run in runs:
            want = model.sample(SHAPE, seed=seed, graph=False, **run)
            assert torch.equal(model.sample(SHAPE, seed=seed, **run), want), run
    assert len(taped) == taped.recorded == 4


def test_a_replay_runs_no_python_of_the_model(taped):
    model = DDPM(Net(), "cosine", 9)
    model.sample(SHAPE, seed=0)
    assert model.model.calls == WARM_UP + 1
    model.sample(SHAPE, seed=1, steps=9)
    assert model.model.calls == WARM_UP + 1 and taped[0].replayed == 9 - WARM_UP + 9


def test_a_result_is_the_callers_own(taped):
    model, states = DDPM(Net(), "cosine", 9), []
    first = model.sample(SHAPE, seed=0)
    kept = first.clone()
    out = torch.empty(SHAPE)
    second = model.sample(SHAPE, seed=1, out=out, callback=lambda k, level, x: states.append(x.clone()))
    assert second is out and torch.equal(first, kept) and not torch.equal(first, second)
    assert len(states) == 9 and torch.equal(states[-1], out)
    changed = model.sample(SHAPE, seed=1, callback=lambda k, level, x: x.zero_())
    plain = model.sample(SHAPE, seed=1, callback=lambda k, level, x: x.zero_(), graph=False)
    assert torch.equal(changed, plain)


@pytest.mark.slow
def test_a_capture_follows_its_weights_and_is_dropped_when_they_move(taped):
    model = DDPM(unet(), "cosine", 9)

    def same() -> None:
        assert torch.equal(model.sample(SHAPE, seed=2), model.sample(SHAPE, seed=2, graph=False))

    same()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * ops.normal(tuple(p.shape), 3) if p.ndim else 0.01)
    same()
    assert taped.recorded == 1
    model.model.conv_in.weight.data = model.model.conv_in.weight.data.clone()
    same()
    assert taped.recorded == 2
    model.model.conv_out = copy.deepcopy(model.model.conv_out)
    same()
    assert taped.recorded == 3


def test_the_most_recent_captures_are_kept(taped):
    model = DDPM(Net(), "cosine", 9)
    for batch in range(1, MOST_CAPTURES + 2):
        model.sample((batch, *SHAPE[1:]), seed=0)
    assert len(taped) == MOST_CAPTURES + 1
    model.sample((2, *SHAPE[1:]), seed=0)
    assert len(taped) == MOST_CAPTURES + 1
    model.sample((1, *SHAPE[1:]), seed=0)
    assert len(taped) == MOST_CAPTURES + 2
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not other._captures.kept and torch.equal(other.sample(SHAPE, seed=1), model.sample(SHAPE, seed=1))


@pytest.mark.slow
def test_runs_of_one_kind_at_a_time_have_captures_of_their_own(taped):
    """A run in the callback of another, in this thread and another one; and one after a run that broke off."""
    model = DDPM(Net(), "cosine", 9)
    want = [model.sample(SHAPE, seed=seed, graph=False) for seed in range(2)]
    model.sample(SHAPE, seed=2)  # captured
    within: list[Tensor] = []

    def sample() -> None:
        within.append(model.sample(SHAPE, seed=1))

    def here(k: int, level: float, x: Tensor) -> None:
        sample()

    def there(k: int, level: float, x: Tensor) -> None:
        other = threading.Thread(target=sample)
        other.start()
        other.join()

    for callback in (here, there):
        assert torch.equal(model.sample(SHAPE, seed=0, callback=callback), want[0])
    assert len(within) == 18 and all(torch.equal(one, want[1]) for one in within)
    assert len(taped) == 3  # the runs within share one, at most

    def breaks(k: int, level: float, x: Tensor) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        model.sample(SHAPE, seed=0, callback=breaks)
    assert torch.equal(model.sample(SHAPE, seed=1), want[1])


class Looks(Net):
    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, gain: float = 1.0) -> Tensor:
        return super().forward(x, t) * (1.0 if t.sum().item() > 0 else 0.5)


def test_a_step_that_cannot_be_captured_runs_without(taped):
    model = DDPM(Looks(), "cosine", 9)
    want = model.sample(SHAPE, seed=4, graph=False)
    with pytest.warns(UserWarning, match="graph: the step cannot be captured and runs without .*reads a number"):
        assert torch.equal(model.sample(SHAPE, seed=4), want)
    with pytest.raises(RuntimeError, match="reads a number"):
        DDPM(Looks(), "cosine", 9).sample(SHAPE, seed=4, graph=True)


def test_a_run_within_inference_mode_and_one_after_it(taped):
    model = DDPM(unet(), "cosine", 5)
    want = model.sample(SHAPE, seed=1, graph=False)
    with torch.inference_mode():
        assert torch.equal(model.sample(SHAPE, seed=1), want)
    assert torch.equal(model.sample(SHAPE, seed=1), want) and taped.recorded == 1
    assert taped[0].followed == 2  # each run waits for the one before


class Positions(Net):
    """Keeps a table for images of one size."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if getattr(self, "table", x[:0]).shape != x.shape[2:]:
            self.table = torch.arange(x[0, 0].numel()).reshape(x.shape[2:]).float()
        return super().forward(x, t) + 0.01 * self.table


def test_what_a_graph_reads_stays(monkeypatch, taped):
    class Forgetful(Tape):  # as a graph is, it keeps no tensor
        def record(self, function):
            return function

    monkeypatch.setattr(Captures.__init__, "__defaults__", (Forgetful,))
    model = DDPM(Positions(), "cosine", 4)
    model.sample(SHAPE, seed=0)
    table = weakref.ref(model.model.table)
    model.sample((2, 3, 8, 8), seed=0)
    assert model.model.table.shape == (8, 8) and table() is not None


@dataclass(frozen=True)
class Waiting:
    """A rule that writes into its memory before it waits for the device."""

    remembers = True

    def __call__(self, x: Tensor, cond: Tensor, uncond: Tensor, row: Any, memory: Tensor) -> Tensor:
        memory.add_(cond)
        return cond + 0.1 * memory * float(memory.isfinite().all())


def test_a_rule_that_waits_is_applied_once_in_each_step(taped):
    model, weak = DDPM(Net(), "cosine", 6), Net()
    how = {"seed": 2, "guidance": 1.0, "guidance_rule": Waiting(), "uncond": weak}
    want = model.sample(SHAPE, graph=False, y=torch.ones(2), **how)
    with pytest.warns(UserWarning, match="reads a number"):
        assert torch.equal(model.sample(SHAPE, y=torch.ones(2), **how), want)


class Refusing(Tape):
    def record(self, function):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")


def test_a_failed_capture_changes_nothing(monkeypatch, taped):
    monkeypatch.setattr(Captures.__init__, "__defaults__", (Refusing,))
    model = DDPM(Net(), "cosine", 9)
    want = model.sample(SHAPE, seed=4, graph=False)
    with pytest.warns(UserWarning, match=r"graph: the step cannot .* \(operation not permitted\)"):
        assert torch.equal(model.sample(SHAPE, seed=4), want)
    assert torch.equal(model.sample(SHAPE, seed=4), want)


def test_what_forbids_a_capture():
    plain, compiled = DDPM(Net()), DDPM(Net())
    compiled.compile(backend="eager")
    state = torch.get_rng_state()
    for changed, said in (
        ({}, "graph: expected a model on CUDA, got one on cpu"),
        ({"sampler": "ode"}, "sampler: 'ode' chooses its own steps"),
    ):
        with pytest.raises(ValueError, match=said):
            plain.sample(SHAPE, graph=True, **changed)
    with pytest.raises(ValueError, match="graph: expected a model that is not compiled"):
        compiled.sample(SHAPE, graph=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_forbids_a_capture_on_cuda(monkeypatch):
    net = Net()
    with FakeTensorMode():  # as if there were a GPU
        for name, parameter in net.conv.named_parameters():
            setattr(net.conv, name, nn.Parameter(torch.empty(parameter.shape, device="cuda")))
    model = ScoreSDE(net)
    assert what_forbids(model, {"y": None, "gain": 1.0}, 2) is None
    assert "at least one sample" in str(what_forbids(model, {}, 0))
    assert "plain values as arguments of the model, got y" in str(what_forbids(model, {"y": [1]}, 2))
    handle = net.conv.register_forward_hook(lambda *_: None)
    assert "without forward hooks" in str(what_forbids(model, {}, 2))
    handle.remove()
    # As torch.compile and Module.compile leave a network.
    wrapped = ScoreSDE(nn.Sequential(OrderedDict(_orig_mod=net)))
    assert "a network that is not compiled" in str(what_forbids(wrapped, {}, 2))
    net.conv._compiled_call_impl = net.conv.forward
    assert "a network that is not compiled" in str(what_forbids(model, {}, 2))
    net.conv._compiled_call_impl = None
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    assert "no autocast" in str(what_forbids(model, {}, 2))
    net.conv.bias = nn.Parameter(torch.zeros(3))
    monkeypatch.undo()
    assert "all weights on one device" in str(what_forbids(model, {}, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("sampler", SAMPLERS, ids=NAMES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_cuda_graphs_give_the_bits_of_the_plain_loop(sampler, dtype):
    torch.manual_seed(0)
    model = ScoreSDE(unet().cuda(), "vp", "v", clip=1.0)
    how = options(model, sampler) | {"dtype": dtype}
    with fastdiff.backend("triton"):
        for seed in range(3):
            for more in ({}, {"return_trajectory": True}):
                want = model.sample(SHAPE, seed=seed, graph=False, **how, **more)
                assert torch.equal(model.sample(SHAPE, seed=seed, graph=True, **how, **more), want)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.01)
        assert torch.equal(model.sample(SHAPE, seed=0, **how), model.sample(SHAPE, seed=0, graph=False, **how))
    assert len(model._captures.kept) == 1


@pytest.mark.gpu
def test_a_model_that_waits_for_the_gpu_runs_without_a_graph():
    torch.manual_seed(0)
    model = DDPM(Looks().cuda(), "cosine", 9)
    want = model.sample(SHAPE, seed=4, graph=False)
    with pytest.warns(UserWarning, match="graph: the step cannot be captured"):
        assert torch.equal(model.sample(SHAPE, seed=4), want)
    assert torch.equal(model.sample(SHAPE, seed=4), want)
    good = DDPM(Net().cuda(), "cosine", 9)
    assert torch.equal(good.sample(SHAPE, seed=4, graph=True), good.sample(SHAPE, seed=4, graph=False))
