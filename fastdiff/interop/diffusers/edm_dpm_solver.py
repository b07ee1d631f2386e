"""EDMDPMSolverMultistepScheduler: DPM-Solver++ for networks with the preconditioning of EDM."""

from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from .common import Generators
from .dpm_solver import DPMSolver


class EDMDPMSolverMultistepScheduler(
    DPMSolver, diffusers.EDMDPMSolverMultistepScheduler, stock=diffusers.EDMDPMSolverMultistepScheduler
):
    """diffusers.EDMDPMSolverMultistepScheduler on the fused operations; see the package.

        x_0 = c_skip x_t + c_out F,    x_s = sigma_s / sigma_t x_t + (1 - sigma_s / sigma_t) ((1 + w) x_0 - w x_0')

    Reference: Karras et al. 2022, arXiv:2206.00364, eq. 7; Lu et al. 2022, arXiv:2211.01095, algorithm 2.
    """

    _predictions = ("epsilon", "v_prediction")

    def step(  # type: ignore[override]  # stock takes no noise
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """One step: x_0 from the prediction, and its sum with x_t, the ones before and noise, in one pass."""
        return super().step(model_output, timestep, sample, generator, None, return_dict)

    def _sigma_to_alpha_sigma_t(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(sigma), sigma  # stock's 1 has no place for several sigmas

    def _levels_key(self) -> tuple[Any, ...]:
        return self.config.prediction_type, self.config.sigma_data

    def _columns(self, alpha: Tensor, sigma: Tensor, of_noise: bool) -> tuple[Tensor | float, Tensor | float, Any]:
        data, total = self.config.sigma_data, sigma**2 + self.config.sigma_data**2
        sign = 1 if self.config.prediction_type == "epsilon" else -1
        return data**2 / total, sign * sigma * data / total**0.5, 1.0
