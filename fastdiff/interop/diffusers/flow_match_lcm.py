"""FlowMatchLCMScheduler: the multistep sampler of consistency models, for flow matching."""

import diffusers
import torch
from diffusers.schedulers.scheduling_flow_match_lcm import FlowMatchLCMSchedulerOutput
from torch import Tensor

from ... import ops
from .common import Generators, typed
from .sigmas import FlowScheduler


class FlowMatchLCMScheduler(FlowScheduler, diffusers.FlowMatchLCMScheduler, stock=diffusers.FlowMatchLCMScheduler):
    """diffusers.FlowMatchLCMScheduler on the fused operations; see the package.

        x_s = (1 - sigma_s)(x_t - sigma_t v) + sigma_s z

    Stock's step runs if there are scale_factors, by which x_0 grows between steps.

    Reference: Luo et al. 2023, arXiv:2310.04378, algorithm 3; Lipman et al. 2023, arXiv:2210.02747.
    """

    _init_size: torch.Size | None

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> FlowMatchLCMSchedulerOutput | tuple[Tensor, ...]:
        """One step in one pass."""
        if not self._takes(model_output, timestep, sample):
            return NotImplemented
        if self._scale_factors and self._upscale_mode:
            return self._left_to_stock("scale_factors")
        if self._init_size is None or self._step_index is None:
            self._init_size = model_output.shape[2:]
        i = self._place(timestep)
        if i + 1 >= self.sigmas.shape[0]:  # len() of a tensor costs more
            return NotImplemented  # stock's error
        dtype, device = model_output.dtype, sample.device
        rows = self._table("steps", lambda: self._rows_to_noise(device), (self.sigmas,), device)
        # Stock's draw, which is at least of float32.
        like = typed(sample, torch.promote_types(dtype, torch.float32))
        noise = self._noise(like, generator, i)
        x = sample if sample.dtype == dtype else sample.to(torch.promote_types(sample.dtype, dtype))
        prev_sample = ops.update(x, model_output, rows, i, **noise)
        if prev_sample.dtype != dtype:
            prev_sample = prev_sample.to(dtype)
        self._step_index += 1
        if not return_dict:
            return (prev_sample,)
        return FlowMatchLCMSchedulerOutput(prev_sample=prev_sample)
