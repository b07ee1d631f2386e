"""What the blocks of diffusion transformers (diffusers 0.42.1) do around attention, in one operation each.

    norm(x) (1 + scale) + shift
    s = x + gate y,  and the same of s

x and y are (B, N, C): tokens. gate, scale and shift are (B, C): one row for all tokens of a sample.
"""

import copy
import functools
import importlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from diffusers.models.normalization import FP32LayerNorm
from torch import Tensor, nn

from .... import ops
from ....ops.layer_norm import is_fused
from ....support.plain import as_defined, is_ordinary, is_plain

NORMS = (nn.LayerNorm, FP32LayerNorm)
LARGEST = 65504.0  # of float16: stock clips some sums there
FP32_FORWARD = as_defined(FP32LayerNorm, "forward")


def stands_in(kind: Any) -> Any:
    """A decorator of a fused class: its forward gets the signature of stock's, which runs where there is no kernel.

    See `fuses`. Stock's runs too if it was patched, and within a compilation, which fuses its arithmetic.
    """
    stock, ours = kind.__base__, kind.forward
    original = as_defined(stock, "forward")

    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, kind):  # `restore` has changed it since, but somebody holds this method
            return type(self).forward(self, *args, **kwargs)
        if torch.compiler.is_compiling() or not (stock.forward is original and fuses(args, kwargs)):
            return super(kind, self).forward(*args, **kwargs)
        return ours(self, *args, **kwargs)

    kind.forward, kind.misfit = forward, staticmethod(wrapped)
    known_to_hooks(kind)
    return kind


def known_to_hooks(kind: Any) -> None:
    """Hooks of diffusers (0.35) that cache or skip blocks look the class of a block up: they find stock's entry."""
    with suppress(ImportError, ValueError):  # an older version; a class that is no block
        registry = importlib.import_module("diffusers.hooks._helpers").TransformerBlockRegistry
        registry.register(kind, copy.copy(registry.get(kind.__base__)))


def wrapped(module: nn.Module) -> str | None:
    """Why the class of a module is not changed, or None: see `accelerate`."""
    return "its forward is wrapped, as offloading does" if "forward" in vars(module) else None


def fuses(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call with these arguments runs kernels: on plain tensors of one floating type, without a gradient.

    Autocast would give a norm float32. Timesteps, (B,), become tokens' type before they meet them.
    """
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if torch.is_grad_enabled() or not tensors or not is_fused(*tensors):
        return False
    one_type = len({t.dtype for t in tensors if t.is_floating_point() and t.ndim > 1}) == 1
    return all(map(is_ordinary, tensors)) and one_type and not torch.is_autocast_enabled(tensors[0].device.type)


def norm_tokens(norm: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """norm(x) (1 + scale) + shift."""
    if not fits(norm, x, scale, shift):
        return modulate(norm(x), scale, shift).to(x.dtype)
    scale, shift = (row.expand(len(x), -1) for row in (scale, shift))
    return ops.layer_norm(x, norm.weight, norm.bias, norm.eps, scale=scale, shift=shift)


def add_norm_tokens(
    norm: Any, x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor | None = None, shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(s, norm(s) (1 + scale) + shift), s = x + gate y; a gate of None is 1, and so is a scale."""
    if x.shape != y.shape or not fits(norm, x, gate, scale, shift):
        s = x + y if gate is None else add_gated(x, y, gate)
        return s, modulate(norm(s), scale, shift).to(x.dtype)
    gate, scale, shift = (row if row is None else row.expand(len(x), -1) for row in (gate, scale, shift))
    return ops.add_layer_norm(x, y, norm.weight, norm.bias, norm.eps, gate=gate, scale=scale, shift=shift)


def add_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate y, rounded once, in the type of x."""
    return torch.addcmul(x, y, gate[:, None], out=torch.empty_like(x))


def second_half(
    x: Tensor, y: Tensor, gate: Tensor | None, norm: Any, scale: Tensor, shift: Tensor, ff: Any, ff_gate: Tensor
) -> Tensor:
    """The rest of a block, whose attention gave y: s = x + gate y, and s + ff_gate ff(norm(s) (1 + scale) + shift)."""
    s, normed = add_norm_tokens(norm, x, y, gate, scale, shift)
    return add_gated(s, ff(normed), ff_gate)


def within_float16(x: Tensor) -> Tensor:
    """x without infinities, if it is float16."""
    return x.clip(-LARGEST, LARGEST) if x.dtype == torch.float16 else x


def fits(norm: Any, x: Tensor, *rows: Tensor | None) -> bool:
    """Whether calling the norm is LayerNorm of tokens and nothing else happens, and the rows are those of samples."""
    plain = any(is_plain(norm, kind) for kind in NORMS) and FP32LayerNorm.forward is FP32_FORWARD
    shaped = x.ndim == 3 and all(row is None or (row.ndim == 2 and row.shape[0] in (1, len(x))) for row in rows)
    return plain and shaped and norm.normalized_shape == x.shape[-1:]


def modulate(normed: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """normed (1 + scale) + shift, or normed."""
    return normed if scale is None or shift is None else normed * (1 + scale[:, None]) + shift[:, None]
