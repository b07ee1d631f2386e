"""GaussianDiffusion1D: sequences (B, C, N), or (B, N, C)."""

import functools
import random
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ...ops.checks import check_choice
from ..stock import remembered
from .discrete import LOOP, STEP, Discrete, State
from .images import identity, normalize_to_neg_one_to_one, unnormalize_to_zero_to_one
from .tables import ModelPrediction, values_at

NOTHING: Mapping[str, Any] = MappingProxyType({})


@remembered
class GaussianDiffusion1D(Discrete):
    """denoising_diffusion_pytorch.GaussianDiffusion1D on the fused operations; see the package.

    Args:
        model: model(x, t, **model_forward_kwargs) returns what `objective` says, shaped like x. With self-conditioning
            x_self_cond is one of its keywords.
        seq_length: N. Data are (B, C, N), or (B, N, C) with channel_first=False, in [0, 1], or in [-1, 1] with
            auto_normalize=False.
        channels, self_condition: the model's, unless they are given.
        sampling_timesteps: if it is below timesteps, `sample` uses DDIM with eta ddim_sampling_eta.

    The other arguments are stock's. Raises: ValueError, naming the argument.
    """

    def __init__(
        self,
        model: Any,
        *,
        seq_length: int,
        timesteps: int = 1000,
        sampling_timesteps: int | None = None,
        objective: str = "pred_noise",
        beta_schedule: str = "cosine",
        ddim_sampling_eta: float = 0.0,
        auto_normalize: bool = True,
        channels: int | None = None,
        self_condition: bool | None = None,
        channel_first: bool = True,
    ) -> None:
        check_choice("beta_schedule", beta_schedule, ("linear", "cosine"))
        super().__init__(model, objective, beta_schedule, timesteps, sampling_timesteps, ddim_sampling_eta)
        self.channels = model.channels if channels is None else channels
        self.self_condition = model.self_condition if self_condition is None else self_condition
        self.channel_first = channel_first
        self.seq_index = -1 if channel_first else -2
        self.seq_length = seq_length
        self.normalize = normalize_to_neg_one_to_one if auto_normalize else identity
        self.unnormalize = unnormalize_to_zero_to_one if auto_normalize else identity

    def model_predictions(
        self,
        x: Tensor,
        t: Tensor,
        x_self_cond: Tensor | None = None,
        clip_x_start: bool = False,
        rederive_pred_noise: bool = False,
        model_forward_kwargs: Mapping[str, Any] = NOTHING,
    ) -> ModelPrediction:
        """As GaussianDiffusion.model_predictions, with keywords for the model."""
        output = self._output(x, x_self_cond, model_forward_kwargs, t)
        x_start = self._start(x, t, output, clip_x_start)
        if self.objective == "pred_noise" and not (clip_x_start and rederive_pred_noise):
            return ModelPrediction(output, x_start)
        return ModelPrediction(self.predict_noise_from_start(x, t, x_start), x_start)

    # --- sampling

    def p_mean_variance(
        self,
        x: Tensor,
        t: Tensor,
        x_self_cond: Tensor | None = None,
        clip_denoised: bool = True,
        model_forward_kwargs: Mapping[str, Any] = NOTHING,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of p(x_{t-1} | x_t), and the x_0 that it goes through."""
        x_start = self._predicted_start(x, t, x_self_cond, clip_denoised, model_forward_kwargs)
        return *self.q_posterior(x_start=x_start, x_t=x, t=t), x_start

    @torch.no_grad()
    def p_sample(
        self,
        x: Tensor,
        t: int,
        x_self_cond: Tensor | None = None,
        clip_denoised: bool = True,
        model_forward_kwargs: Mapping[str, Any] = NOTHING,
    ) -> tuple[Tensor, Tensor]:
        """(x_{t-1}, x_0): a step of the ancestral sampler (Ho et al. 2020, algorithm 2); noise is drawn if t > 0."""
        if self._overridden(*STEP):
            moments = self.p_mean_variance(
                x=x,
                t=self._times(x, t),
                x_self_cond=x_self_cond,
                clip_denoised=clip_denoised,
                model_forward_kwargs=model_forward_kwargs,
            )
            return self._step_of_moments(x, t, moments)
        output = functools.partial(self._output, x, x_self_cond, model_forward_kwargs)
        return self._step_through_start(x, t, output, clip_denoised)

    @torch.no_grad()
    def p_sample_loop(
        self, shape: tuple[int, ...], return_noise: bool = False, model_forward_kwargs: Mapping[str, Any] = NOTHING
    ) -> Any:
        """Samples of all timesteps, shaped `shape`; with return_noise also x_T."""
        noise = torch.randn(shape, device=self.device)
        img = self._loop(noise, self._reversed(), functools.partial(self._ancestral, model_forward_kwargs), LOOP)
        return (self.unnormalize(img), noise) if return_noise else self.unnormalize(img)

    @torch.no_grad()
    def ddim_sample(
        self,
        shape: tuple[int, ...],
        clip_denoised: bool = True,
        model_forward_kwargs: Mapping[str, Any] = NOTHING,
        return_noise: bool = False,
    ) -> Any:
        """Samples of sampling_timesteps steps of DDIM(ddim_sampling_eta) (Song et al. 2021, arXiv:2010.02502, eq. 12).

        A model that predicts noise steps along its own prediction, not along that of the clipped x_0. Noise is drawn at
        every step but the last, even if eta = 0. With return_noise x_T is returned too.
        """
        noise = torch.randn(shape, device=self.device)

        def step(x: Tensor, i: int, x_start: Tensor | None) -> State:
            cond = x_start if self.self_condition else None
            return self._ddim_step(
                x,
                i,
                None if self.self_condition else functools.partial(self._output, x, None, model_forward_kwargs),
                lambda t: self.model_predictions(
                    x, t, cond, clip_x_start=clip_denoised, model_forward_kwargs=model_forward_kwargs
                ),
                rederived=False,
                clip=clip_denoised,
            )

        img = self.unnormalize(self._loop(noise, range(self.sampling_timesteps), step, LOOP))
        return (img, noise) if return_noise else img

    @torch.no_grad()
    def sample(
        self, batch_size: int = 16, return_noise: bool = False, model_forward_kwargs: Mapping[str, Any] = NOTHING
    ) -> Any:
        """(batch_size, C, N), or (batch_size, N, C) with channel_first=False; with return_noise also x_T."""
        sides = (self.channels, self.seq_length) if self.channel_first else (self.seq_length, self.channels)
        sample = self.ddim_sample if self.is_ddim_sampling else self.p_sample_loop
        return sample((batch_size, *sides), return_noise=return_noise, model_forward_kwargs=model_forward_kwargs)

    @torch.no_grad()
    def interpolate(self, x1: Tensor, x2: Tensor, t: int | None = None, lam: float = 0.5) -> Tensor:
        """(1 - lam) x1_t + lam x2_t, both noised to level t, T - 1 if None, and sampled from there."""
        step = functools.partial(self._ancestral, NOTHING)
        return self._interpolate(x1, x2, t, lam, step)

    # --- training

    def p_losses(
        self,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        model_forward_kwargs: Mapping[str, Any] = NOTHING,
        return_reduced_loss: bool = True,
        loss_reduction: str = "mean",
    ) -> Tensor:
        """loss_weight_t times the mean squared error of the prediction: () for loss_reduction "mean", (B,) for "none".

        With return_reduced_loss=False it is that of each element, shaped like x_start. It draws the noise if it is
        None. With self-conditioning it draws a number of Python's `random` too: below 1/2 the model first predicts the
        x_0 that conditions it.
        """
        self._check_loss(loss_reduction)
        noise = torch.randn_like(x_start) if noise is None else noise
        x = self.q_sample(x_start=x_start, t=t, noise=noise)
        x_self_cond = None
        if self.self_condition and random.random() < 0.5:
            with torch.no_grad():
                x_self_cond = self._predicted_start(x, t, None, False, model_forward_kwargs)
        output = self._output(x, x_self_cond, model_forward_kwargs, t)
        if return_reduced_loss:
            return self._loss(output, x_start, t, noise, loss_reduction)
        target = {"pred_noise": lambda: noise, "pred_x0": lambda: x_start}.get(
            self.objective, lambda: self.predict_v(x_start, t, noise)
        )()
        return (output - target).square() * values_at(self.loss_weight, t, output)

    def forward(
        self, img: Tensor, *args: Any, times: Tensor | None = None, loss_reduction: str = "mean", **kwargs: Any
    ) -> Tensor:
        """p_losses of data (B, C, N), or (B, N, C), at `times`, random ones if None."""
        if img.ndim < 2 or img.shape[self.seq_index] != self.seq_length:
            raise ValueError(f"img: expected sequences of {self.seq_length}, got shape {tuple(img.shape)}")
        times = self.random_times(len(img)) if times is None else times
        kwargs["loss_reduction"] = loss_reduction
        return self.p_losses(self.normalize(img), times, *args, **kwargs)

    # --- one step

    def _output(self, x: Tensor, x_self_cond: Tensor | None, keywords: Mapping[str, Any], t: Tensor) -> Any:
        """What the model predicts."""
        return self.model(x, t, **(keywords if x_self_cond is None else {**keywords, "x_self_cond": x_self_cond}))

    def _predicted_start(
        self, x: Tensor, t: Tensor, x_self_cond: Tensor | None, clip: bool, keywords: Mapping[str, Any]
    ) -> Tensor:
        """pred_x_start of model_predictions. The noise beside it is left out unless model_predictions is overridden."""
        if self._overridden("model_predictions"):
            x_start = self.model_predictions(x, t, x_self_cond=x_self_cond, model_forward_kwargs=keywords).pred_x_start
            return x_start.clamp(-1.0, 1.0) if clip else x_start
        return self._start(x, t, self._output(x, x_self_cond, keywords, t), clip)

    def _ancestral(self, keywords: Mapping[str, Any], x: Tensor, t: int, x_start: Tensor | None) -> State:
        """p_sample, without x_0 if nothing needs it."""
        if self.self_condition or self._overridden("p_sample", *STEP):
            cond = x_start if self.self_condition else None
            return self.p_sample(x, t, cond, model_forward_kwargs=keywords)
        return self._step_in_one_pass(x, t, functools.partial(self._output, x, None, keywords))
