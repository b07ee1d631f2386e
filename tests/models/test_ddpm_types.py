"""DDPM in other types, on other devices, copied, saved, and around other models."""

import copy
import json
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from small_models import SHAPE, TINY, Net, data
from torch import Tensor, nn

from fastdiff import DDPM, UNet

# Chains as short as most of these keep some signal at the end.
pytestmark = pytest.mark.filterwarnings("ignore:schedule. alpha_bar_T")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_state_is_float32_around_a_model_of_another_type(dtype):
    net = Net()
    ddpm = DDPM(net, timesteps=20)
    expected, loss = ddpm.sample(SHAPE, seed=1, steps=5), ddpm(data(), t=5, seed=1)
    ddpm.to(dtype)
    net.calls.clear()
    got = ddpm.sample(SHAPE, seed=1, steps=5)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert {call[0].dtype for call in net.calls} == {dtype}
    # between the types lies the model's rounding, not the state's: it is not on the dtype's grid
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=0.05)
    assert not torch.equal(got, got.to(torch.bfloat16).to(got.dtype))
    torch.manual_seed(0)
    for x0 in (data(), data().to(dtype)):
        value = ddpm(x0, t=5, seed=1)
        assert value.dtype == torch.float32
        value.backward()
    assert net.conv.weight.grad.dtype == dtype
    assert math.isfinite(loss.item())


def test_autocast():
    net = Net()
    ddpm, x0 = DDPM(net, timesteps=20), data()
    expected, loss = ddpm.sample(SHAPE, seed=1, steps=5), ddpm(x0, t=5, seed=1)
    net.calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert net.conv(x0).dtype == torch.bfloat16
        got, value = ddpm.sample(SHAPE, seed=1, steps=5), ddpm(x0, t=5, seed=1)
        value.backward()
    assert got.dtype == value.dtype == net.calls[0][0].dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=0.05)
    torch.testing.assert_close(value, loss, rtol=0.02, atol=0)
    assert net.conv.weight.grad.abs().sum() > 0


def test_tables_stay_exact_in_any_type_and_out_of_the_state():
    ddpm, x0, z = DDPM(Net(), "cosine", 1000), data(), torch.randn(SHAPE)
    t = torch.tensor([1, 333, 777, 1000])
    expected = ddpm.q_sample(x0, t, noise=z)
    rows = torch.stack((ddpm.schedule.alpha, ddpm.schedule.sigma), 1).float()
    for change in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float):
        change(ddpm)
        assert torch.equal(ddpm.q_sample(x0, t, noise=z), expected)
        for level in (1, 333, 1000):
            got = ddpm.q_sample(torch.ones(1, 1), level, noise=torch.zeros(1, 1)).item()
            assert got == rows[level, 0].item()
            assert ddpm.q_sample(torch.zeros(1, 1), level, noise=torch.ones(1, 1)).item() == rows[level, 1].item()
    assert set(ddpm.state_dict()) == {f"model.{name}" for name in ddpm.model.state_dict()}
    other = DDPM(Net(), "linear", 10)
    other.load_state_dict(ddpm.state_dict())
    assert torch.equal(other.model.conv.weight, ddpm.model.conv.weight)


def test_tables_are_built_beside_the_model_whatever_the_default_device():
    net = Net()
    expected, data_on_cpu = DDPM(net, timesteps=10).sample(SHAPE, seed=1, steps=4), data()
    with torch.device("meta"):
        ddpm = DDPM(net, timesteps=10)
        assert torch.equal(ddpm.sample(SHAPE, seed=1, steps=4), expected)
        same = ddpm.sample(SHAPE, seed=1, steps=4, sampler="ddim", eta=1.0, sample_ids=range(4))
        torch.testing.assert_close(same, expected, rtol=1e-4, atol=1e-5)
        ddpm.interpolate(data_on_cpu, data_on_cpu, seed=1)
        ddpm(data_on_cpu).backward()
    loss = DDPM(Net().to("meta"))(data_on_cpu.to("meta"))  # where the data is, even without values
    assert loss.device.type == "meta" and loss.shape == () and not list(ddpm.buffers())


