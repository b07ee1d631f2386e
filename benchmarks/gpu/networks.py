"""The networks of the stages sampling and training, with random weights, and the loop that pipelines run on them."""

import importlib
from typing import Any

import torch
from torch import Tensor

from benchmarks.workloads import network
from fastdiff.unet import UNet

from .rows import NotAvailable, Setup

# The configuration of the U-Net of Stable Diffusion 1.5; its other values are diffusers' defaults. 860M parameters.
STABLE_DIFFUSION = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
# The configuration of the transformer of Stable Diffusion 3.5 medium. 2.2B parameters.
STABLE_DIFFUSION_3 = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}
TINY: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
TINY_UNET = TINY | {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
TINY_STABLE_DIFFUSION = TINY | {
    "cross_attention_dim": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SMALL_STABLE_DIFFUSION_3: dict[str, Any] = STABLE_DIFFUSION_3 | {
    "sample_size": 16,
    "num_layers": 2,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "caption_projection_dim": 128,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 16,
    "dual_attention_layers": (0,),
}
TOKENS, TOKENS_3 = 77, 333  # of the texts of the two


def diffusers() -> Any:
    try:
        return importlib.import_module("diffusers")
    except ImportError as error:
        raise NotAvailable(f"diffusers does not import: {error}") from error


def cifar10(setup: Setup) -> UNet:
    """fastdiff's U-Net of google/ddpm-cifar10-32, 35.7M parameters."""
    if setup.toy:
        torch.manual_seed(0)
        return UNet(**TINY_UNET).to(setup.device)
    return network(setup.device, "cifar10")


def stock_cifar10(setup: Setup) -> Any:
    """The same network of diffusers, with the same weights."""
    own = cifar10(setup)
    unet = diffusers().UNet2DModel(**own.config).to(setup.device)
    unet.load_state_dict(own.state_dict())
    return unet


def stable_diffusion(setup: Setup) -> Any:
    torch.manual_seed(0)
    with setup.device:  # 860M random numbers take long on a CPU
        return diffusers().UNet2DConditionModel(**setup.size(STABLE_DIFFUSION, TINY_STABLE_DIFFUSION)).eval()


def stable_diffusion_3(setup: Setup) -> Any:
    torch.manual_seed(0)
    with setup.device:
        return diffusers().SD3Transformer2DModel(**setup.size(STABLE_DIFFUSION_3, SMALL_STABLE_DIFFUSION_3)).eval()


class Pipeline:
    """The loop of DDIMPipeline and of those of Stable Diffusion, from x_T to x_0, without text encoders and VAE.

    The network gets its time on the device and the scheduler on the host, so that neither waits for the other: this is
    the quickest way to write that loop. name: what a pipeline of diffusers calls the network.
    """

    def __init__(self, network: Any, scheduler: Any, name: str = "unet") -> None:
        self.network, self.scheduler, self.name = network, scheduler, name

    @property
    def components(self) -> dict[str, Any]:
        return {self.name: self.network, "scheduler": self.scheduler}

    @torch.no_grad()
    def __call__(self, x: Tensor, steps: int, given: dict[str, Tensor] | None = None, guidance: float = 7.5) -> Tensor:
        """given: more arguments of the network, of 2 B samples, without and with the prompt; None for no prompt."""
        self.scheduler.set_timesteps(steps)
        for t, time in zip(self.scheduler.timesteps, self.scheduler.timesteps.to(x.device), strict=True):
            if given is None:
                pred = self.network(x, time, return_dict=False)[0]
            else:
                times = time.expand(2 * len(x))
                both = self.network(torch.cat([x, x]), timestep=times, **given, return_dict=False)[0]
                without, prompted = both.chunk(2)
                pred = without + guidance * (prompted - without)
            x = self.scheduler.step(pred, t, x, return_dict=False)[0]
        return x
