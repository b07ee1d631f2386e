"""Training: masks, weights that a user gives, and model arguments whose names are taken."""

import functools
import re

import pytest
import torch
from small_models import SHAPE, Pointwise
from torch import Tensor, nn

from fastdiff import DDPM, NCSN, Edm, FlowMatching, ScoreSDE
from fastdiff.objective import min_snr, weights
from fastdiff.schedule import cosine

MODELS = {
    "ddpm": (DDPM, {"schedule": "cosine", "timesteps": 50, "objective": "v"}),
    "ncsn": (NCSN, {}),
    "vp": (ScoreSDE, {"sde": "vp"}),
    "flow": (FlowMatching, {}),
    "edm": (Edm, {}),
}
every = pytest.mark.parametrize("name", MODELS)
T = {"ddpm": [1, 20, 30, 50], "ncsn": [1, 3, 5, 10]}


def made(name: str, **options: object) -> DDPM:
    formulation, fixed = MODELS[name]
    return formulation(Pointwise(), **{**fixed, **options})


def times(name: str) -> Tensor:
    return torch.tensor(T[name]) if name in T else torch.tensor([0.1, 0.3, 0.5, 0.9])


def data() -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(5)) * 2 - 1


@every
def test_masked_training_leaves_out_what_is_padded(name: str) -> None:
    model, t = made(name), times(name)
    whole = model(data(), t=t, seed=1, reduction="none")
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0]).reshape(4, 1, 1, 1)
    assert torch.equal(model(data(), t=t, seed=1, mask=mask, reduction="none"), whole * mask.flatten())
    left, right = (torch.tensor(side).expand(SHAPE) for side in ([1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]))
    parts = [model(data(), t=t, seed=1, mask=part, reduction="none") for part in (left, right)]
    assert torch.allclose(parts[0] + parts[1], whole, rtol=1e-6)
    changed = torch.where(right == 1, 7.0, data())  # of a network that sees one pixel at a time
    assert torch.equal(model(changed, t=t, seed=1, mask=left, reduction="none"), parts[0])


@pytest.mark.parametrize("loss", ["hybrid", "vlb"])
def test_the_bound_has_no_mask(loss: str) -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.cat((x, x), 1)

    model = DDPM(Twice(), timesteps=50, schedule="cosine", objective="v", variance="learned", loss=loss)
    with pytest.raises(ValueError, match=rf"^mask: expected None with loss '{loss}'"):
        model(data(), mask=torch.ones(SHAPE))


@every
def test_weights_of_a_user_multiply_the_loss(name: str) -> None:
    t = times(name)
    plain = made(name, weighting=lambda levels, objective: torch.ones_like(levels.sigma))
    twice = made(name, weighting=lambda levels, objective: 2 + levels.sigma)
    sigma = plain.process.at(t.double()).sigma.float()
    losses = [model(data(), t=t, seed=1, reduction="none") for model in (plain, twice)]
    assert torch.allclose(losses[1], (2 + sigma) * losses[0], rtol=1e-5)
    with pytest.raises(ValueError, match=r"^config: expected weighting given by name, got a function$"):
        _ = twice.config


@every
def test_learned_weights_have_a_gradient(name: str) -> None:
    """w = exp(-a): dL/da = -L, and each loss is that of the weights as they are now."""
    learned = nn.Parameter(torch.tensor(0.0))
    model = made(name, weighting=lambda levels, objective: (-learned).exp() * torch.ones_like(levels.sigma))
    for value in (0.0, 1.0):
        learned.data.fill_(value)
        loss = model(data(), t=times(name), seed=1)
        (slope,) = torch.autograd.grad(loss, learned)
        torch.testing.assert_close(slope, -loss.detach())
        with torch.no_grad():
            torch.testing.assert_close(model(data(), t=times(name), seed=1), loss.detach())


@pytest.mark.slow
def test_learned_weights_are_no_constant_of_a_graph() -> None:
    learned = nn.Parameter(torch.tensor(0.0))
    model = made("ddpm", weighting=lambda levels, objective: (-learned).exp() * torch.ones_like(levels.sigma))
    loss = torch.compile(lambda x: model(x, t=times("ddpm"), seed=1), backend="eager", fullgraph=True)(data())
    torch.testing.assert_close(torch.autograd.grad(loss, learned)[0], -loss.detach())


