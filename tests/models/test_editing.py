"""Samples that start from an image, that stop early, or of which a part is known."""

import functools

import pytest
import torch
from small_models import SHAPE, Pointwise
from torch import Tensor, nn

from fastdiff import DDPM, Edm, FlowMatching, ScoreSDE, steps
from fastdiff.editing import noise_levels, resampled

MODELS = {
    "chain": lambda: DDPM(Pointwise(), "cosine", timesteps=50, objective="v"),
    "vp": lambda: ScoreSDE(Pointwise(), "vp", objective="eps", clip=1.0),
    "flow": lambda: FlowMatching(Pointwise()),
    "edm": lambda: Edm(Pointwise()),
}
HALF = torch.tensor([[1.0, 1.0, 0.0, 0.0]]).reshape(1, 1, 1, 4)


def data() -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(5)) * 2 - 1


every = pytest.mark.parametrize("name", MODELS)
SAMPLERS = ["ddim", "dpm++2m", "heun", "dpm++2s", "unipc", "ddpm"]


# --- stop_at ----------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++2m"])
def test_stop_at_is_the_state_on_the_way(name: str, sampler: str) -> None:
    model = MODELS[name]()
    grid = model.process.karras(8, sigma_max=10.0)
    path = model.sample(SHAPE, steps=grid, sampler=sampler, seed=3, return_trajectory=True)
    times = grid[0].times(grid[1])
    for k in (1, 5, 8):
        assert torch.equal(model.sample(SHAPE, steps=grid, sampler=sampler, seed=3, stop_at=times[k].item()), path[k])
    between = (times[4] + times[5]).item() / 2  # the next one that is visited
    assert torch.equal(model.sample(SHAPE, steps=grid, sampler=sampler, seed=3, stop_at=between), path[5])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_stop_at_takes_whole_steps_of_every_sampler(sampler: str) -> None:
    ddpm = MODELS["chain"]()
    part = ddpm.sample(SHAPE, steps=[40, 30, 20, 10, 0], sampler=sampler, seed=1, stop_at=20)
    assert torch.equal(part, ddpm.sample(SHAPE, steps=[40, 30, 20], sampler=sampler, seed=1))


@pytest.mark.parametrize("stop_at", [50, -1, 60])
def test_stop_at_out_of_range(stop_at: float) -> None:
    with pytest.raises(ValueError, match=f"^stop_at: expected a level from 0 to below 50, got {stop_at}$"):
        MODELS["chain"]().sample(SHAPE, steps=5, stop_at=stop_at)


# --- from an image ----------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
def test_img2img_starts_from_the_noised_image(name: str, strength: float) -> None:
    model, image = MODELS[name](), data()
    grid = model.process.karras(8, sigma_max=10.0)
    options = {"sampler": "ddim", "seed": 3, "steps": grid}
    path = model.sample(SHAPE, x_init=image, strength=strength, return_trajectory=True, **options)
    assert len(path) == 8 * strength + 1
    levels = grid[1][-len(path) :]
    z = model.sample(SHAPE, seed=3, return_trajectory=True, sampler="ddim", steps=grid)[0].double()
    z = z / steps.ddim(grid[0], grid[1], "v").start
    start = grid[0].alpha[levels[0]] * image.double() + grid[0].sigma[levels[0]] * z
    assert torch.allclose(path[0].double(), start, rtol=1e-5, atol=1e-5)
    again = model.sample(SHAPE, x_T=path[0], sampler="ddim", steps=(grid[0], levels))
    assert torch.equal(again, path[-1])


def test_little_strength_stays_near_the_image() -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.zeros_like(x)

    ddpm, image = DDPM(Nothing(), "cosine", timesteps=100, objective="v"), data() * 0.5
    options = {"x_init": image, "sampler": "ddim", "seed": 1}
    far = [(ddpm.sample(SHAPE, strength=s, **options) - image).norm().item() for s in (0.02, 0.2, 0.6)]
    assert far[0] < far[1] < far[2] and far[0] < 0.2 * image.norm().item()


@every
def test_encode_and_the_bound_take_the_grids_of_sample(name: str) -> None:
    """But for one that rises on the way."""
    model, image = MODELS[name](), data()
    karras = model.process.karras
    assert torch.equal(model.encode(image, steps=model.process.grid(5)), model.encode(image, steps=5))
    assert model.encode(image, steps=karras(3, sigma_max=10.0)).isfinite().all()
    assert model.bits_per_dim(image, steps=karras(3, sigma_max=10.0)).terms.shape == (len(image), 3)
    for method in (model.encode, model.bits_per_dim):
        with pytest.raises(ValueError, match=r"^steps: expected decreasing levels, got"):
            method(image, steps=karras(6, sigma_max=10.0, churn=3))


