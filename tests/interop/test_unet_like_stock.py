"""What other tools do to the layers of a U-Net: ours and that of diffusers give the same, with the same weights."""

from collections.abc import Iterator

import pytest
import torch
from accelerate import cpu_offload
from diffusers import UNet2DModel
from small_models import SMALL, Low, Twice
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize, prune

import fastdiff
from fastdiff import UNet


def each(net: nn.Module, kind: type) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, child) of every layer of the kind."""
    return [(m, name, c) for m in net.modules() for name, c in m.named_children() if type(c) is kind]


def wrapped(kind: type):
    def treat(net: nn.Module) -> None:
        for parent, name, child in each(net, kind):
            setattr(parent, name, Low(child))

    return treat


def hooked(kind: type):
    def treat(net: nn.Module) -> None:
        for _, _, child in each(net, kind):
            child.register_forward_hook(lambda m, x, y: 1.5 * y)

    return treat


def pruned(net: nn.Module) -> None:
    for kind in (nn.GroupNorm, nn.Linear):
        for _, _, child in each(net, kind):
            mask = torch.arange(child.weight.numel()).reshape(child.weight.shape) % 2
            prune.custom_from_mask(child, "weight", mask)


def parametrized(net: nn.Module) -> None:
    for kind in (nn.GroupNorm, nn.Linear):
        for _, _, child in each(net, kind):
            parametrize.register_parametrization(child, "weight", Twice())


@pytest.fixture
def process_group() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


TREATMENTS = {
    "offloading": lambda net: cpu_offload(net, execution_device=torch.device("cpu")),
    "hooks on norms": hooked(nn.GroupNorm),
    "hooks on linear layers": hooked(nn.Linear),
    "wrapped norms": wrapped(nn.GroupNorm),
    "wrapped linear layers": wrapped(nn.Linear),
    "pruning": pruned,
    "parametrizations": parametrized,
}


@pytest.mark.parametrize("scale_shift", ["default", "scale_shift"])
@pytest.mark.parametrize("treatment", TREATMENTS)
def test_treated_layers(treatment: str, scale_shift: str) -> None:
    torch.manual_seed(0)
    theirs = UNet2DModel(**SMALL, resnet_time_scale_shift=scale_shift).eval()
    ours = UNet(**SMALL, resnet_time_scale_shift=scale_shift).eval()
    ours.load_state_dict(theirs.state_dict())
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        plain = ours(x, t)
        for net in (theirs, ours):
            TREATMENTS[treatment](net)
        want, got = theirs(x, t).sample, ours(x, t)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert treatment == "offloading" or not torch.allclose(plain, want, atol=1e-3)


def test_dynamic_quantization_of_linear_layers() -> None:
    """Their weight is a method. The result is near that of float32."""
    torch.manual_seed(0)
    net = UNet(**SMALL).eval()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    want = net(x, t).detach()
    quantized = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    got = quantized(x, t).detach()
    assert not torch.equal(got, want)
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("kind", [UNet, UNet2DModel])
def test_layers_that_are_sharded_alone(kind: type) -> None:
    """FSDP2 on each layer: its parameters are whole only while the layer is called. Ours, and an accelerated one."""
    torch.manual_seed(0)
    net = kind(**SMALL).eval()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    fastdiff.accelerate(net)
    with torch.no_grad():
        want = net(x, t)
        for layer in (m for m in net.modules() if isinstance(m, (nn.GroupNorm, nn.Linear, nn.Conv2d))):
            fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        got = net(x, t)
    want, got = (y if isinstance(y, torch.Tensor) else y.sample for y in (want, got))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
