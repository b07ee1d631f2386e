"""Blocks of the DDPM U-Net (Ho et al. 2020, arXiv:2006.11239, appendix B).

Images are (B, C, H, W). `emb` is the conditioning embedding (B or 1, D) with SiLU already applied, once for all blocks;
or what all blocks take from it, a tuple in the order of ResnetBlock.index, see `project`. Attribute names make up the
state_dict keys of published checkpoints; keep them.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import ops
from .support import transforms
from .support.plain import is_plain


class Ahead(NamedTuple):
    """What a resnet block adds that does not depend on the image.

    shift: (B or 1, width), the projection of emb; without scale_shift with the bias of conv1, added at the same place.
    residual: (C,), the sum of the biases of conv2 and conv_shortcut; None to take them one by one.
    """

    shift: Tensor
    residual: Tensor | None


Embedding = Tensor | tuple[Ahead, ...]


def sinusoidal_embedding(t: Tensor, dim: int, freq_shift: float = 0, flip_sin_to_cos: bool = True) -> Tensor:
    """Sinusoidal position encoding of t (N,) in float32, shape (N, dim) (Vaswani et al. 2017, section 3.5).

    [sin(t f), cos(t f)] with f_k = 10000^(-k / (dim//2 - freq_shift)), k = 0 .. dim//2 - 1; the halves are
    swapped when flip_sin_to_cos; an odd dim ends in a zero column.
    """
    half = dim // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    angle = t.float()[:, None] * torch.exp(k * -math.log(10000.0) / (half - freq_shift))
    halves = (angle.cos(), angle.sin()) if flip_sin_to_cos else (angle.sin(), angle.cos())
    return F.pad(torch.cat(halves, dim=1), (0, dim % 2))


class FourierProjection(nn.Module):
    """Random Fourier features of log t: [sin(2 pi w log t), cos(2 pi w log t)], fixed w ~ N(0, 16^2).

    t (N,), t > 0 -> float32 (N, 2 dim) (Tancik et al. 2020; NCSN++ in Song et al. 2021, arXiv:2011.13456).
    """

    weight: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", 16.0 * torch.randn(dim))

    def forward(self, t: Tensor) -> Tensor:
        angle = t.float().log()[:, None] * self.weight * (2 * math.pi)
        return torch.cat((angle.sin(), angle.cos()), dim=1)


class TimeEmbedding(nn.Module):
    """emb = W2 silu(W1 proj(t) + b1) + b2 for timesteps t (N,) or 0-dim: (N, D) or (1, D).

    It does not depend on x, so a sampling loop can embed all of its steps in one call.
    Raises ValueError when t has more than one dimension.
    """

    def __init__(self, proj: Callable[[Tensor], Tensor], proj_dim: int, dim: int) -> None:
        super().__init__()
        self._proj = (proj,)  # in a tuple, not as a child: the U-Net already keys its weight as time_proj
        self.linear_1 = nn.Linear(proj_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        if t.dim() > 1:
            raise ValueError(f"t: expected shape (N,) or (), got {tuple(t.shape)}")
        t, weight = t.reshape(-1), getattr(self.linear_1, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point():  # not nn.Linear's
            h = self._proj[0](t)
        else:  # an offloaded weight is on the meta device until the layer is called
            h = self._proj[0](t if weight.is_meta else t.to(weight.device)).to(weight.dtype)
        emb: Tensor = self.linear_2(F.silu(self.linear_1(h)))
        return emb


class Downsample(nn.Module):
    """3x3 convolution of stride 2: (B, C, H, W) -> (B, C, H/2, W/2). padding 0 pads right and bottom only."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)
        self.pad = padding == 0

    def forward(self, x: Tensor, emb: Embedding) -> Tensor:
        half: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)) if self.pad else x)
        return half


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution: (B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Embedding) -> Tensor:
        double: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return double


def norm_silu(
    norm: nn.GroupNorm,
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """silu(norm(x + add) (1 + scale) + shift); scale and shift (B, C), add (B or 1, C)."""
    if not is_plain(norm, nn.GroupNorm) or norm.weight is None:
        u = norm(x if add is None else x + add.to(x.dtype).reshape(*add.shape, *[1] * (x.ndim - 2)))
        if scale is not None and shift is not None:
            scale, shift = (t.reshape(*t.shape, *[1] * (u.ndim - 2)) for t in (scale, shift))
            u = u * (1 + scale) + shift
        return F.silu(u)
    add = add[0] if add is not None and len(add) == 1 else add
    return ops.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, scale, shift, add)