def test_the_flow_of_few_levels_ends_at_data() -> None:
    """Not at the last level before it, unless that is the first of the process."""
    flow = FlowMatching(Pointwise(), last=0.9)
    chain, vp, edm = (MODELS[name]() for name in ("chain", "vp", "edm"))
    left_out = ((chain, None, 49), (vp, 5, 5), (edm, 5, 4))
    taken = ((chain, 5, 5), (chain, [1, 0], 1), (vp, [1.0, 0.5, 0.0], 2), (flow, 5, 5))
    for model, given, rows in left_out + taken:
        table = model.step_table("probability_flow", given)
        assert len(table) == rows and table.levels[-1] == 0


# --- with a part known ------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("mask", [HALF, HALF.bool(), HALF.expand(SHAPE)])
def test_known_stays_and_the_rest_is_drawn(name: str, mask: Tensor) -> None:
    model, image = MODELS[name](), data()
    grid = model.process.karras(6, sigma_max=10.0)
    drawn = model.sample(SHAPE, x_init=image, known=mask, sampler="ddim", steps=grid, seed=3)
    assert torch.equal(drawn[..., :2], image[..., :2])
    assert (drawn - image)[..., 2:].abs().mean() > 0.1
    plain = model.sample(SHAPE, x_init=image, sampler="ddim", steps=grid, seed=3)
    assert torch.allclose(drawn[..., 2:], plain[..., 2:], atol=1e-6)  # a network that sees one pixel at a time


@every
def test_known_is_data_where_a_sampler_leaves_out_the_last_step(name: str) -> None:
    """Also where states are scaled; the noise of the last level is not for the result."""
    model, image, levels = MODELS[name](), data(), []
    for sampler in ("probability_flow", functools.partial(steps.reverse_diffusion, denoise=False)):
        grid = model.process.karras(6, sigma_max=10.0)
        how = {"sampler": sampler, "steps": grid, "callback": lambda k, level, x: levels.append(level)}
        drawn = model.sample(SHAPE, x_init=image, known=HALF, **how)
        assert torch.equal(drawn[..., :2], image[..., :2]) and levels[-1] == 0


def test_known_has_the_noise_of_each_level() -> None:
    ddpm, shape = MODELS["chain"](), (64, 1, 16, 16)
    image = torch.full(shape, 0.5)
    path = ddpm.sample(
        shape, x_init=image, known=torch.ones(1, 1, 1, 1), steps=5, sampler="ddim", seed=3, return_trajectory=True
    )
    rows = noise_levels(ddpm.process, torch.tensor([40, 30, 20, 10, 0]))
    for x, (alpha, sigma) in zip(path[1:].double(), rows.tolist(), strict=True):
        bound = 6 * sigma / x.numel() ** 0.5
        assert abs(x.mean().item() - alpha * 0.5) <= bound + 1e-7
        assert abs(x.std().item() - sigma) <= bound
    noise = path[1:-1] - path[1:-1].mean((1, 2, 3, 4), keepdim=True)
    assert torch.corrcoef(noise.flatten(1)).triu(1).abs().max() < 6 / noise[0].numel() ** 0.5  # drawn at each step


def test_callback_after_what_is_known() -> None:
    seen = []
    image = data()
    ddpm = MODELS["chain"]()
    ddpm.sample(SHAPE, x_init=image, known=HALF, steps=4, seed=1, callback=lambda k, level, x: seen.append(x.clone()))
    assert len(seen) == 4 and torch.equal(seen[-1][..., :2], image[..., :2])
    drawn = ddpm.sample(SHAPE, x_init=image, known=HALF, steps=4, seed=1, callback=lambda k, level, x: x * 0)
    assert not drawn.any()


def test_sample_ids_of_what_is_known() -> None:
    ddpm, image = MODELS["chain"](), data()
    options = {"steps": 4, "seed": 1, "known": HALF * 0.5}
    whole = ddpm.sample(SHAPE, x_init=image, **options)
    part = ddpm.sample((2, *SHAPE[1:]), x_init=image[2:], sample_ids=[2, 3], **options)
    assert torch.equal(part, whole[2:])


# --- resampling -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chain", "flow"])
def test_resampling_goes_up_by_the_noise_between_the_levels(name: str) -> None:
    model = MODELS[name]()
    table = model.step_table("ddim", 4)
    made = resampled(table, model.process, 3)
    assert len(made) == 3 * 5 + 1 and made.noisy
    assert made.kinds == (*(["predict", "add"] * 2 + ["predict"]) * 3, "predict")
    (alpha, sigma), up = noise_levels(model.process, made.levels).T, made.rows
    for k, kind in enumerate(made.kinds):
        if kind == "add":
            assert made.levels[k + 1] > made.levels[k]
            from_x, noise = up[k, 3], up[k, 5]
            assert torch.isclose(from_x * alpha[k], alpha[k + 1], rtol=1e-12)
            assert torch.isclose(from_x**2 * sigma[k] ** 2 + noise**2, sigma[k + 1] ** 2, rtol=1e-12)
    assert torch.equal(made.levels[[0, 5, 10, 15, 16]], table.levels)
    assert resampled(table, model.process, 1) is table


