"""The layers of a transformer block of diffusers (0.42.1): its attention, its feed-forward gate, and the sums before
its norms."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import activations, attention, attention_processor
from torch import Tensor, nn

from .... import ops
from ....ops.checks import runs_kernel
from ....ops.layer_norm import is_fused as norm_is_fused
from ....support.plain import as_defined, is_ordinary, is_plain
from ...together import product, saved_apart
from .ada_block import fuses_block, is_modulated, modulated_block
from .ahead import ahead_of, keys_and_values
from .modulated import known_to_hooks, wrapped

STOCK_BLOCK = as_defined(attention.BasicTransformerBlock, "forward")
STOCK_GATE = as_defined(activations.GEGLU, "forward"), as_defined(activations.GEGLU, "gelu")
STOCK_ATTENTION = as_defined(attention_processor.Attention, "forward")
STOCK_PROCESSOR = as_defined(attention_processor.AttnProcessor2_0, "__call__")


def _as_it_is_now(module: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a module whose class `restore` has changed, while somebody holds the method of ours."""
    made: Tensor = type(module).forward(module, *args, **kwargs)
    return made


def _is_bare(module: Any) -> bool:
    """Whether there is nothing before and nothing after the attention and its projections."""
    around = module.spatial_norm is not None or module.group_norm is not None or module.residual_connection
    return not around and module.rescale_output_factor == 1


def _has_plain_norms(module: Any) -> bool:
    return module.norm_type == "layer_norm" and module.pos_embed is None


class GEGLU(activations.GEGLU):
    """diffusers' gate with the same parameters. `accelerate` turns one into it by its class.

    The projection is called. Its two halves are multiplied in one kernel. Where that is none, stock's forward runs.
    """

    @staticmethod
    def misfit(module: Any) -> str | None:
        """See `accelerate`."""
        return wrapped(module)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(self, GEGLU):
            return _as_it_is_now(self, hidden_states, *args, **kwargs)
        patched = (activations.GEGLU.forward, activations.GEGLU.gelu) != STOCK_GATE or "gelu" in vars(self)
        if args or kwargs or patched or not runs_kernel(hidden_states):
            made: Tensor = super().forward(hidden_states, *args, **kwargs)
            return made
        projected = self.proj(hidden_states)
        if is_ordinary(projected) and runs_kernel(projected):
            return ops.gated_gelu(projected)
        hidden, gates = projected.chunk(2, dim=-1)
        return hidden * self.gelu(gates)


@saved_apart
class Attention(attention_processor.Attention):
    """diffusers' attention with the same parameters. `accelerate` turns one into it by its class.

    With the processor AttnProcessor2_0 it is the same arithmetic, without the division by 1 that ends stock's. Any
    other processor is called as ever.
    """

    @staticmethod
    def misfit(module: Any) -> str | None:
        """See `accelerate`: one with a norm before or a sum after the attention stays stock's."""
        return wrapped(module) if _is_bare(module) else ""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        given = hidden_states, encoder_hidden_states, attention_mask
        if not isinstance(self, Attention):
            return _as_it_is_now(self, *given, **cross_attention_kwargs)
        if cross_attention_kwargs or hidden_states.ndim != 3 or not self._runs_stock_processor():
            made: Tensor = super().forward(*given, **cross_attention_kwargs)
            return made
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch, length, _ = text.shape
        if attention_mask is not None:
            mask = self.prepare_attention_mask(attention_mask, length, batch)
            attention_mask = mask.view(batch, self.heads, -1, mask.shape[-1])
        query, key, value = self._maps(hidden_states, encoder_hidden_states)
        size = key.shape[-1] // self.heads
        query, key, value = (t.view(batch, -1, self.heads, size).transpose(1, 2) for t in (query, key, value))
        query = query if self.norm_q is None else self.norm_q(query)
        key = key if self.norm_k is None else self.norm_k(key)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=0.0, is_causal=False
        )
        out = out.transpose(1, 2).reshape(batch, -1, self.heads * size).to(query.dtype)
        projection, dropout = self.to_out
        return dropout(projection(out))

    def projections(self) -> list[list[Any]]:
        """Lists of layers that take one input; see fastdiff/interop/together.py."""
        layers = [self.to_k, self.to_v] if self.is_cross_attention else [self.to_q, self.to_k, self.to_v]
        return [[layer for layer in layers if layer is not None]]

    def _maps(self, x: Tensor, text: Tensor | None) -> tuple[Tensor, ...]:
        """Queries of x, and keys and values of a text, or of x without one."""
        if text is None and (maps := product((self.to_q, self.to_k, self.to_v), x)) is not None:
            return maps
        query = self.to_q(x)
        if text is None:
            text = x
        elif self.norm_cross:
            text = self.norm_encoder_hidden_states(text)
        elif (made := ahead_of(self, text, keys_and_values)) is not None:
            return query, *made
        return query, *(product((self.to_k, self.to_v), text) or (self.to_k(text), self.to_v(text)))

    def _runs_stock_processor(self) -> bool:
        kind = attention_processor.AttnProcessor2_0
        return (
            type(self.processor) is kind
            and kind.__call__ is STOCK_PROCESSOR
            and attention_processor.Attention.forward is STOCK_ATTENTION
            and _is_bare(self)
        )


