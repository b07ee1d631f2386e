"""Sampling with a copy of the model in bfloat16 or float16: what is cast, how it follows, and how far it may be off."""

import copy
import pickle
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from fastdiff import DDPM, NCSN, ScoreSDE, UNet
from fastdiff.cast import TYPES, weights_cast
from fastdiff.nn import TimeEmbedding

SHAPE = (2, 3, 8, 8)
CASTS = pytest.mark.parametrize("dtype", TYPES, ids=str)


def unet(**options) -> UNet:
    torch.manual_seed(0)
    return UNet(
        sample_size=8, block_out_channels=(8, 16), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), layers_per_block=1, norm_num_groups=4, **options,
    )  # fmt: skip


@pytest.mark.slow
@CASTS
@pytest.mark.parametrize(
    "make",
    [
        lambda net: DDPM(net, "cosine", 20, "v"),
        lambda net: ScoreSDE(net, "vp", "v", clip=1.0),
        lambda net: NCSN(net, levels=4, objective="eps", clip=1.0),
    ],
)
def test_samples_are_those_of_the_model_up_to_its_rounding(make, dtype):
    model = make(unet(time_embedding_type="fourier") if "NCSN" in str(make.__code__.co_names) else unet())
    options = {"steps": 3, "seed": 1}
    want = model.sample(2, **options)
    got = model.sample(2, dtype=dtype, **options)
    assert got.dtype == torch.float32 and not torch.equal(got, want)
    # every layer rounds its output, and the state is of order 1
    torch.testing.assert_close(got, want, rtol=0, atol=40 * torch.finfo(dtype).eps)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert torch.equal(model.sample(2, **options), want)


def test_the_copy_is_cast_and_laid_out_once():
    model = DDPM(unet(), "cosine", 20)
    first = model.cast(torch.bfloat16)
    assert first is not model and first.dtype == torch.float32 and first.parameter_dtype == torch.bfloat16
    net = first.model
    assert net is not model.model and not net.conv_out.weight.requires_grad
    assert net.conv_out.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.model.conv_out.weight.is_contiguous()
    again = model.cast(torch.bfloat16).model
    assert again is net
    assert model.cast(None) is model and model.cast(torch.bfloat16).cast(torch.bfloat16).model is net
    assert model.cast(torch.float16).model is not net


def test_the_copy_follows_the_weights():
    """In place, through .data, by a new tensor and by a new module; in memory that does not move while it can."""
    model = DDPM(unet(), "cosine", 20)
    net = model.cast(torch.bfloat16).model
    place = net.conv_in.weight.data_ptr()

    def follows() -> nn.Module:
        cast = model.cast(torch.bfloat16).model
        for (name, got), want in zip(cast.named_parameters(), model.model.parameters(), strict=True):
            assert torch.equal(got, want.bfloat16()), name
        return cast

    with torch.no_grad():
        model.model.conv_in.weight.mul_(2)
    model.model.conv_out.bias.data.add_(1)
    assert follows() is net and net.conv_in.weight.data_ptr() == place
    model.model.conv_in.weight.data = torch.ones_like(model.model.conv_in.weight)
    assert follows() is net
    model.model.conv_in.weight = nn.Parameter(torch.zeros_like(model.model.conv_in.weight))
    assert follows() is not net
    model.model.conv_in = copy.deepcopy(model.model.conv_in)
    follows()


def test_weights_that_lie_alike_are_copied_together(monkeypatch):
    """On a GPU one tensor of other strides would make a kernel of each."""
    model, calls = DDPM(unet(), "cosine", 20), []
    model.cast(torch.bfloat16)
    copy_ = torch._foreach_copy_

    def noted(mine: list[Tensor], given: list[Tensor]) -> None:
        calls.append([a.stride() == b.stride() for a, b in zip(mine, given, strict=True)])
        copy_(mine, given)

    monkeypatch.setattr(torch, "_foreach_copy_", noted)
    model.cast(torch.bfloat16)
    assert sorted(map(set, calls), key=str) == [{False}, {True}]


