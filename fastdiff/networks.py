"""The reference networks, by the names that `fastdiff train --network` and the files of runs give them."""

from torch import nn

from .dit import DiT
from .support import run_file
from .unet import UNet

Network = UNet | DiT
NETWORKS: dict[str, type[UNet] | type[DiT]] = dict(zip(run_file.NETWORKS, (UNet, DiT), strict=True))


def name_of(network: nn.Module) -> str:
    """The name of a reference network. Raises TypeError for another one."""
    for name, kind in NETWORKS.items():
        if isinstance(network, kind):
            return name
    raise TypeError(f"network: expected a UNet or a DiT, got {type(network).__name__}")
