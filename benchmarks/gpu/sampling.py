"""Sampling with three networks in bfloat16: steps from noise to data, as users of diffusers and of fastdiff do it."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastdiff
from fastdiff import DDPM

from .measure import job
from .networks import (
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

STEPS, TOY_STEPS = 50, 2
STEPS_3 = 20  # of Stable Diffusion 3.5, each of which takes longer
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


# --- the networks of Stable Diffusion 1.5 and 3.5 ---------------------------------------------------------------


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
    if reasons := [reason for name, reason in left.items() if name.endswith(".forward")]:
        raise NotAvailable(reasons[0])


STABLE_DIFFUSION_METHODS: dict[str, Callable[[Pipeline], dict[str, str] | None]] = {
    "diffusers eager": lambda pipeline: stock(pipeline, None),
    "accelerate eager": lambda pipeline: accelerated(pipeline),
    "accelerate graph": lambda pipeline: accelerated(pipeline, graph=True),
    "diffusers reduce-overhead": lambda pipeline: stock(pipeline, "reduce-overhead"),
    "accelerate compiled": lambda pipeline: accelerated(pipeline, graph=True, compile=True),
    "diffusers max-autotune": lambda pipeline: stock(pipeline, "max-autotune"),
}


def sample_stable_diffusion(batch: int, method: str, setup: Setup) -> Figures:
    """per_s are iterations of the loop: one call of the U-Net with both branches of the guidance."""
    unet = stable_diffusion(setup).to(torch.bfloat16)
    schedule: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler = diffusers().DDIMScheduler(**schedule, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    text = drawn(setup, 2 * batch, TOKENS, unet.config.cross_attention_dim)
    return iterations(Pipeline(unet, scheduler), text, STEPS, method, setup)


def sample_stable_diffusion_3(batch: int, method: str, setup: Setup) -> Figures:
    """The same of its transformer."""
    net = stable_diffusion_3(setup).to(torch.bfloat16)
    pooled = drawn(setup, 2 * batch, net.config.pooled_projection_dim)
    scheduler = diffusers().FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = Pipeline(net, scheduler, "transformer", pooled_projections=pooled)
    text = drawn(setup, 2 * batch, TOKENS_3, net.config.joint_attention_dim)
    return iterations(pipeline, text, STEPS_3, method, setup)


def drawn(setup: Setup, *shape: int) -> Tensor:
    random = torch.Generator(setup.device).manual_seed(0)
    return torch.randn(shape, generator=random, device=setup.device).to(torch.bfloat16)


def iterations(pipeline: Pipeline, text: Tensor, steps: int, method: str, setup: Setup) -> Figures:
    steps, config = setup.size(steps, TOY_STEPS), pipeline.network.config
    x = drawn(setup, len(text) // 2, config.in_channels, config.sample_size, config.sample_size)
    want = pipeline(x, TOY_STEPS, text)
    left = STABLE_DIFFUSION_METHODS[method](pipeline) or {}
    figures = job(lambda: pipeline(x, steps, text), setup.device, steps=steps, units=steps)
    check(left)
    return figures | {"off_eager": distance(pipeline(x, TOY_STEPS, text), want)}


# Seconds that a row may take. Compiling a large U-Net takes minutes, and to try out its kernels more.
LIMITS = {"eager": 60, "graph": 60, "reduce-overhead": 180, "compiled": 180, "max-autotune": 600}


def turn(case: str, method: str) -> int:
    """First what needs no compiler, then the compiled rows of diffusers, and last what takes long or matters less.

    Of the longest, that of a goal comes before the others.
    """
    if "max-autotune" in method:
        return 4 if "SD 1.5 U-Net, batch 1" in case else 5
    if "SD 1.5 U-Net, batch 4" in case or ("SD 3.5" in case and LIMITS[method.split()[-1]] > 60):
        return 3
    if LIMITS[method.split()[-1]] == 60:
        return 1
    return 2 if "reduce-overhead" in method and "batch 256" not in case else 3


def rows(setup: Setup) -> list[Row]:
    found = []
    for batch in setup.size([1, 16, 256], [2]):
        for method in CIFAR10_METHODS:
            found.append((f"cifar10 U-Net, batch {batch}", method, sample_cifar10, batch))
    for batch in setup.size([1, 4], [1]):
        for method in STABLE_DIFFUSION_METHODS:
            found.append((f"SD 1.5 U-Net, batch {batch}", method, sample_stable_diffusion, batch))
    for method in STABLE_DIFFUSION_METHODS:
        if "max-autotune" not in method:  # which takes too long to try out such a network's kernels
            found.append(("SD 3.5 transformer, batch 1", method, sample_stable_diffusion_3, 1))
    return [
        Row(
            case, method, functools.partial(sample, batch, method, setup), LIMITS[method.split()[-1]],
            turn(case, method),
        )
        for case, method, sample, batch in found
    ]  # fmt: skip
