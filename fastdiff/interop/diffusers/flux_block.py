"""The blocks of Flux (diffusers 0.42.1) with their sums, norms and modulations fused."""

from typing import Any

import torch
from diffusers.models.transformers import transformer_flux
from torch import Tensor

from .modulated import add_gated, second_half, stands_in

LARGEST = 65504.0  # of float16: stock clips its sums there


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
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        normed, gate = self.norm(x, emb=temb)
        hidden = self.act_mlp(self.proj_mlp(normed))
        y = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
        x = within_float16(add_gated(x, self.proj_out(torch.cat([y, hidden], dim=2)), gate))
        return x[:, :tokens], x[:, tokens:]


def within_float16(x: Tensor) -> Tensor:
    """x without infinities, if it is float16."""
    return x.clip(-LARGEST, LARGEST) if x.dtype == torch.float16 else x
