"""Projections of one input, whose weights accelerate lays one behind the other: one product instead of two or three."""

import pytest
import torch
from diffusers.models.attention_processor import Attention
from small_models import Low, Twice
from torch import nn
from torch.nn.utils import parametrize

import fastdiff
from benchmarks.meter import Meter
from fastdiff.support.adjacent import adjacent, shares_storage

X, TEXT = (
    torch.linspace(-1, 1, 2 * 5 * 8).reshape(2, 5, 8).sin(),
    torch.linspace(-1, 2, 2 * 3 * 6).reshape(2, 3, 6).cos(),
)


class Both(nn.Module):
    """Attention of an image to itself, and to a text."""

    def __init__(self, bias=False):
        super().__init__()
        torch.manual_seed(0)
        self.own = Attention(8, heads=2, dim_head=4, bias=bias)
        self.cross = Attention(8, cross_attention_dim=6, heads=2, dim_head=4, bias=bias)

    def forward(self, x, text):
        x = x + self.own(x)
        return x + self.cross(x, text)


def run(net) -> tuple[torch.Tensor, int]:
    """(output, products)"""
    with torch.no_grad(), Meter() as counted:
        return net(X, TEXT), counted.kernels["mm"] + counted.kernels["addmm"]


@pytest.fixture
def pair() -> tuple[Both, Both]:
    """(stock, accelerated)"""
    stock, ours = Both(), Both()
    fastdiff.accelerate(ours, channels_last=True)
    return stock, ours


@pytest.mark.parametrize("bias", [False, True])
def test_one_product_for_each_input(bias):
    stock, ours = Both(bias), Both(bias)
    parameters = [id(p) for p in ours.parameters()]
    fastdiff.accelerate(ours, channels_last=True)
    (want, theirs), (got, products) = run(stock), run(ours)
    torch.testing.assert_close(got, want, rtol=4e-6, atol=4e-6)
    assert (theirs, products) == (8, 1 + 1 + 2 + 1)  # those after attention too
    assert [id(p) for p in ours.parameters()] == parameters and fastdiff.accelerate(ours, channels_last=True) == []
    ours.own.to_q.weight.requires_grad_()
    assert torch.autograd.grad(ours(X, TEXT).sum(), ours.own.to_q.weight)[0].abs().sum() > 0
    fastdiff.restore(ours)
    assert torch.equal(run(ours)[0], want) and not any(map(shares_storage, ours.parameters()))


def test_what_is_saved_has_a_storage_of_its_own(pair):
    """As writers of safetensors want it, also of a layer that was wrapped since."""
    stock, ours = pair
    assert adjacent([ours.own.to_q.weight, ours.own.to_k.weight, ours.own.to_v.weight])
    ours.cross.to_k = Low(ours.cross.to_k)
    state, want = ours.state_dict(prefix="net."), stock.state_dict(prefix="net.")
    assert not any(map(shares_storage, state.values()))
    torch.testing.assert_close(list(state.values()), list(want.values()), rtol=0, atol=0)
    fastdiff.restore(ours)
    assert not any(map(shares_storage, ours.parameters()))


def moved(net, name):
    layer = getattr(net, name)
    layer.weight.data = 2 * layer.weight.data


TREATMENTS = {
    "a hook": lambda net, name: getattr(net, name).register_forward_hook(lambda m, x, y: 2 * y),
    "another layer": lambda net, name: setattr(net, name, Low(getattr(net, name))),
    "a parametrization": lambda net, name: parametrize.register_parametrization(getattr(net, name), "weight", Twice()),
    "a bias": lambda net, name: getattr(net, name).register_parameter("bias", nn.Parameter(torch.ones(8))),
    "other memory": moved,
}


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_layers_that_are_changed_afterwards_are_called(treatment, pair):
    stock, ours = pair
    for net in pair:
        TREATMENTS[treatment](net.own, "to_q")
        TREATMENTS[treatment](net.cross, "to_v")
    (want, _), (got, products) = run(stock), run(ours)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert products == 8 - 1  # keys and values of `own` still lie together


def test_memory_that_others_read_stays():
    net = Both()
    net.share_memory()
    whole = torch.ones(3, 8, 8)
    for layer, part in zip((net.own.to_q, net.own.to_k, net.own.to_v), whole, strict=True):
        layer.weight.data = part[:]
    before = [p.data_ptr() for p in net.parameters()]
    fastdiff.accelerate(net, channels_last=True)
    assert [p.data_ptr() for p in net.parameters()] == before
    fastdiff.restore(net)
    assert [p.data_ptr() for p in net.parameters()] == before


def test_weights_that_are_laid_together_in_inference_mode_are_trained_later():
    net = Both()
    for change in (lambda: fastdiff.accelerate(net, channels_last=True), lambda: fastdiff.restore(net)):
        with torch.inference_mode():
            change()
        net(X, TEXT).sum().backward()
    assert not any(p.is_inference() for p in net.parameters())
