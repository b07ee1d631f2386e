"""UniPCMultistepScheduler: a predictor of orders 1 to 3, and the corrector that comes with it."""

import functools
import math
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ...support.transforms import as_list
from ..stock import promoted
from .common import PREDICTIONS, alike, say_once
from .multistep import MultistepScheduler, weights_at


class UniPCMultistepScheduler(
    MultistepScheduler, diffusers.UniPCMultistepScheduler, stock=diffusers.UniPCMultistepScheduler
):
    """diffusers.UniPCMultistepScheduler on the fused operations; see the package.

        x_t = p_t + B sum_k (rho^p_k - rho^c_k) (m_k - m_0) / r_k - B rho^c (m_t - m_0)      corrects the predicted p_t
        x_s = keep x_t - k m_t - B' sum_k rho^p'_k (m_k - m_t) / r'_k                        predicts the next state

    m is x_0 or, without predict_x0, eps. Both lines are one row: the corrector starts from the state that the last step
    returned, which it remembers. Like stock it does not start from another sample that it is given; an edit in place of
    what it returned counts, though.

    Reference: Zhao et al. 2023, arXiv:2302.04867, algorithms 1 and 2.
    """

    predict_x0: bool
    solver_p: Any
    disable_corrector: list[int]
    timestep_list: list[int | Tensor | None]
    this_order: int
    _predicted: Tensor | None = None  # what the last step returned
    _predicted_by = (0, 0)  # its number and its order

    @property
    def last_sample(self) -> Tensor | None:
        """The corrected state of the last step."""
        if self._predicted is not None:
            i, order = self._predicted_by
            keep, from_m, ages = (as_list(values[i]) for values in self._predictors()[order])
            moved = sum(c * m for c, m in zip((from_m, *ages[: order - 1]), reversed(self.model_outputs), strict=False))
            self.last_sample = ((self._predicted - moved) / keep).to(self._predicted.dtype)
        found: Tensor | None = self.__dict__.get("last_sample")
        return found

    @last_sample.setter
    def last_sample(self, value: Tensor | None) -> None:
        self.__dict__["last_sample"], self._predicted = value, None

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """One step: x_0 or eps from the prediction, the corrected state and the next one, in one pass."""
        config, of_noise = self.config, not self.predict_x0
        known = PREDICTIONS if of_noise else (*PREDICTIONS, "flow_prediction")
        if config.prediction_type not in known or config.solver_type not in ("bh1", "bh2"):
            return NotImplemented  # stock's error
        if self.solver_p is not None:
            say_once("UniPCMultistepScheduler with solver_p")
            return NotImplemented
        # Over the last gaps of these sigmas bh1 predicts large states, from which ours would come back less exactly.
        if config.solver_type == "bh1" and config.get("use_beta_sigmas"):
            say_once("UniPCMultistepScheduler with bh1 on beta sigmas")
            return NotImplemented
        if not self._takes(model_output, sample):
            return NotImplemented
        i, n = self._place(timestep), len(self.timesteps)
        if i >= n:
            return NotImplemented  # stock's error
        dtype = sample.dtype
        sample, output = promoted(sample, model_output)
        corrected, start, noise = 0, "sample", {}
        if i > 0 and i - 1 not in self.disable_corrector:
            predicted = self._predicted if self._predicted_by[0] == i - 1 else None
            if predicted is None:
                predicted, start = self.last_sample, "last"
            elif predicted is not sample:
                start = "predicted"
            if predicted is not None:
                corrected = self.this_order
                if start != "sample":
                    if not alike(sample, predicted):
                        return NotImplemented
                    noise = {"noise": predicted}
        order = min(config.solver_order, self.lower_order_nums + 1, n - i if config.lower_order_final else 3)
        if config.thresholding and not of_noise:
            output = self._thresholded(sample, output, i, of_noise)
        rows = self._table(
            f"steps from {start}", functools.partial(self._steps, sample.device, start), (self.sigmas,),
            sample.device, config.prediction_type, config.solver_type, config.use_flow_sigmas, config.thresholding,
            self.predict_x0, len(self.model_outputs),
        )  # fmt: skip
        prev_sample = self._step_with(sample, output, rows[corrected][order - 1], i, **noise).to(dtype)
        self.timestep_list[:] = [*self.timestep_list[1:], timestep]
        self.this_order = order
        self.__dict__["last_sample"], self._predicted, self._predicted_by = None, prev_sample, (i, order)
        if not return_dict:
            return (prev_sample,)
        return SchedulerOutput(prev_sample=prev_sample)

    def _steps(self, device: torch.device, start: str) -> list[list[Tensor]]:
        """Rows that correct by an order (0: not) and predict by another, as rows[order][other - 1].

        The corrector starts from the sample, from what was predicted, or from the corrected state before that ("last").
        The column of noise takes the latter two.
        """
        count = len(self.model_outputs)
        predictors, correctors = self._predictors(), self._correctors()
        converted = self.config.thresholding and self.predict_x0
        tables = []
        for corrected in range(count + 1):
            for order in range(1, count + 1):
                keep, from_m, ages = predictors[order]
                from_x, from_other = keep, torch.zeros_like(keep)
                if corrected:
                    # Row i corrects what row i - 1 predicted; row 0 corrects nothing.
                    last_keep, last_m, last_ages = (v.roll(1, 0) for v in predictors[corrected])
                    c_m, c_ages = (v.roll(1, 0) for v in correctors[corrected])
                    if start == "last":
                        from_x, from_other = from_other, keep * last_keep
                    else:
                        c_ages = c_ages - torch.cat((last_m[:, None], last_ages[:, :-1]), 1)
                        if start == "predicted":
                            from_x, from_other = from_other, keep
                    from_m, ages = from_m + keep * c_m, ages + keep[:, None] * c_ages
                rows = self._rows_of(from_x, from_m, ages[:, :count], from_other, converted, not self.predict_x0)
                tables.append(rows)
        found = torch.stack(tables).to(device).unbind()
        return [list(found[count * c : count * (c + 1)]) for c in range(count + 1)]

    def _intervals(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of each step: keep, k, B, the places (n, 2) of the two levels before it, and b (n, 3), in stock's float32."""
        alpha, sigma = self._sigma_to_alpha_sigma_t(self.sigmas)
        log_snr = torch.log(alpha) - torch.log(sigma)
        h = log_snr[1:] - log_snr[:-1]
        start = log_snr[:-1]
        places = torch.stack([(log_snr.roll(back)[:-1] - start) / h for back in (1, 2)], 1)
        # roll puts the last level before the first step, but that step has no such place.
        hh = -h if self.predict_x0 else h
        whole = torch.expm1(hh)
        size = hh if self.config.solver_type == "bh1" else whole
        rest, b = whole / hh - 1, []
        for i in (1, 2, 3):
            b.append(rest * math.factorial(i) / size)
            rest = rest / hh - 1 / math.factorial(i + 1)
        moving, staying = (alpha, sigma) if self.predict_x0 else (sigma, alpha)
        return staying[1:] / staying[:-1], moving[1:] * whole, moving[1:] * size, places, torch.stack(b, 1)

    def _predictors(self) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        """(keep, from_m, ages (n, 3)) of each order of x_s = keep x_t - k m - B sum_k rho_k (m_k - m) / r_k."""
        keep, k, size, places, b = self._intervals()
        rho2 = torch.full_like(k, 0.5)[:, None]
        rho3 = weights_at(places, b[:, :2])
        found = {1: (keep.double(), -k.double(), k.new_zeros(len(k), 3, dtype=torch.float64))}
        for order, rho in ((2, rho2), (3, rho3)):
            shares = -size.double()[:, None] * rho.double() / places[:, : order - 1].double()
            ages = torch.nn.functional.pad(shares, (0, 4 - order))
            found[order] = keep.double(), -k.double() - shares.sum(1), ages
        return found

    def _correctors(self) -> dict[int, tuple[Tensor, Tensor]]:
        """(from_m, ages (n, 3)) of each order of

        x_t = keep x - k m_0 - B (sum_k rho_k (m_k - m_0) / r_k + rho (m_t - m_0))
        """
        _, k, size, places, b = self._intervals()
        found = {}
        for order in (1, 2, 3):
            nodes = torch.cat((places[:, : order - 1], torch.ones_like(places[:, :1])), 1)
            rho = torch.full_like(nodes, 0.5) if order == 1 else weights_at(nodes, b[:, :order])
            shares = -size.double()[:, None] * rho.double() / nodes.double()
            ages = torch.cat((-k.double()[:, None] - shares.sum(1, keepdim=True), shares[:, :-1]), 1)
            found[order] = shares[:, -1], torch.nn.functional.pad(ages, (0, 3 - order))
        return found
