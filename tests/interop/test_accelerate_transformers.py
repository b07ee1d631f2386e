"""What accelerate makes of diffusion transformers: their norms, modulations and gated sums in one operation each."""

import copy
import functools
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models import attention, normalization
from diffusers.models.transformers import transformer_flux, transformer_qwenimage, transformer_wan
from replayed import draw
from small_models import Low
from small_transformers import TRANSFORMERS, made, output
from torch import nn
from torch.nn import functional as F

import fastdiff
from benchmarks.meter import Meter

OPERATIONS = ("layer_norm", "add_layer_norm", "addcmul", "native_layer_norm", "rotate")


@contextmanager
def with_kernels():
    """Norms and rotations are operations of fastdiff, as on a GPU. Here they run the reference."""
    with mock.patch("fastdiff.ops.checks.backend_of", return_value="triton"):
        yield


@pytest.fixture
def kernels():
    with with_kernels():
        yield


def accelerated(name, dtype=torch.float32):
    """(fused, stock, the arguments of a call)."""
    stock, given = made(name, dtype)
    fused = copy.deepcopy(stock)
    fastdiff.accelerate(fused)
    return fused, stock, given


# Of a call: norms, sums with a norm, gated sums, norms of PyTorch that stay, and rotations.
COUNTS = {
    # 2 norms of the first block's image and 1 of its text; 1 and 1 of the last, which drops the text; the output's
    "sd3": (6, 3, 4, 0, 0),
    # 2, 2 and 2 of the first block; 1 and 1 of the single one; the output's; queries and keys of text, image and both
    "flux": (4, 2, 3, 0, 6),
    "qwen": (3, 2, 2, 0, 4),
    "dit": (1, 1, 1, 1, 0),  # the last norm is not a layer of a block
    "pixart": (1, 1, 2, 1, 0),  # a gated sum before attention to the text, which has no norm
    "wan": (1, 2, 1, 1, 2),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_one_operation_for_each_norm_and_sum(name, kernels):
    fused, stock, given = accelerated(name)
    want = output(stock, given)
    with Meter() as meter:
        torch.testing.assert_close(output(fused, given), want, rtol=1e-4, atol=1e-5)
    assert tuple(meter.kernels[name] for name in OPERATIONS) == COUNTS[name]
    fastdiff.restore(fused)
    assert torch.equal(output(fused, given), want)
    assert [type(part) for part in fused.modules()] == [type(part) for part in stock.modules()]


def test_timesteps_of_another_type(kernels):
    """Some schedulers have float32."""
    fused, stock, given = accelerated("dit", torch.bfloat16)
    given |= {"timestep": given["timestep"].float()}
    with Meter() as meter:
        torch.testing.assert_close(output(fused, given), output(stock, given), rtol=0.1, atol=0.1)
    assert meter.kernels["add_layer_norm"] == 1


@pytest.mark.slow
def test_the_kernels_give_what_stock_gives():
    fused, stock, given = accelerated("flux")
    with fastdiff.backend("triton"):
        torch.testing.assert_close(output(fused, given), output(stock, given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_fewer_roundings_than_stock(name, kernels):
    """In bfloat16 the error against float64 is not greater, and the type is stock's."""
    exact = output(*made(name, torch.float64))
    fused, stock, given = accelerated(name, torch.bfloat16)
    results = output(fused, given), output(stock, given)
    ours, theirs = ((result.double() - exact).square().mean() for result in results)
    assert results[0].dtype == results[1].dtype and not torch.equal(*results)
    assert ours <= 1.1 * theirs


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_stocks_bits_where_there_is_no_kernel(name):
    """On a CPU, within autocast, and with a gradient."""
    fused, stock, given = accelerated(name)
    assert torch.equal(output(fused, given), output(stock, given))
    with with_kernels():
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(output(fused, given), output(stock, given))
        results = [net(**given, return_dict=False)[0] for net in (fused, stock)]
    grads = [
        torch.autograd.grad(y.square().mean(), next(net.parameters()))[0]
        for y, net in zip(results, (fused, stock), strict=True)
    ]
    assert torch.equal(*results) and torch.equal(*grads)


# A block of each kind, a norm of it that is not called, and a layer that is.
BLOCKS = {
    "sd3": ("transformer_blocks.0", "norm2", "ff.net.2"),
    "flux": ("transformer_blocks.0", "attn.norm_added_k", "attn.add_v_proj"),
    "qwen": ("transformer_blocks.0", "attn.norm_k", "attn.to_v"),
    "dit": ("transformer_blocks.0", "norm3", "ff.net.2"),
    "pixart": ("transformer_blocks.0", "norm2", "attn1.to_v"),
    "wan": ("blocks.0", "norm2", "attn1.to_v"),
}


def wrap(layer):
    layer.forward = lambda x, forward=layer.forward: 1.5 * forward(x)


TREATMENTS = {
    "a hook on a norm": lambda block, norm, layer: block.get_submodule(norm).register_forward_hook(
        lambda m, x, y: 2 * y
    ),
    "a wrapped norm": lambda block, norm, layer: wrap(block.get_submodule(norm)),
    "another layer": lambda block, norm, layer: block.set_submodule(layer, Low(block.get_submodule(layer))),
}


@pytest.mark.parametrize("treatment", TREATMENTS)
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_what_is_done_to_a_block_counts(name, treatment, kernels):
    block, norm, layer = BLOCKS[name]
    fused, stock, given = accelerated(name)
    before = output(fused, given)
    for net in (fused, stock):
        TREATMENTS[treatment](net.get_submodule(block), norm, layer)
    want = output(stock, given)
    torch.testing.assert_close(output(fused, given), want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, want, atol=1e-3)


def test_a_block_that_is_patched_or_wrapped(kernels, monkeypatch):
    """For its whole class, after it is fused; and one alone, before."""
    kind = transformer_flux.FluxSingleTransformerBlock
    fused, stock, given = accelerated("flux")
    original = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args, **kw: tuple(2 * t for t in original(self, *args, **kw)))
    torch.testing.assert_close(output(fused, given), output(stock, given), rtol=1e-4, atol=1e-5)
    stock.single_transformer_blocks[0].forward = functools.partial(original, stock.single_transformer_blocks[0])
    with pytest.warns(UserWarning, match="accelerate left 1 part as it is"):
        done = fastdiff.accelerate(stock)
    assert done.left == {"single_transformer_blocks.0": "its forward is wrapped, as offloading does"}


def called(stock, kind, *args, **kwargs):
    """The results of a layer of diffusers, and of the same by accelerate, without a gradient."""
    ours = copy.deepcopy(stock)
    assert fastdiff.accelerate(ours)[0] == "" and type(ours) is not kind
    with torch.no_grad(), with_kernels():
        return stock(*args, **kwargs), ours(*args, **kwargs)


def ada_norm(**options):
    torch.manual_seed(0)
    return normalization.AdaLayerNormContinuous(8, 8, elementwise_affine=False, **options)


def test_norms_of_video_and_text(kernels):
    torch.manual_seed(0)
    norm = normalization.CogVideoXLayerNormZero(8, 6)
    tokens = torch.randn(2, 3, 6), torch.randn(2, 2, 6)
    with Meter() as meter:
        want, got = called(norm, type(norm), *tokens, torch.randn(2, 8))
    torch.testing.assert_close(got, want)
    assert meter.kernels["layer_norm"] == meter.kernels["native_layer_norm"] == 2


@pytest.mark.parametrize(("samples", "rows"), [(2, 1), (1, 2)])
def test_a_row_for_all_samples_or_a_sample_for_all_rows(samples, rows):
    norm = ada_norm()
    torch.testing.assert_close(*called(norm, type(norm), torch.randn(samples, 3, 8), torch.randn(rows, 8)))


def test_rows_of_another_type():
    """The result has stock's type."""
    norm, x = ada_norm().bfloat16(), torch.randn(2, 3, 8).bfloat16()
    want, got = called(norm, type(norm), x, torch.randn(2, 8))
    assert torch.equal(want, got)
    zero = normalization.AdaLayerNormZeroSingle(8)
    want, got = called(zero, type(zero), x, torch.randn(2, 8))
    assert torch.equal(want[0], got[0]) and got[0].dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"elementwise_affine": False}, {"dtype": torch.float32}])
