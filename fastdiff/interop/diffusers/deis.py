"""DEISMultistepScheduler: exponential integrators of orders 1 to 3, in log rho."""

import functools
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ..stock import promoted
from .common import PREDICTIONS
from .multistep import MultistepScheduler


class DEISMultistepScheduler(
    MultistepScheduler, diffusers.DEISMultistepScheduler, stock=diffusers.DEISMultistepScheduler
):
    """diffusers.DEISMultistepScheduler on the fused operations; see the package.

        x_s = alpha_s (x_t / alpha_t + c_0 eps + c_1 eps' + c_2 eps''),    c_i: integrals of Lagrange's polynomials

    Reference: Zhang & Chen 2022, arXiv:2204.13902, eq. 14 and 15.
    """

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """One step: eps from the prediction, and its sum with x_t and the ones before, in one pass."""
        config = self.config
        if config.prediction_type not in (*PREDICTIONS, "flow_prediction") or config.algorithm_type != "deis":
            return NotImplemented  # stock's error
        if not self._takes(model_output, sample):
            return NotImplemented
        i, n = self._place(timestep), len(self.timesteps)
        if i >= n:
            return NotImplemented  # stock's error
        few = config.lower_order_final and n < 15
        order = min(config.solver_order, self.lower_order_nums + 1, max(n - i, 1) if few else 3)
        sample, output = promoted(sample, model_output)
        if config.thresholding:
            output = self._thresholded(sample, output, i, of_noise=True)
        rows = self._table(
            "steps", functools.partial(self._steps, sample.device), (self.sigmas,), sample.device,
            config.prediction_type, config.use_flow_sigmas, config.thresholding, len(self.model_outputs),
        )  # fmt: skip
        prev_sample = self._step_with(sample, output, rows[order - 1], i)
        if not return_dict:
            return (prev_sample,)
        return SchedulerOutput(prev_sample=prev_sample)

    def _columns(self, alpha: Tensor, sigma: Tensor, of_noise: bool) -> tuple[Tensor | float, Tensor | float, Any]:
        """As those of all, but eps of v comes by way of x_0: for flow sigmas alpha^2 + sigma^2 is not 1."""
        config = self.config
        if of_noise and config.prediction_type == "v_prediction" and config.use_flow_sigmas:
            return ((1 - alpha.double() ** 2) / sigma).float(), alpha, 1.0
        return super()._columns(alpha, sigma, of_noise)

    def _steps(self, device: torch.device) -> list[Tensor]:
        """Rows of the steps by each order."""
        stock = diffusers.DEISMultistepScheduler
        rules = (
            stock.deis_first_order_update,
            stock.multistep_deis_second_order_update,
            stock.multistep_deis_third_order_update,
        )
        return self._rows_by_order(rules, device, of_noise=True)
