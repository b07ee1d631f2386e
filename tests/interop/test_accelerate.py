"""accelerate and restore on networks and pipelines of diffusers, against the stock ones."""

import copy
from types import SimpleNamespace

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D
from small_models import RESNET, SMALL
from strategies import DEVICE
from torch import nn
from torch.nn.utils import parametrize, prune

import fastdiff
from benchmarks.torchvision_standin import stock
from fastdiff.interop import diffusers as ours
from fastdiff.support.plain import is_plain

# NumPy, in the interpreter, on exp(-u) beyond the range of float32.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    # Of diffusers with NumPy 2, once for each level of a schedule.
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]


def unet(**changes) -> nn.Module:
    config = {**SMALL, "block_out_channels": (4, 8), "norm_num_groups": 2, "attention_head_dim": 4}
    return diffusers.UNet2DModel(**config | changes)


def resnet_sampling() -> nn.Module:
    return unet(**RESNET, resnet_time_scale_shift="scale_shift", mid_block_scale_factor=2.0)


def conditional(**changes) -> nn.Module:
    config = {
        "sample_size": 8,
        "block_out_channels": (4, 8),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "cross_attention_dim": 4,
        "attention_head_dim": 2,
    }
    return diffusers.UNet2DConditionModel(**config | changes)


def autoencoder() -> nn.Module:
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
    )


NETWORKS = {"unet": unet, "resnet sampling": resnet_sampling, "conditional": conditional, "autoencoder": autoencoder}


def made(name) -> nn.Module:
    torch.manual_seed(0)
    net = NETWORKS[name]()
    with torch.no_grad():  # norms that are not the identity
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def output(net) -> torch.Tensor:
    random, device = torch.Generator().manual_seed(1), next(net.parameters()).device
    x = torch.randn(2, getattr(net.config, "in_channels", 3), 8, 8, generator=random).to(device)
    if isinstance(net, diffusers.AutoencoderKL):
        return net(x).sample
    t = torch.tensor([3, 700], device=device)
    if isinstance(net, diffusers.UNet2DConditionModel):
        return net(x, t, torch.randn(2, 3, 4, generator=random).to(device)).sample
    return net(x, t).sample


def with_gradients(net) -> list[torch.Tensor]:
    y = output(net)
    # The bias of attention's keys moves nothing; its gradient is rounding.
    parameters = [p for name, p in net.named_parameters() if not name.endswith("to_k.bias")]
    return [y, *torch.autograd.grad(y.square().mean(), parameters, allow_unused=True)]


def close(got, want, atol=1e-5):
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)


def parts(net) -> list[str]:
    """What is fused: U-Nets and their blocks, transformers and their layers, and norms that are not within a block."""
    blocks = {n for n, m in net.named_modules() if isinstance(m, ResnetBlock2D)}
    layers = Transformer2DModel, BasicTransformerBlock, GEGLU
    layers += diffusers.UNet2DModel, diffusers.UNet2DConditionModel, UpBlock2D, CrossAttnUpBlock2D
    transformers = [n for n, m in net.named_modules() if isinstance(m, layers)]
    # Those outside of transformers have a sum after them.
    transformers += [n for n, m in net.named_modules() if isinstance(m, Attention) and not m.residual_connection]
    norms = [n for n, m in net.named_modules() if isinstance(m, nn.GroupNorm) and n.rpartition(".")[0] not in blocks]
    return sorted([*blocks, *transformers, *norms])


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("training", [False, True])
def test_same_outputs_gradients_and_names(name, training):
    net = made(name).train(training)
    fused = parts(net)
    want, keys, parameters = with_gradients(net), list(net.state_dict()), [id(p) for p in net.parameters()]
    assert sorted(fastdiff.accelerate(net)) == fused and len(fused) >= 9
    close(with_gradients(net), want)
    assert list(net.state_dict()) == keys and [id(p) for p in net.parameters()] == parameters
    assert fastdiff.accelerate(net) == []
    twin = copy.deepcopy(net)
    close(with_gradients(twin), want)
    assert sorted(fastdiff.restore(net)) == fused and fastdiff.restore(net) == []
    assert all(type(m) is ResnetBlock2D for m in net.modules() if isinstance(m, ResnetBlock2D))
    assert all(type(m) is nn.GroupNorm for m in net.modules() if isinstance(m, nn.GroupNorm))
    for kind in (Transformer2DModel, BasicTransformerBlock, Attention, GEGLU):
        assert all(type(m) is kind for m in net.modules() if isinstance(m, kind))
    close(with_gradients(net), want, atol=0)
    assert sorted(fastdiff.restore(twin)) == fused


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet sampling", "conditional", "autoencoder"])
def test_the_kernel_runs(name, monkeypatch):
    """For every norm, and gives the same results."""
    net = made(name).eval().to(DEVICE)
    want = with_gradients(net)
    fastdiff.accelerate(net)
    calls = []
    launchers = fastdiff.ops.dispatch.launchers("triton")
    launch = launchers.norm
    monkeypatch.setattr(launchers, "norm", lambda **operands: calls.append(0) or launch(**operands))
    with fastdiff.backend("triton"):
        close(with_gradients(net), want, atol=1e-4)
    assert len(calls) == sum(isinstance(m, nn.GroupNorm) for m in net.modules())


