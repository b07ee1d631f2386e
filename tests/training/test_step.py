"""TrainingStep: the bits of the plain steps, captured or not, and what is captured anew.

On a CPU a tape stands for a CUDA graph; the tests marked `gpu` use CUDA's own.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from small_models import TINY
from tape import Recorders
from tiny_run import assert_same_files, run
from torch import Tensor, nn

import fastdiff
from fastdiff import DDPM, UNet, ops
from fastdiff.graphs import WARM_UP, WatchedCalls
from fastdiff.training import TrainingStep
from fastdiff.training.loop import update_ema
from fastdiff.training.surroundings import gpu_settings, has_bfloat16

SHAPE = (2, 2, 4, 4)
# The first call makes the optimizer's state, so the network is looked at again at the second.
CAPTURED_AT = WARM_UP + 2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.conv(x) + 0.001 * t.to(x.dtype)[:, None, None, None]
        return h if y is None else h + y[:, None, None, None]


def unet() -> UNet:
    return UNet(**TINY | {"in_channels": 2, "out_channels": 2})


@pytest.fixture
def taped(monkeypatch) -> Recorders:
    """Steps are captured on the CPU, on tapes."""
    recorders = Recorders()
    monkeypatch.setattr("fastdiff.training.step.CudaGraphs", recorders)
    for module in ("graphs", "training.step"):
        monkeypatch.setattr(f"fastdiff.{module}.what_forbids_here", lambda device: None)
    with fastdiff.backend("reference"):
        yield recorders


class Trained:
    """A small model, its optimizer, its average and a step of them."""

    def __init__(
        self, graph: bool | None, device: str = "cpu", net: Callable[[], nn.Module] = Net, **options: Any
    ) -> None:
        torch.manual_seed(0)
        self.ddpm = DDPM(net(), "cosine", 9).to(device)
        self.ema = copy.deepcopy(self.ddpm.model)
        # A rate in float32 is what a captured step uses.
        rate = torch.tensor(1e-2, device=device)
        self.optimizer = torch.optim.AdamW(self.ddpm.parameters(), lr=rate, weight_decay=0.1, fused=True)
        options |= {"average": self.average, "clip_grad": 0.1, "graph": graph}
        self.step = TrainingStep(self.ddpm, self.optimizer, **options)

    def average(self, decay: float | Tensor) -> None:
        update_ema(self.ema, self.ddpm.model, torch.as_tensor(decay, device=self.ddpm.device))

    def take(self, k: int, batch: int = 2, **model_kwargs: Any) -> Tensor:
        torch.manual_seed(k)
        x0 = ops.normal((batch, *SHAPE[1:]), k).to(self.ddpm.device)
        return self.step(x0, decay=min(0.9, (1 + k) / (10 + k)), **model_kwargs)

    def tensors(self) -> list[Tensor]:
        return [*self.ddpm.parameters(), *self.ema.parameters()]


def same(one: Trained, other: Trained, steps: range, **options: Any) -> None:
    for k in steps:
        assert torch.equal(one.take(k, **options), other.take(k, **options)), k
        assert all(map(torch.equal, one.tensors(), other.tensors())), k


def test_a_replay_gives_the_bits_of_the_step(taped):
    captured, plain = Trained(None), Trained(False)
    first = [t.clone() for t in plain.tensors()]
    same(captured, plain, range(CAPTURED_AT + 2))
    assert taped.recorded == 1 and sum(tape.replayed for tape in taped) == 3 and captured.step.reason is None
    assert sum(tape.followed for tape in taped) == CAPTURED_AT + 2  # each waits for the one before
    assert not any(map(torch.equal, first, plain.tensors())) and plain.step.reason == "graph=False"


@pytest.mark.slow
@pytest.mark.parametrize(("net", "dtype"), [(unet, torch.bfloat16), (Net, torch.float32)])
def test_layers_of_our_networks_have_their_weights_in_the_type_of_autocast(taped, net, dtype):
    """With the bits of the plain steps."""
    captured, plain = (Trained(graph, net=net, autocast=torch.bfloat16) for graph in (None, False))
    seen, layer = [], next(part for part in plain.ddpm.modules() if isinstance(part, nn.Conv2d))
    plain.ddpm.model.register_forward_pre_hook(lambda *_: seen.append(layer.weight.dtype))
    same(captured, plain, range(CAPTURED_AT))
    assert taped.recorded == 1 and set(seen) == {dtype} and layer.weight.dtype == torch.float32


def test_losses_are_the_callers_own(taped):
    captured = Trained(None)
    losses = [captured.take(seed) for seed in range(CAPTURED_AT + 2)]
    kept = [loss.clone() for loss in losses]
    captured.take(9)
    assert all(map(torch.equal, losses, kept)) and len({loss.item() for loss in losses}) == len(losses)
    assert not any(loss.requires_grad for loss in losses)


def test_rates_are_followed(taped):
    """Set as numbers, and by a scheduler of PyTorch."""
    pair = Trained(None), Trained(False)
    schedules = [torch.optim.lr_scheduler.LambdaLR(one.optimizer, lambda k: 1 / (1 + k)) for one in pair]
    for seed in range(8):
        same(*pair, range(seed, seed + 1))
        for schedule in schedules:
            schedule.step()
    for seed in range(8):
        for one in pair:
            one.optimizer.param_groups[0]["lr"] = torch.tensor(0.5**seed).item()
        same(*pair, range(seed, seed + 1))
    assert taped.recorded == 1


def reload(one: Trained) -> None:
    one.optimizer.load_state_dict(copy.deepcopy(one.optimizer.state_dict()))


def regularise(one: Trained) -> None:
    one.optimizer.param_groups[0]["weight_decay"] = 0.5


def move(one: Trained) -> None:
    one.ddpm.model.conv.weight.data = one.ddpm.model.conv.weight.data.clone()


def weigh(one: Trained) -> None:
    one.ddpm.loss_kind = "l1"


@pytest.mark.parametrize("change", [reload, regularise, move, weigh])
def test_what_changes_is_captured_anew(taped, change):
    captured, plain = Trained(None), Trained(False)
    same(captured, plain, range(CAPTURED_AT))
    for one in (captured, plain):
        change(one)
    same(captured, plain, range(CAPTURED_AT))
    assert taped.recorded == 2 and captured.step.reason is None


def test_batches_of_each_shape_and_arguments(taped):
    captured, plain = Trained(None), Trained(False)
    same(captured, plain, range(CAPTURED_AT))
    for salt in range(WARM_UP + 2):
        same(captured, plain, range(1), batch=3)
        same(captured, plain, range(1), y=torch.tensor([0.1, salt]))
    assert taped.recorded == 3


class Looks(Net):
    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return super().forward(x, t, y) * (1.0 if t.sum().item() > 0 else 0.5)


def hooked(one: Trained) -> None:
    one.ddpm.model.conv.register_forward_hook(lambda m, x, y: 2 * y)


def looking(one: Trained) -> None:
    one.ddpm.model.__class__ = Looks


@pytest.mark.parametrize(("change", "said"), [(hooked, "without forward hooks"), (looking, "reads a number")])
def test_what_cannot_be_captured_runs_as_it_is(taped, change, said):
    captured, plain, required = Trained(None), Trained(False), Trained(True)
    for one in (captured, plain, required):
        change(one)
    with pytest.warns(UserWarning, match=f"graph: the step runs without, which needs .*{said}"):
        same(captured, plain, range(CAPTURED_AT + 2))
    assert not taped.recorded and said in captured.step.reason
    with pytest.raises(ValueError, match=f"graph: expected .*{said}"):
        for seed in range(CAPTURED_AT + 2):
            required.take(seed)


def test_a_step_that_waits_at_its_end_is_taken_once(taped):
    captured, plain = Trained(None), Trained(False)
    for one in (captured, plain):
        one.step.average = lambda decay, one=one: one.average(torch.as_tensor(decay).item())
    with pytest.warns(UserWarning, match="which needs .*reads a number"):
        same(captured, plain, range(CAPTURED_AT + 1))
    assert not taped.recorded


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_that_is_not_fused_takes_steps_too(kind):
    layer = nn.Linear(2, 1)
    step = TrainingStep(lambda x: layer(x).square(), kind(layer.parameters(), lr=0.1), graph=False)
    first, _ = (step(torch.ones(3, 2)).mean() for _ in range(2))
    assert step(torch.ones(3, 2)).mean() < first and not step.bad


def test_a_checkpoint_of_steps_that_cannot_be_captured_is_loaded(taped):
    """Of an optimizer without `capturable`, before and after the step is made: its numbers of steps lie on the host."""
    layer = nn.Linear(2, 2, device="meta")
    optimizer = torch.optim.AdamW(layer.parameters())
    for parameter in layer.parameters():
        optimizer.state[parameter] = {"step": torch.tensor(3.0)}
    saved = copy.deepcopy(optimizer.state_dict())
    TrainingStep(layer, optimizer)
    assert all(state["step"].is_meta for state in optimizer.state.values())
    one = Trained(None)
    plain = copy.deepcopy(one.optimizer.state_dict())
    plain["param_groups"][0] |= {"capturable": False, "lr": 0.5}
    one.optimizer.load_state_dict(plain)
    one.take(0)
    (group,) = one.optimizer.param_groups
    assert group["capturable"] and group["lr"] == 0.5 and saved["state"][0]["step"].device.type == "cpu"


@pytest.mark.slow
def test_the_loop_takes_captured_steps(taped, tmp_path, monkeypatch):
    steps = CAPTURED_AT + 1
    # Levels and sample numbers that lie on a CPU are looked at, those on a GPU are not.
    monkeypatch.setattr("fastdiff.support.transforms.bare", lambda tensor: None)
    monkeypatch.setattr("fastdiff.diffusion.as_sample_ids", lambda given, *_: given)
    assert run(tmp_path / "captured", steps=steps) == steps and taped.recorded == 1
    monkeypatch.setattr(WatchedCalls, "what_forbids", lambda *_: "a GPU")
    with pytest.warns(UserWarning, match="graph: the step runs without, which needs a GPU"):
        run(tmp_path / "plain", steps=steps)
    assert taped.recorded == 1
    assert_same_files(*(tmp_path / name / "model.safetensors" for name in ("captured", "plain")))


def test_what_forbids_a_capture(monkeypatch):
    with pytest.raises(ValueError, match="graph: expected a model on CUDA, got one on cpu"):
        Trained(True)
    one = Trained(None)
    assert one.step.reason == "a model on CUDA, got one on cpu" and one.take(0).isfinite()
    monkeypatch.setattr("fastdiff.training.step.what_forbids_here", lambda device: None)
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="graph: expected an optimizer with the option capturable, got SGD"):
        TrainingStep(layer, torch.optim.SGD(layer.parameters()), graph=True)
    with pytest.raises(TypeError, match=r"optimizer: expected a torch\.optim\.Optimizer, got float"):
        TrainingStep(layer, 1e-3)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"clip_grad": 0}, ValueError, "clip_grad: expected a number above 0 or None, got 0"),
        ({"clip_grad": -1}, ValueError, "clip_grad: expected a number above 0 or None, got -1"),
        ({"clip_grad": True}, TypeError, "clip_grad: expected a number, got bool"),
        ({"autocast": torch.int8}, TypeError, "autocast: expected torch.bfloat16, torch.float16 or None"),
        ({"autocast": "bfloat16"}, TypeError, "autocast: expected torch.bfloat16, torch.float16 or None"),
        ({"average": "ema"}, TypeError, "average: expected a function or None, got str"),
        ({"graph": 1}, TypeError, "graph: expected a bool or None, got 1"),
    ],
)
def test_options_are_checked_before_a_step(options, error, said):
    layer = nn.Linear(2, 2)
    with pytest.raises(error, match=said):
        TrainingStep(layer, torch.optim.SGD(layer.parameters()), **options)


def test_what_no_step_can_be_made_of():
    layer, table = nn.Linear(2, 2), nn.Embedding(2, 2, sparse=True)
    with pytest.raises(TypeError, match="optimizer: expected one that steps without a closure, got LBFGS"):
        TrainingStep(layer, torch.optim.LBFGS(layer.parameters()))
    optimizer = torch.optim.SGD([*layer.parameters(), *table.parameters()])
    for loss, said in (
        (lambda x: None, "loss: expected a tensor with a gradient .*, got NoneType"),
        (lambda x: layer(x).detach(), "loss: expected a tensor with a gradient .*, got one without"),
        (lambda x: table(x.long()).sum(), "optimizer: expected parameters with dense gradients"),
    ):
        with pytest.raises(TypeError, match=said):
            TrainingStep(loss, optimizer)(torch.zeros(1, 2))


@pytest.mark.parametrize(  # fused ones divide the gradient themselves, but for float64
    ("fused", "dtype", "rel"), [(False, torch.float32, 1e-2), (True, torch.float32, 1e-2), (True, torch.float64, 1e-10)]
)
def test_groups_that_are_added_later_are_clipped_too(fused, dtype, rel):
    one, other, x = nn.Linear(2, 2, dtype=dtype), nn.Linear(2, 2, dtype=dtype), torch.ones(1, 2, dtype=dtype)
    optimizer = torch.optim.SGD(one.parameters(), 1.0, fused=fused)
    step = TrainingStep(lambda x: 100 * other(one(x)).sum(), optimizer, clip_grad=1e-3)
    optimizer.add_param_group({"params": [*other.parameters()], "lr": 1.0})
    before = torch.cat([p.detach().flatten() for p in step.parameters])
    step(x)
    after = torch.cat([p.detach().flatten() for p in step.parameters])
    clipped = 1e-3 / (1 + 1e-6 / step.norm.item())
    assert len(before) == 12 and (after - before).norm().item() == pytest.approx(clipped, rel=rel)
    assert step.norm > 1 and not hasattr(optimizer, "grad_scale")


def test_one_process_after_another(monkeypatch):
    monkeypatch.setattr("fastdiff.training.step.what_forbids_here", lambda device: None)
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", Net)
    with pytest.raises(ValueError, match="graph: expected one process; DistributedDataParallel"):
        Trained(True)
    monkeypatch.undo()
    monkeypatch.setattr("fastdiff.training.step.what_forbids_here", lambda device: None)
    for name, value in (("is_initialized", True), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="graph: expected one process"):
        TrainingStep(lambda x: layer(x).mean(), torch.optim.AdamW(layer.parameters()), graph=True)


@pytest.mark.parametrize("columns_first", [False, True])  # the kernel that takes all weights at once does not take them
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_average_with_a_tensor_of_decay(dtype, columns_first):
    ema, model = (nn.Linear(20, 2, dtype=dtype) for _ in range(2))
    if columns_first:
        ema.weight.data = ema.weight.data.t().contiguous().t()
    decay, kept = torch.tensor(0.6, dtype=torch.float64), copy.deepcopy(model)
    want = [decay * a.double() + (1 - decay) * b for a, b in zip(ema.parameters(), model.parameters(), strict=True)]
    update_ema(ema, model, decay)
    for got, right in zip(ema.parameters(), want, strict=True):
        assert got.dtype == dtype and (got - right).abs().max() <= torch.finfo(dtype).eps
    assert all(map(torch.equal, model.parameters(), kept.parameters()))


@pytest.mark.parametrize("decay", [0.75, torch.tensor(0.75)])
def test_an_average_in_float32_of_a_model_in_bfloat16(decay):
    model, ema = nn.Linear(3, 2, dtype=torch.bfloat16), nn.Linear(3, 2)
    expected = [0.75 * a + 0.25 * b.float() for a, b in zip(ema.parameters(), model.parameters(), strict=True)]
    update_ema(ema, model, decay)
    torch.testing.assert_close(list(ema.parameters()), expected)


def test_an_average_names_what_does_not_fit():
    model = nn.Linear(3, 2)
    for other in (nn.Linear(3, 4), nn.Linear(3, 2, bias=False)):
        with pytest.raises(ValueError, match="ema: expected the 2 parameters of model, got"):
            update_ema(other, model, 0.9)
    for decay in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="decay: expected a number from 0 to 1, got"):
            update_ema(nn.Linear(3, 2), model, decay)


def test_settings_of_a_gpu_come_and_go():
    def settings() -> tuple[Any, ...]:
        return torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()

    before = settings()
    with gpu_settings(torch.device("cpu")):
        assert settings() == before
    with pytest.raises(KeyError), gpu_settings(torch.device("cuda")):
        assert settings() == (True, "high") != before
        raise KeyError
    assert settings() == before


def test_bfloat16_is_for_the_gpus_that_have_it(monkeypatch):
    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: asked.append(device) or nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not has_bfloat16(torch.device("cuda", 1)) and asked == [torch.device("cuda", 1)]
    assert not has_bfloat16(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_cuda_graph_trains_like_plain_steps(autocast):
    captured, plain = Trained(True, "cuda", autocast=autocast), Trained(False, "cuda", autocast=autocast)
    for seed in range(8):
        torch.testing.assert_close(captured.take(seed), plain.take(seed), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(captured.tensors(), plain.tensors(), rtol=1e-2, atol=1e-3)
    assert captured.step.reason is None
