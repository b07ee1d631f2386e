"""The norms of diffusion transformers (diffusers 0.42.1) that a scale and a shift follow, and their RMSNorm.

Each class has the parameters of stock's. `accelerate` turns a layer into one by its class. Where there is no kernel,
stock's forward runs: see `stands_in`.
"""

from typing import Any

import torch.nn.functional as F
from diffusers.models import normalization
from torch import Tensor

from ....support.plain import has_plain_parameters
from .modulated import norm_tokens, stands_in


@stands_in
class AdaLayerNormZero(normalization.AdaLayerNormZero):
    """norm(x) (1 + scale) + shift, and the gate of attention, then shift, scale and gate of the MLP."""

    def forward(
        self, x: Tensor, timestep: Any = None, class_labels: Any = None, hidden_dtype: Any = None, emb: Any = None
    ) -> tuple[Tensor, ...]:
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, *rest = self.linear(self.silu(emb)).chunk(6, dim=1)
        return norm_tokens(self.norm, x, scale, shift), *rest


@stands_in
class AdaLayerNormZeroSingle(normalization.AdaLayerNormZeroSingle):
    """norm(x) (1 + scale) + shift, and a gate."""

    def forward(self, x: Tensor, emb: Any = None) -> tuple[Tensor, ...]:
        shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
        return norm_tokens(self.norm, x, scale, shift), gate


@stands_in
class SD35AdaLayerNormZeroX(normalization.SD35AdaLayerNormZeroX):
    """As AdaLayerNormZero, then the norm once more with another scale and shift, and its gate."""

    def forward(self, hidden_states: Tensor, emb: Any = None) -> tuple[Tensor, ...]:
        shift, scale, *rest, shift2, scale2, gate2 = self.linear(self.silu(emb)).chunk(9, dim=1)
        normed, normed2 = (norm_tokens(self.norm, hidden_states, *rows) for rows in ((scale, shift), (scale2, shift2)))
        return normed, *rest, normed2, gate2


@stands_in
class AdaLayerNormContinuous(normalization.AdaLayerNormContinuous):
    """norm(x) (1 + scale) + shift."""

    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        scale, shift = self.linear(self.silu(conditioning_embedding)).chunk(2, dim=1)
        return norm_tokens(self.norm, x, scale, shift)


@stands_in
class CogVideoXLayerNormZero(normalization.CogVideoXLayerNormZero):
    """norm(x) (1 + scale) + shift of the video and of the text, and a gate of each."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, ...]:
        video, text = self.linear(self.silu(temb)).chunk(2, dim=1)
        made, gates = [], []
        for tokens, rows in ((hidden_states, video), (encoder_hidden_states, text)):
            shift, scale, gate = rows.chunk(3, dim=1)
            made.append(norm_tokens(self.norm, tokens, scale, shift))
            gates.append(gate[:, None])
        return *made, *gates


@stands_in
class RMSNorm(normalization.RMSNorm):
    """x / sqrt(mean(x^2) + eps) weight, of the queries and keys, by PyTorch's kernel."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, weight = hidden_states, self.weight
        alike = weight is None or (weight.dtype == x.dtype and weight.shape == x.shape[-1:])
        if self.bias is not None or not alike or not has_plain_parameters(self):
            stocks: Tensor = normalization.RMSNorm.forward(self, hidden_states)
            return stocks
        return F.rms_norm(x, x.shape[-1:], weight, self.eps)
