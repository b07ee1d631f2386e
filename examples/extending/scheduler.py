"""Add a scheduler of diffusers: EulerDiscreteScheduler with its step in one pass over memory.

python examples/extending/scheduler.py

It inherits the stock class and overrides the arithmetic of `step` alone. In the package each scheduler is one file in
fastdiff/interop/diffusers/. This one is there too, for every setting.
"""

from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from torch import Tensor

from fastdiff import ops
from fastdiff.rows import make_rows


class EulerDiscreteScheduler(diffusers.EulerDiscreteScheduler):
    """diffusers.EulerDiscreteScheduler for networks that predict the noise; other settings run the stock step.

    x_s = x + (sigma_s - sigma_t) eps,    x_0 = x - sigma_t eps
    """

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, *args: Any, **options: Any
    ) -> EulerDiscreteSchedulerOutput | tuple[Tensor, ...]:
        """One step; the arguments are those of the stock class."""
        options_of_stock = {name: value for name, value in options.items() if name not in ("return_dict", "generator")}
        if args or options_of_stock or self.config.prediction_type != "epsilon":
            return super().step(model_output, timestep, sample, *args, **options)
        if self.step_index is None:
            self._init_step_index(timestep)
        sigmas = self.sigmas.double()  # on the CPU, as stock keeps them
        k = self.step_index
        row = make_rows(sigmas[k : k + 1], torch.float32, from_x=1.0, from_pred=sigmas[k + 1] - sigmas[k])
        new = ops.update(sample, model_output, row.to(sample.device), 0, noisy=False)
        self._step_index += 1
        if not options.get("return_dict", True):
            return (new,)
        return EulerDiscreteSchedulerOutput(prev_sample=new, pred_original_sample=sample - sigmas[k] * model_output)


def main() -> None:
    """Compare a run with the stock scheduler."""
    runs = []
    for kind in (diffusers.EulerDiscreteScheduler, EulerDiscreteScheduler):
        scheduler = kind(num_train_timesteps=1000)
        scheduler.set_timesteps(10)
        x = scheduler.init_noise_sigma * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps:
            eps = 0.3 * scheduler.scale_model_input(x, t)  # stands for a network
            x = scheduler.step(eps, t, x).prev_sample
        runs.append(x)
    # Ten steps, each a few roundings of numbers up to sigma_max.
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-5, atol=1e-5)
    print("the fused scheduler agrees with stock")


if __name__ == "__main__":
    main()
