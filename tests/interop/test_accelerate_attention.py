"""What accelerate makes of the layers of a transformer block: attention, a gate, and sums before norms."""

import copy
import functools
from collections import Counter

import pytest
import torch
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
)
from small_models import Low
from strategies import DEVICE
from torch import nn

import fastdiff

NAMES = ["", "attn1", "attn2", "ff.net.0"]


def block(**options) -> nn.Module:
    """With norms that are not the identity."""
    torch.manual_seed(0)
    net = BasicTransformerBlock(**{"dim": 8, "num_attention_heads": 2, "attention_head_dim": 4} | options)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return net.eval().to(DEVICE)


def both(**options) -> nn.Module:
    """With attention to itself and to a text."""
    return block(cross_attention_dim=6, **options)


def output(net, **arguments) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    x, text = (torch.randn(2, 5, width, generator=random).to(DEVICE) for width in (8, 6))
    with torch.no_grad():
        return net(x, **{"encoder_hidden_states": text} | arguments)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.fixture
def launches(monkeypatch) -> Counter[str]:
    """How often each kernel was launched."""
    launched: Counter[str] = Counter()
    launchers = fastdiff.ops.dispatch.launchers("triton")

    def counted(name, launch, **operands):
        launched[name] += 1
        return launch(**operands)

    for name in ("gated_gelu", "layer_norm"):
        monkeypatch.setattr(launchers, name, functools.partial(counted, name, getattr(launchers, name)))
    with fastdiff.backend("triton"):
        yield launched


def hook(layer):
    layer.register_forward_hook(lambda module, x, y: 1.5 * y)


def wrap(layer):
    layer.forward = lambda *args, forward=layer.forward, **kwargs: 1.5 * forward(*args, **kwargs)


def merge_tokens(net):
    """As tools do that merge tokens: a class made of that of the block."""

    class Merging(type(net)):
        def forward(self, hidden_states, **arguments):
            return 1.5 * super().forward(hidden_states, **arguments)

    net.__class__ = Merging


def adapt(net):
    torch.manual_seed(2)
    net.attn2.set_processor(IPAdapterAttnProcessor2_0(8, cross_attention_dim=6, num_tokens=(2,)).to(DEVICE))


def skip(net, **parts):
    blocks = nn.Module()
    blocks.blocks = nn.ModuleList([net])
    apply_layer_skip(blocks, LayerSkipConfig(indices=[0], fqn="blocks", **parts))


IMAGES = torch.linspace(-1, 1, 2 * 2 * 6).reshape(2, 1, 2, 6)
# What is done to a block, kernels that are launched if accelerate came before it, and arguments of the call.
TREATMENTS = {
    "nothing": (lambda net: None, 1, 2, {}),
    "perturbed attention": (lambda net: net.attn1.set_processor(PAGIdentitySelfAttnProcessor2_0()), 1, 2, {}),
    "an image": (adapt, 1, 2, {"encoder_hidden_states": (IMAGES[:, 0], [IMAGES])}),
    "another factor": (lambda net: setattr(net.attn1, "rescale_output_factor", 2.0), 1, 2, {}),
    "a sum in attention": (lambda net: setattr(net.attn1, "residual_connection", True), 1, 2, {}),
    "a hook on attention": (lambda net: hook(net.attn1), 1, 2, {}),
    "a hook on a projection": (lambda net: hook(net.attn2.to_out[0]), 1, 2, {}),
    "a hook on a gate": (lambda net: hook(net.ff.net[0]), 1, 2, {}),
    "an adapter": (lambda net: setattr(net.ff.net[0], "proj", Low(net.ff.net[0].proj)), 1, 2, {}),
    "another gate": (lambda net: setattr(net.ff.net[0], "gelu", torch.relu), 0, 2, {}),
    "a hook on a norm": (lambda net: hook(net.norm3), 1, 0, {}),
    "a norm without weights": (lambda net: setattr(net, "norm2", nn.LayerNorm(8, elementwise_affine=False)), 1, 2, {}),
    "another norm": (lambda net: setattr(net, "norm3", nn.RMSNorm(8)), 1, 0, {}),
    "chunks": (lambda net: net.set_chunk_feed_forward(1, 1), 5, 0, {}),
    "merged tokens": (merge_tokens, 1, 2, {}),
    "skipped attention": (lambda net: skip(net, skip_attention=True, skip_ff=False), 1, 2, {}),
    "skipped": (skip, 0, 0, {}),
    "wrapped attention": (lambda net: wrap(net.attn1), 1, 2, {}),
    "wrapped": (wrap, 1, 2, {}),
    "a mask": (lambda net: None, 1, 2, {"encoder_attention_mask": torch.tensor([[[0.0, -9, 0, 0, -2]]] * 2)}),
    "other arguments": (lambda net: None, 1, 0, {"cross_attention_kwargs": {"unknown": 1}}),
}
UNSEEN = ("nothing", "chunks", "other arguments")  # do not change the result


