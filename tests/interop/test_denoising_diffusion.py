"""GaussianDiffusion against that of denoising-diffusion-pytorch, side by side from the same generators."""

import copy
import importlib
import inspect
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusions import PARITY, SHAPE, both, configs, data, same, same_calls, same_losses, seeded, stock
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from strategies import BACKENDS, DEVICE

import fastdiff
from fastdiff.interop import denoising_diffusion as fused
from fastdiff.interop.denoising_diffusion import GaussianDiffusion

EXAMPLE = Path(__file__).parents[2] / "examples" / "denoising_diffusion_training.py"
METHODS = (
    "forward", "p_losses", "q_sample", "p_sample", "p_sample_loop", "ddim_sample", "sample", "interpolate",
    "q_posterior", "model_predictions", "p_mean_variance", "predict_start_from_noise", "predict_noise_from_start",
    "predict_v", "predict_start_from_v", "noise_assignment", "random_times",
)  # fmt: skip


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
        patch.setattr(fused.discrete, "STOCK_ORDER", ())
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


@pytest.mark.slow
def test_compiled() -> None:
    """The loss and a step are one graph each, and give what they give uncompiled."""
    pair, x = both(), data(1)[0]
    for call in (lambda d, x: d(x), lambda d, x: d.p_mean_variance(x, torch.tensor([0, 7, 49]))[0]):
        torch.compiler.reset()
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        (want, state), (got, our_state) = seeded(lambda c=call: c(pair[0], x)), seeded(lambda c=compiled: c(pair[1], x))
        same(got, want, exact=False)
        assert our_state == state


# --- kernels, trainer, installation -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.interpret
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_kernels(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU to the bit, also of many steps; by Triton to rounding, DDIM in one pass."""
    exact = backend == "cpu"
    monkeypatch.setattr(fused.discrete, "STOCK_ORDER", ("cpu",) if exact else ())
    config = {"timesteps": 30, "sampling_timesteps": 20} if exact else {"timesteps": 3, "sampling_timesteps": 2}
    pair, x = [d.to(DEVICE) for d in both(**config, ddim_sampling_eta=0.5)], data(1)[0].to(DEVICE)
    with fastdiff.backend(backend):
        same_losses(pair, lambda d: d(x))
        same_calls(pair, lambda d: d.p_sample(x, 1), exact)
        same_calls(pair, lambda d: d.p_sample_loop(SHAPE), exact)
        same_calls(pair, lambda d: d.ddim_sample(SHAPE), exact)


@pytest.mark.slow
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
    # The next import is also written into the parent package, and is taken out again.
    monkeypatch.setattr(sys.modules["fastdiff.interop"], "denoising_diffusion", fused)
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
