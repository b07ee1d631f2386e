"""What users would do instead of calling fastdiff: the operations of `workloads` by other means.

The peers are eager PyTorch that writes into tensors it has, diffusers, and denoising-diffusion-pytorch. A peer draws
its noise from PyTorch's default generator, so that its check can draw the same noise again.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.ddpm import DDPM

from . import torchvision_standin
from .eager import CLIP, Eager
from .networks import network
from .workloads import (
    BOUND,
    OPERATIONS,
    SEED,
    TIMESTEPS,
    Row,
    Rows,
    agree,
    check_loss,
    check_noising,
    check_update,
    few,
    inputs,
    network_bound,
    training_row,
    with_gradient,
)

# Libraries hold alpha_bar in float32. That costs digits near 1, and more when it is cast to the data type.
LIBRARY_BOUND = {torch.float32: 1e-4, torch.bfloat16: 2**-5}
LIBRARIES = {"diffusers": "diffusers", "denoising-diffusion-pytorch": "denoising_diffusion_pytorch"}
NAMES = ("preallocated", *LIBRARIES)


class Peer(Protocol):
    """Another library's diffusion, as the benchmarks call it."""

    def noising(self, x0: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """(x_t, the noise in it); index: 0-based levels (B,)."""

    def loss(self, pred: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(mean squared error, its gradient by pred)."""

    def step(self, x: Tensor, pred: Tensor, index: int) -> Tensor:
        """The ancestral step from a 0-based level."""


class Preallocated:
    """Eager PyTorch that writes into tensors it has: no page faults, no autograd."""

    def __init__(self, like: Tensor) -> None:
        self.model = Eager(TIMESTEPS, like.device)
        self.noise, self.out, self.part = (torch.zeros_like(like) for _ in range(3))
        self.squares = torch.zeros_like(like, dtype=torch.float32)
        self.row = self.model.rows["ddpm"][TIMESTEPS // 2 - 1].tolist()

    def noising(self, x0: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (x0.ndim - 1))
        a = self.model.sqrt_alpha_bar[index].to(x0.dtype).view(shape)
        s = self.model.sqrt_one_minus_alpha_bar[index].to(x0.dtype).view(shape)
        self.noise.normal_()
        return torch.mul(x0, a, out=self.out).addcmul_(s, self.noise), self.noise

    def loss(self, pred: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            difference = torch.sub(pred, noise, out=self.part)
            value = torch.square(difference.float(), out=self.squares).mean()  # a dot product in one thread is 1e-5 off
            return value, difference.mul_(2 / difference.numel())

    def step(self, x: Tensor, pred: Tensor, index: int) -> Tensor:
        a, b, c, d, f = self.row
        x0 = torch.mul(x, a, out=self.part).add_(pred, alpha=b).clamp_(-CLIP, CLIP)
        return torch.mul(x, d, out=self.out).add_(x0, alpha=c).add_(self.noise.normal_(), alpha=f)


class Diffusers:
    """diffusers' DDPMScheduler, and PyTorch's loss."""

    def __init__(self, like: Tensor) -> None:
        self.scheduler = importlib.import_module("diffusers").DDPMScheduler(TIMESTEPS, clip_sample_range=CLIP)

    def noising(self, x0: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.randn_like(x0)
        return self.scheduler.add_noise(x0, noise, index), noise

    def loss(self, pred: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return with_gradient(F.mse_loss(pred.float(), noise.float()), pred)

    def step(self, x: Tensor, pred: Tensor, index: int) -> Tensor:
        return self.scheduler.step(pred, index, x).prev_sample


class DenoisingDiffusion:
    """denoising-diffusion-pytorch's GaussianDiffusion around a model that returns the prediction, and its loss."""

    class Given(nn.Module):
        """A network whose output is set before the call."""

        channels, out_dim, self_condition, random_or_learned_sinusoidal_cond = 3, 3, False, False
        pred: Tensor

        def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
            return self.pred

    def __init__(self, like: Tensor) -> None:
        library = torchvision_standin.stock()
        options = {"timesteps": TIMESTEPS, "objective": "pred_noise", "beta_schedule": "linear"}
        self.model = self.Given()
        self.diffusion = library.GaussianDiffusion(self.model, image_size=like.shape[-1], **options).to(like.device)

    def noising(self, x0: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.randn_like(x0)
        return self.diffusion.q_sample(x0, index, noise), noise

    def loss(self, pred: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return with_gradient(F.mse_loss(pred.float(), noise.float()), pred)

    def step(self, x: Tensor, pred: Tensor, index: int) -> Tensor:
        self.model.pred = pred
        return self.diffusion.p_sample(x, index)[0]


PEERS: dict[str, Callable[[Tensor], Peer]] = {
    "preallocated": Preallocated,
    "diffusers": Diffusers,
    "denoising-diffusion-pytorch": DenoisingDiffusion,
}


@functools.cache
def missing(name: str) -> str | None:
    """Why a peer has no rows, or None if it has."""
    try:
        if name == "denoising-diffusion-pytorch":
            torchvision_standin.stock()
        elif name in LIBRARIES:
            importlib.import_module(LIBRARIES[name])
    except Exception as error:  # with another PyTorch than its own, a library fails in many ways
        return f"{name} does not import: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return None


def peer_names(operation: str) -> tuple[str, ...]:
    """The peers that have the operation. The libraries have no loss of their own: theirs is PyTorch's."""
    return ("preallocated",) if operation == "loss_forward_backward" else NAMES


def peer_rows(operation: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Rows:
    """The rows of the peers that have the operation and import."""
    names = [name for name in peer_names(operation) if missing(name) is None]
    return {name: _row(name, operation, shape, dtype, device) for name in names}


def _row(name: str, operation: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Row:
    data, pred, t = inputs(shape, dtype, device)
    index, middle = t - 1, TIMESTEPS // 2 - 1
    bound = (LIBRARY_BOUND if name in LIBRARIES else BOUND)[dtype]
    peer, n = PEERS[name](data), len(few(data))
    if operation == "noising_and_loss" and name in LIBRARIES:
        pred.requires_grad_()

    def check() -> None:
        part = pred.detach()[:n].clone().requires_grad_()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(SEED)
            noise = torch.randn(data[:n].shape, dtype=dtype, device=device)
            torch.manual_seed(SEED)
            peer = PEERS[name](data[:n])
            if operation == "reverse_update":
                check_update(name, data[:n], pred[:n], peer.step(data[:n], pred[:n], middle), noise, bound)
            elif operation == "loss_forward_backward":
                check_loss(name, part, peer.loss(part, data[:n]), data[:n], bound)
            else:
                x_t, drawn = peer.noising(data[:n], index[:n])
                check_noising(name, data[:n], t[:n], x_t, noise, bound)
                if operation == "noising_and_loss":
                    check_loss(name, part, peer.loss(part, drawn), noise, bound)

    runs: dict[str, Callable[[], object]] = {
        "forward_noising": lambda: peer.noising(data, index)[0],
        "loss_forward_backward": lambda: peer.loss(pred, data),
        "noising_and_loss": lambda: peer.loss(pred, peer.noising(data, index)[1]),
        "reverse_update": lambda: peer.step(data, pred, middle),
    }
    return Row(runs[operation], check)


def all_rows(operation: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Rows:
    """fused, reference, compile, and the peers that import."""
    return OPERATIONS[operation](shape, dtype, device) | peer_rows(operation, shape, dtype, device)


# --- diffusers' own U-Net, with the weights of `network` --------------------------------------------------------


def _unet(device: torch.device, name: str = "small") -> Any:
    net = network(device, name)
    unet = importlib.import_module("diffusers").UNet2DModel(**net.config).to(device)
    unet.load_state_dict(net.state_dict())
    return unet


def diffusers_training_step(batch: int, device: torch.device) -> Row:
    scheduler, unet = importlib.import_module("diffusers").DDPMScheduler(TIMESTEPS), _unet(device)

    def loss(data: Tensor, t: Tensor | None, noise: Tensor | None) -> Tensor:
        index = torch.randint(0, TIMESTEPS, data.shape[:1], device=device) if t is None else t - 1
        noise = torch.randn_like(data) if noise is None else noise
        return F.mse_loss(unet(scheduler.add_noise(data, noise, index), index).sample, noise)

    return training_row("diffusers", unet, loss, batch, torch.float32, device)


def diffusers_sampling(batch: int, steps: int, device: torch.device, name: str, compiled: bool) -> Row:
    """DDPMPipeline with T = steps. Its U-Net is compiled by torch.compile, or eager."""
    library, unet = importlib.import_module("diffusers"), _unet(device, name).eval()
    if compiled:
        unet.compile()
    pipeline = library.DDPMPipeline(unet, library.DDPMScheduler(steps, clip_sample_range=CLIP))
    pipeline.set_progress_bar_config(disable=True)
    net = network(device, name).eval().double()
    oracle, shape = DDPM(net, timesteps=steps).to(device), (batch, *(net.sample_shape or ()))

    def run(generator: torch.Generator | None = None) -> Tensor:
        """(B, H, W, C) in [0, 1]."""
        drawn = pipeline(batch, generator, num_inference_steps=steps, output_type="np")
        return torch.from_numpy(drawn.images)

    def check() -> None:
        """Check the first sample alone, as in `workloads.sampling`."""
        generator = torch.Generator(device).manual_seed(SEED)
        x_T, *noise = (torch.randn(shape, generator=generator, device=device)[:1] for _ in range(steps + 1))
        given = torch.stack(noise).double()
        want = oracle.sample((1, *shape[1:]), x_T=x_T.double(), noise=given) / 2 + 0.5
        got = run(torch.Generator(device).manual_seed(SEED))[:1].permute(0, 3, 1, 2).to(device)
        bound = max(LIBRARY_BOUND[torch.float32], network_bound(torch.float32, device))
        agree("sampling diffusers", [got], [want.clamp(0, 1)], bound)

    return Row(run, check)
