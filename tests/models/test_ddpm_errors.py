"""What DDPM refuses, before any work."""

import math
from types import SimpleNamespace

import pytest
import torch
from small_models import SHAPE, Fixed, Net, Pointwise

from fastdiff import DDPM, FlowMatching

# Chains as short as most of these keep some signal at the end.
pytestmark = pytest.mark.filterwarnings("ignore:schedule. alpha_bar_T")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"objective": "epsilon"}, ValueError, "objective: expected one of eps, x0, v, .*, got 'epsilon'"),
        ({"loss": "l2"}, ValueError, "loss: expected one of mse, l1, huber, hybrid, vlb, got 'l2'"),
        ({"weighting": "snr"}, ValueError, "weighting: expected one of simple, min_snr, vlb, got 'snr'"),
        ({"variance": "fixed"}, ValueError, "variance: expected one of posterior, beta, learned, got 'fixed'"),
        ({"clip": 0.0}, ValueError, "clip: expected a number above 0 or None, got 0.0"),
        ({"clip": -1.0}, ValueError, "clip: expected a number above 0 or None, got -1.0"),
        ({"clip": math.nan}, ValueError, "clip: expected a number above 0 or None, got nan"),
        ({"schedule": "cos"}, ValueError, "schedule: expected one of"),
        ({"schedule": None}, TypeError, "betas: expected numbers"),
        ({"schedule": torch.full((5,), 0.1)}, ValueError, "timesteps: expected 5"),
        ({"timesteps": 0}, ValueError, "timesteps: expected an integer of at least 1"),
        ({"objective": "v_prediction"}, ValueError, "got 'v_prediction'; did you mean 'v'"),
        ({"schedule": "cosin"}, ValueError, "got 'cosin'; did you mean 'cosine'"),
        ({"weighting": "minsnr"}, ValueError, "got 'minsnr'; did you mean 'min_snr'"),
        ({"loss": torch.nn.MSELoss()}, ValueError, r"loss: expected one of .* got MSELoss\(\)$"),
        ({"model": None}, TypeError, "model: expected a torch.nn.Module, got NoneType"),
        ({"model": torch.sin}, TypeError, "model: expected a torch.nn.Module"),
    ],
)
def test_constructor_errors(options, error, said):
    with pytest.raises(error, match=said):
        DDPM(**{"model": Pointwise(), **options})