def test_norms_of_queries_are_pytorchs_kernel_where_that_is_stocks_norm(options, monkeypatch):
    dtype = options.pop("dtype", torch.bfloat16)
    norm = normalization.RMSNorm(8, 1e-6, **options).to(dtype)
    launches = []
    rms_norm = F.rms_norm
    monkeypatch.setattr(F, "rms_norm", lambda *args: launches.append(args) or rms_norm(*args))
    want, got = called(norm, normalization.RMSNorm, torch.randn(2, 3, 4, 8).bfloat16())
    torch.testing.assert_close(got, want)
    assert len(launches) == (not options.get("bias") and dtype == torch.bfloat16)


def test_calls_that_only_stock_takes():
    """Rows for each token, as of Wan 2.2 and for editing; the MLP in chunks."""
    torch.manual_seed(0)
    block = transformer_wan.WanTransformerBlock(16, 32, 2, cross_attn_norm=True)
    want, got = called(block, type(block), torch.randn(2, 3, 16), torch.randn(2, 3, 16), torch.randn(2, 3, 6, 16), None)
    assert torch.equal(want, got)
    block = transformer_qwenimage.QwenImageTransformerBlock(16, 2, 8, zero_cond_t=True)
    given = torch.randn(2, 4, 16), torch.randn(2, 3, 16), None, torch.randn(4, 16)
    want, got = called(block, type(block), *given, modulate_index=torch.tensor([[0, 1, 1, 0]] * 2))
    assert torch.equal(want[0], got[0]) and torch.equal(want[1], got[1])
    joint = attention.JointTransformerBlock(16, 2, 8)
    joint.set_chunk_feed_forward(2, 1)
    want, got = called(joint, type(joint), torch.randn(2, 4, 16), torch.randn(2, 6, 16), torch.randn(2, 16))
    assert torch.equal(want[0], got[0]) and torch.equal(want[1], got[1])


