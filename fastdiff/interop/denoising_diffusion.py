"""GaussianDiffusion of denoising-diffusion-pytorch 2.3.4 on the fused operations: change the import, keep the code.

    from fastdiff.interop.denoising_diffusion import GaussianDiffusion

Constructor, methods, buffers and state_dict are the stock ones, their Unet is its model and their Trainer trains it; of
the package itself nothing is imported. Noise is drawn by PyTorch in the stock order, so that for the same generator
the result is the stock one, to rounding: the tables are computed in float32 from the buffers in the stock order of
operations. On the CPU everything but the sums of losses has the stock bits; on a GPU multiplications are fused with
additions.

A step of the samplers is one pass over x, the prediction and the noise. In p_sample and with self-conditioning, which
ask for x_0, it is two; of DDIM with self-conditioning, and on the CPU, four. Overrides of q_sample, p_sample,
p_mean_variance, model_predictions and q_posterior in a subclass or on the object are called wherever stock calls them,
and then a step takes more passes.

Tables are kept until a buffer is replaced or changed in place; changes through `.data`, and on a GPU those of buffers
made in inference mode, leave no trace and are missed.

Differences from stock:
    - Wrong arguments are a ValueError or TypeError, not an AssertionError, and betas outside [0, 1), which stock turns
      into NaN (the linear schedule with 20 timesteps or fewer), are among them.
    - Offset noise is added to a copy: stock adds it to the tensor that the caller passed as noise.
    - With immiscible=True the loss is that of the noise that was assigned. Stock permutes the noise within q_sample
      and compares the prediction with the unpermuted one, of other samples.
    - The loss is float32 and can be walked backward once; its gradient is computed in the same pass.
    - A prediction that is infinite gives NaN; stock clips it to 1 or -1.
As in stock, interpolate takes images in [-1, 1] and returns such, whatever auto_normalize, and its first step from
level t is that of level t - 1.
"""

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from scipy.optimize import linear_sum_assignment
    from tqdm.auto import tqdm
except ImportError as error:
    message = "fastdiff.interop.denoising_diffusion needs scipy and tqdm: pip install 'fastdiff[denoising-diffusion]'"
    raise ImportError(f"{message} ({error})") from error

from .. import ops
from ..cache import Tables
from ._rows import rows_of

OBJECTIVES = ("pred_noise", "pred_x0", "pred_v")
# Where DDIM takes the operations of stock one by one, to the bit; elsewhere a step is one pass, equal to rounding.
STOCK_ORDER = ("cpu",)


class ModelPrediction(NamedTuple):
    pred_noise: Tensor
    pred_x_start: Tensor


# --- schedules, float64 -----------------------------------------------------------------------------------------


def linear_beta_schedule(timesteps: int) -> Tensor:
    """beta from 0.1 / T to 20 / T (Ho et al. 2020, arXiv:2006.11239, where T = 1000)."""
    scale = 1000 / timesteps
    return torch.linspace(scale * 0.0001, scale * 0.02, timesteps, dtype=torch.float64)


def cosine_beta_schedule(timesteps: int, s: float = 0.008) -> Tensor:
    """alpha_bar_t = cos^2(pi/2 (t/T + s) / (1 + s)), normalised (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17)."""
    t = torch.linspace(0, timesteps, timesteps + 1, dtype=torch.float64) / timesteps
    return _betas(torch.cos((t + s) / (1 + s) * math.pi * 0.5) ** 2)


def sigmoid_beta_schedule(
    timesteps: int, start: float = -3, end: float = 3, tau: float = 1, clamp_min: float = 1e-5
) -> Tensor:
    """alpha_bar_t by a sigmoid from start to end (Jabri et al. 2022, arXiv:2212.11972); as in stock no clamp_min."""
    t = torch.linspace(0, timesteps, timesteps + 1, dtype=torch.float64) / timesteps
    v_start, v_end = (torch.tensor(v / tau).sigmoid() for v in (start, end))
    return _betas((-((t * (end - start) + start) / tau).sigmoid() + v_end) / (v_end - v_start))


