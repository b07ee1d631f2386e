"""torch.func and forward-mode AD through the methods of every formulation and drop-in; tests/ops has the operations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, ScoreSdeVeScheduler
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

from fastdiff import DDPM, NCSN, ScoreSDE
from fastdiff.interop import diffusers as ours
from fastdiff.interop.denoising_diffusion import GaussianDiffusion
from fastdiff.support import transforms

pytestmark = pytest.mark.filterwarnings("ignore:schedule. alpha_bar_T")
SHAPE = (2, 3, 4, 4)
GENERATOR = torch.Generator().manual_seed(0)
# Made before any transform is active.
X, V = (torch.randn(SHAPE, dtype=torch.float64, generator=GENERATOR) / 3 for _ in range(2))
LEVELS, TIMES = torch.tensor([3, 5]), torch.tensor([0.3, 0.7], dtype=torch.float64)


class Net(nn.Module):
    channels = out_dim = 3
    self_condition = False

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, outputs, 1)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.conv(x) * (1 + t.reshape(-1, 1, 1, 1).to(x.dtype) / 1000)


MODELS = {
    "ddpm": lambda: DDPM(Net(), "cosine", 12, "v"),
    "vlb": lambda: DDPM(Net(), "linear", 12, loss="vlb"),
    "learned": lambda: DDPM(Net(6), "linear", 12, variance="learned", loss="vlb"),
    "ncsn": lambda: NCSN(Net(), levels=6),
    "vp": lambda: ScoreSDE(Net(), "vp"),
    "ve": lambda: ScoreSDE(Net(), "ve", "x0"),
}
METHODS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "loss": lambda m, x, t: m(x, t=t, seed=1, reduction="none"),
    "loss by noise": lambda m, x, t: m(V, t=t, noise=x),
    "q_sample": lambda m, x, t: m.q_sample(x, t, seed=1),
    "q_sample by noise": lambda m, x, t: m.q_sample(V, t, noise=x),
    "predict": lambda m, x, t: m.predict(x, t, "v"),
    "predict_x0": lambda m, x, t: m.predict_x0(x, t),
    "q_step": lambda m, x, t: m.q_step(x, t, seed=1),
    "q_posterior": lambda m, x, t: m.q_posterior(V, x, t)[0],
    "p_sample": lambda m, x, t: m.p_sample(x, t, seed=1),
    "p_sample by noise": lambda m, x, t: m.p_sample(V, t, noise=x),
}
CASES = [
    (model, method) for model in MODELS for method in METHODS
    if hasattr({"vp": ScoreSDE, "ve": ScoreSDE, "ncsn": NCSN}.get(model, DDPM), method.split()[0]) or "loss" in method
]  # fmt: skip
DROP_IN: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "loss": lambda g, x, t: g.p_losses(x, t, noise=V, loss_reduction="none"),
    "q_sample": lambda g, x, t: g.q_sample(x, t, noise=V),
    "p_mean_variance": lambda g, x, t: g.p_mean_variance(x, t)[0],
    "noise of predictions": lambda g, x, t: g.model_predictions(x, t).pred_noise,
    "x_0 of predictions": lambda g, x, t: g.model_predictions(x, t, None, True, True).pred_x_start,
    "predict_noise_from_start": lambda g, x, t: g.predict_noise_from_start(x, t, V),
    "predict_v": lambda g, x, t: g.predict_v(x, t, V),
    "q_posterior": lambda g, x, t: g.q_posterior(x, V, t)[0],
}


def agrees(f: Callable[[Tensor], Tensor], rough: bool) -> None:
    """Forward mode is the limit of differences, grad is backward, vmap is a loop. rough: losses are float32."""
    step, rtol, atol = (1e-2, 3e-2, 1e-4) if rough else (1e-5, 1e-5, 1e-7)
    value, tangent = jvp(f, (X,), (V,))
    torch.testing.assert_close(value, f(X))
    limit = (f(X + step * V) - f(X - step * V)).double() / (2 * step)
    torch.testing.assert_close(tangent.double(), limit, rtol=rtol, atol=atol * (1 + limit.abs().max().item()))
    assert tangent.abs().max() > 0
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(f(forward_ad.make_dual(X, V))).tangent
    torch.testing.assert_close(dual, tangent)
    leaf = X.clone().requires_grad_()
    f(leaf).square().sum().backward()
    torch.testing.assert_close(grad(lambda x: f(x).square().sum())(X), leaf.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(vmap(f)(torch.stack((X, V))), torch.stack((f(X), f(V))), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "method"), CASES)
def test_methods(model, method):
    torch.manual_seed(0)
    made = MODELS[model]().double()
    t = TIMES if isinstance(made, ScoreSDE) else LEVELS
    agrees(lambda x: METHODS[method](made, x, t), rough="loss" in method)


@pytest.mark.parametrize("model", MODELS)
def test_losses_by_the_weights(model):
    """jvp along a direction is the product of the gradient with it."""
    torch.manual_seed(0)
    made = MODELS[model]().double()
    t = TIMES if isinstance(made, ScoreSDE) else LEVELS
    weights = {name: p.detach() for name, p in made.named_parameters()}
    loss = lambda weights: functional_call(made, weights, (X,), {"t": t, "seed": 1})  # noqa: E731
    along = {name: torch.ones_like(p) for name, p in weights.items()}
    want = sum(g.sum() for g in grad(loss)(weights).values())
    torch.testing.assert_close(jvp(loss, (weights,), (along,))[1].double(), want, rtol=1e-4, atol=1e-5)


def test_sampling_asks_for_no_list_of_a_tensor_within_a_transform(monkeypatch):
    """PyTorch 2.7 has none there."""
    made, levels, tolist, x = MODELS["ddpm"](), [], Tensor.tolist, X.float()
    seen = lambda k, level, x: levels.append(level)  # noqa: E731
    draw = lambda x: made.sample(SHAPE, steps=2, sampler="ddim", x_T=x, callback=seen)  # noqa: E731
    want = draw(x)
    refused = lambda t: pytest.fail("a list of a tensor") if transforms.active() else tolist(t)  # noqa: E731
    monkeypatch.setattr(Tensor, "tolist", refused)
    torch.testing.assert_close(jvp(draw, (x,), (V.float(),))[0], want)
    assert levels[:2] == levels[2:]


@pytest.mark.parametrize("method", DROP_IN)
@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
def test_gaussian_diffusion(objective, method):
    torch.manual_seed(0)
    made = GaussianDiffusion(Net(), image_size=4, timesteps=30, objective=objective).double()
    agrees(lambda x: DROP_IN[method](made, x, torch.tensor([3, 17])), rough=method == "loss")


STEPS: dict[str, tuple[type, Callable[[Any, Tensor, Tensor], Tensor]]] = {
    "ddpm add_noise": (DDPMScheduler, lambda s, x, v: s.add_noise(x, v, torch.tensor([5, 500]))),
    "ddpm add_noise by noise": (DDPMScheduler, lambda s, x, v: s.add_noise(v, x, torch.tensor([5, 500]))),
    "ddpm get_velocity": (DDPMScheduler, lambda s, x, v: s.get_velocity(x, v, torch.tensor([5, 500]))),
    "ddpm step": (DDPMScheduler, lambda s, x, v: s.step(v, 500, x, generator=torch.Generator()).prev_sample),
    "ddpm step by output": (DDPMScheduler, lambda s, x, v: s.step(x, 500, v, generator=torch.Generator()).prev_sample),
    "ddim step": (DDIMScheduler, lambda s, x, v: s.step(x, 500, v, eta=0.5, variance_noise=v).prev_sample),
    "ddim add_noise": (DDIMScheduler, lambda s, x, v: s.add_noise(x, v, torch.tensor([5, 500]))),
    "ve step_pred": (ScoreSdeVeScheduler, lambda s, x, v: s.step_pred(x, 0.5, v, torch.Generator()).prev_sample),
    "ve step_correct": (ScoreSdeVeScheduler, lambda s, x, v: s.step_correct(x, v, torch.Generator()).prev_sample),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_schedulers(prediction, step):
    """Tangents of stock's."""
    kind, call = STEPS[step]
    results = []
    for made in (kind, getattr(ours, kind.__name__)):
        scheduler = made() if kind is ScoreSdeVeScheduler else made(prediction_type=prediction)
        scheduler.set_timesteps(20)
        if kind is ScoreSdeVeScheduler:
            scheduler.set_sigmas(20)
        results.append(jvp(lambda x, s=scheduler: call(s, x, V.float()), (X.float(),), (V.float(),))[1])
    assert results[0].abs().max() > 0
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
