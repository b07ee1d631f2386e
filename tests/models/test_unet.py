"""The U-Net against its published layout (parameter count, keys, shapes) and independent formulas."""

import copy
import json
import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import RESNET, SMALL
from torch.utils.checkpoint import checkpoint

from fastdiff.nn import Attention, FourierProjection, ResnetBlock, sinusoidal_embedding
from fastdiff.unet import UNet

# google/ddpm-cifar10-32
CIFAR10 = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "downsample_padding": 0,
    "norm_eps": 1e-6,
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def small(**changes) -> UNet:
    return UNet(**{**SMALL, **changes}).eval()


def shapes(**config) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {k: tuple(v.shape) for k, v in UNet(**config).state_dict().items()}


def test_cifar10_layout():
    s = shapes(**CIFAR10)
    assert sum(math.prod(shape) for shape in s.values()) == 35_746_307
    expected = {
        "conv_in.weight": (128, 3, 3, 3),
        "time_embedding.linear_1.weight": (512, 128),
        "time_embedding.linear_2.bias": (512,),
        "down_blocks.0.resnets.1.norm1.weight": (128,),
        "down_blocks.0.downsamplers.0.conv.weight": (128, 128, 3, 3),
        "down_blocks.1.resnets.0.conv_shortcut.weight": (256, 128, 1, 1),
        "down_blocks.1.resnets.0.time_emb_proj.weight": (256, 512),
        "down_blocks.1.attentions.1.group_norm.bias": (256,),
        "down_blocks.1.attentions.0.to_q.weight": (256, 256),
        "down_blocks.1.attentions.0.to_k.bias": (256,),
        "down_blocks.1.attentions.0.to_v.weight": (256, 256),
        "down_blocks.3.resnets.1.conv2.weight": (256, 256, 3, 3),
        "mid_block.attentions.0.to_out.0.weight": (256, 256),
        "mid_block.resnets.1.norm2.weight": (256,),
        "up_blocks.0.resnets.2.conv1.weight": (256, 512, 3, 3),
        "up_blocks.2.attentions.2.to_out.0.bias": (256,),
        "up_blocks.2.resnets.2.conv1.weight": (256, 384, 3, 3),
        "up_blocks.2.upsamplers.0.conv.weight": (256, 256, 3, 3),
        "up_blocks.3.resnets.0.conv_shortcut.weight": (128, 384, 1, 1),
        "up_blocks.3.resnets.2.norm1.weight": (256,),
        "conv_norm_out.weight": (128,),
        "conv_out.weight": (3, 128, 3, 3),
    }
    assert {k: s.get(k) for k in expected} == expected
    absent = ("down_blocks.3.downsamplers.0.conv.weight", "up_blocks.3.upsamplers.0.conv.weight", "time_proj.weight")
    assert not set(absent) & set(s)


def test_default_arguments_parameter_count():
    assert sum(math.prod(shape) for shape in shapes().values()) == 274_056_163


@pytest.mark.parametrize(
    ("changes", "added", "removed"),
    [
        ({"time_embedding_type": "fourier"}, {"time_proj.weight": (8,)}, set()),
        ({"num_class_embeds": 5}, {"class_embedding.weight": (5, 32)}, set()),
        (
            RESNET,
            {
                "down_blocks.0.downsamplers.0.conv1.weight": (8, 8, 3, 3),
                "down_blocks.0.downsamplers.0.time_emb_proj.weight": (8, 32),
                "up_blocks.0.upsamplers.0.norm2.bias": (16,),
            },
            {"down_blocks.0.downsamplers.0.conv.weight", "up_blocks.0.upsamplers.0.conv.weight"},
        ),
        # only levels with attention have a resnet sampler
        (
            {"downsample_type": "resnet", "upsample_type": "resnet"},
            {"down_blocks.0.downsamplers.0.conv.weight": (8, 8, 3, 3), "up_blocks.0.upsamplers.0.norm1.bias": (16,)},
            {"up_blocks.0.upsamplers.0.conv.weight"},
        ),
        (
            {"resnet_time_scale_shift": "scale_shift"},
            {"mid_block.resnets.0.time_emb_proj.weight": (32, 32)},
            {"mid_block.attentions.0.group_norm.weight"},
        ),
        ({"add_attention": False}, {}, {"mid_block.attentions.0.to_q.weight"}),
        ({"time_embedding_dim": 20}, {"time_embedding.linear_2.weight": (20, 20)}, set()),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) and v.keys() <= {*RESNET} else None,
)
def test_layout_by_argument(changes, added, removed):
    s = shapes(**{**SMALL, **changes})
    assert {k: s.get(k) for k in added} == added
    assert not removed & set(s)


