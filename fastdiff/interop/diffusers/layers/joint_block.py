"""The block of Stable Diffusion 3 (diffusers 0.42.1) with its sums, norms and modulations fused."""

from typing import Any

from diffusers.models import attention
from torch import Tensor

from .modulated import add_gated, second_half, stands_in


@stands_in
class JointTransformerBlock(attention.JointTransformerBlock):
    """diffusers' block with the same parameters. `accelerate` turns a block into one by its class."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, joint_attention_kwargs: Any = None
    ) -> tuple[Tensor | None, Tensor]:
        if self._chunk_size is not None:
            stocks: Any = attention.JointTransformerBlock.forward(
                self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs
            )
            return stocks
        x, text, more = hidden_states, encoder_hidden_states, joint_attention_kwargs or {}
        normed, gate, shift, scale, ff_gate, *second = self.norm1(x, emb=temb)
        if self.context_pre_only:
            normed_text = self.norm1_context(text, temb)
        else:
            normed_text, *of_text = self.norm1_context(text, emb=temb)
        y, y_text = self.attn(hidden_states=normed, encoder_hidden_states=normed_text, **more)
        if self.use_dual_attention:
            normed, second_gate = second
            x, y, gate = add_gated(x, y, gate), self.attn2(hidden_states=normed, **more), second_gate
        x = second_half(x, y, gate, self.norm2, scale, shift, self.ff, ff_gate)
        if self.context_pre_only:
            return None, x
        gate, shift, scale, ff_gate = of_text
        return second_half(text, y_text, gate, self.norm2_context, scale, shift, self.ff_context, ff_gate), x
