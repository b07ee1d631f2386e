"""DPMSolverMultistepInverseScheduler: DPM-Solver from data to noise."""

import diffusers

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
