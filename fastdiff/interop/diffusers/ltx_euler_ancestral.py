"""LTXEulerAncestralRFScheduler: Euler's rule to below the next level of flow matching, and noise up to it."""

from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_ltx_euler_ancestral_rf import LTXEulerAncestralRFSchedulerOutput
from torch import Tensor
from torch.compiler import is_compiling

from ... import ops
from ...rows import make_rows
from ...support import transforms
from .common import Generators, typed
from .sigmas import SigmaScheduler


class LTXEulerAncestralRFScheduler(
    SigmaScheduler, diffusers.LTXEulerAncestralRFScheduler, stock=diffusers.LTXEulerAncestralRFScheduler
):
    """diffusers.LTXEulerAncestralRFScheduler on the fused operations; see the package.

        down = sigma_s (1 + eta (sigma_s / sigma_t - 1)),    k = (1 - sigma_s)/(1 - down)
        x_s  = k (x_t + (down - sigma_t) v) + s_noise sqrt(sigma_s^2 - k^2 down^2) z

    The step to sigma_s = 0 is Euler's. The first step after set_timesteps also copies the sigmas to the host.

    Reference: Lipman et al. 2023, arXiv:2210.02747; Karras et al. 2022, arXiv:2206.00364, algorithm 2.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> LTXEulerAncestralRFSchedulerOutput | tuple[Tensor, ...]:
        """One step in one pass."""
        if not self._takes(model_output, timestep, sample):
            return NotImplemented
        i, device, dtype = self._place(timestep), sample.device, sample.dtype
        if i + 1 >= self.sigmas.shape[0]:
            return NotImplemented  # stock returns the sample
        eta, s_noise = self.config.eta, self.config.s_noise
        rows = self._table("steps", lambda: self._steps(device, eta, s_noise), (self.sigmas,), device, eta, s_noise)
        random = eta > 0 and s_noise > 0
        if random and not is_compiling():  # then noise that is multiplied by 0 may be drawn
            noisy = self._table("noisy", lambda: transforms.as_list(self.sigmas[1:].abs() >= 1e-8), (self.sigmas,))
            random = noisy[i]
        noise: dict[str, Any] = {"noisy": False}
        if random:
            noise = self._noise(typed(sample, torch.float32), generator, i)
        x = sample if dtype == model_output.dtype else sample.to(torch.promote_types(dtype, model_output.dtype))
        prev_sample = ops.update(x, model_output, rows, i, **noise)
        prev_sample = prev_sample if prev_sample.dtype == dtype else prev_sample.to(dtype)
        self._step_index += 1
        if not return_dict:
            return (prev_sample,)
        return LTXEulerAncestralRFSchedulerOutput(prev_sample=prev_sample)

    def _steps(self, device: torch.device, eta: float, s_noise: float) -> Tensor:
        """One row per step, in stock's float32: a small difference of squares says how much noise there is."""
        sigma, to = self.sigmas[:-1], self.sigmas[1:]
        down = to * (1 + (to / sigma - 1) * eta)
        scale = (1 - to) / (1 - down + 1e-12)
        up = (to**2 - down**2 * (1 - to) ** 2 / ((1 - down) ** 2 + 1e-12)).clamp(min=0).sqrt() * s_noise
        if not (eta > 0 and s_noise > 0):
            scale, up = torch.ones_like(to), torch.zeros_like(to)
        last = to.abs() < 1e-8
        scale, up, down = (torch.where(last, v, w) for v, w in ((1.0, scale), (0.0, up), (0.0, down)))
        return make_rows(
            sigma, torch.float32, from_x=scale, from_pred=scale * (down - sigma), noise=up
        ).to(device)  # fmt: skip
