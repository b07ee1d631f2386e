"""The smallest transformers of diffusers of each kind whose blocks `accelerate` fuses, and their calls."""

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from replayed import draw
from torch import Tensor, nn

HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
IMAGE = draw(0, 2, 4, 4, 4)  # 16 tokens where a patch is a pixel, else 4
TEXT = draw(1, 2, 3, 8)
TIMES = torch.tensor([3, 500])


def sd3() -> tuple[nn.Module, dict[str, Any]]:
    """As Stable Diffusion 3.5: the first block attends twice, queries and keys have norms."""
    net = diffusers.SD3Transformer2DModel(
        **HEADS, sample_size=4, patch_size=2, in_channels=4, out_channels=4, num_layers=2, joint_attention_dim=8,
        caption_projection_dim=16, pooled_projection_dim=8, pos_embed_max_size=4, qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )  # fmt: skip
    return net, {
        "hidden_states": IMAGE, "encoder_hidden_states": TEXT, "pooled_projections": TEXT[:, 0], "timestep": TIMES
    }  # fmt: skip


def flux() -> tuple[nn.Module, dict[str, Any]]:
    net = diffusers.FluxTransformer2DModel(
        **HEADS, in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=8, pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    image = IMAGE.flatten(2).transpose(1, 2)
    return net, {
        "hidden_states": image, "encoder_hidden_states": TEXT, "pooled_projections": TEXT[:, 0],
        "timestep": TIMES / 1000, "img_ids": torch.arange(48.0).reshape(16, 3) % 4, "txt_ids": torch.zeros(3, 3),
    }  # fmt: skip


def dit() -> tuple[nn.Module, dict[str, Any]]:
    net = diffusers.DiTTransformer2DModel(
        **HEADS, in_channels=4, out_channels=4, num_layers=1, norm_num_groups=2, sample_size=4, num_embeds_ada_norm=5
    )
    return net, {"hidden_states": IMAGE, "timestep": TIMES, "class_labels": torch.tensor([1, 2])}


def pixart() -> tuple[nn.Module, dict[str, Any]]:
    net = diffusers.PixArtTransformer2DModel(
        **HEADS, in_channels=4, out_channels=4, num_layers=1, norm_num_groups=2, sample_size=4,
        cross_attention_dim=16, caption_channels=8, use_additional_conditions=False,
    )  # fmt: skip
    sizes = {"resolution": None, "aspect_ratio": None}
    return net, {
        "hidden_states": IMAGE, "encoder_hidden_states": TEXT, "timestep": TIMES, "added_cond_kwargs": sizes
    }  # fmt: skip


def wan() -> tuple[nn.Module, dict[str, Any]]:
    net = diffusers.WanTransformer3DModel(
        **HEADS, patch_size=(1, 2, 2), in_channels=4, out_channels=4, text_dim=8, freq_dim=8, ffn_dim=16, num_layers=1,
        cross_attn_norm=True, rope_max_seq_len=4,
    )  # fmt: skip
    return net, {"hidden_states": IMAGE[:, :, None], "encoder_hidden_states": TEXT, "timestep": TIMES}


def qwen() -> tuple[nn.Module, dict[str, Any]]:
    net = diffusers.QwenImageTransformer2DModel(
        **HEADS, in_channels=4, out_channels=4, num_layers=1, patch_size=1, joint_attention_dim=8,
        axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    image = IMAGE.flatten(2).transpose(1, 2)
    places = {"img_shapes": [(1, 4, 4)] * 2}
    return net, {"hidden_states": image, "encoder_hidden_states": TEXT, "timestep": TIMES / 1000} | places


TRANSFORMERS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    make.__name__: make for make in (sd3, flux, qwen, dit, pixart, wan)
}


@functools.cache
def _made(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    torch.manual_seed(0)
    net, given = TRANSFORMERS[name]()
    return {key: p + 0.2 * torch.randn_like(p) for key, p in net.state_dict().items()}, given


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
    """A network in eval mode, no weight of which is 0 or 1, and the arguments of a call, in that type."""
    weights, given = _made(name)
    net = TRANSFORMERS[name]()[0].eval()
    net.load_state_dict(weights)
    data = {k: v.to(dtype) if isinstance(v, Tensor) and v.ndim > 1 else v for k, v in given.items()}
    return nn.Module.to(net, dtype), data


def output(net: nn.Module, given: dict[str, Any]) -> Tensor:
    """Without a gradient."""
    with torch.no_grad():
        out: Tensor = net(**given, return_dict=False)[0]
        return out
