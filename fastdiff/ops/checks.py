"""Checks of arguments: what cannot be right is a TypeError or ValueError that names the argument, before any work."""

import math
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..support import transforms
from ..support.choices import did_you_mean
from ..support.scalars import as_integer, as_number, integer
from ..support.shapes import fits
from .dispatch import backend_of
from .plan import draw, number, recording

_STRIDED = torch.strided
FEW = 64  # numbers that Python compares faster than PyTorch
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def type_names(dtypes: tuple[torch.dtype, ...]) -> str:
    """The types as a message shows them."""
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


# --- data -------------------------------------------------------------------------------------------------------


def check_floating(name: str, x: Tensor) -> None:
    """x is a floating tensor with a batch dimension."""
    if isinstance(x, Tensor) and x.dtype in FLOATING and x.layout is _STRIDED and x.ndim and not x.is_nested:
        if type(x) is not Tensor and not torch.compiler.is_compiling():
            check_whole(name, x)
        return  # all at once: this comes several times in every call
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        scaled = f"; images as {name}.float() / 127.5 - 1" if x.dtype == torch.uint8 else ""
        raise TypeError(f"{name}: expected one of {type_names(FLOATING)}, got {x.dtype}{scaled}")
    check_dense(name, x)
    if x.ndim < 1:
        raise ValueError(f"{name}: expected a batch dimension, got shape ()")


def check_whole(name: str, x: Tensor) -> None:
    """x is no DTensor, of whose samples and noise this process knows a part alone."""
    split = sys.modules.get("torch.distributed.tensor")
    if split is not None and isinstance(x, split.DTensor):
        raise TypeError(f"{name}: expected the tensor of one process, got a DTensor; {name}.to_local() is its part")


def check_like(name: str, given: Tensor, x: Tensor) -> None:
    """A floating tensor with the shape and device of x."""
    check_floating(name, given)
    if given.shape != x.shape:
        raise ValueError(f"{name}: expected shape {tuple(x.shape)}, got {tuple(given.shape)}")
    check_device(name, given, x.device)


def as_mask(mask: Tensor, x: Tensor, name: str = "mask") -> Tensor:
    """A mask that `check_mask` takes, as a floating tensor of the shape of x, without a gradient."""
    check_mask(mask, x, name)
    if mask.dtype == torch.bool:
        mask = mask.to(x.dtype)
    if mask.shape != x.shape:
        mask = mask.expand(x.shape)
    return mask.detach() if mask.requires_grad else mask


def check_mask(mask: Tensor, x: Tensor, name: str = "mask") -> None:
    """mask is a floating or bool tensor that expands to the shape of x."""
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        check_dense(name, mask)
    else:
        check_floating(name, mask)
    check_device(name, mask, x.device)
    if mask.shape != x.shape and (
        mask.ndim != x.ndim or not all(fits(n, whole) for n, whole in zip(mask.shape, x.shape, strict=True))
    ):
        raise ValueError(f"{name}: expected a shape that expands to {tuple(x.shape)}, got {tuple(mask.shape)}")


def check_dense(name: str, x: Tensor) -> None:
    """x is no sparse, nested or otherwise packed tensor."""
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got {'a nested one' if x.is_nested else x.layout}")


def check_device(name: str, given: Tensor, device: torch.device) -> None:
    """ValueError if a tensor is on another device."""
    if given.device != device:
        raise ValueError(f"{name}: expected device {device}, got {given.device}")


def wants_gradient(*operands: Any) -> bool:
    """Whether a gradient by one of them is wanted."""
    if torch.is_grad_enabled():
        for t in operands:  # no generator, which costs more in every call
            if isinstance(t, Tensor) and t.requires_grad:
                return True
    return False


def check_out(out: Tensor, like: Tensor, *operands: Any) -> None:
    """`out` can take a result like `like` made of the operands, and no gradient is wanted."""
    check_like("out", out, like)
    if out.dtype != like.dtype:
        raise TypeError(f"out: expected {like.dtype}, got {out.dtype}")
    if any(out is operand for operand in operands):
        raise ValueError("out: expected a tensor of its own, got one of the operands")
    if wants_gradient(out, *operands):
        raise ValueError("out: expected no gradient to be wanted, which needs a result of its own")


def check_channels(x: Tensor, skip: Tensor | None, groups: int) -> tuple[int, int]:
    """(channels of x (B, C, ...) and skip together, the number of groups, which divides them)."""
    check_floating("x", x)
    if x.ndim < 2:
        raise ValueError(f"x: expected shape (B, C, ...), got {tuple(x.shape)}")
    channels, number = x.shape[1], integer(groups)
    if skip is not None:
        check_floating("skip", skip)
        check_device("skip", skip, x.device)
        if skip.dtype != x.dtype:
            raise ValueError(f"skip: expected the type of x, {x.dtype}, got {skip.dtype}")
        if skip.ndim != x.ndim or (skip.shape[0], *skip.shape[2:]) != (x.shape[0], *x.shape[2:]):
            raise ValueError(f"skip: expected the shape of x, {tuple(x.shape)}, but for C, got {tuple(skip.shape)}")
        channels += skip.shape[1]
    if number is None or number < 1 or channels % number:
        raise ValueError(f"num_groups: expected a divisor of {channels} channels, got {groups!r}")
    return channels, number