SAMPLE_ERRORS = [
    ({"steps": 0}, ValueError, "steps: expected an integer from 1 to 10, got 0"),
    ({"steps": 11}, ValueError, "steps: expected an integer from 1 to 10, got 11"),
    ({"sampler": "euler"}, ValueError, "sampler: expected one of ddpm, ddim, .* got 'euler'"),
    ({"sampler": "dimm"}, ValueError, "got 'dimm'; did you mean 'ddim'"),
    ({"eta": 0.5}, ValueError, "eta: expected 0 with sampler 'ddpm', got 0.5"),
    ({"eta": -0.5, "sampler": "ddim"}, ValueError, "eta: expected a finite number of at least 0"),
    ({"eta": 2.0, "sampler": "ddim"}, ValueError, "eta: 2.0 asks for more noise"),
    ({"seed": 2**64}, ValueError, "seed: expected 64 bits"),
    ({"seed": 1.0}, TypeError, "seed: expected an int"),
    ({"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, "seed: expected one int64 number"),
    ({"sample_ids": [0, 1]}, ValueError, r"sample_ids: expected shape \(4,\), got \(2,\)"),
    ({"sample_ids": [0, 1, 2, -1]}, ValueError, "sample_ids: expected values in"),
    ({"sample_ids": torch.tensor([0, 1, 2, 2**32])}, ValueError, "sample_ids: expected values in"),
    ({"sample_ids": [0.0, 1.0, 2.0, 3.0]}, TypeError, "sample_ids: expected int64, got torch.float32"),
    ({"x_T": torch.zeros(4, 2, 4)}, ValueError, "x_T: expected shape"),
    ({"x_T": torch.zeros(SHAPE, dtype=torch.int64)}, TypeError, "x_T: expected one of float32"),
    ({"x_T": [0.0]}, TypeError, "x_T: expected a tensor, got list"),
    ({"noise": torch.zeros(SHAPE)}, ValueError, r"noise: expected shape \(10, 4, 2, 4, 4\)"),
    ({"noise": torch.zeros(10, *SHAPE, dtype=torch.int64)}, TypeError, "noise: expected one of float32"),
    ({"noise": 0.0}, TypeError, "noise: expected a tensor, got float"),
    ({"callback": 1}, TypeError, "callback: expected a function, got int"),
    ({"callback": lambda x: None}, TypeError, r"callback: expected a function of .*, got one of \(x\)"),
]


@pytest.mark.parametrize(("options", "error", "said"), SAMPLE_ERRORS)
def test_sample_errors_come_before_any_work(options, error, said):
    net = Net()
    ddpm, state = DDPM(net, timesteps=10), torch.get_rng_state()
    state = torch.get_rng_state()
    with pytest.raises(error, match=said):
        ddpm.sample(SHAPE, **options)
    assert not net.calls and torch.equal(torch.get_rng_state(), state) and ddpm.training


def test_noise_function_of_the_wrong_shape():
    with pytest.raises(ValueError, match="noise: expected shape"):
        DDPM(Pointwise(), timesteps=10).sample(SHAPE, noise=lambda k: torch.zeros(3))


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"x0": [1.0]}, TypeError, "x0: expected a tensor, got list"),
        ({"x0": torch.zeros(SHAPE, dtype=torch.uint8)}, TypeError, r"uint8; images as x0.float\(\) / 127.5 - 1"),
        ({"x0": torch.tensor(1.0)}, ValueError, "x0: expected a batch dimension"),
        (
            {"t": 0},
            ValueError,
            "t: expected levels from 1 to 10, got 0; timestep k of other libraries is level k \\+ 1",
        ),
        ({"t": 11}, ValueError, "t: expected levels from 1 to 10, got 11"),
        ({"t": torch.tensor([1, 2, 3, 11])}, ValueError, "t: expected levels from 1 to 10, got tensor"),
        ({"t": torch.tensor([1, 2])}, ValueError, r"t: expected shape \(\) or \(4,\), got \(2,\)"),
        ({"t": 1.0}, TypeError, "t: expected an int or an int64 tensor, got float"),
        ({"t": True}, TypeError, "t: expected an int or an int64 tensor, got bool"),
        ({"t": torch.ones(4)}, TypeError, "t: expected int64, got torch.float32"),
        ({"noise": torch.zeros(1)}, ValueError, "noise: expected shape"),
        ({"noise": torch.zeros(SHAPE), "seed": 1}, ValueError, "seed: expected None where noise is given"),
        ({"seed": "1"}, TypeError, "seed: expected an int"),
        ({"reduction": "sum"}, ValueError, "reduction: expected 'mean' or 'none', got 'sum'"),
    ],
)
def test_loss_errors(options, error, said):
    with pytest.raises(error, match=said):
        DDPM(Pointwise(), timesteps=10)(**{"x0": torch.zeros(SHAPE), **options})


@pytest.mark.parametrize("importance", [False, True])
def test_more_than_the_data_without_a_name(importance):
    ddpm, labels = DDPM(Pointwise(), timesteps=10, importance=importance), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(TypeError, match="x0: expected one argument without a name, got 2; name the others, as in t="):
        ddpm(torch.zeros(SHAPE), labels)
    with pytest.raises(TypeError, match="x0: expected one argument without a name, got 3"):
        FlowMatching(Pointwise())(torch.zeros(SHAPE), 0.5, labels)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("num_inference_steps", "steps"),
        ("cond_scale", "guidance"),
        ("return_all_timesteps", "return_trajectory"),
        ("y", "class_labels"),
    ],
)
def test_an_argument_by_its_name_elsewhere(theirs, ours):
    class Labelled(Pointwise):
        def forward(self, x, t, class_labels=None):
            return super().forward(x, t)

    with pytest.raises(TypeError, match=f"^{theirs}: expected an option .*; did you mean '{ours}'"):
        DDPM(Labelled(), timesteps=10).sample(SHAPE, **{theirs: 2})


