"""What both schedulers of DPM2 share: the midpoint rule, with two calls of the network a step."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ... import ops
from ...rows import make_rows
from .common import Generators, alike
from .sigmas import VarianceExplodingScheduler, derivative_rows, in_float32, two_results, x0_from_sigma


class MidpointScheduler(VarianceExplodingScheduler, ABC):
    """The midpoint rule along dx/dsigma = (x - x_0)/sigma, down to a level from which noise leads up again.

        x_m = x_t + (sigma_m - sigma_t)/sigma_t (x_t - x_0)
        x_s = x_t + (sigma_d - sigma_t)/sigma_m (x_m - x_0') + up z,    x_0': the prediction at x_m

    The noise is added to x_t in a pass of its own.

    Reference: Karras et al. 2022, arXiv:2206.00364, algorithm 2; k-diffusion's sample_dpm_2 and sample_dpm_2_ancestral.
    """

    sample: Tensor | None  # x_t, in the second half of a step
    sigmas_interpol: Tensor

    @abstractmethod
    def _sources(self) -> tuple[Tensor, ...]:
        """The tensors that the levels are made of."""

    @abstractmethod
    def _levels_of_steps(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """sigma_m, sigma_d and up by the place of a step's first half; None without noise."""

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """x / sqrt(sigma^2 + 1), by a number that was made for the whole run."""
        sigmas, first = self.sigmas, self.sample is None
        if is_compiling() or not isinstance(sigmas, Tensor):
            return NotImplemented

        def build() -> tuple[Tensor, ...]:
            return (((sigmas if first else self._levels_of_steps()[0].roll(1)) ** 2 + 1) ** 0.5).unbind()

        i = self._place(timestep)
        name, source = ("scales", sigmas) if first else ("scales between", self.sigmas_interpol)
        return sample / self._tables.get(name, build, (source,))[i]

    def _half(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, generator: Generators = None
    ) -> tuple[Tensor, Tensor]:
        """(x_m or x_s, x_0) of half a step; NotImplemented if stock's step must run."""
        start, prediction, device = self.sample, self.config.prediction_type, sample.device
        if prediction not in ("epsilon", "v_prediction") or not isinstance(self.sigmas, Tensor):
            return NotImplemented  # stock's error
        if not (alike(sample, model_output) if start is None else alike(sample, model_output, start)):
            return NotImplemented
        i, dtype = self._place(timestep), sample.dtype
        # The keys have all of the configuration that is in them.
        if start is None:
            sources = self.sigmas, self.sigmas_interpol
            rows = self._tables.get("first", lambda: self._first_halves(device), sources, device, prediction)
        else:
            rows, noisy, up = self._tables.get(
                "second", lambda: self._second_halves(device), self._sources(), device, prediction
            )
        if i >= rows.shape[0]:
            return NotImplemented  # stock's error, or NaN
        if dtype != model_output.dtype:
            dtype = torch.promote_types(dtype, model_output.dtype)
        if start is None:
            results = two_results(sample, model_output, rows, i, (dtype, dtype))
            self.sample = sample
        else:
            widest = dtype
            if dtype != start.dtype:
                widest = torch.promote_types(dtype, start.dtype)
                sample = sample.to(widest)
            if up:
                noise = self._noise(model_output, generator, i)
                if "noise" in noise:  # an operation of PyTorch holds up the host less than one of ours
                    start = torch.addcmul(in_float32(start), noise["noise"], up[i])
                else:
                    start = ops.update(in_float32(start), model_output, noisy, i, **noise)
            results = two_results(sample, model_output, rows, i, (widest, dtype), noise=start)
            self.sample = None
        self._step_index += 1
        return results

    def _first_halves(self, device: torch.device) -> Tensor:
        """Rows by place."""
        sigma, middle, _ = self._in_float64(device)
        a, b = x0_from_sigma(self.config.prediction_type, sigma, sigma)
        return derivative_rows(a, b, (middle - sigma) / sigma, kept_from_x0=1.0)

    def _second_halves(self, device: torch.device) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Rows by place, which take x_t in the column of noise, rows of x_t with noise, and what multiplies it."""
        sigma, middle, down = self._in_float64(device)
        up = self._levels_of_steps()[2]
        a, b = x0_from_sigma(self.config.prediction_type, middle, middle)
        rows = derivative_rows(a, b, (down - sigma) / middle, x=0.0, noise=1.0, kept_from_x0=1.0).roll(1, 0)
        if up is None:
            return rows, rows, ()
        up = up[: len(sigma)].to(device).roll(1)
        return rows, make_rows(up, torch.float32, from_x=1.0, noise=up), up.unbind()

    def _in_float64(self, device: torch.device) -> tuple[Tensor, ...]:
        """sigma_t, sigma_m and sigma_d by the place of a step's first half."""
        count = len(self.timesteps)
        return tuple(levels[:count].to(device).double() for levels in (self.sigmas, *self._levels_of_steps()[:2]))
