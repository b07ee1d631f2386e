"""Directories of diffusers, read and written: weights, configurations, whole pipelines; against diffusers itself."""

import json
import math
import pickle
import re
import warnings

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from small_models import ATTENTION, RESNET, SMALL

from fastdiff import DDPM, DiT, NoiseSchedule, UNet
from fastdiff.interop import pretrained
from fastdiff.schedule import make_schedule

pytestmark = pytest.mark.filterwarnings("ignore:schedule. alpha_bar_T")
CONFIGS = {
    "plain": {},
    "no attention": {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2},
    "no attention in the middle": {"add_attention": False},
    "heads": {**ATTENTION, "attention_head_dim": 4},
    "published": {"attention_head_dim": None, "freq_shift": 1, "flip_sin_to_cos": False, "downsample_padding": 0},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift"},
    "norm of the middle": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2},
    "resnet sampling": {**RESNET, "norm_eps": 1e-6, "mid_block_scale_factor": math.sqrt(2)},
    "resnet sampling, scale and shift": {**RESNET, "resnet_time_scale_shift": "scale_shift"},
    "classes": {"num_class_embeds": 3, "center_input_sample": True},
    "fourier": {"time_embedding_type": "fourier", "layers_per_block": 2},
    "not square": {"sample_size": (8, 12), "in_channels": 1, "out_channels": 2, "dropout": 0.5},
}


def stock(**changes) -> UNet2DModel:
    torch.manual_seed(0)
    net = UNet2DModel(**SMALL | changes).eval()
    with torch.no_grad():  # norms that are not the identity, biases that are not 0
        for name, p in net.named_parameters():
            if not name.startswith("time_proj"):
                p.add_(0.1 * torch.randn_like(p))
    return net


def outputs(net, config) -> torch.Tensor:
    size = config.get("sample_size", 8)
    size = size if isinstance(size, (tuple, list)) else (size, size)
    x = torch.randn(2, config.get("in_channels", 3), *size, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.5, 30.0]) if config.get("time_embedding_type") == "fourier" else torch.tensor([3, 700])
    labels = (torch.tensor([0, 2]),) if config.get("num_class_embeds") else ()
    with torch.no_grad():
        y = net(x, t, *labels)
    return y if isinstance(y, torch.Tensor) else y.sample


