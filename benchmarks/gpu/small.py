"""Small networks of diffusers of each kind that `accelerate` changes, with random weights, and arguments of a call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .networks import SMALL_STABLE_DIFFUSION_3, diffusers, stock_cifar10
from .rows import Setup

WIDTH, TOKENS = 32, 13  # of a text
WIDE = 128  # of one whose keys and values are one product for all blocks
# Widths that kernels read 16 bytes at a time, as those of large networks.
STABLE_DIFFUSION = {
    "sample_size": 8,
    "block_out_channels": (64, 128),
    "layers_per_block": 1,
    "cross_attention_dim": WIDE,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 64}
FLUX = HEADS | {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "axes_dims_rope": (16, 24, 24),
}
WAN = HEADS | {
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": WIDTH,
    "freq_dim": 32,
    "ffn_dim": 256,
    "num_layers": 1,
    "cross_attn_norm": True,
    "rope_max_seq_len": 32,
}
Given = dict[str, Any]


def cifar10() -> tuple[nn.Module, Given]:
    net = stock_cifar10(Setup(torch.get_default_device(), toy=True))
    return net, {"sample": torch.randn(2, 3, 8, 8), "timestep": 10}


def stable_diffusion() -> tuple[nn.Module, Given]:
    text = torch.randn(2, TOKENS, WIDE)
    given = {"sample": torch.randn(2, 4, 8, 8), "timestep": 10, "encoder_hidden_states": text}
    return diffusers().UNet2DConditionModel(**STABLE_DIFFUSION), given


def stable_diffusion_3() -> tuple[nn.Module, Given]:
    config = SMALL_STABLE_DIFFUSION_3
    text = torch.randn(2, TOKENS, config["joint_attention_dim"])
    given = {"hidden_states": torch.randn(2, 16, 16, 16), "timestep": torch.tensor([3, 500])}
    given |= {"encoder_hidden_states": text, "pooled_projections": text[:, 0]}
    return diffusers().SD3Transformer2DModel(**config), given


def flux() -> tuple[nn.Module, Given]:
    text, ids = torch.randn(2, TOKENS, WIDTH), torch.arange(64.0)
    given = {"hidden_states": torch.randn(2, 64, 16), "timestep": torch.tensor([0.1, 0.9])}
    given |= {"encoder_hidden_states": text, "pooled_projections": text[:, 0]}
    given |= {"img_ids": torch.stack((0 * ids, ids // 8, ids % 8), 1), "txt_ids": torch.zeros(TOKENS, 3)}
    return diffusers().FluxTransformer2DModel(**FLUX), given


def wan() -> tuple[nn.Module, Given]:
    given = {"hidden_states": torch.randn(2, 4, 1, 16, 16), "timestep": torch.tensor([3, 500])}
    given["encoder_hidden_states"] = torch.randn(2, TOKENS, WIDTH)
    return diffusers().WanTransformer3DModel(**WAN), given


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Given]]] = {
    "cifar10 U-Net": cifar10,
    "SD 1.5 U-Net": stable_diffusion,
    "SD 3.5 transformer": stable_diffusion_3,
    "Flux transformer": flux,
    "Wan transformer": wan,
}


@torch.no_grad()
def made(name: str, device: torch.device) -> tuple[nn.Module, Given]:
    """A network in eval mode, no weight of which is 0 or 1, and the arguments of a call."""
    torch.manual_seed(0)
    with device:
        net, given = NETWORKS[name]()
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net.eval(), given


def cast(given: Given, dtype: torch.dtype, more: int = 0) -> Given:
    """The arguments in a type, and each number so much larger."""

    def one(value: Any) -> Any:
        floating = isinstance(value, torch.Tensor) and value.ndim > 1
        return (value.to(dtype) if floating else value) + more

    return {name: one(value) for name, value in given.items()}