class BasicTransformerBlock(attention.BasicTransformerBlock):
    """diffusers' block with the same parameters. `accelerate` turns one into it by its class.

    Each sum before a norm is one kernel with that norm. If these norms are no longer plain layers, stock's forward
    runs. So it does where there is no such kernel.
    """

    @staticmethod
    def misfit(module: Any) -> str | None:
        """See `accelerate`: in others no sum is followed by a plain norm."""
        return wrapped(module) if _has_plain_norms(module) or is_modulated(module) else ""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        given = (
            hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
            cross_attention_kwargs, class_labels, added_cond_kwargs,
        )  # fmt: skip
        if not isinstance(self, BasicTransformerBlock):
            return _as_it_is_now(self, *given)
        unpatched = attention.BasicTransformerBlock.forward is STOCK_BLOCK and not cross_attention_kwargs
        if unpatched and fuses_block(self, hidden_states, encoder_hidden_states, timestep):
            return modulated_block(self, *given[:5], class_labels)
        if not (unpatched and self._fuses(hidden_states)):
            made: Tensor = super().forward(*given)
            return made
        own = encoder_hidden_states if self.only_cross_attention else None
        out = self.attn1(self.norm1(hidden_states), encoder_hidden_states=own, attention_mask=attention_mask)
        if self.attn2 is not None:
            hidden_states, normed = _sum_and_norm(hidden_states, out, self.norm2)
            out = self.attn2(normed, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)
        hidden_states, normed = _sum_and_norm(hidden_states, out, self.norm3)
        fed: Tensor = self.ff(normed)
        return fed + hidden_states

    def _fuses(self, x: Tensor) -> bool:
        """Whether the norms that are not called, and stock's forward, are as diffusers made them."""
        if not _has_plain_norms(self):
            return False
        norms = (self.norm3,) if self.attn2 is None else (self.norm2, self.norm3)
        return (
            self._chunk_size is None
            and x.ndim == 3
            and is_ordinary(x)
            and all(is_plain(n, nn.LayerNorm) and norm_is_fused(x, n.weight, n.bias) for n in norms)
            and not torch.is_autocast_enabled(x.device.type)  # there a norm is float32
        )


def _sum_and_norm(x: Tensor, y: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """(y + x, the norm of it)."""
    if is_ordinary(y) and y.dtype == x.dtype and y.shape == x.shape and norm_is_fused(x, y):
        return ops.add_layer_norm(x, y, norm.weight, norm.bias, norm.eps)
    x = y + x
    return x, norm(x)


known_to_hooks(BasicTransformerBlock)
