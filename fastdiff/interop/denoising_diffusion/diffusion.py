"""GaussianDiffusion: its methods on the fused operations."""

import random
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..stock import remembered
from .discrete import LOOP, STEP, Discrete, State
from .images import check_images, identity, normalize_to_neg_one_to_one, unnormalize_to_zero_to_one
from .tables import ModelPrediction


@remembered
class GaussianDiffusion(Discrete):
    """denoising_diffusion_pytorch.GaussianDiffusion on the fused operations; see the package.

    Images are in [0, 1], or in [-1, 1] with auto_normalize=False. Times t are integers (B,) in [0, timesteps).

    Args:
        model: model(x, t, x_self_cond) returns the prediction (B, C, H, W) of what `objective` says. It has the
            attributes channels, out_dim and self_condition.
        sampling_timesteps: if it is below timesteps, `sample` uses DDIM with eta ddim_sampling_eta.

    The other arguments are stock's. Raises: ValueError, naming the argument.
    """

    def __init__(
        self,
        model: Any,
        *,
        image_size: int | tuple[int, int] | list[int],
        timesteps: int = 1000,
        sampling_timesteps: int | None = None,
        objective: str = "pred_v",
        beta_schedule: str = "sigmoid",
        schedule_fn_kwargs: dict[str, Any] | None = None,
        ddim_sampling_eta: float = 0.0,
        auto_normalize: bool = True,
        offset_noise_strength: float = 0.0,
        min_snr_loss_weight: bool = False,
        min_snr_gamma: float = 5,
        immiscible: bool = False,
    ) -> None:
        if type(self) is GaussianDiffusion and model.channels != model.out_dim:
            raise ValueError(f"model: expected out_dim = channels = {model.channels}, got {model.out_dim}")
        if getattr(model, "random_or_learned_sinusoidal_cond", False):
            raise ValueError("model: expected no random or learned sinusoidal conditioning: it is for continuous time")
        image_size = (int(image_size),) * 2 if hasattr(image_size, "__index__") else image_size  # type: ignore[arg-type]
        if not isinstance(image_size, (tuple, list)) or len(image_size) != 2:
            raise ValueError(f"image_size: expected an int or two, got {image_size!r}")
        gamma = min_snr_gamma if min_snr_loss_weight else None
        super().__init__(
            model, objective, beta_schedule, timesteps, sampling_timesteps, ddim_sampling_eta, gamma, schedule_fn_kwargs
        )
        self.channels = model.channels
        self.self_condition = model.self_condition
        self.image_size = image_size
        self.immiscible = immiscible
        self.offset_noise_strength = offset_noise_strength
        self.normalize = normalize_to_neg_one_to_one if auto_normalize else identity
        self.unnormalize = unnormalize_to_zero_to_one if auto_normalize else identity

    def model_predictions(
        self,
        x: Tensor,
        t: Tensor,
        x_self_cond: Tensor | None = None,
        clip_x_start: bool = False,
        rederive_pred_noise: bool = False,
    ) -> ModelPrediction:
        """The model's prediction as noise and as x_0, which clip_x_start keeps in [-1, 1].

        If the model predicts noise, that is returned as it is, or from the clipped x_0 with rederive_pred_noise.
        """
        output = self.model(x, t, x_self_cond)
        x_start = self._start(x, t, output, clip_x_start)
        if self.objective == "pred_noise" and not (clip_x_start and rederive_pred_noise):
            return ModelPrediction(output, x_start)
        return ModelPrediction(self.predict_noise_from_start(x, t, x_start), x_start)

    # --- sampling

    def p_mean_variance(
        self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None, clip_denoised: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of p(x_{t-1} | x_t), and the x_0 that it goes through."""
        x_start = self._predicted_start(x, t, x_self_cond, clip_denoised)
        return *self.q_posterior(x_start=x_start, x_t=x, t=t), x_start

    @torch.inference_mode()
    def p_sample(self, x: Tensor, t: int, x_self_cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x_{t-1}, x_0): a step of the ancestral sampler (Ho et al. 2020, algorithm 2); noise is drawn if t > 0."""
        if self._overridden(*STEP):
            times = self._times(x, t)
            moments = self.p_mean_variance(x=x, t=times, x_self_cond=x_self_cond, clip_denoised=True)
            return self._step_of_moments(x, t, moments)
        return self._step_through_start(x, t, lambda times: self.model(x, times, x_self_cond), True)

    @torch.inference_mode()
    def p_sample_loop(self, shape: tuple[int, ...], return_all_timesteps: bool = False) -> Tensor:
        """Samples of all timesteps, (B, C, H, W), or (B, T + 1, C, H, W) from x_T to x_0 with return_all_timesteps."""
        img = torch.randn(shape, device=self.device)
        img = self._loop(img, self._reversed(), self._ancestral, LOOP, return_all_timesteps)
        return self.unnormalize(img)

    @torch.inference_mode()
    def ddim_sample(self, shape: tuple[int, ...], return_all_timesteps: bool = False) -> Tensor:
        """Samples of sampling_timesteps steps of DDIM(ddim_sampling_eta) (Song et al. 2021, arXiv:2010.02502, eq. 12).

        Shapes as in p_sample_loop. Noise is drawn at every step but the last, even if eta = 0.
        """
        img = torch.randn(shape, device=self.device)
        img = self._loop(img, range(self.sampling_timesteps), self._ddim, LOOP, return_all_timesteps)
        return self.unnormalize(img)

    @torch.inference_mode()
    def sample(self, batch_size: int = 16, return_all_timesteps: bool = False) -> Tensor:
        """(batch_size, C, H, W) in [0, 1], or around [-1, 1] without auto_normalize."""
        sample = self.ddim_sample if self.is_ddim_sampling else self.p_sample_loop
        return sample((batch_size, self.channels, *self.image_size), return_all_timesteps=return_all_timesteps)

    @torch.inference_mode()
    def interpolate(self, x1: Tensor, x2: Tensor, t: int | None = None, lam: float = 0.5) -> Tensor:
        """(1 - lam) x1_t + lam x2_t, both noised to level t, T - 1 if None, and sampled from there."""
        return self._interpolate(x1, x2, t, lam, self._ancestral)

    # --- training

    def noise_assignment(self, x_start: Tensor, noise: Tensor) -> Tensor:
        """(B,) int64: each sample's row of noise, for the least sum of distances (Li et al. 2024, arXiv:2406.12303)."""
        distance = torch.cdist(x_start.flatten(1), noise.flatten(1))
        return torch.from_numpy(linear_sum_assignment(distance.cpu())[1]).to(distance.device)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise (Ho et al. 2020, eq. 4); noise None draws it."""
        noise = torch.randn_like(x_start) if noise is None else noise
        if self.immiscible:
            noise = noise[self.noise_assignment(x_start, noise)]
        return self._noised(x_start, t, noise)

    def p_losses(
        self,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        offset_noise_strength: float | None = None,
        loss_reduction: str = "mean",
    ) -> Tensor:
        """loss_weight_t times the mean squared error of the prediction: () for loss_reduction "mean", (B,) for "none".

        It draws the noise if it is None, and offset noise (B, C) if its strength is above 0. With self-conditioning it
        draws a number of Python's `random` too: below 1/2 the model first predicts the x_0 that conditions it.
        """
        self._check_loss(loss_reduction)
        noise = torch.randn_like(x_start) if noise is None else noise
        strength = self.offset_noise_strength if offset_noise_strength is None else offset_noise_strength
        if strength > 0:
            offset = torch.randn(x_start.shape[:2], device=self.device)
            noise = noise + strength * offset[:, :, None, None]
        noise, x = self._noise_and_state(x_start, t, noise)
        x_self_cond = None
        if self.self_condition and random.random() < 0.5:
            with torch.no_grad():
                x_self_cond = self._predicted_start(x, t, None, False)
        output = self.model(x, t, x_self_cond)
        return self._loss(output, x_start, t, noise, loss_reduction)

    def forward(
        self, img: Tensor, *args: Any, times: Tensor | None = None, loss_reduction: str = "mean", **kwargs: Any
    ) -> Tensor:
        """p_losses of images (B, C, H, W) at `times`, random ones if None."""
        check_images(img, self.image_size)
        times = self.random_times(len(img)) if times is None else times
        kwargs["loss_reduction"] = loss_reduction
        return self.p_losses(self.normalize(img), times, *args, **kwargs)

    def _noise_and_state(self, x_start: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The noise, assigned if that is wanted, and q_sample with it."""
        if self.immiscible:  # here, so that the loss knows the noise
            noise = noise[self.noise_assignment(x_start, noise)]
        if self.immiscible and not self._overridden("q_sample"):  # which would assign again
            return noise, self._noised(x_start, t, noise)
        return noise, self.q_sample(x_start=x_start, t=t, noise=noise)

    # --- one step

    def _ancestral(self, x: Tensor, t: int, x_start: Tensor | None) -> State:
        """p_sample, without x_0 if nothing needs it."""
        if self.self_condition or self._overridden("p_sample", *STEP):
            return self.p_sample(x, t, x_start if self.self_condition else None)
        return self._step_in_one_pass(x, t, lambda times: self.model(x, times, None))

    def _ddim(self, x: Tensor, step: int, x_start: Tensor | None) -> State:
        cond = x_start if self.self_condition else None
        return self._ddim_step(
            x,
            step,
            None if self.self_condition else lambda t: self.model(x, t, None),
            lambda t: self.model_predictions(x, t, cond, clip_x_start=True, rederive_pred_noise=True),
        )

    def _predicted_start(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None, clip: bool) -> Tensor:
        """pred_x_start of model_predictions. The noise beside it is left out unless model_predictions is overridden."""
        if self._overridden("model_predictions"):
            x_start = self.model_predictions(x, t, x_self_cond).pred_x_start
            return x_start.clamp(-1.0, 1.0) if clip else x_start
        return self._start(x, t, self.model(x, t, x_self_cond), clip)
