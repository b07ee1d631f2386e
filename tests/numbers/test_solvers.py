"""Samplers against plain implementations of the published algorithms, with a curved model; inversion and guidance."""

import functools
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from gaussian import exact
from torch import Tensor, nn

from fastdiff import DDPM, NCSN, ScoreSDE, ops, schedule, steps
from fastdiff.interpolation import slerp
from fastdiff.process import VE, VP, Chain, Process
from fastdiff.rows import columns
from fastdiff.schedule import NoiseSchedule

SHAPE = (3, 2, 5)
pytestmark = pytest.mark.filterwarnings("ignore:schedule. alpha_bar_T")


class Curved(nn.Module):
    """Float64; not affine in x, and different at every level."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.8, dtype=torch.float64))
        self.calls = 0

    def forward(self, x: Tensor, c: Tensor, y: Tensor | float = 0.0) -> Tensor:
        self.calls += 1
        y = y.view(-1, 1, 1) if isinstance(y, Tensor) else y
        return self.scale * torch.tanh(x + 0.3 + y) + 0.2 * torch.sin(c.to(x.dtype)).view(-1, 1, 1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(got: Tensor, want: Tensor, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol)


# --- Karras et al. 2022 -------------------------------------------------------------------------------------------


def edm(
    denoise: Callable[[Tensor, float], Tensor], x: Tensor, sigmas: list[float], churn: float, churn_min: float,
    churn_max: float, noise_scale: float, draws: Callable[[], Tensor],
) -> Tensor:  # fmt: skip
    """Algorithm 2 (algorithm 1 where churn = 0), line by line, for x = x_0 + sigma eps."""
    n = len(sigmas) - 1
    for here, after in itertools.pairwise(sigmas):
        gamma = min(churn / n, math.sqrt(2) - 1) if churn_min <= here <= churn_max else 0.0
        raised = here + gamma * here
        if gamma > 0:
            x = x + math.sqrt(raised**2 - here**2) * noise_scale * draws()
        slope = (x - denoise(x, raised)) / raised
        draws()  # the library numbers its steps, and these add no noise
        end = x + (after - raised) * slope
        if after != 0:
            slope = (slope + (end - denoise(end, after)) / after) / 2
            end = x + (after - raised) * slope
            draws()
        x = end
    return x


def in_ve_coordinates(process: Process, model: nn.Module, clip: float | None) -> Callable[[Tensor, float], Tensor]:
    """D(x; ratio) of a model that predicts x_0, for x = x_t / alpha."""

    def denoise(x: Tensor, ratio: float) -> Tensor:
        alpha, told = 1.0, ratio
        if isinstance(process, Chain):
            made = process.schedule
            alpha = 1 / math.sqrt(1 + ratio**2)
            told = float(np.interp(-math.log(alpha), -made.log_alpha.numpy(), np.arange(made.timesteps + 1.0))) - 1
        x0 = model(alpha * x, torch.full((len(x),), told, dtype=torch.float64))
        return x0 if clip is None else x0.clamp(-clip, clip)

    return denoise


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize(
    ("churn", "churn_min", "churn_max", "noise_scale"),
    [(0.0, 0.0, math.inf, 1.0), (2.0, 0.0, math.inf, 1.003), (40.0, 0.1, 5.0, 1.1), (40.0, 0.0, math.inf, 0.0)],
)
@pytest.mark.parametrize("kind", ["ve", "chain"])
def test_heun_is_the_algorithm_of_karras(kind, churn, churn_min, churn_max, noise_scale, clip):
    model, n = Curved(), 7
    if kind == "ve":
        diffusion, low, high = ScoreSDE(model, VE(0.002, 80.0), "x0", clip=clip), 0.002, 80.0
        grid = diffusion.process.karras(n, churn=churn, churn_min=churn_min, churn_max=churn_max)
    else:
        diffusion, low, high = DDPM(model, "linear", 1000, "x0", clip=clip), 0.03, 60.0
        options = {"churn": churn, "churn_min": churn_min, "churn_max": churn_max}
        grid = diffusion.process.karras(n, sigma_min=low, sigma_max=high, **options)
    sigmas = [(high ** (1 / 7) + i / (n - 1) * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for i in range(n)] + [0.0]
    sampler = functools.partial(steps.heun, noise_scale=noise_scale)
    x, noise = high * draw(*SHAPE), draw(40, *SHAPE, seed=1)
    where = iter(range(40))
    denoise = in_ve_coordinates(diffusion.process, model, clip)
    want = edm(denoise, x, sigmas, churn, churn_min, churn_max, noise_scale, lambda: noise[next(where)])
    alpha = 1.0 if kind == "ve" else 1 / math.sqrt(1 + high**2)
    model.calls = 0
    got = diffusion.sample(SHAPE, sampler=sampler, steps=grid, x_T=alpha * x, noise=lambda k: noise[k])
    close(got, want, 1e-7)  # the chain's time at a ratio, interpolated in another way
    assert model.calls == 2 * n - 1  # and none to add noise


def test_karras_grid():
    """Eq. 5, then data; raised levels in between where there is churn."""
    process = VE(0.002, 80.0)
    made, levels = process.karras(18)
    want = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)] + [0.0]
    assert made.sigma[levels].tolist() == pytest.approx(want, rel=1e-12)
    assert levels.tolist() == list(range(18, -1, -1))
    made, levels = process.karras(5, sigma_min=0.1, sigma_max=10.0, rho=3.0, churn=1.0, churn_min=0.5, churn_max=5.0)
    plain = [(10 ** (1 / 3) + i / 4 * (0.1 ** (1 / 3) - 10 ** (1 / 3))) ** 3 for i in range(5)]
    want = [v for s in plain for v in ([s, 1.2 * s] if 0.5 <= s <= 5 else [s])] + [0.0]
    assert len(want) > 7 and made.sigma[levels].tolist() == pytest.approx(want, rel=1e-12)
    made, levels = process.karras(4, churn=100.0)
    assert made.sigma[levels][:2].tolist() == pytest.approx([80.0, 80 * math.sqrt(2)], rel=1e-12)
    for other in (VP(), Chain(schedule.linear(1000)), Chain(schedule.cosine(50)), NCSN(Curved()).process):
        low, high = other.sigma_range()
        made, levels = other.karras(9)
        ratio = made.sigma[levels] / made.alpha[levels]
        low, high = max(low, 0.002), min(high, 80.0)
        want = [(high ** (1 / 7) + i / 8 * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for i in range(9)] + [0.0]
        assert ratio.tolist() == pytest.approx(want, rel=1e-8)


# --- Song et al. 2021 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("predictor", ["reverse_diffusion", "euler_maruyama", "ddpm"])
@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("kind", ["vp", "ve", "chain"])
def test_predictor_corrector(kind, clip, predictor):
    """Algorithms 4 and 5 with the norms of each sample by itself."""
    model, corrections, snr = Curved(), 2, 0.3
    if kind == "chain":
        diffusion = DDPM(model, [0.1, 0.2, 0.4, 0.6], 4, "eps", clip=clip)
        grid = diffusion.process.grid(None)
    else:
        diffusion = ScoreSDE(model, kind, "eps", clip=clip)
        grid = diffusion.process.grid([1.0, 0.7, 0.4, 0.2, 0.0])
    made, levels = grid
    alpha, sigma = made.alpha.tolist(), made.sigma.tolist()
    told = diffusion.process.condition(made.times(levels)).tolist()
    options = {"predictor": predictor, "corrections": corrections, "snr": snr}
    sampler = functools.partial(steps.predictor_corrector, **options)
    x = made.prior_std() * ops.normal(SHAPE, 5, dtype=torch.float64)
    noise = [ops.normal(SHAPE, 5, step=k, stream=ops.REVERSE, dtype=torch.float64) for k in range(10)]
    given = torch.stack(noise)
    draws = iter(noise)

    def x0_and_score(x: Tensor, k: int, t: int) -> tuple[Tensor, Tensor]:
        x0 = (x - sigma[t] * model(x, torch.full((len(x),), told[k], dtype=torch.float64))) / alpha[t]
        x0 = x0 if clip is None else x0.clamp(-clip, clip)
        return x0, (alpha[t] * x0 - x) / sigma[t] ** 2

    for k, (t, s) in enumerate(itertools.pairwise(levels.tolist())):
        ratio = alpha[t] / alpha[s]
        beta = sigma[t] ** 2 - ratio**2 * sigma[s] ** 2
        if s == 0:
            x = x0_and_score(x, k, t)[0]
            break
        for _ in range(corrections):
            g, z = x0_and_score(x, k, t)[1], next(draws)
            norms = [v.flatten(1).norm(dim=1).view(-1, 1, 1) for v in (z, g)]
            e = 2 * ratio**2 * (snr * norms[0] / norms[1]) ** 2
            x = x + e * g + (2 * e).sqrt() * z
        (x0, g), z = x0_and_score(x, k, t), next(draws)
        if predictor == "reverse_diffusion":
            x = (2 - ratio) * x + beta * g + math.sqrt(beta) * z
        elif predictor == "ddpm":
            mean = (alpha[s] * beta * x0 + ratio * sigma[s] ** 2 * x) / sigma[t] ** 2
            x = mean + math.sqrt(beta) * sigma[s] / sigma[t] * z
        else:
            if kind == "chain":  # what the chain's SDE with constant rates gains
                f_dt = math.log(ratio)
                g2_dt = -2 * f_dt
            else:
                dt = (made.time[t] - made.time[s]).item()
                f_dt, g2_dt = made.drift[t].item() * dt, made.g2[t].item() * dt
            x = x - f_dt * x + g2_dt * g + math.sqrt(g2_dt) * z
    close(diffusion.sample(SHAPE, sampler=sampler, steps=grid, seed=5), x)
    start = made.prior_std() * ops.normal(SHAPE, 5, dtype=torch.float64)
    close(diffusion.sample(SHAPE, sampler=sampler, steps=grid, x_T=start, noise=given), x)


def step(table: steps.StepTable, k: int, x: Tensor, pred: Tensor, z: Tensor, clip: float | None = None) -> Tensor:
    return ops.update(x, pred, table.rows, k, noise=z, clip=clip)


X, SCORE, Z = draw(3, 4, seed=2), draw(3, 4, seed=3), draw(3, 4, seed=4)


def test_reverse_diffusion_of_a_ddpm():
    """x_{i-1} = (2 - sqrt(1 - beta_i)) x_i + beta_i s + sqrt(beta_i) z (Song et al. 2021, app. E)."""
    betas = [0.01, 0.2, 0.5]
    made = NoiseSchedule.from_betas(betas)
    table = steps.reverse_diffusion(made, torch.tensor([3, 2, 1, 0]), "score")
    for k, beta in enumerate([0.5, 0.2]):
        want = (2 - math.sqrt(1 - beta)) * X + beta * SCORE + math.sqrt(beta) * Z
        close(step(table, k, X, SCORE, Z), want)
    close(step(table, 2, X, SCORE, Z), (X + 0.01 * SCORE) / math.sqrt(0.99))
    assert len(steps.reverse_diffusion(made, torch.tensor([3, 2, 1, 0]), "score", denoise=False)) == 2


def test_ve_ancestral():
    """x_{i-1} = x_i + d s + sigma_{i-1} sqrt(d) / sigma_i z, d = sigma_i^2 - sigma_{i-1}^2 (Song et al., eq. 47)."""
    sigma = [0.0, 0.1, 0.7, 3.0]
    made = NoiseSchedule.from_alpha_sigma(torch.ones(3), sigma[1:])
    for objective, pred in (("score", [SCORE] * 3), ("eps", [-s * SCORE for s in (3.0, 0.7, 0.1)])):
        table = steps.ancestral(made, torch.tensor([3, 2, 1, 0]), objective)
        assert table.start == 3
        for k, i in enumerate((3, 2, 1)):
            delta = sigma[i] ** 2 - sigma[i - 1] ** 2
            want = X + delta * SCORE + sigma[i - 1] * math.sqrt(delta) / sigma[i] * Z
            close(step(table, k, X, pred[k], Z), want)


@pytest.mark.parametrize("clip", [None, 0.7])
def test_annealed_langevin(clip):
    """Song & Ermon 2019, algorithm 1 with alpha_i = 2 e_i; x0hat at the end."""
    model, eps = Curved(), 3e-4
    diffusion = NCSN(model, 2.0, 0.05, 4, "x0", clip=clip)
    sigma = [0.05 * 40 ** (i / 3) for i in range(4)]
    sampler = functools.partial(steps.annealed_langevin, eps=eps)
    x, noise = 2 * draw(*SHAPE), draw(13, *SHAPE, seed=1)

    def x0hat(x: Tensor, s: float) -> Tensor:
        x0 = model(x, torch.full((len(x),), s, dtype=torch.float64))
        return x0 if clip is None else x0.clamp(-clip, clip)

    got = diffusion.sample(SHAPE, sampler=sampler, steps=3, x_T=x, noise=noise)
    k = 0
    for s in reversed(sigma):
        for _ in range(3):
            alpha = 2 * eps * s**2 / sigma[0] ** 2
            x = x + alpha / 2 * (x0hat(x, s) - x) / s**2 + math.sqrt(alpha) * noise[k]
            k += 1
    close(got, x0hat(x, sigma[0]))


# --- Lu et al. 2022 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("objective", ["x0", "v"])
def test_dpm_solver_is_algorithm_2(objective, clip):
    model = Curved()
    diffusion = DDPM(model, "cosine", 100, objective, clip=clip)
    made, levels = diffusion.schedule, [100, 80, 45, 20, 0]
    alpha, sigma = made.alpha.tolist(), made.sigma.tolist()
    x = draw(*SHAPE)
    got = diffusion.sample(SHAPE, sampler="dpm++2m", steps=levels, x_T=x)
    before = last = None
    for t, s in itertools.pairwise(levels):
        pred = model(x, torch.full((len(x),), t - 1))
        x0 = pred if objective == "x0" else alpha[t] * x - sigma[t] * pred
        x0 = x0 if clip is None else x0.clamp(-clip, clip)
        if s == 0:
            x = x0
            break
        h = math.log(alpha[s] / sigma[s]) - math.log(alpha[t] / sigma[t])
        best = x0 if before is None else (1 + h / (2 * last)) * x0 - h / (2 * last) * before
        x = sigma[s] / sigma[t] * x - alpha[s] * (math.exp(-h) - 1) * best
        before, last = x0, h
    close(got, x)


# --- inversion and interpolation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["eps", "v", "x0", "score"])
def test_ddim_inversion(objective):
    """x_s = alpha_s x0hat + sigma_s epshat, upwards."""
    made = NoiseSchedule.from_betas([0.01, 0.2, 0.5])
    levels = torch.tensor([1, 3] if objective in ("x0", "score") else [0, 1, 3])
    table = steps.ddim_inversion(made, levels, objective)
    for k, (t, s) in enumerate(itertools.pairwise(levels.tolist())):
        x0, eps = draw(3, 4, seed=5), draw(3, 4, seed=6)
        alpha, sigma = made.alpha.tolist(), made.sigma.tolist()
        pred = {"eps": eps, "x0": x0, "v": alpha[t] * eps - sigma[t] * x0, "score": -eps / (sigma[t] or 1)}[objective]
        close(step(table, k, alpha[t] * x0 + sigma[t] * eps, pred, Z), alpha[s] * x0 + sigma[s] * eps)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "args"),
    [
        (DDPM, ("linear", 1000, "eps")),
        (DDPM, ("linear", 1000, "v")),
        (ScoreSDE, ("vp", "score")),
        (ScoreSDE, ("subvp", "x0")),
        (ScoreSDE, ("ve", "eps")),
    ],
)
def test_encoding_and_decoding_is_of_first_order(made, args):
    """Halving the steps' size halves the error, in the two widest dimensions."""
    diffusion = exact(made, *args)
    x0 = torch.tensor([0.5, 0.1, 1.0, 0.02], dtype=torch.float64) * draw(5, 4) + torch.tensor([0.3, -0.5, 0.0, 0.2])
    errors = []
    for n in (100, 200, 400):
        x_T = diffusion.encode(x0, steps=n)
        errors.append((diffusion.sample((5, 4), x_T=x_T, sampler="ddim", steps=n) - x0)[:, [0, 2]].abs().mean().item())
    assert errors[-1] < 0.1
    for coarse, fine in itertools.pairwise(errors):
        assert 1.6 < coarse / fine < 2.4, errors


