"""What one forward of a network launches and moves, counted without a GPU: `python benchmarks/network_cost.py`.

Two tables. The first runs networks on tensors without values. These are the 35.7M U-Net of google/ddpm-cifar10-32,
diffusers' of the same configuration, and that of Stable Diffusion 1.5. Then come the transformers DiT-XL/2, Stable
Diffusion 3.5 medium and Flux. It counts the GPU kernels that PyTorch launches, and the bytes that they read and write.
The second counts what Inductor writes for two resnet blocks on an H100, and how often that reads or writes a whole map.

`meter.py` has the rules. `training_cost.py` counts whole steps of training.
"""

import argparse
import ast
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu.networks import STABLE_DIFFUSION, STABLE_DIFFUSION_3, TOKENS, TOKENS_3
from benchmarks.meter import Meter, Row, as_on_a_gpu, row
from benchmarks.networks import cifar10
from fastdiff import accelerate
from fastdiff.cast import Casts
from fastdiff.dit import DiT
from fastdiff.files import write_json
from fastdiff.fused import Ahead
from fastdiff.nn import ResnetBlock
from fastdiff.unet import UNet

CPU = torch.device("cpu")
# What the second table compares, and what it is called there.
NORMS = {
    "fastdiff": "fastdiff's, with its norm",
    "accelerate": "diffusers', by accelerate",
    "PyTorch": "fastdiff's, with PyTorch's norm",
}


def stock() -> nn.Module:
    """diffusers' U-Net of the same configuration."""
    import diffusers

    made: nn.Module = diffusers.UNet2DModel(**cifar10(CPU).config)
    return made


def in_bfloat16(make: Callable[[], nn.Module]) -> nn.Module:
    """A network that is made with bfloat16 weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return make()
    finally:
        torch.set_default_dtype(before)


def conditional(**config: Any) -> nn.Module:
    """diffusers' U-Net of Stable Diffusion 1.5, or of another configuration, with bfloat16 weights."""
    import diffusers

    return in_bfloat16(lambda: diffusers.UNet2DConditionModel(**(config or STABLE_DIFFUSION)))


def accelerated(**config: Any) -> nn.Module:
    """The same by `accelerate`, as on a GPU."""
    made = conditional(**config)
    accelerate(made, channels_last=True)
    return made


def count(
    name: str, make: Callable[[], nn.Module], batch: int, *, sampled: bool = False, half: bool = False,
    autocast: bool = False, size: tuple[int, ...] = (3, 32, 32), text: int | None = None, labels: bool = False,
) -> Row:  # fmt: skip
    """One forward, float32 unless `half` (bfloat16 weights) or `autocast` (to bfloat16).

    Args:
        sampled: as Diffusion.sample calls it: with dtype=torch.bfloat16, and what depends on time alone ahead.
        size: of an image.
        text: the width of the states of a text, if the network takes one.
        labels: whether it takes a class.
    """
    with as_on_a_gpu(), FakeTensorMode(), torch.no_grad():
        net: nn.Module = make().eval()
        arguments: dict[str, Tensor] = {}
        t = torch.zeros(batch, dtype=torch.int64, device="cpu")
        if sampled:
            ahead = cast(UNet, net).time_arguments(t[:1])
            arguments = {name: rows.bfloat16() for name, rows in ahead.items()}
            net = Casts().get(net, torch.bfloat16)
        net = net.to(torch.bfloat16) if half else net
        dtype = next(net.parameters()).dtype
        x = torch.empty(batch, *size, dtype=dtype, device="cpu")
        if text is not None:
            arguments["encoder_hidden_states"] = torch.empty(batch, TOKENS, text, dtype=dtype, device="cpu")
        if labels:
            arguments["class_labels"] = torch.zeros(batch, dtype=torch.int64, device="cpu")
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Meter() as counter:
            net(x, t, **arguments)
    return row(name, batch, counter)


def rows(batches: Sequence[int] = (1, 256)) -> list[Row]:
    """The first table."""
    fastdiff: Callable[[], nn.Module] = lambda: cifar10(CPU)  # noqa: E731
    made = []
    for batch in batches:
        made += [
            count("fastdiff, sample(dtype=bfloat16)", fastdiff, batch, sampled=True),
            count("fastdiff, bfloat16 weights", fastdiff, batch, half=True),
            count("fastdiff, float32", fastdiff, batch),
            count("fastdiff, autocast", fastdiff, batch, autocast=True),
            count("diffusers, bfloat16 weights", stock, batch, half=True),
            count("diffusers, float32", stock, batch),
            count("diffusers, autocast", stock, batch, autocast=True),
        ]
    return made


def stable_diffusion_rows() -> list[Row]:
    """Those of one image with guidance, which is a batch of two."""
    networks = {"accelerate": accelerated, "diffusers": conditional}
    size, text = (4, 64, 64), STABLE_DIFFUSION["cross_attention_dim"]
    return [count(f"Stable Diffusion 1.5, {name}", make, 2, size=size, text=text) for name, make in networks.items()]