class ResnetBlock(nn.Module):
    """(shortcut(x) + conv2(dropout(silu(norm2(h))))) / scale, where h = conv1(silu(norm1(x))) + proj(emb).

    With scale_shift, proj(emb) = (s, b) enters after the norm instead: norm2(h) (1 + s) + b (Dhariwal & Nichol 2021,
    section 3). resample, if given, changes the image size, of x and before conv1. index: the block's place in `emb`, if
    that is a tuple.
    """

    index = 0

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        emb_dim: int,
        groups: int,
        eps: float,
        dropout: float,
        scale_shift: bool,
        scale: float = 1.0,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(emb_dim, (1 + scale_shift) * out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        self.resample = resample or nn.Identity()
        self.scale_shift = scale_shift
        self.scale = scale

    def forward(self, x: Tensor, emb: Embedding) -> Tensor:
        ahead = emb[self.index] if isinstance(emb, tuple) else None
        e = self.time_emb_proj(emb) if ahead is None else ahead.shift
        h = self.resample(norm_silu(self.norm1, x))
        if self.scale_shift:
            s, b = e.expand(len(x), -1).chunk(2, dim=1)
            h = norm_silu(self.norm2, self.conv1(h), s, b)
        else:
            h = self.conv1(h) if ahead is None else F.conv2d(h, self.conv1.weight, padding=1)
            h = norm_silu(self.norm2, h, add=e)
        h = self._sum(self.resample(x), self.dropout(h), None if ahead is None else ahead.residual)
        return h if self.scale == 1 else h / self.scale

    def _sum(self, x: Tensor, h: Tensor, bias: Tensor | None) -> Tensor:
        """conv_shortcut(x) + conv2(h); bias: the sum of theirs, or None."""
        if bias is None or not x.is_contiguous(memory_format=torch.channels_last):
            out: Tensor = self.conv_shortcut(x) + self.conv2(h)
            return out
        # With channels last the shortcut is a matrix product, which adds the biases in the same pass.
        weight: Tensor = self.conv_shortcut.weight  # type: ignore[assignment]
        by_pixel = F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias)
        return by_pixel.permute(0, 3, 1, 2) + F.conv2d(h, self.conv2.weight, padding=1)


def project(blocks: Sequence[ResnetBlock], emb: Tensor) -> Tensor | None:
    """What all blocks take from emb, in one product: (B or 1, total width), for `ahead_of_blocks`.

    None if a block has layers that are not plain, and must be called.
    """
    layers = [block.time_emb_proj for block in blocks]
    convolutions = [block.conv1 for block in blocks if not block.scale_shift]
    if not (all(is_plain(c, nn.Conv2d) for c in convolutions) and all(is_plain(p, nn.Linear) for p in layers)):
        return None
    bias = _biases(layers)
    if convolutions:
        # Times 1: the two halves of a sum get one gradient, which an optimizer would clip or sum twice in place.
        bias = bias + _biases(convolutions) * 1
    shifts = F.linear(emb, torch.cat([layer.weight for layer in layers]), bias)
    summed = _with_shortcut(blocks)
    plain = all(is_plain(conv, nn.Conv2d) for block in summed for conv in (block.conv2, block.conv_shortcut))
    if torch.is_grad_enabled() or not summed or not plain or not len(emb):
        return shifts
    residuals = _biases([b.conv2 for b in summed]) + _biases([b.conv_shortcut for b in summed])
    return torch.cat((shifts, residuals.to(shifts.dtype).expand(len(shifts), -1)), 1)


def ahead_of_blocks(blocks: Sequence[ResnetBlock], projected: Tensor) -> tuple[Ahead, ...]:
    """The parts of what `project` returns, for each block. ValueError for another width."""
    widths = [block.time_emb_proj.out_features for block in blocks]
    summed = _with_shortcut(blocks)
    further = [block.conv2.out_channels for block in summed]
    if projected.shape[1] not in (sum(widths), sum(widths) + sum(further)):
        raise ValueError(f"shifts: expected {sum(widths)} columns, or {sum(further)} more, got {projected.shape[1]}")
    whole = projected.shape[1] > sum(widths)
    parts = projected.split(widths + (further if whole else []), dim=1)
    residuals = {block.index: part[0] for block, part in zip(summed, parts[len(blocks) :], strict=False)}
    return tuple(Ahead(part, residuals.get(block.index)) for block, part in zip(blocks, parts, strict=False))


def _with_shortcut(blocks: Sequence[ResnetBlock]) -> list[ResnetBlock]:
    return [block for block in blocks if not isinstance(block.conv_shortcut, nn.Identity)]


