"""What both schedulers of DPM2 share: the midpoint rule, with two calls of the network a step."""

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ... import ops
from ...rows import make_rows
from .common import Generators, alike
from .sigmas import VarianceExplodingScheduler, derivative_rows, two_results, x0_from_sigma


class MidpointScheduler(VarianceExplodingScheduler):
    """The midpoint rule along dx/dsigma = (x - x_0)/sigma, down to a level from which noise leads up again.

        x_m = x_t + (sigma_m - sigma_t)/sigma_t (x_t - x_0)
        x_s = x_t + (sigma_d - sigma_t)/sigma_m (x_m - x_0') + up z,    x_0': the prediction at x_m

    The noise is added to x_t in a pass of its own.

    Reference: Karras et al. 2022, arXiv:2206.00364, algorithm 2; k-diffusion's sample_dpm_2 and sample_dpm_2_ancestral.
    """

    sample: Tensor | None  # x_t, in the second half of a step
    sigmas_interpol: Tensor

    def _sources(self) -> tuple[Tensor, ...]:
        """The tensors that the rows are made of."""
        raise NotImplementedError

    def _levels_of_steps(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """sigma_m, sigma_d and up by the place of a step's first half; None without noise."""
        raise NotImplementedError

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """x / sqrt(sigma^2 + 1), by a number that was made for the whole run."""
        if is_compiling() or not isinstance(self.sigmas, Tensor):
            return NotImplemented
        i = self._place(timestep)

        def build() -> tuple[tuple[Tensor, ...], ...]:
            middle = self._levels_of_steps()[0].roll(1)
            return tuple(((sigma**2 + 1) ** 0.5).unbind() for sigma in (self.sigmas, middle))

        first, second = self._tables.get("scales", build, (self.sigmas, self.sigmas_interpol))
        return sample / (first if self.sample is None else second)[i]

    def _half(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, generator: Generators = None
    ) -> tuple[Tensor, Tensor]:
        """(x_m or x_s, x_0) of half a step; NotImplemented if stock's step must run."""
        start, prediction = self.sample, self.config.prediction_type
        if prediction not in ("epsilon", "v_prediction") or not isinstance(self.sigmas, Tensor):
            return NotImplemented  # stock's error
        if not alike(sample, model_output, *(() if start is None else (start,))):
            return NotImplemented
        i, device = self._place(timestep), sample.device
        if i >= len(self.timesteps):
            return NotImplemented  # stock's error, or NaN
        first, second, noisy = self._table("steps", lambda: self._steps(device), self._sources(), device, prediction)
        both = torch.promote_types(sample.dtype, model_output.dtype)
        if start is None:
            results = two_results(sample, model_output, first, i, (both, both))
            self.sample = sample
        else:
            if noisy is not None:
                start = ops.update(start, start, noisy, i, **self._noise(model_output, generator, i))
            results = two_results(sample, model_output, second, i, (both, both), noise=start)
            self.sample = None
        self._step_index += 1
        return results

    def _steps(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows of first halves, of second halves, and of x_t with noise; the latter two by the place of the second."""
        count, (middle, down, up) = len(self.timesteps), self._levels_of_steps()
        sigma, middle, down = (levels[:count].to(device).double() for levels in (self.sigmas, middle, down))
        prediction = self.config.prediction_type
        a, b = x0_from_sigma(prediction, sigma, sigma)
        first = derivative_rows(a, b, (middle - sigma) / sigma, kept_from_x0=1.0)
        a, b = x0_from_sigma(prediction, middle, middle)
        second = derivative_rows(a, b, (down - sigma) / middle, x=0.0, noise=1.0, kept_from_x0=1.0)
        noisy = None if up is None else make_rows(sigma, torch.float32, from_x=1.0, noise=up[:count].to(device))
        return first, second.roll(1, 0), None if noisy is None else noisy.roll(1, 0)