def test_config_round_trip():
    net = small(num_class_embeds=3, sample_size=(8, 12))
    config = json.loads(json.dumps(net.config))
    again = UNet(**config).eval()
    assert again.config == net.config == config
    again.load_state_dict(net.state_dict())
    x, t, labels = torch.randn(2, 3, 8, 12), torch.tensor([0, 9]), torch.tensor([2, 0])
    assert torch.equal(again(x, t, labels), net(x, t, labels))
    assert net.sample_shape == again.sample_shape == (3, 8, 12)


def fill_with_cosines(net: UNet) -> None:
    for j, (key, v) in enumerate(sorted(net.state_dict().items())):
        w = torch.cos(j + 1.7 * torch.arange(v.numel(), dtype=torch.float64)).reshape(v.shape)
        if key.endswith("weight") and v.dim() == 1:
            v.copy_(1 + 0.3 * w)
        else:
            v.copy_(w / (v[0].numel() ** 0.5 if v.dim() > 1 else 4))


PLAIN = {"norm_eps": 0.01, "mid_block_scale_factor": 2.0, "freq_shift": 1, "downsample_padding": 0}
SHIFT = {"norm_eps": 0.01, "resnet_time_scale_shift": "scale_shift", "attention_head_dim": 4}
FOURIER = {"time_embedding_type": "fourier", "attn_norm_num_groups": 2, "layers_per_block": 2}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({**PLAIN, "num_class_embeds": 3}, [-0.1597957, 0.4671030, 0.2662450, -0.3936128, 0.2668238]),
        (
            {**RESNET, **SHIFT, "flip_sin_to_cos": False},
            [-0.0526512, 0.5280492, 0.0386136, 0.1944519, 0.1204854],
        ),
        ({**FOURIER, "center_input_sample": True}, [-0.0403436, 0.4467312, 0.0045540, 0.0006435, 0.0247170]),
    ],
    ids=["classes", "resnet", "fourier"],
)
def test_outputs_of_diffusers(changes, expected):
    # expected: UNet2DModel of diffusers 0.42.1 in float64 with the same weights and input
    net = small(**changes).double()
    fill_with_cosines(net)
    x = torch.cos(0.37 * torch.arange(2 * 3 * 8 * 8, dtype=torch.float64)).reshape(2, 3, 8, 8)
    labels = torch.tensor([0, 2]) if "num_class_embeds" in changes else None
    y = net(x, torch.tensor([3, 40]), labels)
    got = torch.stack((y[0, 0, 0, 0], y[0, 2, 3, 4], y[1, 1, 7, 2], y[1, 2, 5, 7], y.square().mean()))
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-5)


def test_gradient_against_finite_differences():
    net, x = small().double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    params = list(net.parameters())
    step = [torch.randn_like(p) * 1e-5 for p in params]

    def loss(sign: int) -> torch.Tensor:
        with torch.no_grad():
            for p, d in zip(params, step, strict=True):
                p.add_(d, alpha=sign)
        return net(x, torch.tensor([3, 700])).square().sum()

    grads = torch.autograd.grad(loss(0), params)
    slope = sum((g * d).sum() for g, d in zip(grads, step, strict=True))
    torch.testing.assert_close((loss(1) - loss(-2)) / 2, slope, rtol=1e-5, atol=0)


def test_sample_shape():
    assert small(in_channels=1).sample_shape == (1, 8, 8)
    assert small(sample_size=None).sample_shape is None


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (32, 32), (64, 64), (8, 20)])
def test_output_shape(size):
    net = small(in_channels=2, out_channels=5)
    with torch.no_grad():
        assert net(torch.randn(2, 2, *size), torch.tensor([0, 999])).shape == (2, 5, *size)


@pytest.mark.parametrize("changes", [{}, RESNET, {"resnet_time_scale_shift": "scale_shift", "num_class_embeds": 2}])
def test_gradient_reaches_every_parameter(changes):
    net = small(**changes)
    labels = torch.tensor([0, 1]) if "num_class_embeds" in changes else None
    net(torch.randn(2, 3, 8, 8), torch.tensor([3, 700]), labels).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    # Softmax does not see the bias of the keys: its gradient is 0, not rounding that Adam would scale up.
    still = [k for k, p in net.named_parameters() if not p.grad.any()]
    assert still == [k for k, _ in net.named_parameters() if k.endswith("to_k.bias")]


