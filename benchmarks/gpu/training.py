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
from fastdiff.training.loop import update_ema

from .measure import job
from .networks import cifar10, diffusers, stock_cifar10
from .rows import Figures, NotAvailable, Row, Setup

RATE, DECAY, LARGEST_NORM = 2e-4, 0.9999, 1.0
# Steps in a row before the clock is read.
STEPS, TOY_STEPS = 10, 2

Step = Callable[[], object]


def training_step(
    setup: Setup, parameters: list[nn.Parameter], loss: Callable[[], Tensor], average: Step, **options: Any
) -> Step:
    """One step of a network, of which only the loss and the moving average differ between libraries."""
    optimizer = torch.optim.AdamW(parameters, lr=RATE, fused=True, **options)

    def step() -> None:
        with torch.autocast(setup.device.type, torch.bfloat16):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, LARGEST_NORM)
        optimizer.step()
        optimizer.zero_grad()
        average()

    return step


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
    return training_step(setup, parameters, loss, lambda: ema.step(parameters))


def own_step(data: Tensor, setup: Setup, compiled: bool = False, **options: Any) -> Step:
    ddpm = DDPM(cifar10(setup).train()).to(setup.device)
    ema = copy.deepcopy(ddpm.model)
    if compiled:
        ddpm.compile()
    average = functools.partial(update_ema, ema, ddpm.model, DECAY)
    return training_step(setup, list(ddpm.parameters()), lambda: ddpm(data), average, **options)


def captured_step(data: Tensor, setup: Setup) -> Step:
    """The whole step as one CUDA graph, captured at the first call."""
    if setup.device.type != "cuda":
        raise NotAvailable("a CUDA graph needs a CUDA device")
    step = own_step(data, setup, capturable=True)
    graph = functools.cache(lambda: capture(step, setup.device))
    return lambda: graph().replay()


def capture(step: Step, device: torch.device) -> torch.cuda.CUDAGraph:
    """A graph of a step, after three steps: what they compile, tune and allocate at first must not be captured."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


METHODS: dict[str, Callable[[Tensor, Setup], Step]] = {
    "diffusers eager": lambda data, setup: stock_step(data, setup, compiled=False),
    "fastdiff eager": own_step,
    "fastdiff graph": captured_step,
    "diffusers compiled": lambda data, setup: stock_step(data, setup, compiled=True),
    "fastdiff compiled": lambda data, setup: own_step(data, setup, compiled=True),
}


def train(batch: int, method: str, setup: Setup) -> Figures:
    size, steps = setup.size((32, STEPS), (8, TOY_STEPS))
    torch.manual_seed(0)
    data = 2 * torch.rand(batch, 3, size, size, device=setup.device) - 1
    step = METHODS[method](data, setup)

    def run() -> None:
        for _ in range(steps):
            step()

    return job(run, setup.device, steps=steps, units=steps * batch)


def rows(setup: Setup) -> list[Row]:
    found = []
    for compiled in (False, True):
        for batch in setup.size((16, 128), (2,)):
            for method in METHODS:
                if method.endswith("compiled") == compiled:
                    run = functools.partial(train, batch, method, setup)
                    found.append(Row(f"cifar10 U-Net, batch {batch}", method, run, seconds=180 if compiled else 60))
    return found