def test_saved_weights_and_configuration_are_stock(tmp_path):
    net = made("unet").eval()
    fastdiff.accelerate(net)
    net.save_pretrained(tmp_path)
    again = diffusers.UNet2DModel.from_pretrained(tmp_path)
    close([output(again.eval())], [output(net)])
    assert not fastdiff.restore(again)


def test_blocks_that_do_something_else_are_left():
    net = made("unet")
    first, second, third, *_ = (m for m in net.modules() if isinstance(m, ResnetBlock2D))
    first.nonlinearity = nn.GELU()
    second.norm1 = nn.Identity()
    third.norm2.register_forward_hook(lambda *args: None)
    names = {m: n for n, m in net.named_modules()}
    with pytest.warns(UserWarning, match="accelerate left 3 parts as they are"):
        replaced = fastdiff.accelerate(net)
    assert replaced and not {names[m] for m in (first, second, third)} & set(replaced)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_a_pipeline_gives_the_same_images(name):
    """And its scheduler keeps the configuration, and tables that were changed by hand."""
    scheduler = getattr(diffusers, name)(num_train_timesteps=50, beta_end=0.3)
    pipeline = diffusers.DDPMPipeline(made("unet"), scheduler)
    pipeline.set_progress_bar_config(disable=True)

    def images():
        random = torch.Generator().manual_seed(3)
        x = torch.randn(2, 3, 8, 8, generator=random)
        pipeline.scheduler.set_timesteps(6)
        with torch.no_grad():
            for t in pipeline.scheduler.timesteps:
                x = pipeline.scheduler.step(pipeline.unet(x, t).sample, t, x, generator=random).prev_sample
        return x

    want = images()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.clone()
    replaced = sorted(["scheduler", *(".".join(filter(None, ("unet", n))) for n in parts(pipeline.unet))])
    assert sorted(fastdiff.accelerate(pipeline)) == replaced
    assert type(pipeline.scheduler) is getattr(ours, name)
    assert pipeline.scheduler.alphas_cumprod is scheduler.alphas_cumprod
    assert torch.equal(pipeline.scheduler.timesteps, scheduler.timesteps)
    assert dict(pipeline.scheduler.config) == dict(scheduler.config)
    torch.testing.assert_close(images(), want, rtol=0, atol=1e-4)
    assert fastdiff.accelerate(pipeline) == []
    assert sorted(fastdiff.restore(pipeline)) == replaced
    assert type(pipeline.scheduler) is getattr(diffusers, name)
    assert not {"_tables", "_last_run", "fused_noise"} & set(vars(pipeline.scheduler))
    torch.testing.assert_close(images(), want, rtol=0, atol=0)


def test_a_pipeline_that_was_accelerated_is_saved_as_stock(tmp_path):
    pipeline = diffusers.DDPMPipeline(made("unet"), diffusers.DDPMScheduler())
    fastdiff.accelerate(pipeline)
    pipeline = diffusers.DDPMPipeline(**pipeline.components)  # as from_pipe makes one
    pipeline.save_pretrained(tmp_path)
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is diffusers.DDPMScheduler and not fastdiff.restore(again)


def test_another_pipeline_takes_an_accelerated_network_over():
    """It asks for the exact type of a network."""
    pipeline = diffusers.DDPMPipeline(made("unet"), diffusers.DDPMScheduler())
    fastdiff.accelerate(pipeline)
    assert diffusers.DDIMPipeline.from_pipe(pipeline).unet is pipeline.unet
    kind = type(pipeline.unet)
    assert kind == diffusers.UNet2DModel != diffusers.UNet2DConditionModel and kind != diffusers.UNet2DConditionModel


