"""Checks of arguments: what cannot be right is a TypeError or ValueError that names the argument, before any work."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .quick import number

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    """The types as a message shows them."""
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


# --- data -------------------------------------------------------------------------------------------------------


def check_floating(name: str, x: Tensor) -> None:
    """x is a floating tensor with a batch dimension."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name}: expected one of {names(FLOATING)}, got {x.dtype}")
    if x.ndim < 1:
        raise ValueError(f"{name}: expected a batch dimension, got shape ()")


def check_like(name: str, given: Tensor, x: Tensor) -> None:
    """A floating tensor with the shape and device of x."""
    check_floating(name, given)
    if given.shape != x.shape:
        raise ValueError(f"{name}: expected shape {tuple(x.shape)}, got {tuple(given.shape)}")
    check_device(name, given, x.device)


def check_device(name: str, given: Tensor, device: torch.device) -> None:
    """ValueError if a tensor is on another device."""
    if given.device != device:
        raise ValueError(f"{name}: expected device {device}, got {given.device}")


def check_out(out: Tensor, like: Tensor, *operands: Tensor | None) -> None:
    """`out` can take a result like `like` made of the operands, and no gradient is wanted."""
    check_like("out", out, like)
    if out.dtype != like.dtype:
        raise TypeError(f"out: expected {like.dtype}, got {out.dtype}")
    if any(out is operand for operand in operands):
        raise ValueError("out: expected a tensor of its own, got one of the operands")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (out, *operands)):
        raise ValueError("out: expected no gradient to be wanted, which needs a result of its own")


def check_channels(x: Tensor, groups: int) -> None:
    """x (B, C, ...) has channels that `groups` divides."""
    check_floating("x", x)
    if x.ndim < 2:
        raise ValueError(f"x: expected shape (B, C, ...), got {tuple(x.shape)}")
    channels = x.shape[1]
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or channels % groups:
        raise ValueError(f"num_groups: expected a divisor of {channels} channels, got {groups!r}")


def check_vector(name: str, given: Tensor, shape: Sequence[int], x: Tensor) -> None:
    """A floating tensor of that shape on the device of x."""
    check_shape(name, given, tuple(shape))
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


# --- options ----------------------------------------------------------------------------------------------------


def check_choice(name: str, value: Any, known: Iterable[str]) -> None:
    """ValueError if a name is not among the known ones."""
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


def as_clip(clip: float | None) -> float | None:
    """clip as a float. ValueError if it is not above 0."""
    if clip is None:
        return None
    if not clip > 0:
        raise ValueError(f"clip: expected a number above 0 or None, got {clip}")
    return float(clip)


# --- tables and their rows --------------------------------------------------------------------------------------


def check_table(name: str, table: Tensor, columns: int, x: Tensor) -> None:
    """A contiguous float32 table on the device of x; for float64 data it may be float64."""
    expected = (torch.float32, torch.float64) if x.dtype == torch.float64 else (torch.float32,)
    if not isinstance(table, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(table).__name__}")
    if table.dtype not in expected:
        raise TypeError(f"{name}: expected {names(expected)}, got {table.dtype}")
    if table.ndim != 2 or table.shape[1] != columns or table.shape[0] == 0 or not table.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous (rows, {columns}) table, got shape {tuple(table.shape)}")
    check_device(name, table, x.device)


def as_index(name: str, index: int | Tensor, x: Tensor) -> Tensor:
    """(1,) or (B,) int64 on the device of x. Its range is checked later, by `check_range`."""
    if not isinstance(index, Tensor):
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"{name}: expected an int or an int64 tensor, got {type(index).__name__}")
        if not -(2**63) <= index < 2**63:
            raise ValueError(f"{name}: expected 64 bits, got {index}")
        return number(index, x.device)
    if index.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {index.dtype}")
    check_device(name, index, x.device)
    if index.ndim == 0:
        return index.reshape(1)
    if index.ndim > 1 or index.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"{name}: expected shape () or ({x.shape[0]},), got {tuple(index.shape)}")
    return index.contiguous()


def check_range(name: str, index: Tensor | None, end: int) -> None:
    """The values lie in [0, end). On a GPU nothing is checked: to look would wait for the device."""
    if index is not None and index.is_cpu:
        low, high = (index.item(),) * 2 if index.numel() == 1 else (v.item() for v in index.aminmax())
        if low < 0 or high >= end:
            raise ValueError(f"{name}: expected values in [0, {end}), got {low if low < 0 else high}")


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
        given = torch.as_tensor(list(given), device="cpu")
    if given.dtype != torch.int64:
        raise TypeError(f"sample_ids: expected int64, got {given.dtype}")
    if given.shape != (batch,):
        raise ValueError(f"sample_ids: expected shape ({batch},), got {tuple(given.shape)}")
    if not strict:
        if given.device.type == "cpu" and bool(((given < 0) | (given >= 2**32)).any()):
            raise ValueError(f"sample_ids: expected values in [0, 2^32), got {given.tolist()}")
        given = given.to(device)
    check_device("sample_ids", given, device)
    return given.contiguous()


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
        return torch.randint(-(2**63), 2**63 - 1, (1,), device=device)  # torch.compile cannot trace random_
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(f"seed: expected one int64 number, got {seed.dtype} of shape {tuple(seed.shape)}")
        check_device("seed", seed, device)
        return seed if seed.ndim == 1 else seed.reshape(1)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int, an int64 tensor or None, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected 64 bits, got {seed}")
    return torch.full((1,), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)
