"""Steps neither wait for a device nor break a graph; noise drawn in the kernel."""

import functools
from typing import Any

import diffusers
import pytest
import torch
from schedulers import CASES, COUNTING, NAMES, PARITY, NoReads, both, draw, noised, prepared, seeded, small_unet
from strategies import BACKENDS, DEVICE
from tolerance import assert_same_bits
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.interop import diffusers as fused
from fastdiff.interop.diffusers.common import quantile

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers with NumPy 2


# --- no waiting, no graph breaks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fused_noise", [False, True])
@pytest.mark.parametrize(("name", "config"), CASES)
def test_no_scalar_is_read(name: str, config: dict[str, Any], fused_noise: bool) -> None:
    scheduler, step, args = prepared(name, config, fused_noise=fused_noise)
    with NoReads():
        step(*args)  # builds its tables
    if name in ("LCMScheduler", "TCDScheduler"):  # whose timestep must be that of its place
        scheduler._step_index = None
    with NoReads() as second:
        step(*args)
        noised(scheduler, args[2], args[2], torch.tensor([3, 4]))
    assert len(second.calls) <= (45 if config.get("thresholding") else 25), second.calls
    if name in ("DPMSolverMultistepScheduler", *COUNTING):
        scheduler.set_timesteps(10)
        with NoReads():
            step(*args)  # which has to find its place


REMEMBERING = [
    ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DEISMultistepScheduler", {"solver_order": 3}),
    ("UniPCMultistepScheduler", {"solver_order": 3}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("PNDMScheduler", {"skip_prk_steps": False}),
    ("DDIMInverseScheduler", {"clip_sample": False}),
]


def started(name: str, config: dict[str, Any], device: torch.device | str = "cpu") -> tuple[Any, Tensor, Tensor]:
    """(scheduler, model output, sample) after three steps."""
    scheduler = getattr(fused, name)(**config)
    scheduler.set_timesteps(10, device=device)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    x, output = (t.to(device) for t in draw(seeded(0)))
    for t in scheduler.timesteps[:3]:
        x = scheduler.step(output, t, x).prev_sample
    return scheduler, output, x


@pytest.mark.parametrize(("name", "config"), REMEMBERING)
def test_no_scalar_is_read_by_steps_that_remember(name: str, config: dict[str, Any]) -> None:
    scheduler, output, x = started(name, config)
    with NoReads() as mode:
        x = scheduler.step(output, scheduler.timesteps[3], x).prev_sample
        if name == "PNDMScheduler":
            return  # its tables of the next steps differ
        before = len(mode.calls)
        scheduler.step(output, scheduler.timesteps[4], x)
    assert len(mode.calls) - before <= 40, mode.calls


@pytest.mark.slow
@pytest.mark.parametrize(("name", "config"), REMEMBERING)
def test_no_graph_break_in_steps_that_remember(name: str, config: dict[str, Any]) -> None:
    scheduler, output, x = started(name, config)
    torch._dynamo.reset()
    explained = torch._dynamo.explain(scheduler.step)(output, scheduler.timesteps[3], x)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "config"), REMEMBERING)
