"""CogVideoXDPMScheduler: DPM-Solver++(2M) of the SDE, which is given the last prediction of data."""

import diffusers
import torch
from diffusers.schedulers.scheduling_dpm_cogvideox import DDIMSchedulerOutput
from torch import Tensor

from ... import ops
from ...rows import make_rows
from .common import PREDICTIONS, Generators, LevelScheduler, alike, is_level, x0_from_level
from .sigmas import in_float32, result_types, two_results


class CogVideoXDPMScheduler(LevelScheduler, diffusers.CogVideoXDPMScheduler, stock=diffusers.CogVideoXDPMScheduler):
    """diffusers.CogVideoXDPMScheduler on the fused operations; see the package.

        x_s = r e^-h x_t + alpha_s k ((1 + w) x_0 - w x_0') + sigma_s sqrt(k) z,    k = 1 - e^-2h

    r = sigma_s / sigma_t, w = h/(2 h'), and h' and x_0' are those of the step before. Noise and x_0' take a pass of
    their own. Stock's step runs unless the timesteps are neighbours in self.timesteps, and free to read.

    Reference: Lu et al. 2022, arXiv:2211.01095, algorithm 2 and appendix A.
    """

    def step(
        self,
        model_output: Tensor,
        old_pred_original_sample: Tensor | None,
        timestep: int | Tensor,
        timestep_back: int | Tensor | None,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = False,
    ) -> DDIMSchedulerOutput | tuple[Tensor, ...]:
        """One step. Like stock's it has no use for eta, use_clipped_model_output and variance_noise, and it returns a
        tuple at the first and the last step."""
        prediction = self.config.prediction_type
        if self.num_inference_steps is None or prediction not in PREDICTIONS:
            return NotImplemented  # stock's error
        if not (is_level(timestep) and alike(sample, model_output)):
            return NotImplemented
        t, before = self._number(timestep), None if timestep_back is None else self._number(timestep_back)
        steps, device = self._host_timesteps(), sample.device
        if t not in steps:
            return NotImplemented
        i, stride = steps.index(t), self.config.num_train_timesteps // self.num_inference_steps
        old = old_pred_original_sample if t >= stride else None
        if old is not None and not (i > 0 and before == steps[i - 1] and alike(sample, old)):
            return NotImplemented
        sources = self.alphas_cumprod, self.final_alpha_cumprod, self.timesteps
        first, second, past = self._table(
            "steps", lambda: self._steps(device, stride), sources, device, stride, prediction
        )
        dtypes = result_types(prediction, sample, model_output)
        noise = self._noise(sample, generator, i)
        if old is None:
            return two_results(sample, model_output, first, i, dtypes, **noise)
        if not self.fused_noise:
            noise = self._noise(sample, generator, i)  # stock draws a second time, for its second order
        base = ops.update(in_float32(old), sample, past, i, **noise)
        dtypes = torch.promote_types(dtypes[0], old.dtype), dtypes[1]
        results = two_results(in_float32(sample), model_output, second, i, dtypes, noise=base)
        if not return_dict:
            return results
        return DDIMSchedulerOutput(prev_sample=results[0], pred_original_sample=results[1])

    def _steps(self, device: torch.device, stride: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows by place: of first order, of second order with the column of noise for what the third ones make of x_0'
        and the noise."""
        alpha_bar, final = self.alphas_cumprod, self.final_alpha_cumprod
        t = self.timesteps.to(alpha_bar.device)
        to = torch.where(t >= stride, alpha_bar[(t - stride).clamp(min=0)], final.to(alpha_bar))
        at, back = alpha_bar[t], alpha_bar[t.roll(1)]
        h, r, *_ = self.get_variables(at, to, back)
        from_x, minus, new, old = self.get_mult(h, r, at, to, back)
        std = (1 - to) ** 0.5 * (1 - (-2 * h).exp()) ** 0.5
        a, b, c = x0_from_level(self.config.prediction_type, at**0.5, (1 - at) ** 0.5)
        same = {"x0_from_x": a, "x0_from_pred": b, "from_x": from_x, "kept_from_x0": c}
        first = make_rows(at, torch.float32, from_x0=-minus * c, noise=std, **same)
        second = make_rows(at, torch.float32, from_x0=-minus * new * c, noise=1.0, **same)
        past = make_rows(at, torch.float32, from_x=minus * old, noise=std)
        return first.to(device), second.to(device), past.to(device)
