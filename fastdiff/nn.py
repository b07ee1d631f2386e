"""Blocks of the DDPM U-Net (Ho et al. 2020, arXiv:2006.11239, appendix B).

Images are (B, C, H, W). `emb` is the conditioning embedding (B or 1, D) with SiLU already applied, once for all blocks;
or what every module takes that is ready before the image, by the module's `index`, see fastdiff.ahead. Attribute names
make up the state_dict keys of published checkpoints; keep them.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .fused import (
    Embedding,
    add_product,
    ahead_of,
    bias_for_norm,
    bias_of_keys,
    by_pixel,
    channels_last,
    is_linear,
    keys,
    norm_silu,
    with_shortcut,
    without_bias,
)
from .ops.group_norm import is_fused
from .support import transforms
from .support.adjacent import joined, lay_together, with_own_storage


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
        t = t.reshape(-1)
        # A parameter: `linear_1` may be wrapped, and after pruning its `weight` keeps the type that it was made in.
        weight = next((p for p in self.linear_1.parameters() if p.is_floating_point()), None)
        if weight is None:  # quantized
            h = self._proj[0](t)
        else:  # an offloaded weight is on the meta device until the layer is called
            h = self._proj[0](t if weight.is_meta else t.to(weight.device)).to(weight.dtype)
        emb: Tensor = self.linear_2(F.silu(self.linear_1(h)))
        return emb


class Downsample(nn.Module):
    """3x3 convolution of stride 2: (B, C, H, W) -> (B, C, H/2, W/2). padding 0 pads right and bottom only."""

    index = 0

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)
        self.pad = padding == 0

    def forward(self, x: Tensor, emb: Embedding) -> Tensor:
        x, convolve = _paid(self, x, emb)
        return convolve(F.pad(x, (0, 1, 0, 1)) if self.pad else x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution: (B, C, H, W) -> (B, C, 2H, 2W)."""

    index = 0

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Embedding) -> Tensor:
        x, convolve = _paid(self, x, emb)
        return convolve(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _paid(sampler: Downsample | Upsample, x: Tensor, emb: Embedding) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(x with what it owes, how to convolve it): the zeros around it owe nothing."""
    owed = ahead_of(sampler, emb).owed
    if owed is None:
        return x, sampler.conv
    return x + owed[:, None, None].to(x.dtype), partial(without_bias, sampler.conv)


class ResnetBlock(nn.Module):
    """(shortcut(x) + conv2(dropout(silu(norm2(h))))) / scale, where h = conv1(silu(norm1(x))) + proj(emb).

    With scale_shift, proj(emb) = (s, b) enters after the norm instead: norm2(h) (1 + s) + b (Dhariwal & Nichol 2021,
    section 3). resample, if given, changes the image size, of x and before conv1. skip: further channels of x.
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
        self.width = (1 + scale_shift) * out_channels  # of time_emb_proj

    def forward(self, x: Tensor, emb: Embedding, skip: Tensor | None = None) -> Tensor:
        shift, owed = ahead_of(self, emb)
        if skip is not None and not (is_fused(x) and channels_last(x, skip) and skip.dtype == x.dtype):
            x, skip = torch.cat((x, skip), 1), None
        e = self.time_emb_proj(emb) if shift is None else shift
        h = self.resample(norm_silu(self.norm1, x, add=owed, skip=skip))
        s, b, add = None, None, e
        if self.scale_shift:
            s, b = e.expand(x.shape[0], -1).chunk(2, dim=1)
            add = None
        if shift is None or self.scale_shift:
            h, add = bias_for_norm(self.conv1, h, add)
        else:
            h = without_bias(self.conv1, h)  # the bias is in shift
        h = norm_silu(self.norm2, h, s, b, add)
        x, h = self.resample(x), self.dropout(h)
        if owed is None:
            x = x if skip is None else torch.cat((x, skip), 1)  # after the norm, whose gradients then have no gaps
            h = with_shortcut(self.conv_shortcut, x, self.conv2, h)
        else:
            h = self._sum_without_biases(x, skip, h)
        return h if self.scale == 1 else h / self.scale

    def _sum_without_biases(self, x: Tensor, skip: Tensor | None, h: Tensor) -> Tensor:
        """conv_shortcut(cat((x, skip))) + conv2(h) but for the biases."""
        h = without_bias(self.conv2, h)
        if isinstance(self.conv_shortcut, nn.Identity):
            return x + h
        parts = [x] if skip is None else [x, skip]
        if not channels_last(h, *parts):
            return without_bias(self.conv_shortcut, x if skip is None else torch.cat(parts, 1)) + h
        weights = self.conv_shortcut.weight.flatten(1).split([part.shape[1] for part in parts], dim=1)
        for part, weight in zip(parts, weights, strict=True):
            h = add_product(h, by_pixel(part), weight)
        return h

    def owes(self, owed: Tensor) -> Tensor:
        """What the output owes, (C',), for an input that owes (C,)."""
        shortcut = self.conv_shortcut
        if not isinstance(shortcut, nn.Identity):
            owed = F.linear(owed, shortcut.weight.flatten(1), shortcut.bias)
        return (owed + self.conv2.bias) / self.scale  # type: ignore[operator]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v; fused attention has no rule for forward-mode AD."""
    if not transforms.active():
        return F.scaled_dot_product_attention(q, k, v)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """(x + W_o softmax(q k^T / sqrt(head_dim)) v) / scale over the H*W positions, channels / head_dim heads.

    q, k, v are linear maps of the group-normalised x (of x itself if groups is None). Their weights lie one behind the
    other in memory, as those of torch.nn.LSTM do, so that a GPU takes them in one product. head_dim None is one
    head; ValueError if it does not divide channels. If x owes something, it may be overwritten.
    """

    index = 0

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
        alike = {(p.weight.dtype, p.weight.device, p.weight.shape) for p in layers if is_linear(p)}
        if len(alike) != 1 or not all(map(is_linear, layers)):
            return
        for name in ("weight", "bias"):
            lay_together([getattr(layer, name) for layer in layers])

    def state_dict(self, *args: Any, **options: Any) -> Any:
        state = super().state_dict(*args, **options)
        for layer, name in itertools.product(("to_q", "to_k", "to_v"), ("weight", "bias")):
            key = f"{options.get('prefix', '')}{layer}.{name}"
            if key in state:
                state[key] = with_own_storage(state[key])
        return state

    def _qkv(self, h: Tensor) -> tuple[Tensor, ...]:
        """The maps of h (B, N, channels), each (B, N, channels): in one product, on a GPU."""
        layers = (self.to_q, self.to_k, self.to_v)
        if is_fused(h) and all(map(is_linear, layers)):
            join: Any = torch.cat if torch.is_grad_enabled() else joined
            weights = [layer.weight for layer in layers]
            biases = [self.to_q.bias, bias_of_keys(self.to_k), self.to_v.bias]
            return F.linear(h, join(weights), join(biases)).chunk(3, dim=-1)
        return self.to_q(h), keys(self.to_k, h), self.to_v(h)

    def forward(self, x: Tensor, emb: Embedding | None = None) -> Tensor:
        owed = ahead_of(self, emb).owed
        h = self._normed(x, owed).flatten(2).transpose(1, 2).contiguous()  # one copy, or each of the maps makes one
        q, k, v = (part.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for part in self._qkv(h))
        h = attention(q, k, v).transpose(1, 2).flatten(2)
        last: Any = self.to_out[0]
        if owed is not None and channels_last(x):
            out = add_product(x, h.flatten(0, 1), last.weight)
        else:
            h = last(h) if owed is None else F.linear(h, last.weight)
            out = x + h.transpose(1, 2).reshape(x.shape)  # x first: the sum takes its memory format
        return out if self.scale == 1 else out / self.scale

    def _normed(self, x: Tensor, owed: Tensor | None) -> Tensor:
        """group_norm(x + owed)."""
        if isinstance(self.group_norm, nn.GroupNorm) and (is_fused(x) or transforms.active()):
            return norm_silu(self.group_norm, x, add=owed, silu=False)
        normed: Tensor = self.group_norm(x if owed is None else x + owed[:, None, None])
        return normed

    def owes(self, owed: Tensor) -> Tensor:
        """What the output owes, (C,), for an input that owes (C,)."""
        return (owed + self.to_out[0].bias) / self.scale  # type: ignore[operator]


class _Level(nn.Module):
    """Resnet blocks, the first len(attentions) of them followed by attention, and at most one sampler."""

    def __init__(self, resnets: Iterable[nn.Module], attentions: Iterable[nn.Module]) -> None:
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(resnets), nn.ModuleList(attentions)
        self.downsamplers, self.upsamplers = nn.ModuleList(), nn.ModuleList()

    def layer(self, i: int, h: Tensor, emb: Embedding, skip: Tensor | None = None) -> Tensor:
        h = self.resnets[i](h, emb, skip)
        return self.attentions[i](h, emb) if i < len(self.attentions) else h

    def readers(self) -> Iterator[nn.Module]:
        """The modules that take `emb`, in the order in which they run."""
        for i, resnet in enumerate(self.resnets):
            yield resnet
            if i < len(self.attentions):
                yield self.attentions[i]
        yield from (*self.downsamplers, *self.upsamplers)


class MidBlock(_Level):
    """All layers in turn."""

    def forward(self, h: Tensor, emb: Embedding) -> Tensor:
        for i in range(len(self.resnets)):
            h = self.layer(i, h, emb)
        return h


class DownBlock(_Level):
    """All layers, then the downsampler; returns every result."""

    def forward(self, h: Tensor, emb: Embedding) -> tuple[Tensor, ...]:
        results = [h]
        for i in range(len(self.resnets)):
            results.append(self.layer(i, results[-1], emb))
        for downsample in self.downsamplers:
            results.append(downsample(results[-1], emb))
        return tuple(results[1:])


class UpBlock(_Level):
    """All layers, each on [h, one of `skips`], from the last to the first; then the upsampler.

    The skips come one by one, as checkpoints and FSDP want their tensors.
    """

    def forward(self, h: Tensor, emb: Embedding, *skips: Tensor) -> Tensor:
        for i in range(len(self.resnets)):
            h = self.layer(i, h, emb, skips[-1 - i])
        for upsample in self.upsamplers:
            h = upsample(h, emb)
        return h