@pytest.mark.parametrize("objective", ["eps", "x0", "v"])
def test_min_snr_of_another_gamma(objective: str) -> None:
    schedule = cosine(50)
    snr = schedule.snr[1:-1]
    # What an error of the prediction is worth in x_0.
    share = {"eps": 1 / snr, "x0": torch.ones_like(snr), "v": 1 / (1 + snr)}[objective]
    for gamma in (1.0, 3.0):
        w = weights(schedule, objective, functools.partial(min_snr, gamma=gamma))[1:-1]
        assert torch.allclose(w, torch.minimum(snr, torch.tensor(gamma)) * share, rtol=1e-9)
        assert torch.equal(weights(schedule, objective, f"min_snr:{gamma:g}")[1:-1], w)
    assert torch.equal(weights(schedule, objective, min_snr)[1:], weights(schedule, objective, "min_snr")[1:])
    with pytest.raises(ValueError, match=r"^gamma: expected a number above 0, got 0$"):
        min_snr(schedule, objective, gamma=0)


def test_a_gamma_in_a_name() -> None:
    net = torch.nn.Identity()
    for made in (DDPM(net, weighting="min_snr:3"), Edm(net, weighting="min_snr:3")):
        assert type(made)(net, **made.config).weighting == "min_snr:3"
    for wrong in ("min_snr:", "min_snr:0", "min_snr:nan", "min_snr:x"):
        with pytest.raises(ValueError, match="weighting: expected min_snr:GAMMA with a number above 0, got 'min_snr:"):
            DDPM(net, weighting=wrong)


@pytest.mark.parametrize(("result", "got"), [(torch.ones(3), "(3,)"), (1.0, "float")])
def test_weights_of_the_wrong_shape(result: object, got: str) -> None:
    model = made("ddpm", weighting=lambda levels, objective: result)
    with pytest.raises(ValueError, match=re.escape(f"weighting: expected shape (51,) of the function, got {got}")):
        model(data())


# --- model arguments that are named as ours ---------------------------------------------------------------------


class Named(nn.Module):
    """Adds arguments whose names `sample` and the loss have too."""

    def forward(self, x: Tensor, t: Tensor, *, noise: Tensor, steps: float = 0.0, other: float = 0.0) -> Tensor:
        return 0.1 * x + noise + steps + other


def test_model_kwargs_of_any_name() -> None:
    ddpm, image = DDPM(Named(), "cosine", timesteps=50, objective="v"), data()
    zeros, ones = torch.zeros(SHAPE), torch.ones(SHAPE)
    far = ddpm(image, seed=1, t=5, model_kwargs={"noise": ones})
    assert far != ddpm(image, seed=1, t=5, model_kwargs={"noise": zeros})
    assert far != ddpm(image, seed=1, t=5, other=1.0, model_kwargs={"noise": ones})
    for method in ("predict_x0", "p_sample"):
        call = functools.partial(getattr(ddpm, method), image, 5, **({"seed": 1} if method == "p_sample" else {}))
        assert not torch.equal(call(model_kwargs={"noise": zeros}), call(model_kwargs={"noise": -ones}))
    assert torch.allclose(ddpm.predict(image, 5, "v", model_kwargs={"noise": ones}), 0.1 * image + 1)
    options = {"sampler": "ddim", "steps": 3}
    states = [ddpm.encode(image, steps=3, model_kwargs={"noise": zeros, "steps": s}) for s in (0.0, 0.1)]
    assert not torch.equal(*states)
    back = ddpm.sample(SHAPE, x_T=states[1], model_kwargs={"noise": zeros, "steps": 0.1}, **options)
    assert not torch.equal(back, ddpm.sample(SHAPE, x_T=states[1], model_kwargs={"noise": zeros}, **options))
    bounds = [ddpm.bits_per_dim(image, seed=1, model_kwargs={"noise": n}).total for n in (zeros, ones)]
    assert not torch.equal(*bounds)
    between = ddpm.interpolate(image, -image, t=5, seed=1, model_kwargs={"noise": zeros})
    assert not torch.equal(between, ddpm.interpolate(image, -image, t=5, seed=1, model_kwargs={"noise": ones}))
    guided = ddpm.sample(
        SHAPE, seed=1, guidance=2.0, uncond={"noise": zeros}, model_kwargs={"noise": 0.1 * ones}, **options
    )
    direct = ddpm.sample(SHAPE, seed=1, model_kwargs={"noise": 0.2 * ones}, **options)
    assert torch.allclose(guided, direct, atol=1e-5)


def test_model_kwargs_are_given_once() -> None:
    ddpm = DDPM(Named(), "cosine", timesteps=50, objective="v")
    with pytest.raises(ValueError, match=r"^model_kwargs: expected other once, got it by name too$"):
        ddpm.sample(SHAPE, other=1.0, model_kwargs={"other": 2.0})
    with pytest.raises(TypeError, match=r"^model_kwargs: expected a dict, got list$"):
        ddpm(data(), model_kwargs=[1])
