"""What a tensor spans, and fresh CPU memory at a lower price.

The first touch of every 4 KiB page of a fresh tensor is a page fault. If its memory goes back to the system when it is
freed, the faults take several times as long as writing it. Linux can hand out 2 MiB at a time (madvise(2),
MADV_HUGEPAGE); PyTorch asks for that with THP_MEM_ALLOC_ENABLE=1.
"""

import ctypes
import functools
import sys
from typing import Any

import torch
from torch import Tensor

PAGE = 2**21
MADV_HUGEPAGE = 14
# The largest block whose size glibc learns from: DEFAULT_MMAP_THRESHOLD_MAX (mallopt(3)), less what it adds.
LARGEST = 2**25 - 2**16


@functools.cache
def keep_freed_memory() -> None:
    """Let the C library keep up to 64 MiB of freed memory for later allocations. Happens once per process.

    glibc gives back free memory at the end of its heap, beyond twice the largest block that was freed so far (up to
    32 MiB). The tensors of a small network are smaller, so every layer would fault its memory in again. This frees one
    large block, of which nothing is touched.
    """
    torch.empty(LARGEST, dtype=torch.uint8)


def span(t: Tensor) -> int:
    """The bytes from the first of t to its last, gaps included."""
    if t.numel() == 0:
        return 0
    return (1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))) * t.element_size()


@functools.cache
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def in_huge_pages(fresh: Tensor) -> Tensor:
    """The same tensor, whose memory nothing has touched yet, in huge pages. A hint; the system may ignore it."""
    size = fresh.numel() * fresh.element_size()
    if size >= PAGE and fresh.is_cpu and (madvise := _madvise()):
        start, end = -(-fresh.data_ptr() // PAGE) * PAGE, (fresh.data_ptr() + size) // PAGE * PAGE
        if end > start:
            madvise(start, end - start, MADV_HUGEPAGE)
    return fresh
