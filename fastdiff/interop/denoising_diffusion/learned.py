"""LearnedGaussianDiffusion: the network predicts the noise and the variance of a step."""

from math import log, pi, sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import ops
from ..stock import remembered
from .diffusion import GaussianDiffusion
from .discrete import STEP, State
from .images import check_reduction, unnormalize_to_zero_to_one
from .tables import ancestral_rows_of_range, bound_rows, row_index, target_table, values_at

BITS = 1 / log(2)  # in a nat
SMALLEST = 1e-15  # of a probability whose logarithm is taken
# What stock's loss calls on the object, for overrides.
BOUND = ("q_posterior", "p_mean_variance", "predict_start_from_noise")


class ModelPrediction(NamedTuple):
    """eps, x_0 and the output for the variance."""

    pred_noise: Tensor
    pred_x_start: Tensor
    pred_variance: Tensor


@remembered
class LearnedGaussianDiffusion(GaussianDiffusion):
    """denoising_diffusion_pytorch.LearnedGaussianDiffusion on the fused operations; see the package.

    Args:
        model: model(x, t) returns (B, 2 C, H, W): the noise, whatever `objective` says, and what mixes the logarithms
            of the smallest and the largest variance (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 15).
        vb_loss_weight: of the variational bound in the loss.

    The other arguments are those of GaussianDiffusion. Raises: ValueError, naming the argument.
    """

    def __init__(self, model: Any, vb_loss_weight: float = 0.001, *args: Any, **kwargs: Any) -> None:
        if model.out_dim != 2 * model.channels:
            raise ValueError(f"model: expected out_dim = 2 channels = {2 * model.channels}, got {model.out_dim}")
        if model.self_condition:
            raise ValueError("model: expected no self-conditioning")
        super().__init__(model, *args, **kwargs)
        self.vb_loss_weight = vb_loss_weight

    @property
    def _predicted(self) -> str:
        return "pred_noise"

    def model_predictions(  # type: ignore[override]
        self,
        x: Tensor,
        t: Tensor,
        x_self_cond: Tensor | None = None,
        clip_x_start: bool = False,
        rederive_pred_noise: bool = False,
    ) -> ModelPrediction:
        """As GaussianDiffusion.model_predictions, and the output for the variance."""
        noise, raw = self.model(x, t).chunk(2, dim=1)
        x_start = self._start(x, t, noise, clip_x_start)
        if clip_x_start and rederive_pred_noise:
            noise = self.predict_noise_from_start(x, t, x_start)
        return ModelPrediction(noise, x_start, raw)

    def p_mean_variance(  # type: ignore[override]
        self, *, x: Tensor, t: Tensor, clip_denoised: bool, model_output: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean, variance and log variance (B, C, H, W) of p(x_{t-1} | x_t), and the x_0 that it goes through."""
        output = self.model(x, t) if model_output is None else model_output
        noise, raw = output.chunk(2, dim=1)
        share = unnormalize_to_zero_to_one(raw)
        smallest = values_at(self.posterior_log_variance_clipped, t, x)
        log_variance = share * values_at(self.betas.log(), t, x) + (1 - share) * smallest
        x_start = self._start(x, t, noise, clip_denoised)
        return self.q_posterior(x_start, x, t)[0], log_variance.exp(), log_variance, x_start

    @torch.inference_mode()
    def p_sample(self, x: Tensor, t: int, x_self_cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x_{t-1}, x_0): a step of the ancestral sampler (Ho et al. 2020, algorithm 2); noise is drawn if t > 0."""
        if self._overridden(*STEP):
            return super().p_sample(x, t, x_self_cond)
        times = self._times(x, t)
        noise, raw = self.model(x, times).chunk(2, dim=1)
        x_start = self._start(x, times, noise, True)
        return self._learned_step(x, x_start, raw, t, True), x_start

    def _ancestral(self, x: Tensor, t: int, x_start: Tensor | None) -> State:
        if self._overridden("p_sample", *STEP):
            return self.p_sample(x, t, None)
        noise, raw = self.model(x, self._times(x, t)).chunk(2, dim=1)
        return self._learned_step(x, noise, raw, t, False), None

    def _learned_step(self, x: Tensor, y: Tensor, raw: Tensor, t: int, of_start: bool) -> Tensor:
        """x_{t-1} of x and the predicted noise, or with of_start x_0."""
        z = torch.randn_like(x) if t > 0 else None
        names = ("posterior_mean_coef1", "posterior_mean_coef2", "posterior_log_variance_clipped", "betas")
        start = () if of_start else self._start_buffers()
        rows = self._table("learned", ancestral_rows_of_range, (*names, *start))
        return ops.update(
            self._widened(x),
            y,
            rows,
            t,
            raw_variance=raw if t > 0 else None,
            noise=z,
            noisy=False,
            clip=None if of_start else 1.0,
        )

    def _ddim(self, x: Tensor, step: int, x_start: Tensor | None) -> State:
        return self._ddim_step(
            x,
            step,
            lambda t: self.model(x, t).chunk(2, dim=1)[0],
            lambda t: self.model_predictions(x, t, None, clip_x_start=True, rederive_pred_noise=True),
        )

    def p_losses(  # type: ignore[override]
        self,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        clip_denoised: bool = False,
        loss_reduction: str = "mean",
    ) -> Tensor:
        """The mean squared error of the noise plus vb_loss_weight times the bound in bits per dimension: () for
        loss_reduction "mean", (B,) for "none".

        Of the bound only the variance is trained (Nichol & Dhariwal 2021, section 3.1). It draws the noise if it is
        None.
        """
        check_reduction(loss_reduction)
        noise = torch.randn_like(x_start) if noise is None else noise
        noise, x = self._noise_and_state(x_start, t, noise)
        output = self.model(x, t)
        pred = output.chunk(2, dim=1)[0]
        simple = ops.loss(pred, row_index(t), self._targets("pred_noise"), noise=noise, reduction="none")
        losses = simple + self._bound(x_start, x, t, output, clip_denoised) * self.vb_loss_weight
        return losses.mean() if loss_reduction == "mean" else losses

    def _targets(self, objective: str) -> Tensor:
        """The loss has no weights."""
        return self._table("noise", lambda like: target_table(objective, like, like, torch.ones_like(like)), ("betas",))

    def _bound(self, x_start: Tensor, x: Tensor, t: Tensor, output: Tensor, clip: bool) -> Tensor:
        """(B,) bits per dimension: -log p(x_0 | x_1) at t = 0, else KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))."""
        t = row_index(t)
        if self._overridden(*BOUND):
            mean, _, log_variance, _ = self.p_mean_variance(x=x, t=t, clip_denoised=clip, model_output=output)
            true_mean, _, true_log_variance = self.q_posterior(x_start=x_start, x_t=x, t=t)
            mean, spread = mean.detach(), true_log_variance - log_variance
            kl = 0.5 * (-1.0 - spread + spread.exp() + (true_mean - mean) ** 2 * (-log_variance).exp())
            kl = kl.flatten(1).mean(1)
        else:
            pred, raw = output.chunk(2, dim=1)
            names = ("posterior_mean_coef1", "posterior_log_variance_clipped", "betas", *self._start_buffers())
            rows = self._table("bound", bound_rows, names)
            kl = ops.vlb(pred, x, x_start, t, rows, raw_variance=raw, clip=1.0 if clip else None, detach_mean=True)
            # On a CPU it costs nothing to see that no sample asks for the decoder.
            if t.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((t == 0).any()):
                return kl * BITS
            with torch.no_grad():
                mean = self.q_posterior(self._start(x, t, pred, clip), x, t)[0]
            share, smallest = unnormalize_to_zero_to_one(raw), values_at(self.posterior_log_variance_clipped, t, x)
            log_variance = share * values_at(self.betas.log(), t, x) + (1 - share) * smallest
        return torch.where(t == 0, decoder_nats(x_start, mean, 0.5 * log_variance).flatten(1).mean(1), kl) * BITS


def decoder_nats(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """-log p of images in 256 steps over [-1, 1], by stock's approximation of the normal distribution function."""

    def cdf(bound: Tensor) -> Tensor:
        return 0.5 * (1.0 + torch.tanh(sqrt(2.0 / pi) * (bound + 0.044715 * bound**3)))

    inverse = torch.exp(-log_scale)
    upper, lower = (cdf(inverse * (x - mean + end)) for end in (1.0 / 255.0, -1.0 / 255.0))
    inside = torch.where(x > 0.999, 1.0 - lower, upper - lower)
    return -torch.where(x < -0.999, upper, inside).clamp(min=SMALLEST).log()