def _biases(layers: Sequence[Any]) -> Tensor:
    return torch.cat([layer.bias for layer in layers])


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v; fused attention has no rule for forward-mode AD."""
    if not transforms.active():
        return F.scaled_dot_product_attention(q, k, v)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """(x + W_o softmax(q k^T / sqrt(head_dim)) v) / scale over the H*W positions, channels / head_dim heads.

    q, k, v are linear maps of the group-normalised x (of x itself if groups is None). Their weights lie one behind the
    other in memory, as those of torch.nn.LSTM do, so that inference takes them in one product. head_dim None is one
    head; ValueError if it does not divide channels.
    """

    def __init__(self, channels: int, head_dim: int | None, groups: int | None, eps: float, scale: float = 1.0) -> None:
        super().__init__()
        if head_dim is not None and channels % head_dim:
            raise ValueError(f"attention_head_dim: expected a divisor of {channels} channels, got {head_dim}")
        self.group_norm = nn.Identity() if groups is None else nn.GroupNorm(groups, channels, eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        self.head_dim = head_dim or channels
        self.scale = scale
        self._arrange_weights()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Attention":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._arrange_weights()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._arrange_weights()  # a copy or pickle has them one by one

    def _arrange_weights(self) -> None:
        """Put the weights of q, k and v one behind the other in memory, and their biases."""
        layers = (self.to_q, self.to_k, self.to_v)
        if not all(is_plain(layer, nn.Linear) for layer in layers):
            return
        for name in ("weight", "bias"):
            parts = [getattr(layer, name) for layer in layers]
            if not _adjacent(parts):
                for part, new in zip(parts, torch.cat([p.data for p in parts]).chunk(3), strict=True):
                    part.data = new

    def _qkv(self, h: Tensor) -> tuple[Tensor, ...]:
        """The maps of h (B, N, channels), each (B, N, channels): in one product where no gradient is wanted."""
        layers = (self.to_q, self.to_k, self.to_v)
        if not torch.is_grad_enabled() and all(is_plain(layer, nn.Linear) for layer in layers):
            weights, biases = ([getattr(layer, name) for layer in layers] for name in ("weight", "bias"))
            return F.linear(h, _joined(weights), _joined(biases)).chunk(3, dim=-1)
        return tuple(layer(h) for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2).contiguous()  # one copy, or each of the maps makes one
        q, k, v = (part.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for part in self._qkv(h))
        h = attention(q, k, v).transpose(1, 2).flatten(2)
        h = self.to_out[0](h).transpose(1, 2).reshape(x.shape)
        out: Tensor = x + h  # x first: the sum takes its memory format
        return out if self.scale == 1 else out / self.scale


def _adjacent(parts: Sequence[Tensor]) -> bool:
    """Whether tensors of one shape lie one behind the other in the same memory."""
    first = parts[0]
    memory = first.untyped_storage()._cdata
    return all(
        p.untyped_storage()._cdata == memory
        and p.storage_offset() == first.storage_offset() + i * first.numel()
        and p.is_contiguous()
        for i, p in enumerate(parts)
    )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Equal tensors as one; where they lie if they are adjacent, else copied."""
    if torch.compiler.is_compiling() or not _adjacent(parts):
        return torch.cat(list(parts))
    first = parts[0].detach()
    return first.as_strided((len(parts) * first.shape[0], *first.shape[1:]), first.stride())


class _Level(nn.Module):
    """Resnet blocks, the first len(attentions) of them followed by attention, and at most one sampler."""

    def __init__(self, resnets: Iterable[nn.Module], attentions: Iterable[nn.Module]) -> None:
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(resnets), nn.ModuleList(attentions)
        self.downsamplers, self.upsamplers = nn.ModuleList(), nn.ModuleList()

    def layer(self, i: int, h: Tensor, emb: Embedding) -> Tensor:
        h = self.resnets[i](h, emb)
        return self.attentions[i](h) if i < len(self.attentions) else h


class MidBlock(_Level):
    """All layers in turn."""

    def forward(self, h: Tensor, emb: Embedding) -> Tensor:
        for i in range(len(self.resnets)):
            h = self.layer(i, h, emb)
        return h


class DownBlock(_Level):
    """All layers, then the downsampler; every result is appended to `skips`."""

    def forward(self, h: Tensor, emb: Embedding, skips: list[Tensor]) -> Tensor:
        for i in range(len(self.resnets)):
            h = self.layer(i, h, emb)
            skips.append(h)
        for downsample in self.downsamplers:
            h = downsample(h, emb)
            skips.append(h)
        return h


class UpBlock(_Level):
    """All layers, each on [h, the last of `skips`], which is taken off; then the upsampler."""

    def forward(self, h: Tensor, emb: Embedding, skips: list[Tensor]) -> Tensor:
        for i in range(len(self.resnets)):
            h = self.layer(i, torch.cat((h, skips.pop()), dim=1), emb)
        for upsample in self.upsamplers:
            h = upsample(h, emb)
        return h
