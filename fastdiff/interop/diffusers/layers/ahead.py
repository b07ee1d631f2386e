"""What the blocks of a network (diffusers 0.42.1) take that does not depend on the image.

It is made once a call of the network, without a gradient, when the first block asks. All projections of the time
embedding are one product, and all keys and values of a text are another. All sums of two biases are one operation.
"""

from collections.abc import Sequence
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
from ...together import product


class Ahead(NamedTuple):
    """What a block takes.

    rows: (B or 1, width), its projection of silu(temb), and without scale_shift plus the bias of conv1.
    bias: (C,), the biases of conv2 and of a 1x1 shortcut, summed; None without such a shortcut.
    """

    rows: Tensor
    bias: Tensor | None


class Call:
    """One call of a network, with what was made of the first tensor that a block of each kind was given."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.parts: list[nn.Module] = []  # walked when a block asks, once for all kinds
        self.made: dict[type, tuple[Tensor, int, dict[nn.Module, Any]]] = {}

    def of(self, block: nn.Module, given: Tensor, make: Any) -> Any:
        kind = type(block)
        if kind not in self.made:
            self.parts = self.parts or walk.modules(self.network)
            blocks = [part for part in self.parts if isinstance(part, kind)]
            self.made[kind] = given, _version(given), make(blocks, given)
        first, version, made = self.made[kind]
        return made.get(block) if first is given and version == _version(given) else None


def _version(t: Tensor) -> int:
    """It grows when the tensor is written in place; those of inference mode have none."""
    return -1 if t.is_inference() else t._version


# It ends with the call: a tensor that is known longer may be written by a graph, of which its version says nothing.
CALL: ContextVar[Call | None] = ContextVar("call", default=None)


def called(network: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
    """forward(*args, **kwargs), the network's, within which `ahead_of` has what blocks take."""
    token = CALL.set(Call(network))
    try:
        return forward(*args, **kwargs)
    finally:
        CALL.reset(token)


def ahead_of(block: nn.Module, given: Tensor | None, make: Any) -> Any:
    """What make(blocks, given) has for this one of the network's blocks of its kind, or None.

    It is None outside of such a call, and if given is another tensor than was the first block's.
    """
    if given is None or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    call = CALL.get()
    return None if call is None else call.of(block, given, make)


def keys_and_values(blocks: Sequence[Any], text: Tensor) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """Those of a text by block of attention, if they are small beside the weights, which lie together."""
    blocks = of_text(blocks)
    maps = product(text_layers(blocks), text) if 4 * text[..., 0].numel() <= text.shape[-1] else None
    return {} if maps is None else dict(zip(blocks, zip(maps[::2], maps[1::2], strict=True), strict=True))


def text_layers(blocks: Sequence[Any]) -> list[Any]:
    """The layers of blocks of attention that take a text: keys, values, keys, values, ..."""
    return [layer for block in of_text(blocks) for layer in (block.to_k, block.to_v)]


def of_text(blocks: Sequence[Any]) -> list[Any]:
    """Those blocks of attention that take a text."""
    return [block for block in blocks if block.is_cross_attention and block.to_k is not None]


def rows_and_biases(blocks: Sequence[Any], temb: Tensor) -> dict[nn.Module, Ahead]:
    """What resnet blocks take, but for those with layers that must be called; none where the norm is no kernel."""
    if not (is_ordinary(temb) and is_fused(temb)) or torch.is_autocast_enabled(temb.device.type):
        return {}
    blocks = [block for block in blocks if _takes(block, temb)]
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
        and layer.weight.untyped_storage().nbytes() > 0  # else it is freed between calls of the block
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
