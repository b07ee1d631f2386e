"""The rows marked ✓ of docs/coming-from.md: other libraries' samplers and schedules are ours under another name."""

import functools
import itertools

import pytest
import torch
from torch import Tensor, nn

from fastdiff import DDPM, FlowMatching, ScoreSDE, schedule, steps

T = 1000
SHAPE = (2, 1, 4, 4)
# A run of ten steps with states up to 20: some tens of float32 roundings.
FLOAT32 = {"rtol": 1e-5, "atol": 2e-5}


class Network(nn.Module):
    """Predicts eps as a multiple of x that grows with t."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.weight * x * (1 + t.reshape(-1, 1, 1, 1) / T)


@pytest.fixture
def diffusers():
    return pytest.importorskip("diffusers")


def run(scheduler, network: nn.Module, x_T: Tensor, n: int = 10) -> tuple[Tensor, list[int]]:
    """(x_0 by a scheduler of diffusers in n steps, the levels that it visits, in our count)."""
    scheduler.set_timesteps(n)
    x = x_T
    if hasattr(scheduler, "init_noise_sigma") and scheduler.init_noise_sigma != 1:
        x = x * (scheduler.sigmas[0] ** 2 + 1).sqrt()  # its state is x / alpha
    with torch.no_grad():
        for t in scheduler.timesteps:
            pred = network(scheduler.scale_model_input(x, t), t.expand(len(x)))
            x = scheduler.step(pred, t, x).prev_sample
    return x, [int(t) + 1 for t in dict.fromkeys(scheduler.timesteps.tolist())] + [0]  # PNDM visits one twice


@pytest.mark.parametrize(
    ("name", "options", "ours"),
    [
        ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}, "ddim"),
        ("DDIMScheduler", {"clip_sample": False}, "ddim"),
        ("DPMSolverMultistepScheduler", {"beta_start": 1e-4, "beta_end": 0.02}, "dpm++2m"),
        ("UniPCMultistepScheduler", {}, functools.partial(steps.unipc, order=2)),
        ("UniPCMultistepScheduler", {"solver_order": 3}, "unipc"),  # with "bh1" theirs is NaN at sigma = 0
        ("LMSDiscreteScheduler", {"timestep_spacing": "leading"}, "lms"),
        ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}, "plms"),
    ],
)
def test_deterministic_samplers_of_diffusers(diffusers, name, options, ours):
    x_T = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    network = Network()
    want, levels = run(getattr(diffusers, name)(num_train_timesteps=T, **options), network, x_T)
    got = DDPM(network, clip=None).sample(SHAPE, sampler=ours, steps=levels, x_T=x_T)
    torch.testing.assert_close(got, want, **FLOAT32)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_of_diffusers(diffusers, order):
    """It ends at timestep 0, our level 1, and keeps its order there in 15 steps and more."""
    x_T = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    network = Network()
    want, levels = run(diffusers.DEISMultistepScheduler(num_train_timesteps=T, solver_order=order), network, x_T, 15)
    ours = functools.partial(steps.deis, order=order)
    got = DDPM(network, clip=None).sample(SHAPE, sampler=ours, steps=[*levels[:-1], 1], x_T=x_T)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)  # they subtract logarithms in float32


def test_the_default_levels_of_ddim(diffusers):
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=T)
    scheduler.set_timesteps(50)
    assert (scheduler.timesteps + 1).tolist() == list(range(981, 0, -20))
    ours = steps.make_steps(DDPM(Network()).process, "ddim", 50, "eps", None).levels
    assert ours.tolist() == list(range(1000, -1, -20))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_euler_ancestral_is_ddim_with_noise(eta):
    """One step of k-diffusion's sample_euler_ancestral, in float64, on x / alpha over sigma / alpha."""
    linear = schedule.linear(T)
    levels = torch.tensor([800, 650])
    (t, s), ratio = levels.tolist(), linear.sigma / linear.alpha
    x0hat, x, z = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    up = min(ratio[s], eta * (ratio[s] ** 2 * (ratio[t] ** 2 - ratio[s] ** 2) / ratio[t] ** 2) ** 0.5)
    down = (ratio[s] ** 2 - up**2) ** 0.5
    y = x / linear.alpha[t]
    want = linear.alpha[s] * (y + (y - x0hat) / ratio[t] * (down - ratio[t]) + up * z)

    tables = [steps.ddim(linear, levels, "x0", None, eta)]
    if eta == 1:
        tables.append(steps.ancestral(linear, levels, "x0", None))
    for table in tables:
        row = dict(zip(("a", "b", "c", "d", "e", "f"), table.rows[0], strict=False))
        torch.testing.assert_close(row["c"] * x0hat + row["d"] * x + row["f"] * z, want)


