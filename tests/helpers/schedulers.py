"""The schedulers of diffusers, stock and ours side by side, with inputs and a comparison of their steps."""

from typing import Any

import diffusers
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.interop import diffusers as fused

NAMES = ("DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "ScoreSdeVeScheduler")
# Those that count their steps and take any float as a timestep, but for LCM and TCD, whose timestep is a level.
COUNTING = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "EDMEulerScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
)
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "linspace", "trailing")
LIMITS: dict[str, dict[str, Any]] = {
    "none": {"clip_sample": False},
    "clip": {"clip_sample": True, "clip_sample_range": 0.8},
    "threshold": {"clip_sample": False, "thresholding": True, "sample_max_value": 2.0},
}
# Four roundings of a number of 16, about the largest that the tests have.
PARITY = 2e-6


def both(name: str, steps: int | None = None, **config: Any) -> tuple[Any, Any]:
    """The stock scheduler and ours."""
    pair = getattr(diffusers, name)(**config), getattr(fused, name)(**config)
    for scheduler in pair:
        if steps is not None:
            scheduler.set_timesteps(steps)
            if name == "ScoreSdeVeScheduler":
                scheduler.set_sigmas(steps)
    return pair


def few(timesteps: Tensor) -> Tensor:
    """The timesteps, or of many the first, middle and last three."""
    n = len(timesteps)
    return timesteps if n <= 7 else torch.cat([timesteps[i : i + 3] for i in (0, n // 2, n - 3)])


def draw(generator: torch.Generator, shape: tuple[int, ...] = (2, 3, 4, 4), learned: bool = False) -> Any:
    """(x_t, model output) of independent normals; a learned variance is in (0, 1)."""
    x, output = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    if learned:
        output = torch.cat((output, torch.rand(shape, generator=generator)), 1)
    return x, output


def same_steps(stock: Any, ours: Any, timesteps: Tensor, exact: bool = False, **kwargs: Any) -> None:
    """Equal results and generator states at each of the timesteps, from the same input."""
    inputs = torch.Generator().manual_seed(1)
    generators = [torch.Generator().manual_seed(2) for _ in range(2)]
    learned = str(stock.config.get("variance_type")).startswith("learned")
    step = "step_pred" if hasattr(stock, "step_pred") else "step"
    for t in timesteps:
        x, output = draw(inputs, learned=learned)
        want, got = (
            getattr(s, step)(output.clone(), t, x.clone(), generator=g, **kwargs)
            for s, g in zip((stock, ours), generators, strict=True)
        )
        assert type(got) is type(want) and got.keys() == want.keys()
        assert torch.equal(generators[0].get_state(), generators[1].get_state())
        assert bool(want.prev_sample.isfinite().all())
        for key in want:
            assert got[key].dtype == want[key].dtype and got[key].shape == want[key].shape
            if exact:
                assert torch.equal(got[key], want[key]), (key, t)
            else:
                error = (got[key] - want[key]).abs() / want[key].abs().div(16).clamp(min=1)
                assert float(error.max()) <= PARITY, (key, int(t), float(error.max()))


CASES = [
    ("DDPMScheduler", {}),
    ("DDPMScheduler", {"thresholding": True}),
    ("DDPMScheduler", {"variance_type": "learned_range"}),
    ("DDPMScheduler", {"variance_type": "learned"}),
    ("DDIMScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("ScoreSdeVeScheduler", {}),
    *((name, {}) for name in COUNTING),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    ("LCMScheduler", {"thresholding": True}),
]


def prepared(
    name: str, config: dict[str, Any], device: torch.device | str = "cpu", **kwargs: Any
) -> tuple[Any, Any, tuple[Tensor, Tensor, Tensor]]:
    """(scheduler, its step, arguments), after set_begin_index as in a pipeline."""
    scheduler = getattr(fused, name)(**config, **kwargs)
    scheduler.set_timesteps(10, device=device)
    if name == "ScoreSdeVeScheduler":
        scheduler.set_sigmas(10)
    if name in ("DPMSolverMultistepScheduler", *COUNTING):
        scheduler.set_begin_index(5)
        scheduler.is_scale_input_called = True
    x, output = draw(torch.Generator().manual_seed(0), learned="variance_type" in config)
    step = scheduler.step_pred if name == "ScoreSdeVeScheduler" else scheduler.step
    return scheduler, step, (output.to(device), scheduler.timesteps[5], x.to(device))


def noised(scheduler: Any, x: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """add_noise, or what flow matching has in its place."""
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(x, timesteps, noise)
    return scheduler.add_noise(x, noise, timesteps)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_unet(**config: Any) -> diffusers.UNet2DModel:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **config,
    )


class NoReads(TorchDispatchMode):
    """Refuses what would wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal"), name
        self.calls = [*getattr(self, "calls", []), name]
        return func(*args, **(kwargs or {}))
