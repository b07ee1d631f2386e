"""What the modules of a U-Net take that does not depend on the image, made before it; see fused.Ahead.

Resnet blocks take their shares of the time embedding, from one product for all of them. And where the norm is one
kernel, no bias is added to a map in a pass of its own. A map goes without it, and owes it: a number for each channel,
known ahead, that a norm adds on the way and a sum passes on.

    a convolution's output owes          bias
    a resnet block's                     W owed + the biases of its shortcut W and of conv2
    an attention's                       owed + the bias of to_out
    two maps' that are concatenated      both
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fused import Ahead, adds_bias, is_linear, maps_pixels
from .nn import (
    Attention,
    DownBlock,
    Downsample,
    FourierProjection,
    MidBlock,
    ResnetBlock,
    TimeEmbedding,
    UpBlock,
    Upsample,
)
from .ops.group_norm import is_fused
from .support import walk
from .support.plain import is_plain

KINDS = {
    DownBlock, MidBlock, UpBlock, ResnetBlock, Attention, Downsample, Upsample, TimeEmbedding, FourierProjection,
    nn.ModuleList, nn.Conv2d, nn.Linear, nn.GroupNorm, nn.Identity, nn.Dropout, nn.AvgPool2d, nn.Upsample,
}  # fmt: skip


def project(net: Any, emb: Tensor) -> Tensor | None:
    """What all resnet blocks of a UNet take from emb, in one product: (B or 1, total width), for `aheads`.

    None if a block has layers that are not plain, and must be called.
    """
    blocks = [reader for reader in net.readers() if isinstance(reader, ResnetBlock)]
    layers = [block.time_emb_proj for block in blocks]
    convolutions: list[Any] = [block.conv1 for block in blocks if not block.scale_shift]
    if not (all(map(adds_bias, convolutions)) and all(map(is_linear, layers))):
        return None
    bias = torch.cat([layer.bias for layer in layers])
    if convolutions:
        # Times 1: the two halves of a sum get one gradient, which an optimizer would clip or sum twice in place.
        bias = bias + torch.cat([layer.bias for layer in convolutions]) * 1
    return F.linear(emb, torch.cat([layer.weight for layer in layers]), bias)


def owed(net: Any) -> Tensor | None:
    """(total,), what the inputs of all readers of a UNet owe, in their order, then the input of its last norm.

    None if no map may owe anything. That is so with a gradient, and if the norm of its tensors is not one kernel. It is
    also so if a module must be called, since it has hooks, is of another class, or was given other attributes: what it
    returns may be read.
    """
    plain = (_computes_from_weights(module) for module in walk.modules(net) if module is not net)
    if torch.is_grad_enabled() or not all(plain) or not is_fused(net.conv_in.weight):
        return None
    now: Tensor = net.conv_in.bias
    skips, found = [now], []

    def through(reader: Any) -> Tensor:
        found.append(now)
        after: Tensor
        after = reader.conv.bias if type(reader) in (Downsample, Upsample) else reader.owes(now)
        return after

    for level in net.levels():
        for i, resnet in enumerate(level.resnets):
            if isinstance(level, UpBlock):
                now = torch.cat((now, skips.pop()))
            now = through(resnet)
            if i < len(level.attentions):
                now = through(level.attentions[i])
            if isinstance(level, DownBlock):
                skips.append(now)
        for sampler in (*level.downsamplers, *level.upsamplers):
            now = through(sampler)
            if isinstance(level, DownBlock):
                skips.append(now)
    return torch.cat([*found, now])


def aheads(net: Any, rows: Tensor) -> tuple[Ahead, ...]:
    """What each reader of a UNet takes, and its last norm.

    rows: (B or 1, width), the columns of `project`, and after them those of `owed` or none.

    Raises: ValueError for another width.
    """
    readers = net.readers()
    widths = [reader.width for reader in readers if isinstance(reader, ResnetBlock)]
    debts: list[Tensor | None] = [None] * (len(readers) + 1)
    if rows.shape[1] != sum(widths):
        inputs = [*map(_channels, readers), net.conv_norm_out.num_channels]
        if rows.shape[1] != sum(widths) + sum(inputs):
            raise ValueError(f"shifts: expected {sum(widths)} columns, or {sum(inputs)} more, got {rows.shape[1]}")
        debts = [part[0] for part in rows[:, sum(widths) :].split(inputs, dim=1)]
    shifts = iter(rows[:, : sum(widths)].split(widths, dim=1))
    taken = [next(shifts) if isinstance(reader, ResnetBlock) else None for reader in readers]
    return tuple(Ahead(shift, debt) for shift, debt in zip((*taken, None), debts, strict=True))


def _computes_from_weights(module: nn.Module) -> bool:
    """Whether calling it does what this package made it for."""
    if type(module) not in KINDS or not is_plain(module, type(module)):
        return False
    if isinstance(module, ResnetBlock) and not isinstance(module.conv_shortcut, nn.Identity):
        return maps_pixels(module.conv_shortcut)
    if isinstance(module, nn.GroupNorm):
        return module.weight is not None and module.bias is not None
    if isinstance(module, nn.Conv2d):
        return adds_bias(module)
    return is_linear(module) if isinstance(module, nn.Linear) else True


def _channels(reader: Any) -> int:
    """Those of its input."""
    if isinstance(reader, ResnetBlock):
        return reader.norm1.num_channels
    return reader.to_q.in_features if isinstance(reader, Attention) else reader.conv.in_channels
