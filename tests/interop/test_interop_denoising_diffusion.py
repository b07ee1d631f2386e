"""GaussianDiffusion against that of denoising-diffusion-pytorch, side by side from the same generators."""

import copy
import importlib
import inspect
import io
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from strategies import BACKENDS, DEVICE
from torch import Tensor, nn

import fastdiff
from benchmarks.torchvision_standin import stock as import_stock
from fastdiff.interop import denoising_diffusion as fused
from fastdiff.interop.denoising_diffusion import GaussianDiffusion

stock = import_stock()
EXAMPLE = Path(__file__).parents[2] / "examples" / "denoising_diffusion_training.py"
SIZE = (4, 6)
SHAPE = (3, 2, *SIZE)
# Four roundings of a number of 16, about the largest that the tests have.
PARITY = 2e-6
METHODS = (
    "forward", "p_losses", "q_sample", "p_sample", "p_sample_loop", "ddim_sample", "sample", "interpolate",
    "q_posterior", "model_predictions", "p_mean_variance", "predict_start_from_noise", "predict_noise_from_start",
    "predict_v", "predict_start_from_v", "noise_assignment", "random_times",
)  # fmt: skip


class Net(nn.Module):
    """A small network with the attributes and the call of their Unet, which draws a number as dropout does."""

    channels = out_dim = 2

    def __init__(self, self_condition: bool = False) -> None:
        super().__init__()
        self.self_condition = self_condition
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4 if self_condition else 2, 2, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        assert t.shape == (len(x),) and t.dtype == torch.int64
        if self.self_condition:
            x = torch.cat((torch.zeros_like(x) if x_self_cond is None else x_self_cond, x), 1)
        return self.conv(x) * torch.cos(t / 7)[:, None, None, None] + 0.1 * torch.rand(1, device=x.device)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "image_size": SIZE,
        "timesteps": draw(st.sampled_from((21, 50, 1000))),
        "objective": draw(st.sampled_from(("pred_noise", "pred_x0", "pred_v"))),
        "beta_schedule": draw(st.sampled_from(("linear", "cosine", "sigmoid"))),
        "auto_normalize": draw(st.booleans()),
        "min_snr_loss_weight": draw(st.booleans()),
        "min_snr_gamma": draw(st.sampled_from((1, 5))),
        "offset_noise_strength": draw(st.sampled_from((0.0, 0.1))),
    }


def both(self_condition: bool = False, mixin: type = object, **config: Any) -> list[Any]:
    """The stock diffusion and ours, of equal networks; mixin: of subclasses with its methods."""
    config = {"image_size": SIZE, "timesteps": 50} | config
    classes = [stock.GaussianDiffusion, GaussianDiffusion]
    if mixin is not object:
        classes = [type("Derived", (mixin, c), {}) for c in classes]
    return [c(Net(self_condition), **config) for c in classes]


def data(n: int, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(n)]


def seeded(call: Any, seed: int = 5) -> tuple[Any, Any]:
    """(result, state of all generators afterwards)."""
    torch.manual_seed(seed)
    random.seed(seed)
    result = call()
    on_gpu = torch.cuda.get_rng_state().tolist() if DEVICE.type == "cuda" else None
    return result, (torch.get_rng_state().tolist(), on_gpu, random.getstate())


def same(got: Any, want: Any, exact: bool = True) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    if exact:
        assert torch.equal(got, want)
    else:
        error = (got - want).detach().abs() / want.detach().abs().div(16).clamp(min=1)
        assert float(error.max()) <= PARITY, float(error.max())


def same_calls(pair: list[Any], call: Any, exact: bool = True) -> None:
    """call(diffusion) gives the same tensors and leaves the generators in the same state."""
    (want, state), (got, our_state) = (seeded(lambda d=d: call(d)) for d in pair)
    assert our_state == state
    if isinstance(want, Tensor):
        want, got = (want,), (got,)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        same(a, b, exact)