@pytest.mark.slow
def test_other_schedulers_and_networks_are_left():
    pipeline = diffusers.DDPMPipeline(made("unet"), diffusers.SASolverScheduler())
    with pytest.warns(UserWarning, match="SASolverScheduler has no fused scheduler"):
        assert "scheduler" not in fastdiff.accelerate(pipeline)
    assert type(pipeline.scheduler) is diffusers.SASolverScheduler
    assert fastdiff.accelerate(nn.Sequential(nn.GroupNorm(1, 2), nn.SiLU())) == []


def test_the_network_of_denoising_diffusion_pytorch_has_no_group_norm():
    net = stock().Unet(dim=8, dim_mults=(1, 2))
    assert not any(isinstance(m, nn.GroupNorm) for m in net.modules())
    assert fastdiff.accelerate(net) == [] and fastdiff.restore(net) == []


@pytest.mark.parametrize("call", [fastdiff.accelerate, fastdiff.restore])
def test_anything_else_is_refused(call):
    with pytest.raises(TypeError, match=r"^target: expected a pipeline of diffusers or an nn\.Module, got dict$"):
        call({})


@pytest.mark.slow
def test_compiles_to_one_graph():
    """With transformers, attention with a norm of its own, a middle block that divides, and blocks that scale, shift
    and sample."""
    torch.manual_seed(0)
    config = {
        "down_block_types": ("AttnDownBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "CrossAttnUpBlock2D"),
        "mid_block_type": "UNetMidBlock2D",
        "mid_block_scale_factor": 2.0,
        "resnet_time_scale_shift": "scale_shift",
    }
    net = conditional(**config).eval()
    random = torch.Generator().manual_seed(1)
    x, t, text = torch.randn(2, 4, 8, 8, generator=random), torch.tensor([3, 700]), torch.ones(2, 3, 4)
    torch.compiler.reset()
    with torch.no_grad():
        want = net(x, t, text, return_dict=False)
        fastdiff.accelerate(net)
        close(torch.compile(net, backend="eager", fullgraph=True)(x, t, text, return_dict=False), want)


class Doubled(nn.GroupNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class Scaled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Logged(torch.Tensor):
    """A tensor of another class, as DTensor and quantized weights are; its norm gives twice the result."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs)
        return 2 * result.as_subclass(torch.Tensor) if function is nn.functional.group_norm else result


def foreign(norm):
    norm.weight = nn.Parameter(norm.weight.detach().as_subclass(Logged))


def without_bias(norm):
    made = nn.GroupNorm(1, norm.num_channels)
    made.register_parameter("bias", None)
    return made


# What people do to the norms of a network, each with an effect that is seen only if the norm is called.
TREATMENTS = {
    "a forward hook": lambda block: block.norm1.register_forward_hook(lambda m, x, y: 2 * y),
    "a pre-hook": lambda block: block.norm2.register_forward_pre_hook(lambda m, x: (x[0].flip(1),)),
    "a wrapped forward": lambda block: setattr(
        block.norm1, "forward", lambda x, forward=block.norm1.forward: 2 * forward(x)
    ),
    "pruning": lambda block: prune.random_unstructured(block.norm1, "weight", amount=0.5),
    "a parametrization": lambda block: parametrize.register_parametrization(block.norm2, "weight", Scaled()),
    "a subclass": lambda block: setattr(block.norm1, "__class__", Doubled),
    "another layer": lambda block: setattr(block, "norm2", nn.Identity()),
    "foreign tensors": lambda block: foreign(block.norm1),
    "another activation": lambda block: setattr(block, "nonlinearity", nn.GELU()),
    "a hook on the activation": lambda block: block.nonlinearity.register_forward_hook(lambda m, x, y: 2 * y),
    "a norm without weights": lambda block: setattr(
        block, "norm1", nn.GroupNorm(2, block.norm1.num_channels, affine=False)
    ),
    "a norm without a bias": lambda block: setattr(block, "norm1", without_bias(block.norm1)),
    "offloading": lambda block: cpu_offload(block, execution_device=torch.device("cpu")),
}


@pytest.mark.slow
@pytest.mark.parametrize("treatment", TREATMENTS)
@pytest.mark.parametrize("name", ["unet", "resnet sampling"])
def test_norms_that_are_changed_afterwards_are_called(name, treatment):
    """On the accelerated network as on the stock one."""
    nets = made(name).eval(), made(name).eval()
    plain, blocks = output(nets[0]), fastdiff.accelerate(nets[1])
    for net in nets:
        for block in (m for m in net.modules() if isinstance(m, ResnetBlock2D)):
            torch.manual_seed(2)
            TREATMENTS[treatment](block)
    with torch.no_grad():
        want, got = (output(net) for net in nets)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert treatment == "offloading" or not torch.allclose(plain, want, atol=1e-3)
    assert len(blocks) >= 6


def test_a_patched_forward_of_the_class_is_called(monkeypatch):
    """As tools do that reuse features or skip blocks."""
    nets = made("unet").eval(), made("unet").eval()
    plain = output(nets[0])
    fastdiff.accelerate(nets[1])
    forward = ResnetBlock2D.forward
    monkeypatch.setattr(ResnetBlock2D, "forward", lambda self, *args, **kwargs: 2 * forward(self, *args, **kwargs))
    want, got = (output(net) for net in nets)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(want, plain, atol=1e-3)


def test_parameters_may_be_swapped_for_a_call():
    """By torch.func.functional_call, and the norms stay fused."""
    net = made("unet").eval()
    changed = {name: 1.1 * p.detach() for name, p in net.named_parameters()}
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 700])
    want = torch.func.functional_call(net, changed, (x, t)).sample
    fastdiff.accelerate(net)
    close([torch.func.functional_call(net, changed, (x, t)).sample], [want])


def test_plain_modules():
    norm = nn.GroupNorm(2, 4)
    assert is_plain(norm, nn.GroupNorm) and not is_plain(norm, nn.BatchNorm2d)
    assert is_plain(nn.GroupNorm(2, 4, affine=False), nn.GroupNorm)
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    assert not is_plain(norm, nn.GroupNorm)
    handle.remove()
    assert is_plain(norm, nn.GroupNorm)
    with torch._subclasses.FakeTensorMode():
        assert is_plain(nn.GroupNorm(2, 4), nn.GroupNorm)


@pytest.mark.slow
def test_plain_norms_stay_fused_under_the_compiler():
    """Which would otherwise trace the slow way without a word."""
    norm = nn.GroupNorm(2, 4)
    torch.compiler.reset()
    traced = torch.compile(lambda x: x + is_plain(norm, nn.GroupNorm), backend="eager", fullgraph=True)
    assert traced(torch.zeros(1)) == 1


@pytest.mark.slow
def test_what_is_left_is_said():
    pipeline = diffusers.DDPMPipeline(made("unet"), diffusers.SASolverScheduler())
    first, second, *_ = (n for n, m in pipeline.unet.named_modules() if isinstance(m, ResnetBlock2D))
    pipeline.unet.get_submodule(first).nonlinearity = nn.GELU()
    pipeline.unet.get_submodule(second).norm1.register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning, match="accelerate left 3 parts as they are: .*SASolverScheduler has"):
        done = fastdiff.accelerate(pipeline)
    assert done and not set(done.left) & set(done)
    assert done.left == {
        f"unet.{first}": "its activation is GELU, not SiLU",
        f"unet.{second}": "its norm has hooks or parameters of another kind",
        "scheduler": "SASolverScheduler has no fused scheduler",
    }


def test_nothing_is_said_if_nothing_is_left(recwarn):
    pipeline = diffusers.DDPMPipeline(made("unet"), diffusers.DDPMScheduler())
    assert fastdiff.accelerate(pipeline).left == {} and fastdiff.accelerate(pipeline).left == {}
    assert not [w for w in recwarn if "accelerate" in str(w.message)]


def test_a_pipeline_without_components_is_said():
    """An argument with a default is no component, unless the class names it in `_optional_components`."""
    with pytest.warns(UserWarning, match="have neither a network nor a scheduler"):
        assert fastdiff.accelerate(SimpleNamespace(components={})).left.keys() == {"components"}


def test_a_scheduler_with_methods_of_its_own_is_left():
    """They are bound to it, and would not follow to another object."""
    scheduler = diffusers.DDPMScheduler()
    scheduler._get_variance = lambda *args, **kwargs: torch.tensor(0.25)
    pipeline = diffusers.DDPMPipeline(made("unet"), scheduler)
    with pytest.warns(UserWarning, match="this object has methods of its own: _get_variance"):
        fastdiff.accelerate(pipeline)
    assert pipeline.scheduler is scheduler


def test_attributes_of_a_scheduler_follow():
    pipeline = diffusers.DDPMPipeline(made("unet"), diffusers.DDPMScheduler())
    pipeline.scheduler.tag = "mine"
    fastdiff.accelerate(pipeline)
    assert pipeline.scheduler.tag == "mine"
    fastdiff.restore(pipeline)
    assert pipeline.scheduler.tag == "mine" and type(pipeline.scheduler) is diffusers.DDPMScheduler


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler"])
def test_a_run_goes_on_whatever_happens_within(name):
    """As stock's, also between the halves of a step; and nothing of ours is left in the scheduler."""
    pair = [diffusers.DDPMPipeline(nn.Identity(), getattr(diffusers, name)()) for _ in range(2)]
    x = [torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))] * 2
    for pipeline in pair:
        pipeline.scheduler.set_timesteps(8)
    for i, t in enumerate(pair[0].scheduler.timesteps[:8]):
        if i in (1, 2, 4, 5):  # a half step of Heun begins in stock's and ends in ours, or the other way round
            (fastdiff.accelerate if i % 4 == 1 else fastdiff.restore)(pair[1])
        pred = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(i))
        x = [p.scheduler.step(pred, t, one).prev_sample for p, one in zip(pair, x, strict=True)]
        torch.testing.assert_close(*x, rtol=1e-5, atol=1e-5)
    fastdiff.restore(pair[1])
    assert vars(pair[1].scheduler).keys() == vars(pair[0].scheduler).keys()


