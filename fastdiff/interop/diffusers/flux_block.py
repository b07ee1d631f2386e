"""The blocks of Flux (diffusers 0.42.1) with their sums, norms, modulations and rotations fused."""

from typing import Any

import torch
from diffusers.models.transformers import transformer_flux
from torch import Tensor, nn

from ... import ops
from ...support.adjacent import joined_tokens
from ...support.plain import as_defined, is_plain
from .modulated import add_gated, rotates, second_half, stands_in, within_float16

STOCK_PROCESSOR = as_defined(transformer_flux.FluxAttnProcessor, "__call__")


@stands_in
class FluxAttention(transformer_flux.FluxAttention):
    """diffusers' attention with the same parameters. `accelerate` turns one into it by its class.

    With FluxAttnProcessor queries have their norm and are rotated in one kernel, and keys in another. Any other
    processor is called as ever.
    """

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        x, text, processor = hidden_states, encoder_hidden_states, self.processor
        kind = transformer_flux.FluxAttnProcessor
        plain = type(processor) is kind and kind.__call__ is STOCK_PROCESSOR and not self.fused_projections
        both = (text is None) == (self.added_kv_proj_dim is None)
        if not (plain and both and rotates(image_rotary_emb, x, text)) or kwargs:
            return transformer_flux.FluxAttention.forward(
                self, x, text, attention_mask, image_rotary_emb, **kwargs
            )  # fmt: skip

        def parts(tokens: Tensor, layers: Any, norms: Any, start: int) -> list[Tensor]:
            """Queries and keys, rotated, and values of tokens, of which the first has the angles `start`."""
            cos, sin = (t[start : start + tokens.shape[1]] for t in image_rotary_emb)
            q, k, v = (layer(tokens).unflatten(-1, (-1, self.head_dim)) for layer in layers)
            return [*(rotated(norm, t, cos, sin) for norm, t in zip(norms, (q, k), strict=True)), v]

        before = 0 if text is None else text.shape[1]
        made = parts(x, (self.to_q, self.to_k, self.to_v), (self.norm_q, self.norm_k), before)
        if text is not None:
            layers, norms = (self.add_q_proj, self.add_k_proj, self.add_v_proj), (self.norm_added_q, self.norm_added_k)
            made = [torch.cat(pair, dim=1) for pair in zip(parts(text, layers, norms, 0), made, strict=True)]
        query, key, value = made
        out = transformer_flux.dispatch_attention_fn(
            query, key, value, attn_mask=attention_mask, backend=processor._attention_backend,
            parallel_config=processor._parallel_config,
        )  # fmt: skip
        out = out.flatten(2, 3).to(query.dtype)
        if text is None:
            return out
        of_text, out = out.tensor_split((text.shape[1],), dim=1)
        return self.to_out[1](self.to_out[0](out.contiguous())), self.to_add_out(of_text.contiguous())


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


def rotated(norm: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """norm(x), heads (B, N, heads, D), rotated; in one kernel if the norm is PyTorch's."""
    plain = is_plain(norm, nn.RMSNorm) and norm.weight is not None and norm.eps is not None
    if not plain or norm.normalized_shape != x.shape[-1:] or norm.weight.dtype != x.dtype:
        return ops.rotate(norm(x), cos, sin)
    return ops.rotate(x, cos, sin, norm.weight, norm.eps)


def beside(y: Tensor, act: Any, hidden: Tensor) -> Tensor:
    """torch.cat((y, act(hidden)), 2). GELU writes to its place at once."""
    if not is_plain(act, nn.GELU):
        return torch.cat((y, act(hidden)), 2)
    both = y.new_empty(*y.shape[:2], y.shape[2] + hidden.shape[2])
    of_y, of_hidden = both.tensor_split((y.shape[2],), dim=2)
    of_y.copy_(y)
    torch.ops.aten.gelu.out(hidden, approximate=act.approximate, out=of_hidden)
    return both
