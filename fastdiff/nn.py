"""Blocks of the DDPM U-Net (Ho et al. 2020, arXiv:2006.11239, appendix B).

Images are (B, C, H, W). `emb` is the conditioning embedding (B or 1, D) with SiLU already applied, once for
all blocks. Attribute names make up the state_dict keys of published checkpoints; keep them.
"""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import ops, transforms
from .plain import is_plain


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
        t, weight = t.reshape(-1), self.linear_1.weight
        if not isinstance(weight, Tensor) or not weight.is_floating_point():  # of a quantized layer
            h = self._proj[0](t)
        else:  # an offloaded weight is on the meta device until the layer is called
            h = self._proj[0](t if weight.is_meta else t.to(weight.device)).to(weight.dtype)
        return self.linear_2(F.silu(self.linear_1(h)))


class Downsample(nn.Module):
    """3x3 convolution of stride 2: (B, C, H, W) -> (B, C, H/2, W/2). padding 0 pads right and bottom only."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)
        self.pad = padding == 0

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.pad else x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution: (B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def norm_silu(norm: nn.GroupNorm, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """silu(norm(x) (1 + scale) + shift), scale and shift (B, C)."""
    if not is_plain(norm, nn.GroupNorm):
        u = norm(x)
        if scale is not None and shift is not None:
            scale, shift = (t.reshape(*t.shape, *[1] * (u.ndim - 2)) for t in (scale, shift))
            u = u * (1 + scale) + shift
        return F.silu(u)
    return ops.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, scale, shift)


class ResnetBlock(nn.Module):
    """(shortcut(x) + conv2(dropout(silu(norm2(h))))) / scale, where h = conv1(silu(norm1(x))) + proj(emb).

    With scale_shift, proj(emb) = (s, b) enters after the norm instead: norm2(h) (1 + s) + b (Dhariwal &
    Nichol 2021, section 3). resample, if given, changes the image size, of x and before conv1.
    """

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

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(self.resample(norm_silu(self.norm1, x)))
        e = self.time_emb_proj(emb)
        if self.scale_shift:
            s, b = e.expand(len(x), -1).chunk(2, dim=1)
            h = norm_silu(self.norm2, h, s, b)
        else:
            h = norm_silu(self.norm2, h + e[:, :, None, None])
        h = self.conv_shortcut(self.resample(x)) + self.conv2(self.dropout(h))
        return h if self.scale == 1 else h / self.scale


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v; fused attention has no rule for forward-mode AD."""
    if not transforms.active():
        return F.scaled_dot_product_attention(q, k, v)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """(x + W_o softmax(q k^T / sqrt(head_dim)) v) / scale over the H*W positions, channels / head_dim heads.

    q, k, v are linear maps of the group-normalised x (of x itself when groups is None). head_dim None is one
    head; ValueError when it does not divide channels.
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

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2).contiguous()  # one copy, or each of the maps makes one
        q, k, v = (f(h).unflatten(2, (-1, self.head_dim)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        h = attention(q, k, v).transpose(1, 2).flatten(2)
        h = self.to_out[0](h).transpose(1, 2).reshape(x.shape)
        h = x + h  # x first: the sum takes its memory format
        return h if self.scale == 1 else h / self.scale


class _Level(nn.Module):
    """Resnet blocks, the first len(attentions) of them followed by attention, and at most one sampler."""

    def __init__(self, resnets: Iterable[nn.Module], attentions: Iterable[nn.Module]) -> None:
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(resnets), nn.ModuleList(attentions)
        self.downsamplers, self.upsamplers = nn.ModuleList(), nn.ModuleList()

    def layer(self, i: int, h: Tensor, emb: Tensor) -> Tensor:
        h = self.resnets[i](h, emb)
        return self.attentions[i](h) if i < len(self.attentions) else h


class MidBlock(_Level):
    """All layers in turn."""

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        for i in range(len(self.resnets)):
            h = self.layer(i, h, emb)
        return h


class DownBlock(_Level):
    """All layers, then the downsampler; every result is appended to `skips`."""

    def forward(self, h: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        for i in range(len(self.resnets)):
            h = self.layer(i, h, emb)
            skips.append(h)
        for downsample in self.downsamplers:
            h = downsample(h, emb)
            skips.append(h)
        return h


class UpBlock(_Level):
    """All layers, each on [h, the last of `skips`], which is taken off; then the upsampler."""

    def forward(self, h: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        for i in range(len(self.resnets)):
            h = self.layer(i, torch.cat((h, skips.pop()), dim=1), emb)
        for upsample in self.upsamplers:
            h = upsample(h, emb)
        return h