class Cascade(diffusers.DiffusionPipeline):
    """A pipeline of several schedulers, within which another one holds some of them."""

    def __init__(self, scheduler, low_res_scheduler, prior_scheduler, decoder_scheduler):
        super().__init__()
        self.register_modules(
            scheduler=scheduler, low_res_scheduler=low_res_scheduler, prior_scheduler=prior_scheduler,
            decoder_scheduler=decoder_scheduler,
        )  # fmt: skip
        self.prior_pipe = diffusers.DDPMPipeline(nn.Identity(), low_res_scheduler)


def test_every_scheduler_of_a_pipeline_is_replaced():
    """Or named in `left`; what was one object, here and in a pipeline within, stays one."""
    shared, left = diffusers.DDPMScheduler(), diffusers.UnCLIPScheduler()
    pipeline = Cascade(diffusers.EulerDiscreteScheduler(), shared, left, shared)
    with pytest.warns(UserWarning, match="accelerate left 1 part as it is: UnCLIPScheduler has no fused"):
        done = fastdiff.accelerate(pipeline)
    assert done == ["scheduler", "low_res_scheduler"]
    assert done.left == {"prior_scheduler": "UnCLIPScheduler has no fused scheduler"}
    assert type(pipeline.scheduler) is ours.EulerDiscreteScheduler and pipeline.prior_scheduler is left
    assert type(pipeline.low_res_scheduler) is ours.DDPMScheduler
    assert pipeline.decoder_scheduler is pipeline.low_res_scheduler is pipeline.prior_pipe.scheduler
    assert fastdiff.restore(pipeline) == ["scheduler", "low_res_scheduler"]
    assert type(pipeline.prior_pipe.scheduler) is diffusers.DDPMScheduler
    assert pipeline.decoder_scheduler is pipeline.low_res_scheduler is pipeline.prior_pipe.scheduler


def test_a_scheduler_that_is_assigned_later():
    """Is what its class is; a second call replaces it."""
    pipeline = diffusers.DDPMPipeline(made("unet"), diffusers.DDPMScheduler())
    fastdiff.accelerate(pipeline)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    assert type(pipeline.scheduler) is diffusers.DDIMScheduler
    assert fastdiff.accelerate(pipeline) == ["scheduler"] and type(pipeline.scheduler) is ours.DDIMScheduler
    pipeline.scheduler = ours.DDPMScheduler.from_config(pipeline.scheduler.config)
    assert fastdiff.accelerate(pipeline) == [] and type(pipeline.scheduler) is ours.DDPMScheduler
