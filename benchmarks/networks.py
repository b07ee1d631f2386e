"""The U-Nets that the benchmarks train and sample."""

from typing import cast

import torch

from fastdiff.training import DIGITS, Options, build
from fastdiff.unet import UNet


def small(device: torch.device) -> UNet:
    """A U-Net for quick runs, on a CPU a smaller one."""
    widths = (128, 256, 256) if device.type == "cuda" else (32, 64)
    return UNet(
        sample_size=32 if device.type == "cuda" else 16,
        block_out_channels=widths,
        down_block_types=(*["DownBlock2D"] * (len(widths) - 1), "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", *["UpBlock2D"] * (len(widths) - 1)),
        layers_per_block=2 if device.type == "cuda" else 1,
    )


def digits(device: torch.device) -> UNet:
    """The network of `fastdiff train --data digits`: 367,129 parameters."""
    return cast(UNet, build(Options("digits", **DIGITS)).model)


def cifar10(device: torch.device) -> UNet:
    """The network of google/ddpm-cifar10-32: 35,746,307 parameters."""
    return UNet(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )


NETWORKS = {"small": small, "digits": digits, "cifar10": cifar10}


def network(device: torch.device, name: str = "small") -> UNet:
    """One of NETWORKS, always with the same weights."""
    torch.manual_seed(0)
    return NETWORKS[name](device).to(device)
