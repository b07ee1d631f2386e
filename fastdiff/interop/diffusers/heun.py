"""HeunDiscreteScheduler: Heun's rule on the probability-flow ODE, with two calls of the network a step.

Flow matching's shares what is between the calls."""

import functools
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteSchedulerOutput
from torch import Tensor

from .common import PREDICTIONS, alike
from .sigmas import (
    SigmaScheduler,
    VarianceExplodingScheduler,
    derivative_rows,
    in_float32,
    result_types,
    two_results,
    x0_from_sigma,
)


class HalfwayScheduler(SigmaScheduler):
    """A scheduler with steps in two halves, the first of which leaves x_t + (sigma_s - sigma_t) d/2 to the second."""

    dt: Tensor | None
    sample: Tensor | None
    _halfway: Tensor | None = None  # x_t + (sigma_s - sigma_t) d/2, of one that this step made

    @property
    def prev_derivative(self) -> Tensor | None:
        """d of the first half, for stock's second half."""
        if self._halfway is not None and self.sample is not None and self.dt is not None:
            return (self._halfway - self.sample) * (2 / self.dt)
        found: Tensor | None = self.__dict__.get("prev_derivative")
        return found

    @prev_derivative.setter
    def prev_derivative(self, value: Tensor | None) -> None:
        self.__dict__["prev_derivative"], self._halfway = value, None

    def _goes_on(self, sample: Tensor) -> bool:
        """Whether this is a first half, or goes on with a first half of ours and of the same shape."""
        before = self._halfway
        if self.dt is None:
            return True
        return before is not None and before.shape == sample.shape and before.device == sample.device

    def _hand_over(self) -> Any:
        """NotImplemented, after leaving a second half to stock's step."""
        if self._halfway is not None:
            self.prev_derivative = self.prev_derivative  # the number in place of what it is computed from
        return NotImplemented


class HeunDiscreteScheduler(
    HalfwayScheduler,
    VarianceExplodingScheduler,
    diffusers.HeunDiscreteScheduler,
    stock=diffusers.HeunDiscreteScheduler,
):
    """diffusers.HeunDiscreteScheduler on the fused operations; see the package.

        d  = (x_t - x_0)/sigma_t,    x'  = x_t + (sigma_s - sigma_t) d
        d' = (x' - x_0')/sigma_s,    x_s = x_t + (sigma_s - sigma_t) (d + d')/2

    The first half of a step takes two passes: it also leaves x_t + (sigma_s - sigma_t) d/2 to the second half.

    Reference: Karras et al. 2022, arXiv:2206.00364, algorithm 1.
    """

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> HeunDiscreteSchedulerOutput | tuple[Tensor, ...]:
        """Half a step: x_0 and its sum with x_t in one pass, and in the first half what the second needs."""
        known = self.config.prediction_type in PREDICTIONS and isinstance(self.sigmas, Tensor)
        if not (known and alike(sample, model_output) and self._goes_on(sample)):
            return self._hand_over()
        i, config, device = self._place(timestep), self.config, sample.device
        prediction, clip = config.prediction_type, config.clip_sample_range if config.clip_sample else None
        dtypes = result_types(prediction, sample, model_output)
        # The key has all of the configuration that is in them.
        first, second, dts = self._tables.get(
            "steps", lambda: self._steps(device, clip is not None), (self.sigmas,), device, prediction, clip is None
        )
        if i >= len(dts):
            return self._hand_over()  # stock's error, or NaN
        if self.dt is None:
            x = in_float32(sample)
            self._halfway, x0 = two_results(x, model_output, first, i, (x.dtype, dtypes[1]), clip)
            prev_sample = torch.lerp(x, self._halfway, 2.0)
            prev_sample = prev_sample if x.dtype == dtypes[0] else prev_sample.to(dtypes[0])
            self.dt, self.sample = dts[i], sample
        else:
            prev_sample, x0 = two_results(sample, model_output, second, i, dtypes, clip, noise=self._halfway)
            self.dt = self.sample = self._halfway = None
        self._step_index += 1
        if not return_dict:
            return (prev_sample, x0)
        return HeunDiscreteSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)

    def _steps(self, device: torch.device, clipped: bool) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Rows (n, WIDE) of half the way of first halves, (n, WIDE) of second halves, and dt of every step.

        A second half is numbered by its own place: it comes from the level before and ends at this one. It takes what
        is left to it in the column of noise.
        """
        sigma = self.sigmas[:-1].double()
        dt = self.sigmas[1:] - sigma
        a, b = x0_from_sigma(self.config.prediction_type, sigma, sigma)
        make = functools.partial(derivative_rows, a, b, clipped=clipped)
        first = make(dt / sigma / 2, kept_from_x0=1.0)
        second = make(dt.roll(1) / sigma / 2, x=0.0, noise=1.0, kept_from_x0=1.0)
        return first.to(device), second.to(device), self.sigmas.diff().unbind()
