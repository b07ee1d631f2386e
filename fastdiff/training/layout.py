"""How a network is laid out for training: split or repeated over processes, channels last, and what it recomputes."""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdiff.diffusion import Diffusion
from fastdiff.dit import Block
from fastdiff.nn import Attention, ResnetBlock


def blocks(network: nn.Module) -> list[nn.Module]:
    """The parts of a U-Net or a DiT that FSDP gathers one by one, and that are recomputed one by one."""
    return [part for part in network.modules() if isinstance(part, ResnetBlock | Attention | Block)]


def recompute_blocks(network: nn.Module) -> None:
    """Keep only the inputs of the blocks for the backward pass, which computes the rest again.

    Reference: Chen et al. 2016, arXiv:1604.06174.
    """
    from torch.utils.checkpoint import checkpoint

    for block in blocks(network):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def shard(network: nn.Module, device: torch.device) -> None:
    """Split the weights of a network over all processes, in place, each block by itself.

    Reference: Zhao et al. 2023, arXiv:2304.11277; torch.distributed.fsdp.fully_shard.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks(network):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def replicate(diffusion: Diffusion, device: torch.device) -> nn.Module:
    """The diffusion, whose gradients become their mean over all processes."""
    from torch.nn.parallel import DistributedDataParallel

    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(diffusion, device_ids=ids, gradient_as_bucket_view=True)


def exchanging(trained: nn.Module, network: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Exchange gradients after the last of several backward passes only.

    Args:
        trained: what is called, from `replicate` or not.
        network: in it, split by `shard` or not.
    """
    pause: Any = getattr(trained, "no_sync", None)
    toggle: Any = getattr(network, "set_requires_gradient_sync", None)
    if toggle is not None:
        toggle(last)
    elif pause is not None and not last:
        paused: AbstractContextManager[None] = pause()
        return paused
    return nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is split over processes; all of them call this. Other tensors as they are."""
    gather: Any = getattr(tensor, "full_tensor", None)
    found: Tensor = tensor if gather is None else gather()
    return found


def laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of a whole tensor, split over processes and laid out in memory as `like` is."""
    if not hasattr(like, "device_mesh"):
        return torch.empty_like(like).copy_(tensor)
    from torch.distributed.tensor import DTensor, distribute_tensor

    split = cast(DTensor, like)
    return distribute_tensor(tensor.to(like.device), split.device_mesh, split.placements)
