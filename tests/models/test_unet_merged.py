"""What the U-Net merges at run time: projections of all blocks, q, k and v, and biases, which the next norm adds."""

import copy

import pytest
import torch
from small_models import RESNET, SMALL
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from fastdiff.nn import Attention, ResnetBlock
from fastdiff.unet import UNet


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small(**changes) -> UNet:
    return UNet(**{**SMALL, **changes}).eval()


class Calls(nn.Linear):
    """A layer that has to be called, as those of LoRA are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(x)


def separate(net: UNet) -> UNet:
    """A copy whose layers are called one by one: a hook on a layer, which does nothing, forbids to merge it."""
    copied = copy.deepcopy(net)
    for module in copied.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(lambda *_: None)
    return copied


MERGED = [{}, {"resnet_time_scale_shift": "scale_shift"}, RESNET, {"num_class_embeds": 3}]


@pytest.mark.parametrize("changes", MERGED, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_merged_layers_are_those_called_one_by_one(changes, layout):
    net = small(**changes).to(memory_format=layout)
    apart, x = separate(net), torch.randn(2, 3, 8, 8).to(memory_format=layout)
    labels = [torch.tensor([0, 2])] if "num_class_embeds" in changes else []
    with torch.no_grad():
        want = apart(x, torch.tensor([3, 700]), *labels)
        torch.testing.assert_close(net(x, torch.tensor([3, 700]), *labels), want, rtol=1e-4, atol=1e-5)
        ahead = net.time_arguments(torch.tensor([3, 700]))
        assert list(ahead) == (["emb"] if labels else ["shifts"])
        torch.testing.assert_close(net(x, None, *labels, **ahead), want, rtol=1e-4, atol=1e-5)
        one = {name: rows[1:] for name, rows in ahead.items()}
        torch.testing.assert_close(net(x, None, *labels, **one), apart(x, 700, *labels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["reference", "triton"])  # as on a GPU, where more is merged
@pytest.mark.parametrize("changes", MERGED[:2], ids=str)
def test_gradients_of_merged_layers(changes, norm, monkeypatch):
    net = small(**changes).double().to(memory_format=torch.channels_last)
    apart, x = separate(net), torch.randn(2, 3, 8, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
    apart(x, torch.tensor([3, 700])).square().sum().backward()
    monkeypatch.setattr("fastdiff.ops.group_norm.backend_of", lambda x: norm)
    with Operators() as seen:
        net(x, torch.tensor([3, 700])).square().sum().backward()
    for (name, got), want in zip(net.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-9, atol=1e-9, msg=name)
        assert not name.endswith("to_k.bias") or not got.grad.any()
        assert not name.endswith("conv_shortcut.weight") or got.grad.stride() == got.stride()  # as DDP wants them
    blocks = sum(isinstance(module, ResnetBlock) for module in net.modules())
    # Of the last of each block, the first and last of all, and those that change sizes; not of shortcuts.
    assert norm == "reference" or seen.biased == blocks + 2 + 2


OWED = [*MERGED[:3], {"mid_block_scale_factor": 2.0, "downsample_padding": 0}]


@pytest.mark.slow
@pytest.mark.parametrize("changes", OWED, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_biases_are_owed_where_the_norm_is_one_kernel(changes, layout):
    """And nothing is concatenated, if channels come last."""
    net, t = small(**changes).to(memory_format=layout), torch.tensor([700])
    for parameter in net.parameters():  # biases that matter, as those of a trained network
        parameter.data.add_(torch.rand_like(parameter), alpha=0.1)
    x = torch.randn(1, 3, 4, 4).to(memory_format=layout)
    with torch.no_grad():
        with fastdiff.backend("reference"):
            want, free = net(x, t), net.time_arguments(t)["shifts"]
        with fastdiff.backend("triton"):
            shifts = net.time_arguments(t)["shifts"]
            with Operators() as seen:
                torch.testing.assert_close(net(x, None, shifts=shifts), want, rtol=1e-4, atol=1e-5)
    assert shifts.shape[1] > free.shape[1] and torch.equal(shifts[:, : free.shape[1]], free)
    assert seen.biased == 1  # of conv_out
    assert ("cat" in seen.names) == (layout == torch.contiguous_format)
    got = net(x, None, shifts=shifts)  # with gradients no memory is used twice
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    got.sum().backward()


@pytest.mark.slow
def test_biases_are_owed_under_autocast():
    net, t = small().to(memory_format=torch.channels_last), torch.tensor([700])
    x = torch.randn(1, 3, 4, 4).to(memory_format=torch.channels_last)
    with torch.no_grad(), fastdiff.backend("triton"):
        ahead, want = net.time_arguments(t), net(x, t)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(net(x, None, **ahead).float(), want, rtol=0.1, atol=0.05)


class Operators(TorchDispatchMode):
    """The names of the operators that run, and how many convolutions have a bias."""

    def __init__(self):
        super().__init__()
        self.names, self.biased = set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(name := function.overloadpacket.__name__)
        self.biased += name == "convolution" and args[2] is not None
        return function(*args, **(kwargs or {}))


def test_nothing_is_owed_where_a_map_may_be_read():
    net, t = small(), torch.tensor([5])
    plain = net.time_arguments(t)["shifts"].shape[1]  # with gradients
    with torch.no_grad(), fastdiff.backend("triton"):
        assert net.time_arguments(t)["shifts"].shape[1] > plain
        net.mid_block.attentions[0].register_forward_hook(lambda *_: None)
        assert net.time_arguments(t)["shifts"].shape[1] == plain


def test_layers_that_have_to_be_called_are_called():
    net, x = small(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        want = net(x, 5)
        for name in ("time_emb_proj", "to_k"):
            changed = copy.deepcopy(net)
            owner = next(m for m in changed.modules() if hasattr(m, name))
            layer = getattr(owner, name)
            other = Calls(layer.in_features, layer.out_features)
            other.load_state_dict(layer.state_dict())
            setattr(owner, name, other)
            expected = separate(changed)(x, 5)
            torch.testing.assert_close(changed(x, 5), expected, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(expected, want, atol=1e-4)
            if name == "time_emb_proj":
                assert list(changed.time_arguments(torch.tensor([5]))) == ["emb"]


class Wrapped(nn.Module):
    """A layer around another, as adapters make them, that has none of its attributes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.9 * self.layer(x)