def test_no_two_gradients_share_memory():
    unet = UNet(**SMALL)
    unet(torch.randn(2, 3, 8, 8), torch.tensor([1, 2])).square().mean().backward()
    places = [(p.grad.untyped_storage().data_ptr(), p.grad.storage_offset()) for p in unet.parameters()]
    assert len(set(places)) == len(places)  # else clipping, or a second backward, changes one with the other


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dim", [8, 9])
def test_sinusoidal_embedding_formula(dim, shift, flip):
    half, steps = dim // 2, [0, 1, 10, 999]
    expected = []
    for t in steps:
        angles = [t / 10000 ** (k / (half - shift)) for k in range(half)]
        sin, cos = [math.sin(a) for a in angles], [math.cos(a) for a in angles]
        expected.append((cos + sin if flip else sin + cos) + [0.0] * (dim % 2))
    got = sinusoidal_embedding(torch.tensor(steps), dim, shift, flip)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-4)


def test_time_embedding_is_the_mlp_of_the_sinusoids():
    net, t = small(freq_shift=1, flip_sin_to_cos=False), torch.tensor([0, 5, 999])
    w = net.state_dict()
    h = sinusoidal_embedding(t, 8, 1, False) @ w["time_embedding.linear_1.weight"].T
    h = h + w["time_embedding.linear_1.bias"]
    h = h * torch.sigmoid(h) @ w["time_embedding.linear_2.weight"].T + w["time_embedding.linear_2.bias"]
    got = net.time_embedding(t)
    assert got.shape == (3, 32)
    torch.testing.assert_close(got, h)


def test_fourier_projection_formula():
    proj, t = FourierProjection(5), torch.tensor([0.01, 1.0, 50.0])
    angle = 2 * math.pi * t.double().log()[:, None] * proj.weight.double()
    torch.testing.assert_close(proj(t).double(), torch.cat((angle.sin(), angle.cos()), 1), rtol=0, atol=1e-3)
    assert 8 < FourierProjection(4096).weight.std() < 24


def test_fourier_output_is_divided_by_the_noise_level():
    net, x, t = small(time_embedding_type="fourier"), torch.randn(2, 3, 8, 8), torch.tensor([0.5, 4.0])
    plain = small(time_embedding_type="positional", sample_size=None)
    state = {k: v for k, v in net.state_dict().items() if not k.startswith("time_")}
    plain.load_state_dict(state, strict=False)
    torch.testing.assert_close(net(x, t), plain(x, 0, emb=net.time_embedding(t)) / t[:, None, None, None])
    assert not [k for k, _ in net.named_parameters() if k.startswith("time_proj")]  # the features are fixed