class Adapted(nn.Module):
    """Attention with an image prompt, which gives a third result."""

    def forward(self, hidden_states, encoder_hidden_states, image_rotary_emb):
        return hidden_states, encoder_hidden_states, 3 * hidden_states


def test_adapters_and_float16_of_flux():
    """What an adapter adds comes last. Sums beyond float16 are clipped in the text and in single blocks."""
    torch.manual_seed(0)
    block = transformer_flux.FluxTransformerBlock(16, 2, 8).half()
    block.attn = Adapted()
    x, text, row = torch.randn(2, 4, 16).half(), 1e4 * torch.randn(2, 3, 16).half(), torch.randn(2, 16).half()
    single = transformer_flux.FluxSingleTransformerBlock(16, 2, 8).half()
    with torch.no_grad():
        block.norm1_context.linear.bias[-16:] = 6e4  # the last gates
        single.norm.linear.bias[-16:] = 6e4
        block.ff_context.net[2].bias[:8] = 2
        single.proj_out.bias[:8] = 2
    for one in (block, single):
        want, got = called(one, type(one), x, text, row)
        torch.testing.assert_close(got[0], want[0], rtol=1e-2, atol=200)
        torch.testing.assert_close(got[1], want[1], rtol=1e-2, atol=0.01 if one is block else 200)
        assert got[0].isfinite().all() and got[0].max() == 65504


class Louder(transformer_flux.FluxAttnProcessor):
    """A user's processor."""

    def __call__(self, *args, **kwargs):
        return tuple(2 * t for t in super().__call__(*args, **kwargs))


