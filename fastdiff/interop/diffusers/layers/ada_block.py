"""The blocks of DiT and PixArt (diffusers 0.42.1), BasicTransformerBlock with norms that a scale and shift follow."""

from typing import Any

from torch import Tensor

from .modulated import add_gated, add_norm_tokens, fuses, norm_tokens, second_half

NORM_TYPES = ("ada_norm_zero", "ada_norm_single")


def is_modulated(block: Any) -> bool:
    """Whether `modulated_block` is what stock's forward computes."""
    return block.norm_type in NORM_TYPES and block.pos_embed is None and block._chunk_size is None


def fuses_block(block: Any, x: Tensor, text: Tensor | None, timestep: Tensor | None) -> bool:
    """Whether `modulated_block` stands for stock's forward on these arguments."""
    if not is_modulated(block) or x.ndim != 3:
        return False
    table = block.scale_shift_table if block.norm_type == "ada_norm_single" else None
    return fuses((x, text, timestep, table), {})


def modulated_block(
    block: Any, x: Tensor, mask: Tensor | None, text: Tensor | None, text_mask: Tensor | None,
    timestep: Any, class_labels: Tensor | None,
) -> Tensor:  # fmt: skip
    """The forward of such a block, with its sums, norms and modulations fused."""
    if zero := block.norm_type == "ada_norm_zero":
        normed, gate, shift, scale, ff_gate = block.norm1(x, timestep, class_labels, hidden_dtype=x.dtype)
    else:
        rows = block.scale_shift_table[None] + timestep.reshape(len(x), 6, -1)
        first_shift, first_scale, gate, shift, scale, ff_gate = rows.unbind(1)
        normed = norm_tokens(block.norm1, x, first_scale, first_shift)
    own = text if block.only_cross_attention else None
    y = block.attn1(normed, encoder_hidden_states=own, attention_mask=mask)
    if block.attn2 is not None:
        if zero:
            x, normed = add_norm_tokens(block.norm2, x, y, gate)
        else:  # as PixArt's authors have it, without a norm
            x = normed = add_gated(x, y, gate)
        y, gate = block.attn2(normed, encoder_hidden_states=text, attention_mask=text_mask), None
    return second_half(x, y, gate, block.norm3 if zero else block.norm2, scale, shift, block.ff, ff_gate)
