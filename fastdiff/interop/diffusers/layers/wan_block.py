"""The block of Wan (diffusers 0.42.1) with its sums, norms, modulations and rotations fused."""

from typing import Any

from diffusers.models.transformers import transformer_wan
from torch import Tensor

from .... import ops
from ....support.plain import as_defined
from .modulated import add_norm_tokens, norm_tokens, second_half, stands_in
from .rotary import rotates

STOCK_PROCESSOR = as_defined(transformer_wan.WanAttnProcessor, "__call__")


@stands_in
class WanAttention(transformer_wan.WanAttention):
    """diffusers' attention with the same parameters. `accelerate` turns one into it by its class.

    Among the tokens themselves, with WanAttnProcessor, queries and keys are rotated in one kernel each. Any other call
    is stock's.
    """

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None,
        rotary_emb: Any = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        x, processor, kind = hidden_states, self.processor, transformer_wan.WanAttnProcessor
        plain = type(processor) is kind and kind.__call__ is STOCK_PROCESSOR and not self.fused_projections
        own = encoder_hidden_states is None and self.add_k_proj is None and not kwargs
        tables = tables_of(rotary_emb)
        if tables is None or not (plain and own and rotates(tables, x.shape[1], x)):
            stocks: Tensor = transformer_wan.WanAttention.forward(
                self, x, encoder_hidden_states, attention_mask, rotary_emb, **kwargs
            )
            return stocks
        parts = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(x)), self.to_v(x)
        q, k, v = (part.unflatten(2, (self.heads, -1)) for part in parts)
        q, k = (ops.rotate(t, *tables) for t in (q, k))
        out = transformer_wan.dispatch_attention_fn(
            q, k, v, attn_mask=attention_mask, dropout_p=0.0, is_causal=False,
            backend=processor._attention_backend, parallel_config=processor._parallel_config,
        )  # fmt: skip
        made: Tensor = self.to_out[1](self.to_out[0](out.flatten(2, 3).type_as(q)))
        return made


def tables_of(rotary_emb: Any) -> tuple[Tensor, Tensor] | None:
    """The cosines and sines of each pair, of tables (1, N, 1, D): stock takes them from its first and second half."""
    if rotary_emb is None or any(t.ndim != 4 or t.shape[::2] != (1, 1) for t in rotary_emb):
        return None
    cos, sin = rotary_emb
    return cos[0, :, 0, 0::2], sin[0, :, 0, 1::2]


@stands_in
class WanTransformerBlock(transformer_wan.WanTransformerBlock):
    """diffusers' block with the same parameters. `accelerate` turns a block into one by its class.

    Stock copies the tokens to float32 and back around each norm and sum. Here only the arithmetic is float32.
    """

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any) -> Tensor:
        if temb.ndim != 3:  # rows for each token
            stocks: Tensor = transformer_wan.WanTransformerBlock.forward(
                self, hidden_states, encoder_hidden_states, temb, rotary_emb
            )
            return stocks
        rows = self.scale_shift_table + temb.float()
        shift, scale, gate, ff_shift, ff_scale, ff_gate = rows.unbind(1)
        y = self.attn1(norm_tokens(self.norm1, hidden_states, scale, shift), None, None, rotary_emb)
        x, normed = add_norm_tokens(self.norm2, hidden_states, y, gate)
        y = self.attn2(normed, encoder_hidden_states, None, None)
        return second_half(x, y, None, self.norm3, ff_scale, ff_shift, self.ffn, ff_gate)
