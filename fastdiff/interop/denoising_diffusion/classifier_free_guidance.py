"""GaussianDiffusion of denoising_diffusion_pytorch.classifier_free_guidance: of classes, with guidance.

from fastdiff.interop.denoising_diffusion.classifier_free_guidance import GaussianDiffusion
"""

import functools
from typing import Any

import torch
from torch import Tensor

from ...ops.checks import check_choice
from ..stock import remembered
from .discrete import LOOP, STEP, Discrete, State
from .images import check_images, normalize_to_neg_one_to_one, unnormalize_to_zero_to_one
from .tables import ModelPrediction

__all__ = ["GaussianDiffusion"]


@remembered
class GaussianDiffusion(Discrete):
    """denoising_diffusion_pytorch.classifier_free_guidance.GaussianDiffusion on the fused operations; see the package.

    Images are in [0, 1].

    Args:
        model: model(x, t, classes) returns what `objective` says, (B, C, H, W), and drops classes by chance.
            model.forward_with_cond_scale(x, t, classes, cond_scale=, rescaled_phi=) returns that with guidance, and the
            one without classes. It has the attributes channels, out_dim, cond_drop_prob and
            random_or_learned_sinusoidal_cond.
        image_size: H = W.
        sampling_timesteps: if it is below timesteps, `sample` uses DDIM with eta ddim_sampling_eta.
        use_cfg_plus_plus: DDIM steps along the noise predicted without classes (Chung et al. 2024, arXiv:2406.08070).

    The other arguments are stock's. Raises: ValueError, naming the argument.
    """

    def __init__(
        self,
        model: Any,
        *,
        image_size: int,
        timesteps: int = 1000,
        sampling_timesteps: int | None = None,
        objective: str = "pred_noise",
        beta_schedule: str = "cosine",
        ddim_sampling_eta: float = 1.0,
        offset_noise_strength: float = 0.0,
        min_snr_loss_weight: bool = False,
        min_snr_gamma: float = 5,
        use_cfg_plus_plus: bool = False,
    ) -> None:
        if type(self) is GaussianDiffusion and model.channels != model.out_dim:
            raise ValueError(f"model: expected out_dim = channels = {model.channels}, got {model.out_dim}")
        if model.random_or_learned_sinusoidal_cond:
            raise ValueError("model: expected no random or learned sinusoidal conditioning: it is for continuous time")
        check_choice("beta_schedule", beta_schedule, ("linear", "cosine"))
        gamma = min_snr_gamma if min_snr_loss_weight else None
        super().__init__(model, objective, beta_schedule, timesteps, sampling_timesteps, ddim_sampling_eta, gamma)
        self.channels = model.channels
        self.image_size = image_size
        self.use_cfg_plus_plus = use_cfg_plus_plus
        self.offset_noise_strength = offset_noise_strength

    def random_cond_keep_mask(self, batch_size: int) -> Tensor:
        """(batch_size,) bool: which samples keep their class in training, each with chance 1 - cond_drop_prob."""
        keep = 1.0 - self.model.cond_drop_prob
        if keep in (0, 1):
            return torch.full((batch_size,), keep == 1, device=self.device)
        return torch.zeros(batch_size, device=self.device).uniform_(0, 1) < keep

    def xm_shared_random_kwargs(self, batch_size: int) -> dict[str, Tensor]:
        """What the candidates of stock's XMWrapper share."""
        return {"cond_keep_mask": self.random_cond_keep_mask(batch_size)}

    def model_predictions(
        self,
        x: Tensor,
        t: Tensor,
        classes: Tensor,
        cond_scale: float = 6.0,
        rescaled_phi: float = 0.7,
        clip_x_start: bool = False,
    ) -> ModelPrediction:
        """The guided prediction as noise and as x_0, which clip_x_start keeps in [-1, 1].

        With use_cfg_plus_plus the noise is that of the prediction without classes.
        """
        output, null = self._guided(x, t, classes, cond_scale, rescaled_phi)
        x_start = self._start(x, t, output, clip_x_start)
        if self.objective == "pred_noise":
            return ModelPrediction(null if self.use_cfg_plus_plus else output, x_start)
        source = self._start(x, t, null, clip_x_start) if self.use_cfg_plus_plus else x_start
        return ModelPrediction(self.predict_noise_from_start(x, t, source), x_start)

    # --- sampling

    def p_mean_variance(
        self,
        x: Tensor,
        t: Tensor,
        classes: Tensor,
        cond_scale: float,
        rescaled_phi: float,
        clip_denoised: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of p(x_{t-1} | x_t), and the x_0 that it goes through."""
        if self._overridden("model_predictions"):
            x_start = self.model_predictions(x, t, classes, cond_scale, rescaled_phi).pred_x_start
            x_start = x_start.clamp(-1.0, 1.0) if clip_denoised else x_start
        else:
            output, _ = self._guided(x, t, classes, cond_scale, rescaled_phi)
            x_start = self._start(x, t, output, clip_denoised)
        return *self.q_posterior(x_start=x_start, x_t=x, t=t), x_start

    @torch.no_grad()
    def p_sample(
        self,
        x: Tensor,
        t: int,
        classes: Tensor,
        cond_scale: float = 6.0,
        rescaled_phi: float = 0.7,
        clip_denoised: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """(x_{t-1}, x_0): a step of the ancestral sampler (Ho et al. 2020, algorithm 2); noise is drawn if t > 0."""
        if self._overridden(*STEP):
            moments = self.p_mean_variance(
                x=x,
                t=self._times(x, t),
                classes=classes,
                cond_scale=cond_scale,
                rescaled_phi=rescaled_phi,
                clip_denoised=clip_denoised,
            )
            return self._step_of_moments(x, t, moments)
        return self._step_through_start(
            x, t, lambda times: self._guided(x, times, classes, cond_scale, rescaled_phi)[0], clip_denoised
        )

    @torch.no_grad()
    def p_sample_loop(
        self, classes: Tensor, shape: tuple[int, ...], cond_scale: float = 6.0, rescaled_phi: float = 0.7
    ) -> Tensor:
        """Samples (B, C, H, W) of all timesteps."""
        img = torch.randn(shape, device=self.device)
        step = functools.partial(self._ancestral, (classes, cond_scale, rescaled_phi))
        return unnormalize_to_zero_to_one(self._loop(img, self._reversed(), step, LOOP))

    @torch.no_grad()
    def ddim_sample(
        self,
        classes: Tensor,
        shape: tuple[int, ...],
        cond_scale: float = 6.0,
        rescaled_phi: float = 0.7,
        clip_denoised: bool = True,
    ) -> Tensor:
        """Samples of sampling_timesteps steps of DDIM(ddim_sampling_eta) (Song et al. 2021, arXiv:2010.02502, eq. 12).

        A model that predicts noise steps along its own prediction, not along that of the clipped x_0. Noise is drawn at
        every step but the last, even if eta = 0.
        """

        def step(x: Tensor, i: int, _: Tensor | None) -> State:
            return self._ddim_step(
                x,
                i,
                # Two predictions are not one pass.
                None if self.use_cfg_plus_plus else lambda t: self._guided(x, t, classes, cond_scale, rescaled_phi)[0],
                lambda t: self.model_predictions(
                    x, t, classes, cond_scale=cond_scale, rescaled_phi=rescaled_phi, clip_x_start=clip_denoised
                ),
                rederived=False,
                clip=clip_denoised,
            )

        img = torch.randn(shape, device=self.device)
        return unnormalize_to_zero_to_one(self._loop(img, range(self.sampling_timesteps), step, LOOP))

    @torch.no_grad()
    def sample(self, classes: Tensor, cond_scale: float = 6.0, rescaled_phi: float = 0.7) -> Tensor:
        """(B, C, H, W) around [0, 1] of classes (B,)."""
        sample = self.ddim_sample if self.is_ddim_sampling else self.p_sample_loop
        shape = (len(classes), self.channels, self.image_size, self.image_size)
        return sample(classes, shape, cond_scale, rescaled_phi)

    @torch.no_grad()
    def interpolate(self, x1: Tensor, x2: Tensor, classes: Tensor, t: int | None = None, lam: float = 0.5) -> Tensor:
        """(1 - lam) x1_t + lam x2_t, both noised to level t, T - 1 if None, and sampled from there."""
        return self._interpolate(x1, x2, t, lam, functools.partial(self._ancestral, (classes, 6.0, 0.7)))

    # --- training

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise (Ho et al. 2020, eq. 4); noise None draws it.

        Offset noise (B, C) is drawn and added if its strength is above 0.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        return self._noised(x_start, t, self._with_offset(x_start, noise))

    def p_losses(
        self,
        x_start: Tensor,
        t: Tensor,
        *,
        classes: Tensor,
        noise: Tensor | None = None,
        cond_keep_mask: Tensor | None = None,
        loss_reduction: str = "mean",
    ) -> Tensor:
        """loss_weight_t times the mean squared error of the prediction: () for loss_reduction "mean", (B,) for "none".

        It draws the noise if it is None, and offset noise (B, C) if its strength is above 0. The model draws which
        samples keep their class unless cond_keep_mask says so.
        """
        self._check_loss(loss_reduction)
        noise = torch.randn_like(x_start) if noise is None else noise
        if self._overridden("q_sample"):
            noise = noise.clone()
            noise.takes_offset = True  # type: ignore[attr-defined]
            x = self.q_sample(x_start=x_start, t=t, noise=noise)
        else:
            noise = self._with_offset(x_start, noise)
            x = self._noised(x_start, t, noise)
        mask = {} if cond_keep_mask is None else {"cond_keep_mask": cond_keep_mask}
        return self._loss(self.model(x, t, classes, **mask), x_start, t, noise, loss_reduction)

    def forward(
        self,
        img: Tensor,
        *args: Any,
        times: Tensor | None = None,
        cond_keep_mask: Tensor | None = None,
        loss_reduction: str = "mean",
        **kwargs: Any,
    ) -> Tensor:
        """p_losses of images (B, C, H, W) and classes=(B,) at `times`, random ones if None."""
        check_images(img, self.image_size)
        times = self.random_times(len(img)) if times is None else times
        kwargs |= {"cond_keep_mask": cond_keep_mask, "loss_reduction": loss_reduction}
        return self.p_losses(normalize_to_neg_one_to_one(img), times, *args, **kwargs)

    # --- one step

    def _with_offset(self, x_start: Tensor, noise: Tensor) -> Tensor:
        """The noise with offset noise, as a copy, or in place where p_losses has to know it."""
        if not self.offset_noise_strength > 0:
            return noise
        offset = self.offset_noise_strength * torch.randn(x_start.shape[:2], device=self.device)[:, :, None, None]
        return noise.add_(offset) if hasattr(noise, "takes_offset") else noise + offset

    def _guided(
        self, x: Tensor, t: Tensor, classes: Tensor, cond_scale: float, rescaled_phi: float
    ) -> tuple[Tensor, Tensor]:
        """(the prediction with guidance, without classes). With cond_scale = 1 their Unet returns one for both."""
        found = self.model.forward_with_cond_scale(x, t, classes, cond_scale=cond_scale, rescaled_phi=rescaled_phi)
        return (found, found) if isinstance(found, Tensor) else found

    def _ancestral(self, guidance: tuple[Tensor, float, float], x: Tensor, t: int, _: Tensor | None) -> State:
        """p_sample, without x_0 if nothing needs it. guidance: (classes, cond_scale, rescaled_phi)."""
        if self._overridden("p_sample", *STEP):
            return self.p_sample(x, t, *guidance)
        return self._step_in_one_pass(x, t, lambda times: self._guided(x, times, *guidance)[0])
