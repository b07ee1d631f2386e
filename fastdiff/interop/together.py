"""Linear layers of one input, whose weights lie one behind the other in memory: one product takes all of them.

`accelerate` lays them so. A weight that is moved later lies alone again, and the layers are called.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..support import walk
from ..support.adjacent import adjacent, joined, lay_together, shares_storage, with_own_storage
from ..support.plain import is_plain

# An attribute of layers that `arrange` moved. Others may lie in one memory too, as in that of an optimizer.
TOGETHER = "_laid_together_by_accelerate"


def arrange(layers: Sequence[Any]) -> None:
    """Lay the weights of plain layers together, and their biases. A memory that others may read stays as it is."""
    for parts in _operands(layers):
        alone = not any(map(shares_storage, parts)) and not any(p.is_cpu and p.is_shared() for p in parts)
        alike = len({(p.dtype, p.device, p.shape[1:]) for p in parts}) == 1
        if alone and alike and len({id(p) for p in parts}) == len(parts):
            lay_together(parts)
            for layer in layers:
                setattr(layer, TOGETHER, True)


def separate(layers: Sequence[nn.Module]) -> None:
    """Undo `arrange`, also in what was wrapped since."""
    for part in (part for layer in layers for part in walk.modules(layer)):
        moved = vars(part).pop(TOGETHER, False)
        for p in part.parameters(recurse=False):
            if moved and shares_storage(p):
                p.data = p.data.clone()


def product(layers: Sequence[Any], x: Tensor) -> tuple[Tensor, ...] | None:
    """layer(x) of each, or None if they must be called. Autocast needs that: it keeps the weights that it has cast."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return None
    operands = _operands(layers)
    if not operands or not all(map(adjacent, operands)):
        return None
    return F.linear(x, *map(joined, operands)).split([layer.out_features for layer in layers], dim=-1)


def saved_apart(kind: Any) -> Any:
    """A decorator of a class: its dictionary has tensors with a storage of their own, see `with_own_storage`."""
    stock = kind.__base__

    def state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = stock.state_dict(self, *args, **kwargs)
        for key, value in state.items():
            if key.startswith(kwargs.get("prefix", "")) and isinstance(value, Tensor) and shares_storage(value):
                state[key] = with_own_storage(value)
        return state

    kind.state_dict = state_dict
    return kind


def _operands(layers: Sequence[Any]) -> list[list[Tensor]]:
    """[weights, biases] or [weights] of plain layers; [] if there are others."""
    biased = len({layer.bias is None for layer in layers if isinstance(layer, nn.Linear)}) == 1
    if len(layers) < 2 or not biased or not all(is_plain(layer, nn.Linear) for layer in layers):
        return []
    return [[layer.weight for layer in layers]] + ([] if layers[0].bias is None else [[layer.bias for layer in layers]])
