"""The blocks of Flux (diffusers 0.42.1) with their sums, norms, modulations and rotations fused."""

from typing import Any

import torch
from diffusers.models.transformers import transformer_flux
from torch import Tensor, nn

from ....support.adjacent import joined_tokens
from ....support.plain import as_defined, is_plain
from .modulated import add_gated, second_half, stands_in, within_float16
from .rotary import attend, rotates

STOCK_PROCESSOR = as_defined(transformer_flux.FluxAttnProcessor, "__call__")


@stands_in
class FluxAttention(transformer_flux.FluxAttention):
    """diffusers' attention with the same parameters. `accelerate` turns one into it by its class.

    With FluxAttnProcessor queries have their norm and are rotated in one kernel, and so have keys. Any other processor
    is called as ever.
    """

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        x, text, processor = hidden_states, encoder_hidden_states, self.processor
        kind = transformer_flux.FluxAttnProcessor
        plain = type(processor) is kind and kind.__call__ is STOCK_PROCESSOR and not self.fused_projections
        both = (text is None) == (self.added_kv_proj_dim is None)
        before = 0 if text is None else text.shape[1]
        if kwargs or not (plain and both and rotates(image_rotary_emb, before + x.shape[1], x)):
            return transformer_flux.FluxAttention.forward(self, x, text, attention_mask, image_rotary_emb, **kwargs)
        cos, sin = image_rotary_emb
        tables, of_text = (cos[before:], sin[before:]), (cos[:before], sin[:before])
        dispatch = transformer_flux.dispatch_attention_fn
        return attend(self, dispatch, self.head_dim, x, tables, text, of_text, attention_mask)


@stands_in
class FluxTransformerBlock(transformer_flux.FluxTransformerBlock):
    """diffusers' block with the same parameters. `accelerate` turns a block into one by its class."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb: Any = None,
        joint_attention_kwargs: Any = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        x, text = hidden_states, encoder_hidden_states
        normed, gate, shift, scale, ff_gate = self.norm1(x, emb=temb)
        normed_text, *of_text = self.norm1_context(text, emb=temb)
        y, y_text, *of_adapter = self.attn(
            hidden_states=normed, encoder_hidden_states=normed_text, image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )  # fmt: skip
        x = second_half(x, y, gate, self.norm2, scale, shift, self.ff, ff_gate)
        gate, shift, scale, ff_gate = of_text
        text = second_half(text, y_text, gate, self.norm2_context, scale, shift, self.ff_context, ff_gate)
        return within_float16(text), sum(of_adapter, x)


@stands_in
class FluxSingleTransformerBlock(transformer_flux.FluxSingleTransformerBlock):
    """diffusers' block with the same parameters. `accelerate` turns a block into one by its class."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb: Any = None,
        joint_attention_kwargs: Any = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        tokens = encoder_hidden_states.shape[1]
        x = joined_tokens(encoder_hidden_states, hidden_states)  # the two parts of what the last block made
        normed, gate = self.norm(x, emb=temb)
        hidden = self.proj_mlp(normed)
        y = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
        x = within_float16(add_gated(x, self.proj_out(beside(y, self.act_mlp, hidden)), gate))
        return x[:, :tokens], x[:, tokens:]


def beside(y: Tensor, act: Any, hidden: Tensor) -> Tensor:
    """torch.cat((y, act(hidden)), 2). GELU writes to its place at once."""
    if not is_plain(act, nn.GELU):
        return torch.cat((y, act(hidden)), 2)
    both = y.new_empty(*y.shape[:2], y.shape[2] + hidden.shape[2])
    of_y, of_hidden = both.tensor_split((y.shape[2],), dim=2)
    of_y.copy_(y)
    torch.ops.aten.gelu.out(hidden, approximate=act.approximate, out=of_hidden)
    return both