def check_vector(name: str, given: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """A floating tensor of that shape on the device of x."""
    check_floating(name, given)
    if given.shape != shape or given.device != x.device:
        check_shape(name, given, shape)
        check_device(name, given, x.device)


def check_shape(name: str, given: Any, shape: tuple[int, ...]) -> None:
    """A floating tensor of that shape."""
    check_floating(name, given)
    if given.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(given.shape)}")


def check_state(out: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """`out` can take the result of a sampler."""
    check_shape("out", out, shape)
    if out.dtype != dtype or out.device != device or out.requires_grad:
        raise ValueError(
            f"out: expected {dtype} on {device} without gradient, got {out.dtype} on {out.device}"
            + " with gradient" * out.requires_grad
        )


def as_device(device: torch.device | str) -> torch.device:
    """The device with its number, as tensors name it. ValueError for one that is not there."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"device: expected one of this machine, got {device!r} ({str(error).splitlines()[0]})"
        ) from None


# --- options ----------------------------------------------------------------------------------------------------


def check_choice(name: str, value: Any, known: Iterable[str]) -> None:
    """ValueError if a name is not among the known ones."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}{did_you_mean(value, known)}")


def check_reduction(reduction: Any) -> None:
    """ValueError unless it is "mean" or "none"."""
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction: expected 'mean' or 'none', got {reduction!r}")


def as_clip(clip: float | None) -> float | None:
    """clip as a float. ValueError if it is not above 0."""
    if clip is None:
        return None
    clip = as_number("clip", clip)
    if not clip > 0:
        raise ValueError(f"clip: expected a number above 0 or None, got {clip}")
    return clip


def as_shape(shape: Any) -> tuple[int, ...]:
    """(B, ...), of a tensor that memory could address."""
    if not isinstance(shape, Iterable) or isinstance(shape, str | Tensor):
        raise TypeError(f"shape: expected (B, ...), got {shape!r}")
    sizes = tuple(as_integer("shape", n, 0, 2**63 - 1) for n in shape)
    if not sizes:
        raise ValueError("shape: expected a batch dimension, got ()")
    if torch.compiler.is_compiling():  # sizes may be symbols
        return sizes
    if not any(isinstance(n, torch.SymInt) for n in sizes) and math.prod(max(1, n) for n in sizes) >= 2**60:
        raise ValueError(f"shape: expected fewer than 2^60 elements, got {sizes}")
    return sizes


# --- tables and their rows --------------------------------------------------------------------------------------


def check_table(name: str, table: Tensor, columns: int, x: Tensor) -> None:
    """A contiguous float32 table on the device of x; for float64 data it may be float64."""
    expected = (torch.float32, torch.float64) if x.dtype == torch.float64 else (torch.float32,)
    if not isinstance(table, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(table).__name__}")
    check_dense(name, table)
    if table.dtype not in expected:
        raise TypeError(f"{name}: expected {type_names(expected)}, got {table.dtype}")
    if table.ndim != 2 or table.shape[1] != columns or table.shape[0] == 0 or not table.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous (rows, {columns}) table, got shape {tuple(table.shape)}")
    check_device(name, table, x.device)


def as_index(name: str, index: int | Tensor, x: Tensor) -> Tensor:
    """(1,) or (B,) int64 on the device of x. Its range is checked later, by `check_range`."""
    if not isinstance(index, Tensor):
        value = integer(index)
        if value is None:
            raise TypeError(f"{name}: expected an int or an int64 tensor, got {type(index).__name__}")
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{name}: expected 64 bits, got {value}")
        return number(value, x.device)
    check_dense(name, index)
    if index.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {index.dtype}")
    check_device(name, index, x.device)
    if index.ndim == 0:
        return index.reshape(1)
    if index.ndim > 1 or not fits(index.shape[0], x.shape[0]):
        raise ValueError(f"{name}: expected shape () or ({x.shape[0]},), got {tuple(index.shape)}")
    return index.contiguous()


def check_levels(name: str, index: Tensor, end: int, ids: Tensor | None = None) -> None:
    """`check_range` of an index and of sample ids, as far as their values are to be seen through a transform."""
    check_range(name, transforms.bare(index), end)
    check_range("sample_ids", transforms.bare(ids), 2**32)


