"""The count of kernels and bytes of a network, by its rules and on the network that the README's figures are of."""

import functools

import pytest
import torch
from torch import nn

from benchmarks import network_cost
from benchmarks.compiled_blocks import inductor_kernels, passes
from benchmarks.gpu.networks import TINY_STABLE_DIFFUSION, TINY_UNET
from benchmarks.meter import Cost, Meter, as_on_a_gpu, cost
from benchmarks.network_cost import (
    CPU,
    accelerated,
    before_and_after,
    conditional,
    count,
    rows,
    transformer_rows,
)
from benchmarks.networks import cifar10
from fastdiff import UNet


def test_rules():
    x, y = torch.empty(2, 4, 8, dtype=torch.bfloat16), torch.empty(2, 4, 8)
    assert cost("view", [x], [x], False) == Cost(0, 0)
    assert cost("add", [x, x], [y], False) == Cost(1, 64 * (2 + 2 + 4))
    assert cost("convolution", [x, x], [y], False) == Cost(1, 64 * (2 + 2 + 4))
    assert cost("convolution", [x, x, x], [y], True) == Cost(2, 64 * (2 + 2 + 2 + 3 * 4))
    assert cost("native_group_norm", [x], [x, y, y], False) == Cost(3, 64 * (2 + 2 + 2))
    assert cost("group_norm_silu", [x], [x, y, y], False) == Cost(1, 64 * (2 + 2))


WRITTEN = """
def triton_red_0(in_ptr0, in_ptr1, out_ptr0, xnumel):
    tl.load(in_ptr0 + (x), mask)
    tl.load(in_ptr1 + (x), mask)
    tl.load(in_ptr0 + (x), mask)
    tl.store(out_ptr0 + (x), y)
''', device_str='cuda')
def triton_poi_1(in_out_ptr0, in_ptr0, xnumel):
    tl.store(in_out_ptr0 + (x), tl.load(in_out_ptr0 + (x), None) + tl.load(in_ptr0 + (x), None))
''', device_str='cuda')
    def call(self, args):
        assert_size_stride(arg0, (2, 4, 8), (32, 8, 1))
        buf0 = empty_strided_cuda((2, 4), (4, 1), torch.float32)
        triton_red_0.run(arg0, arg1, buf0, 8, stream=raw_stream0)
        buf1 = torch.ops.fastdiff.group_norm_silu.default(arg0, 2)
        buf2 = extern_kernels.convolution(buf1, arg1, bias=None)
        assert_size_stride(buf2, (2, 4, 8), (32, 8, 1), 'torch.ops.aten.convolution.default')
        buf4 = torch.ops.fastdiff.group_norm_silu_grad.default(buf2, arg0, 2)
        buf3 = buf2; del buf2  # reuse
        triton_poi_1.run(buf3, arg0, 64, stream=raw_stream0)
"""


WRITTEN_BY_2_14 = WRITTEN.replace(
    "assert_size_stride(arg0, (2, 4, 8), (32, 8, 1))",
    "assert_size_stride_grouped((arg1, arg0), ((4, ), (2, 4, 8)), ((1, ), (32, 8, 1)), 'input')",
).replace("assert_size_stride(buf2, (2, 4, 8), (32, 8, 1)", "assert_tensor_metadata(buf2, (2, 4, 8), (32, 8, 1), dtype")


@pytest.mark.parametrize("written", [WRITTEN, WRITTEN_BY_2_14])
def test_passes_over_whole_maps(written):
    """Two reads of arg0 by the first kernel; the norm's two, and three of its gradient; a read, a write and a read of
    another map by the last."""
    assert passes(written, (2, 4, 8)) == 2 + 2 + 3 + 3
    assert passes(written, (2, 4)) == 1 + 2 + 3  # the norm's are always counted


def test_what_is_only_written_is_not_read():
    x = torch.empty(4, 4)
    with Meter() as counter:
        torch.add(x, x, out=torch.empty(4, 4))
        x.add_(1)
    assert counter.bytes == 64 * (3 + 2)


