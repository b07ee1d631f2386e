"""What the blocks of a U-Net do in as few passes over an image as they can."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops, reference
from .ops.group_norm import is_fused
from .support import transforms
from .support.plain import is_plain


class Ahead(NamedTuple):
    """What a module takes that does not depend on the image.

    shift: of a resnet block, (B or 1, width): the projection of emb, without scale_shift plus the bias of conv1, which
        is added at the same place.
    owed: (C,), to be added to the module's input. The module then leaves out its last biases: its output owes them.
        None if maps owe nothing.
    """

    shift: Tensor | None
    owed: Tensor | None


Embedding = Tensor | tuple[Ahead, ...]
NOTHING = Ahead(None, None)


def ahead_of(module: Any, emb: Embedding | None) -> Ahead:
    """What emb has for this module."""
    return emb[module.index] if isinstance(emb, tuple) else NOTHING


def norm_silu(
    norm: nn.GroupNorm,
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    add: Tensor | None = None,
    skip: Tensor | None = None,
    *,
    silu: bool = True,
) -> Tensor:
    """silu(norm(x + add) (1 + scale) + shift); scale and shift (B, C), add (B or 1, C) or (C,). skip: further channels
    of x; silu: False leaves SiLU out."""
    plain = norm._parameters if is_plain(norm, nn.GroupNorm) else {}  # an attribute of a module costs more
    weight, bias = plain.get("weight"), plain.get("bias")
    if weight is None or bias is None:
        x = x if skip is None else torch.cat((x, skip), 1)
        u = norm(x if add is None else x + add.to(x.dtype).reshape(*add.shape, *[1] * (x.ndim - 2)))
        if scale is not None and shift is not None:
            scale, shift = (t.reshape(*t.shape, *[1] * (u.ndim - 2)) for t in (scale, shift))
            u = u * (1 + scale) + shift
        return F.silu(u) if silu else u
    add = add[0] if add is not None and add.ndim == 2 and add.shape[0] == 1 else add
    if x.is_cpu and not is_fused(x):  # what the op comes to, without its checks, which a layer does not need
        return reference.group_norm_silu(x, norm.num_groups, weight, bias, scale, shift, add, norm.eps, skip, silu)
    return ops.group_norm_silu(x, norm.num_groups, weight, bias, norm.eps, scale, shift, add, skip, silu=silu)


def by_pixel(x: Tensor) -> Tensor:
    """x (B, C, H, W), channels last, as (B H W, C): a view."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])


def channels_last(*maps: Tensor | None) -> bool:
    """Whether all of them are, (B, C, H, W) each; never under torch.func, whose tensors cannot tell."""
    laid_out = torch.channels_last
    return not transforms.active() and all(x is None or x.is_contiguous(memory_format=laid_out) for x in maps)


def add_product(out: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """out + the product of rows (B H W, n) and weight (C, n), in the memory of out, which is channels last.

    PyTorch's product adds to a matrix only in place, else it copies the matrix first. Where memory must not change, a
    compiler fuses the sum, or types differ (autocast), it is a sum.
    """
    apart = torch.is_grad_enabled() or torch.compiler.is_compiling() or transforms.active()
    if apart or not out.dtype == rows.dtype == weight.dtype:
        batch, _, height, width = out.shape
        return out + F.linear(rows, weight).view(batch, height, width, -1).permute(0, 3, 1, 2)
    by_pixel(out).addmm_(rows, weight.t())
    return out


def without_bias(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(x) - bias, of a layer that adds its bias."""
    return F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)


def bias_for_norm(conv: Any, x: Tensor, add: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """(h, a) with h + a = conv(x) + add, for a norm that takes a by its `add`. add: (B or 1, C).

    The bias is in a if the norm is one kernel, or adds something anyway. Else the convolution adds it for less.
    """
    if (add is None and not is_fused(x)) or not adds_bias(conv):
        return conv(x), add
    return without_bias(conv, x), conv.bias if add is None else add + conv.bias


def with_shortcut(
    shortcut: Any, x: Tensor, conv: Any, h: Tensor, biases: Tensor | None = None, skip: Tensor | None = None
) -> Tensor:
    """shortcut(x) + conv(h), x itself for None.

    With channels last a 1x1 shortcut is a matrix product, which adds its bias in its pass; without a gradient, both.
    biases: their sum, if it is known. skip: further channels of x, with such a shortcut; also channels last.
    """
    apart = shortcut is None or not channels_last(x) or (torch.is_grad_enabled() and not is_fused(x))
    if apart or not (maps_pixels(shortcut) and adds_bias(conv)):
        h = conv(h)
        return (x if shortcut is None else shortcut(x)) + h
    if torch.is_grad_enabled():
        h, biases = conv(h), shortcut.bias
    else:
        h, biases = without_bias(conv, h), shortcut.bias + conv.bias if biases is None else biases
    weight = shortcut.weight.permute(0, 2, 3, 1).flatten(1)  # so that its gradient has strides of channels_last
    weight, rest = (weight, weight) if skip is None else weight.tensor_split([x.shape[1]], dim=1)
    mapped = F.linear(x.permute(0, 2, 3, 1), weight, biases).permute(0, 3, 1, 2)
    return (mapped if skip is None else add_product(mapped, by_pixel(skip), rest)) + h


def adds_bias(conv: nn.Module) -> bool:
    """Whether a convolution may be computed from its weight and bias, with zeros around the image.

    Others set attributes of a layer that is there: circular padding makes textures that tile.
    """
    return (
        isinstance(conv, nn.Conv2d)
        and is_plain(conv, nn.Conv2d)
        and conv.bias is not None
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
    )


def maps_pixels(conv: nn.Module) -> bool:
    """Whether a convolution is a linear map of the channels of each pixel, with a bias."""
    return (
        isinstance(conv, nn.Conv2d)
        and adds_bias(conv)
        and conv.kernel_size == conv.stride == conv.dilation == (1, 1)
        and conv.padding == (0, 0)
        and conv.groups == 1
    )


def is_linear(layer: nn.Module) -> bool:
    """Whether it may be computed from its weight and bias."""
    return isinstance(layer, nn.Linear) and is_plain(layer, nn.Linear) and layer.bias is not None


def bias_of_keys(layer: Any) -> Tensor:
    """That of the linear layer that makes keys: it changes no weight of attention, so its gradient is 0.

    Without this it would be rounding errors. Adam makes whole steps of them, other ones on each number of processes.
    """
    bias: Tensor = layer.bias
    return bias.detach() + 0 * bias if torch.is_grad_enabled() else bias


def keys(layer: nn.Module, h: Tensor) -> Tensor:
    """layer(h), the keys of attention, see `bias_of_keys`."""
    if not torch.is_grad_enabled() or not is_linear(layer):
        made: Tensor = layer(h)
        return made
    return F.linear(h, layer.weight, bias_of_keys(layer))  # type: ignore[arg-type]