def same_losses(pair: list[Any], call: Any) -> None:
    """The same losses, and the same gradients relative to the largest."""
    results = []
    for d in pair:
        d.zero_grad()
        loss, state = seeded(lambda d=d: call(d))
        loss.sum().backward()
        results.append((loss.detach(), torch.cat([p.grad.flatten() for p in d.parameters()]), state))
    (want, want_grad, state), (got, got_grad, our_state) = results
    assert our_state == state
    assert got.shape == want.shape
    assert float((got - want).abs().max()) <= PARITY * float(want.abs().max())
    assert float((got_grad - want_grad).abs().max()) <= PARITY * float(want_grad.abs().max())
    assert float(want_grad.abs().max()) > 0


# --- parity -----------------------------------------------------------------------------------------------------


def test_signatures() -> None:
    for name in METHODS:
        got, want = (
            [(p.name, p.kind, p.default) for p in inspect.signature(getattr(c, name)).parameters.values()]
            for c in (GaussianDiffusion, stock.GaussianDiffusion)
        )
        assert got == want, name
    got, want = (
        {p.name: p.default for p in inspect.signature(c).parameters.values() if p.name != "schedule_fn_kwargs"}
        for c in (GaussianDiffusion, stock.GaussianDiffusion)
    )
    assert got == want


@given(configs())
def test_state_dict(config: dict[str, Any]) -> None:
    """The same buffers to the bit, which load strictly both ways; what is loaded is what is computed with."""
    theirs, ours = both(**config)
    buffers = dict(theirs.named_buffers())
    assert len(buffers) == 13 and list(buffers) == [n for n, _ in ours.named_buffers()]
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for name, buffer in ours.named_buffers():
        same(buffer, buffers[name])
    other = "cosine" if config["beta_schedule"] == "linear" else "linear"
    (x, z), t = data(2), torch.tensor([0, 7, config["timesteps"] - 1])
    for source, target in ((0, 1), (1, 0)):
        pair = both(**config)
        changed = both(**(config | {"beta_schedule": other}))
        pair[target].q_sample(x, t, z)  # from tables that loading has to drop
        pair[target].load_state_dict(changed[source].state_dict(), strict=True)
        same(pair[target].q_sample(x, t, z), changed[0].q_sample(x, t, z))


@pytest.mark.parametrize(
    ("schedule", "kwargs"), [("cosine", {"s": 0.02}), ("sigmoid", {"start": -2, "end": 2, "tau": 0.7})]
)
def test_schedule_arguments(schedule: str, kwargs: dict[str, Any]) -> None:
    theirs, ours = both(beta_schedule=schedule, schedule_fn_kwargs=kwargs)
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        same(a, b)


@given(configs(), st.booleans(), st.integers(0, 9), st.sampled_from((None, 0.0, 0.3)))
def test_losses(config: dict[str, Any], self_condition: bool, seed: int, strength: float | None) -> None:
    """Of forward with what it draws, and of p_losses with what it is given."""
    pair = both(self_condition, **config)
    images, z = data(2, seed)
    same_losses(pair, lambda d: d(images.sigmoid()))
    same_losses(pair, lambda d: d(images.sigmoid(), loss_reduction="none", offset_noise_strength=strength))
    t = torch.tensor([0, config["timesteps"] - 1, 10])
    same_losses(pair, lambda d: d(images, times=t))
    same_losses(pair, lambda d: d.p_losses(images, t, z.clone(), strength, "none"))


@given(configs(), st.booleans(), st.integers(0, 9))
def test_parts_of_a_step(config: dict[str, Any], self_condition: bool, seed: int) -> None:
    """To the bit, of one level for each sample."""
    pair = both(self_condition, **config)
    x, y, cond = data(3, seed)
    last = config["timesteps"] - 1
    for levels in ((0, 1, last), (last, 12, 3)):
        t = torch.tensor(levels)
        for name in ("predict_start_from_noise", "predict_start_from_v", "predict_noise_from_start", "predict_v"):
            same_calls(pair, lambda d, name=name, t=t: getattr(d, name)(x, t, y))
        same_calls(pair, lambda d, t=t: d.q_posterior(x, y, t))
        same_calls(pair, lambda d, t=t: d.q_sample(x, t))
        for clip, rederive in ((False, False), (True, False), (True, True)):
            same_calls(pair, lambda d, t=t, c=clip, r=rederive: d.model_predictions(x, t, cond, c, r))
        for clip in (True, False):
            same_calls(pair, lambda d, t=t, c=clip: d.p_mean_variance(x, t, cond, clip_denoised=c))
    for level in (0, 1, last):
        same_calls(pair, lambda d, level=level: d.p_sample(x, level, cond))


