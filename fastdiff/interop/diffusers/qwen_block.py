"""The block of Qwen-Image (diffusers 0.42.1) with its sums, norms and modulations fused."""

from typing import Any

from diffusers.models.transformers import transformer_qwenimage
from torch import Tensor

from ...support.plain import as_defined
from .modulated import norm_tokens, second_half, stands_in, within_float16

STOCK_MODULATE = as_defined(transformer_qwenimage.QwenImageTransformerBlock, "_modulate")


@stands_in
class QwenImageTransformerBlock(transformer_qwenimage.QwenImageTransformerBlock):
    """diffusers' block with the same parameters. `accelerate` turns a block into one by its class."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, encoder_hidden_states_mask: Tensor | None,
        temb: Tensor, image_rotary_emb: Any = None, joint_attention_kwargs: Any = None, modulate_index: Any = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        x, text = hidden_states, encoder_hidden_states
        patched = type(self)._modulate is not STOCK_MODULATE or "_modulate" in vars(self)
        if self.zero_cond_t or modulate_index is not None or patched:  # rows for each token
            stocks: tuple[Tensor, Tensor] = transformer_qwenimage.QwenImageTransformerBlock.forward(
                self,
                x,
                text,
                encoder_hidden_states_mask,
                temb,
                image_rotary_emb,
                joint_attention_kwargs,
                modulate_index,
            )
            return stocks
        shift, scale, gate, *of_image = self.img_mod(temb).chunk(6, dim=-1)
        text_shift, text_scale, text_gate, *of_text = self.txt_mod(temb).chunk(6, dim=-1)
        y, y_text = self.attn(
            hidden_states=norm_tokens(self.img_norm1, x, scale, shift),
            encoder_hidden_states=norm_tokens(self.txt_norm1, text, text_scale, text_shift),
            encoder_hidden_states_mask=encoder_hidden_states_mask, image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )  # fmt: skip
        shift, scale, ff_gate = of_image
        x = second_half(x, y, gate, self.img_norm2, scale, shift, self.img_mlp, ff_gate)
        shift, scale, ff_gate = of_text
        text = second_half(text, y_text, text_gate, self.txt_norm2, scale, shift, self.txt_mlp, ff_gate)
        return within_float16(text), within_float16(x)