def test_variance_types_of_ddpm(diffusers):
    for theirs, ours in (("fixed_small", "posterior"), ("fixed_large", "beta")):
        scheduler = diffusers.DDPMScheduler(num_train_timesteps=T, variance_type=theirs)
        rows = steps.ancestral(schedule.linear(T), torch.tensor([500, 499]), "eps", None, ours).rows
        # float32 tables of diffusers lose digits in 1 - alpha_bar.
        assert rows[0, 5].item() ** 2 == pytest.approx(float(scheduler._get_variance(499)), rel=1e-4)


def test_heun_is_edms_sampler():
    """Karras et al. 2022, algorithm 1, for a denoiser D(x, sigma) and VE."""

    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))

        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            share = 1 / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)
            return share * x.tanh() + (1 - share) * self.mean

    denoise = Denoiser()
    x_T = 50 * torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    n, low, high, rho = 9, 0.01, 50.0, 7.0
    sigmas = [(high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(n)] + [
        0.0
    ]
    x = x_T
    with torch.no_grad():
        for sigma, following in itertools.pairwise(sigmas):
            slope = (x - denoise(x, torch.full((2,), sigma))) / sigma
            new = x + (following - sigma) * slope
            if following:
                slope = slope / 2 + (new - denoise(new, torch.full((2,), following))) / following / 2
                new = x + (following - sigma) * slope
            x = new
    model = ScoreSDE(denoise, "ve", objective="x0", sigma_min=low, sigma_max=high)
    got = model.sample(SHAPE, sampler="heun", steps=n, x_T=x_T)
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("theirs", "ours", "options"),
    [("linear", "linear", {}), ("squaredcos_cap_v2", "cosine", {}),
     ("scaled_linear", "scaled_linear", {"beta_start": 0.00085, "beta_end": 0.012})],
)  # fmt: skip
def test_schedules_of_diffusers(diffusers, theirs, ours, options):
    betas = diffusers.DDPMScheduler(num_train_timesteps=T, beta_schedule=theirs, **options).betas
    # float32 against float64, betas below 1.
    torch.testing.assert_close(betas.double(), schedule.SCHEDULES[ours](T).betas, rtol=1e-6, atol=1e-7)


def test_the_sigmoid_of_diffusers_is_another_curve(diffusers):
    betas = diffusers.DDPMScheduler(num_train_timesteps=T, beta_schedule="sigmoid").betas.double()
    assert (betas - schedule.sigmoid(T).betas).abs().max() > 0.1


@pytest.mark.parametrize(("name", "atol"), [("linear", 1e-8), ("cosine", 1e-7), ("sigmoid", 1e-5)])
def test_schedules_of_lucidrains(name, atol):
    interop = pytest.importorskip("fastdiff.interop.denoising_diffusion")

    class Stand(nn.Module):
        channels = out_dim = 3
        self_condition = random_or_learned_sinusoidal_cond = False

    theirs = interop.GaussianDiffusion(Stand(), image_size=4, timesteps=T, beta_schedule=name).betas
    torch.testing.assert_close(theirs.double(), schedule.SCHEDULES[name](T).betas, rtol=0, atol=atol)


def test_methods_and_attributes_of_lucidrains():
    interop = pytest.importorskip("fastdiff.interop.denoising_diffusion")

    class Stand(nn.Module):
        channels = out_dim = 3
        self_condition = random_or_learned_sinusoidal_cond = False

    theirs, ours = interop.GaussianDiffusion(Stand(), image_size=4, beta_schedule="linear"), DDPM(Stand())
    assert theirs.num_timesteps == ours.timesteps == T
    torch.testing.assert_close(theirs.alphas_cumprod.double(), ours.schedule.alpha_bar[1:], **FLOAT32)
    x, noise, t = torch.rand(SHAPE), torch.rand(SHAPE), torch.tensor([0, T - 1])
    torch.testing.assert_close(theirs.q_sample(x, t, noise), ours.q_sample(x, t + 1, noise=noise), **FLOAT32)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_of_flow_matching(diffusers, shift):
    """On the levels that the pipelines of Stable Diffusion 3 and FLUX give."""
    n, network = 10, Network()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - k / n for k in range(n)])
    x = x_T = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t.expand(len(x))), t, x).prev_sample
    got = FlowMatching(network, shift=shift).sample(SHAPE, steps=n, x_T=x_T)
    torch.testing.assert_close(got, x, **FLOAT32)
