"""The block of Qwen-Image (diffusers 0.42.1) with its sums, norms and modulations fused."""

from typing import Any

from diffusers.models import attention_processor
from diffusers.models.transformers import transformer_qwenimage
from torch import Tensor

from ....support.plain import as_defined, is_ordinary, is_plain
from .attention import Attention
from .modulated import norm_tokens, second_half, stands_in, within_float16
from .rotary import Tables, attend, rotates

STOCK_ATTENTION = as_defined(attention_processor.Attention, "forward")
STOCK_PROCESSOR = as_defined(transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0, "__call__")
STOCK_MODULATE = as_defined(transformer_qwenimage.QwenImageTransformerBlock, "_modulate")


@stands_in
class QwenImageTransformerBlock(transformer_qwenimage.QwenImageTransformerBlock):
    """diffusers' block with the same parameters. `accelerate` turns a block into one by its class."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, encoder_hidden_states_mask: Tensor | None,
        temb: Tensor, image_rotary_emb: Any = None, joint_attention_kwargs: Any = None, modulate_index: Any = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        x, text, mask = hidden_states, encoder_hidden_states, encoder_hidden_states_mask
        patched = type(self)._modulate is not STOCK_MODULATE or "_modulate" in vars(self)
        if self.zero_cond_t or modulate_index is not None or patched:  # rows for each token
            stocks: tuple[Tensor, Tensor] = transformer_qwenimage.QwenImageTransformerBlock.forward(
                self, x, text, mask, temb, image_rotary_emb, joint_attention_kwargs, modulate_index
            )
            return stocks
        shift, scale, gate, *of_image = self.img_mod(temb).chunk(6, dim=-1)
        text_shift, text_scale, text_gate, *of_text = self.txt_mod(temb).chunk(6, dim=-1)
        normed = norm_tokens(self.img_norm1, x, scale, shift)
        normed_text = norm_tokens(self.txt_norm1, text, text_scale, text_shift)
        tables = None if joint_attention_kwargs or mask is not None else tables_of(image_rotary_emb, x, text)
        if tables is not None and is_stock(self.attn):
            dispatch, depth = transformer_qwenimage.dispatch_attention_fn, self.attn.inner_dim // self.attn.heads
            y, y_text = attend(self.attn, dispatch, depth, normed, tables[0], normed_text, tables[1])
        else:
            y, y_text = self.attn(
                hidden_states=normed, encoder_hidden_states=normed_text, encoder_hidden_states_mask=mask,
                image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}),
            )  # fmt: skip
        shift, scale, ff_gate = of_image
        x = second_half(x, y, gate, self.img_norm2, scale, shift, self.img_mlp, ff_gate)
        shift, scale, ff_gate = of_text
        text = second_half(text, y_text, text_gate, self.txt_norm2, scale, shift, self.txt_mlp, ff_gate)
        return within_float16(text), within_float16(x)


def is_stock(attn: Any) -> bool:
    """Whether calling the attention is stock's processor, and nothing else happens."""
    kind = transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0
    layer = type(attn) in (attention_processor.Attention, Attention) and is_plain(attn, type(attn))
    unpatched = attention_processor.Attention.forward is STOCK_ATTENTION and kind.__call__ is STOCK_PROCESSOR
    return layer and unpatched and type(attn.processor) is kind and len(attn.to_out) == 2


def tables_of(image_rotary_emb: Any, x: Tensor, text: Tensor) -> list[Tables] | None:
    """Cosines and sines of the image and of the text, parts of their complex numbers; None if these are not given."""
    if not isinstance(image_rotary_emb, tuple) or not all(is_ordinary(t) and t.is_complex() for t in image_rotary_emb):
        return None
    tables = [(t.real, t.imag) for t in image_rotary_emb]
    fit = all(rotates(table, tokens.shape[1], tokens) for table, tokens in zip(tables, (x, text), strict=True))
    return tables if fit else None