def test_deepcopy_and_pickle():
    ddpm = DDPM(Net(), "cosine", 10, "v")
    for other in (copy.deepcopy(ddpm), pickle.loads(pickle.dumps(ddpm))):
        assert torch.equal(other.sample(SHAPE, seed=1), ddpm.sample(SHAPE, seed=1))
        with torch.no_grad():
            other.model.conv.weight.mul_(2)
        assert not torch.equal(other.sample(SHAPE, seed=1), ddpm.sample(SHAPE, seed=1))


def test_config_round_trip():
    net = Net()
    chosen = {
        "schedule": "cosine", "timesteps": 12, "objective": "v", "loss": "huber", "weighting": "min_snr",
        "variance": "beta", "clip": None, "importance": False,
    }  # fmt: skip
    ddpm = DDPM(net, **chosen)
    assert ddpm.config == chosen
    again = DDPM(net, **json.loads(json.dumps(ddpm.config)))
    assert torch.equal(again.sample(SHAPE, seed=1), ddpm.sample(SHAPE, seed=1))
    x0 = data()
    assert again(x0, t=4, seed=1) == ddpm(x0, t=4, seed=1)
    assert DDPM(net, **DDPM(net).config).config == DDPM(net).config
    for given in (torch.full((5,), 0.1), ddpm.schedule):
        with pytest.raises(ValueError, match="config: expected a schedule given by name"):
            _ = DDPM(net, given, len(given) if isinstance(given, Tensor) else 12).config


def test_channels_last():
    ddpm, x0, t = DDPM(Net(3), timesteps=20), data(4, 3, 4, 4), torch.tensor([1, 5, 10, 20])
    last = x0.to(memory_format=torch.channels_last)
    torch.testing.assert_close(ddpm(last, t=t, seed=1), ddpm(x0, t=t, seed=1), rtol=1e-6, atol=0)
    x_t = ddpm.q_sample(last, t, seed=1)
    assert torch.equal(x_t, ddpm.q_sample(x0, t, seed=1)) and x_t.stride() == last.stride()
    x = ddpm.sample(last.shape, x_T=last, seed=1)
    assert x.stride() == last.stride()
    torch.testing.assert_close(x, ddpm.sample(last.shape, x_T=x0, seed=1), rtol=1e-5, atol=1e-6)


def test_models_may_return_an_object_with_sample():
    class Wrapped(Net):
        def forward(self, x: Tensor, t: Tensor) -> SimpleNamespace:
            return SimpleNamespace(sample=super().forward(x, t))

    plain, wrapped = Net(), Wrapped()
    wrapped.load_state_dict(plain.state_dict())
    x0 = data()
    assert DDPM(wrapped)(x0, t=5, seed=1) == DDPM(plain)(x0, t=5, seed=1)
    assert torch.equal(*(DDPM(net, timesteps=5).sample(SHAPE, seed=1) for net in (wrapped, plain)))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"num_class_embeds": 3}])
def test_a_unet_is_sampled_as_any_model(options):
    """Its embeddings, taken for all steps at once, are those that it computes for itself."""

    class Hidden(nn.Module):
        def __init__(self, unet: UNet):
            super().__init__()
            self.unet = unet

        def forward(self, x: Tensor, t: Tensor, **kwargs: Tensor) -> Tensor:
            return self.unet(x, t, **kwargs)

    unet = UNet(**TINY, **options)
    given = {"class_labels": torch.tensor([0, 2])} if "num_class_embeds" in options else {}
    shape = (2, 3, 4, 4)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        unet.to(dtype)
        ddpm, plain = DDPM(unet, timesteps=50), DDPM(Hidden(unet), timesteps=50)
        for how in ({"steps": 5}, {"steps": 5, "sampler": "ddim"}):
            got, expected = ddpm.sample(2, seed=1, **how, **given), plain.sample(shape, seed=1, **how, **given)
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
        x = data(*shape)
        tail = {"t": 4, "seed": 1, **given}
        torch.testing.assert_close(
            ddpm.interpolate(x, -x, **tail), plain.interpolate(x, -x, **tail), rtol=tolerance, atol=tolerance
        )
    if not given:
        assert ddpm.sample(0).shape == (0, 3, 4, 4)
