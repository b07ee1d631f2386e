"""The resnet block of diffusers (0.42.1) with GroupNorm, scale, shift and SiLU in one operation."""

from typing import Any

import torch
from diffusers.models import resnet
from torch import Tensor, nn

from ....fused import (
    adds_bias,
    bias_for_norm,
    channels_last,
    maps_pixels,
    norm_silu,
    with_shortcut,
    without_bias,
)
from ....ops.group_norm import is_fused
from ....support.plain import as_defined, is_plain
from ...together import saved_apart
from .ahead import ahead_of, rows_and_biases
from .modulated import wrapped

STOCK_FORWARD = as_defined(resnet.ResnetBlock2D, "forward")


@saved_apart
class ResnetBlock2D(resnet.ResnetBlock2D):
    """diffusers' block with the same parameters and arithmetic. `accelerate` turns a block into one by its class.

    It does not call its norms and its activation. If they are no longer plain layers, stock's forward runs.
    """

    @staticmethod
    def misfit(module: Any) -> str | None:
        """Why a block cannot be fused, or None."""
        if (reason := wrapped(module)) is not None:
            return reason
        if type(module.nonlinearity) is not nn.SiLU:
            return f"its activation is {type(module.nonlinearity).__name__}, not SiLU"
        if not is_plain(module.nonlinearity, nn.SiLU):
            return "its activation has hooks"
        if module.time_emb_proj is not None and module.time_embedding_norm not in ("default", "scale_shift"):
            return f"its time embedding enters by {module.time_embedding_norm!r}"
        for norm in (module.norm1, module.norm2):
            if type(norm) is not nn.GroupNorm:
                return f"its norm is {type(norm).__name__}, not GroupNorm"
            if not norm.affine:
                return "its norm has no weight"
            if not is_plain(norm, nn.GroupNorm):
                return "its norm has hooks or parameters of another kind"
        return None

    def forward(
        self, input_tensor: Tensor, temb: Tensor | None, *args: Any, skip: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """skip: further channels of the input."""
        # Another class: `restore` has changed it since, but somebody holds this method.
        fuses = isinstance(self, ResnetBlock2D) and self._fuses(input_tensor, temb)
        if skip is not None and not (fuses and self._takes_halves(input_tensor, skip)):
            input_tensor, skip = torch.cat([input_tensor, skip], dim=1), None
        if not fuses:
            return resnet.ResnetBlock2D.forward(self, input_tensor, temb, *args, **kwargs)
        x, h = input_tensor, norm_silu(self.norm1, input_tensor, skip=skip)
        resample = self.upsample or self.downsample
        if resample is not None:
            x, h = resample(x), resample(h)
        scale = shift = add = bias = None
        if (ahead := ahead_of(self, temb, rows_and_biases)) is not None:
            add, bias = ahead
        elif temb is not None:
            add = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        if add is not None and self.time_embedding_norm == "scale_shift":
            scale, shift = add.expand(len(h), -1).chunk(2, dim=1)
            add = None
        if ahead is None or add is None:
            h, add = bias_for_norm(self.conv1, h, add)
        else:
            h = without_bias(self.conv1, h)  # the bias is in add
        h = self.dropout(norm_silu(self.norm2, h, scale, shift, add))
        if self.conv_shortcut is not None and self.training and torch.is_grad_enabled():
            x = x.contiguous()  # as stock: else the strides of DDP's gradients differ
        out = with_shortcut(self.conv_shortcut, x, self.conv2, h, bias, skip)
        return out if self.output_scale_factor == 1 else out / self.output_scale_factor

    def projections(self) -> list[list[Any]]:
        """Those of the time embedding; see fastdiff/interop/together.py, and the networks, which lay them together."""
        return [] if self.time_emb_proj is None else [[self.time_emb_proj]]

    def _takes_halves(self, x: Tensor, skip: Tensor) -> bool:
        """Whether x and further channels of it are read where they lie, by the norm and by the shortcut."""
        mapped = self.conv_shortcut is not None and maps_pixels(self.conv_shortcut) and adds_bias(self.conv2)
        bare = self.upsample is self.downsample is None and not torch.is_grad_enabled()
        return mapped and bare and x.dtype == skip.dtype and channels_last(x, skip) and is_fused(x)

    def _fuses(self, x: Tensor, temb: Tensor | None) -> bool:
        """Whether the layers that are not called, and stock's forward, are as diffusers made them, and stock takes the
        embedding as one row for each image or for all."""
        if temb is None or self.time_emb_proj is None:
            takes = temb is self.time_emb_proj is None and self.time_embedding_norm != "scale_shift"
        else:
            takes = temb.ndim == 2 and temb.shape[0] in (1, x.shape[0])
        norms = all(
            is_plain(n, nn.GroupNorm) and n.weight is not None and n.bias is not None for n in (self.norm1, self.norm2)
        )
        unpatched = resnet.ResnetBlock2D.forward is STOCK_FORWARD
        return takes and norms and is_plain(self.nonlinearity, nn.SiLU) and unpatched
