"""The transformer: diffusers' arithmetic and files, and what the formulations ask of a network."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastdiff
from fastdiff import DDPM, DiT, Edm, FlowMatching
from fastdiff.kernels import layer_norm as kernels
from fastdiff.recipes import drop_labels
from fastdiff.training.layout import recompute_blocks

SMALL = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 3, "num_layers": 2, "sample_size": 8,
    "num_embeds_ada_norm": 5,
}  # fmt: skip
CONFIGS = {
    "plain": {},
    "learned variance, no bias": {"out_channels": 6, "attention_bias": False, "norm_eps": 1e-3},
    "another size than x has": {"sample_size": 16, "patch_size": 4, "dropout": 0.5},
}


def stock(**changes) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(**SMALL | changes).eval()


def moved(**changes) -> DiT:
    """A DiT whose weights are not those that it starts with."""
    torch.manual_seed(0)
    dit = DiT(**SMALL | changes)
    with torch.no_grad():
        for p in dit.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return dit.eval()


def inputs(h: int = 8, w: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(2, 3, h, w, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([3, 700]), torch.tensor([0, 5])


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients_are_those_of_diffusers(name):
    theirs = stock(**CONFIGS[name])
    ours = DiT(**SMALL | CONFIGS[name]).eval()
    assert ours.load_state_dict(theirs.state_dict()).missing_keys == []
    x, t, labels = inputs()
    x.requires_grad_()
    want, got = theirs(x, timestep=t, class_labels=labels).sample, ours(x, t, labels)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(want)
    grads = []
    for net, out in ((theirs, want), (ours, got)):
        grads.append(
            dict(zip(names(net), torch.autograd.grad((out * weight).sum(), [x, *net.parameters()]), strict=True))
        )
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=1e-4, atol=1e-4, msg=key)


def names(net: torch.nn.Module) -> list[str]:
    return ["x", *(name for name, _ in net.named_parameters())]


def test_positions_of_an_image_that_is_not_square():
    """As diffusers' for that grid, rows and columns as far apart as in an image of sample_size."""
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    dit = moved()
    want = get_2d_sincos_pos_embed(16, (2, 6), base_size=4)
    torch.testing.assert_close(dit._positions(2, 6, torch.device("cpu")), want.float(), rtol=1e-6, atol=1e-6)
    x, t, labels = inputs(4, 12)
    assert dit(x, t, labels).shape == x.shape
    # The patch at row 1 and column 5 lies where it came from: no other one depends on it at once.
    torch.testing.assert_close(dit.pos_embed(x)[:, 11], dit.pos_embed(x[:, :, 2:, 10:])[:, 0])


def test_files_are_those_of_diffusers(tmp_path):
    theirs, (x, t, labels) = stock(), inputs()
    theirs.save_pretrained(tmp_path / "net")
    pipeline = DiTPipeline(theirs, AutoencoderKL(block_out_channels=(4,), norm_num_groups=4), DDIMScheduler())
    pipeline.save_pretrained(tmp_path / "pipeline")
    with torch.no_grad():
        want = theirs(x, timestep=t, class_labels=labels).sample
        for folder in ("net", "pipeline"):
            ours = DiT.from_pretrained(tmp_path / folder)
            assert not ours.training
            torch.testing.assert_close(ours(x, t, labels), want, rtol=1e-5, atol=1e-5)
        ours.save_pretrained(tmp_path / "back")
        back = DiTTransformer2DModel.from_pretrained(tmp_path / "back")
        torch.testing.assert_close(back(x, timestep=t, class_labels=labels).sample, want, rtol=1e-5, atol=1e-5)
    assert DiT.from_pretrained(tmp_path / "net", torch_dtype=torch.bfloat16).proj_out_2.weight.dtype == torch.bfloat16


