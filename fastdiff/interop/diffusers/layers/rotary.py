"""Attention of image and text together (diffusers 0.42.1) whose queries and keys have a norm and are rotated."""

from typing import Any

import torch
from diffusers.models import normalization
from torch import Tensor, nn

from .... import ops
from ....support.plain import as_defined, is_ordinary, is_plain
from .ada_norm import RMSNorm

STOCK_NORM = as_defined(normalization.RMSNorm, "forward")
Tables = tuple[Tensor, Tensor]


def rotates(tables: Any, tokens: int, x: Tensor) -> bool:
    """Whether these are cosines and sines of so many tokens that `ops.rotate` takes for heads of x (B, N, C)."""
    if not isinstance(tables, tuple) or len(tables) != 2 or x.ndim != 3:
        return False
    ordinary = all(isinstance(t, Tensor) and is_ordinary(t) and t.is_floating_point() for t in tables)
    return ordinary and all(t.ndim == 2 and len(t) == tokens and t.device == x.device for t in tables)


def rotated(norm: Any, x: Tensor, tables: Tables) -> Tensor:
    """norm(x), heads (B, N, heads, D), rotated; in one kernel if the norm is RMSNorm, and nothing else happens.

    norm: None for no norm.
    """
    plain = is_plain(norm, nn.RMSNorm)
    if type(norm) in (normalization.RMSNorm, RMSNorm):
        plain = is_plain(norm, type(norm)) and norm.bias is None and normalization.RMSNorm.forward is STOCK_NORM
    weight = norm.weight if plain else None
    if weight is None or norm.eps is None or weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        return ops.rotate(x if norm is None else norm(x), *tables)
    return ops.rotate(x, *tables, weight, norm.eps)


def attend(
    attn: Any, dispatch: Any, depth: int, x: Tensor, of_x: Tables, text: Tensor | None = None,
    of_text: Tables | None = None, mask: Tensor | None = None,
) -> Any:  # fmt: skip
    """The result of attention `attn` among tokens x; with a text before them, both results.

    Args:
        dispatch: dispatch_attention_fn of the module of diffusers whose processor this stands for.
        depth: of a head.
        of_x, of_text: cosines and sines.
    """
    processor = attn.processor

    def parts(tokens: Tensor, tables: Tables, layers: Any, norms: Any) -> list[Tensor]:
        q, k, v = (layer(tokens).unflatten(-1, (-1, depth)) for layer in layers)
        return [*(rotated(norm, t, tables) for norm, t in zip(norms, (q, k), strict=True)), v]

    made = parts(x, of_x, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
    if text is not None and of_text is not None:
        layers, norms = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), (attn.norm_added_q, attn.norm_added_k)
        made = [torch.cat(pair, dim=1) for pair in zip(parts(text, of_text, layers, norms), made, strict=True)]
    backend, parallel = processor._attention_backend, processor._parallel_config
    out = dispatch(*made, attn_mask=mask, backend=backend, parallel_config=parallel).flatten(2, 3).to(made[0].dtype)
    if text is None:
        return out
    made_text, out = out.tensor_split((text.shape[1],), dim=1)
    return attn.to_out[1](attn.to_out[0](out.contiguous())), attn.to_add_out(made_text.contiguous())