def test_slerp():
    x, y = draw(3, 2, 5, seed=1), draw(3, 2, 5, seed=2)
    for weight, end in ((0.0, x), (1.0, y)):
        close(slerp(x, y, torch.full((1, 1, 1), weight, dtype=torch.float64)), end)
    weight = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64).view(-1, 1, 1)
    unit = [v / v.flatten(1).norm(dim=1).view(-1, 1, 1) for v in (x, y)]
    between = slerp(*unit, weight)
    close(between.flatten(1).norm(dim=1), torch.ones(3, dtype=torch.float64))
    whole = (unit[0] * unit[1]).flatten(1).sum(1).acos()
    close((between * unit[0]).flatten(1).sum(1).acos(), weight.flatten() * whole, 1e-7)
    close(slerp(x, 2 * x, torch.full((1, 1, 1), 0.25, dtype=torch.float64)), 1.25 * x)


@pytest.mark.slow
def test_interpolation_in_noise_space():
    ddpm = exact(DDPM, "linear", 1000, "eps")
    x0, x1 = draw(3, 4, seed=7), draw(3, 4, seed=8)
    z0, z1 = (ddpm.encode(x, steps=50) for x in (x0, x1))

    def decode(z: Tensor) -> Tensor:
        return ddpm.sample((3, 4), x_T=z, sampler="ddim", steps=50)

    for weight, end in ((0.0, z0), (1.0, z1), (torch.tensor([0.0, 1.0, 0.0]), torch.stack((z0[0], z1[1], z0[2])))):
        close(ddpm.interpolate(x0, x1, weight, sampler="ddim", steps=50), decode(end))
    middle = decode(slerp(z0, z1, torch.full((1, 1), 0.5, dtype=torch.float64)))
    close(ddpm.interpolate(x0, x1, sampler="ddim", steps=50), middle)