@pytest.mark.parametrize("treatment", TREATMENTS)
@pytest.mark.filterwarnings("ignore:accelerate left:UserWarning")
def test_the_results_of_stock_whatever_is_done_to_a_block(treatment, launches):
    """Before or after it is fused, and when it is restored."""
    treat, gates, norms, arguments = TREATMENTS[treatment]
    stock, before, after = both(), both(), both()
    plain = output(stock)
    assert fastdiff.accelerate(after) == NAMES
    for net in (stock, before, after):
        treat(net)
    fastdiff.accelerate(before)
    want = output(stock, **arguments)
    assert not launches and (treatment in UNSEEN or not torch.allclose(plain, want, atol=1e-3))
    close(output(after, **arguments), want)
    assert (launches["gated_gelu"], launches["layer_norm"]) == (gates, norms)
    close(output(before, **arguments), want)
    launches.clear()
    for net in (before, after):
        fastdiff.restore(net)
        assert treatment == "merged tokens" or torch.equal(output(net, **arguments), want)
    assert treatment == "merged tokens" or not launches


# Options of a block, and the layers that are replaced.
KINDS = {
    "only itself": ({}, ["", "attn1", "ff.net.0"]),
    "itself twice": ({"double_self_attention": True}, NAMES),
    "only the text": ({"cross_attention_dim": 6, "only_cross_attention": True}, NAMES),
    "other feed-forward": ({"cross_attention_dim": 6, "activation_fn": "gelu-approximate"}, NAMES[:3]),
    "other norms": ({"norm_type": "ada_norm_zero", "num_embeds_ada_norm": 3}, ["attn1", "ff.net.0"]),
    "positions": ({"positional_embeddings": "sinusoidal", "num_positional_embeddings": 5}, ["attn1", "ff.net.0"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_block(kind, launches):
    options, names = KINDS[kind]
    stock, ours = block(**options), block(**options)
    assert fastdiff.accelerate(ours) == names
    steps = {"timestep": torch.tensor([1]), "class_labels": torch.tensor([2, 0])} if kind == "other norms" else {}
    text = {} if "cross_attention_dim" in options else {"encoder_hidden_states": None}
    close(output(ours, **steps, **text), output(stock, **steps, **text))
    assert launches["layer_norm"] == ("" in names) * (2 if "attn2" in names else 1)


# Options of attention, a mask, and whether its input is a map.
ATTENTIONS = {
    "plain": ({}, False, False),
    "a mask": ({}, True, False),
    "norms of heads": ({"qk_norm": "layer_norm", "bias": True}, False, False),
    "a norm of the text": ({"cross_attention_norm": "layer_norm", "out_dim": 16}, False, False),
    "a map": ({}, False, True),
}


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention_has_the_bits_of_stock(kind):
    """On a CPU and with its gradients."""
    options, masked, is_map = ATTENTIONS[kind]
    torch.manual_seed(0)
    stock = Attention(8, cross_attention_dim=6, heads=2, dim_head=4, **options)
    ours = copy.deepcopy(stock)
    assert fastdiff.accelerate(ours) == [""]
    x, text = torch.randn(2, 8, 3, 3) if is_map else torch.randn(2, 9, 8), torch.randn(2, 5, 6)
    mask = torch.randn(2, 1, 5) if masked else None
    results = []
    for net in (stock, ours):
        y = net(x, text, mask)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(net.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_attention_that_does_more_is_left_as_it_is():
    for options in ({"norm_num_groups": 2}, {"residual_connection": True}, {"rescale_output_factor": 2.0}):
        net = Attention(8, heads=2, dim_head=4, **options)
        done = fastdiff.accelerate(net)
        assert type(net) is Attention and done == ["group_norm"][: "norm_num_groups" in options] and not done.left


PATCHED = [
    (AttnProcessor2_0, "__call__"),
    (Attention, "forward"),
    (Attention, "prepare_attention_mask"),
    (BasicTransformerBlock, "forward"),
    (GEGLU, "forward"),
    (GEGLU, "gelu"),
    (nn.LayerNorm, "forward"),
    (nn.functional, "scaled_dot_product_attention"),
]


@pytest.mark.parametrize(("owner", "method"), PATCHED)
def test_patched_methods_of_a_class_are_called(owner, method, launches, monkeypatch):
    stock, ours, original = both(), both(), getattr(owner, method)
    fastdiff.accelerate(ours)
    mask = {"encoder_attention_mask": torch.tensor([[[1.0, -9, 0, 0, -2]]] * 2, device=DEVICE)}
    plain = output(ours, **mask)
    monkeypatch.setattr(owner, method, lambda *args, **kwargs: 1.5 * original(*args, **kwargs))
    want = output(stock, **mask)
    close(output(ours, **mask), want)
    assert not torch.allclose(plain, want, atol=1e-3)


@pytest.mark.parametrize("kind", [BasicTransformerBlock, Attention, GEGLU])
def test_a_wrapper_that_holds_a_fused_forward_calls_stocks_after_restore(kind, launches):
    """And a layer that was wrapped before is left."""
    net, other = both(), both()
    want = output(net)
    fastdiff.accelerate(net)
    for each in (net, other):
        for module in each.modules():
            if isinstance(module, kind):
                module.forward = lambda *args, forward=module.forward, **kwargs: forward(*args, **kwargs)
    fastdiff.restore(net)
    assert torch.equal(output(net), want)
    with pytest.warns(UserWarning, match="its forward is wrapped"):
        assert all(not isinstance(other.get_submodule(name), kind) for name in fastdiff.accelerate(other))


def test_a_gradient_takes_stocks_way(launches):
    """Kernels have none. Checkpoints of a block are of the same calls."""
    stock, ours = both().train(), both().train()
    fastdiff.accelerate(ours)
    x, text = torch.linspace(-1, 1, 80).reshape(2, 5, 8), torch.linspace(1, -1, 60).reshape(2, 5, 6)
    found = []
    for net in (stock, ours):
        y = torch.utils.checkpoint.checkpoint(net, x, None, text, use_reentrant=False)
        found.append(torch.autograd.grad(y.square().sum(), list(net.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and not launches


def test_half_precision_is_as_near_to_the_exact_result_as_stock(launches):
    """In float16: Triton's interpreter cuts bfloat16 off."""
    stock = both().half()
    exact, ours = copy.deepcopy(stock).double(), copy.deepcopy(stock)
    fastdiff.accelerate(ours)
    random = torch.Generator().manual_seed(1)
    x, text = (torch.randn(2, 40, width, generator=random).to(DEVICE).half() for width in (8, 6))
    with torch.no_grad():
        want = exact(x.double(), encoder_hidden_states=text.double())
        of_stock, of_ours = (
            (net(x, encoder_hidden_states=text).double() - want).square().mean() for net in (stock, ours)
        )
    assert launches == {"gated_gelu": 1, "layer_norm": 2} and of_ours <= of_stock
