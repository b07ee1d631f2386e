"""IPNDMScheduler: the linear multistep rule of order 4 for equal steps, along an arc from noise to data."""

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ...rows import MAX_SLOTS, make_rows
from ...steps.adams import EQUAL
from ...steps.weights import ring
from ..stock import promoted
from .common import alike
from .multistep import HistoryScheduler
from .sigmas import CountingScheduler


class IPNDMScheduler(HistoryScheduler, CountingScheduler, diffusers.IPNDMScheduler, stock=diffusers.IPNDMScheduler):
    """diffusers.IPNDMScheduler on the fused operations; see the package.

        e_t = sigma_t x_t + alpha_t pred
        e   = (55 e_t - 59 e_(t+1) + 37 e_(t+2) - 9 e_(t+3)) / 24,    fewer of them at the start
        x_s = alpha_s (x_t - sigma_t e)/alpha_t + sigma_s e

    `ets` holds the last three e_t, which is all that a later step needs.

    Reference: Liu et al. 2022, arXiv:2202.09778, eq. 9 and 12.
    """

    betas: Tensor  # the sigma of the formula
    alphas: Tensor
    ets: list[Tensor]

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """One step: e_t, and its sum with x_t and the ones before, in one pass."""
        before = self.ets[-MAX_SLOTS:]
        if self.num_inference_steps is None or not alike(sample, model_output, *before):
            return NotImplemented
        i, device = self._place(timestep), sample.device
        if i + 1 >= self.betas.shape[0]:
            return NotImplemented  # stock's error
        x, output, *before = promoted(sample, model_output, *before)
        rows = self._table("steps", lambda: self._steps(device), (self.betas, self.alphas), device)
        prev_sample, kept = self._in_turn(x, output, rows[len(before)], i, before, MAX_SLOTS)
        self.ets[:] = [*before, kept][-MAX_SLOTS:]
        self._step_index += 1
        if not return_dict:
            return (prev_sample,)
        return SchedulerOutput(prev_sample=prev_sample)

    def _steps(self, device: torch.device) -> list[Tensor]:
        """Rows of the steps by the number of e_t that are remembered."""
        (alpha, sigma), (alpha_s, sigma_s) = (
            (self.alphas[places].double(), self.betas[places].double()) for places in (slice(-1), slice(1, None))
        )
        ratio = alpha_s / alpha.clamp(min=1e-8)
        from_e = sigma_s - ratio * sigma
        tables = []
        for weights in EQUAL:
            # Where alpha = 0, x_t - sigma_t e_t is 0: it is taken from x_t and pred, and not from two large numbers.
            own = weights[0] * sigma
            ages = from_e[:, None] * from_e.new_tensor([*weights[1:], 0.0, 0.0, 0.0])[:MAX_SLOTS]
            rows = make_rows(
                sigma, torch.float32, x0_from_x=sigma, x0_from_pred=alpha, kept_from_x0=1.0,
                from_x=ratio * (1 - own * sigma) + sigma_s * own, from_pred=from_e * weights[0] * alpha, **ring(ages),
            )  # fmt: skip
            tables.append(rows)
        return list(torch.stack(tables).to(device).unbind())
