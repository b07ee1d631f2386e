"""What Inductor writes for two resnet blocks on an H100, counted on a machine without one."""

import ast
import re
from collections.abc import Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.meter import as_on_a_gpu
from fastdiff import accelerate
from fastdiff.fused import Ahead
from fastdiff.nn import ResnetBlock

# What network_cost.py compares in its second table, and what it is called there.
NORMS = {
    "fastdiff": "fastdiff's, with its norm",
    "accelerate": "diffusers', by accelerate",
    "PyTorch": "fastdiff's, with PyTorch's norm",
}


class Compiled(NamedTuple):
    """What Inductor makes of a network: its Triton kernels, calls of libraries and of our ops, and how often a whole
    map is read or written, by all but convolutions."""

    triton: int
    calls: int
    passes: int


def passes(source: str, shape: Sequence[int]) -> int:
    """Reads and writes of maps of that shape in the module that Inductor wrote, but for those of convolutions."""
    size, checks = re.escape(str(tuple(shape))), r"(?:assert_size_stride|assert_tensor_metadata)"
    maps = set(re.findall(rf"(?:{checks}\((\w+), |(\w+) = empty_strided_cuda\(){size}", source))
    names = {name for found in maps for name in found}
    for several in re.findall(r"assert_size_stride_grouped\((\(.*\)), \'", source):  # tensors, shapes, strides
        tensors, shapes, _ = ast.parse(several, mode="eval").body.elts
        names |= {t.id for t, s in zip(tensors.elts, ast.literal_eval(shapes), strict=True) if s == tuple(shape)}
    kernels = dict(re.findall(r"^def (triton_\w+)(\(.*?)(?=^\'\'\')", source, re.MULTILINE | re.DOTALL))
    count = 0
    for line in source[source.index("def call(") :].splitlines():
        if reused := re.match(r"\s+(\w+) = (\w+); del \w+ +# reuse", line):
            names |= {reused[1]} if reused[2] in names else set()
        elif launched := re.match(r"\s+(triton_\w+)\.run\((.*), stream", line):
            body = kernels[launched[1]]
            parameters = re.match(r"\((.*?)\)", body)[1].split(", ")  # type: ignore[index]
            for parameter, argument in zip(parameters, launched[2].split(", "), strict=False):
                accesses = len(re.findall(rf"tl\.(?:load|store)\({parameter} ", body))
                count += accesses if argument in names else 0
        elif "fastdiff.group_norm_silu" in line and " = " in line:
            count += 3 if "group_norm_silu_grad" in line else 2
    return count


def block(kind: str) -> nn.Module:
    """A resnet block of 128 channels."""
    if kind in ("accelerate", "diffusers"):
        from diffusers.models.resnet import ResnetBlock2D

        made = ResnetBlock2D(in_channels=128, temb_channels=512, groups=32, eps=1e-6).eval()
        if kind == "accelerate":
            accelerate(made)
        return made
    return ResnetBlock(128, 128, emb_dim=512, groups=32, eps=1e-6, dropout=0.0, scale_shift=False).eval()


def inductor_kernels(kind: str, channels_last: bool, gradient: bool = False) -> Compiled:
    """Of two resnet blocks of 128 channels at 32x32.

    Args:
        kind: "fastdiff", as it samples: with its norm, and the projections of the embedding made ahead. "accelerate":
            diffusers' blocks with that norm, "diffusers": without. "PyTorch": ours with PyTorch's norm, which Inductor
            writes itself. All but the first have each block's own projection.
        gradient: under autocast, with the gradients by all that they take. Those of "fastdiff" have weights that
            TrainingStep cast. Forward and backward are written as one module.
    """
    from torch._inductor.codecache import CacheBase

    from benchmarks.static import inductor

    layout = torch.channels_last if channels_last else torch.contiguous_format
    blocks = [block(kind) for _ in range(2)]
    names = [[name for name, _ in block.named_parameters()] for block in blocks]

    def forward(x: Tensor, emb: Tensor, shift: Tensor, *weights: Tensor) -> Tensor:
        left, of_blocks = iter(weights), (Ahead(shift, None),) if kind == "fastdiff" else emb
        for block, of_block in zip(blocks, names, strict=True):
            x = torch.func.functional_call(block, {name: next(left) for name in of_block}, (x, of_blocks))
        return x

    def step(by_out: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in given]
        with torch.autocast("cpu", torch.bfloat16):
            out = forward(*leaves)
        found = torch.autograd.grad(out, leaves, by_out, allow_unused=True)
        return out, *(by for by in found if by is not None)

    def laid_out(name: str, t: Tensor) -> Tensor:
        as_it_is = gradient and (kind == "diffusers" or "norm" in name) and name != ""
        t = t.detach() if as_it_is else t.detach().bfloat16()
        return t.contiguous(memory_format=layout) if t.ndim == 4 else t

    images, emb, shift = torch.empty(16, 128, 32, 32), torch.empty(16, 512), torch.empty(16, 128)
    weights = [named for block in blocks for named in block.named_parameters()]
    inputs = [laid_out(*named) for named in [("", images), ("", emb), ("", shift), *weights]]
    h100 = {"device": {"name": "NVIDIA H100"}, "version": {}, "hash": "h100"}

    def convolution_format(x: Tensor, weight: Tensor, backend: Any) -> torch.memory_format:
        nhwc = any(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in (x, weight))
        return torch.channels_last if nhwc else torch.contiguous_format

    with (
        as_on_a_gpu("reference" if kind in ("PyTorch", "diffusers") else "triton"),
        mock.patch.object(CacheBase, "get_system", staticmethod(lambda: h100)),
        mock.patch.object(torch._C, "_conv_determine_backend_memory_format", convolution_format),
        torch.set_grad_enabled(gradient),
    ):
        source = inductor.source(step, inputs[0], *inputs) if gradient else inductor.source(forward, *inputs)
    call = source[source.index("def call(") :]
    calls = re.findall(r"(?:extern_kernels\.\w+|torch\.ops\.[\w.]+)\(", call)
    return Compiled(len(re.findall(r"\w+\.run\(", call)), len(calls), passes(source, images.shape))
