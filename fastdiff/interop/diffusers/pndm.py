"""PNDMScheduler: Runge and Kutta's rule, then linear multistep of order 4, on DDIM's step (PRK and PLMS)."""

from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ... import ops
from ...rows import MAX_SLOTS, make_rows
from ...steps.adams import EQUAL
from ..stock import promoted
from .common import LevelScheduler, alike, index_of, is_level
from .multistep import HistoryScheduler

# Runge and Kutta's weights of the four predictions of a step.
PRK = (1 / 6, 1 / 3, 1 / 3, 1 / 6)


class PNDMScheduler(HistoryScheduler, diffusers.PNDMScheduler, stock=diffusers.PNDMScheduler):
    """diffusers.PNDMScheduler on the fused operations; see the package.

        e   = (55 e_t - 59 e_(t+1) + 37 e_(t+2) - 9 e_(t+3)) / 24,    fewer of them at the start
        x_s = DDIM's step from x_t with e

    The second step of a run does the first one again, with the mean of both predictions. Without skip_prk_steps the
    first three steps are Runge and Kutta's, of four predictions e_1 to e_4 each: three steps of DDIM from x_t, and

        x_s = DDIM's step from x_t with (e_1 + 2 e_2 + 2 e_3 + e_4) / 6

    Reference: Liu et al. 2022, arXiv:2202.09778, eq. 9, 12 and 13.
    """

    alphas_cumprod: Tensor
    final_alpha_cumprod: Tensor
    ets: list[Tensor]
    cur_sample: Tensor | None
    cur_model_output: Tensor | float  # the weighted sum of the predictions so far
    prk_timesteps: Any
    counter: int

    add_noise = LevelScheduler.add_noise
    _levels = LevelScheduler._levels

    def step_prk(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """A quarter of a step of Runge and Kutta: DDIM's from x_t in one pass, and the sum of the predictions."""
        k, so_far = self.counter % 4, self.cur_model_output
        start = self.cur_sample if k else sample
        summed: list[Tensor] = [so_far] if isinstance(so_far, Tensor) else []
        if (
            self.num_inference_steps is None
            or self.config.prediction_type not in ("epsilon", "v_prediction")
            or start is None
            or len(summed) != bool(k)
            or not (is_level(timestep) and alike(sample, model_output, start, *summed))
        ):
            return NotImplemented
        index = index_of(timestep, sample.device)
        x, output, *rest = promoted(start, model_output, *summed)
        prev_sample = ops.combine(x, output, self._prk_rows(x.device), index, z=rest[0] if k == 3 else None)
        if k == 0:
            self.ets.append(model_output)
            self.cur_sample, self.cur_model_output = sample, PRK[0] * model_output
        else:
            self.cur_model_output = 0 if k == 3 else torch.add(summed[0], model_output, alpha=PRK[k])
        self.counter += 1
        if not return_dict:
            return (prev_sample,)
        return SchedulerOutput(prev_sample=prev_sample)

    def _prk_rows(self, device: torch.device) -> Tensor:
        """Rows by timestep of this quarter: from the timestep that the step began at, to half a step or a step less."""
        first, last = self.counter // 4 * 4, self.counter % 4 == 3
        base: Any  # a compiler cannot read the numbers of NumPy
        if torch.compiler.is_compiling():
            base = self.timesteps[first : first + 1].to(self.alphas_cumprod.device)
        else:
            base = int(self.prk_timesteps[first])
        half = 0 if self.counter % 2 else self.config.num_train_timesteps // self.num_inference_steps // 2

        def build() -> Tensor:
            start = self.alphas_cumprod[base]
            from_x, from_e = self._ddim(start, self._alpha_bar_before(half))
            return make_rows(
                from_e, torch.float32, from_x=from_x, from_pred=from_e * (PRK[3] if last else 1.0),
                noise=from_e if last else 0.0,
            ).to(device)  # fmt: skip

        sources, key = (self.alphas_cumprod, self.final_alpha_cumprod), self.config.prediction_type
        rows: Tensor = self._table(f"prk {self.counter}", build, sources, device, base, half, key)
        return rows

    def step_plms(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """One step: the weighted sum of the predictions, and DDIM's step with it, in one pass."""
        again = self.counter == 1
        before = self.ets if again else self.ets[-MAX_SLOTS:]
        start = self.cur_sample if again and len(before) == 1 else sample
        if (
            self.num_inference_steps is None
            or self.config.prediction_type not in ("epsilon", "v_prediction")
            or not (self.config.skip_prk_steps or len(self.ets) >= 3)
            or start is None
            or not (is_level(timestep) and alike(sample, model_output, start, *before))
            or (again and (len(before) != 1 or self.num_inference_steps == 1))  # past the end of one step: an error
        ):
            return NotImplemented
        index = index_of(timestep, sample.device)
        x, output = promoted(start, model_output)
        # The prediction that came j before the last one of `count` lies in the slot (count - 1 - j) % 3.
        count = self.counter - (self.counter > 1)  # the second step keeps none
        past: list[Tensor | None] = [None] * MAX_SLOTS
        for age, e in enumerate(reversed(before)):
            past[(count - 1 - age) % MAX_SLOTS] = e
        rows = self._steps(x.device, len(before), count % MAX_SLOTS, again)
        slot = None if again else count % MAX_SLOTS
        prev_sample, _ = self._with_history(x, output, rows, index, past, slot, "x0hat")
        if again:
            self.cur_sample = None
        else:
            if len(before) == 0 and self.counter == 0:
                self.cur_sample = sample
            self.ets = [*before, model_output]
            past[count % MAX_SLOTS] = model_output
        self._in_ring = tuple(past)
        self.counter += 1
        if not return_dict:
            return (prev_sample,)
        return SchedulerOutput(prev_sample=prev_sample)

    def _steps(self, device: torch.device, before: int, slot: int, again: bool) -> Tensor:
        """Rows by timestep, with `before` predictions remembered, of which the next takes the slot."""
        stride, prediction = self.config.num_train_timesteps // self.num_inference_steps, self.config.prediction_type
        weights = (1 / 2, 1 / 2) if again else EQUAL[before]

        def build() -> Tensor:
            alpha_bar = self.alphas_cumprod
            n = len(alpha_bar)
            if again:
                step = torch.arange(n, device=alpha_bar.device)
                start, end = alpha_bar[(step + stride).clamp(max=n - 1)], alpha_bar
            else:
                start, end = alpha_bar, self._alpha_bar_before(stride)
            from_x, from_e = self._ddim(start, end)
            ages = from_e.new_zeros(n, MAX_SLOTS)
            for age, weight in enumerate(weights[1:]):
                ages[:, age] = from_e * weight
            first, second, third = (ages[:, (slot - 1 - j) % MAX_SLOTS] for j in range(MAX_SLOTS))
            return make_rows(
                alpha_bar, torch.float32, x0_from_pred=1.0, from_x0=from_e * weights[0], from_x=from_x,
                from_hist=first, from_hist2=second, from_hist3=third, slot=-1 if again else slot,
            ).to(device)  # fmt: skip

        sources = (self.alphas_cumprod, self.final_alpha_cumprod)
        rows: Tensor = self._table(f"{before} {slot} {again}", build, sources, device, stride, prediction)
        return rows

    def _alpha_bar_before(self, steps: int) -> Tensor:
        """(n,), alpha_bar of so many timesteps less, or that of data."""
        alpha_bar = self.alphas_cumprod
        step = torch.arange(len(alpha_bar), device=alpha_bar.device)
        found = alpha_bar[(step - steps).clamp(min=0)]
        return torch.where(step >= steps, found, self.final_alpha_cumprod.to(alpha_bar))

    def _ddim(self, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """(from_x, from_e) of DDIM's step between two alpha_bars, in stock's arithmetic."""
        from_x = (end / start) ** 0.5
        from_eps = -(end - start) / (start * (1 - end) ** 0.5 + (start * (1 - start) * end) ** 0.5)
        if self.config.prediction_type == "v_prediction":
            return from_x + from_eps * (1 - start) ** 0.5, from_eps * start**0.5
        return from_x, from_eps