@given(configs(), st.booleans(), st.sampled_from((1, 2, 7, 20)), st.sampled_from((0.0, 0.5, 1.0)))
def test_sampling(config: dict[str, Any], self_condition: bool, steps: int, eta: float) -> None:
    """The whole walks, to the bit; DDIM in one pass, as on a GPU, to rounding."""
    config |= {"timesteps": min(config["timesteps"], 50)}
    pair = both(self_condition, **config, sampling_timesteps=steps, ddim_sampling_eta=eta)
    same_calls(pair, lambda d: d.p_sample(*data(1), 9))
    same_calls(pair, lambda d: d.p_sample_loop(SHAPE, return_all_timesteps=True))
    same_calls(pair, lambda d: d.ddim_sample(SHAPE, return_all_timesteps=True))
    same_calls(pair, lambda d: d.sample(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused.diffusion, "STOCK_ORDER", ())
        same_calls(pair, lambda d: d.ddim_sample(SHAPE, return_all_timesteps=True), exact=False)
    x1, x2 = data(2)
    same_calls(pair, lambda d: d.interpolate(x1, x2, t=steps, lam=0.3))


def test_defaults_of_sampling() -> None:
    pair = both(timesteps=21)
    assert all(not d.is_ddim_sampling and d.sampling_timesteps == 21 for d in pair)
    same_calls(pair, lambda d: d.sample(1))
    same_calls(pair, lambda d: d.sample(batch_size=2, return_all_timesteps=True))
    same_calls(pair, lambda d: d.interpolate(*data(2)))


def test_attributes_changed_between_calls() -> None:
    """sampling_timesteps, eta, objective and offset strength are read when they are needed, as in stock."""
    pair = both(sampling_timesteps=5)
    for changes in ({}, {"sampling_timesteps": 9}, {"ddim_sampling_eta": 1.0}, {"objective": "pred_x0"}):
        for d in pair:
            vars(d).update(changes)
        same_calls(pair, lambda d: d.sample(2))
        same_calls(pair, lambda d: d.p_sample(data(1)[0], 3))
    for d in pair:
        d.offset_noise_strength = 0.5
    same_losses(pair, lambda d: d(data(1)[0]))


@pytest.mark.parametrize("how", ["replaced", "in place"])
def test_buffers_changed_between_calls(how: str) -> None:
    pair, x, t = both(sampling_timesteps=5), data(1)[0], torch.tensor([3, 20, 49])
    for name in ("alphas_cumprod", "posterior_mean_coef1", "loss_weight", "sqrt_alphas_cumprod"):
        for d in pair:
            d.sample(1), d.p_sample(x, 3), d.q_sample(x, t), d(x)
            if how == "replaced":
                setattr(d, name, getattr(d, name) * 0.9)
            else:
                getattr(d, name).mul_(0.9)
        same_calls(pair, lambda d: d.sample(2))
        same_calls(pair, lambda d: d.p_sample(x, 3))
        same_calls(pair, lambda d: d.q_sample(x, t))
        same_losses(pair, lambda d: d(x))


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
def test_copies(objective: str) -> None:
    """A copy and a pickle have their own tables, also where those of the original were in use."""
    pair, x = both(objective=objective), data(1)[0]
    same_calls(pair, lambda d: d.p_sample(x, 3))
    file = io.BytesIO()
    torch.save(pair[1], file)
    file.seek(0)
    for copied in (copy.deepcopy(pair[1]), torch.load(file, weights_only=False)):
        same_calls([pair[0], copied], lambda d: d.p_sample(x, 3))
        for buffer in copied.buffers():
            buffer.mul_(0.5)
        changed = copy.deepcopy(pair[0])
        for buffer in changed.buffers():
            buffer.mul_(0.5)
        same_calls([changed, copied], lambda d: d.p_sample(x, 3))
        same_calls(pair, lambda d: d.p_sample(x, 3))


def test_other_types() -> None:
    """float64 throughout; half precision of the data; bfloat16 of the network, under autocast."""
    x, z = data(2)
    t = torch.tensor([0, 7, 49])
    pair = both()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        same_calls(pair, lambda d, dtype=dtype: d.q_sample(x.to(dtype), t, z.to(dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        (want, _), (got, _) = (seeded(lambda d=d: d(x)) for d in pair)
        assert got.dtype == want.dtype == torch.float32 and float((got - want).abs().detach()) <= PARITY
        same_calls(pair, lambda d: d.p_sample(x, 3))
    pair = [d.double() for d in pair]
    for call in (
        lambda d: d.q_sample(x.double(), t, z.double()),
        lambda d: d.p_sample(x.double(), 3),
        lambda d: d.q_posterior(x, z.double(), t),
    ):
        same_calls(pair, call)
    same_losses(pair, lambda d: d.p_losses(x.double(), t, z.double()))


def test_gradients_of_a_step() -> None:
    """By x and the weights, as guidance takes them."""
    t = torch.tensor([0, 7, 49])
    for config in ({"objective": o, "beta_schedule": "linear"} for o in ("pred_noise", "pred_x0", "pred_v")):
        for clip in (False, True):
            results = []
            for d in both(**config):
                x = data(1)[0].requires_grad_()
                parts = seeded(lambda d=d, x=x, clip=clip: d.model_predictions(x, t, None, clip, True))[0]
                mean = seeded(lambda d=d, x=x, clip=clip: d.p_mean_variance(x, t, clip_denoised=clip))[0][0]
                total = sum(part.square().mean() for part in (*parts, mean, d.predict_v(x, t, mean)))
                results.append(torch.autograd.grad(total, [x, *d.model.parameters()]))
            for want, got in zip(*results, strict=True):
                assert float((got - want).abs().max()) <= PARITY * float(want.abs().max())


def test_compiled() -> None:
    """The loss and a step are one graph each, and give what they give uncompiled."""
    pair, x = both(), data(1)[0]
    for call in (lambda d, x: d(x), lambda d, x: d.p_mean_variance(x, torch.tensor([0, 7, 49]))[0]):
        torch.compiler.reset()
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        (want, state), (got, our_state) = seeded(lambda c=call: c(pair[0], x)), seeded(lambda c=compiled: c(pair[1], x))
        same(got, want, exact=False)
        assert our_state == state


# --- what differs, and what subclasses do ---------------------------------------------------------------------------


def test_offset_noise_leaves_the_callers_tensor() -> None:
    (x, z), t = data(2), torch.tensor([0, 7, 49])
    theirs, ours = both(offset_noise_strength=0.5)
    given_noise = z.clone()
    ours.p_losses(x, t, given_noise)
    assert torch.equal(given_noise, z)
    theirs.p_losses(x, t, given_noise)
    assert not torch.equal(given_noise, z)


def test_immiscible() -> None:
    """The assignment is stock's; the loss is that of the assigned noise, which stock's is not."""
    (x, z), t = data(2), torch.tensor([5, 7, 49])
    z = x.roll(1, 0) + 0.1 * z  # so that the assignment is no identity
    pair = both(immiscible=True, objective="pred_noise")
    same_calls(pair, lambda d: d.noise_assignment(x, z))
    same_calls(pair, lambda d: d.q_sample(x, t, z))
    plain = both(objective="pred_noise")
    assigned = z[pair[1].noise_assignment(x, z)]
    assert not torch.equal(assigned, z)
    calls: list[int] = []
    assign = pair[1].noise_assignment
    pair[1].noise_assignment = lambda *args: (calls.append(1), assign(*args))[1]
    same_losses([plain[0], pair[1]], lambda d: d.p_losses(x, t, assigned if d is plain[0] else z))
    assert len(calls) == 1
    same_losses(both(immiscible=True, objective="pred_x0"), lambda d: d.p_losses(x, t, z))


def test_infinite_predictions() -> None:
    """Clipped by stock; NaN here, as in every sampler of fastdiff, so that a model that has diverged is seen."""
    theirs, ours = both()
    for d in (theirs, ours):
        d.model.conv.bias.data.fill_(torch.inf)
    assert bool(theirs.p_sample(data(1)[0], 3)[1].abs().eq(1).all())
    assert bool(ours.p_sample(data(1)[0], 3)[1].isnan().all())


class ChangedPredictions:
    def model_predictions(self, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        noise, start = super().model_predictions(x, t, *args, **kwargs)  # type: ignore[misc]
        return stock.ModelPrediction(noise * 0.9, start * 0.8)


class ChangedMean:
    def p_mean_variance(self, x: Tensor, t: Tensor, *args: Any, clip_denoised: bool, **kwargs: Any) -> Any:
        mean, *rest = super().p_mean_variance(x, t, *args, clip_denoised=clip_denoised, **kwargs)  # type: ignore[misc]
        return mean * 0.9, *rest


class ChangedPosterior:
    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Any:
        mean, variance, log_variance = super().q_posterior(x_start, x_t, t)  # type: ignore[misc]
        return mean, variance, log_variance - 1


class ChangedStep:
    def p_sample(self, x: Tensor, t: int, x_self_cond: Tensor | None = None) -> Any:
        img, start = super().p_sample(x, t, x_self_cond)  # type: ignore[misc]
        return img * 0.9, start


class ChangedNoising:
    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        return 0.9 * super().q_sample(x_start, t, noise)  # type: ignore[misc]


@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize(
    "mixin", [ChangedPredictions, ChangedMean, ChangedPosterior, ChangedStep, ChangedNoising], ids=lambda m: m.__name__
)
def test_overrides(mixin: type, self_condition: bool) -> None:
    pair = both(self_condition, mixin, sampling_timesteps=5, ddim_sampling_eta=0.5)
    x1, x2 = data(2)
    same_calls(pair, lambda d: d.p_sample_loop(SHAPE))
    same_calls(pair, lambda d: d.ddim_sample(SHAPE))
    same_calls(pair, lambda d: d.interpolate(x1, x2, t=5))
    for seed in (0, 1):
        same_losses(pair, lambda d, seed=seed: seeded(lambda: d(x1), seed)[0])


def test_overrides_of_one_object() -> None:
    pair, x = both(), data(1)[0]
    for d in pair:
        d.model_predictions = lambda *args, d=d, **kw: stock.ModelPrediction(
            *(0.8 * p for p in type(d).model_predictions(d, *args, **kw))
        )
    same_calls(pair, lambda d: d.p_sample(x, 3))
    same_calls(pair, lambda d: d.p_sample_loop(SHAPE))


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"objective": "noise"}, "objective"),
        ({"beta_schedule": "quadratic"}, "beta_schedule"),
        ({"image_size": (4, 4, 4)}, "image_size"),
        ({"sampling_timesteps": 51}, "sampling_timesteps"),
        ({"sampling_timesteps": 0}, "sampling_timesteps"),
        ({"timesteps": 20, "beta_schedule": "linear"}, "timesteps"),
    ],
)
def test_wrong_configurations(config: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        GaussianDiffusion(Net(), **({"image_size": SIZE, "timesteps": 50} | config))


def test_wrong_networks_and_images() -> None:
    net = Net()
    net.out_dim = 4
    with pytest.raises(ValueError, match="model"):
        GaussianDiffusion(net, image_size=SIZE)
    type("Derived", (GaussianDiffusion,), {})(net, image_size=SIZE)  # e.g. of learned variance, as in stock
    net = Net()
    net.random_or_learned_sinusoidal_cond = True
    with pytest.raises(ValueError, match="model"):
        GaussianDiffusion(net, image_size=SIZE)
    ours, x = both()[1], data(1)[0]
    for wrong in (x[..., :-1], x[0]):
        with pytest.raises(ValueError, match="img"):
            ours(wrong)
    with pytest.raises(ValueError, match="loss_reduction"):
        ours(x, loss_reduction="sum")
    with pytest.raises(ValueError, match="x2"):
        ours.interpolate(x, x[:1])
    with pytest.raises(ValueError, match="t"):
        ours.q_sample(x, torch.tensor([0, 1, 50]))
    ours.objective = "score"
    with pytest.raises(ValueError, match="objective"):
        ours(x)


# --- kernels, trainer, installation -----------------------------------------------------------------------------------


@pytest.mark.interpret
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_kernels(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU to the bit, also of many steps; by Triton to rounding, DDIM in one pass."""
    exact = backend == "cpu"
    monkeypatch.setattr(fused.diffusion, "STOCK_ORDER", ("cpu",) if exact else ())
    config = {"timesteps": 30, "sampling_timesteps": 20} if exact else {"timesteps": 3, "sampling_timesteps": 2}
    pair, x = [d.to(DEVICE) for d in both(**config, ddim_sampling_eta=0.5)], data(1)[0].to(DEVICE)
    with fastdiff.backend(backend):
        same_losses(pair, lambda d: d(x))
        same_calls(pair, lambda d: d.p_sample(x, 1), exact)
        same_calls(pair, lambda d: d.p_sample_loop(SHAPE), exact)
        same_calls(pair, lambda d: d.ddim_sample(SHAPE), exact)


def test_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example, and the script that a user had before: one import apart, the same weights and images."""
    monkeypatch.setattr(stock, "cpu_count", lambda: 0)  # no worker processes
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i}.png")
    source = EXAMPLE.read_text()
    assert source.count("fastdiff.interop") == 1
    saved, images = [], []
    for library in ("denoising_diffusion_pytorch", "fastdiff.interop.denoising_diffusion"):
        out = tmp_path / library
        argv = [str(folder), "--out", str(out), "--steps", "3", "--size", "8", "--dim", "8", "--every", "3"]
        monkeypatch.setattr(sys, "argv", [EXAMPLE.name, *argv, "--timesteps", "30", "--sampling-timesteps", "3"])
        scope: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(source.replace("fastdiff.interop.denoising_diffusion", library), EXAMPLE, "exec"), scope)
        assert type(scope["diffusion"]).__module__.startswith(library)
        saved.append(torch.load(out / "model-1.pt", weights_only=True))
        images.append(np.asarray(Image.open(out / "sample-1.png"), dtype=int))
        scope["trainer"].load(1)
    start = scope["Unet"](dim=8, dim_mults=(1, 2, 4))
    scope["GaussianDiffusion"](start, image_size=8, timesteps=30).load_state_dict(saved[0]["model"], strict=True)
    stock.GaussianDiffusion(start, image_size=8, timesteps=30).load_state_dict(saved[1]["model"], strict=True)
    for part in ("model", "ema"):
        for key, want in saved[0][part].items():
            # Adam moves a weight by 2.4e-4 in all, and divides by the gradient's size, where it is next to nothing too.
            torch.testing.assert_close(saved[1][part][key], want, rtol=0, atol=1e-6)
    assert saved[0]["step"] == saved[1]["step"] == 3
    assert images[0].shape == images[1].shape == (16, 16, 3)
    assert np.abs(images[0] - images[1]).max() <= 1


def forget(monkeypatch: pytest.MonkeyPatch) -> str:
    """The package's name, once nothing of it counts as imported."""
    for name in [n for n in sys.modules if n.startswith(fused.__name__)]:
        monkeypatch.delitem(sys.modules, name)
    return fused.__name__


@pytest.mark.parametrize("missing", ["scipy.optimize", "tqdm.auto"])
def test_missing_package(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = forget(monkeypatch)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"fastdiff-kernels\[denoising-diffusion\]"):
        importlib.import_module(name)
    monkeypatch.undo()


def test_their_package_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    name = forget(monkeypatch)
    monkeypatch.setitem(sys.modules, "denoising_diffusion_pytorch", None)
    assert importlib.import_module(name).GaussianDiffusion is not GaussianDiffusion
