"""Flow matching: straight paths between data and noise, x_t = (1 - t) x_0 + t eps for t from 0 (data) to 1 (noise).

The network learns the velocity dx/dt = eps - x_0 (Lipman et al. 2023, arXiv:2210.02747; Liu et al. 2023,
arXiv:2209.03003). Its ODE is the probability-flow ODE of alpha = 1 - t, sigma = t, so all samplers serve, and Euler's
rule over t is "ddim". Esser et al. 2024 is arXiv:2403.03206 (Stable Diffusion 3).
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import named
from .continuous import ContinuousDiffusion
from .files import need
from .interpolation import along_the_circle
from .objective import OBJECTIVES, Weighting, needs_signal
from .ops.checks import check_choice, check_floating, check_like
from .process import KARRAS_RANGE, Grid, Process
from .reference import work_dtype
from .schedule import NoiseSchedule
from .support import transforms
from .support.scalars import as_count, as_number, as_positive
from .support.settable import settable
from .support.shapes import flat

# The last time if the objective leaves x_0 open in pure noise.
LAST_WITH_SIGNAL = 0.999


class Flow(Process):
    """alpha = 1 - t, sigma = t, f = -1 / (1 - t), g^2 = 2 t / (1 - t), t in [1e-5, 1]. The model sees 1000 t, as in
    Stable Diffusion 3.

    Args:
        shift: above 1 moves the times of sampling and training towards noise, t -> shift t / (1 + (shift - 1) t).
        last: the largest time. At 1 no signal is left, and samplers need an objective that tells x_0 there. Those that
            step along the score or in sigma / alpha start below 1.

    Reference: Esser et al. 2024, sections 2 and 5.3.2.
    """

    straight = True
    first, default_steps = 1e-5, 50

    def __init__(self, shift: float = 1.0, last: float = 1.0) -> None:
        self.shift, self.last = as_positive("shift", shift), as_number("last", last)
        if not self.first < self.last <= 1:
            raise ValueError(f"last: expected a time above {self.first} and at most 1, got {last}")

    def at(self, times: Tensor) -> NoiseSchedule:
        t = times.double()
        return NoiseSchedule(torch.log1p(-t), t, False, t, -1 / (1 - t), 2 * t / (1 - t))

    def condition(self, times: Tensor) -> Tensor:
        return 1000 * times

    def time_of(self, ratio: Tensor) -> Tensor:
        return 1 / (1 + 1 / ratio)

    def shifted(self, times: Tensor) -> Tensor:
        """shift t / (1 + (shift - 1) t) of the times t (N,), at most `last`."""
        return (self.shift * times / (1 + (self.shift - 1) * times)).clamp(max=self.last)

    def grid(self, steps: int | Iterable[float] | None) -> Grid:
        """As Process.grid, but n steps are n equal strides from `last` all the way to 0, shifted."""
        if not isinstance(steps, Iterable):
            number = as_count("steps", self.default_steps if steps is None else steps)
            start = self.last / (self.shift - (self.shift - 1) * self.last)
            steps = self.shifted(torch.linspace(start, 0, number + 1, dtype=torch.float64, device="cpu"))
            steps[0] = self.last  # without a rounding, by which alpha would not be 0
        return super().grid(steps)

    def ratio_range(self, sigma_min: float | None = None, sigma_max: float | None = None) -> tuple[float, float]:
        """As Process.ratio_range; sigma_max is 80 unless it is given, or less if `last` is."""
        end = min(self.last / (1 - self.last) if self.last < 1 else math.inf, KARRAS_RANGE[1])
        return super().ratio_range(sigma_min, end if sigma_max is None else sigma_max)


# --- times to train on ------------------------------------------------------------------------------------------
# Each is a function from u (N,), uniform over [0, 1], to times (N,) in [0, 1].


def uniform(u: Tensor) -> Tensor:
    """t = u, (N,). Reference: Liu et al. 2023, arXiv:2209.03003."""
    return u


def logit_normal(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """log(t / (1 - t)) ~ N(mean, std^2): times in the middle are drawn more often.

    Args:
        u: (N,), uniform over [0, 1].
        mean, std: of the logarithm; a mean below 0 draws more times near data.

    Returns: the times (N,) in [0, 1].
    Raises: ValueError unless std is above 0.
    Reference: Esser et al. 2024, arXiv:2403.03206, section 3.1.
    """
    if not std > 0:
        raise ValueError(f"std: expected a number above 0, got {std}")
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def mode(u: Tensor, scale: float = 1.29) -> Tensor:
    """t = 1 - u - scale (cos^2(pi u / 2) - 1 + u): times in the middle are drawn more often, and no time is rare.

    Args:
        u: (N,), uniform over [0, 1].
        scale: in [-1, 2 / (pi - 2)]; below 0 the ends are drawn more often.

    Returns: the times (N,) in [0, 1].
    Raises: ValueError for another scale.
    Reference: Esser et al. 2024, arXiv:2403.03206, section 3.1.
    """
    if not -1 <= scale <= 2 / (math.pi - 2):
        raise ValueError(f"scale: expected a number from -1 to 2 / (pi - 2), got {scale}")
    return 1 - u - scale * (torch.cos(math.pi / 2 * u).square() - 1 + u)


def cosmap(u: Tensor) -> Tensor:
    """t = 1 - 1 / (tan(pi u / 2) + 1): sigma / alpha as the cosine schedule has it.

    Args:
        u: (N,), uniform over [0, 1].

    Returns: the times (N,) in [0, 1].
    Reference: Esser et al. 2024, arXiv:2403.03206, section 3.1.
    """
    return 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)


Times = Callable[[Tensor], Tensor]
TIMES: dict[str, Times] = {"uniform": uniform, "logit_normal": logit_normal, "mode": mode, "cosmap": cosmap}


def resolution_shift(size: int, base: int) -> float:
    """The shift for images of `size` elements, if 1 is right for `base` of them: sqrt(size / base).

    Raises: ValueError unless both are integers of at least 1.
    Reference: Esser et al. 2024, arXiv:2403.03206, section 5.3.2.
    """
    return math.sqrt(as_count("size", size) / as_count("base", base))


def optimal_coupling(x0: Tensor, noise: Tensor) -> Tensor:
    """The noise in the order that makes the sum of |x_0 - noise|^2 least, for straighter paths.

        noise = optimal_coupling(x0, torch.randn_like(x0))
        loss = flow(x0, noise=noise)

    Args:
        x0: (B, ...), data.
        noise: (B, ...).

    Returns: (B, ...), the same noises. The assignment is solved on the CPU, in O(B^3).
    Raises: TypeError or ValueError if they differ in shape, type or device, and under torch.func.vmap. ImportError
        without scipy (extra [coupling]).
    Reference: Tong et al. 2023, arXiv:2302.00482, section 3.2.3.
    """
    check_floating("x0", x0)
    check_like("noise", noise, x0)
    dtype = work_dtype(x0.dtype)
    # The squares do not depend on the order: what is left is -2 x_0 noise.
    cost = -(flat(x0.detach()).to(dtype) @ flat(noise.detach()).to(dtype).T)
    if cost.is_meta:
        return torch.empty_like(noise)
    cost = cost.cpu()
    seen = transforms.bare(cost)
    if seen is not None and seen.ndim != 2:
        raise ValueError("x0, noise: expected one batch, got one for each call of torch.func.vmap")
    if not bool(cost.isfinite().all()):
        raise ValueError("x0, noise: expected finite numbers, got NaN or infinity")
    # Within a transform no tensor becomes an array, and no tensor of a subclass does.
    costs = cost.numpy() if seen is cost and not transforms.active() else (cost if seen is None else seen).tolist()
    order = need("scipy.optimize", "coupling").linear_sum_assignment(costs)[1]
    return noise[torch.from_numpy(order).to(noise.device)]


class FlowMatching(ContinuousDiffusion):
    """A flow matching model, or rectified flow (Lipman et al. 2023, arXiv:2210.02747).

    Args:
        model: called as model(x_t, 1000 t, **model_kwargs) with x_t (B, ...) and 1000 t (B,), float32 or float64 as the
            state; returns the prediction, shaped like x_t.
        objective: what the model predicts: "flow" = eps - x_0, "x0", "eps", or another of
            fastdiff.objective.OBJECTIVES.
        loss: "mse", "l1" or "huber".
        weighting: "simple" (1 on the error of the prediction) or "min_snr".
        times: that training draws: "uniform", "logit_normal", "mode" or "cosmap", or such a function of this module,
            with options as in functools.partial(logit_normal, mean=0.5). They are shifted too.
        shift: of the times, as in Flow; resolution_shift gives it for larger images.
        clip: the sampler keeps its estimate of x_0 in [-clip, clip]; None, as published, leaves it free.
        last: the time that sampling starts at. None is 1, or 0.999 for "eps" and "score", which tell nothing of x_0 in
            pure noise. The samplers "euler_maruyama" and "probability_flow" need a time below 1, too.

    `sample` takes Euler's rule ("ddim") in 50 steps unless it is told otherwise. Minibatch optimal transport is
    `optimal_coupling`.

    Raises: ValueError for an unknown name, and for last = 1 with an objective that leaves x_0 open there.

    >>> flow = FlowMatching(UNet(sample_size=32))
    >>> flow(torch.rand(8, 3, 32, 32) * 2 - 1).backward()
    >>> flow.sample(16, steps=20)
    """

    process: Flow
    default_sampler = "ddim"
    times: str | Times = settable("times")
    _starts_at_data = True

    def __init__(
        self,
        model: nn.Module,
        objective: str = "flow",
        loss: str = "mse",
        weighting: str | Weighting = "simple",
        times: str | Times = "logit_normal",
        shift: float = 1.0,
        clip: float | None = None,
        last: float | None = None,
    ) -> None:
        check_choice("objective", objective, OBJECTIVES)
        if last is None:
            last = LAST_WITH_SIGNAL if needs_signal(objective) else 1.0
        super().__init__(model, Flow(shift, last), objective, loss, weighting, clip)
        self.times = times
        FlowMatching.apply_options(self)

    def apply_options(self) -> None:
        super().apply_options()
        if not isinstance(self.process, Flow):
            raise TypeError(f"process: expected a Flow, got {type(self.process).__name__}")
        if self.process.last == 1 and needs_signal(self.objective):
            raise ValueError(
                f"objective: {self.objective!r} says nothing of x_0 at t = 1, where alpha = 0; use 'flow' or 'x0', or "
                f"a process that ends below 1, as Flow(last={LAST_WITH_SIGNAL}) does"
            )
        if not callable(self.times):
            check_choice("times", self.times, TIMES)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's options but the model, JSON-serialisable. ValueError if `times` is a function."""
        return {
            "objective": self.objective,
            "loss": self.loss_kind,
            "weighting": named("weighting", self.weighting),
            "times": named("times", self.times),
            "shift": self.process.shift,
            "clip": self.clip,
            "last": self.process.last,
        }

    def times_at(self, quantiles: Tensor) -> Tensor:
        """The times (B,) to train at, those of `times`, shifted, for quantiles (B,) in [0, 1)."""
        draw = TIMES[self.times] if isinstance(self.times, str) else self.times
        times = draw(quantiles.double())
        if not isinstance(times, Tensor) or times.shape != quantiles.shape:
            got = tuple(times.shape) if isinstance(times, Tensor) else type(times).__name__
            raise ValueError(f"times: expected shape {tuple(quantiles.shape)} of the function, got {got}")
        return self.process.shifted(times).clamp(min=self.process.first)

    def interpolate(
        self,
        x0: Tensor,
        x1: Tensor,
        weight: float | Tensor = 0.5,
        *,
        steps: int | Iterable[float] | Grid | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """Samples between two images: both are encoded, mixed along the great circle, and decoded.

        Args:
            x0, x1: (B, ...), the images.
            weight: of x1, in [0, 1], a number or (B,).
            steps: as in `sample`.
            model_kwargs: the model's further arguments.

        Raises: ValueError or TypeError, naming the argument.
        Reference: Song et al. 2021, arXiv:2010.02502, section 5.3.
        """
        return along_the_circle(self, x0, x1, weight, steps=steps, **model_kwargs)
