"""What accelerate makes once for all resnet blocks of a call: rows of the time embedding, and sums of biases."""

import copy
from collections import Counter
from unittest import mock

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from diffusers.models.resnet import ResnetBlock2D
from small_models import TINY, Low, Twice
from torch import nn
from torch.nn.utils import parametrize

import fastdiff
from benchmarks.meter import Meter
from fastdiff.interop.diffusers.layers.ahead import CALL
from fastdiff.support.adjacent import shares_storage

# SiLUs of a call: in the time embedding, before the last convolution, and that which all blocks share.
SILUS = 3


def made(scale_shift: bool = False) -> nn.Module:
    torch.manual_seed(0)
    options = {"resnet_time_scale_shift": "scale_shift" if scale_shift else "default", "add_attention": False}
    net = diffusers.UNet2DModel(**TINY, **options, in_channels=2, out_channels=2)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return net.eval()


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    """(stock, accelerated), to be copied."""
    net = made()
    return net, accelerated(net)


def accelerated(net) -> nn.Module:
    net = copy.deepcopy(net)
    fastdiff.accelerate(net, channels_last=True)
    return net


def output(net, images=2) -> torch.Tensor:
    x = torch.randn(images, 2, 4, 4, generator=torch.Generator().manual_seed(1)).to(next(net.parameters()).dtype)
    return net(x, torch.tensor([3, 700][:images])).sample


def run(net, **options) -> tuple[torch.Tensor, Counter]:
    """(output, kernels), as where the norm is a kernel."""
    with mock.patch("fastdiff.ops.group_norm.backend_of", return_value="triton"), torch.no_grad(), Meter() as counted:
        return output(net, **options), counted.kernels


@pytest.mark.parametrize("scale_shift", [False, True])
def test_one_product_serves_all_blocks(scale_shift):
    """And one sum all biases. Both read the weights of that moment."""
    stock = made(scale_shift)
    ours = accelerated(stock)
    for _ in range(2):
        with torch.no_grad():
            want = output(stock)
        got, kernels = run(ours)
        torch.testing.assert_close(got, want, rtol=4e-6, atol=4e-6)
        products = kernels["addmm"] - sum(b.conv_shortcut is not None for b in blocks(ours))
        assert products == 2 + 1 and kernels["_foreach_add"] == 1  # two of the time embedding itself
        assert kernels["silu"] == SILUS and CALL.get() is None
        with torch.no_grad():
            for net in (stock, ours):
                for p in net.parameters():
                    p.mul_(0.9)
    weights = [block.time_emb_proj.weight for block in blocks(ours)]
    assert all(map(shares_storage, weights)) and not any(map(shares_storage, ours.state_dict().values()))
    assert fastdiff.restore(blocks(ours)[0]) == [""] and [*map(shares_storage, weights)].count(False) == 1


def blocks(net) -> list:
    return [part for part in net.modules() if isinstance(part, ResnetBlock2D)]


def wrap(layer):
    layer.forward = lambda x, forward=layer.forward: 1.5 * forward(x)


TREATMENTS = {
    "a hook": lambda layer: layer.register_forward_hook(lambda m, x, y: 2 * y),
    "a wrapped forward": wrap,
    "a parametrization": lambda layer: parametrize.register_parametrization(layer, "bias", Twice()),
    "no bias": lambda layer: layer.register_parameter("bias", None),
    "offloading": lambda layer: cpu_offload(layer, execution_device=torch.device("cpu")),
    "another layer": None,
}


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_layers_that_are_changed_afterwards_are_called(treatment, pair):
    """One of each kind, each in a block of its own; both changes of a block's SiLU are seen in the count."""
    stock, ours = copy.deepcopy(pair)
    for net in (stock, ours):
        blocks(net)[-1].skip_time_act = True  # and one that takes no SiLU of the embedding
        changed = [block for block in blocks(net) if block.conv_shortcut is not None][:4]
        for block, name in zip(changed, ("time_emb_proj", "conv1", "conv2", "conv_shortcut"), strict=True):
            layer = getattr(block, name)
            if treatment == "another layer":
                setattr(block, name, Low(layer))
            else:
                TREATMENTS[treatment](layer)
    with torch.no_grad():
        want = output(stock)
    got, kernels = run(ours)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert kernels["silu"] == SILUS + 2


def free(block, *_):
    for p in block.parameters():
        p.kept, p.data = p.data, torch.empty(0)


def fetch(block, *_):
    for p in block.parameters():
        p.data = p.kept


def write_embedding(block, given):
    given[2].mul_(1.5)


def test_what_changes_within_a_call_is_seen(pair):
    """An embedding that is written in place. And weights that are there only while their block runs."""
    stock, ours = copy.deepcopy(pair)
    for net in (stock, ours):
        net.up_blocks[1].register_forward_pre_hook(write_embedding)
        free(last := blocks(net)[-1])
        last.register_forward_pre_hook(fetch)
        last.register_forward_hook(free)
    with torch.no_grad():
        want = output(stock)
    torch.testing.assert_close(run(ours)[0], want, rtol=4e-6, atol=4e-6)


def test_what_is_made_ends_with_the_call(pair):
    """A block that is called with another embedding within a call reads that one."""
    stock, ours = pair
    x, rows = torch.ones(2, 4, 4, 4), torch.linspace(-1, 1, 32).reshape(2, 16)
    (block, *_, last), seen = blocks(ours), []
    handle = last.register_forward_pre_hook(lambda *_: seen.append(block(x, rows)))
    run(ours)
    handle.remove()
    with torch.no_grad():
        torch.testing.assert_close(seen, [blocks(stock)[0](x, rows)], rtol=1e-5, atol=1e-5)
    handle = block.register_forward_hook(mock.Mock(side_effect=RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        run(ours)
    handle.remove()
    assert CALL.get() is None
