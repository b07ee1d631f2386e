"""What the schedulers that count their steps share: places in self.timesteps, sigmas, a step in one pass."""

import warnings
from numbers import Integral
from typing import Any

import torch
from diffusers.schedulers.scheduling_euler_discrete import logger
from torch import Tensor
from torch.compiler import is_compiling

from ... import ops
from ...ops.checks import wants_gradient
from ...reference import work_dtype
from ...rows import columns, history_columns, make_rows
from ...support import transforms
from ..stock import noising
from .common import FusedScheduler, Generators, addable, alike, index_of

SAMPLE = ("sample", "original_sample")
WHOLE = (torch.int32, torch.int64)
WITHOUT: dict[str, Any] = {"noisy": False}


class CountingScheduler(FusedScheduler):
    """A scheduler that counts its steps. A timestep says where to start."""

    step_index: int
    _step_index: Any  # what step_index reads, an int or None
    begin_index: int | None

    def _init_step_index(self, timestep: float | Tensor) -> None:
        t = self._number(timestep) if self.begin_index is None else None
        found = [] if t is None else [i for i, s in enumerate(self._host_timesteps()) if s == t]
        if not found:
            return NotImplemented  # the index that is set, a timestep that is not free to read, or stock's error
        self._step_index = found[1 if len(found) > 1 else 0]  # as index_for_timestep

    def _place(self, timestep: Any) -> int:
        """The number of this step."""
        if self._step_index is None:
            self._init_step_index(timestep)
        return self._step_index

    def _own_place(self, timestep: Any) -> int | None:
        """The number of this step, whose row has the numbers of its own timestep; None past the end, or if the given
        timestep is known to be another."""
        i, t = self._place(timestep), self._number(timestep)
        known = t is not None and not torch.compiler.is_compiling()
        return None if i >= len(self.timesteps) or (known and t != self._host_timesteps()[i]) else i

    def _left_to_stock(self, option: str) -> Any:
        """NotImplemented, with a word about it. Python shows a warning once for each place of the call."""
        warnings.warn(f"{option}: the step of diffusers runs, since no kernel takes it", stacklevel=4)
        return NotImplemented