def wider(conv: nn.Conv2d) -> nn.Conv2d:
    torch.manual_seed(conv.in_channels + conv.out_channels)
    size = conv.kernel_size[0] + 2
    return nn.Conv2d(conv.in_channels, conv.out_channels, size, stride=conv.stride, padding=size // 2)


def dilate(conv: nn.Conv2d) -> None:
    if conv.kernel_size == (3, 3) and conv.stride == (1, 1):
        conv.dilation = conv.padding = (2, 2)


# Kind of layer, and what is done to each: it is changed, or what is returned takes its place.
TREATMENTS = {
    "circular": (nn.Conv2d, lambda layer: setattr(layer, "padding_mode", "circular")),
    "convolves otherwise": (
        nn.Conv2d,
        lambda layer: setattr(layer, "_conv_forward", lambda x, *_, f=layer._conv_forward: 0.9 * f(x, *_)),
    ),
    "dilated": (nn.Conv2d, dilate),
    "wider": (nn.Conv2d, wider),
    "no bias in convolutions": (nn.Conv2d, lambda layer: layer.register_parameter("bias", None)),
    "no bias in maps": (nn.Linear, lambda layer: layer.register_parameter("bias", None)),
    "no bias in norms": (nn.GroupNorm, lambda layer: layer.register_parameter("bias", None)),
    "wrapped convolutions": (nn.Conv2d, Wrapped),
    "wrapped maps": (nn.Linear, Wrapped),
    "wrapped norms": (nn.GroupNorm, Wrapped),
    "hooks": (nn.Module, lambda layer: layer.register_forward_pre_hook(lambda _, given: (0.9 * given[0], *given[1:]))),
    "pruned": (nn.Linear, lambda layer: prune.l1_unstructured(layer, "weight", 0.3) and None),
}


def treated(net: UNet, kind: type[nn.Module], treat) -> UNet:
    made = copy.deepcopy(net)
    for name, layer in [*made.named_modules()]:
        if isinstance(layer, kind) and not list(layer.children()):
            other = treat(layer)
            if isinstance(other, nn.Module) and other is not layer:
                made.set_submodule(name, other)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("treatment", TREATMENTS)
@pytest.mark.parametrize("changes", MERGED[:3], ids=str)
def test_whatever_is_done_to_a_layer_counts(changes, treatment):
    """As where every layer is called, with gradients and without."""
    net, x = small(**changes).to(memory_format=torch.channels_last), torch.randn(2, 3, 8, 8)
    for p in net.parameters():  # norms begin without a bias
        p.data.add_(0.1 * torch.randn_like(p))
    made, apart = (treated(net, *TREATMENTS[treatment]) for _ in range(2))
    t = torch.tensor([3, 700])
    for part in apart.modules():
        if isinstance(part, nn.Linear | nn.Conv2d | nn.GroupNorm):
            part.register_forward_hook(lambda *_: None)
    want = apart(x, t)
    torch.testing.assert_close(made(x, t), want, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(made(x, t), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(made(x, None, **made.time_arguments(t)), want, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(net(x, t), want, rtol=1e-2, atol=1e-3)


def test_weights_of_attention_follow_each_other_in_memory():
    """However the module is moved, copied or filled; and the product reads them where they are."""

    def in_order(layer: Attention) -> bool:
        q, k, v = (p.weight for p in (layer.to_q, layer.to_k, layer.to_v))
        size = q.numel() * q.element_size()
        return v.data_ptr() - k.data_ptr() == k.data_ptr() - q.data_ptr() == size

    layer, x = Attention(8, 4, 2, 1e-5), torch.randn(2, 8, 3, 3)
    other = Attention(8, 4, 2, 1e-5)
    other.load_state_dict(layer.state_dict())
    for made in (layer, copy.deepcopy(layer), copy.deepcopy(layer).double().float(), other):
        assert in_order(made)
        with torch.no_grad():
            torch.testing.assert_close(made(x), layer(x))
            made.to_k.weight.data.mul_(2)
            changed = made(x)
            made.to_k.weight = nn.Parameter(made.to_k.weight.clone())
            assert not in_order(made)
            torch.testing.assert_close(made(x), changed)
            made.to_k.weight.data.div_(2)
        torch.testing.assert_close(made(x), layer(x))


def test_shifts_of_the_wrong_shape():
    net, x = small(), torch.randn(2, 3, 8, 8)
    shifts = net.time_arguments(torch.tensor([5]))["shifts"]
    with pytest.raises(ValueError, match=r"shifts: expected \d+ columns, or \d+ more, got 3"):
        net(x, None, shifts=shifts[:, :3])
    with pytest.raises(ValueError, match=r"shifts: expected shape \(2 or 1, width\), got torch.float32 \(3, "):
        net(x, None, shifts=shifts.expand(3, -1))
    with pytest.raises(ValueError, match="shifts: expected None with emb"):
        net(x, None, emb=net.time_embedding(torch.tensor([5])), shifts=shifts)
