"""accelerate and restore on networks and pipelines of diffusers, against the stock ones."""

import copy

import diffusers
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from strategies import DEVICE
from torch import nn

import fastdiff
from benchmarks.torchvision_standin import stock
from fastdiff.interop import diffusers as ours

# NumPy, in the interpreter, on exp(-u) beyond the range of float32.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def unet(**changes) -> nn.Module:
    config = {
        "sample_size": 8,
        "block_out_channels": (4, 8),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "attention_head_dim": 4,
    }
    return diffusers.UNet2DModel(**config | changes)


def resnet_sampling() -> nn.Module:
    kinds = {"down_block_types": ("AttnDownBlock2D",) * 2, "up_block_types": ("AttnUpBlock2D",) * 2}
    resnets = {"downsample_type": "resnet", "upsample_type": "resnet", "resnet_time_scale_shift": "scale_shift"}
    return unet(**kinds, **resnets, mid_block_scale_factor=2.0)


def conditional() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=4,
        attention_head_dim=2,
    )


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


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("training", [False, True])
def test_same_outputs_gradients_and_names(name, training):
    net = made(name).train(training)
    blocks = [n for n, m in net.named_modules() if isinstance(m, ResnetBlock2D)]
    want, keys, parameters = with_gradients(net), list(net.state_dict()), [id(p) for p in net.parameters()]
    assert fastdiff.accelerate(net) == blocks and len(blocks) >= 6
    close(with_gradients(net), want)
    assert list(net.state_dict()) == keys and [id(p) for p in net.parameters()] == parameters
    assert fastdiff.accelerate(net) == []
    twin = copy.deepcopy(net)
    close(with_gradients(twin), want)
    assert fastdiff.restore(net) == blocks and fastdiff.restore(net) == []
    assert all(type(m) is ResnetBlock2D for m in net.modules() if isinstance(m, ResnetBlock2D))
    close(with_gradients(net), want, atol=0)
    assert fastdiff.restore(twin) == blocks


@pytest.mark.parametrize("name", ["resnet sampling", "conditional"])
def test_the_kernel_runs(name, monkeypatch):
    """Two norms of each block, and the same results."""
    net = made(name).eval().to(DEVICE)
    want = with_gradients(net)
    blocks = fastdiff.accelerate(net)
    calls = []
    launchers = fastdiff.ops.dispatch.launchers("triton")
    launch = launchers.norm
    monkeypatch.setattr(launchers, "norm", lambda **operands: calls.append(0) or launch(**operands))
    with fastdiff.backend("triton"):
        close(with_gradients(net), want, atol=1e-4)
    assert len(calls) == 2 * len(blocks)


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

    want, blocks = images(), [n for n, m in pipeline.unet.named_modules() if isinstance(m, ResnetBlock2D)]
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.clone()
    replaced = [f"unet.{n}" for n in blocks] + ["scheduler"]
    assert sorted(fastdiff.accelerate(pipeline)) == sorted(replaced)
    assert type(pipeline.scheduler) is getattr(ours, name)
    assert pipeline.scheduler.alphas_cumprod is scheduler.alphas_cumprod
    assert torch.equal(pipeline.scheduler.timesteps, scheduler.timesteps)
    assert dict(pipeline.scheduler.config) == dict(scheduler.config)
    torch.testing.assert_close(images(), want, rtol=0, atol=1e-4)
    assert fastdiff.accelerate(pipeline) == []
    assert sorted(fastdiff.restore(pipeline)) == sorted(replaced)
    assert type(pipeline.scheduler) is getattr(diffusers, name)
    assert not {"_tables", "_last_run", "fused_noise"} & set(vars(pipeline.scheduler))
    torch.testing.assert_close(images(), want, rtol=0, atol=0)


def test_a_pipeline_that_was_accelerated_is_saved_as_stock(tmp_path):
    pipeline = diffusers.DDPMPipeline(made("unet"), diffusers.DDPMScheduler())
    fastdiff.accelerate(pipeline)
    pipeline.save_pretrained(tmp_path)
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is diffusers.DDPMScheduler and not fastdiff.restore(again)


def test_other_schedulers_and_networks_are_left():
    pipeline = diffusers.DDPMPipeline(made("unet"), diffusers.PNDMScheduler())
    assert "scheduler" not in fastdiff.accelerate(pipeline)
    assert type(pipeline.scheduler) is diffusers.PNDMScheduler
    assert fastdiff.accelerate(nn.Sequential(nn.GroupNorm(1, 2), nn.SiLU())) == []


def test_the_network_of_denoising_diffusion_pytorch_has_no_group_norm():
    net = stock().Unet(dim=8, dim_mults=(1, 2))
    assert not any(isinstance(m, nn.GroupNorm) for m in net.modules())
    assert fastdiff.accelerate(net) == [] and fastdiff.restore(net) == []


@pytest.mark.parametrize("call", [fastdiff.accelerate, fastdiff.restore])
def test_anything_else_is_refused(call):
    with pytest.raises(TypeError, match=r"^target: expected a pipeline of diffusers or an nn\.Module, got dict$"):
        call({})


def test_compiles_to_one_graph():
    net = made("resnet sampling").eval()
    want = output(net)
    fastdiff.accelerate(net)
    torch.compiler.reset()
    with torch.no_grad():
        close([output_of(torch.compile(net, backend="eager", fullgraph=True), net)], [want])


def output_of(compiled, net):
    random = torch.Generator().manual_seed(1)
    return compiled(torch.randn(2, 3, 8, 8, generator=random), torch.tensor([3, 700]), return_dict=False)[0]
