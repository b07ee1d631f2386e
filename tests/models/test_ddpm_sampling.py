"""DDPM.sample, also compiled."""

import copy
import math
import sys

import pytest
import torch
from counting import Allocations
from small_models import SHAPE, Fixed, Net, Pointwise, data
from torch import Tensor, nn

from fastdiff import DDPM, NoiseSchedule, ops

# Chains as short as most of these keep some signal at the end.
pytestmark = pytest.mark.filterwarnings("ignore:schedule. alpha_bar_T")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# --- sampling -----------------------------------------------------------------------------------------------------

ETAS = [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.7)]


@pytest.mark.parametrize(("sampler", "eta"), ETAS)
def test_a_seed_gives_its_samples_in_whatever_batch(sampler, eta):
    ddpm = DDPM(Pointwise(), timesteps=20)
    options = {"sampler": sampler, "eta": eta, "steps": 6}
    whole = ddpm.sample((6, 3, 5), seed=11, **options)
    assert torch.equal(ddpm.sample((6, 3, 5), seed=torch.tensor([11]), **options), whole)
    chosen = [2, 5, 0]
    for ids in (chosen, tuple(chosen), torch.tensor(chosen), iter(chosen)):
        assert torch.equal(ddpm.sample((3, 3, 5), seed=11, sample_ids=ids, **options), whole[chosen])
    assert not torch.equal(ddpm.sample((6, 3, 5), seed=12, **options), whole)
    assert not torch.equal(whole[0], whole[1])
    assert torch.equal(ddpm.sample((6, 3, 5), seed=-1, **options), ddpm.sample((6, 3, 5), seed=2**64 - 1, **options))


def test_manual_seed_rules_sampling():
    ddpm = DDPM(Pointwise(), timesteps=5)
    torch.manual_seed(1)
    first, second = ddpm.sample((2, 3)), ddpm.sample((2, 3))
    torch.manual_seed(1)
    assert torch.equal(ddpm.sample((2, 3)), first) and torch.equal(ddpm.sample((2, 3)), second)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    ddpm.sample((2, 3), seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_sampling_starts_from_the_prior():
    sigma = torch.tensor([0.1, 1.0, 30.0])
    made = NoiseSchedule.from_alpha_sigma(torch.ones(3), sigma)
    ddpm = DDPM(Pointwise(), made, 3, "x0", clip=None)
    path = ddpm.sample((4, 6), seed=2, return_trajectory=True)
    torch.testing.assert_close(path[0], 30 * ops.normal((4, 6), 2))
    # A chain that keeps its variance starts from N(0, 1), however much signal it leaves.
    short = DDPM(Pointwise(), torch.tensor([0.1, 0.2]), 2)
    assert torch.equal(short.sample((4, 6), seed=2, return_trajectory=True)[0], ops.normal((4, 6), 2))


@pytest.mark.parametrize(("sampler", "eta"), ETAS)
def test_given_start_and_noise(sampler, eta):
    ddpm = DDPM(Pointwise(), timesteps=20)
    options = {"sampler": sampler, "eta": eta, "steps": 7}
    expected = ddpm.sample(SHAPE, seed=3, **options)
    x_T = ops.normal(SHAPE, 3)
    noise = torch.stack([ops.normal(SHAPE, 3, step=k, stream=ops.REVERSE) for k in range(7)])
    before = x_T.clone()
    asked = []

    def draw(k: int) -> Tensor:
        asked.append(k)
        return noise[k]

    tensor = ddpm.sample(SHAPE, x_T=x_T, noise=noise, **options)
    function = ddpm.sample(SHAPE, x_T=x_T, noise=draw, **options)
    assert torch.equal(tensor, function) and asked == list(range(7))
    torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ddpm.sample(SHAPE, x_T=x_T, seed=3, **options), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(x_T, before)


def test_callback_and_trajectory():
    ddpm, seen = DDPM(Pointwise(), timesteps=10), []

    def watch(k: int, level: int, x: Tensor) -> None:
        seen.append((k, level, x.data_ptr(), x.clone()))

    x_T = data()
    result = ddpm.sample(SHAPE, steps=4, x_T=x_T, seed=1, callback=watch)
    assert [call[:2] for call in seen] == [(0, 8), (1, 5), (2, 2), (3, 0)]
    # the state is one tensor from the first step to the result
    assert {call[2] for call in seen} == {result.data_ptr()}
    path = ddpm.sample(SHAPE, steps=4, x_T=x_T, seed=1, return_trajectory=True)
    assert path.shape == (5, *SHAPE)
    assert torch.equal(path[0], x_T) and torch.equal(path[-1], result)
    for k, call in enumerate(seen):
        assert torch.equal(call[3], path[k + 1])


@pytest.mark.parametrize(("sampler", "eta"), ETAS)
def test_a_step_allocates_nothing_of_the_size_of_the_data(sampler, eta):
    shape = (4, 3, 32, 32)  # larger than any table
    ddpm = DDPM(Fixed(torch.zeros(shape)), timesteps=40)
    with Allocations(math.prod(shape)) as allocations:
        ddpm.sample(shape, sampler=sampler, eta=eta, seed=0)
    assert allocations.made == ["aten.empty.memory_format"]  # x_T


def test_progress(capsys, monkeypatch):
    ddpm = DDPM(Pointwise(), timesteps=12)
    quiet = ddpm.sample((2, 3), seed=0)
    assert capsys.readouterr().err == ""
    assert torch.equal(ddpm.sample((2, 3), seed=0, progress=True), quiet)
    assert "12/12" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"pip install 'fastdiff-kernels\[train\]'"):
        ddpm.sample((2, 3), seed=0, progress=True)


