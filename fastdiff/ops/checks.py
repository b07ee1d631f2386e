"""Argument checks: what cannot be right is a TypeError or ValueError that names the argument, before any work."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def check_floating(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name}: expected one of {names(FLOATING)}, got {x.dtype}")
    if x.ndim < 1:
        raise ValueError(f"{name}: expected a batch dimension, got shape ()")


def check_like(name: str, given: Tensor, x: Tensor) -> None:
    check_floating(name, given)
    if given.shape != x.shape:
        raise ValueError(f"{name}: expected shape {tuple(x.shape)}, got {tuple(given.shape)}")
    if given.device != x.device:
        raise ValueError(f"{name}: expected device {x.device}, got {given.device}")


def check_out(out: Tensor, like: Tensor, *operands: Tensor | None) -> None:
    """ValueError or TypeError unless `out` can take a result like `like` made of the operands, without a gradient."""
    check_like("out", out, like)
    if out.dtype != like.dtype:
        raise TypeError(f"out: expected {like.dtype}, got {out.dtype}")
    if any(out is operand for operand in operands):
        raise ValueError("out: expected a tensor of its own, got one of the operands")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (out, *operands)):
        raise ValueError("out: expected no gradient to be wanted, which needs a result of its own")


def as_index(name: str, index: int | Tensor, x: Tensor) -> Tensor:
    """(1,) or (B,) int64 on the device of x. Its range is checked where that costs no wait, in `ops`."""
    if not isinstance(index, Tensor):
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"{name}: expected an int or an int64 tensor, got {type(index).__name__}")
        if not -(2**63) <= index < 2**63:
            raise ValueError(f"{name}: expected 64 bits, got {index}")
        return torch.full((1,), index, dtype=torch.int64, device=x.device)
    if index.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {index.dtype}")
    if index.device != x.device:
        raise ValueError(f"{name}: expected device {x.device}, got {index.device}")
    if index.ndim == 0:
        return index.reshape(1)
    if index.ndim > 1 or index.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"{name}: expected shape () or ({x.shape[0]},), got {tuple(index.shape)}")
    return index.contiguous()


def check_table(name: str, table: Tensor, columns: int, x: Tensor) -> None:
    expected = (torch.float32, torch.float64) if x.dtype == torch.float64 else (torch.float32,)
    if not isinstance(table, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(table).__name__}")
    if table.dtype not in expected:
        raise TypeError(f"{name}: expected {names(expected)}, got {table.dtype}")
    if table.ndim != 2 or table.shape[1] != columns or table.shape[0] == 0 or not table.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous (rows, {columns}) table, got shape {tuple(table.shape)}")
    if table.device != x.device:
        raise ValueError(f"{name}: expected device {x.device}, got {table.device}")


def as_ids(sample_ids: Tensor | None, x: Tensor) -> Tensor | None:
    if sample_ids is None:
        return None
    if not isinstance(sample_ids, Tensor):
        raise TypeError(f"sample_ids: expected an int64 tensor, got {type(sample_ids).__name__}")
    if sample_ids.dtype != torch.int64:
        raise TypeError(f"sample_ids: expected int64, got {sample_ids.dtype}")
    if sample_ids.shape != x.shape[:1]:
        raise ValueError(f"sample_ids: expected shape ({x.shape[0]},), got {tuple(sample_ids.shape)}")
    if sample_ids.device != x.device:
        raise ValueError(f"sample_ids: expected device {x.device}, got {sample_ids.device}")
    return sample_ids.contiguous()


def noise_source(x: Tensor, seed: int | Tensor | None, noise: Tensor | None) -> Tensor | None:
    if noise is None:
        return as_seed(seed, x.device)
    if seed is not None:
        raise ValueError("seed: expected None where noise is given")
    check_like("noise", noise, x)
    return None


def as_seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """(1,) int64 on the device; drawn from PyTorch's default generator of the device if None, without a host sync."""
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), device=device)  # torch.compile cannot trace random_
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(f"seed: expected one int64 number, got {seed.dtype} of shape {tuple(seed.shape)}")
        if seed.device != device:
            raise ValueError(f"seed: expected device {device}, got {seed.device}")
        return seed if seed.ndim == 1 else seed.reshape(1)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int, an int64 tensor or None, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected 64 bits, got {seed}")
    return torch.full((1,), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)


def check_group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, scale: Tensor | None, shift: Tensor | None
) -> None:
    check_floating("x", x)
    if x.ndim < 2:
        raise ValueError(f"x: expected shape (B, C, ...), got {tuple(x.shape)}")
    channels = x.shape[1]
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or channels % groups:
        raise ValueError(f"num_groups: expected a divisor of {channels} channels, got {groups!r}")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number of at least 0, got {eps}")
    if (scale is None) != (shift is None):
        raise ValueError(f"{'scale' if scale is None else 'shift'}: expected both scale and shift, or neither")
    given = {"weight": weight, "bias": bias}
    if scale is not None and shift is not None:
        given |= {"scale": scale, "shift": shift}
    for name, t in given.items():
        check_floating(name, t)
        expected = (channels,) if name in ("weight", "bias") else (len(x), channels)
        if t.shape != expected:
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(t.shape)}")
        if t.device != x.device:
            raise ValueError(f"{name}: expected device {x.device}, got {t.device}")


def check_choice(name: str, value: Any, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


def check_shape(name: str, given: Any, shape: tuple[int, ...]) -> None:
    check_floating(name, given)
    if given.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(given.shape)}")


def check_state(out: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    check_shape("out", out, shape)
    if out.dtype != dtype or out.device != device or out.requires_grad:
        raise ValueError(
            f"out: expected {dtype} on {device} without gradient, got {out.dtype} on {out.device}"
            + " with gradient" * out.requires_grad
        )


def as_sample_ids(given: Tensor | Iterable[int], batch: int, device: torch.device) -> Tensor:
    ids = given if isinstance(given, Tensor) else torch.as_tensor(list(given), device="cpu")
    if ids.dtype != torch.int64:
        raise TypeError(f"sample_ids: expected int64, got {ids.dtype}")
    if ids.shape != (batch,):
        raise ValueError(f"sample_ids: expected shape ({batch},), got {tuple(ids.shape)}")
    if ids.device.type == "cpu" and bool(((ids < 0) | (ids >= 2**32)).any()):
        raise ValueError(f"sample_ids: expected values in [0, 2^32), got {ids.tolist()}")
    return ids.to(device)
