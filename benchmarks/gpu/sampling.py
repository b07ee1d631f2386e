"""Sampling in bfloat16, from noise to data, as users of diffusers and of fastdiff do it."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastdiff
from fastdiff import DDPM

from .measure import job
from .networks import (
    FEW_TOKENS,
    TOKENS,
    TOKENS_3,
    Pipeline,
    cifar10,
    diffusers,
    stable_diffusion,
    stable_diffusion_3,
    stock_cifar10,
)
from .rows import Figures, NotAvailable, Row, Setup

STEPS, FEW_STEPS, TOY_STEPS = 50, 10, 2
# Images that are compared with those in float32, at most.
COMPARED = 4

Sampler = Callable[[Tensor], Tensor]


def distance(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||. It is reported and has no bound: it grows with the steps."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


# --- the U-Net of ddpm-cifar10-32 -------------------------------------------------------------------------------


def stock_sampler(setup: Setup, mode: str | None) -> Sampler:
    """diffusers, eager or compiled with channels_last. Spacing and clip are such that all methods do the same steps."""
    unet = stock_cifar10(setup).eval().to(torch.bfloat16)
    if mode:
        unet.to(memory_format=torch.channels_last).compile(mode=mode)
    pipeline = Pipeline(unet, diffusers().DDIMScheduler(timestep_spacing="trailing", clip_sample=False))
    layout = torch.channels_last if mode else torch.contiguous_format
    return lambda x: pipeline(x.to(torch.bfloat16, memory_format=layout), setup.size(STEPS, TOY_STEPS))


def own_sampler(setup: Setup, options: dict[str, Any], compiled: bool = False) -> Sampler:
    ddpm = DDPM(cifar10(setup).eval(), clip=None).to(setup.device)
    if compiled:
        ddpm.compile()
    given = {"sampler": "ddim", "steps": setup.size(STEPS, TOY_STEPS), "dtype": torch.bfloat16, **options}
    return lambda x: ddpm.sample(tuple(x.shape), x_T=x, **given)


CIFAR10_METHODS: dict[str, Callable[[Setup], Sampler]] = {
    "diffusers eager": lambda setup: stock_sampler(setup, None),
    "fastdiff eager": lambda setup: own_sampler(setup, {"graph": False}),
    "fastdiff graph": lambda setup: own_sampler(setup, {"graph": True}),
    "diffusers reduce-overhead": lambda setup: stock_sampler(setup, "reduce-overhead"),
    "fastdiff compiled": lambda setup: own_sampler(setup, {}, compiled=True),
    "diffusers max-autotune": lambda setup: stock_sampler(setup, "max-autotune"),
}


def sample_cifar10(batch: int, method: str, setup: Setup) -> Figures:
    steps, size = setup.size((STEPS, 32), (TOY_STEPS, 8))
    random = torch.Generator(setup.device).manual_seed(0)
    x = torch.randn(batch, 3, size, size, generator=random, device=setup.device)
    sampler = CIFAR10_METHODS[method](setup)
    figures = job(lambda: sampler(x), setup.device, steps=steps, units=batch)
    plain = DDPM(cifar10(setup).eval(), clip=None).to(setup.device)
    want = plain.sample(tuple(x[:COMPARED].shape), sampler="ddim", steps=steps, x_T=x[:COMPARED])
    return figures | {"off_float32": distance(sampler(x)[:COMPARED], want)}


# --- Stable Diffusion: the U-Net of 1.5 and the transformer of 3.5 medium ---------------------------------------


def stock(pipeline: Pipeline, mode: str | None) -> None:
    """What a user of diffusers does for speed."""
    if mode:
        pipeline.network.to(memory_format=torch.channels_last).compile(mode=mode)


def accelerated(pipeline: Pipeline, **options: Any) -> dict[str, str]:
    """What `accelerate` leaves, and why: it is kept up to date while the pipeline runs."""
    done = fastdiff.accelerate(pipeline, **options)
    if not done:
        raise NotAvailable("accelerate replaced nothing")
    check(done.left)
    return done.left


def check(left: dict[str, str]) -> None:
    """What ran without a graph is not measured as one."""
    for name in ("unet.forward", "transformer.forward"):
        if name in left:
            raise NotAvailable(left[name])


GUIDED_METHODS: dict[str, Callable[[Pipeline], dict[str, str] | None]] = {
    "diffusers eager": lambda pipeline: stock(pipeline, None),
    "accelerate eager": lambda pipeline: accelerated(pipeline),
    "accelerate graph": lambda pipeline: accelerated(pipeline, graph=True),
    "diffusers reduce-overhead": lambda pipeline: stock(pipeline, "reduce-overhead"),
    "accelerate compiled": lambda pipeline: accelerated(pipeline, graph=True, compile=True),
    "diffusers max-autotune": lambda pipeline: stock(pipeline, "max-autotune"),
}


def unet_pipeline(setup: Setup) -> tuple[Pipeline, dict[str, tuple[int, ...]]]:
    """A pipeline, and the shapes of the arguments of a prompt, without their number."""
    schedule: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler = diffusers().DDIMScheduler(**schedule, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    unet = stable_diffusion(setup).to(torch.bfloat16)
    return Pipeline(unet, scheduler), {"encoder_hidden_states": (TOKENS, unet.config.cross_attention_dim)}


def transformer_pipeline(setup: Setup) -> tuple[Pipeline, dict[str, tuple[int, ...]]]:
    """The same of Stable Diffusion 3.5, for images of 1024x1024 pixels."""
    net = stable_diffusion_3(setup).to(torch.bfloat16)
    pipeline = Pipeline(net, diffusers().FlowMatchEulerDiscreteScheduler(shift=3.0), "transformer")
    tokens = setup.size(TOKENS_3, FEW_TOKENS)
    text, pooled = (tokens, net.config.joint_attention_dim), (net.config.pooled_projection_dim,)
    return pipeline, {"encoder_hidden_states": text, "pooled_projections": pooled}


def sample_guided(make: Callable[[Setup], Any], most_steps: int, batch: int, method: str, setup: Setup) -> Figures:
    """per_s are iterations of the loop: one call of the network with both branches of the guidance."""
    pipeline, shapes = make(setup)
    config, steps = pipeline.network.config, setup.size(most_steps, TOY_STEPS)
    random = torch.Generator(setup.device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=setup.device).to(torch.bfloat16)

    x = draw(batch, config.in_channels, config.sample_size, config.sample_size)
    prompts = {name: draw(2 * batch, *shape) for name, shape in shapes.items()}
    want = pipeline(x, TOY_STEPS, prompts)
    left = GUIDED_METHODS[method](pipeline) or {}
    figures = job(lambda: pipeline(x, steps, prompts), setup.device, steps=steps, units=steps)
    check(left)
    return figures | {"off_eager": distance(pipeline(x, TOY_STEPS, prompts), want)}


# Seconds that a row may take. Compiling a large U-Net takes minutes, and to try out its kernels more.
LIMITS = {"eager": 60, "graph": 60, "reduce-overhead": 180, "compiled": 180, "max-autotune": 600}


def turn(case: str, method: str) -> int:
    """First the goals: without a compiler, then beside diffusers' compiled rows. Last what takes long or matters less.

    Of the longest, that of a goal at batch 1 comes before the others. No goal is about the transformer.
    """
    quick = LIMITS[method.split()[-1]] == 60
    if "SD 3.5" in case:
        return 5 if quick else 6
    if "max-autotune" in method:
        return 4 if "SD 1.5 U-Net, batch 1" in case else 6
    if "SD 1.5 U-Net, batch 4" in case or method in ("fastdiff eager", "accelerate eager"):
        return 3
    if quick:
        return 1
    return 2 if "reduce-overhead" in method and "cifar10" in case and "batch 256" not in case else 3


def rows(setup: Setup) -> list[Row]:
    found: list[tuple[str, str, Callable[[int, str, Setup], Figures], int]] = []
    for batch in setup.size([1, 16, 256], [2]):
        for method in CIFAR10_METHODS:
            found.append((f"cifar10 U-Net, batch {batch}", method, sample_cifar10, batch))
    for batch in setup.size([1, 4], [1]):
        for method in GUIDED_METHODS:
            run = functools.partial(sample_guided, unet_pipeline, STEPS)
            found.append((f"SD 1.5 U-Net, batch {batch}", method, run, batch))
    for method in GUIDED_METHODS:
        if method != "diffusers max-autotune":
            run = functools.partial(sample_guided, transformer_pipeline, FEW_STEPS)
            found.append(("SD 3.5 transformer, batch 1", method, run, 1))
    return [
        Row(case, method, functools.partial(run, batch, method, setup), LIMITS[method.split()[-1]], turn(case, method))
        for case, method, run, batch in found
    ]
