"""Networks of one layer or none, for tests of what surrounds them; and the options of small U-Nets."""

import torch
from torch import Tensor, nn

SHAPE = (4, 2, 4, 4)
# A U-Net of two levels, one with attention.
SMALL = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
ATTENTION = {"down_block_types": ("AttnDownBlock2D",) * 2, "up_block_types": ("AttnUpBlock2D",) * 2}
RESNET = {**ATTENTION, "downsample_type": "resnet", "upsample_type": "resnet"}
# The smallest U-Net, without attention but in the middle.
TINY = {
    "sample_size": 4,
    "block_out_channels": (4, 8),
    "down_block_types": ("DownBlock2D",) * 2,
    "up_block_types": ("UpBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 2,
}


class Net(nn.Module):
    """A convolution with a bias per timestep; what it was called with stays in `calls`."""

    def __init__(self, channels: int = 2, dropout: float = 0.0):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bias = nn.Embedding(1000, channels)
        self.dropout = nn.Dropout(dropout)
        self.calls: list[tuple[Tensor, Tensor, bool]] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.calls.append((x.clone(), t, self.training))
        return self.dropout(self.conv(x) + self.bias(t)[:, :, None, None])


class Pointwise(nn.Module):
    """Each output depends on its own input alone, in the same arithmetic whatever the batch."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.3 * x - 0.01 * t.view(-1, *[1] * (x.ndim - 1))


class Fixed(nn.Module):
    """Predicts one given tensor, whatever the input."""

    def __init__(self, out: object):
        super().__init__()
        self.out = out

    def forward(self, x: Tensor, t: Tensor) -> object:
        return self.out


class Low(nn.Module):
    """A low-rank addition to a layer, which has none of the layer's attributes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base = layer

    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * self.base(x)


class Twice(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def data(*shape: int) -> Tensor:
    return torch.rand(*(shape or SHAPE)) * 2 - 1
