"""Training the U-Net of ddpm-cifar10-32 under autocast to bfloat16: loss, gradient, clipping, AdamW and EMA."""

import copy
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import DDPM
from fastdiff.cast import channels_last_convolutions
from fastdiff.training import TrainingStep, update_ema
from fastdiff.training.surroundings import gpu_settings

from .measure import job
from .networks import cifar10, diffusers, stock_cifar10
from .rows import Figures, Row, Setup

RATE, DECAY, LARGEST_NORM = 2e-4, 0.9999, 1.0
# Steps in a row before the clock is read.
STEPS, TOY_STEPS = 10, 2

Step = Callable[[], object]


def training_step(
    parameters: list[nn.Parameter],
    loss: Callable[..., Tensor],
    average: Callable[[Any], object],
    batch: tuple[Tensor, ...] = (),
    graph: bool | None = False,
) -> Step:
    """One step of a network, of which only the loss and the moving average differ between libraries.

    graph: the whole step as one CUDA graph, captured at its fourth call; None if it can be.
    """
    optimizer = torch.optim.AdamW(parameters, lr=RATE, fused=True)
    step = TrainingStep(loss, optimizer, average=average, clip_grad=LARGEST_NORM, autocast=torch.bfloat16, graph=graph)
    return lambda: step(*batch, decay=DECAY)


def stock_step(data: Tensor, setup: Setup, compiled: bool) -> Step:
    """diffusers' recipe: add_noise, mse_loss, EMAModel."""
    unet = stock_cifar10(setup).train()
    scheduler = diffusers().DDPMScheduler()
    ema = importlib.import_module("diffusers.training_utils").EMAModel(unet.parameters(), decay=DECAY, foreach=True)
    if compiled:
        unet.to(memory_format=torch.channels_last).compile()

    def loss() -> Tensor:
        noise = torch.randn_like(data)
        t = torch.randint(scheduler.config.num_train_timesteps, data.shape[:1], device=data.device)
        return F.mse_loss(unet(scheduler.add_noise(data, noise, t), t).sample.float(), noise.float())

    parameters = list(unet.parameters())
    return training_step(parameters, loss, lambda decay: ema.step(parameters))


def own_step(data: Tensor, setup: Setup, compiled: bool = False, graph: bool | None = False) -> Step:
    """As `fastdiff train --channels-last`."""
    ddpm = DDPM(cifar10(setup).train()).to(setup.device)
    channels_last_convolutions(ddpm.model)
    data = data.contiguous(memory_format=torch.channels_last)
    ema = copy.deepcopy(ddpm.model)
    if compiled:
        ddpm.compile()
    average = functools.partial(update_ema, ema, ddpm.model)
    return training_step(list(ddpm.parameters()), ddpm, average, batch=(data,), graph=graph)


METHODS: dict[str, Callable[[Tensor, Setup], Step]] = {
    "diffusers eager": lambda data, setup: stock_step(data, setup, compiled=False),
    "fastdiff eager": own_step,
    "fastdiff graph": lambda data, setup: own_step(data, setup, graph=True),
    "diffusers compiled": lambda data, setup: stock_step(data, setup, compiled=True),
    "fastdiff compiled": lambda data, setup: own_step(data, setup, compiled=True),
    "fastdiff graph compiled": lambda data, setup: own_step(data, setup, graph=True, compiled=True),
}

TURNS = {"diffusers eager": 1, "fastdiff graph": 1, "diffusers compiled": 2}


def train(batch: int, method: str, setup: Setup) -> Figures:
    size, steps = setup.size((32, STEPS), (8, TOY_STEPS))
    torch.manual_seed(0)
    data = 2 * torch.rand(batch, 3, size, size, device=setup.device) - 1
    step = METHODS[method](data, setup)

    def run() -> None:
        for _ in range(steps):
            step()

    with gpu_settings(setup.device):  # for every method alike
        return job(run, setup.device, steps=steps, units=steps * batch)


def rows(setup: Setup) -> list[Row]:
    """First the goals: what needs no compiler, then the compiled row of diffusers."""
    found = []
    for batch in setup.size((16, 128), (2,)):
        for method in METHODS:
            turn = TURNS.get(method, 3)
            run = functools.partial(train, batch, method, setup)
            found.append(Row(f"cifar10 U-Net, batch {batch}", method, run, 120 if turn < 3 else 180, turn))
    return found