@pytest.mark.parametrize(("head_dim", "heads"), [(None, 1), (4, 3)])
@pytest.mark.parametrize("groups", [None, 2])
def test_attention_against_naive_softmax(head_dim, heads, groups):
    layer, x = Attention(12, head_dim, groups, eps=1e-3, scale=2.0), torch.randn(2, 12, 3, 4)
    h = x if groups is None else F.group_norm(x, groups, eps=1e-3)
    h = h.reshape(2, 12, 12).transpose(1, 2)
    q, k, v = (f(h).reshape(2, 12, heads, 12 // heads) for f in (layer.to_q, layer.to_k, layer.to_v))
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(12 // heads)
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    h = layer.to_out[0](torch.einsum("bhnm,bmhd->bnhd", weights, v).reshape(2, 12, 12))
    expected = (x + h.transpose(1, 2).reshape(x.shape)) / 2
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("scale_shift", [False, True])
def test_resnet_block_formula(scale_shift):
    block = ResnetBlock(
        4, 6, emb_dim=5, groups=2, eps=1e-2, dropout=0.0, scale_shift=scale_shift, scale=2.0, resample=None
    )
    x, emb = torch.randn(2, 4, 5, 5), torch.randn(2, 5)
    h = block.conv1(F.silu(F.group_norm(x, 2, eps=1e-2)))
    e = (emb @ block.time_emb_proj.weight.T + block.time_emb_proj.bias)[:, :, None, None]
    added = 0 if scale_shift else e
    scale, shift = (1 + e[:, :6], e[:, 6:]) if scale_shift else (1, 0)
    h = F.group_norm(h + added, 2, eps=1e-2) * scale + shift
    torch.testing.assert_close(block(x, emb), (block.conv_shortcut(x) + block.conv2(F.silu(h))) / 2)


def test_dropout_acts_in_training_only():
    net, x = small(dropout=0.5), torch.randn(1, 3, 8, 8)
    assert torch.equal(net(x, 1), net(x, 1))
    net.train()
    assert not torch.equal(net(x, 1), net(x, 1))


def test_class_labels_change_the_output():
    net, x = small(num_class_embeds=3), torch.randn(1, 3, 8, 8).expand(2, -1, -1, -1)
    out = net(x, 5, torch.tensor([0, 2]))
    assert (out[0] - out[1]).abs().max() > 1e-3
    emb = net.time_embedding(torch.tensor([5])) + net.class_embedding.weight[2]
    plain = small()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if k != "class_embedding.weight"})
    torch.testing.assert_close(plain(x[1:], None, emb=emb), out[1:])


@pytest.mark.parametrize("kind", ["positional", "fourier"])
def test_every_form_of_t_and_emb_agree(kind):
    net, x = small(time_embedding_type=kind), torch.randn(2, 3, 8, 8)
    expected = net(x, torch.tensor([7, 7]))
    assert not torch.allclose(expected, net(x, torch.tensor([7, 8])))
    for t in (7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7.0, 7.0])):
        torch.testing.assert_close(net(x, t), expected)
    steps = net.time_embedding(torch.tensor([3, 7]))
    assert torch.equal(net.time_embedding(torch.tensor(7)), net.time_embedding(torch.tensor([7])))
    t = None if kind == "positional" else 7
    torch.testing.assert_close(net(x, t, emb=steps[1:]), expected)
    torch.testing.assert_close(net(x, t, emb=steps[1:].expand(2, -1)), expected)


@pytest.mark.parametrize("changes", [{}, RESNET, {"downsample_padding": 0}])
def test_channels_last(changes):
    net, x = small(**changes), torch.randn(2, 3, 16, 16)
    expected = net(x, 3)
    assert expected.is_contiguous()
    net.to(memory_format=torch.channels_last)
    got = net(x.to(memory_format=torch.channels_last), 3)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", ["positional", "fourier"])
def test_half_precision_keeps_its_type(kind):
    net = small(time_embedding_type=kind)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 30.0])
    expected = net(x, t) if kind == "positional" else None
    out = net.bfloat16()(x.bfloat16(), t)
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()
    if expected is not None:
        torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.1)


@pytest.mark.slow
def test_recomputed_blocks_give_the_same_gradients():
    """A block that took its skips from a list would find it empty when it runs again."""
    grads = []
    for again in (False, True):
        torch.manual_seed(0)
        net = small()
        for block in (*net.down_blocks, *net.up_blocks) if again else ():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        grads.append(torch.autograd.grad(net(X + 1, T).square().sum(), list(net.parameters())))
    torch.testing.assert_close(*grads)


def test_writers_of_files_find_no_two_weights_in_one_storage():
    """The weights of q, k and v lie one behind the other; a writer that goes by storages would keep one of them."""
    net = small()
    state = net.state_dict(prefix="net.")
    assert len({t.untyped_storage().data_ptr() for t in state.values()}) == len(state)
    assert all(t.nbytes == t.untyped_storage().nbytes() for t in state.values())
    for name, p in net.named_parameters():  # as of any module: the same memory, and nothing of the graph
        assert state[f"net.{name}"].data_ptr() == p.data_ptr() and torch.equal(state[f"net.{name}"], p)
        assert not state[f"net.{name}"].requires_grad
    assert all(p is net.get_parameter(name) for name, p in net.state_dict(keep_vars=True).items())
    assert all(t.is_shared() for t in small().share_memory().state_dict().values())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_are_independent(duplicate):
    net, x, t = small(time_embedding_type="fourier"), torch.randn(1, 3, 8, 8), torch.tensor([2.0])
    twin = duplicate(net)
    expected = net(x, t)
    assert torch.equal(twin(x, t), expected)
    twin.time_proj.weight.zero_()
    assert torch.equal(net(x, t), expected)
    assert not torch.equal(twin(x, t), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, (4, 5)),
        ({**RESNET, "time_embedding_type": "fourier", "num_class_embeds": 2}, (torch.tensor([4, 900]),)),
    ],
    ids=["positional", "fourier"],
)
def test_compiles_to_one_graph(changes, steps):
    net, x = small(**changes), torch.randn(2, 3, 8, 8)
    labels = torch.tensor([1, 0]) if "num_class_embeds" in changes else None
    torch.compiler.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with torch.no_grad():
        for t in steps:
            torch.testing.assert_close(compiled(x, t, labels), net(x, t, labels))
        emb = net.time_embedding(torch.tensor([6]))
        torch.testing.assert_close(compiled(x, steps[-1], labels, emb=emb), net(x, steps[-1], labels, emb=emb))