class SigmaScheduler(CountingScheduler):
    """A counting scheduler with the sigmas of its levels beside the timesteps."""

    sigmas: Tensor

    def _levels(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        """What multiplies x_0 and the noise at the levels."""
        return torch.ones_like(sigmas), sigmas

    def _noised(self, x: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """x_0 with noise at the timesteps' places in self.timesteps, or at the current step of a pipeline."""
        if not (isinstance(self.sigmas, Tensor) and isinstance(timesteps, Tensor) and addable(x, noise)):
            return NotImplemented

        device = x.device
        if self.begin_index is None:
            # As index_for_timestep: the second of several. A stranger gets a place outside of the table.
            hits = self.timesteps.to(device) == timesteps.to(device).reshape(-1, 1)
            count = hits.sum(1, keepdim=True)
            place = (hits & (hits.cumsum(1) == count.clamp(max=2))).int().argmax(1)
            index = torch.where(count[:, 0] > 0, place, len(self.sigmas))
        else:
            index = index_of(self.begin_index if self.step_index is None else self.step_index, device)
        return self._noised_at(x, noise, index)

    def _noised_at(self, x: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """x_0 with the noise of the levels at these places."""

        def build() -> Tensor:
            return torch.stack(self._levels(self.sigmas.to(dtype)), 1).to(device)

        device, dtype = x.device, work_dtype(x)
        return noising(x, noise, index, self._table("levels", build, (self.sigmas,), device, dtype))

    def _takes(self, model_output: Tensor, timestep: Any, sample: Tensor) -> bool:
        """Whether a fused step takes them. Stock refuses whole numbers: they look like places, not timesteps."""
        if isinstance(timestep, Tensor):
            refused = timestep.dtype in WHOLE and timestep.is_cpu
        else:
            refused = isinstance(timestep, Integral)
        return not refused and isinstance(self.sigmas, Tensor) and alike(sample, model_output)


class FlowScheduler(SigmaScheduler):
    """A scheduler for x = (1 - sigma) x_0 + sigma noise, whose network says v = noise - x_0."""

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor | None = None) -> Tensor:
        """(1 - sigma) x_0 + sigma noise in one pass."""
        return NotImplemented if noise is None else self._noised(sample, noise, timestep)

    def _levels(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - sigmas, sigmas

    def _rows_to_noise(self, device: torch.device) -> Tensor:
        """Rows of x_s = (1 - sigma_s)(x_t - sigma_t v) + sigma_s z."""
        sigma, to = self.sigmas[:-1], self.sigmas[1:]
        rows = make_rows(sigma, torch.float32, x0_from_x=1.0, x0_from_pred=-sigma, from_x0=1 - to, noise=to)
        return rows.to(device)


class VarianceExplodingScheduler(SigmaScheduler):
    """A scheduler for x = x_0 + sigma noise."""

    is_scale_input_called: bool

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_0 + sigma noise at the timesteps' places in self.timesteps, or at the current step of a pipeline."""
        return self._noised(original_samples, noise, timesteps)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """x_t / sqrt(sigma_t^2 + 1), by a number that was made for the whole run."""
        sigmas = self.sigmas
        if is_compiling() or not isinstance(sigmas, Tensor):
            return NotImplemented
        i = self._place(timestep)
        # Nothing of the configuration is in them.
        scales = self._tables.get("scales", lambda: ((sigmas**2 + 1) ** 0.5).unbind(), (sigmas,))
        self.is_scale_input_called = True
        return sample / scales[i]

    def _remind_of_scaling(self) -> None:
        if not (self.is_scale_input_called or is_compiling()):
            logger.warning("scale_model_input: expected to be called before step, and to scale the model's input")


class ChurningScheduler(VarianceExplodingScheduler):
    """Euler's rule, after churning, along dx/dsigma = (x - x_0)/sigma.

        sigma^ = (1 + gamma) sigma
        x^     = x + s_noise sqrt(sigma^2 - sigma^2) z
        x'     = x^ + (sigma_next - sigma^)/sigma^ (x^ - x_0)

    The hats are on sigma and x after the churning.

    Reference: Karras et al. 2022, arXiv:2206.00364, algorithm 2 without its second half.
    """

    predictions: tuple[str, ...]  # those that stock does not refuse

    def _x0_columns(self, sigma: Tensor, sigma_hat: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """(x0_from_x, x0_from_pred) of the steps."""
        return x0_from_sigma(self.config.prediction_type, sigma, sigma_hat)

    def _scale(self) -> float | None:
        """What `_x0_columns` depends on beside the prediction."""
        return None

    def _euler(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        churn: tuple[float, float, float, float],
        generator: Generators,
    ) -> tuple[Tensor, Tensor]:
        """(x', x_0); NotImplemented if stock's step must run."""
        prediction = self.config.prediction_type
        if prediction not in self.predictions or not self._takes(model_output, timestep, sample):
            return NotImplemented
        self._remind_of_scaling()
        i = self._place(timestep)
        if i + 1 >= self.sigmas.shape[0]:  # len() of a tensor costs more
            return NotImplemented  # stock's error
        device = sample.device
        rows, churning, churned = self._table(
            "steps", lambda: self._steps(device, *churn), (self.sigmas,), device, prediction, self._scale(), churn
        )
        if churned and churned[i]:
            noise = self._noise(model_output, generator, i)
            sample = ops.update(in_float32(sample), model_output, churning, i, **noise)
        dtype = model_output.dtype
        x0_dtype = dtype if prediction in SAMPLE else torch.promote_types(dtype, torch.float32)
        prev_sample, x0 = two_results(sample, model_output, rows, i, (dtype, x0_dtype))
        self._step_index += 1
        return prev_sample, x0

    def _steps(
        self, device: torch.device, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float
    ) -> tuple[Tensor, Tensor, list[bool]]:
        """Rows (n, WIDE) of the steps, rows (n, WIDTH) of the churning before them, and which steps have it."""
        sigma, sigma_next = self.sigmas[:-1].double(), self.sigmas[1:]
        gamma = min(s_churn / (len(self.sigmas) - 1), 2**0.5 - 1)
        within = (s_tmin <= sigma) & (sigma <= s_tmax)
        sigma_hat = torch.where(within, sigma * (gamma + 1), sigma)
        a, b = self._x0_columns(sigma, sigma_hat)
        rows = derivative_rows(a, b, (sigma_next - sigma_hat) / sigma_hat, kept_from_x0=1.0)
        std = s_noise * (sigma_hat**2 - sigma**2).clamp(min=0) ** 0.5  # stock adds no noise if gamma < 0
        churning = make_rows(sigma, torch.float32, from_x=1.0, noise=std)
        churned = transforms.as_list(within) if gamma > 0 else []  # a compiler cannot read it
        return rows.to(device), churning.to(device), churned


def derivative_rows(
    a: Tensor | float, b: Tensor | float, share: Tensor, *, x: float = 1.0, clipped: bool = False, **others: Any
) -> Tensor:
    """Rows of x' = `x` x_t + share (x_t - x_0), x_0 = a x_t + b pred, for float64 numbers.

    If x_0 is not clipped, the small difference comes from x_t and pred, and not from two large numbers.
    """
    if clipped:
        others.update(from_x0=-share, from_x=x + share)
    else:
        others.update(from_x=x + share * (1 - a), from_pred=-share * b)
    return make_rows(share, torch.float32, x0_from_x=a, x0_from_pred=b, **others)


def x0_from_sigma(prediction: str, sigma: Tensor, sigma_hat: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """(x0_from_x, x0_from_pred) where x = x_0 + sigma noise. Like stock, v is read at the level before the churning."""
    if prediction in SAMPLE:
        return 0.0, 1.0
    if prediction == "epsilon":
        return 1.0, -sigma_hat
    return 1 / (sigma**2 + 1), -sigma / (sigma**2 + 1) ** 0.5


def in_float32(x: Tensor) -> Tensor:
    """x, in float32 if it has a smaller type: where stock computes, and what comes is not rounded in between."""
    return x if x.dtype == torch.float32 else x.to(torch.promote_types(x.dtype, torch.float32))


def result_types(prediction: str, x: Tensor, pred: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The types of stock's x' and x_0: a prediction of x_0 stays as it is."""
    dtype = x.dtype if x.dtype == pred.dtype else torch.promote_types(x.dtype, pred.dtype)
    return dtype, pred.dtype if prediction == "sample" else dtype


def two_results(
    x: Tensor,
    pred: Tensor,
    rows: Tensor,
    i: int | Tensor,
    dtypes: tuple[torch.dtype, torch.dtype],
    clip: float | None = None,
    **noise: Any,
) -> tuple[Tensor, Tensor]:
    """x' and the mix that row i keeps, in the two types, by one launch.

    If gradients are wanted, it takes an operation for each of them: none with two results has a gradient.
    """
    noise, dtype = noise or WITHOUT, x.dtype
    if dtype != pred.dtype:
        dtype = torch.promote_types(dtype, pred.dtype)
        x = x.to(dtype)
    if wants_gradient(x, pred, *noise.values()) or transforms.active():
        row, history = columns(rows), history_columns(rows)
        mixing = make_rows(
            rows[:, 0], x0_from_x=row.x0_from_x, x0_from_pred=row.x0_from_pred,
            from_x0=history.kept_from_x0, from_x=history.kept_from_x,
        )  # fmt: skip
        kept = ops.combine(in_float32(x), pred, mixing, i, clip=clip)
        return ops.update(x, pred, rows, i, clip=clip, **noise).to(dtypes[0]), kept.to(dtypes[1])
    kept = torch.empty_like(x) if dtype == dtypes[1] else torch.empty_like(x, dtype=dtypes[1])
    out = ops.update(x, pred, rows, i, hist=kept, keep="new mix", clip=clip, **noise)
    return out if dtype == dtypes[0] else out.to(dtypes[0]), kept