class Two(nn.Module):
    """A convolution with a bias, SiLU and a sum."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, x, t):
        h = self.conv(x)
        return torch.nn.functional.silu(h).flatten(1) + h.flatten(1)


def test_a_network_of_known_cost():
    row = count("two", Two, 4)
    out, data = 4 * 5 * 32 * 32 * 4, 4 * 3 * 32 * 32 * 4
    assert row.kernels == 4 and row.by_operator == {"convolution": 2, "silu": 1, "add": 1}
    moved = data + 4 * (5 * 3 * 9 + 5) + 3 * out + 2 * out + 3 * out
    assert row.megabytes_per_image == pytest.approx(moved / 1e6 / 4)


@pytest.mark.slow
def test_what_the_network_costs_as_it_is_sampled():
    """Of the 35.7M U-Net in bfloat16: 333 kernels and 75 MB before its layers were merged, 536 and 106 in diffusers."""
    sampled = count("fastdiff", lambda: cifar10(CPU), 256, sampled=True)
    plain = count("fastdiff", lambda: cifar10(CPU), 256, half=True)
    assert sampled.kernels <= 170 and sampled.megabytes_per_image <= 48
    assert sampled.kernels < plain.kernels and sampled.megabytes_per_image < plain.megabytes_per_image
    assert sampled.by_operator["group_norm_silu"] == 51
    assert not sampled.by_operator.keys() & {"native_group_norm", "cat", "clone"}


@pytest.mark.slow
def test_rows_compare_with_diffusers(monkeypatch):
    """Of a small network: there are seven."""
    pytest.importorskip("diffusers")
    monkeypatch.setattr(network_cost, "cifar10", lambda device: UNet(**TINY_UNET))
    ours, *_, theirs = (row for row in rows([1]) if "autocast" not in row.network and "float32" not in row.network)
    assert ours.network.startswith("fastdiff") and theirs.network.startswith("diffusers")
    assert 2 * ours.kernels < theirs.kernels


@pytest.mark.slow
def test_an_accelerated_network_launches_less():
    """Than diffusers': 8 blocks, of which 5 have a shortcut, and 4 transformers. No map is copied or divided by 1."""
    pytest.importorskip("diffusers")
    options = {"size": (4, 8, 8), "text": TINY_STABLE_DIFFUSION["cross_attention_dim"]}
    ours, theirs = (
        count("tiny", functools.partial(make, **TINY_STABLE_DIFFUSION), 2, **options)
        for make in (accelerated, conditional)
    )
    assert ours.megabytes_per_image < theirs.megabytes_per_image
    assert ours.by_operator["group_norm_silu"] == 2 * 8 + 4 + 1
    assert not ours.by_operator.keys() & {"native_group_norm", "clone"}
    # SiLU of the embedding within, for all blocks, and before the last convolution.
    assert (ours.by_operator["silu"], ours.by_operator["_foreach_add"]) == (3, 1)
    assert theirs.by_operator["div"] - ours.by_operator["div"] == 8 + 2 * 4
    assert (ours.by_operator["gated_gelu"], ours.by_operator["add_layer_norm"]) == (4, 2 * 4)
    assert ours.by_operator["native_layer_norm"] == 4 and "gelu" not in ours.by_operator
    # One for each of the blocks' first, and for a second beside a shortcut; two for the others that add their bias.
    assert ours.by_operator["convolution"] == 8 + 5 + 2 * 3 + 2 * 4


@pytest.mark.slow
def test_a_transformer_takes_a_norm_with_the_sum_before_it_and_what_modulates_it():
    """Three launches of a block, two norms and the last sum; without them there were nine, as in diffusers."""
    pytest.importorskip("diffusers")
    config = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_embeds_ada_norm": 5}
    sampled, ours, theirs = transformer_rows(**config)
    for row in (sampled, ours):
        assert row.by_operator["layer_norm"] == 1 + 1 and row.by_operator["add_layer_norm"] == 1
        assert row.by_operator["addcmul"] == 1 and "native_layer_norm" not in row.by_operator
    assert sampled.kernels < ours.kernels <= theirs.kernels - 6
    assert ours.megabytes_per_image < theirs.megabytes_per_image


def test_an_accelerated_transformer_launches_less():
    """Than diffusers'. Its gates, scales, shifts and norms of queries are parts of other kernels, or one."""
    pytest.importorskip("diffusers")
    from small_transformers import made

    net, given = made("sd3")
    with as_on_a_gpu(), torch.no_grad():
        theirs, ours = before_and_after("tiny", 2, net, given)
    assert ours.by_operator["rms_norm"] == 2 * 2 + 2 + 2 * 2 and "rms_norm" not in theirs.by_operator
    assert not ours.by_operator.keys() & {"pow", "mean", "rsqrt", "native_layer_norm"}
    assert ours.kernels < 0.6 * theirs.kernels and ours.megabytes_per_image < theirs.megabytes_per_image


@pytest.mark.slow
def test_accelerated_blocks_that_are_compiled_pass_over_maps_as_often_as_ours():
    """7 times each: two for a norm, and three for the sum of both convolutions' maps and the last bias."""
    pytest.importorskip("diffusers")
    made = inductor_kernels("accelerate", channels_last=True)
    assert made.passes == 2 * 7 and made.triton + made.calls <= 15
