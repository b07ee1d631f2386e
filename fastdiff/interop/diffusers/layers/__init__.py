"""Layers and blocks of diffusers' networks with their arithmetic on the fused operations: `accelerate` puts them in.

A class here is the stock class that it derives from, with the same parameters and their names. Its `misfit` says why a
layer cannot become one. A layer becomes one by its class alone, and `restore` gives it stock's again.

They repeat the arithmetic of diffusers 0.42.1. Here stands from which version on stock's class gives the same. A layer
of an older version stays stock's.
"""

from typing import Any

from .. import VERSION
from .attention import GEGLU, Attention, BasicTransformerBlock
from .group_norm import GroupNorm
from .networks import NETWORKS
from .resnet import ResnetBlock2D
from .transformer import Transformer2DModel
from .up_block import CrossAttnUpBlock2D, UpBlock2D

# All of them, for `accelerate`: that of resnet blocks first.
LAYERS: list[Any] = [ResnetBlock2D, Transformer2DModel, GroupNorm, BasicTransformerBlock, Attention, GEGLU]  # from 0.30
LAYERS += [*NETWORKS, UpBlock2D, CrossAttnUpBlock2D]

if VERSION >= (0, 32):
    from .ada_norm import (
        AdaLayerNormContinuous,
        AdaLayerNormZero,
        AdaLayerNormZeroSingle,
        CogVideoXLayerNormZero,
        RMSNorm,
        SD35AdaLayerNormZeroX,
    )
    from .joint_block import JointTransformerBlock

    LAYERS += [AdaLayerNormZero, AdaLayerNormZeroSingle, SD35AdaLayerNormZeroX, AdaLayerNormContinuous]
    LAYERS += [CogVideoXLayerNormZero, RMSNorm, JointTransformerBlock]

if VERSION >= (0, 37):
    from .flux_block import FluxAttention, FluxSingleTransformerBlock, FluxTransformerBlock
    from .qwen_block import QwenImageTransformerBlock
    from .wan_block import WanAttention, WanTransformerBlock

    LAYERS += [FluxTransformerBlock, FluxSingleTransformerBlock, FluxAttention]
    LAYERS += [QwenImageTransformerBlock, WanTransformerBlock, WanAttention]
