"""The transformer of diffusers' U-Nets (0.42.1) on maps that are channels last."""

from typing import Any

import torch.nn.functional as F
from diffusers.models.transformers import transformer_2d
from torch import Tensor

from ....fused import channels_last, maps_pixels
from ....support.plain import as_defined

STOCK_START = as_defined(transformer_2d.Transformer2DModel, "_operate_on_continuous_inputs")
STOCK_END = as_defined(transformer_2d.Transformer2DModel, "_get_output_for_continuous_inputs")


class Transformer2DModel(transformer_2d.Transformer2DModel):
    """diffusers' transformer with the same parameters. `accelerate` turns one into it by its class.

    A map that is channels last is a matrix of pixels already. It is taken as one, and the result is such a map again.
    The 1x1 convolutions at both ends are matrix products, which add their biases. Stock copies the map to NCHW. From
    there on a network runs in mixed layouts, if the projection is a linear layer.
    """

    @staticmethod
    def misfit(module: Any) -> str | None:
        """See `accelerate`: one that takes no maps has nothing to fuse."""
        return None if module.is_input_continuous else ""

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        layer: Any = self.proj_in
        patched = transformer_2d.Transformer2DModel._operate_on_continuous_inputs is not STOCK_START
        if patched or not channels_last(hidden_states) or not maps_pixels(layer):  # a linear layer is none
            made: tuple[Tensor, int] = super()._operate_on_continuous_inputs(hidden_states)
            return made
        pixels = self.norm(hidden_states).permute(0, 2, 3, 1).flatten(1, 2)
        return F.linear(pixels, layer.weight.flatten(1), layer.bias), layer.out_channels

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        patched = transformer_2d.Transformer2DModel._get_output_for_continuous_inputs is not STOCK_END
        if patched or not channels_last(residual):
            made: Tensor = super()._get_output_for_continuous_inputs(
                hidden_states, residual, batch_size, height, width, inner_dim
            )
            return made
        layer: Any = self.proj_out
        if self.use_linear_projection:
            return _as_map(layer(hidden_states), height) + residual
        if maps_pixels(layer):
            return _as_map(F.linear(hidden_states, layer.weight.flatten(1), layer.bias), height) + residual
        out: Tensor = layer(_as_map(hidden_states, height))
        return out + residual


def _as_map(pixels: Tensor, height: int) -> Tensor:
    """(B, H W, C) as (B, C, H, W), channels last: a view."""
    return pixels.unflatten(1, (height, -1)).permute(0, 3, 1, 2)
