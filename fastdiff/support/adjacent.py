"""Weights and tokens that follow each other in memory."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils.dlpack import from_dlpack


def adjacent(parts: Sequence[Tensor]) -> bool:
    """Whether tensors of one shape follow each other in the same memory."""
    first = parts[0]
    memory = first.untyped_storage()._cdata
    return all(
        p.untyped_storage()._cdata == memory
        and p.storage_offset() == first.storage_offset() + i * first.numel()
        and p.is_contiguous()
        for i, p in enumerate(parts)
    )


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Equal tensors as one; where they lie if they are adjacent, else copied."""
    if torch.compiler.is_compiling() or not adjacent(parts):
        return torch.cat(list(parts))
    first = parts[0].detach()
    return first.as_strided((len(parts) * first.shape[0], *first.shape[1:]), first.stride())


def with_own_storage(t: Tensor) -> Tensor:
    """The same memory as a tensor whose storage ends where it ends. Shared tensors and subclasses stay as they are.

    Writers of safetensors (Accelerate, huggingface_hub) take tensors of one storage for one tensor, and drop all but
    the first.
    """
    if type(t) is not Tensor or t.requires_grad or t.device.type not in ("cpu", "cuda") or not t.is_contiguous():
        return t
    if t.is_cpu and t.is_shared():  # by processes, which send storages
        return t
    with unset_fake_temporarily(), torch.inference_mode(False):
        # As bytes, since DLPack lacks some of the types.
        return from_dlpack(t.view(torch.uint8)).view(t.dtype)


def joined_tokens(first: Tensor, second: Tensor) -> Tensor:
    """torch.cat((first, second), 1), each (B, N, C); where they lie if they are the two parts of such a tensor."""
    batch, tokens, channels = first.shape
    same = first.untyped_storage()._cdata == second.untyped_storage()._cdata and first.stride() == second.stride()
    if not same or second.storage_offset() != first.storage_offset() + tokens * first.stride(1):
        return torch.cat((first, second), 1)
    return first.as_strided((batch, tokens + second.shape[1], channels), first.stride())