# --- guidance -----------------------------------------------------------------------------------------------------


class Guided(nn.Module):
    """uncond + w (cond - uncond), in two calls."""

    def __init__(self, model: nn.Module, w: float, cond: Tensor, uncond: Tensor):
        super().__init__()
        self.model, self.w, self.cond, self.uncond = model, w, cond, uncond

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        cond, uncond = self.model(x, c, y=self.cond), self.model(x, c, y=self.uncond)
        return uncond + self.w * (cond - uncond)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [name for name in steps.SAMPLERS if name != "annealed_langevin"] + ["ncsn"])
def test_guidance_is_two_calls_combined(sampler):
    model, cond, uncond = Curved(), torch.tensor([1.0, -2.0, 0.5]), torch.zeros(3)
    made, options = (lambda m: ScoreSDE(m, "vp", "eps", clip=1.0)), {"sampler": sampler, "steps": 5, "seed": 3}
    if sampler == "ncsn":
        made, options = (lambda m: NCSN(m, objective="eps", levels=4, clip=1.0)), {"steps": 2, "seed": 3}
    diffusion = made(model)

    def guided(w: float) -> Tensor:
        return diffusion.sample(SHAPE, guidance=w, y=cond, uncond={"y": uncond}, **options)

    want = made(Guided(model, 1.7, cond, uncond)).sample(SHAPE, **options)
    model.calls = 0
    close(guided(1.7), want)
    table = diffusion.step_table(diffusion.default_sampler if sampler == "ncsn" else sampler, options["steps"])
    assert model.calls == len(table)  # both branches at once
    close(guided(1.0), diffusion.sample(SHAPE, y=cond, **options))
    close(guided(0.0), diffusion.sample(SHAPE, y=uncond, **options))
    assert not torch.allclose(guided(0.0), guided(1.0))
    diffusion.sample(SHAPE, **{**options, "sampler": lambda *_: table}, guidance=3.0, y=cond, uncond={"y": uncond})
    assert (columns(table.rows).guidance <= 1).all()  # a table is its sampler's own


def test_guidance_leaves_a_learned_variance_to_the_condition():
    class Both(nn.Module):
        def __init__(self, model: nn.Module):
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, c: Tensor, y: Tensor) -> Tensor:
            return torch.cat((self.model(x, c, y=y), torch.tanh(x + y.view(-1, 1, 1))), 1)

    class Combined(Both):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            (pred, raw), (other, _) = (self.model(x, c, y=y).chunk(2, 1) for y in (cond, uncond))
            return torch.cat((other + 1.7 * (pred - other), raw), 1)

    model, cond, uncond = Both(Curved()), torch.tensor([1.0, -2.0, 0.5]), torch.zeros(3)
    guided, combined = (DDPM(m, "cosine", 8, loss="hybrid", variance="learned") for m in (model, Combined(model)))
    got = guided.sample(SHAPE, seed=3, guidance=1.7, y=cond, uncond={"y": uncond})
    close(got, combined.sample(SHAPE, seed=3))
