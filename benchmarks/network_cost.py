"""What one forward of a network launches and moves, counted without a GPU: `python benchmarks/network_cost.py`.

Two tables. The first runs networks on tensors without values. These are the 35.7M U-Net of google/ddpm-cifar10-32,
diffusers' of the same configuration, and that of Stable Diffusion 1.5. Then come the transformers DiT-XL/2, Stable
Diffusion 3.5 medium and Flux. It counts the GPU kernels that PyTorch launches, and the bytes that they read and write.
The second counts what Inductor writes for two resnet blocks on an H100, and how often that reads or writes a whole map.

`meter.py` has the rules. `training_cost.py` counts whole steps of training.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.compiled_blocks import NORMS, inductor_kernels
from benchmarks.gpu.networks import STABLE_DIFFUSION, STABLE_DIFFUSION_3, TOKENS, TOKENS_3
from benchmarks.meter import Meter, Row, as_on_a_gpu, row
from benchmarks.networks import cifar10
from fastdiff import accelerate
from fastdiff.cast import Casts
from fastdiff.dit import DiT
from fastdiff.files import write_json
from fastdiff.unet import UNet

CPU = torch.device("cpu")


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