def test_files_of_the_first_published_models(tmp_path):
    """Their class has options that a DiT lacks; one that is used is refused, as are absurd sizes."""
    stock().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = {**json.loads(path.read_text()), "_class_name": "Transformer2DModel"}
    unused = {"cross_attention_dim": None, "only_cross_attention": False, "attention_type": "default"}
    path.write_text(json.dumps(config | unused))
    assert DiT.from_pretrained(tmp_path).sample_shape == (3, 8, 8)
    for change, said in (
        ({"cross_attention_dim": 8}, "cross_attention_dim"),
        ({"norm_type": "ada_norm_single"}, "norm_type: expected 'ada_norm_zero'"),
        ({"num_layers": 10**9}, "1000000000 layers"),
        ({"num_layers": 3}, "it has no tensor 'transformer_blocks.2"),
        ({"num_embeds_ada_norm": 7}, "the configuration gives the shape"),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=said):
            DiT.from_pretrained(tmp_path)


def test_what_follows_from_the_time_is_ready_before():
    dit, (x, t, labels) = moved(), inputs()
    with torch.no_grad():
        want = dit(x, t, labels)
        emb = dit.time_arguments(t)["emb"]
        assert torch.equal(dit(x, None, labels, emb=emb), want)
        row = dit.time_arguments(t[:1])["emb"]
        torch.testing.assert_close(dit(x, None, labels, emb=row), dit(x, t[:1], labels), rtol=1e-6, atol=1e-6)


def test_it_starts_as_the_paper_says():
    """Blocks are the identity, and the output is 0."""
    torch.manual_seed(0)
    dit, (x, t, labels) = DiT(**SMALL), inputs()
    tokens = torch.randn(2, 16, 16)
    assert torch.equal(dit.transformer_blocks[0](tokens, t, labels)[0], tokens)
    assert not dit(x, t, labels).any()
    assert dit.pos_embed.proj.weight.abs().max() <= (6 / (12 + 16)) ** 0.5  # Xavier's bound for 12 inputs, 16 outputs


def test_no_label_is_the_last_one():
    dit, (x, t, _) = moved(), inputs()
    with torch.no_grad():
        assert torch.equal(dit(x, t), dit(x, t, torch.tensor([5, 5])))
        assert not torch.equal(dit(x, t), dit(x, t, torch.tensor([0, 5])))