def test_single_step_errors():
    ddpm = DDPM(Pointwise(), timesteps=10)
    for step in (ddpm.p_sample, ddpm.predict_x0):
        with pytest.raises(TypeError, match="x_t: expected a tensor, got list"):
            step([1.0], 3)
        for t in (0, 11):
            with pytest.raises(ValueError, match=f"t: expected levels from 1 to 10, got {t}"):
                step(torch.zeros(SHAPE), t)
    with pytest.raises(ValueError, match="seed: expected None where noise is given"):
        ddpm.p_sample(torch.zeros(SHAPE), 3, seed=1, noise=torch.zeros(SHAPE))


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"x0": [1.0]}, TypeError, "x0: expected a tensor"),
        ({"x0": torch.zeros(SHAPE, dtype=torch.uint8)}, TypeError, "x0: expected one of float32"),
        ({"x1": torch.zeros(1)}, ValueError, "x1: expected shape"),
        ({"x1": None}, TypeError, "x1: expected a tensor"),
        ({"t": 0}, ValueError, "t: expected a level from 1 to 10, got 0"),
        ({"t": 11}, ValueError, "t: expected a level from 1 to 10, got 11"),
        ({"t": 5.0}, ValueError, "t: expected a level from 1 to 10, got 5.0"),
        ({"t": True}, ValueError, "t: expected a level from 1 to 10, got True"),
        ({"weight": 1.5}, ValueError, r"weight: expected one or 4 numbers in \[0, 1\], got 1.5"),
        ({"weight": -0.5}, ValueError, "weight: expected one or 4 numbers"),
        ({"weight": math.nan}, ValueError, "weight: expected one or 4 numbers"),
        ({"weight": None}, TypeError, "weight: expected numbers, got NoneType"),
        ({"weight": "half"}, TypeError, "weight: expected numbers, got str"),
        ({"weight": torch.tensor([0.5, 0.5])}, ValueError, "weight: expected one or 4 numbers"),
    ],
)
def test_interpolate_errors(options, error, said):
    with pytest.raises(error, match=said):
        DDPM(Pointwise(), timesteps=10).interpolate(**{"x0": torch.zeros(SHAPE), "x1": torch.ones(SHAPE), **options})


def test_model_output_errors():
    x = torch.zeros(SHAPE)
    for out, error, said in (
        (torch.zeros(4, 1, 4, 4), ValueError, r"model: expected an output of shape \(4, 2, 4, 4\), got \(4, 1, 4, 4\)"),
        (None, TypeError, "model: expected a tensor or an object with a tensor `sample`, got NoneType"),
        (SimpleNamespace(sample=3), TypeError, "model: expected a tensor .* got SimpleNamespace"),
    ):
        ddpm = DDPM(Fixed(out), timesteps=10)
        for call in (
            lambda d: d(x),
            lambda d: d.sample(SHAPE),
            lambda d: d.p_sample(x, 2),
            lambda d: d.predict_x0(x, 2),
        ):
            with pytest.raises(error, match=said):
                call(ddpm)


class Texted(Pointwise):
    def forward(self, x, t, text):
        return x


@pytest.mark.parametrize(
    ("model", "given", "said"),
    [
        (torch.nn.Conv2d(2, 2, 1), {}, r"model: expected Conv2d.forward to take \(x, t\), got too many"),
        (Texted(), {}, r"model: expected Texted.forward to take \(x, t\), got missing a required argument: 'text'"),
        (Texted(), {"texts": 1}, "texts: expected .* an argument of Texted.forward, got neither; did you mean 'text'"),
        (Texted(), {"guidance_scale": 2.0}, "guidance_scale: expected an option .* did you mean 'guidance'"),
        (Texted(), {"guidence": 2.0}, "guidence: expected an option .* did you mean 'guidance'"),
        (Texted(), {"init_image": 0.0}, "init_image: expected an option .* did you mean 'x_init'"),
    ],
)
def test_calls_that_the_model_does_not_take(model, given, said):
    with pytest.raises(TypeError, match=said):
        DDPM(model, timesteps=10).sample(SHAPE, **given)


def test_data_on_another_device():
    class Elsewhere(Pointwise):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1, device="meta"))

        def forward(self, x, t):
            raise RuntimeError("Expected all tensors to be on the same device")  # as on a GPU

    with pytest.raises(ValueError, match="x: expected device meta, where the model is, got cpu"):
        DDPM(Elsewhere(), timesteps=10)(torch.zeros(SHAPE))


def test_an_option_may_be_a_module():
    class Double(torch.nn.Module):
        def forward(self, schedule, objective):
            return torch.full_like(schedule.alpha, 2.0)

    ddpm, x0 = DDPM(Pointwise(), timesteps=10), torch.ones(SHAPE)
    before = ddpm(x0, t=3, seed=0)
    ddpm.weighting = Double()
    assert torch.allclose(ddpm(x0, t=3, seed=0), 2 * before)