def rewrite(path, **changes):
    """A JSON file with some keys changed, or left out where they are None."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if k not in changes or changes[k] is not None}))


# --- UNet2DModel ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_of_diffusers_loads_and_is_written_back(tmp_path, name):
    changes = CONFIGS[name]
    theirs = stock(**changes)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = UNet.from_pretrained(tmp_path / "theirs")
    want = outputs(theirs, changes)
    assert want.std() > 1e-2 and not ours.training
    torch.testing.assert_close(outputs(ours, changes), want, rtol=0, atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    again, info = UNet2DModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(outputs(again.eval(), changes), want)
    own = {k: v for k, v in theirs.config.items() if not k.startswith("_")}
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in own.items()} == ours.config


def test_absent_keys_mean_the_defaults_of_the_class(tmp_path):
    stock().save_pretrained(tmp_path)
    absent = ["norm_eps", "time_embedding_dim", "resnet_time_scale_shift", "add_attention", "num_train_timesteps"]
    rewrite(tmp_path / "config.json", **dict.fromkeys(absent))
    theirs = UNet2DModel.from_pretrained(tmp_path).eval()
    assert UNet.from_pretrained(tmp_path).config["norm_eps"] == theirs.config.norm_eps == 1e-5
    torch.testing.assert_close(outputs(UNet.from_pretrained(tmp_path), {}), outputs(theirs, {}), rtol=0, atol=1e-5)


def test_bin_with_the_old_names_of_attention_and_of_blocks(tmp_path):
    """As google/ddpm-cifar10-32 was published."""
    theirs = stock(**ATTENTION)
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    path = tmp_path / "diffusion_pytorch_model.bin"
    renamed = {
        re.sub("|".join(map(re.escape, old)), lambda m: old[m[0]], name): tensor
        for name, tensor in torch.load(path, weights_only=True).items()
    }
    assert "mid_block.attentions.0.proj_attn.weight" in renamed and len(renamed) == len(theirs.state_dict())
    torch.save(renamed, path)
    blocks = {"down_block_types": ["UNetResAttnDownBlock2D"] * 2, "up_block_types": ["UNetResAttnUpBlock2D"] * 2}
    rewrite(tmp_path / "config.json", **blocks)
    torch.testing.assert_close(
        outputs(UNet.from_pretrained(tmp_path), ATTENTION), outputs(theirs, ATTENTION), rtol=0, atol=1e-5
    )


def test_half_precision_weights_become_float32(tmp_path):
    theirs = stock()
    theirs.half().save_pretrained(tmp_path)
    ours = UNet.from_pretrained(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    torch.testing.assert_close(outputs(ours, {}), outputs(theirs.float(), {}), rtol=0, atol=1e-5)


class Harmful:
    def __reduce__(self):
        return (open, ("/dev/null",))


def break_bin(content):
    def act(folder):
        (folder / "diffusion_pytorch_model.safetensors").unlink()
        with open(folder / "diffusion_pytorch_model.bin", "wb") as file:
            pickle.dump(content, file, 2) if isinstance(content, Harmful) else torch.save(content, file)

    return act


def break_weights(change):
    def act(folder):
        path = folder / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return act


def cut(folder):
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


BROKEN = {
    "pickled code": (break_bin(Harmful()), r"\.bin: expected tensors alone"),
    "an object": (break_bin({"conv_in.weight": Harmful()}), r"\.bin: expected tensors alone"),
    "a list": (break_bin([torch.ones(1)]), r"\.bin: expected tensors by name, got list"),
    "a number": (break_bin({"step": 3}), r"\.bin: expected floating tensors by name, got 'step': int"),
    "integers": (
        break_bin({"conv_in.bias": torch.ones(8, dtype=torch.int64)}),
        r"expected floating tensors by name, got 'conv_in.bias': torch.int64",
    ),
    "one tensor more": (break_weights(lambda w: w.update(extra=torch.ones(1))), r"safetensors: unknown tensor 'extra'"),
    "one tensor less": (
        break_weights(lambda w: w.pop("conv_in.bias")),
        r"safetensors: it has no tensor 'conv_in\.bias'",
    ),
    "a shape": (
        break_weights(lambda w: w.update({"conv_in.bias": torch.ones(9)})),
        r"safetensors: conv_in\.bias: the config.* \(8,\), the file has \(9,\)",
    ),
    "cut short": (cut, "is not a safetensors file, or is cut short"),
    "another class": (
        lambda folder: rewrite(folder / "config.json", _class_name="UNet1DModel"),
        "config.json: expected the configuration of a UNet2DModel, got 'UNet1DModel'",
    ),
    "a block": (
        lambda folder: rewrite(folder / "config.json", down_block_types=["SkipDownBlock2D", "DownBlock2D"]),
        "config.json: down_block_types: expected 2 of",
    ),
    "an option": (lambda folder: rewrite(folder / "config.json", turbo=True), "config.json: .*turbo"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json: expected JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_anything_else_in_a_checkpoint_is_refused(tmp_path, name):
    stock().save_pretrained(tmp_path)
    act, message = BROKEN[name]
    act(tmp_path)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        UNet.from_pretrained(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: expected a directory"):
        UNet.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        UNet.from_pretrained(tmp_path)
    stock().save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected diffusion_pytorch_model\.safetensors or"):
        UNet.from_pretrained(tmp_path)


# --- DDPMPipeline -----------------------------------------------------------------------------------------------

SCHEDULERS = {
    "linear": {},
    "other betas": {"beta_start": 1e-3, "beta_end": 0.3, "num_train_timesteps": 20, "variance_type": "fixed_large"},
    "scaled": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": False},
    "sigmoid": {"beta_schedule": "sigmoid", "prediction_type": "sample", "clip_sample_range": 2.0},
    "given": {"trained_betas": [0.1, 0.2, 0.4], "num_train_timesteps": 3},
    "no signal at the end": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "learned": {"variance_type": "learned_range"},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules_of_diffusers_there_and_back(tmp_path, name):
    """alpha_bar of float32 tables, to their rounding."""
    scheduler = DDPMScheduler(**SCHEDULERS[name])
    channels = 6 if name == "learned" else 3
    DDPMPipeline(stock(out_channels=channels), scheduler).save_pretrained(tmp_path / "theirs")
    ddpm = DDPM.from_pretrained(tmp_path / "theirs")
    assert ddpm.timesteps == scheduler.config.num_train_timesteps
    ours, theirs = ddpm.schedule.alpha_bar[1:], scheduler.alphas_cumprod.double()
    near = {"rtol": 2e-4, "atol": 2.0**-24 if name == "no signal at the end" else 1e-9}
    torch.testing.assert_close(ours, theirs, **near)
    c = scheduler.config
    assert ddpm.objective == {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}[c.prediction_type]
    assert ddpm.clip == (c.clip_sample_range if c.clip_sample else None)
    ddpm.save_pretrained(tmp_path / "ours")
    again = DDPMPipeline.from_pretrained(tmp_path / "ours").scheduler
    torch.testing.assert_close(again.alphas_cumprod, scheduler.alphas_cumprod, **near)
    for key in ("variance_type", "prediction_type", "clip_sample", "num_train_timesteps", "clip_sample_range"):
        assert again.config[key] == c[key]
    reloaded = DDPM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(reloaded.schedule.alpha_bar, ddpm.schedule.alpha_bar, rtol=1e-9, atol=0)
    assert (reloaded.variance, reloaded.schedule_name) == (ddpm.variance, ddpm.schedule_name)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("options", [{"variance_type": "fixed_large"}, {"prediction_type": "v_prediction"}])
def test_a_pipeline_samples_the_same_images(tmp_path, flat, options):
    """Every step of the chain with the noise that the pipeline drew; nested, or with all files in one folder."""
    options = {"num_train_timesteps": 10, "beta_start": 0.01, "beta_end": 0.6, **options}
    pipeline = DDPMPipeline(stock(), DDPMScheduler(**options))
    pipeline.save_pretrained(tmp_path)
    if flat:
        for part, files in (("unet", ("config.json", "diffusion_pytorch_model.safetensors")), ("scheduler", ())):
            for file in files or ("scheduler_config.json",):
                (tmp_path / part / file).rename(tmp_path / file)
            (tmp_path / part).rmdir()
    drawn = torch.Generator().manual_seed(3)
    noise = [torch.randn(2, 3, 8, 8, generator=drawn) for _ in range(10)]  # x_T, then one for each level above 1
    pipeline.set_progress_bar_config(disable=True)
    want = pipeline(2, torch.Generator().manual_seed(3), num_inference_steps=10, output_type="np").images
    ddpm = DDPM.from_pretrained(tmp_path)
    got = ddpm.sample((2, 3, 8, 8), x_T=noise[0], noise=torch.stack([*noise[1:], torch.zeros(2, 3, 8, 8)]))
    images = (got / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert images.std() > 0.1 and got.abs().min() < 0.9
    torch.testing.assert_close(images, torch.from_numpy(want), rtol=0, atol=2e-5)


def test_what_is_written_is_a_whole_pipeline(tmp_path):
    """With a schedule that diffusers has no name for, a float, and a size that is not square."""
    torch.manual_seed(0)
    ddpm = DDPM(UNet(**SMALL | {"sample_size": (8, 12)}), "raised_cosine", 20, objective="x0", clip=1.5).eval()
    ddpm.save_pretrained(tmp_path)
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    assert pipeline.scheduler.config.clip_sample_range == 1.5
    betas = ddpm.schedule.transition(torch.arange(1, 21), torch.arange(20))[1]
    torch.testing.assert_close(pipeline.scheduler.betas.double(), betas, rtol=1e-6, atol=1e-9)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(1, num_inference_steps=2, output_type="np").images.shape == (1, 8, 12, 3)
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert files == ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json", weights]


def test_a_ddim_scheduler_gives_the_same_chain(tmp_path):
    DDPMPipeline(stock(), DDIMScheduler(beta_end=0.01)).save_pretrained(tmp_path)
    ddpm = DDPM.from_pretrained(tmp_path)
    assert ddpm.schedule.alpha_bar[1:].sub(DDIMScheduler(beta_end=0.01).alphas_cumprod).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"thresholding": True}, "thresholding: expected False, got True"),
        ({"variance_type": "learned"}, "variance_type: expected 'fixed_small' or .*, got 'learned'"),
        ({"prediction_type": "flow"}, "prediction_type: expected 'epsilon' or .*, got 'flow'"),
        ({"beta_schedule": "laplace"}, "beta_schedule: expected 'linear'.*, got 'laplace'"),
        ({"turbo": 1}, "expected the options of DDPMScheduler, got turbo"),
        ({"_class_name": "PNDMScheduler"}, "expected the configuration of a DDPMScheduler or DDIMScheduler, got 'PNDM"),
        ({"trained_betas": [0.1, 2.0]}, r"betas: expected values in \(0, 1\], got 2.0"),
    ],
)
def test_schedulers_that_are_refused(tmp_path, changes, message):
    DDPMPipeline(stock(), DDPMScheduler()).save_pretrained(tmp_path)
    rewrite(tmp_path / "scheduler" / "scheduler_config.json", **changes)
    with pytest.raises(ValueError, match=rf"scheduler_config\.json: {message}"):
        DDPM.from_pretrained(tmp_path)


def test_models_that_cannot_be_written(tmp_path):
    net = UNet(**SMALL)
    ladder = NoiseSchedule.from_alpha_sigma(torch.ones(3), torch.tensor([0.1, 1.0, 10.0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = [
            (DDPM(torch.nn.Identity()), "model: expected a UNet, got Identity"),
            (DDPM(net, objective="score"), "objective: expected one of eps, x0, v, got 'score'"),
            (DDPM(net, ladder, 3), "schedule: expected one that keeps the variance"),
        ]
    for ddpm, message in cases:
        with pytest.raises(ValueError, match=f"^{message}"):
            ddpm.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_names_of_schedules_are_theirs():
    """cosine is squaredcos_cap_v2, so that its name may stand for it."""
    ours = make_schedule("cosine", 1000).alpha_bar[1:]
    theirs = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=1e-9)
    assert pretrained.SCHEDULER.items() <= dict(DDPMScheduler().config).items()


# --- variants, shards and types ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shards", ["1GB", "30KB"])
def test_variants_and_shards_of_diffusers_are_read(tmp_path, variant, shards):
    net = stock()
    net.save_pretrained(tmp_path, variant=variant, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) is (shards == "30KB")
    ours = UNet.from_pretrained(tmp_path, variant=variant)
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in ours.state_dict().items())
    half = UNet.from_pretrained(tmp_path, variant=variant, torch_dtype=torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    other = "fp16" if variant is None else None
    with pytest.raises(FileNotFoundError, match=r"expected diffusion_pytorch_model"):
        UNet.from_pretrained(tmp_path, variant=other)


def test_variant_and_type_of_a_pipeline(tmp_path):
    DDPMPipeline(stock(), DDPMScheduler()).save_pretrained(tmp_path, variant="fp16")
    ddpm = DDPM.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.bfloat16)
    assert ddpm.parameter_dtype == torch.bfloat16 and not ddpm.training


@pytest.mark.parametrize("kind", [UNet, DiT, DDPM])
@pytest.mark.parametrize("wrong", [torch.int32, "bfloat16", torch.complex64])
def test_types_that_are_none_are_refused(kind, wrong):
    with pytest.raises(TypeError, match=r"^torch_dtype: expected None or a floating type, such as torch.bfloat16, got"):
        kind.from_pretrained("nothing is read", torch_dtype=wrong)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"weight_map": {"a": "../up.safetensors"}}, "expected names of .safetensors files beside it"),
        ({"weight_map": {"a": "part.bin"}}, "expected names of .safetensors files beside it"),
        ({"weight_map": {}}, "expected names of .safetensors files beside it"),
        ({}, "is not an index of weights"),
        ([], "is not an index of weights"),
    ],
)
def test_other_indices_are_refused(tmp_path, index, said):
    stock().save_config(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=re.escape(said)):
        UNet.from_pretrained(tmp_path)


def test_a_variant_is_a_name(tmp_path):
    stock().save_config(tmp_path)
    with pytest.raises(ValueError, match=r"^variant: expected a name, such as 'fp16', got '\.\./x'$"):
        UNet.from_pretrained(tmp_path, variant="../x")