def test_processors_are_called(kernels, monkeypatch):
    """A user's, one that is patched for its class, one with arguments of its own, and fused projections."""
    fused, stock, given = accelerated("flux")
    kind, original = transformer_flux.FluxAttnProcessor, transformer_flux.FluxAttnProcessor.__call__
    wanted = []
    for net in (fused, stock):
        net.transformer_blocks[0].attn.set_processor(Louder())
    wanted.append(output(stock, given))
    torch.testing.assert_close(output(fused, given), wanted[-1], rtol=1e-4, atol=1e-5)
    for net in (fused, stock):
        net.fuse_qkv_projections()
        net.set_attn_processor(kind())
    wanted.append(output(stock, given))
    torch.testing.assert_close(output(fused, given), wanted[-1], rtol=1e-4, atol=1e-5)
    fused, stock, given = accelerated("flux")

    def patched(self, attn, *args, **kwargs):
        made = original(self, attn, *args, **kwargs)
        return tuple(2 * t for t in made) if isinstance(made, tuple) else 2 * made

    monkeypatch.setattr(kind, "__call__", patched)
    wanted.append(output(stock, given))
    torch.testing.assert_close(output(fused, given), wanted[-1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted[0], wanted[1], atol=1e-3) and not torch.allclose(*wanted[1:], atol=1e-3)


def test_what_is_done_to_qwens_attention_counts(kernels):
    def louder(module, given, made):
        return tuple(2 * t for t in made)

    class Louder(transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0):
        def __call__(self, *args, **kwargs):
            return louder(None, None, super().__call__(*args, **kwargs))

    treatments = (
        lambda attn: attn.register_forward_hook(louder),
        lambda attn: attn.set_processor(Louder()),
        lambda attn: setattr(attn, "norm_q", None),
    )
    for treat in treatments:
        fused, stock, given = accelerated("qwen")
        before = output(stock, given)
        for net in (fused, stock):
            treat(net.transformer_blocks[0].attn)
        want = output(stock, given)
        torch.testing.assert_close(output(fused, given), want, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(before, want, atol=1e-3)


def test_the_halves_of_wans_tables_are_those_of_stock():
    """The cosines of a pair are the first's, and its sines the second's, though the network's are equal."""
    torch.manual_seed(0)
    attention = transformer_wan.WanAttention(16, 2, 8, processor=transformer_wan.WanAttnProcessor())
    tables = tuple(torch.randn(1, 3, 1, 8) for _ in range(2))
    want, got = called(attention, type(attention), torch.randn(2, 3, 16), None, None, tables)
    torch.testing.assert_close(got, want)


def test_single_blocks_of_flux_copy_no_more_than_they_must(kernels):
    """Image and text lie as the block before left them. GELU writes beside the attention."""
    torch.manual_seed(0)
    block, tokens, row = (
        transformer_flux.FluxSingleTransformerBlock(16, 2, 8),
        torch.randn(2, 7, 16),
        torch.randn(2, 16),
    )
    text, image = tokens.tensor_split((3,), dim=1)
    for parts in ((text, image), (image, text), (text, image.clone())):
        with Meter() as meter:
            want, got = called(block, type(block), parts[1], parts[0], row)
        torch.testing.assert_close(got, want)
        assert meter.kernels["cat"] == (2 if parts[0] is text and parts[1] is image else 3)
        assert meter.kernels["gelu"] == 2
    block.act_mlp.register_forward_hook(lambda m, x, y: 2 * y)
    torch.testing.assert_close(*called(block, type(block), image, text, row))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_caches_of_diffusers_know_the_blocks(name):
    fused, stock, _ = accelerated(name)
    blocks = [kind for kind in map(type, fused.modules()) if kind.__name__.endswith("Block")]
    for kind in blocks:
        assert TransformerBlockRegistry.get(kind)._cls is kind
        assert TransformerBlockRegistry.get(kind.__base__)._cls is kind.__base__
    assert len(blocks) == sum(type(part).__name__.endswith("Block") for part in stock.modules()) > 0


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.filterwarnings("ignore:accelerate. forward runs without:UserWarning")
def test_a_cache_within_fused_blocks(graph, kernels, taped):
    """While it hooks them, no graph is replayed."""
    fused, stock, given = accelerated("flux")
    left = fastdiff.accelerate(fused, graph=graph).left
    fastdiff.accelerate(stock)
    for net in (fused, stock):
        net.enable_cache(FirstBlockCacheConfig(threshold=0.2))
    for scale in (1.0, 1.01, 1.5, 1.51):
        results = []
        for net in (fused, stock):
            with net.cache_context("cond"):
                results.append(output(net, given | {"hidden_states": scale * given["hidden_states"]}))
        assert torch.equal(*results)
    assert taped.recorded == 0 and bool(left) == graph


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_graphs_replay_fused_blocks(name, kernels, taped):
    """Flux with lists of a ControlNet's residuals."""
    fused, stock, given = accelerated(name)
    lists = ("controlnet_block_samples", "controlnet_single_block_samples") if name == "flux" else ()
    fastdiff.accelerate(stock)
    fastdiff.accelerate(fused, graph=True)
    for scale in range(4):
        scaled = given | {"hidden_states": scale * given["hidden_states"]}
        scaled |= {key: [draw(scale, 2, 16, 16)] for key in lists}
        assert torch.equal(output(fused, scaled), output(stock, scaled))
    assert taped[0].replayed == 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(name, dtype):
    """The compiled kernels give what stock gives, and a CUDA graph of them the same bits."""
    fused, stock, given = accelerated(name, dtype)
    given = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in given.items()}
    for net in (fused, stock):
        net.cuda()
    want, got = output(stock, given), output(fused, given)
    bound = 1e-4 if dtype == torch.float32 else 0.05
    assert (got.double() - want.double()).norm() <= bound * want.double().norm()
    fastdiff.accelerate(fused, graph=True)
    for _ in range(4):
        assert torch.equal(output(fused, given), got)


@pytest.mark.slow
def test_a_compiler_sees_stocks_arithmetic(kernels):
    """In one graph, though it does not know the classes of diffusers' blocks from inside."""
    torch.manual_seed(0)
    block = transformer_flux.FluxSingleTransformerBlock(16, 2, 8)
    fused, given = copy.deepcopy(block), (torch.randn(2, 4, 16), torch.randn(2, 3, 16), torch.randn(2, 16))
    fastdiff.accelerate(fused)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(fused, backend="eager", fullgraph=True)(*given)
        assert all(map(torch.equal, compiled, block(*given)))
