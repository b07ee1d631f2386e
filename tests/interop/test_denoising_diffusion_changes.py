"""What GaussianDiffusion does otherwise than stock, and what subclasses, objects and other inputs change."""

import copy
import pickle
import types
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from diffusions import SHAPE, SIZE, Net, both, data, same_calls, same_losses, seeded, stock
from torch import Tensor, nn

from fastdiff.interop.denoising_diffusion import GaussianDiffusion, discrete

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


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0"])
def test_overrides_with_assigned_noise(objective: str) -> None:
    """q_sample is called, with the noise that was assigned."""
    (x, z), t = data(2), torch.tensor([5, 7, 49])
    z = x.roll(1, 0) + 0.1 * z
    pair = both(mixin=ChangedNoising, immiscible=True, objective=objective)
    plain = both(mixin=ChangedNoising, objective=objective)[0]
    assigned = z[pair[1].noise_assignment(x, z)]
    same_losses([plain, pair[1]], lambda d: d.p_losses(x, t, assigned.clone() if d is plain else z.clone()))


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


@pytest.mark.slow
@pytest.mark.parametrize("how", ["subclass", "object", "patched class"])
@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
@pytest.mark.parametrize(
    "method",
    [
        "predict_start_from_noise", "predict_start_from_v", "predict_noise_from_start", "predict_v",
        "model_predictions", "p_mean_variance", "q_posterior", "p_sample", "q_sample",
    ],
)  # fmt: skip
def test_every_override(method: str, objective: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it returns counts wherever stock calls it."""
    config = {"objective": objective, "timesteps": 21, "sampling_timesteps": 4, "ddim_sampling_eta": 0.5}

    def changed(original: Any) -> Any:
        def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            if isinstance(result, Tensor):
                return 0.9 * result
            parts = [0.9 * part for part in result]
            return stock.ModelPrediction(*parts) if method == "model_predictions" else tuple(parts)

        return replacement

    pair = []
    for kind in (stock.GaussianDiffusion, GaussianDiffusion):
        replacement = changed(getattr(kind, method))
        if how == "subclass":
            kind = type("Derived", (kind,), {method: replacement})
        elif how == "patched class":
            monkeypatch.setattr(kind, method, replacement)
        pair.append(kind(Net(), image_size=SIZE, **config))
        if how == "object":
            setattr(pair[-1], method, types.MethodType(replacement, pair[-1]))
    (x, z), t = data(2), torch.tensor([0, 7, 20])
    same_calls(pair, lambda d: d.p_sample_loop(SHAPE), exact=False)
    same_calls(pair, lambda d: d.ddim_sample(SHAPE), exact=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(discrete, "STOCK_ORDER", ())
        same_calls(pair, lambda d: d.ddim_sample(SHAPE), exact=False)
    same_calls(pair, lambda d: d.model_predictions(x, t, None, True, True), exact=False)
    same_losses(pair, lambda d: d.p_losses(x, t, z.clone()))


# --- what stock takes, and changes in place -----------------------------------------------------------------------


class Anything(nn.Module):
    """A network that takes times of any type; `channels` of its output broadcast if they are fewer than the data's."""

    channels = out_dim = 2
    self_condition = False

    def __init__(self, outputs: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, outputs, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        return self.conv(x)


def any_pair(outputs: int = 2, **config: Any) -> list[Any]:
    config = {"image_size": SIZE, "timesteps": 50} | config
    return [kind(Anything(outputs), **config) for kind in (stock.GaussianDiffusion, GaussianDiffusion)]


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
def test_int32_times(objective: str) -> None:
    pair, (x, y) = any_pair(objective=objective), data(2)
    t = torch.tensor([0, 7, 49], dtype=torch.int32)
    for name in ("predict_start_from_noise", "predict_start_from_v", "predict_noise_from_start", "predict_v"):
        same_calls(pair, lambda d, name=name: getattr(d, name)(x, t, y))
    same_calls(pair, lambda d: d.q_posterior(x, y, t))
    same_calls(pair, lambda d: d.q_sample(x, t, y))
    same_calls(pair, lambda d: d.model_predictions(x, t, None, True, True))
    same_calls(pair, lambda d: d.p_mean_variance(x, t))
    same_losses(pair, lambda d: d.p_losses(x, t, y.clone()))
    same_losses(pair, lambda d: d(x, times=t))


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
def test_shapes_that_broadcast(objective: str) -> None:
    """A prediction of one channel, noise and data of one sample."""
    pair, (x, y), t = any_pair(1, objective=objective, sampling_timesteps=4), data(2), torch.tensor([0, 7, 49])
    for a, b in ((x, y[:1]), (x[:1], y), (x, y[:, :1]), (x, y[0])):
        for name in ("predict_start_from_noise", "predict_start_from_v", "predict_noise_from_start", "predict_v"):
            same_calls(pair, lambda d, name=name, a=a, b=b: getattr(d, name)(a, t, b), exact=False)
        same_calls(pair, lambda d, a=a, b=b: d.q_posterior(b, a, t), exact=False)
        same_calls(pair, lambda d, a=a, b=b: d.q_sample(a, t, b), exact=False)
    same_calls(pair, lambda d: d.q_sample(x, t, y.double()), exact=False)
    same_calls(pair, lambda d: d.model_predictions(x, t), exact=False)
    same_losses(pair, lambda d: d.p_losses(x, t, y.clone()))
    same_losses(pair, lambda d: d.p_losses(x, t, y[:1].clone()))
    same_calls(pair, lambda d: d.p_sample(x, 3), exact=False)
    same_calls(pair, lambda d: d.ddim_sample(SHAPE), exact=False)


@pytest.mark.slow
@pytest.mark.parametrize("edit", ["data", "numpy"])
def test_buffers_changed_through_data_and_numpy(edit: str) -> None:
    """Of every buffer that stock reads."""
    (x, z), t = data(2), torch.tensor([3, 20, 49])
    for name, _ in both()[0].named_buffers():
        for objective in ("pred_noise", "pred_v"):
            pair = both(objective=objective, sampling_timesteps=4, ddim_sampling_eta=0.5)
            for changed in (False, True):
                for d in pair if changed else ():
                    buffer = getattr(d, name)
                    factor = 0.95 if name != "posterior_log_variance_clipped" else 1.05
                    buffer.data.mul_(factor) if edit == "data" else np.multiply(
                        buffer.numpy(), np.float32(factor), out=buffer.numpy()
                    )
                same_calls(pair, lambda d: d.p_sample(x, 3))
                same_calls(pair, lambda d: d.ddim_sample(SHAPE))
                same_calls(pair, lambda d: d.model_predictions(x, t, None, True, True))
                same_losses(pair, lambda d: d.p_losses(x, t, z.clone()))


# --- the meta device ----------------------------------------------------------------------------------------------


def losses_of(d: Any) -> Tensor:
    x, z = data(2)
    return seeded(lambda: d.p_losses(x, torch.tensor([3, 20, 49]), z.clone(), loss_reduction="none"))[0].detach()


CONFIG = {"image_size": SIZE, "timesteps": 50, "beta_schedule": "cosine", "min_snr_loss_weight": True}


def materialised(d: Any, whole: Any, way: str) -> None:
    if way == "assigned":
        d.load_state_dict(whole.state_dict(), assign=True)
    else:
        d.to_empty(device="cpu")
        if way == "loaded":
            d.load_state_dict(whole.state_dict())
        else:  # a checkpoint of the network alone
            d.model.load_state_dict(whole.model.state_dict())


@pytest.mark.parametrize("way", ["loaded", "assigned", "network only"])
@pytest.mark.parametrize("inside", [False, True])
def test_built_on_the_meta_device(way: str, inside: bool) -> None:
    """As it is, or inside another module; tables that were in use there are not kept."""
    whole = GaussianDiffusion(Net(), **CONFIG)
    with torch.device("meta"):
        empty = GaussianDiffusion(Net(), **CONFIG)
        x = torch.empty(SHAPE)
        assert empty.q_sample(x, torch.empty(3, dtype=torch.long), x).shape == SHAPE
        assert empty.p_losses(x, torch.empty(3, dtype=torch.long)).shape == ()
    assert all(buffer.is_meta for buffer in empty.buffers())
    wrap = nn.Sequential if inside and way != "network only" else lambda d: d
    materialised(wrap(empty), wrap(whole), way)
    for (name, got), want in zip(empty.named_buffers(), whole.buffers(), strict=True):
        assert torch.equal(got, want), name
    assert torch.equal(losses_of(empty), losses_of(whole))


def test_a_checkpoint_without_buffers_is_loaded_from_the_meta_device() -> None:
    whole = GaussianDiffusion(Net(), **CONFIG)
    weights = {name: value for name, value in whole.state_dict().items() if name.startswith("model.")}
    with torch.device("meta"):
        empty = GaussianDiffusion(Net(), **CONFIG)
    empty.load_state_dict(weights, assign=True, strict=False)
    assert empty.device.type == "cpu" and torch.equal(losses_of(empty), losses_of(whole))
    assert torch.equal(losses_of(copy.deepcopy(pickle.loads(pickle.dumps(empty)))), losses_of(whole))


@pytest.mark.slow
def test_init_empty_weights_and_dispatch(tmp_path: Any) -> None:
    whole = GaussianDiffusion(Net(), **CONFIG)
    torch.save(whole.state_dict(), tmp_path / "all.pt")
    with accelerate.init_empty_weights(include_buffers=True):
        empty = GaussianDiffusion(Net(), **CONFIG)
    loaded = accelerate.load_checkpoint_and_dispatch(empty, str(tmp_path / "all.pt"), device_map={"": "cpu"})
    assert torch.equal(losses_of(loaded), losses_of(whole))


def test_schedules_are_checked_on_the_meta_device() -> None:
    with torch.device("meta"), pytest.raises(ValueError, match="beta_schedule, timesteps: expected betas"):
        GaussianDiffusion(Net(), image_size=SIZE, timesteps=20, beta_schedule="linear")