def _betas(alpha_bar: Tensor) -> Tensor:
    alpha_bar = alpha_bar / alpha_bar[0]
    return torch.clip(1 - (alpha_bar[1:] / alpha_bar[:-1]), 0, 0.999)


SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "linear": linear_beta_schedule,
    "cosine": cosine_beta_schedule,
    "sigmoid": sigmoid_beta_schedule,
}


def normalize_to_neg_one_to_one(img: Tensor) -> Tensor:
    return img * 2 - 1


def unnormalize_to_zero_to_one(t: Tensor) -> Tensor:
    return (t + 1) * 0.5


def identity(t: Tensor) -> Tensor:
    return t


# --- diffusion --------------------------------------------------------------------------------------------------


class GaussianDiffusion(nn.Module):
    """denoising_diffusion_pytorch.GaussianDiffusion on the fused operations; see the module.

    model(x, t, x_self_cond) returns the prediction (B, C, H, W) of what `objective` says; it has the attributes
    channels, out_dim and self_condition. t is an int64 tensor (B,) in [0, timesteps); images are in [0, 1], or in
    [-1, 1] with auto_normalize=False. sampling_timesteps below timesteps makes `sample` use DDIM with eta
    ddim_sampling_eta. Raises ValueError, naming the argument.
    """

    model: Any
    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    log_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor
    loss_weight: Tensor

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
        super().__init__()
        if type(self) is GaussianDiffusion and model.channels != model.out_dim:
            raise ValueError(f"model: expected out_dim = channels = {model.channels}, got {model.out_dim}")
        if getattr(model, "random_or_learned_sinusoidal_cond", False):
            raise ValueError("model: expected no random or learned sinusoidal conditioning: it is for continuous time")
        if isinstance(image_size, int):
            image_size = (image_size, image_size)
        if not isinstance(image_size, (tuple, list)) or len(image_size) != 2:
            raise ValueError(f"image_size: expected an int or two, got {image_size!r}")
        if objective not in OBJECTIVES:
            raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {objective!r}")
        if beta_schedule not in SCHEDULES:
            raise ValueError(f"beta_schedule: expected one of {', '.join(SCHEDULES)}, got {beta_schedule!r}")
        betas = SCHEDULES[beta_schedule](timesteps, **(schedule_fn_kwargs or {}))
        if not bool(((betas >= 0) & (betas < 1)).all()):
            raise ValueError(f"beta_schedule, timesteps: expected betas in [0, 1), got {betas.min()} to {betas.max()}")
        if sampling_timesteps is not None and not 1 <= sampling_timesteps <= timesteps:
            raise ValueError(f"sampling_timesteps: expected 1 to {timesteps}, got {sampling_timesteps}")

        self.model = model
        self.channels = model.channels
        self.self_condition = model.self_condition
        self.image_size = image_size
        self.objective = objective
        self.num_timesteps = len(betas)
        self.sampling_timesteps = timesteps if sampling_timesteps is None else sampling_timesteps
        self.is_ddim_sampling = self.sampling_timesteps < timesteps
        self.ddim_sampling_eta = ddim_sampling_eta
        self.immiscible = immiscible
        self.offset_noise_strength = offset_noise_strength
        self.normalize = normalize_to_neg_one_to_one if auto_normalize else identity
        self.unnormalize = unnormalize_to_zero_to_one if auto_normalize else identity
        self._tables = Tables()

        # The stock buffers, to the bit: the same operations in float64, cast last.
        alphas = 1.0 - betas
        alpha_bar = torch.cumprod(alphas, dim=0)
        alpha_bar_prev = F.pad(alpha_bar[:-1], (1, 0), value=1.0)
        posterior_variance = betas * (1.0 - alpha_bar_prev) / (1.0 - alpha_bar)
        snr = alpha_bar / (1 - alpha_bar)
        clipped_snr = snr.clamp(max=min_snr_gamma) if min_snr_loss_weight else snr
        weights = {"pred_noise": clipped_snr / snr, "pred_x0": clipped_snr, "pred_v": clipped_snr / (snr + 1)}
        for name, value in {
            "betas": betas,
            "alphas_cumprod": alpha_bar,
            "alphas_cumprod_prev": alpha_bar_prev,
            "sqrt_alphas_cumprod": torch.sqrt(alpha_bar),
            "sqrt_one_minus_alphas_cumprod": torch.sqrt(1.0 - alpha_bar),
            "log_one_minus_alphas_cumprod": torch.log(1.0 - alpha_bar),
            "sqrt_recip_alphas_cumprod": torch.sqrt(1.0 / alpha_bar),
            "sqrt_recipm1_alphas_cumprod": torch.sqrt(1.0 / alpha_bar - 1),
            "posterior_variance": posterior_variance,
            "posterior_log_variance_clipped": torch.log(posterior_variance.clamp(min=1e-20)),
            "posterior_mean_coef1": betas * torch.sqrt(alpha_bar_prev) / (1.0 - alpha_bar),
            "posterior_mean_coef2": (1.0 - alpha_bar_prev) * torch.sqrt(alphas) / (1.0 - alpha_bar),
            "loss_weight": weights[objective],
        }.items():
            self.register_buffer(name, value.to(torch.float32))

    @property
    def device(self) -> torch.device:
        return self.betas.device

    # --- conversions

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_0 = x_t / sqrt(alpha_bar) - sqrt(1 / alpha_bar - 1) noise."""
        return self._sum(x_t, noise, t, "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", -1)

    def predict_noise_from_start(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """(x_t / sqrt(alpha_bar) - x_0) / sqrt(1 / alpha_bar - 1)."""

        def build() -> Tensor:
            return rows_of(self.betas, self._dtype, a=self.sqrt_recip_alphas_cumprod, b=-1.0, c=1.0)

        rows, x_t = self._kept("noise", build), self._widened(x_t)
        # Divided as in stock: a reciprocal in the row would be off by the rounding of x_t over sigma.
        return ops.update(x_t, x0, rows, t, noisy=False).div_(_at(self.sqrt_recipm1_alphas_cumprod, t, x_t))

    def predict_v(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0 (Salimans & Ho 2022, arXiv:2202.00512, appendix D)."""
        return self._sum(noise, x_start, t, "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", -1)

    def predict_start_from_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """x_0 = sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v."""
        return self._sum(x_t, v, t, "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", -1)

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance (B, 1, 1, 1) and its logarithm of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7)."""
        mean = self._sum(x_start, x_t, t, "posterior_mean_coef1", "posterior_mean_coef2")
        return mean, _at(self.posterior_variance, t, x_t), _at(self.posterior_log_variance_clipped, t, x_t)

    def model_predictions(
        self,
        x: Tensor,
        t: Tensor,
        x_self_cond: Tensor | None = None,
        clip_x_start: bool = False,
        rederive_pred_noise: bool = False,
    ) -> ModelPrediction:
        """The model's prediction as noise and as x_0, that in [-1, 1] with clip_x_start; one of the noise is derived
        from the clipped x_0 only with rederive_pred_noise."""
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
        times = torch.full((len(x),), t, device=self.device)
        if self._overridden("p_mean_variance", "model_predictions", "q_posterior"):
            mean, _, log_variance, x_start = self.p_mean_variance(
                x=x, t=times, x_self_cond=x_self_cond, clip_denoised=True
            )
            return mean + (0.5 * log_variance).exp() * (torch.randn_like(x) if t > 0 else 0.0), x_start
        x_start = self._start(x, times, self.model(x, times, x_self_cond), True)
        noise = torch.randn_like(x) if t > 0 else None
        return self._reverse(x, x_start, self._ancestral_rows(True), times, noise, None), x_start

    @torch.inference_mode()
    def p_sample_loop(self, shape: tuple[int, ...], return_all_timesteps: bool = False) -> Tensor:
        """Samples of all timesteps, (B, C, H, W), or (B, T + 1, C, H, W) from x_T to x_0 with return_all_timesteps."""
        img = torch.randn(shape, device=self.device)
        steps = range(self.num_timesteps)[::-1]
        return self.unnormalize(
            self._loop(img, steps, self._ancestral, "sampling loop time step", return_all_timesteps)
        )

    @torch.inference_mode()
    def ddim_sample(self, shape: tuple[int, ...], return_all_timesteps: bool = False) -> Tensor:
        """Samples of sampling_timesteps steps of DDIM(ddim_sampling_eta) (Song et al. 2021, arXiv:2010.02502, eq. 12);
        shapes as of p_sample_loop. Noise is drawn at every step but the last, also where eta = 0."""
        img = torch.randn(shape, device=self.device)
        steps = range(self.sampling_timesteps)
        return self.unnormalize(self._loop(img, steps, self._ddim, "sampling loop time step", return_all_timesteps))

    @torch.inference_mode()
    def sample(self, batch_size: int = 16, return_all_timesteps: bool = False) -> Tensor:
        """(batch_size, C, H, W) in [0, 1], or around [-1, 1] without auto_normalize."""
        sample = self.ddim_sample if self.is_ddim_sampling else self.p_sample_loop
        return sample((batch_size, self.channels, *self.image_size), return_all_timesteps=return_all_timesteps)

    @torch.inference_mode()
    def interpolate(self, x1: Tensor, x2: Tensor, t: int | None = None, lam: float = 0.5) -> Tensor:
        """(1 - lam) x1_t + lam x2_t, both noised to level t, T - 1 if None, and sampled from there."""
        if x1.shape != x2.shape:
            raise ValueError(f"x2: expected shape {tuple(x1.shape)}, got {tuple(x2.shape)}")
        t = self.num_timesteps - 1 if t is None else t
        t_batched = torch.full((len(x1),), t, device=x1.device)
        xt1, xt2 = (self.q_sample(x, t=t_batched) for x in (x1, x2))
        img = (1 - lam) * xt1 + lam * xt2
        return self._loop(img, range(t)[::-1], self._ancestral, "interpolation sample time step")

    # --- training

    def noise_assignment(self, x_start: Tensor, noise: Tensor) -> Tensor:
        """(B,) int64: the row of noise for each sample, at the least sum of distances (Li et al. 2024,
        arXiv:2406.12303)."""
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

        Drawn are noise unless given, offset noise (B, C) where its strength is above 0, and with self-conditioning one
        number of Python's `random`: below 1/2 the model first predicts the x_0 that it is then conditioned on.
        """
        if loss_reduction not in ("mean", "none"):
            raise ValueError(f"loss_reduction: expected 'mean' or 'none', got {loss_reduction!r}")
        noise = torch.randn_like(x_start) if noise is None else noise
        strength = self.offset_noise_strength if offset_noise_strength is None else offset_noise_strength
        if strength > 0:
            offset = torch.randn(x_start.shape[:2], device=self.device)
            noise = noise + strength * offset[:, :, None, None]
        if self.immiscible:  # once, so that the loss knows the noise: q_sample would assign again
            noise = noise[self.noise_assignment(x_start, noise)]
            x = self._noised(x_start, t, noise)
        else:
            x = self.q_sample(x_start=x_start, t=t, noise=noise)
        x_self_cond = None
        if self.self_condition and random.random() < 0.5:
            with torch.no_grad():
                x_self_cond = self._predicted_start(x, t, None, False)
        output = self.model(x, t, x_self_cond)
        x0 = None if self.objective == "pred_noise" else x_start
        drawn = None if self.objective == "pred_x0" else noise
        return ops.loss(output, t, self._targets(), x0=x0, noise=drawn, reduction=loss_reduction)

    def random_times(self, batch_size: int) -> Tensor:
        return torch.randint(0, self.num_timesteps, (batch_size,), device=self.device)

    def forward(
        self, img: Tensor, *args: Any, times: Tensor | None = None, loss_reduction: str = "mean", **kwargs: Any
    ) -> Tensor:
        """p_losses of images (B, C, H, W) at `times`, random ones if None."""
        if img.ndim != 4 or list(img.shape[2:]) != list(self.image_size):
            raise ValueError(f"img: expected (B, C, H, W), H and W {tuple(self.image_size)}, got {tuple(img.shape)}")
        times = self.random_times(len(img)) if times is None else times
        kwargs["loss_reduction"] = loss_reduction
        return self.p_losses(self.normalize(img), times, *args, **kwargs)

    # --- one step

    def _loop(
        self,
        img: Tensor,
        steps: range,
        step: Callable[[Tensor, int, Tensor | None], tuple[Tensor, Tensor | None]],
        desc: str,
        return_all: bool = False,
    ) -> Tensor:
        imgs, x_start = [img], None
        for i in tqdm(steps, desc=desc):
            img, x_start = step(img, i, x_start if self.self_condition else None)
            if return_all:
                imgs.append(img)
        return torch.stack(imgs, dim=1) if return_all else img

    def _ancestral(self, x: Tensor, t: int, x_self_cond: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """p_sample, without x_0 where nothing needs it."""
        if self.self_condition or self._overridden("p_sample", "p_mean_variance", "model_predictions", "q_posterior"):
            return self.p_sample(x, t, x_self_cond)
        times = torch.full((len(x),), t, device=self.device)
        output = self.model(x, times, None)
        noise = torch.randn_like(x) if t > 0 else None
        return self._reverse(x, output, self._ancestral_rows(False), times, noise, 1.0), None

    def _ddim(self, x: Tensor, step: int, x_self_cond: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(x after this step, x_0 if it was on the way)."""
        times = torch.full((len(x),), self._ddim_times()[step], device=self.device)
        last = step == self.sampling_timesteps - 1
        one_pass = not (self.self_condition or x.device.type in STOCK_ORDER or self._overridden("model_predictions"))
        if one_pass:
            state, output, x_start = x, self.model(x, times, None), None
        else:
            state, x_start, *_ = self.model_predictions(
                x, times, x_self_cond, clip_x_start=True, rederive_pred_noise=True
            )
            if last:
                return x_start, x_start
            output = x_start
        noise = None if last else torch.randn_like(x)
        noise = noise if self.ddim_sampling_eta else None  # drawn, as in stock, but not read
        return self._reverse(state, output, self._ddim_rows(one_pass), step, noise, 1.0 if one_pass else None), x_start

    def _reverse(
        self, x: Tensor, output: Tensor, rows: Tensor, step: Tensor | int, noise: Tensor | None, clip: float | None
    ) -> Tensor:
        """c x_0 + d x + f noise, x_0 = a x + b output, clipped."""
        return ops.update(self._widened(x), output, rows, step, noise=noise, noisy=noise is not None, clip=clip)

    def _predicted_start(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None, clip: bool) -> Tensor:
        """pred_x_start of model_predictions, without the noise that comes with it unless somebody has changed that."""
        if self._overridden("model_predictions"):
            x_start = self.model_predictions(x, t, x_self_cond).pred_x_start
            return x_start.clamp(-1.0, 1.0) if clip else x_start
        return self._start(x, t, self.model(x, t, x_self_cond), clip)

    def _start(self, x: Tensor, t: Tensor, output: Tensor, clip: bool) -> Tensor:
        """x_0 from the model's output."""
        if self.objective == "pred_x0":
            return output.clamp(-1.0, 1.0) if clip else output

        def build() -> Tensor:
            return rows_of(self.betas, self._dtype, **self._start_terms(), c=1.0)

        rows = self._kept("start", build)
        return ops.update(self._widened(x), output, rows, t, noisy=False, clip=1.0 if clip else None)

    def _noised(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return self._sum(x_start, noise, t, "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")

    def _sum(self, x: Tensor, y: Tensor, t: Tensor, alpha: str, sigma: str, sign: int = 1) -> Tensor:
        """alpha_t x + sign sigma_t y, of two buffers, in one pass."""

        def build() -> Tensor:
            return torch.stack((getattr(self, alpha), sign * getattr(self, sigma)), 1).to(self._dtype)

        table = self._kept(f"{alpha}, {sign} {sigma}", build)
        return ops.noising(self._widened(x), t, table, noise=y)

    # --- tables

    def _targets(self) -> Tensor:
        """Rows (p, q, w) of `ops.loss`: the target p x_0 + q noise, and loss_weight."""

        def build() -> Tensor:
            zero, one = torch.zeros_like(self.betas), torch.ones_like(self.betas)
            p, q = {
                "pred_noise": (zero, one),
                "pred_x0": (one, zero),
                "pred_v": (-self.sqrt_one_minus_alphas_cumprod, self.sqrt_alphas_cumprod),
            }[self.objective]
            return torch.stack((p, q, self.loss_weight), 1).float()

        return self._kept("targets", build)

    def _start_terms(self, of_start: bool = False) -> dict[str, Any]:
        """x_0 = a x + b output by timestep; of_start: the output is x_0."""
        if of_start or self.objective == "pred_x0":
            return {"a": torch.zeros_like(self.betas), "b": torch.ones_like(self.betas)}
        if self.objective == "pred_noise":
            return {"a": self.sqrt_recip_alphas_cumprod, "b": -self.sqrt_recipm1_alphas_cumprod}
        return {"a": self.sqrt_alphas_cumprod, "b": -self.sqrt_one_minus_alphas_cumprod}

    def _ancestral_rows(self, of_start: bool) -> Tensor:
        """By timestep."""

        def build() -> Tensor:
            std = (0.5 * self.posterior_log_variance_clipped).exp()
            c, d = self.posterior_mean_coef1, self.posterior_mean_coef2
            return rows_of(self.betas, self._dtype, **self._start_terms(of_start), c=c, d=d, f=std)

        return self._kept(f"ancestral {of_start}", build)

    def _ddim_times(self) -> list[int]:
        """From T - 1 down to -1, evenly; the last stands for the data."""
        times = torch.linspace(-1, self.num_timesteps - 1, steps=self.sampling_timesteps + 1)
        return times.int().tolist()[::-1]

    def _ddim_rows(self, one_pass: bool) -> Tensor:
        """By step, root x_0 + q eps + sigma noise: of (eps, x_0); or of (x, output), where the last is x_0 alone."""

        def build() -> Tensor:
            times = self._ddim_times()[:-1]
            alpha, alpha_next = self.alphas_cumprod[times[:-1]], self.alphas_cumprod[times[1:]]
            sigma = self.ddim_sampling_eta * ((1 - alpha / alpha_next) * (1 - alpha_next) / (1 - alpha)).sqrt()
            root, q = alpha_next.sqrt(), (1 - alpha_next - sigma**2).sqrt()
            if not one_pass:
                return rows_of(root, self._dtype, b=1.0, c=root, d=q, f=sigma)
            # eps = (recip x - x_0) / recipm1; c is a difference of numbers near 1.
            recip, recipm1 = self.sqrt_recip_alphas_cumprod[times[:-1]], self.sqrt_recipm1_alphas_cumprod[times[:-1]]
            k = q.double() / recipm1.double()
            c, d = F.pad(root.double() - k, (0, 1), value=1.0), F.pad(k * recip.double(), (0, 1))
            start = {name: column[times] for name, column in self._start_terms().items()}
            return rows_of(c, self._dtype, **start, c=c, d=d, f=F.pad(sigma, (0, 1)))

        return self._kept(f"ddim {one_pass}", build, self.sampling_timesteps, self.ddim_sampling_eta)

    def _kept(self, name: str, build: Callable[[], Tensor], *key: Any) -> Tensor:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        sources = tuple(b for b in self._buffers.values() if b is not None)
        return self._tables.get(name, build, sources, self.objective, *key)

    @property
    def _dtype(self) -> torch.dtype:
        """Of tables: float64 after .double()."""
        return torch.float64 if self.betas.dtype == torch.float64 else torch.float32

    def _widened(self, x: Tensor) -> Tensor:
        """x in the type of its product with a buffer."""
        return x.to(torch.promote_types(x.dtype, self.betas.dtype))

    def _overridden(self, *names: str) -> bool:
        """Whether a subclass, or somebody on this object, has put another method in the place of one of these."""
        return any(getattr(getattr(self, n), "__func__", None) is not getattr(GaussianDiffusion, n) for n in names)


def _at(buffer: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """buffer[t], shaped (B, 1, ...) to multiply like."""
    return buffer[t].reshape(-1, *[1] * (like.ndim - 1))
