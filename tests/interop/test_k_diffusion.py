"""Denoisers D(x, sigma): ours for k-diffusion's samplers, and theirs for ours."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from k_samplers import RULES
from tiny_run import TINY
from torch import Tensor, nn

from fastdiff import DDPM, NCSN, Edm, FlowMatching, ScoreSDE, steps
from fastdiff.diffusion import Diffusion
from fastdiff.interop.k_diffusion import as_k_diffusion
from fastdiff.training import Options, build, digits

SHAPE = (3, 2, 4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, x: Tensor, c: Tensor, shift: float = 0.0) -> Tensor:
        wave = torch.sin((1 + c.double().abs()).log())
        return 0.5 * self.linear(torch.tanh(x)) + 0.1 * wave.view(-1, *[1] * (x.ndim - 1)) + shift


MODELS = {
    "ddpm": lambda: DDPM(Net(), "linear", 1000, "eps", clip=None),
    "ddpm, v": lambda: DDPM(Net(), "cosine", 1000, "v", clip=None),
    "ncsn": lambda: NCSN(Net(), 50.0, 0.01, 100, "eps"),
    "vp": lambda: ScoreSDE(Net(), "vp", "v"),
    "flow": lambda: FlowMatching(Net()),
    "edm": lambda: Edm(Net(), 0.7),
}
EACH = pytest.mark.parametrize("name", MODELS)
SOURCES = pytest.mark.parametrize("source", ["formulas", "k-diffusion"])


def start() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def paths(source: str) -> dict[str, Any]:
    """The rules by our names, as functions of (denoise, x, sigmas, noise) to the states after each step."""
    if source == "formulas":
        return {
            name: lambda *given, rule=rule, name=name: list(rule(*given[: 4 if "sde" in name else 3]))
            for name, rule in RULES.items()
        }
    library = pytest.importorskip("k_diffusion.sampling")

    def path(rule: Any, random: bool, denoise: nn.Module, x: Tensor, sigmas: Tensor, noise: Tensor) -> list[Tensor]:
        states, drawn = [], iter(noise)
        given = {"noise_sampler": lambda *_: next(drawn)} if random else {}
        end = rule(denoise, x, sigmas, callback=lambda told: states.append(told["x"]), disable=True, **given)
        return [*states[1:], end]

    return {name: partial(path, getattr(library, rule.__name__), "sde" in name) for name, rule in RULES.items()}


@EACH
@SOURCES
def test_their_samplers_with_our_models(name, source):
    """As ours with the same levels, start and noise, by the formulas and by the library."""
    theirs, model, z = paths(source), MODELS[name](), start()
    grid = model.process.karras(8, sigma_min=0.05, sigma_max=20.0)
    made, levels = grid
    sigmas = (made.sigma / made.alpha)[levels]
    noise = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for ours, rule in theirs.items():
        with torch.no_grad():
            want = rule(as_k_diffusion(model), sigmas[0] * z, sigmas, noise)[-1]
        given = {"noise": noise} if "sde" in ours else {}
        got = model.sample(SHAPE, sampler=ours, steps=grid, x_T=made.alpha[levels[0]] * sigmas[0] * z, **given)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def trained() -> Diffusion:
    """A U-Net of the digits, trained for a second."""
    torch.manual_seed(0)
    model = build(Options(**{**TINY, "timesteps": 1000}))
    images = digits()[0]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for k in range(28):
        loss = model(images[32 * k : 32 * k + 32], seed=k)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    return model


@pytest.mark.slow
@SOURCES
def test_every_step_with_a_trained_network(trained, source):
    """In float32 each state is theirs within 1e-5, from the same start and with the same noise."""
    grid = trained.process.karras(10, sigma_min=0.05, sigma_max=20.0)
    made, levels = grid
    shape, generator = (4, 1, 8, 8), torch.Generator().manual_seed(3)
    sigmas = (made.sigma / made.alpha)[levels].float()
    scale = made.alpha[levels].float()
    noise, z = torch.randn(10, *shape, generator=generator), torch.randn(shape, generator=generator)
    for ours, rule in paths(source).items():
        with torch.no_grad():
            want = rule(as_k_diffusion(trained), sigmas[0] * z, sigmas, noise)
        given = {"noise": noise} if "sde" in ours else {}
        x_T = scale[0] * sigmas[0] * z
        path = trained.sample(shape, sampler=ours, steps=grid, x_T=x_T, return_trajectory=True, **given)
        ends = [*range(2, len(path) - 1, 2), -1] if ours == "heun" else range(1, len(path))
        assert len(ends) == len(want) == 10
        for k, (at, state) in enumerate(zip(ends, want, strict=True), 1):
            torch.testing.assert_close(path[at], scale[k] * state, rtol=0, atol=1e-5)


def test_the_denoiser_of_ddpm_is_x_minus_sigma_eps():
    """D(x; sigma) = x - sigma eps(x / sqrt(1 + sigma^2), t - 1) at a level (Karras et al. 2022, table 1)."""
    model, x = MODELS["ddpm"](), start()
    made, levels = model.schedule, torch.tensor([3, 400, 1000])
    sigma = (made.sigma / made.alpha)[levels]
    column = sigma.view(-1, 1, 1)
    want = x - column * model.model(x / (1 + column**2).sqrt(), (levels - 1).double())
    torch.testing.assert_close(as_k_diffusion(model)(x, sigma), want, rtol=1e-8, atol=1e-8)
    shifted = as_k_diffusion(model)(x, sigma, shift=0.5)
    torch.testing.assert_close(shifted, want - 0.5 * column, rtol=1e-8, atol=1e-8)
    assert torch.equal(as_k_diffusion(model)(x, sigma, model_kwargs={"shift": 0.5}), shifted)
    model.clip = 0.1
    torch.testing.assert_close(as_k_diffusion(model)(x, sigma), want.clamp(-0.1, 0.1), rtol=1e-8, atol=1e-8)


@pytest.mark.slow
def test_their_denoisers_with_our_samplers():
    """A module, and a function; every sampler runs, and the deterministic ones are the published rules."""
    edm, z = MODELS["edm"](), start()
    module = as_k_diffusion(edm)
    for given in (module, lambda x, sigma: module(x.double(), sigma.double())):
        model = ScoreSDE.from_edm(given)
        assert (model.process.sigma_min, model.process.sigma_max) == (0.002, 80.0)
        dtype = torch.float64 if given is module else torch.float32
        made, levels = model.process.karras(9)
        sigmas = made.sigma[levels]
        for ours in ("ddim", "heun", "dpm++2m"):
            with torch.no_grad():
                *_, want = RULES[ours](module, 80 * z, sigmas)
            got = model.sample(SHAPE, sampler=ours, steps=(made, levels), x_T=80 * z)
            assert got.dtype == dtype
            close = 1e-9 if given is module else 2e-5  # of states up to 200, rounded to float32
            torch.testing.assert_close(got.double(), want, rtol=close, atol=close)
    for name in steps.SAMPLERS:
        if name != "annealed_langevin":
            assert model.sample(SHAPE, sampler=name, steps=4).isfinite().all()
    assert ScoreSDE.from_edm(module, 0.01, 5.0).prior_std() == pytest.approx(5.0)


def test_wrong_arguments():
    with pytest.raises(TypeError, match="denoiser: expected a fastdiff Denoiser, got Net"):
        as_k_diffusion(Net())
    with pytest.raises(TypeError, match="denoiser: expected a module or a function, got int"):
        ScoreSDE.from_edm(3)
    with pytest.raises(ValueError, match="sigma_min, sigma_max: expected 0 < sigma_min < sigma_max"):
        ScoreSDE.from_edm(Net(), 5.0, 1.0)
    module = as_k_diffusion(MODELS["ddpm"]())
    with pytest.raises(ValueError, match=r"sigma: expected levels from 0\.01 to 157\.4"):
        module(start(), torch.full((3,), 400.0))
    with pytest.raises(ValueError, match="sigma: expected a batch dimension"):
        module(start(), torch.tensor(1.0))
    assert math.isfinite(module(start(), torch.full((3,), 1.0)).sum().item())