class Tied(nn.Module):
    """One tensor under two names, a buffer, and an integer that no type takes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.full((3,), 0.1))
        self.register_buffer("count", torch.tensor(2**20 + 1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        assert x.dtype == self.shift.dtype == self.first.weight.dtype
        return self.second(self.first(x)) + self.shift


def test_tied_weights_stay_tied_and_copies_are_empty():
    model = ScoreSDE(Tied(), objective="v")
    cast = model.cast(torch.bfloat16).model
    assert cast.first.weight is cast.second.weight and cast.count == 2**20 + 1 and cast.count.dtype == torch.int64
    assert model.sample((2, 3), steps=2, dtype=torch.bfloat16).isfinite().all()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not other._casts._copies
        assert other.cast(torch.bfloat16).model is not cast
    assert [k for k in model.state_dict() if "cast" in k] == []


@pytest.mark.slow
def test_weights_that_a_hook_makes_are_cast_too():
    """They are no parameters: the copy makes its own, of those that follow."""
    net = unet()
    prune.l1_unstructured(net.conv_out, "weight", 0.5)
    model = ScoreSDE(net, objective="v")
    for scale in (1.0, 3.0):
        net.conv_out.weight_orig.data.mul_(scale)
        wanted = model.sample(SHAPE, steps=2, seed=1)
        model(torch.zeros(SHAPE))  # it leaves a weight with a graph, which cannot be copied
        rounded = model.sample(SHAPE, steps=2, seed=1, dtype=torch.bfloat16)
        assert (rounded - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_what_depends_on_time_alone_is_computed_in_float32():
    """Frequencies of the noise level would lose their phase in bfloat16: w log sigma reaches some hundred."""
    net = unet(time_embedding_type="fourier")
    model = NCSN(net, 50.0, 0.01, 10)
    sigma = torch.tensor([0.01, 3.0, 50.0])
    exact = net.time_arguments(sigma)
    rounded = model.cast(torch.bfloat16).time_arguments(sigma)
    for name, rows in exact.items():
        assert rounded[name].dtype == torch.bfloat16 and torch.equal(rounded[name], rows.bfloat16())


def test_other_types_are_refused():
    model, state = DDPM(unet(), "cosine", 20), torch.get_rng_state()
    for dtype in (torch.float64, torch.int8, "bfloat16"):
        with pytest.raises(TypeError, match=r"dtype: expected torch\.bfloat16 or torch\.float16, got"):
            model.sample(2, dtype=dtype)
    with pytest.raises(ValueError, match=r"expected no steps, .*dtype, graph or grad_steps"):
        model.sample(2, sampler="ode", dtype=torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), state)


def gradients(model: nn.Module, block: AbstractContextManager[None]) -> list[Tensor]:
    torch.manual_seed(1)
    model.zero_grad()
    with block, torch.autocast("cpu", torch.bfloat16):
        model(torch.linspace(-1, 1, 2 * 3 * 64).reshape(SHAPE)).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.slow
def test_weights_that_are_cast_together_have_the_gradients_of_autocast():
    model = DDPM(unet(), "cosine", 20)
    conv, weight = model.model.conv_in, model.model.conv_in.weight
    wanted = gradients(model, nullcontext())
    with pytest.raises(KeyError), weights_cast(model.model, torch.bfloat16):
        assert conv.weight.dtype == torch.bfloat16 and torch.equal(conv.weight, weight.bfloat16())
        assert model.model.conv_norm_out.weight.dtype == torch.float32
        raise KeyError
    assert conv.weight is weight
    got = gradients(model, weights_cast(model.model, torch.bfloat16))
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == torch.float32 and one.stride() == other.stride()
        # the sum of a bias and the time embedding is rounded once more
        assert (one - other).norm() <= 16 * torch.finfo(torch.bfloat16).eps * other.norm() + 1e-4


def test_a_weight_of_two_layers_is_cast_once():
    net, x = Tied(), torch.ones(2, 3)
    with weights_cast(net, torch.bfloat16):
        assert net.first.weight is net.second.weight and net.first.bias is not net.second.bias
        net.second(net.first(x.bfloat16())).sum().backward()
    assert net.first.weight.grad.abs().min() > 0 and net.shift.dtype == torch.float32
    net.second.bias.requires_grad_(False)
    with weights_cast(net, torch.bfloat16):
        assert net.second.bias.dtype == torch.float32  # one without a gradient


@pytest.mark.parametrize(
    "change",
    [lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5), lambda layer: nn.Sequential(layer)],
    ids=["pruned", "wrapped"],
)
def test_times_are_embedded_in_the_type_of_the_parameters(change):
    """Not in that of an attribute `weight`, which pruning keeps in the type of before, and a wrapper has not."""
    embedding = TimeEmbedding(lambda t: t[:, None] / 10, 1, 4)
    embedding.linear_1 = change(embedding.linear_1)
    assert embedding.double()(torch.tensor([1.0, 2.0])).dtype == torch.float64
