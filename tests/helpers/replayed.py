"""Networks of diffusers to be replayed, and their calls."""

from typing import Any

import diffusers
import torch
from torch import Tensor, nn

import fastdiff
from fastdiff.graphs import WARM_UP

SMALL = {"sample_size": 4, "block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2}


def unet() -> nn.Module:
    kinds = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return diffusers.UNet2DModel(**SMALL, **kinds, attention_head_dim=4)


def conditional() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        **SMALL,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=4,
        attention_head_dim=2,
    )


def transformer() -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1, norm_num_groups=2,
        sample_size=4, num_embeds_ada_norm=1000,
    )  # fmt: skip


def made(make) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(net: nn.Module, seed: int = 0, batch: int = 2) -> dict[str, Any]:
    given: dict[str, Any] = {"timestep": torch.tensor(10 * seed + 3)}
    if isinstance(net, diffusers.DiTTransformer2DModel):
        given["timestep"] = given["timestep"].expand(batch)
        return given | {"hidden_states": draw(seed, batch, 4, 4, 4), "class_labels": torch.arange(batch)}
    given["sample"] = draw(seed, batch, net.config.in_channels, 4, 4)
    if isinstance(net, diffusers.UNet2DConditionModel):
        given["encoder_hidden_states"] = draw(9 + seed, batch, 3, 4)
    return given


def both(make) -> tuple[nn.Module, nn.Module]:
    """A network with graphs, and an equal one without."""
    net, plain = made(make), made(make)
    fastdiff.accelerate(plain)
    assert "forward" in fastdiff.accelerate(net, graph=True)
    return net, plain


def same(net: nn.Module, plain: nn.Module, calls: int = WARM_UP + 2, **changes: Any) -> None:
    """Equal bits at several calls, with other values each time."""
    for seed in range(calls):
        given = inputs(plain, seed) | changes
        assert torch.equal(net(**given)[0], plain(**given)[0]), seed


def counted() -> Any:
    """A hook of Accelerate, which a machine with a GPU need not have, that counts calls."""
    from accelerate.hooks import ModelHook

    class Counted(ModelHook):
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    return Counted()


class Looking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum().item() > 0 else -self.layer(x)


class Result:
    """A container that PyTorch does not know."""

    def __init__(self, y: Tensor) -> None:
        self.y = y


class Giving(Looking):
    def forward(self, x: Tensor) -> Result:
        return Result(self.layer(x))


class Taking(Looking):
    """Takes its arguments out of a list, as T2I-Adapters' are."""

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        return {"y": self.layer(x.pop()) + x.pop()}
