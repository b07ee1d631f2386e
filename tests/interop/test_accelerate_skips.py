"""U-Nets of texts after accelerate: a map and its skip are read where they lie, and a text once."""

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import diffusers
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

import fastdiff
from benchmarks.gpu.networks import TINY_STABLE_DIFFUSION
from benchmarks.meter import Meter

# Concatenations of a call: two of sines and cosines, one of biases, one of weights in a copy. One more for each skip.
CATS, SKIPS = 2 + 2, 4
ATTENTIONS = 4  # to an image, and as many to a text


@pytest.fixture(scope="module")
def nets() -> tuple[nn.Module, nn.Module]:
    """(stock, accelerated), to be copied."""
    torch.manual_seed(0)
    config = TINY_STABLE_DIFFUSION | {"in_channels": 2, "out_channels": 2, "block_out_channels": (4, 8)}
    stock = diffusers.UNet2DConditionModel(**config | {"norm_num_groups": 2, "attention_head_dim": 2}).eval()
    with torch.no_grad():
        for p in stock.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ours = copy.deepcopy(stock)
    fastdiff.accelerate(ours, channels_last=True)
    return stock, ours


@pytest.fixture
def pair(nets) -> tuple[nn.Module, nn.Module]:
    return copy.deepcopy(nets)


@contextmanager
def as_kernels() -> Iterator[None]:
    """As where norms are kernels."""
    with (
        mock.patch("fastdiff.ops.group_norm.backend_of", return_value="triton"),
        mock.patch("fastdiff.ops.checks.backend_of", return_value="triton"),
    ):
        yield


def run(net, length=3) -> tuple[torch.Tensor, Counter]:
    """(output, kernels)"""
    random = torch.Generator().manual_seed(1)
    x, text = (torch.randn(*shape, generator=random) for shape in ((2, 2, 4, 4), (2, length, 16)))
    with as_kernels(), torch.no_grad(), Meter() as counted:
        return net(x, torch.tensor([3, 700]), text).sample, counted.kernels


def same(pair, cats) -> None:
    (want, _), (got, kernels) = (run(net) for net in pair)
    torch.testing.assert_close(got, want, rtol=4e-6, atol=4e-6)
    assert kernels["cat"] == CATS + cats


@pytest.mark.parametrize("training", [False, True])
def test_no_skip_is_concatenated(pair, training):
    for net in pair:
        net.train(training)
    same(pair, 0)


def test_keys_and_values_of_a_text_are_one_product(nets):
    """If they are few beside the weights; else one for each block of attention."""
    by_length = []
    for length in (2, 3):
        (want, _), (got, kernels) = (run(net, length) for net in nets)
        torch.testing.assert_close(got, want, rtol=4e-6, atol=4e-6)
        by_length.append(kernels["mm"])
    assert by_length == [2 * ATTENTIONS + 1, 2 * ATTENTIONS + ATTENTIONS]  # the first term: of images


def test_freeu_is_stocks(pair):
    for net in pair:
        net.enable_freeu(0.9, 0.2, 1.2, 1.4)
    same(pair, SKIPS)


@pytest.mark.parametrize("which", [0, 1])
def test_a_skip_that_is_missing_is_an_error_as_in_stock(nets, which):
    """Otherwise its block would be left out, and nobody would know."""
    block, x = nets[1].up_blocks[which], torch.ones(1, 8, 2, 2)
    with as_kernels(), torch.no_grad(), pytest.raises(IndexError):
        block(x, (), temb=torch.ones(1, 16))


def test_what_is_done_to_a_block_counts(pair):
    """Hooks and wrappers are given whole maps, and a layer of a block is called with them."""
    for net in pair:
        hooked, normed, _, wrapped = (block for level in net.up_blocks for block in level.resnets)
        hooked.register_forward_pre_hook(lambda m, given: (given[0].flip(1), *given[1:]))
        normed.norm1.register_forward_pre_hook(lambda m, given: (given[0].flip(1),))
        wrapped.forward = lambda x, temb, forward=wrapped.forward: 2 * forward(x.flip(1), temb)
    same(pair, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_block_of_two_halves_is_as_near_to_the_exact_result_as_stock(dtype):
    """And joins halves that it cannot read where they lie."""
    torch.manual_seed(0)
    stock = ResnetBlock2D(in_channels=48, out_channels=24, temb_channels=8, groups=4).eval().to(dtype)
    exact, ours = copy.deepcopy(stock).double(), copy.deepcopy(stock)
    fastdiff.accelerate(ours, channels_last=True)
    shapes = (2, 32, 8, 8), (2, 16, 8, 8), (2, 8)
    x, skip, temb = (torch.randn(shape, dtype=dtype) for shape in shapes)
    x, last = (t.to(memory_format=torch.channels_last) for t in (x, skip))
    with torch.no_grad(), as_kernels():
        whole = torch.cat([x, skip], dim=1)
        want, theirs = exact(whole.double(), temb.double()), stock(whole, temb)
        errors = [
            (y.double() - want).square().mean() for y in (theirs, ours(x, temb, skip=last), ours(x, temb, skip=skip))
        ]
    assert max(errors[1:]) <= max(errors[0], 1e-12)
