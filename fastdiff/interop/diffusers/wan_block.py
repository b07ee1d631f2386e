"""The block of Wan (diffusers 0.42.1) with its sums, norms and modulations fused."""

from typing import Any

from diffusers.models.transformers import transformer_wan
from torch import Tensor

from .modulated import add_norm_tokens, norm_tokens, second_half, stands_in


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
