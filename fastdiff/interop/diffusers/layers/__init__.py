"""Layers and blocks of diffusers' networks with their arithmetic on the fused operations: `accelerate` puts them in.

A class here is the stock class that it derives from, with the same parameters and their names. Its `misfit` says why a
layer cannot become one. A layer becomes one by its class alone, and `restore` gives it stock's again.
"""

from .ada_norm import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    CogVideoXLayerNormZero,
    RMSNorm,
    SD35AdaLayerNormZeroX,
)
from .attention import GEGLU, Attention, BasicTransformerBlock
from .flux_block import FluxAttention, FluxSingleTransformerBlock, FluxTransformerBlock
from .group_norm import GroupNorm
from .joint_block import JointTransformerBlock
from .qwen_block import QwenImageTransformerBlock
from .resnet import ResnetBlock2D
from .transformer import Transformer2DModel
from .wan_block import WanAttention, WanTransformerBlock

# All of them, for `accelerate`: that of resnet blocks first.
LAYERS = (
    ResnetBlock2D,
    Transformer2DModel,
    GroupNorm,
    BasicTransformerBlock,
    Attention,
    GEGLU,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    SD35AdaLayerNormZeroX,
    AdaLayerNormContinuous,
    CogVideoXLayerNormZero,
    RMSNorm,
    JointTransformerBlock,
    FluxTransformerBlock,
    FluxSingleTransformerBlock,
    FluxAttention,
    QwenImageTransformerBlock,
    WanTransformerBlock,
    WanAttention,
)
