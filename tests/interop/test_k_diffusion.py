"""Denoisers D(x, sigma): ours for k-diffusion's samplers, and theirs for ours."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from fastdiff import DDPM, NCSN, Edm, FlowMatching, ScoreSDE, steps
from fastdiff.interop.k_diffusion import as_k_diffusion

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


def start() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def sample_euler(denoise: nn.Module, x: Tensor, sigmas: Tensor) -> Tensor:
    """x + (s' - s) (x - D(x; s)) / s."""
    for s, after in itertools.pairwise(sigmas):
        x = x + (after - s) * (x - denoise(x, s.expand(len(x)))) / s
    return x


def sample_heun(denoise: nn.Module, x: Tensor, sigmas: Tensor) -> Tensor:
    """Karras et al. 2022, algorithm 1."""
    for s, after in itertools.pairwise(sigmas):
        slope = (x - denoise(x, s.expand(len(x)))) / s
        end = x + (after - s) * slope
        x = end if after == 0 else x + (after - s) / 2 * (slope + (end - denoise(end, after.expand(len(x)))) / after)
    return x


def sample_dpmpp_2m(denoise: nn.Module, x: Tensor, sigmas: Tensor) -> Tensor:
    """Lu et al. 2022, algorithm 2, with alpha = 1."""
    before = last = None
    for s, after in itertools.pairwise(sigmas):
        x0 = denoise(x, s.expand(len(x)))
        h = (s / after).log()
        best = x0 if before is None or after == 0 else x0 + (x0 - before) * h / (2 * last)
        x = after / s * x - torch.expm1(-h) * best
        before, last = x0, h
    return x


THEIRS = {"ddim": sample_euler, "heun": sample_heun, "dpm++2m": sample_dpmpp_2m}


@EACH
@pytest.mark.parametrize("source", ["formulas", "k-diffusion"])
def test_their_samplers_with_our_models(name, source):
    """As ours with the same levels and start, by the formulas and by the library."""
    theirs = dict(THEIRS)
    if source == "k-diffusion":
        library = pytest.importorskip("k_diffusion.sampling")
        theirs = {ours: getattr(library, rule.__name__) for ours, rule in THEIRS.items()}
    model, z = MODELS[name](), start()
    grid = model.process.karras(8, sigma_min=0.05, sigma_max=20.0)
    made, levels = grid
    sigmas = (made.sigma / made.alpha)[levels]
    for ours, rule in theirs.items():
        with torch.no_grad():
            want = rule(as_k_diffusion(model), sigmas[0] * z, sigmas)
        got = model.sample(SHAPE, sampler=ours, steps=grid, x_T=made.alpha[levels[0]] * sigmas[0] * z)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


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
        for ours, rule in THEIRS.items():
            with torch.no_grad():
                want = rule(module, 80 * z, sigmas)
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