UNSUPPORTED = {
    "sample_size": [0, 9, (8, 9), (8,), "8"],
    "in_channels": [0],
    "out_channels": [1.5],
    "center_input_sample": ["yes"],
    "time_embedding_type": ["learned"],
    "time_embedding_dim": [0],
    "freq_shift": [4, -1],
    "flip_sin_to_cos": [None],
    "down_block_types": [("DownBlock2D",), ("DownBlock2D", "SkipDownBlock2D"), "DownBlock2D"],
    "up_block_types": [("UpBlock2D",) * 3, ("DownBlock2D", "UpBlock2D")],
    "mid_block_type": [None],
    "block_out_channels": [(), (8, 10), (8, -16), 8],
    "layers_per_block": [0, True],
    "mid_block_scale_factor": [0],
    "downsample_padding": [2],
    "downsample_type": ["avg"],
    "upsample_type": [None],
    "dropout": [1.0, float("nan")],
    "act_fn": ["relu"],
    "attention_head_dim": [3, 0],
    "norm_num_groups": [0],
    "attn_norm_num_groups": [3],
    "norm_eps": [0.0, "1e-5"],
    "resnet_time_scale_shift": ["ada_group"],
    "add_attention": [2],
    "class_embed_type": ["timestep"],
    "num_class_embeds": [0],
    "num_train_timesteps": [1000],
}


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, values in UNSUPPORTED.items() for v in values])
def test_constructor_errors_name_the_argument(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
        small(**{name: value})


X, T = torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("name", "classes", "inputs"),
    [
        ("x", None, {"x": X[:, :2]}),
        ("x", None, {"x": X[0]}),
        ("x", None, {"x": X.long()}),
        ("x", None, {"x": [[0.0]]}),
        ("x", None, {"x": X[:, :, :7]}),
        ("x", None, {"x": X[:, :, :0]}),
        ("x", None, {"x": X[:, :, :, :7]}),
        ("t", None, {"t": T.repeat(2)}),
        ("t", None, {"t": T[:, None]}),
        ("t", None, {"t": None}),
        ("t", None, {"t": "4"}),
        ("emb", None, {"emb": torch.zeros(2, 31)}),
        ("emb", None, {"emb": torch.zeros(3, 32)}),
        ("emb", None, {"emb": torch.zeros(32)}),
        ("class_labels", None, {"class_labels": T}),
        ("class_labels", 4, {}),
        ("class_labels", 4, {"class_labels": T.float()}),
        ("class_labels", 4, {"class_labels": T[:1]}),
        ("class_labels", 4, {"class_labels": [0, 1]}),
    ],
)
def test_forward_errors_name_the_argument(name, classes, inputs):
    net = small(num_class_embeds=classes)
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
        net(**{"x": X, "t": T, **inputs})


def test_fourier_needs_t_beside_emb():
    net = small(time_embedding_type="fourier")
    with pytest.raises(ValueError, match=r"^t: expected "):
        net(X, None, emb=net.time_embedding(torch.tensor([1])))


def test_time_embedding_rejects_a_matrix():
    with pytest.raises(ValueError, match=r"^t: expected "):
        small().time_embedding(T[:, None])


def test_numbers_of_numpy():
    """NumPy's numbers are Python's in the configuration, which JSON can hold."""
    whole, real = np.int64, np.float32
    options = {**SMALL, "sample_size": whole(8), "norm_num_groups": whole(4), "norm_eps": real(1e-5)}
    options["block_out_channels"] = tuple(map(whole, (8, 16)))
    model = UNet(**options)
    assert json.loads(json.dumps(model.config)) == model.config
    assert type(model.config["sample_size"]) is int and type(model.config["block_out_channels"][0]) is int
    x = torch.zeros(1, model.conv_in.in_channels, 8, 8)
    assert torch.equal(model(x, whole(3)), model(x, 3))