def test_no_wait_for_a_gpu_by_steps_that_remember(name: str, config: dict[str, Any]) -> None:
    with fastdiff.backend("triton"):
        scheduler, output, x = started(name, config, DEVICE)
        scheduler.step(output, scheduler.timesteps[3], x)  # builds its tables
        torch.cuda.set_sync_debug_mode("error")
        try:
            scheduler.step(output, scheduler.timesteps[4], x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


QUANTILES = (0.0, 0.1, 0.5, 0.995, 1.0)


@functools.cache
def with_quantiles(n: int, dtype: torch.dtype) -> tuple[Tensor, dict[float, Tensor]]:
    """Values, and PyTorch's quantiles of them, which one call sorts once."""
    values = torch.randn(4, n, generator=torch.Generator().manual_seed(n), dtype=dtype).abs()
    values[1, n // 2] = torch.nan
    values[2, n // 3] = torch.inf
    found = torch.quantile(values, torch.tensor(QUANTILES, dtype=dtype), dim=1, keepdim=True)
    return values, dict(zip(QUANTILES, found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 7, 3072, 1_000_003])
@pytest.mark.parametrize("q", QUANTILES)
def test_quantile(q: float, n: int, dtype: torch.dtype) -> None:
    values, theirs = with_quantiles(n, dtype)
    ours = quantile(values, q)
    assert torch.equal(ours.nan_to_num(-1.0), theirs[q].nan_to_num(-1.0)), (ours, theirs[q])


@pytest.mark.slow
@pytest.mark.parametrize("fused_noise", [False, True])
@pytest.mark.parametrize(("name", "config"), CASES)
def test_no_graph_break(name: str, config: dict[str, Any], fused_noise: bool) -> None:
    _, step, args = prepared(name, config, fused_noise=fused_noise)
    torch._dynamo.reset()
    explained = torch._dynamo.explain(step)(*args)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons


@pytest.mark.slow
@pytest.mark.parametrize("variance", ["fixed_large", "learned", "learned_range"])
def test_compiled_step(variance: str) -> None:
    """A compiled loop with its timesteps in tensors gives the results of the eager one, no noise at t = 0 included."""
    _, ours = both("DDPMScheduler", 3, variance_type=variance)
    x, output = draw(torch.Generator().manual_seed(0), learned=variance != "fixed_large")
    torch._dynamo.reset()
    step = torch.compile(ours.step, backend="aot_eager", fullgraph=True)
    assert ours.timesteps[-1] == 0
    for t in ours.timesteps:
        torch.manual_seed(5)
        got = step(output, t, x).prev_sample
        torch.manual_seed(5)
        torch.testing.assert_close(got, ours.step(output, t, x).prev_sample, rtol=0, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiled_add_noise(name: str) -> None:
    _, ours = both(name, 10)
    x, noise = draw(torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    add = torch.compile(ours.add_noise, backend="aot_eager", fullgraph=True)
    assert_same_bits(add(x, noise, torch.tensor([3, 4])), ours.add_noise(x, noise, torch.tensor([3, 4])))


class Elsewhere(torch.Tensor):
    """A tensor that says it lies on a GPU, and may not be read."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda:0")

    def item(self) -> float:
        raise AssertionError("read")


def test_timesteps_elsewhere_are_known_by_their_place() -> None:
    _, ours = both("DDPMScheduler", 10)
    ours.timesteps = ours.timesteps.as_subclass(Elsewhere)
    assert [ours._number(t) for t in ours.timesteps] == ours.timesteps.tolist()
    assert [ours._number(t) for t in ours.timesteps[4:]] == ours.timesteps.tolist()[4:]
    assert ours._number(ours.timesteps[3].clone()) is None
    assert ours._number(ours.timesteps[:2]) is None
    whole = ours.timesteps
    ours.timesteps = whole[2:8:2]
    assert [ours._number(t) for t in whole[:6]] == [None, None, whole.tolist()[2], None, whole.tolist()[4], None]


# --- noise in the kernel ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config"), [c for c in CASES if c[0] not in ("DPMSolverMultistepScheduler", *COUNTING)]
)
def test_fused_noise(name: str, config: dict[str, Any]) -> None:
    """It is z(seed, sample, timestep) of the stream of reverse noise, whatever the batch; the generator rests."""
    ours, step, (output, t, x) = prepared(name, config, fused_noise=True)
    extra = {"eta": 1.0} if name == "DDIMScheduler" else {}
    generator = seeded(7)
    before = generator.get_state()
    got = step(output, t, x, generator=generator, **extra).prev_sample
    assert torch.equal(generator.get_state(), before)
    one = step(output[:1], t, x[:1], generator=seeded(7), **extra).prev_sample
    assert torch.equal(one, got[:1])
    each = step(output, t, x, generator=[seeded(7), seeded(7)], **extra).prev_sample
    torch.testing.assert_close(each[:1], got[:1], rtol=0, atol=PARITY)
    same = step(torch.cat((output[:1],) * 2), t, torch.cat((x[:1],) * 2), generator=[seeded(7), seeded(7)], **extra)
    assert torch.equal(same.prev_sample[0], same.prev_sample[1])
    assert not torch.equal(step(output, t, x, generator=seeded(8), **extra).prev_sample, got)
    place = int(t * 9) if name == "ScoreSdeVeScheduler" else t
    z = ops.normal(x.shape, 7, step=place, stream=ops.REVERSE)
    quiet = getattr(fused, name)(**config)
    quiet.__dict__.update({k: v for k, v in ours.__dict__.items() if k != "fused_noise"})
    quiet._noise = lambda *args: {"noise": z}
    want = getattr(quiet, step.__name__)(output, t, x, **extra).prev_sample
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_fused_noise_of_a_solver_of_the_sde() -> None:
    """z(seed, sample, number of the step), of a batch and of a generator for each sample."""
    x, output = draw(seeded(0))
    results = []
    for generator in (seeded(7), [seeded(7), seeded(8)], "z"):
        ours = fused.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", fused_noise=generator != "z")
        ours.set_timesteps(10)
        z = {"variance_noise": ops.normal(x.shape, 7, step=4, stream=ops.REVERSE)}
        given = z if generator == "z" else {"generator": generator}
        results.append(ours.step(output, ours.timesteps[4], x, **given).prev_sample)
    torch.testing.assert_close(results[0], results[2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[1][0], results[2][0], rtol=1e-6, atol=1e-6)
    assert not torch.equal(results[1][1], results[2][1])


def test_fused_noise_gives_an_image_whatever_its_batch() -> None:
    unet = small_unet()
    images = []
    for batch in (1, 3):
        pipeline = diffusers.DDPMPipeline(unet, fused.DDPMScheduler(fused_noise=True))
        pipeline.set_progress_bar_config(disable=True)
        call = {"batch_size": batch, "num_inference_steps": 10, "output_type": "pt"}
        images.append(torch.as_tensor(pipeline(generator=seeded(4), **call).images))
    torch.testing.assert_close(images[1][:1], images[0], rtol=0, atol=1e-4)
    assert not torch.equal(images[1][0], images[1][1])


def test_fused_noise_without_a_generator() -> None:
    """torch.manual_seed rules, and every step has a seed of its own."""
    ours = fused.DDPMScheduler(fused_noise=True)
    x, output = draw(seeded(0))
    torch.manual_seed(3)
    first, second = (ours.step(output, 500, x).prev_sample for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(ours.step(output, 500, x).prev_sample, first)
    assert not torch.equal(first, second)


def test_fused_noise_warns_of_the_same_noise(recwarn: pytest.WarningsRecorder) -> None:
    """A generator that goes on to a second run; not one that is seeded for it, and not within a run."""
    pipeline = diffusers.DDPMPipeline(small_unet(), fused.DDPMScheduler(fused_noise=True))
    pipeline.set_progress_bar_config(disable=True)
    generator = seeded(4)
    pipeline(generator=generator, num_inference_steps=3)
    pipeline(generator=generator.manual_seed(4), num_inference_steps=3)
    pipeline(generator=seeded(5), num_inference_steps=3)
    pipeline(generator=generator.manual_seed(6), num_inference_steps=3)
    assert not [w for w in recwarn if "fused_noise" in str(w.message)]
    with pytest.warns(UserWarning, match="fused_noise: the noise of seed 6 again"):
        pipeline(generator=generator, num_inference_steps=3)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@pytest.mark.parametrize("fused_noise", [False, True])
@pytest.mark.parametrize("name", [*NAMES, *COUNTING])
def test_kernels(name: str, fused_noise: bool, backend: str) -> None:
    """A step and the noising by the kernels, on a GPU where there is one, against plain PyTorch on the CPU."""
    results = []
    for kind, device in (("reference", torch.device("cpu")), (backend, DEVICE)):
        scheduler, step, args = prepared(name, {}, device, fused_noise=fused_noise)
        extra = {"eta": 1.0} if name == "DDIMScheduler" else {}
        t = torch.tensor([3, 4], device=device)
        with fastdiff.backend(kind):
            if name != "HeunDiscreteScheduler":
                extra["generator"] = seeded(7)
            out = step(*args, return_dict=False, **extra)
            results.append([o.cpu() for o in (*out, noised(scheduler, args[2], args[2].flip(0), t))])
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("fused_noise", [False, True])
@pytest.mark.parametrize(("name", "config"), CASES)
def test_no_wait_for_a_gpu(name: str, config: dict[str, Any], fused_noise: bool) -> None:
    _, step, args = prepared(name, config, DEVICE, fused_noise=fused_noise)
    with fastdiff.backend("triton"):
        step(*args)  # builds its tables
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_fused_noise_errors() -> None:
    ours = fused.DDPMScheduler(fused_noise=True)
    x, output = draw(seeded(0))
    with pytest.raises(ValueError, match="generator: expected a list of 2, one per sample, got 3"):
        ours.step(output, 500, x, generator=[seeded(i) for i in range(3)])