MODELS = {
    "ddpm": lambda: DDPM(DiT(**SMALL), "cosine", 50, "v"),
    "learned": lambda: DDPM(DiT(**SMALL, out_channels=6), "cosine", 50, "v", loss="hybrid", variance="learned"),
    "flow": lambda: FlowMatching(DiT(**SMALL)),
    "edm": lambda: Edm(DiT(**SMALL)),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_formulation_trains_and_samples(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x0 = torch.tanh(inputs()[0])
    losses = []
    t, labels = model.times_at(torch.tensor([0.3, 0.6])), torch.tensor([0, 4])
    for _ in range(12):
        loss = model(x0, t=t, seed=1, class_labels=drop_labels(labels, none=5, share=0.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    none = torch.tensor([5, 5])
    how = {"steps": 3, "seed": 0, "sampler": "ddim", "class_labels": labels}
    plain = model.sample(2, **how)
    assert plain.shape == (2, 3, 8, 8) and plain.isfinite().all()
    torch.testing.assert_close(model.sample(2, guidance=1.0, uncond={"class_labels": none}, **how), plain)
    assert not torch.allclose(model.sample(2, guidance=3.0, uncond={"class_labels": none}, **how), plain)
    with pytest.raises(ValueError, match="class_labels: expected values from 0 to 5, got 6"):
        model.sample(2, **how | {"class_labels": torch.tensor([0, 6])})


@pytest.mark.slow
def test_it_compiles_whole():
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import

    dit, (x, t, labels) = moved(), inputs()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(dit, backend=counter, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, t, labels), dit(x, t, labels))
    assert counter.frame_count == 1


def test_recomputed_blocks_give_the_same_gradients():
    grads = []
    for recompute in (False, True):
        dit, (x, t, labels) = moved(), inputs()
        calls = []
        dit.transformer_blocks[1].attn1.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        if recompute:
            recompute_blocks(dit)
        grads.append(torch.autograd.grad(dit(x, t, labels).square().sum(), list(dit.parameters())))
        assert len(calls) == 1 + recompute
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_layers": 0}, "num_layers: expected a positive int, got 0"),
        ({"attention_head_dim": 7}, "attention_head_dim: expected a width"),
        ({"sample_size": 9}, "sample_size: expected a multiple of patch_size=2, got 9"),
        ({"dropout": 1.0}, r"dropout: expected a number in \[0, 1\), got 1.0"),
        ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm: expected an int of at least 0, got None"),
        ({"activation_fn": "geglu"}, "activation_fn: expected 'gelu-approximate', got 'geglu'"),
    ],
)
def test_wrong_options(change, said):
    with pytest.raises(ValueError, match=said):
        DiT(**SMALL | change)


def test_wrong_inputs():
    dit, (x, t, labels) = moved(), inputs()
    for given, said in (
        ((x[:, :2], t, labels), "x: expected C = 3, H and W multiples of 2"),
        ((x[..., :0], t, labels), "x: expected C = 3, H and W multiples of 2"),
        ((x[0], t, labels), r"x: expected a floating tensor \(B, C, H, W\)"),
        ((x, t[None], labels), r"t: expected shape \(2,\)"),
        ((x, t, labels[:1]), r"class_labels: expected an integer tensor \(2,\)"),
        ((x, t, labels.float()), r"class_labels: expected an integer tensor \(2,\)"),
        ((x, None, labels, torch.zeros(2, 16)), r"emb: expected shape \(2 or 1, 2, 16\)"),
    ):
        with pytest.raises(ValueError, match=said):
            dit(*given)


class Added(torch.nn.Module):
    """A layer around another, as LoRA's are; it has no attributes of the one inside."""

    def __init__(self, base: torch.nn.Module) -> None:
        super().__init__()
        self.base, self.share = base, torch.nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.share * x.sum()


def test_every_linear_layer_may_be_another():
    dit = moved()
    before = dit(*inputs())
    for name, layer in [*dit.named_modules()]:
        if isinstance(layer, torch.nn.Linear):
            parent, _, last = name.rpartition(".")
            setattr(dit.get_submodule(parent), last, Added(layer))
    after = dit(*inputs())
    after.sum().backward()
    assert torch.equal(after, before)
    assert all(p.grad is not None for name, p in dit.named_parameters() if name.endswith("share"))


def test_norms_and_sums_are_one_kernel_without_a_gradient(monkeypatch):
    """Five launches, of two blocks and the last norm. Hooks of the layers between them, and other layers, still run."""
    launched, seen = [], []
    launch = kernels.launch
    monkeypatch.setattr(kernels, "launch", lambda *args, **given: (launched.append(given), launch(*args, **given)))
    dit = moved()
    dit.transformer_blocks[0].register_forward_pre_hook(lambda block, given: seen.append(given[0].is_contiguous()))
    dit.transformer_blocks[0].attn1.register_forward_hook(lambda layer, x, y: (seen.append(x[0]), 2 * y)[1])
    dit.transformer_blocks[1].ff = Added(dit.transformer_blocks[1].ff)
    want = dit(*inputs())
    with fastdiff.backend("triton"):
        torch.testing.assert_close(dit(*inputs()), want)
        assert not launched
        with torch.no_grad():
            torch.testing.assert_close(dit(*inputs()), want, rtol=1e-4, atol=1e-5)
    assert [given["sum_ptr"] is None for given in launched] == [True, False, True, False, True]
    assert all(seen[::2])  # no kernel has to copy its tokens
    torch.testing.assert_close(seen[5], seen[1], rtol=1e-4, atol=1e-5)


def test_fake_tensors_leave_no_table_behind():
    dit, (x, t, labels) = moved(), inputs()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        dit(*map(fake.from_tensor, (x, t, labels)))
    assert torch.equal(dit(x, t, labels), moved()(x, t, labels))
