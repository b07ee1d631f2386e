"""DPMSolverMultistepInverseScheduler: DPM-Solver from data to noise."""

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from .common import Generators
from .dpm_solver import DPMSolver


class DPMSolverMultistepInverseScheduler(
    DPMSolver, diffusers.DPMSolverMultistepInverseScheduler, stock=diffusers.DPMSolverMultistepInverseScheduler
):
    """diffusers.DPMSolverMultistepInverseScheduler on the fused operations; see the package.

    The rows are those of `DPMSolverMultistepScheduler`, of levels that rise:

        x_s = sigma_s / sigma_t x_t + k (1 + w) x_0 - k w x_0',    sigma_s > sigma_t

    Reference: Lu et al. 2022, arXiv:2206.00927 and arXiv:2211.01095, algorithm 2.
    """

    _begin_index = None  # stock has none

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """One step: x_0 or eps from the prediction, and its sum with x_t, the ones before and noise, in one pass."""
        return self._solve(model_output, timestep, sample, generator, variance_noise, return_dict)
