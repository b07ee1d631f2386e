"""PNDMScheduler: linear multistep of order 4 on DDIM's step (PLMS)."""

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ...rows import make_rows
from ..stock import promoted
from .common import LevelScheduler, alike, index_of, is_level, say_once
from .multistep import HistoryScheduler

# Adams and Bashforth's weights of the predictions, newest first, by how many there are.
WEIGHTS = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
SLOTS = 3


class PNDMScheduler(HistoryScheduler, diffusers.PNDMScheduler, stock=diffusers.PNDMScheduler):
    """diffusers.PNDMScheduler on the fused operations; see the package.

        e   = (55 e_t - 59 e_(t+1) + 37 e_(t+2) - 9 e_(t+3)) / 24,    fewer of them at the start
        x_s = DDIM's step from x_t with e

    The second step of a run does the first one again, with the mean of both predictions. The steps of Runge and Kutta,
    which come first without skip_prk_steps, are stock's.

    Reference: Liu et al. 2022, arXiv:2202.09778, eq. 9 and 12.
    """

    alphas_cumprod: Tensor
    final_alpha_cumprod: Tensor
    ets: list[Tensor]
    cur_sample: Tensor | None
    counter: int

    add_noise = LevelScheduler.add_noise
    _levels = LevelScheduler._levels

    def step_prk(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """A step of Runge and Kutta, by stock."""
        say_once("PNDMScheduler without skip_prk_steps, in its first steps")
        return NotImplemented

    def step_plms(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """One step: the weighted sum of the predictions, and DDIM's step with it, in one pass."""
        again = self.counter == 1
        before = self.ets if again else self.ets[-SLOTS:]
        start = self.cur_sample if again and len(before) == 1 else sample
        if (
            self.num_inference_steps is None
            or self.config.prediction_type not in ("epsilon", "v_prediction")
            or not (self.config.skip_prk_steps or len(self.ets) >= 3)
            or start is None
            or not (is_level(timestep) and alike(sample, model_output, start, *before))
            or (again and len(before) != 1)
        ):
            return NotImplemented
        index = index_of(timestep, sample.device)
        x, output = promoted(start, model_output)
        # The prediction that came j before the last one of `count` lies in the slot (count - 1 - j) % 3.
        count = self.counter - (self.counter > 1)  # the second step keeps none
        past: list[Tensor | None] = [None] * SLOTS
        for age, e in enumerate(reversed(before)):
            past[(count - 1 - age) % SLOTS] = e
        rows = self._steps(x.device, len(before), count % SLOTS, again)
        slot = None if again else count % SLOTS
        prev_sample, _ = self._with_history(x, output, rows, index, past, slot, "x0hat")
        if again:
            self.cur_sample = None
        else:
            if len(before) == 0 and self.counter == 0:
                self.cur_sample = sample
            self.ets = [*before, model_output]
            past[count % SLOTS] = model_output
        self._in_ring = tuple(past)
        self.counter += 1
        if not return_dict:
            return (prev_sample,)
        return SchedulerOutput(prev_sample=prev_sample)

    def _steps(self, device: torch.device, before: int, slot: int, again: bool) -> Tensor:
        """Rows by timestep, with `before` predictions remembered, of which the next takes the slot."""
        stride, prediction = self.config.num_train_timesteps // self.num_inference_steps, self.config.prediction_type
        weights = (1 / 2, 1 / 2) if again else WEIGHTS[before + 1]

        def build() -> Tensor:
            alpha_bar = self.alphas_cumprod
            n = len(alpha_bar)
            step = torch.arange(n, device=alpha_bar.device)
            if again:
                start, end = alpha_bar[(step + stride).clamp(max=n - 1)], alpha_bar
            else:
                final = self.final_alpha_cumprod.to(alpha_bar)
                start, end = alpha_bar, torch.where(step >= stride, alpha_bar[(step - stride).clamp(min=0)], final)
            from_x = (end / start) ** 0.5
            from_eps = -(end - start) / (start * (1 - end) ** 0.5 + (start * (1 - start) * end) ** 0.5)
            from_e = from_eps
            if prediction == "v_prediction":
                from_x, from_e = from_x + from_eps * (1 - start) ** 0.5, from_eps * start**0.5
            ages = torch.zeros(n, SLOTS)
            for age, weight in enumerate(weights[1:]):
                ages[:, age] = from_e * weight
            first, second, third = (ages[:, (slot - 1 - j) % SLOTS] for j in range(SLOTS))
            return make_rows(
                alpha_bar, torch.float32, x0_from_pred=1.0, from_x0=from_e * weights[0], from_x=from_x,
                from_hist=first, from_hist2=second, from_hist3=third, slot=-1 if again else slot,
            ).to(device)  # fmt: skip

        sources = (self.alphas_cumprod, self.final_alpha_cumprod)
        rows: Tensor = self._table(f"{before} {slot} {again}", build, sources, device, stride, prediction)
        return rows