def test_resampled_inpainting() -> None:
    ddpm, image = MODELS["chain"](), data()
    calls = []
    options = {"x_init": image, "known": HALF, "steps": 4, "seed": 1}
    drawn = ddpm.sample(SHAPE, resample=2, callback=lambda k, level, x: calls.append(level), **options)
    assert len(calls) == 3 * 3 + 1
    assert torch.equal(drawn[..., :2], image[..., :2])
    assert not torch.equal(drawn, ddpm.sample(SHAPE, **options))


@pytest.mark.parametrize("sampler", ["dpm++2m", "predictor_corrector", functools.partial(steps.heun)])
def test_resampling_refuses_samplers_with_a_memory(sampler: object) -> None:
    with pytest.raises(ValueError, match=r"^resample: expected 1 with a sampler that remembers steps"):
        MODELS["vp"]().sample(SHAPE, x_init=data(), known=HALF, resample=2, steps=4, sampler=sampler)


# --- arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x_init": torch.zeros(1)}, r"x_init: expected shape \(4, 2, 4, 4\), got \(1,\)"),
        ({"x_init": torch.zeros(SHAPE), "x_T": torch.zeros(SHAPE)}, "x_T: expected None with x_init, .*"),
        ({"x_init": torch.zeros(SHAPE), "strength": 0}, "strength: expected a number above 0 and up to 1, got 0"),
        ({"x_init": torch.zeros(SHAPE), "strength": 1.1}, "strength: expected a number above 0 and up to 1, got 1.1"),
        ({"strength": 0.5}, "x_init: expected an image with strength, got None"),
        ({"known": HALF}, "x_init: expected an image with known, got None"),
        ({"x_init": torch.zeros(SHAPE), "known": HALF - 1}, r"known: expected numbers in \[0, 1\], got -1 to 0"),
        ({"x_init": torch.zeros(SHAPE), "resample": 2}, "known: expected a mask with resample, got None"),
        ({"x_init": torch.zeros(SHAPE), "known": HALF, "resample": 0}, "resample: expected an integer of at least 1.*"),
        ({"x_init": torch.zeros(SHAPE), "known": HALF[0]}, "known: expected a shape that expands to .*"),
        ({"x_init": torch.zeros(SHAPE), "known": HALF * 2}, "known: expected numbers in .*, got 0 to 2"),
        ({"stop_at": 5, "sampler": "ode"}, "sampler: 'ode' chooses .*"),
    ],
)
def test_refused_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        MODELS["chain"]().sample(SHAPE, **options)


# --- gradients through the last steps ---------------------------------------------------------------------------


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.gain * x.tanh()


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_gradient_through_the_last_steps(sampler: str, count: int) -> None:
    ddpm = DDPM(Gain(), "cosine", timesteps=50, objective="v", clip=None)
    options = {"sampler": sampler, "steps": 4, "seed": 1}
    path = ddpm.sample(SHAPE, return_trajectory=True, **options)
    last = ddpm.sample(SHAPE, grad_steps=count, **options)
    assert torch.equal(last, path[-1])
    last.sum().backward()
    got = ddpm.model.gain.grad.item()

    def end(gain: float) -> float:
        """The sum of the samples if the gain changes for the last steps alone."""
        with torch.no_grad():
            ddpm.model.gain.fill_(gain)
        x, table = path[4 - count], ddpm.step_table(sampler, 4)
        for k in range(4 - count, 4):
            noise = torch.zeros_like(x) if sampler == "ddim" else noises[k]
            levels = table.levels[k : k + 2].tolist()
            x = ddpm.sample(SHAPE, x_T=x, sampler=sampler, steps=levels, noise=noise[None])
        return x.sum().item()

    row = ddpm.step_table(sampler, 4).rows
    noises = [
        (path[k + 1] - ddpm.sample(SHAPE, x_T=path[k], sampler=sampler, steps=pair, noise=torch.zeros(1, *SHAPE)))
        / max(row[k, 5].item(), 1e-30)
        for k, pair in enumerate(
            zip(*(ddpm.step_table(sampler, 4).levels[i : 4 + i].tolist() for i in (0, 1)), strict=True)
        )
    ]
    step = 1e-5
    want = (end(0.3 + step) - end(0.3 - step)) / (2 * step)
    assert got == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grad_steps": 5}, "grad_steps: expected an integer from 0 to 4, got 5"),
        ({"grad_steps": 1, "sampler": "dpm++2m"}, "grad_steps: expected 0 with a sampler that remembers .*"),
        ({"grad_steps": 1, "return_trajectory": True}, "grad_steps: expected 0 with callback, .*"),
        ({"grad_steps": 1, "graph": True}, "grad_steps: expected 0 with callback, .*"),
    ],
)
def test_gradients_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        MODELS["chain"]().sample(SHAPE, **{"steps": 4, "sampler": "ddim", **options})