def test_samples_are_ordinary_tensors_without_a_graph():
    net = Net()
    ddpm = DDPM(net, timesteps=3)
    for x in (
        ddpm.sample(SHAPE),
        ddpm.sample(SHAPE, return_trajectory=True),
        ddpm.sample(SHAPE, x_T=data().requires_grad_()),
        ddpm.interpolate(data().requires_grad_(), data()),
    ):
        assert not x.is_inference() and not x.requires_grad and x.grad_fn is None
    ddpm(ddpm.sample(SHAPE)).backward()
    assert net.conv.weight.grad is not None
    x = ddpm.sample(SHAPE).requires_grad_()
    net(x, torch.zeros(4, dtype=torch.int64)).square().sum().backward()
    assert x.grad.shape == SHAPE


def test_sampling_in_eval_mode_leaves_the_training_mode_as_it_was():
    net = Net(dropout=0.5)
    ddpm = DDPM(net, timesteps=3)
    assert torch.equal(ddpm.sample(SHAPE, seed=1), ddpm.eval().sample(SHAPE, seed=1))
    assert not any(training for _, _, training in net.calls)
    for modes in ((True, True, True), (True, False, True), (True, True, False), (False, False, False)):
        for module, mode in zip((ddpm, net, net.dropout), modes, strict=True):
            module.training = mode
        ddpm.sample(SHAPE)
        ddpm.interpolate(data(), data())
        assert (ddpm.training, net.training, net.dropout.training) == modes

    def stop(k: int, level: int, x: Tensor) -> None:
        raise KeyboardInterrupt

    ddpm.train()
    with pytest.raises(KeyboardInterrupt):
        ddpm.sample(SHAPE, callback=stop)
    assert ddpm.training and net.training and net.dropout.training


def test_shape():
    ddpm = DDPM(Pointwise(), timesteps=3)
    for shape in ((3, 5), [3, 5], torch.Size((3, 5))):
        assert ddpm.sample(shape).shape == (3, 5)
    assert ddpm.sample((0, 5)).shape == (0, 5)
    with pytest.raises(ValueError, match=r"shape: expected \(B, \.\.\.\), since the model has no sample_shape"):
        ddpm.sample(3)
    ddpm.model.sample_shape = (2, 7)
    assert ddpm.sample(3).shape == (3, 2, 7)
    assert ddpm.sample((3, 5)).shape == (3, 5)
    for shape in ((), -1, (2, -1), (2.0, 3), 2.5, None, (True, 3), "ab"):
        with pytest.raises(ValueError, match="shape: expected a number of samples"):
            ddpm.sample(shape)
    with pytest.raises(TypeError, match=r"shape: .* got a bool"):
        ddpm.sample(True)


# --- torch.compile ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_equals_eager_without_recompiling():
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import

    torch._dynamo.reset()
    net = Net()
    plain, compiled = DDPM(net, timesteps=20), DDPM(net, timesteps=20)
    counter = CompileCounterWithBackend("aot_eager")
    compiled.compile(backend=counter, fullgraph=True)
    x0, frames = data(), []
    for k in range(4):
        values = []
        for ddpm in (plain, compiled):
            torch.manual_seed(k)
            value = ddpm(x0)
            values.append((value, *torch.autograd.grad(value, net.parameters())))
        frames.append(counter.frame_count)
        for got, expected in zip(values[1], values[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    for t in ([1, 2, 3, 4], [20, 9, 9, 1]):
        options = {"t": torch.tensor(t), "seed": torch.tensor(t[0])}
        torch.testing.assert_close(compiled(x0, **options), plain(x0, **options), rtol=1e-6, atol=0)
    loss_frames = counter.frame_count
    assert frames == [1, 1, 1, 1]

    for seed in range(3):
        assert torch.equal(compiled.sample(SHAPE, seed=seed), plain.sample(SHAPE, seed=seed))
    assert counter.frame_count == loss_frames + 1
    path = compiled.sample(SHAPE, seed=0, sampler="ddim", steps=5, return_trajectory=True)
    assert torch.equal(path, plain.sample(SHAPE, seed=0, sampler="ddim", steps=5, return_trajectory=True))

    other = copy.deepcopy(compiled)
    with torch.no_grad():
        other.model.conv.weight.mul_(2)
    assert torch.equal(other.sample(SHAPE, seed=1), DDPM(other.model, timesteps=20).sample(SHAPE, seed=1))


@pytest.mark.slow
def test_compile_lays_convolutions_out_as_inductor_wants_them():
    """On a CPU; else it converts the weights at every call."""
    torch._dynamo.reset()
    random = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1), nn.Module())
    net[2].volume, net[2].line = nn.Conv3d(3, 4, 3), nn.Conv1d(3, 4, 3)
    net.forward = lambda x, t: net[1](net[0](x))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x0 = torch.randn(2, 3, 8, 8, generator=random)
    ddpm = DDPM(net, timesteps=4)
    want = ddpm(x0, t=2, seed=1), ddpm.sample(x0.shape, seed=1)
    ddpm.compile(backend="eager")
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dim() != 4 or value.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ddpm(x0, t=2, seed=1), want[0])
    torch.testing.assert_close(ddpm.sample(x0.shape, seed=1), want[1])
    ddpm(x0, t=2, seed=1).backward()
    assert net[0].weight.grad.stride() == net[0].weight.stride()  # nor does an optimizer mix layouts
