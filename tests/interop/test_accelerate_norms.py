"""The norms that accelerate fuses without a SiLU: at the entry of transformers and in attention, with the kernel."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from strategies import DEVICE
from torch import nn
from torch.nn.utils import parametrize, prune

import fastdiff


def attention() -> nn.Module:
    """As in the middle of an autoencoder."""
    torch.manual_seed(0)
    net = Attention(query_dim=4, heads=2, dim_head=2, norm_num_groups=2, residual_connection=True, bias=True)
    return random_norm(net.eval(), "group_norm")


def transformer() -> nn.Module:
    torch.manual_seed(0)
    net = Transformer2DModel(2, 2, in_channels=4, norm_num_groups=2, cross_attention_dim=4)
    return random_norm(net.eval(), "norm")


def random_norm(net, name) -> nn.Module:
    nn.init.normal_(getattr(net, name).weight)
    nn.init.normal_(getattr(net, name).bias)
    return net.to(DEVICE)


NETWORKS = {"group_norm": attention, "norm": transformer}
# What else of the network is replaced, before and after the norm.
ITSELF = {"group_norm": [], "norm": [""]}
LAYERS = {
    "group_norm": [],
    "norm": [f"transformer_blocks.0{name}" for name in ("", ".attn1", ".attn2", ".ff.net.0")],
}


def output(net, layout=torch.contiguous_format) -> torch.Tensor:
    x = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(1)).to(DEVICE, memory_format=layout)
    with torch.no_grad():
        if isinstance(net, Transformer2DModel):
            return net(x, encoder_hidden_states=x[:, :, :, 0].transpose(1, 2)).sample
        return net(x)


@pytest.fixture
def launches(monkeypatch) -> list[dict]:
    """What the norm's kernel was launched with; every norm runs it."""
    launched: list[dict] = []
    launchers = fastdiff.ops.dispatch.launchers("triton")
    launch = launchers.norm
    monkeypatch.setattr(launchers, "norm", lambda **operands: launched.append(operands) or launch(**operands))
    with fastdiff.backend("triton"):
        yield launched


class Doubled(nn.GroupNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class Scaled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Foreign(torch.Tensor):
    """A tensor of another class, as DTensor and quantized weights are."""


def foreign(norm):
    norm.weight = nn.Parameter(norm.weight.detach().as_subclass(Foreign))


# What is done to a norm; launches of the kernel if accelerate came before it, and what accelerate says if after.
TREATMENTS = {
    "nothing": (lambda norm: None, 1, None),
    "a forward hook": (lambda norm: norm.register_forward_hook(lambda m, x, y: 2 * y), 1, None),
    "a pre-hook": (lambda norm: norm.register_forward_pre_hook(lambda m, x: (x[0].flip(1),)), 1, None),
    "pruning": (lambda norm: prune.random_unstructured(norm, "weight", amount=0.5), 1, None),
    "a parametrization": (
        lambda norm: parametrize.register_parametrization(norm, "weight", Scaled()),
        1,
        "ParametrizedGroupNorm is a subclass of GroupNorm",
    ),
    "offloading": (
        lambda norm: cpu_offload(norm, execution_device=torch.device(DEVICE)),
        1,
        "its forward is wrapped, as offloading does",
    ),
    "a subclass": (lambda norm: setattr(norm, "__class__", Doubled), 0, "Doubled is a subclass of GroupNorm"),
    "foreign tensors": (foreign, 0, "it has parameters of another kind"),
    "no bias": (lambda norm: norm.register_parameter("bias", None), 0, "it has no weight or no bias"),
}


@pytest.mark.parametrize("treatment", TREATMENTS)
@pytest.mark.filterwarnings("ignore:accelerate left:UserWarning")
def test_the_results_of_stock_whatever_is_done_to_a_norm(treatment, launches):
    """Before or after it is fused, and when it is restored."""
    treat, fused, said = TREATMENTS[treatment]
    for name, make in NETWORKS.items():
        stock, before, after = make(), make(), make()
        assert fastdiff.accelerate(after) == [*ITSELF[name], name, *LAYERS[name]]
        for net in (stock, before, after):
            torch.manual_seed(2)
            treat(getattr(net, name))
        done = fastdiff.accelerate(before)
        assert done == [*ITSELF[name], *([name] if said is None else []), *LAYERS[name]]
        assert done.left == ({} if said is None else {name: said})
        want = output(stock)
        assert not launches
        for net, count in ((before, said is None), (after, fused)):
            torch.testing.assert_close(output(net), want, rtol=1e-4, atol=1e-5)
            assert len(launches) == count
            launches.clear()
        fastdiff.restore(after)
        if treatment != "a parametrization":  # it has a class of its own, of the one that it found
            assert torch.equal(output(after), want) and not launches


@pytest.mark.parametrize("name", NETWORKS)
def test_maps_that_are_channels_last_stay_so(name, launches):
    net = NETWORKS[name]()
    want = output(net)
    fastdiff.accelerate(net)
    torch.testing.assert_close(output(net, torch.channels_last), want, rtol=1e-4, atol=1e-5)
    (launched,) = launches
    assert launched["x"].stride(1) == launched["out"].stride(1) == 1 and launched["silu"] is False


def test_offloading_that_ends_after_restore_leaves_stock(launches):
    net = attention()
    want = output(net)
    fastdiff.accelerate(net)
    cpu_offload(net.group_norm, execution_device=torch.device(DEVICE))
    assert fastdiff.restore(net) == ["group_norm"]
    remove_hook_from_module(net, recurse=True)
    assert torch.equal(output(net), want) and not launches and type(net.group_norm) is nn.GroupNorm


class Mine(AttnProcessor):
    """A user's, though it is made of one of diffusers."""

    def __call__(self, attn, hidden_states, **kwargs):
        return attn.group_norm(hidden_states)


def test_attention_with_a_processor_of_the_user_is_left(launches):
    net = attention()
    net.set_processor(Mine())
    want = output(net)
    with pytest.warns(UserWarning, match="accelerate left 1 part as it is"):
        done = fastdiff.accelerate(net)
    assert done == [] and done.left == {"group_norm": "its attention has a processor of its own, Mine"}
    assert torch.equal(output(net), want) and not launches


def test_a_processor_that_is_set_later_calls_the_norm(launches):
    net = attention()
    fastdiff.accelerate(net)
    net.set_processor(Mine())
    stock = attention()
    torch.testing.assert_close(output(net), output(stock.group_norm), rtol=1e-4, atol=1e-5)
    assert len(launches) == 1


def test_copies_and_pickles_stay_fused(launches):
    net = attention()
    want = output(net)
    fastdiff.accelerate(net)
    twin = copy.deepcopy(net)
    torch.testing.assert_close(output(twin), want, rtol=1e-4, atol=1e-5)
    assert fastdiff.restore(twin) == ["group_norm"] and len(launches) == 1