def check_range(name: str, index: Tensor | None, end: int) -> None:
    """The values lie in [0, end). Nothing is checked on a GPU: to read its values would wait for the device."""
    if index is not None and index.is_cpu:
        recorder = recording()
        if recorder is None:
            _check_values(name, index, end)
        else:
            recorder.check(_check_values, name, index, end)


def _check_values(name: str, index: Tensor, end: int) -> None:
    n = index.numel()
    if n == 0:
        return
    if n == 1:
        low = high = index.item()
    elif n <= FEW and index.ndim == 1 and not transforms.active():  # PyTorch 2.7 has no list of a tensor within one
        values = index.tolist()
        low, high = min(values), max(values)
    else:
        low, high = (v.item() for v in index.aminmax())
    if low < 0 or high >= end:
        raise ValueError(f"{name}: expected values in [0, {end}), got {low if low < 0 else high}")


def runs_kernel(x: Tensor, *others: Tensor | None) -> bool:
    """Whether an operation that has a kernel for its result alone runs it on x and others.

    Plain PyTorch runs if a gradient is wanted, and within transforms. So it does within a compilation: Inductor makes
    one kernel of the arithmetic and of what is around it.
    """
    return (
        not torch.compiler.is_compiling()
        and backend_of(x) == "triton"
        and not wants_gradient(x, *others)
        and not transforms.active()
    )


# --- noise ------------------------------------------------------------------------------------------------------


def as_sample_ids(
    given: Tensor | Iterable[int] | None, batch: int, device: torch.device, *, strict: bool = False
) -> Tensor | None:
    """(B,) int64 on the device, or None.

    Any iterable is taken, and a tensor of any device; values on the CPU are checked.
    strict: only a tensor on the device is taken. The op itself checks its values, with `check_range`.
    """
    if given is None:
        return None
    if not isinstance(given, Tensor):
        if strict:
            raise TypeError(f"sample_ids: expected an int64 tensor, got {type(given).__name__}")
        given = _numbers(given)
    check_dense("sample_ids", given)
    if given.dtype != torch.int64:
        raise TypeError(f"sample_ids: expected int64, got {given.dtype}")
    if given.shape != (batch,):
        raise ValueError(f"sample_ids: expected shape ({batch},), got {tuple(given.shape)}")
    if not strict:
        seen = transforms.visible(given)
        if seen is not None and bool(((seen < 0) | (seen >= 2**32)).any()):
            raise ValueError(f"sample_ids: expected values in [0, 2^32), got {seen.tolist()}")
        given = given.to(device)
    check_device("sample_ids", given, device)
    return given.contiguous()


def _numbers(given: Any) -> Tensor:
    """An iterable of integers as an int64 tensor on the CPU."""
    try:
        values = [integer(n.item() if isinstance(n, Tensor) and n.ndim == 0 else n) for n in given]
    except TypeError:
        raise TypeError(f"sample_ids: expected an int64 tensor or integers, got {type(given).__name__}") from None
    for value, n in zip(values, given, strict=False):
        if value is None:
            got = torch.get_default_dtype() if isinstance(n, float) else type(n).__name__
            raise TypeError(f"sample_ids: expected int64, got {got}")
        if not 0 <= value < 2**32:
            raise ValueError(f"sample_ids: expected values in [0, 2^32), got {value}")
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def noise_source(x: Tensor, seed: int | Tensor | None, noise: Tensor | None) -> Tensor | None:
    """The seed as a tensor, or None if noise is given."""
    if noise is None:
        return as_seed(seed, x.device)
    if seed is not None:
        raise ValueError("seed: expected None where noise is given")
    check_like("noise", noise, x)
    return None


def as_seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """(1,) int64 on the device. If None, it is drawn there from PyTorch's default generator, without a host sync."""
    if seed is None:
        return draw(device)
    if isinstance(seed, Tensor):
        check_dense("seed", seed)
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(f"seed: expected one int64 number, got {seed.dtype} of shape {tuple(seed.shape)}")
        check_device("seed", seed, device)
        return seed if seed.ndim == 1 else seed.reshape(1)
    number = integer(seed)
    if number is None:
        raise TypeError(f"seed: expected an int, an int64 tensor or None, got {type(seed).__name__}")
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"seed: expected 64 bits, got {number}")
    return torch.full((1,), number - 2**64 if number >= 2**63 else number, dtype=torch.int64, device=device)


def check_generator(seed: Any, generator: Any) -> None:
    """A generator, or none; not together with a seed."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    if seed is not None:
        raise ValueError("seed: expected None with a generator, from which the seed is drawn")


def seed_of(seed: int | Tensor | None, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """The seed (1,) on the device: as given, or drawn from the generator."""
    if generator is None:
        return as_seed(seed, device)
    return torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator, device=generator.device).to(device)
