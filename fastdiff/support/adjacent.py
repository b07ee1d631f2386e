"""Weights and tokens that follow each other in memory."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils.dlpack import from_dlpack

from .plain import is_ordinary


def adjacent(parts: Sequence[Tensor]) -> bool:
    """Whether tensors, of one shape but for the first size, follow each other in the same memory."""
    first = parts[0]
    memory, start, rest = first.untyped_storage()._cdata, first.storage_offset(), first.shape[1:]
    for p in parts:
        if p.untyped_storage()._cdata != memory or p.storage_offset() != start or p.shape[1:] != rest:
            return False
        if not p.is_contiguous():
            return False
        start += p.numel()
    return True


def joined(parts: Sequence[Tensor]) -> Tensor:
    """torch.cat(parts); where they lie if they are adjacent, else copied."""
    if torch.compiler.is_compiling() or not adjacent(parts):
        return torch.cat(list(parts))
    first = parts[0].detach()
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


def lay_together(parts: Sequence[Tensor]) -> None:
    """Put the values of parameters one behind the other in memory."""
    if not adjacent(parts):
        together = torch.cat([part.data for part in parts]).split([len(part) for part in parts])
        for part, new in zip(parts, together, strict=True):
            part.data = new


def shares_storage(t: Tensor) -> bool:
    """Whether its storage holds more than its elements; never that of a subclass, which may have none."""
    return is_ordinary(t) and t.untyped_storage().nbytes() != t.numel() * t.element_size()


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
