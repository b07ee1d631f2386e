"""The GroupNorm layers of diffusers' networks that no SiLU is fused with, in one operation."""

from torch import Tensor, nn

from .... import ops
from ....ops.group_norm import is_fused
from ....support.plain import has_plain_parameters, is_patched


class GroupNorm(nn.GroupNorm):
    """torch's layer with the same parameters. `accelerate` turns a layer into one by its class.

    It is called as ever, so hooks on it run. Where there is no kernel, and with parameters of another kind, torch's
    forward runs. A map that is channels last stays so: torch's CUDA kernel would copy it twice.
    """

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias  # a parametrization computes them
        ours = isinstance(self, GroupNorm)  # `restore` may have changed the class since
        plain = weight is not None and bias is not None and has_plain_parameters(self) and not is_patched(nn.GroupNorm)
        if not (ours and plain and is_fused(input)):
            return nn.GroupNorm.forward(self, input)
        return ops.group_norm_silu(input, self.num_groups, weight, bias, self.eps, silu=False)
