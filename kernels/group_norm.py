"""silu(GroupNorm(x + add)), with a scale and shift of each channel where given, and its gradients: the launchers.

The channels of x may lie in two tensors, x and skip; the SiLU may be left out.

A group that fits a program's registers is read once. Contiguous images give a program one group, or several small ones;
channels last give it a slab of whole groups wide enough for whole sectors of memory. A larger group is cut into parts:
a launch before leaves what each part contributes in `partial`, and every program merges that of its groups. Such pairs
of launches cover as many slabs at a time as stay in the L2 cache, so that the second read does not reach memory. That
fails where one slab is larger, and in the backward pass where fewer slabs would not fill the GPU.

norm_tile.py: what a program owns; norm_forward.py and norm_backward.py: the kernels.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .launch import FUSED, WARP, launch, on_nvidia
from .layout import channels_of, is_dense, laid_like, strides_of
from .norm_backward import norm_grad_kernel, norm_sums_kernel, parameters_kernel
from .norm_forward import moments_kernel, norm_kernel


class Limits(NamedTuple):
    """What fits on a GPU, and what is worth doing. The tests make them small, so that small images are large."""

    warp: int = WARP  # threads
    forward: int = 16  # warps of a program at most
    backward: int = 8
    held: int = 64  # elements that a thread holds at most: more would not stay in its registers
    few: int = 16  # elements of a thread where there are not enough programs: more threads share the work
    enough: int = 264  # programs that fill a GPU
    small: int = 4096  # elements of a slab of several groups, where pixels are neighbours
    line: int = 128  # bytes of neighbouring channels that are worth reading together
    sector: int = 32  # bytes that memory reads at once
    rows: int = 16  # channels of a part, where pixels are neighbours
    blocks: int = 8  # of lanes in a slab at most
    parts: int = 32  # of a group, unless slabs are so large that more have to share one
    resident: int = 24 * 2**20  # bytes that stay in the L2 cache between two launches
    # Whether a kernel reads x and skip where they lie. Triton's AMD compiler cannot choose between pointers.
    halves: bool = torch.version.hip is None


LIMITS = Limits()
COLUMNS, ROWS, MANY_ROWS = 32, 32, 128  # channels and samples that parameters_kernel sums at a time, of a large batch


class Plan(NamedTuple):
    """How the slabs of a tensor are shared out; see norm_tile.py."""

    slabs: int
    parts: int  # of a slab: the programs that share it
    spans: int
    piece: int  # slabs of a launch
    shape: dict[str, Any]  # the constants of every kernel

    def grids(self) -> list[tuple[int, tuple[int, int, int]]]:
        """(first slab, grid) of each launch."""
        return [
            (first, (min(self.piece, self.slabs - first), self.parts, 1)) for first in range(0, self.slabs, self.piece)
        ]


def _power(n: int) -> int:
    return triton.next_power_of_2(n)


def _blocks(width: int, least: int, limits: Limits) -> tuple[int, int]:
    """(BLOCKS, LANES) of so many channels, as few as possible left over; at least `least` neighbours in a tile."""
    fits = [(b, max(least, _power(-(-width // b)))) for b in range(1, limits.blocks + 1)]
    return min(fits, key=lambda fit: (fit[0] * fit[1], fit[0]))


def _tiles(
    blocks: int, lanes: int, pixels: int, vector: int, least: int, held: int, warp: int, most: int
) -> tuple[int, int, int] | None:
    """(warps, TILES, TILE) of the fewest warps, and most at most, whose threads hold a slab, each `held` elements; None
    if it does not fit. vector: elements of an access; least: pixels of a tile."""
    warps = 1
    while warps <= most:
        tile = min(max(least, warps * warp * vector // lanes), _power(pixels))
        tiles = -(-pixels // tile)
        if blocks * lanes * tiles * tile <= warps * warp * held:
            return warps, tiles, tile
        warps *= 2
    return None


def _slab(
    batch: int, channels: int, pixels: int, groups: int, last: bool, size: int, backward: bool, limits: Limits,
) -> tuple[int, int, int, tuple[int, int, int] | None]:  # fmt: skip
    """(groups of a slab, BLOCKS, LANES, the tiles of a program that holds all of it or None) of the best slab."""
    depth, vector = channels // groups, 16 // size
    most, held = limits.backward if backward else limits.forward, limits.held
    if backward and size == 4:  # half as many elements to a thread of twice as many: x itself takes a register each
        most, held = 2 * most, held // 2
    choices = []
    for together in (g for g in range(1, groups + 1) if groups % g == 0):
        width = together * depth
        if together > 1 and (width * size > limits.line if last else width * pixels > limits.small):
            break
        blocks, lanes = _blocks(width, vector if last and width >= vector else 1, limits)
        enough = batch * groups // together >= limits.enough
        least = 1 if last else vector
        fit = functools.partial(_tiles, blocks, lanes, pixels, vector, least, warp=limits.warp, most=most)
        # A thread of a backward kernel that has all channels of its pixels sums them without others, and may hold more.
        alone = backward and last and lanes == vector and 1 < blocks <= 3
        tiling = (None if enough else fit(held=limits.few)) or fit(held=held * 3 // 2 if alone else held)
        worth = (
            not last or width % vector == 0,
            tiling is not None,
            alone or blocks == 1 or not (backward and last) or tiling is None,
            not last or width * size % limits.sector == 0,
            tiling is not None and 2 * tiling[0] <= most,  # two programs to a multiprocessor
            enough,
            together if enough else -together,
        )
        choices.append((worth, (together, blocks, lanes, tiling)))
    return max(choices)[1]


@functools.lru_cache(maxsize=1024)
def plan_of(
    batch: int, channels: int, pixels: int, groups: int, last: bool, size: int, backward: bool, limits: Limits,
) -> Plan:  # fmt: skip
    """The plan for images (batch, channels, pixels) of elements of `size` bytes; last: channels last."""
    together, blocks, lanes, tiling = _slab(batch, channels, pixels, groups, last, size, backward, limits)
    depth, vector = channels // groups, 16 // size
    width, slabs = together * depth, batch * groups // together
    chunks, span, piece = 1, pixels, slabs
    if tiling is None:  # several programs share a slab, each walks a span of a chunk
        warps = max(1, limits.backward // 2)
        threads = warps * limits.warp
        widest = limits.line // size if last else max(limits.rows, threads * vector // _power(pixels))
        if width > widest:  # of one group
            blocks, lanes = 1, _power(max(widest, width // (4 * limits.parts)))
            chunks = -(-width // lanes)
        tile = min(max(1 if last else vector, threads * vector // lanes), _power(pixels))
        tiles = max(2, 4 // blocks)
        steps = -(-pixels // (tiles * tile))
        bytes_read = width * pixels * size * (2 if backward else 1)
        piece = min(slabs, max(1, limits.resident // bytes_read))
        wanted = max(1 if chunks > 1 else 2, min(limits.parts // chunks, 8 * limits.enough // (piece * chunks)))
        if piece < slabs and not backward:  # parameters_kernel would sum more parts in a row than that saves
            wanted = max(wanted, -(-limits.enough // (piece * chunks)))
        span = -(-steps // wanted) * tiles * tile
        piece = min(slabs, max(piece, limits.enough // (chunks * -(-pixels // span))))
        piece = -(-slabs // -(-slabs // piece))  # launches of equal size
        tiling = warps, tiles, tile
    warps, tiles, tile = tiling
    spans = -(-pixels // span)
    shape = {
        "CHANNELS": channels, "PIXELS": pixels, "DEPTH": depth, "GROUPS": together, "SLOTS": _power(together),
        "CHUNKS": chunks, "SPANS": spans, "SPAN": span, "BLOCKS": blocks, "LANES": lanes, "TILES": tiles, "TILE": tile,
        "LAST": last, "num_warps": warps,
    } | FUSED  # fmt: skip
    return Plan(slabs, chunks * spans, spans, piece, shape)


def _prepared(x: Tensor, skip: Tensor | None, groups: int, backward: bool) -> tuple[Tensor, Tensor | None, Plan]:
    """(x contiguous or channels last and gapless, skip laid out so too or joined to x, the plan of both together)."""
    if skip is not None and not LIMITS.halves:
        x, skip = torch.cat((x, skip), 1), None
    x = x if channels_of(x) and is_dense(x) else x.contiguous()
    skip = None if skip is None else _laid(x, skip)
    (batch, first), last = x.shape[:2], not x.is_contiguous()
    pixels, channels = x.numel() // (batch * first), first + (0 if skip is None else skip.shape[1])
    return x, skip, plan_of(batch, channels, pixels, groups, last, x.element_size(), backward, LIMITS)


def _laid(x: Tensor, t: Tensor) -> Tensor:
    """t, which may have other channels than x, laid out as x is: itself or a copy."""
    if t.shape[1] == x.shape[1]:
        return laid_like(x, t)
    strides = strides_of(x, t.shape[1])
    return t if t.stride() == strides else t.new_empty_strided(t.shape, strides).copy_(t)


def _row(t: Tensor | None) -> Tensor | None:
    """t (B, C) or (C,) with adjacent channels."""
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def _stride(t: Tensor | None) -> int:
    """From sample to sample of t, (B, C) or (C,)."""
    return 0 if t is None or t.ndim == 1 else t.stride(0)


def norm(
    *, out: Tensor, mean: Tensor, rstd: Tensor,
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None,
    add: Tensor | None, eps: float, skip: Tensor | None, silu: bool,
) -> None:  # fmt: skip
    """Write silu(GroupNorm(x + add) (1 + scale) + shift) into out (B, C, ...), and the statistics of the groups of
    x + add into mean and rstd, (B, groups) float32. skip: further channels of x; silu: False leaves SiLU out."""
    x, skip, plan = _prepared(x, skip, groups, backward=False)
    same = _laid(x, out)
    add, scale, shift = _row(add), _row(scale), _row(shift)
    partial = _partial(plan, mean)
    reads: dict[str, Any] = {"x_ptr": x, "skip_ptr": skip, "add_ptr": add, "add_stride": _stride(add)}
    reads |= {"FIRST": x.shape[1]} | plan.shape
    rows: dict[str, Any] = {"weight_ptr": weight.contiguous(), "bias_ptr": bias.contiguous()}
    rows |= {"scale_ptr": scale, "shift_ptr": shift}
    rows |= {"scale_stride": _stride(scale), "shift_stride": _stride(shift)}
    for first, grid in plan.grids():
        if partial is not None:
            launch(moments_kernel, grid, partial_ptr=partial, first=first, **reads)
        launch(
            norm_kernel, grid, out_ptr=same, mean_ptr=mean, rstd_ptr=rstd, partial_ptr=partial, first=first, eps=eps,
            PARTS=_power(plan.parts), SILU=silu, FAST=on_nvidia(x), **reads, **rows,
        )  # fmt: skip
    if same is not out:
        out.copy_(same)


def norm_grad(
    *, x_grad: Tensor, weight_grad: Tensor | None, bias_grad: Tensor | None, scale_grad: Tensor | None,
    shift_grad: Tensor | None, add_grad: Tensor | None, skip_grad: Tensor | None,
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, groups: int,
    weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, add: Tensor | None,
    skip: Tensor | None, silu: bool,
) -> None:  # fmt: skip
    """Write the gradients by x and skip into x_grad and skip_grad, and those by the other operands into tensors shaped
    like them, contiguous; None for an operand that is not there, or for all of these if none is wanted."""
    x, skip, plan = _prepared(x, skip, groups, backward=True)
    joined = skip_grad is not None and skip is None
    same, grad = torch.empty_like(x) if joined else laid_like(x, x_grad), _laid(x, grad)
    same_skip = None if skip is None or skip_grad is None else laid_like(skip, skip_grad)
    add, scale, shift = _row(add), _row(scale), _row(shift)
    weight, bias = weight.contiguous(), bias.contiguous()
    batch, channels = grad.shape[:2]
    sums = torch.empty(plan.spans, 2 if add is None else 4, batch, channels, dtype=torch.float32, device=x.device)
    partial = _partial(plan, mean)
    operands = {
        "sums_ptr": sums, "partial_ptr": partial, "grad_ptr": grad, "x_ptr": x, "skip_ptr": skip, "add_ptr": add,
        "weight_ptr": weight, "bias_ptr": bias, "scale_ptr": scale, "shift_ptr": shift, "mean_ptr": mean,
        "rstd_ptr": rstd, "batch": batch,
        "add_stride": _stride(add), "scale_stride": _stride(scale), "shift_stride": _stride(shift),
        "FIRST": x.shape[1], "SILU": silu, "FAST": on_nvidia(x),
    } | plan.shape  # fmt: skip
    for first, grid in plan.grids():
        if partial is not None:
            launch(norm_sums_kernel, grid, first=first, **operands)
        launch(
            norm_grad_kernel, grid, x_grad_ptr=same, skip_grad_ptr=same_skip, first=first, PARTS=_power(plan.parts),
            **operands,
        )  # fmt: skip
    if joined:
        same, same_skip = same.tensor_split([x_grad.shape[1]], 1)
    for gradient, written in ((x_grad, same), (skip_grad, same_skip)):
        if gradient is not None and written is not None and written is not gradient:
            gradient.copy_(written)
    if weight_grad is not None:
        rows, warps = (ROWS, 4) if batch <= ROWS else (MANY_ROWS, 8)  # few programs: what they wait for counts
        launch(
            parameters_kernel, (-(-channels // COLUMNS), 1, 1),
            weight_grad_ptr=weight_grad, bias_grad_ptr=bias_grad, scale_grad_ptr=scale_grad, shift_grad_ptr=shift_grad,
            add_grad_ptr=add_grad, sums_ptr=sums, weight_ptr=weight, bias_ptr=bias, scale_ptr=scale,
            batch=batch, spans=plan.spans, channels=channels, scale_stride=_stride(scale),
            SHARED=add is not None and add.ndim == 1, ROWS=rows, BLOCK=COLUMNS, num_warps=warps, **FUSED,
        )  # fmt: skip


def _partial(plan: Plan, mean: Tensor) -> Tensor | None:
    """What the parts of the groups leave; None if nothing is split."""
    return mean.new_empty(*mean.shape, plan.parts, 2) if plan.parts > 1 else None
