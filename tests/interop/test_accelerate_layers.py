"""What accelerate makes of the layers around a norm: biases that a later pass adds, and transformers on pixels."""

import copy
import functools

import pytest
import torch
from accelerate import cpu_offload
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from small_models import Low, Twice
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize

import fastdiff
from benchmarks.meter import Meter, as_on_a_gpu
from fastdiff.support.plain import METHODS, as_defined

LAST = torch.channels_last


def block(channels=4, **options) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"in_channels": channels, "out_channels": 6, "temb_channels": 8, "groups": 2}
    return shaken(ResnetBlock2D(**sizes | options))


def transformer(linear=False, channels=4) -> nn.Module:
    torch.manual_seed(0)
    return shaken(
        Transformer2DModel(
            2, 3, in_channels=channels, norm_num_groups=2, cross_attention_dim=channels, use_linear_projection=linear
        )
    )


def shaken(net) -> nn.Module:
    """With norms that are not the identity, and biases that are not zero."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return net.eval()


def image(channels=4, size=6, dtype=torch.float32) -> torch.Tensor:
    x = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))
    return x.to(dtype, memory_format=LAST)


def arguments(net, x) -> tuple:
    """Of a call of the network with that image."""
    if isinstance(net, Transformer2DModel):
        return x, x[:, :, :, 0].transpose(1, 2)
    return x, None if net.time_emb_proj is None else torch.linspace(-1, 1, 16, dtype=x.dtype).reshape(2, 8)


def called(net, *arguments) -> torch.Tensor:
    out = net(*arguments)
    return out.sample if isinstance(net, Transformer2DModel) else out


def output(net, x) -> torch.Tensor:
    return called(net, *arguments(net, x))


def as_counted(net) -> Meter:
    """The kernels of a call on a GPU."""
    inputs = arguments(net, image())
    with as_on_a_gpu(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), Meter() as counted:
        called(net, *inputs)
    return counted


# GPU kernels of a block in inference, channels last: two convolutions, two norms, the sum, and what is named.
KINDS = {
    "a time embedding": ({}, 5 + 3 + 2),  # its SiLU, projection and sum with a bias; a product for the shortcut
    "scale and shift": ({"time_embedding_norm": "scale_shift"}, 5 + 2 + 2),  # a bias is the norm's as it is
    "no time embedding": ({"temb_channels": None}, 5 + 2),
    "a scale": ({"temb_channels": None, "output_scale_factor": 2.0}, 5 + 2 + 1),
    "no shortcut": ({"temb_channels": None, "out_channels": 4}, 5 + 1),  # the last bias
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_bias_takes_a_pass_of_its_own(kind):
    options, kernels = KINDS[kind]
    net = block(**options)
    stock = copy.deepcopy(net)
    fastdiff.accelerate(net)
    with torch.no_grad():
        torch.testing.assert_close(output(net, image()), output(stock, image()), rtol=1e-4, atol=1e-5)
    counted = as_counted(net)
    assert sum(counted.kernels.values()) == kernels


def test_a_transformer_on_maps_that_are_channels_last_copies_none():
    net = transformer()
    fastdiff.accelerate(net)
    counted = as_counted(net)
    assert counted.kernels["group_norm_silu"] == 1 and not {"convolution", "clone"} & counted.kernels.keys()


def wrap(net, name):
    layer = getattr(net, name)
    layer.forward = lambda x, forward=layer.forward: 1.5 * forward(x)


# What people do to the layers of a network, each with an effect that is seen only if the layer is called.
TREATMENTS = {
    "a hook": lambda net, name: getattr(net, name).register_forward_hook(lambda m, x, y: 2 * y),
    "a pre-hook": lambda net, name: getattr(net, name).register_forward_pre_hook(lambda m, x: (x[0].flip(1),)),
    "a wrapped forward": wrap,
    "another layer": lambda net, name: setattr(net, name, Low(getattr(net, name))),
    "a parametrization": lambda net, name: parametrize.register_parametrization(getattr(net, name), "bias", Twice()),
    "no bias": lambda net, name: getattr(net, name).register_parameter("bias", None),
    "offloading": lambda net, name: cpu_offload(getattr(net, name), execution_device=torch.device("cpu")),
}
LAYERS = [(block, name) for name in ("conv1", "conv2", "conv_shortcut")]
LAYERS += [(transformer, name) for name in ("proj_in", "proj_out")]


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_layers_that_are_changed_afterwards_are_called(treatment):
    """As in stock, also those whose weights are read otherwise."""
    x = image()
    for make, name in LAYERS:
        stock, ours = make(), make()
        fastdiff.accelerate(ours)
        with torch.no_grad():
            plain = output(ours, x)
            for net in (stock, ours):
                TREATMENTS[treatment](net, name)
            want = output(stock, x)
            torch.testing.assert_close(output(ours, x), want, rtol=1e-4, atol=1e-5)
        assert treatment == "offloading" or not torch.allclose(plain, want, atol=1e-3)


# Methods that tools patch for all objects of a class; how the patched one differs is seen only if it is called.
PATCHED = [
    (block, ResnetBlock2D, "forward"),
    (block, nn.GroupNorm, "forward"),
    (block, nn.Conv2d, "forward"),
    (block, nn.Conv2d, "_conv_forward"),
    (block, nn.SiLU, "forward"),
    (transformer, nn.GroupNorm, "forward"),
    (transformer, nn.Conv2d, "forward"),
    (transformer, Transformer2DModel, "_operate_on_continuous_inputs"),
    (transformer, Transformer2DModel, "_get_output_for_continuous_inputs"),
]


@pytest.mark.parametrize(("make", "kind", "method"), PATCHED)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_patched_methods_of_a_class_are_called(make, kind, method, backend, monkeypatch):
    stock, ours, x, original = make(), make(), image(), getattr(kind, method)
    fastdiff.accelerate(ours)

    def patched(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        return (1.5 * out[0], *out[1:]) if isinstance(out, tuple) else 1.5 * out

    with torch.no_grad(), fastdiff.backend(backend):
        plain = output(ours, x)
        monkeypatch.setattr(kind, method, patched)
        want = output(stock, x)
        torch.testing.assert_close(output(ours, x), want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, want, atol=1e-3)


def test_what_was_patched_before_is_known_as_such(monkeypatch):
    """It is not taken for the method that a fused one stands for."""
    for kind, methods in METHODS.items():
        assert all(method is getattr(kind, name) for name, method in methods)
    forward = ResnetBlock2D.forward
    assert as_defined(ResnetBlock2D, "forward") is forward
    for patch in (lambda self, x: x, functools.wraps(forward)(lambda self, x: x)):
        monkeypatch.setattr(ResnetBlock2D, "forward", patch)
        assert as_defined(ResnetBlock2D, "forward") is None


@pytest.mark.parametrize(("make", "kind"), [(block, ResnetBlock2D), (transformer, nn.GroupNorm)])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_wrapper_that_holds_a_fused_forward_calls_stocks_after_restore(make, kind, backend):
    net, x = make(), image()
    with torch.no_grad(), fastdiff.backend(backend):
        want = output(net, x)
        fastdiff.accelerate(net)
        for module in net.modules():
            if isinstance(module, kind):
                module.forward = lambda *args, forward=module.forward: forward(*args)
        fastdiff.restore(net)
        assert torch.equal(output(net, x), want)


@pytest.mark.parametrize("norm", ["default", "scale_shift"])
def test_embeddings_of_any_shape_that_stock_takes(norm):
    """One row for several images, or several for one; and stock's error where there is none."""
    stock = block(time_embedding_norm=norm)
    ours = copy.deepcopy(stock)
    fastdiff.accelerate(ours)
    with torch.no_grad(), fastdiff.backend("triton"):
        for images, rows in ((2, 1), (1, 2)):
            x, temb = image()[:images], torch.linspace(-1, 1, 8 * rows).reshape(rows, 8)
            torch.testing.assert_close(ours(x, temb), stock(x, temb), rtol=1e-4, atol=1e-5)
        with pytest.raises(TypeError, match="silu"):
            ours(image(), None)


