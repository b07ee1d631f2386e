"""The up blocks of diffusers' U-Nets (0.42.1), whose resnet blocks take a map and its skip where they lie."""

from typing import Any

import torch
from diffusers.models.unets import unet_2d_blocks
from torch import Tensor

from ....support.plain import is_plain
from .modulated import stands_in
from .resnet import ResnetBlock2D


def _joined(resnet: Any, x: Tensor, skip: Tensor, temb: Tensor | None) -> Tensor:
    """resnet(cat((x, skip)), temb); whoever wrapped or hooked the block is given that map."""
    plain = is_plain(resnet, ResnetBlock2D)
    made: Tensor = resnet(x, temb, skip=skip) if plain else resnet(torch.cat([x, skip], dim=1), temb)
    return made


def _is_plain_sum(block: Any, skips: tuple[Tensor, ...], options: Any) -> bool:
    """Whether there is a skip for each block, no FreeU and no deprecated argument. Stock's says what it misses."""
    free = all(getattr(block, name, None) for name in ("s1", "s2", "b1", "b2"))
    return not options and not free and len(skips) >= len(block.resnets)


@stands_in
class UpBlock2D(unet_2d_blocks.UpBlock2D):
    """diffusers' block with the same parameters. `accelerate` turns one into it by its class."""

    def forward(
        self, hidden_states: Tensor, res_hidden_states_tuple: tuple[Tensor, ...], temb: Tensor | None = None,
        upsample_size: Any = None, *args: Any, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        if not _is_plain_sum(self, res_hidden_states_tuple, args or kwargs):
            made: Tensor = unet_2d_blocks.UpBlock2D.forward(
                self, hidden_states, res_hidden_states_tuple, temb, upsample_size, *args, **kwargs
            )
            return made
        for resnet, skip in zip(self.resnets, reversed(res_hidden_states_tuple), strict=False):
            hidden_states = _joined(resnet, hidden_states, skip, temb)
        for upsampler in self.upsamplers or ():
            hidden_states = upsampler(hidden_states, upsample_size)
        return hidden_states


@stands_in
class CrossAttnUpBlock2D(unet_2d_blocks.CrossAttnUpBlock2D):
    """As UpBlock2D, with a transformer after each resnet block."""

    def forward(
        self, hidden_states: Tensor, res_hidden_states_tuple: tuple[Tensor, ...], temb: Tensor | None = None,
        encoder_hidden_states: Any = None, cross_attention_kwargs: Any = None, upsample_size: Any = None,
        attention_mask: Tensor | None = None, encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if not _is_plain_sum(self, res_hidden_states_tuple, cross_attention_kwargs):
            made: Tensor = unet_2d_blocks.CrossAttnUpBlock2D.forward(
                self, hidden_states, res_hidden_states_tuple, temb, encoder_hidden_states, cross_attention_kwargs,
                upsample_size, attention_mask, encoder_attention_mask,
            )  # fmt: skip
            return made
        masks = {"attention_mask": attention_mask, "encoder_attention_mask": encoder_attention_mask}
        text = {"encoder_hidden_states": encoder_hidden_states, "cross_attention_kwargs": None, "return_dict": False}
        for resnet, attn, skip in zip(self.resnets, self.attentions, reversed(res_hidden_states_tuple), strict=False):
            hidden_states = attn(_joined(resnet, hidden_states, skip, temb), **text, **masks)[0]
        for upsampler in self.upsamplers or ():
            hidden_states = upsampler(hidden_states, upsample_size)
        return hidden_states
