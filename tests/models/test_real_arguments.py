"""The arguments that callers really give: NumPy numbers, generators, names of other libraries."""

import functools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastdiff import DDPM, NCSN, ScoreSDE, UNet, steps
from fastdiff.steps import SAMPLERS

pytestmark = pytest.mark.filterwarnings("ignore:schedule. alpha_bar_T")
SHAPE = (2, 3)


class Pointwise(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.3 * x - 0.01 * t.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def numbers(cast: type, real: type) -> list[object]:
    """Results of calls with every kind of number."""
    torch.manual_seed(0)
    ddpm, sde = DDPM(Pointwise(), timesteps=cast(12), clip=real(1.5)), ScoreSDE(Pointwise(), beta_min=real(0.25))
    ncsn, x = NCSN(Pointwise(), real(2.0), real(0.125), cast(4)), torch.rand(SHAPE)
    out = [
        ddpm.sample((cast(2), cast(3)), steps=cast(4), seed=cast(7)),
        ddpm.sample(SHAPE, sampler="ddim", steps=cast(4), eta=real(0.5), seed=cast(7)),
        ddpm.sample(SHAPE, sampler="heun", steps=cast(4), seed=cast(7)),
        ddpm.sample(SHAPE, steps=[cast(12), cast(5), cast(0)], seed=cast(7)),
        ddpm.sample(SHAPE, steps=np.array(cast(4)), seed=cast(7)), sde.sample(SHAPE, steps=np.array(cast(4)), seed=1),
        ddpm(x, t=cast(3), seed=cast(7)), ddpm.q_sample(x, cast(3), seed=cast(7)),
        ddpm.p_sample(x, cast(3), seed=cast(7)),
        ddpm.q_step(x, cast(3), seed=cast(7)), *ddpm.q_posterior(x, x, cast(3)), ddpm.predict_x0(x, cast(3)),
        ddpm.predict(x, cast(3), "v"), ddpm.interpolate(x, x, real(0.5), t=cast(6), seed=cast(7)),
        ddpm.bits_per_dim(x, steps=cast(4), seed=cast(7)).terms, ddpm.encode(x, steps=cast(4)),
        sde(x, t=real(0.5), seed=cast(7)), sde.q_sample(x, real(0.5), seed=cast(7)), sde.predict_x0(x, real(0.5)),
        sde.sample(SHAPE, steps=cast(4), seed=cast(7)),
        sde.sample(SHAPE, steps=[real(1.0), real(0.5), real(0.0)], seed=1),
        sde.sample(SHAPE, steps=sde.process.karras(cast(4), sigma_min=real(0.5), rho=real(7), churn=real(1)), seed=1,
                   sampler=functools.partial(steps.heun, noise_scale=real(1.0))),
        sde.sample(SHAPE, sampler=functools.partial(steps.predictor_corrector, corrections=cast(2), snr=real(0.125)),
                   steps=cast(3), seed=cast(1)),
        ncsn.sample(SHAPE, steps=cast(2), seed=cast(7)),
        ncsn.sample(SHAPE, sampler=functools.partial(steps.annealed_langevin, eps=real(2**-10)), steps=1, seed=1),
    ]  # fmt: skip
    assert type(ddpm.config["clip"]) is float and type(ddpm.config["timesteps"]) is int
    assert all(type(v) in (float, int, str, type(None)) for v in ncsn.config.values())
    return out


@pytest.mark.slow
@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
@pytest.mark.parametrize("real", [np.float32, np.float64, np.float16])
def test_numbers_of_numpy_are_numbers(integer, real):
    for a, b in zip(numbers(integer, real), numbers(int, float), strict=True):
        assert torch.equal(a, b)


def test_sizes_of_numpy_in_the_drop_in():
    pytest.importorskip("scipy")
    from fastdiff.interop.denoising_diffusion import GaussianDiffusion

    net = Pointwise()
    net.channels = net.out_dim = 3
    net.self_condition = False
    made = GaussianDiffusion(net, image_size=np.int64(4), timesteps=np.int64(30), sampling_timesteps=np.int32(3))
    assert made.image_size == (4, 4) and type(made.image_size[0]) is int
    assert made.sampling_timesteps == 3 and made.num_timesteps == 30


def test_the_models_own_type_is_no_other_type():
    model = DDPM(nn.Linear(3, 3), timesteps=12)
    assert model.cast(torch.float32) is model and model.double().cast(torch.float64) is model
    with pytest.raises(TypeError, match=r"dtype: expected torch\.bfloat16 or torch\.float16, got torch\.float32"):
        model.cast(torch.float32)


def test_guidance_of_numpy_and_branches_that_differ_in_a_number():
    class Labelled(nn.Module):
        def forward(self, x: Tensor, t: Tensor, y: object) -> Tensor:
            return 0.1 * x + 0.1 * torch.as_tensor(y).reshape(-1, *[1] * (x.ndim - 1))

    model = DDPM(Labelled(), timesteps=12)
    tensors = {"y": torch.tensor([1, 1]), "uncond": {"y": torch.tensor([2, 2])}}
    want = model.sample(SHAPE, seed=1, guidance=2.0, **tensors)
    for guidance in (np.float32(2), np.int64(2), 2):
        assert torch.equal(model.sample(SHAPE, seed=1, guidance=guidance, **tensors), want)
        assert torch.equal(model.sample(SHAPE, seed=1, guidance=guidance, y=1, uncond={"y": np.int64(2)}), want)


def test_a_generator_gives_the_seed():
    model, made = DDPM(Pointwise(), timesteps=12), torch.Generator()
    state = torch.get_rng_state()
    first, second = (model.sample(SHAPE, generator=made.manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(model.sample(SHAPE, generator=made), first)
    with pytest.raises(ValueError, match="seed: expected None with a generator"):
        model.sample(SHAPE, seed=1, generator=made)
    with pytest.raises(TypeError, match=r"generator: expected a torch\.Generator, got int"):
        model.sample(SHAPE, generator=1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("euler", "use 'ddim'"), ("euler_a", "use 'ddpm'"), ("Euler a", "use 'ddpm'"),
        ("DPM++2M", r"use 'dpm\+\+2m'"),
        ("dpm++2m_karras", r"use 'dpm\+\+2m' with steps=model\.process\.karras\(n\)"),
        ("dpmpp_2m_karras", r"use 'dpm\+\+2m' with steps"), ("heun_karras", "use 'heun'"),
        ("DPM++ 2M SDE Karras", r"use 'dpm\+\+2m_sde' with steps"), ("UniPC-bh2", "use 'unipc'"),
        ("dpmpp_2s_ancestral", r"use 'dpm\+\+2s_ancestral'"), ("pndm", "use 'plms'"),
        ("pc", "use 'predictor_corrector'"),
        ("Predictor-Corrector", "use 'predictor_corrector'"), ("rk45", "use 'ode'"),
    ],
)  # fmt: skip
def test_names_of_other_libraries_are_answered(given, said):
    with pytest.raises(ValueError, match=f"sampler: expected one of .*; {said}"):
        DDPM(Pointwise(), timesteps=12).sample(SHAPE, sampler=given)
    assert set(steps.OTHER_NAMES) & (set(SAMPLERS) | {"ode"}) == set()


def test_other_arguments_that_newcomers_give():
    with pytest.raises(TypeError, match=r"steps: expected numbers, got 'karras'; .*process\.karras\(18\)"):
        DDPM(Pointwise(), timesteps=12).sample(SHAPE, steps="karras")
    with pytest.raises(TypeError, match="clip: expected a number, got str"):
        DDPM(Pointwise(), clip="dynamic")
    net = UNet(
        sample_size=8, block_out_channels=(8, 8), down_block_types=["DownBlock2D"] * 2,
        up_block_types=["UpBlock2D"] * 2,
        layers_per_block=1, norm_num_groups=4, num_class_embeds=3,
    )  # fmt: skip
    model = DDPM(net, timesteps=12)
    for wrong in (3, -1):
        labels = torch.tensor([0, wrong])
        said = f"class_labels: expected values from 0 to 2, got {wrong}"
        with pytest.raises(ValueError, match=said):
            model(torch.zeros(2, 3, 8, 8), class_labels=labels)
        with pytest.raises(ValueError, match=said):
            model.sample(2, class_labels=labels)
    model(torch.zeros(2, 3, 8, 8), class_labels=torch.tensor([0, 2]))
