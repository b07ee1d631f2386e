"""What the resnet blocks of a network (diffusers 0.42.1) take that does not depend on the image.

It is made once a call of the network, when the first block asks. All projections of the time embedding are one product,
and all sums of two biases are one operation. Without a gradient, where the norm is a kernel.
"""

from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....fused import adds_bias, is_linear, maps_pixels
from ....ops.group_norm import is_fused
from ....support import walk
from ....support.adjacent import joined
from ....support.plain import is_ordinary


class Ahead(NamedTuple):
    """What a block takes.

    rows: (B or 1, width), its projection of silu(temb), and without scale_shift plus the bias of conv1.
    bias: (C,), the biases of conv2 and of a 1x1 shortcut, summed; None without such a shortcut.
    """

    rows: Tensor
    bias: Tensor | None


class Call:
    """One call of a network, with what was made for the first time embedding that a block was given."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.temb: Tensor | None = None
        self.made: dict[nn.Module, Ahead] = {}

    def of(self, block: nn.Module, temb: Tensor) -> Ahead | None:
        if self.temb is None:
            self.temb, self.made = temb, _made(self.network, type(block), temb)
        return self.made.get(block) if self.temb is temb else None


# It ends with the call: a tensor that is known longer may be written by a graph, of which its version says nothing.
CALL: ContextVar[Call | None] = ContextVar("call", default=None)


def called(network: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
    """forward(*args, **kwargs), the network's, within which `ahead_of` has what blocks take."""
    token = CALL.set(Call(network))
    try:
        return forward(*args, **kwargs)
    finally:
        CALL.reset(token)


def ahead_of(block: nn.Module, temb: Tensor | None) -> Ahead | None:
    """What was made for this block, or None: it is not within such a call, or has layers that must be called."""
    call = None if temb is None or torch.compiler.is_compiling() or torch.is_grad_enabled() else CALL.get()
    return None if call is None or temb is None else call.of(block, temb)


def _made(network: nn.Module, kind: type, temb: Tensor) -> dict[nn.Module, Ahead]:
    """What each block of that kind takes, by block."""
    if not (is_ordinary(temb) and is_fused(temb)) or torch.is_autocast_enabled(temb.device.type):
        return {}
    blocks: list[Any] = [part for part in walk.modules(network) if isinstance(part, kind) and _takes(part, temb)]
    if not blocks:
        return {}
    added = [block for block in blocks if block.time_embedding_norm != "scale_shift"]
    mapped = [block for block in blocks if _adds_two(block, temb)]
    pairs = [(block.time_emb_proj.bias, block.conv1.bias) for block in added]
    pairs += [(block.conv2.bias, block.conv_shortcut.bias) for block in mapped]
    sums = torch._foreach_add(*map(list, zip(*pairs, strict=True))) if pairs else []  # one launch
    of_rows, of_maps = dict(zip(added, sums, strict=False)), dict(zip(mapped, sums[len(added) :], strict=True))
    layers = [block.time_emb_proj for block in blocks]
    weight = joined([layer.weight for layer in layers])
    bias = torch.cat([of_rows.get(block, block.time_emb_proj.bias) for block in blocks])
    rows = F.linear(F.silu(temb), weight, bias).split([layer.out_features for layer in layers], dim=1)
    return {block: Ahead(row, of_maps.get(block)) for block, row in zip(blocks, rows, strict=True)}


def _takes(block: Any, temb: Tensor) -> bool:
    """Whether a block takes a linear map of silu(temb), and its layers need not be called for it."""
    layer, added = block.time_emb_proj, block.time_embedding_norm != "scale_shift"
    return (
        is_linear(layer)
        and temb.ndim == 2
        and layer.in_features == temb.shape[1]
        and not block.skip_time_act
        and (not added or adds_bias(block.conv1))
        and _alike(temb, layer.weight, layer.bias, *([block.conv1.bias] if added else []))
    )


def _adds_two(block: Any, temb: Tensor) -> bool:
    """Whether the biases of its last two convolutions may be summed; see `with_shortcut`."""
    shortcut, last = block.conv_shortcut, block.conv2
    return shortcut is not None and maps_pixels(shortcut) and adds_bias(last) and _alike(temb, shortcut.bias, last.bias)


def _alike(temb: Tensor, *weights: Tensor) -> bool:
    return all(weight.dtype == temb.dtype and weight.device == temb.device for weight in weights)
