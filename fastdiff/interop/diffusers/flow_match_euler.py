"""FlowMatchEulerDiscreteScheduler: Euler's rule on the ODE of flow matching."""

import diffusers
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor
from torch.compiler import is_compiling

from ... import ops
from ...rows import make_rows
from ...support import transforms
from .common import Generators, typed
from .sigmas import FlowScheduler


class FlowMatchEulerDiscreteScheduler(
    FlowScheduler, diffusers.FlowMatchEulerDiscreteScheduler, stock=diffusers.FlowMatchEulerDiscreteScheduler
):
    """diffusers.FlowMatchEulerDiscreteScheduler on the fused operations; see the package.

        x_s = x_t + (sigma_s - sigma_t) v
        x_s = (1 - sigma_s)(x_t - sigma_t v) + sigma_s z    with stochastic_sampling

    Stock's step runs if per_token_timesteps are given.

    Reference: Lipman et al. 2023, arXiv:2210.02747; Esser et al. 2024, arXiv:2403.03206.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor, ...]:
        """One step in one pass. Like stock's it has no use for s_churn, s_tmin, s_tmax and s_noise."""
        if not self._takes(model_output, timestep, sample):
            return NotImplemented
        if per_token_timesteps is not None:
            return self._left_to_stock("per_token_timesteps")
        i = self._place(timestep)
        if i + 1 >= self.sigmas.shape[0]:  # len() of a tensor costs more
            return NotImplemented  # stock's error

        plain = sample.dtype == torch.float32 and self.sigmas.is_cpu  # torch.add rounds twice in smaller types
        if plain and not (self.config.get("stochastic_sampling") or is_compiling()):
            dt = self._table("dt", lambda: transforms.as_list(self.sigmas.diff()), (self.sigmas,))
            prev_sample = torch.add(sample, model_output, alpha=dt[i])
        else:
            prev_sample = self._by_row(model_output, sample, generator, i)
        if prev_sample.dtype != model_output.dtype:
            prev_sample = prev_sample.to(model_output.dtype)
        self._step_index += 1
        if not return_dict:
            return (prev_sample,)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=prev_sample)

    def _by_row(self, model_output: Tensor, sample: Tensor, generator: Generators, i: int) -> Tensor:
        """The step whose numbers are row i of a table on the device."""

        def build() -> Tensor:
            if stochastic:
                return self._rows_to_noise(device)
            sigma, to = self.sigmas[:-1], self.sigmas[1:]
            return make_rows(sigma, torch.float32, from_x=1.0, from_pred=to - sigma).to(device)

        device, stochastic = sample.device, self.config.get("stochastic_sampling")
        rows = self._table("steps", build, (self.sigmas,), device, stochastic)
        like = typed(sample, torch.float32)  # stock's draw, whatever the type of the sample
        noise = self._noise(like, generator, i) if stochastic else {"noisy": False}
        x = sample.to(torch.promote_types(sample.dtype, model_output.dtype))
        return ops.update(x, model_output, rows, i, **noise)