def transformer_rows(**config: Any) -> list[Row]:
    """Those of DiT-XL/2, or of another configuration, for two images of 256x256 pixels, with bfloat16 weights."""
    import diffusers

    options: dict[str, Any] = {"size": (4, 32, 32), "labels": True}
    made = [count("DiT-XL/2, fastdiff, sample(dtype=bfloat16)", partial(DiT, **config), 2, sampled=True, **options)]
    for name, network in (("fastdiff", DiT), ("diffusers", diffusers.DiTTransformer2DModel)):
        made.append(count(f"DiT-XL/2, {name}", partial(in_bfloat16, partial(network, **config)), 2, **options))
    return made


def before_and_after(name: str, batch: int, net: nn.Module, given: dict[str, Any]) -> list[Row]:
    """A network of diffusers, stock and accelerated, called with `given`."""
    made = []
    for by in ("diffusers", "accelerate"):
        if by == "accelerate":
            accelerate(net)
        with Meter() as counter:
            net(**given)
        made.append(row(f"{name}, {by}", batch, counter))
    return made


def text_to_image_rows() -> list[Row]:
    """Those of the transformers of Stable Diffusion 3.5 medium, with guidance, and of Flux.

    For an image of 1024x1024 pixels, with bfloat16 weights.
    """
    import diffusers

    with as_on_a_gpu(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        numbers = partial(torch.zeros, dtype=torch.bfloat16, device="cpu")
        net = in_bfloat16(lambda: diffusers.SD3Transformer2DModel(**STABLE_DIFFUSION_3)).eval()
        image = {"hidden_states": numbers(2, 16, 128, 128), "timestep": numbers(2)}
        text = {"encoder_hidden_states": numbers(2, TOKENS_3, 4096), "pooled_projections": numbers(2, 2048)}
        made = before_and_after("Stable Diffusion 3.5 medium", 2, net, image | text)
        net = in_bfloat16(lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True)).eval()
        image = {"hidden_states": numbers(1, 4096, 64), "timestep": numbers(1), "guidance": numbers(1)}
        text = {"encoder_hidden_states": numbers(1, 512, 4096), "pooled_projections": numbers(1, 768)}
        places = {"img_ids": numbers(4096, 3), "txt_ids": numbers(512, 3)}
        return made + before_and_after("Flux", 1, net, image | text | places)


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
            count += 2
    return count


def block(kind: str) -> nn.Module:
    """A resnet block of 128 channels."""
    if kind == "accelerate":
        from diffusers.models.resnet import ResnetBlock2D

        made = ResnetBlock2D(in_channels=128, temb_channels=512, groups=32, eps=1e-6).eval()
        accelerate(made)
        return made
    return ResnetBlock(128, 128, emb_dim=512, groups=32, eps=1e-6, dropout=0.0, scale_shift=False).eval()


def inductor_kernels(kind: str, channels_last: bool) -> Compiled:
    """Of two resnet blocks of 128 channels at 32x32.

    Args:
        kind: "fastdiff", as it samples: with its norm, and the projections of the embedding made ahead. "accelerate":
            diffusers' blocks with that norm. "PyTorch": with PyTorch's norm, which Inductor writes itself. The latter
            two have each block's own projection.
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

    def laid_out(t: Tensor) -> Tensor:
        t = t.detach().bfloat16()
        return t.contiguous(memory_format=layout) if t.ndim == 4 else t

    images, emb, shift = torch.empty(16, 128, 32, 32), torch.empty(16, 512), torch.empty(16, 128)
    inputs = (images, emb, shift, *(p for block in blocks for p in block.parameters()))
    h100 = {"device": {"name": "NVIDIA H100"}, "version": {}, "hash": "h100"}

    def convolution_format(x: Tensor, weight: Tensor, backend: Any) -> torch.memory_format:
        nhwc = any(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in (x, weight))
        return torch.channels_last if nhwc else torch.contiguous_format

    with (
        mock.patch("fastdiff.ops.group_norm.backend_of", return_value="reference" if kind == "PyTorch" else "triton"),
        mock.patch.object(CacheBase, "get_system", staticmethod(lambda: h100)),
        mock.patch.object(torch._C, "_conv_determine_backend_memory_format", convolution_format),
        torch.no_grad(),
    ):
        source = inductor.source(forward, *(laid_out(t) for t in inputs))
    call = source[source.index("def call(") :]
    calls = re.findall(r"(?:extern_kernels\.\w+|torch\.ops\.[\w.]+)\(", call)
    return Compiled(len(re.findall(r"\w+\.run\(", call)), len(calls), passes(source, images.shape))


def main(argv: Sequence[str] | None = None) -> int:
    """Print both tables; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE too")
    args = parser.parse_args(argv)
    counted = rows() + stable_diffusion_rows() + transformer_rows() + text_to_image_rows()
    print("| network | batch | kernels | MB an image |\n|---|---:|---:|---:|")
    for one in counted:
        print(f"| {one.network} | {one.batch} | {one.kernels} | {one.megabytes_per_image:.1f} |")
    blocks = []
    print("\n| two resnet blocks, compiled | layout | Triton kernels | calls | passes |\n|---|---|---:|---:|---:|")
    for kind in NORMS:
        for channels_last in (True, False):
            made = inductor_kernels(kind, channels_last)
            layout = "channels_last" if channels_last else "NCHW"
            blocks.append({"norm": kind, "layout": layout} | made._asdict())
            print(f"| {NORMS[kind]} | {layout} | {made.triton} | {made.calls} | {made.passes} |")
    if args.json:
        write_json(args.json, {"forward": [one._asdict() for one in counted], "compiled": blocks})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