def test_tiling_by_circular_padding():
    """Which is set as an attribute of convolutions that are there."""
    stock, ours = block(), block()
    fastdiff.accelerate(ours)
    for net in (stock, ours):
        for conv in (net.conv1, net.conv2):
            conv.padding_mode, conv._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]
    with torch.no_grad():
        torch.testing.assert_close(output(ours, image()), output(stock, image()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_the_exact_result_as_stock(dtype):
    """A block rounds less often. A transformer rounds as often, on a CPU, sums that were taken in another order."""
    for stock, more in ((block(16, out_channels=32), 1.0), (transformer(channels=16), 1.01)):
        nn.Module.to(stock, dtype)
        exact, ours, x = copy.deepcopy(stock).double(), copy.deepcopy(stock), image(16, 8, dtype)
        fastdiff.accelerate(ours)
        with torch.no_grad():
            want = output(exact, x.double())
            of_stock, of_ours = ((output(net, x).double() - want).square().mean() for net in (stock, ours))
        assert of_ours <= more * of_stock


@pytest.mark.parametrize("linear", [False, True])
def test_transformers_keep_maps_channels_last(linear):
    """And gradients; stock returns other strides, which every later operation would take over."""
    stock, ours = transformer(linear), transformer(linear)
    layers = [f"transformer_blocks.0{name}" for name in ("", ".attn1", ".attn2", ".ff.net.0")]
    assert fastdiff.accelerate(ours, channels_last=False) == ["", "norm", *layers]
    x = image().requires_grad_()
    results = []
    for net in (stock, ours):
        y = output(net, x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *net.parameters()])])
    assert results[1][0].is_contiguous(memory_format=LAST) and not results[0][0].is_contiguous(memory_format=LAST)
    for got, want in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_the_layout_of_pointwise_convolutions():
    """It is in the strides alone; theirs decide that of the output."""
    net = block()
    before = net.conv_shortcut.weight.stride()
    fastdiff.accelerate(net, channels_last=True)
    assert net.conv_shortcut.weight.stride() == (4, 1, 4, 4) != before
    assert net.conv_shortcut(image().contiguous()).is_contiguous(memory_format=LAST)
    fastdiff.restore(net)
    assert net.conv_shortcut.weight.stride() == before


def test_the_weights_of_adapters_keep_their_layout():
    """PEFT reads them as matrices by view: DoRA's call fails if they are channels last."""
    net = block()
    net.conv1 = Low(net.conv1)
    net.conv1.lora_A = nn.ModuleDict({"default": nn.Conv2d(4, 2, 3, padding=1)})
    fastdiff.accelerate(net, channels_last=True)
    assert net.conv1.lora_A["default"].weight.is_contiguous()
    assert net.conv1.base.weight.is_contiguous(memory_format=LAST)


def test_a_whole_is_restored_of_which_a_part_was_accelerated():
    """Or which is wrapped since: its layout, and its forward too."""
    part = block()
    before, forward = part.conv1.weight.stride(), part.forward
    with pytest.warns(UserWarning, match="a graph needs"):
        fastdiff.accelerate(part, channels_last=True, graph=True)
    assert part.conv1.weight.stride() != before and "forward" in vars(part)
    assert fastdiff.restore(nn.Sequential(part)) == ["0", "0.forward"]
    assert part.conv1.weight.stride() == before and part.forward == forward
