"""accelerate(graph=True) and what happens to a network afterwards: it is captured anew, or runs as it is."""

import functools
from typing import Any

import pytest
import torch
from accelerate.hooks import add_hook_to_module
from diffusers.models.attention_processor import AttnProcessor2_0
from replayed import Giving, Looking, Taking, both, conditional, counted, draw, inputs, made, same, unet
from torch import Tensor, nn

import fastdiff
from fastdiff.graphs import MOST_CHANGES, WARM_UP


class Adapted(nn.Module):
    """A layer with an adapter, as LoRA makes it."""

    def __init__(self, layer: nn.Module, scale: float) -> None:
        super().__init__()
        self.layer, self.scaling = layer, {"default": scale}

    def forward(self, *args: Any) -> Tensor:
        return self.layer(*args) * (1 + self.scaling["default"])


def adapt(net: nn.Module) -> None:
    net.mid_block.attentions[0].proj_in = Adapted(net.mid_block.attentions[0].proj_in, 0.5)


def set_scale(net: nn.Module) -> None:
    net.mid_block.attentions[0].proj_in.scaling["default"] = -0.25


def unload(net: nn.Module) -> None:
    net.mid_block.attentions[0].proj_in = net.mid_block.attentions[0].proj_in.layer


class Louder(AttnProcessor2_0):
    scale = 2.0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.scale * super().__call__(*args, **kwargs)


def replace_processors(net: nn.Module) -> None:
    net.set_attn_processor(Louder())


def turn_processors(net: nn.Module) -> None:
    next(iter(net.attn_processors.values())).scale = 3.0


def free_u(net: nn.Module) -> None:
    net.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def move(net: nn.Module) -> None:
    for p in net.parameters():
        p.data = p.data.clone()


def replace_parameter(net: nn.Module) -> None:
    net.conv_out.bias = nn.Parameter(net.conv_out.bias + 1)


