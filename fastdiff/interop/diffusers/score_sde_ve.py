"""ScoreSdeVeScheduler: the predictor of the variance-exploding SDE."""

import diffusers
import torch
from diffusers.schedulers.scheduling_sde_ve import SdeVeOutput
from torch import Tensor

from ... import ops
from ...reference import work_dtype
from ...rows import make_rows
from ..stock import noising, promoted
from .common import FusedScheduler, Generators, addable, alike, index_of, is_level


class ScoreSdeVeScheduler(FusedScheduler, diffusers.ScoreSdeVeScheduler, stock=diffusers.ScoreSdeVeScheduler):
    """diffusers.ScoreSdeVeScheduler on the fused operations; see the package.

        x_{i-1} = x_i + g^2 score + g z,    g^2 = sigma_i^2 - sigma_{i-1}^2

    step_correct is stock's: it finds its step size on the device already.

    Reference: Song et al. 2021, arXiv:2011.13456, eq. 6 and 47.
    """

    def step_pred(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SdeVeOutput | tuple[Tensor, ...]:
        """The predictor: the mean x + g^2 score, and the mean with the noise g z."""
        if self.timesteps is None or not alike(sample, model_output):
            return NotImplemented

        def build() -> Tensor:
            sigma = self.discrete_sigmas
            before = torch.cat((torch.zeros_like(sigma[:1]), sigma[:-1]))
            g = (sigma**2 - before**2) ** 0.5
            return make_rows(sigma, torch.float32, from_x=1.0, from_pred=g**2, noise=g).to(sample.device)

        rows = self._table("steps", build, (self.discrete_sigmas,), sample.device)
        index = (timestep * torch.ones(len(sample), device=sample.device) * (len(self.timesteps) - 1)).long()
        noise = self._noise(sample, generator, index)
        sample, model_output, _ = promoted(sample, model_output, self.discrete_sigmas)
        prev_sample_mean = ops.combine(sample, model_output, rows, index)
        prev_sample = ops.update(sample, model_output, rows, index, **noise)
        if not return_dict:
            return (prev_sample, prev_sample_mean)
        return SdeVeOutput(prev_sample=prev_sample, prev_sample_mean=prev_sample_mean)

    def add_noise(self, original_samples: Tensor, noise: Tensor | None, timesteps: Tensor) -> Tensor:
        """x_0 + sigma_t noise. Noise is drawn if it is None."""
        if original_samples.ndim != 4:  # stock lines sigma_t up with the last four dimensions, whatever they are
            return NotImplemented
        if not (is_level(timesteps) and addable(original_samples, original_samples if noise is None else noise)):
            return NotImplemented

        def build() -> Tensor:
            sigma = self.discrete_sigmas.to(work_dtype(original_samples))
            return torch.stack((torch.ones_like(sigma), sigma), 1).to(device)

        device = original_samples.device
        noise = torch.randn_like(original_samples) if noise is None else noise
        original_samples, _ = promoted(original_samples, self.discrete_sigmas)
        table = self._table("levels", build, (self.discrete_sigmas,), device, work_dtype(original_samples))
        return noising(original_samples, noise, index_of(timesteps, device), table)
