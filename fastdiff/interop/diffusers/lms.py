"""LMSDiscreteScheduler: the linear multistep method of orders 1 to 4."""

import warnings

import diffusers
import torch
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteSchedulerOutput
from torch import Tensor
from torch.compiler import is_compiling

from ... import ops
from ...rows import MAX_SLOTS, make_rows
from ...steps.weights import ring
from ..stock import promoted
from .common import PREDICTIONS, alike, say_once
from .multistep import HistoryScheduler, weights_at
from .sigmas import VarianceExplodingScheduler, x0_from_sigma


class LMSDiscreteScheduler(
    HistoryScheduler, VarianceExplodingScheduler, diffusers.LMSDiscreteScheduler, stock=diffusers.LMSDiscreteScheduler
):
    """diffusers.LMSDiscreteScheduler on the fused operations; see the package.

        d   = (x_t - x_0)/sigma_t
        x_s = x_t + sum_k w_k d_k,    w_k: the integral of Lagrange's polynomial of d_k from sigma_t to sigma_s

    The integrals are exact. `derivatives` holds the last three d, which is all that a later step needs.

    Reference: k-diffusion's sample_lms.
    """

    derivatives: list[Tensor]

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        order: int = 4,
        return_dict: bool = True,
    ) -> LMSDiscreteSchedulerOutput | tuple[Tensor, ...]:
        """One step: d and its sum with x_t and the ones before in one pass; the prediction of x_0 is another."""
        prediction, before = self.config.prediction_type, self.derivatives[-MAX_SLOTS:]
        if prediction not in PREDICTIONS or not isinstance(self.sigmas, Tensor):
            return NotImplemented  # stock's error
        if not 1 <= order <= MAX_SLOTS + 1:
            say_once(f"LMSDiscreteScheduler with order={order}")
            return NotImplemented
        if not alike(sample, model_output, *before):
            return NotImplemented
        if not (self.is_scale_input_called or is_compiling()):
            warnings.warn(
                "scale_model_input: expected to be called before step, and to scale the model's input", stacklevel=3
            )
        i, device = self._place(timestep), sample.device
        if i + 1 >= self.sigmas.shape[0]:
            return NotImplemented  # stock's error
        x, output = promoted(sample, model_output)
        state, said, *before = promoted(x, output, *before)
        rows, x0_rows = self._table(
            "steps", lambda: self._steps(device, order), (self.sigmas,), device, prediction, order
        )
        x0 = model_output if prediction == "sample" else ops.combine(x, output, x0_rows, i)
        prev_sample, kept = self._in_turn(state, said, rows, i, before, MAX_SLOTS)
        # Stock drops at most one of them, also if the order falls by more.
        self.derivatives[:] = [*self.derivatives, kept][-max(order, len(self.derivatives)) :][-MAX_SLOTS:]
        self._step_index += 1
        if not return_dict:
            return (prev_sample, x0)
        return LMSDiscreteSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)

    def _steps(self, device: torch.device, order: int) -> tuple[Tensor, Tensor]:
        """Rows of the steps, and rows of x_0. What a run that starts in the middle lacks is 0, as if left out."""
        sigma = self.sigmas[:-1].double()
        prediction, weights = self.config.prediction_type, self._weights(order)
        a, b = x0_from_sigma(prediction, sigma, sigma)
        # The difference of x_t and a predicted x_0 is small. Like stock this takes it before it divides.
        unit = sigma if prediction == "sample" else torch.ones_like(sigma)
        rows = make_rows(
            sigma, torch.float32, x0_from_x=(1 - a) * unit / sigma, x0_from_pred=-b * unit / sigma,
            kept_from_x0=1 / unit, from_x0=weights[:, 0] / unit, from_x=1.0, **ring(weights[:, 1:]),
        )  # fmt: skip
        x0_rows = make_rows(sigma, torch.float32, x0_from_x=a, x0_from_pred=b, from_x0=1.0)
        return rows.to(device), x0_rows.to(device)

    def _weights(self, order: int) -> Tensor:
        """(n, 4) of every step, that of the newest d first; the first steps have a lower order."""
        sigma = self.sigmas.double()
        h = sigma.diff()
        unit = torch.where(h == 0, 1.0, h)
        # roll puts the last levels before the first step, but that step has no such places.
        places = torch.stack([(sigma.roll(age)[:-1] - sigma[:-1]) / unit for age in range(order)], 1)
        found = sigma.new_zeros(len(h), MAX_SLOTS + 1)
        for count in range(1, order + 1):
            moments = 1 / torch.arange(1, count + 1, dtype=sigma.dtype, device=sigma.device)
            weights = h[:, None] * weights_at(places[:, :count], moments.expand(len(h), -1))
            found[count - 1 :, :count] = weights[count - 1 :]
        return found