CHANGES = {
    "LoRA": [adapt, set_scale, unload],
    "attention processors": [replace_processors, turn_processors],
    "FreeU": [free_u, lambda net: net.disable_freeu()],
    "weights": [move, replace_parameter],
    "a factor": [lambda net: setattr(net.mid_block.resnets[0], "output_scale_factor", 2.0)],
    "restored blocks": [fastdiff.restore],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_is_captured_anew(taped, name):
    net, plain = both(conditional)
    same(net, plain, calls=WARM_UP + 1)
    before = plain(**inputs(plain))[0]
    for n, change in enumerate(CHANGES[name]):
        change(net)
        change(plain)
        same(net, plain, calls=WARM_UP + 1)
        if name != "restored blocks":
            assert taped.recorded == n + 2
    unchanged = name in ("LoRA", "FreeU", "restored blocks")
    assert torch.allclose(before, plain(**inputs(plain))[0], rtol=1e-3, atol=1e-5) == unchanged


@pytest.mark.slow
def test_weights_that_are_changed_in_place_are_followed(taped):
    net, plain = both(conditional)
    same(net, plain)
    for one in (net, plain):
        for p in one.parameters():
            p.add_(0.01)
        one.conv_in.weight.data.mul_(2)
    same(net, plain)
    assert taped.recorded == 1


@pytest.mark.slow
def test_a_patched_class_is_followed(taped, monkeypatch):
    net, plain = both(conditional)
    same(net, plain)
    block = type(net.mid_block.attentions[0])
    forward = block.forward
    patched = functools.wraps(forward)(lambda self, *args, **kwargs: (2 * forward(self, *args, **kwargs)[0],))
    monkeypatch.setattr(block, "forward", patched)
    same(net, plain)
    assert taped.recorded == 2


class Counting(nn.Module):
    """Its forward depends on how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.layer = 0, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) * self.calls


class Writing(Looking):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.mul_(2))


def hooked(layer: nn.Module) -> None:
    layer.layer.register_forward_hook(lambda m, x, y: 2 * y)


def wrapped(layer: nn.Module) -> None:
    add_hook_to_module(layer.layer, counted())


REASONS = {
    "a network that does not change at every call": (Counting, None),
    "a network that can be captured (aten._local_scalar_dense.default reads a number)": (Looking, None),
    "a network that can be captured (it writes into its arguments)": (Writing, None),
    "a model without forward hooks, which a replay would not call": (Taking, hooked),
    "layers whose forward is not wrapped, as offloading does": (Taking, wrapped),
    "a network in eval mode": (Taking, lambda net: net.train()),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_cannot_be_replayed_runs_as_it_is(taped, reason):
    make, change = REASONS[reason]
    net, plain = made(make), made(make)
    done = fastdiff.accelerate(net, graph=True)
    assert done == ["forward"] and done.left == {}
    if change:
        change(net)
        change(plain)
    with pytest.warns(UserWarning, match="accelerate: forward runs without: a graph needs "):
        for seed in range(MOST_CHANGES + 2):
            x, y = draw(seed, 2, 4), draw(seed, 2, 4)
            if make is Taking:
                assert torch.equal(net([x, y])["y"], plain([x, y])["y"])
            else:
                assert torch.equal(net(x), plain(y)) and torch.equal(x, y)
    assert done.left == {"forward": f"a graph needs {reason}"} and not sum(tape.replayed for tape in taped)


def test_results_that_cannot_be_copied_are_not_replayed(taped):
    net = made(Giving)
    fastdiff.accelerate(net, graph=True)
    with pytest.warns(UserWarning, match="its result is of Result"):
        results = [net(draw(seed, 2, 4)).y for seed in range(4)]
    assert all(torch.equal(y, net.layer(draw(seed, 2, 4))) for seed, y in enumerate(results)) and not taped.recorded


def test_a_list_of_arguments_is_left_alone(taped):
    net = made(Taking)
    fastdiff.accelerate(net, graph=True)
    for seed in range(5):
        pair = [draw(seed, 2, 4), draw(seed + 1, 2, 4)]
        want = net.layer(pair[1]) + pair[0]
        assert torch.equal(net(pair)["y"], want)
    assert taped.recorded == 1


def test_the_reason_of_a_call_goes_away(taped):
    net, plain = made(unet), made(unet)
    done = fastdiff.accelerate(net, graph=True)
    fastdiff.accelerate(plain)
    with torch.enable_grad(), pytest.warns(UserWarning, match="a call without gradients"):
        x = inputs(net)["sample"].requires_grad_()
        grads = [torch.autograd.grad(one(x, 3)[0].square().sum(), x)[0] for one in (net, plain)]
    assert torch.equal(*grads) and done.left == {"forward": "a graph needs a call without gradients"}
    same(net, plain)
    assert done.left == {} and taped.recorded == 1
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="no hooks on all modules"):
        same(net, plain, 1)
    handle.remove()
    same(net, plain)
    assert taped.recorded == 1


def test_arguments_of_other_kinds_run_as_they_are(taped):
    net = made(Taking)
    fastdiff.accelerate(net, graph=True)
    pair = [draw(0, 2, 4), draw(1, 2, 4)]
    want = net([*pair])["y"]
    for extra, said in ((1j, "plain values as arguments, got complex"), (torch.empty(1, device="meta"), "one on meta")):
        with pytest.warns(UserWarning, match=said):
            assert torch.equal(net([extra, *pair])["y"], want)


def test_on_a_cpu_nothing_is_captured():
    net, plain = made(unet), made(unet)
    with pytest.warns(UserWarning, match="accelerate left 1 part as it is"):
        done = fastdiff.accelerate(net, graph=True)
    fastdiff.accelerate(plain)
    assert done.left == {"forward": "a graph needs a model on CUDA, got one on cpu"} and "forward" in done
    with pytest.warns(UserWarning, match="accelerate left 1 part as it is"):
        again = fastdiff.accelerate(net, graph=True)
    assert again == [] and again.left == done.left
    with torch.no_grad(), fastdiff.backend("reference"):
        same(net, plain)
