"""CMStochasticIterativeScheduler: the multistep sampler of consistency models."""

import diffusers
import torch
from diffusers.schedulers.scheduling_consistency_models import CMStochasticIterativeSchedulerOutput
from torch import Tensor

from ... import ops
from ...rows import make_rows
from ..stock import promoted
from .common import Generators
from .sigmas import VarianceExplodingScheduler


class CMStochasticIterativeScheduler(
    VarianceExplodingScheduler,
    diffusers.CMStochasticIterativeScheduler,
    stock=diffusers.CMStochasticIterativeScheduler,
):
    """diffusers.CMStochasticIterativeScheduler on the fused operations; see the package.

        x_0 = clip(c_skip x_t + c_out F),    x_s = x_0 + s_noise sqrt(sigma_s^2 - sigma_min^2) z

    Reference: Song et al. 2023, arXiv:2303.01469, algorithm 1 and appendix C.
    """

    scale_model_input = diffusers.CMStochasticIterativeScheduler.scale_model_input  # by c_in

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> CMStochasticIterativeSchedulerOutput | tuple[Tensor, ...]:
        """One step in one pass."""
        if not self._takes(model_output, timestep, sample):
            return NotImplemented
        self._remind_of_scaling()
        i, device, config = self._place(timestep), sample.device, self.config
        if i + 1 >= self.sigmas.shape[0]:  # len() of a tensor costs more
            return NotImplemented  # stock's error
        rows = self._table(
            "steps", lambda: self._steps(device), (self.sigmas,),
            device, config.sigma_min, config.sigma_max, config.sigma_data, config.s_noise,
        )  # fmt: skip
        noise = self._noise(model_output, generator, i) if len(self.timesteps) > 1 else {"noisy": False}
        x, output = promoted(sample, model_output)
        prev_sample = ops.update(x, output, rows, i, clip=1.0 if config.clip_denoised else None, **noise)
        self._step_index += 1
        if not return_dict:
            return (prev_sample,)
        return CMStochasticIterativeSchedulerOutput(prev_sample=prev_sample)

    def _steps(self, device: torch.device) -> Tensor:
        """One row per step, in stock's float32: sigma_s may be nearly sigma_min."""
        config, low = self.config, self.config.sigma_min
        c_skip, c_out = self.get_scalings_for_boundary_condition(self.sigmas[:-1])
        to = self.sigmas[1:].clamp(low, config.sigma_max)
        std = config.s_noise * (to**2 - low**2).clamp(min=0) ** 0.5
        return make_rows(to, torch.float32, x0_from_x=c_skip, x0_from_pred=c_out, from_x0=1.0, noise=std).to(device)
