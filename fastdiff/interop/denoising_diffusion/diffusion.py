"""GaussianDiffusion: its methods on the fused operations."""

import functools
import random
from collections.abc import Callable
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from tqdm.auto import tqdm

from ... import ops
from ...ops.checks import check_choice
from ...support.cache import Tables
from ..stock import broadcast, combine, noising, overridden, values
from .images import identity, normalize_to_neg_one_to_one, unnormalize_to_zero_to_one
from .schedules import fill_buffers, make_buffers
from .tables import (
    OBJECTIVES,
    START,
    ModelPrediction,
    ancestral_rows,
    ddim_rows,
    ddim_rows_of_output,
    ddim_times,
    noise_rows,
    row_index,
    start_rows,
    sum_table,
    target_table,
    values_at,
)

# Devices where DDIM takes the operations of stock one by one, to the bit. Elsewhere a step is one pass, to rounding.
STOCK_ORDER = ("cpu",)
# What stock's methods call on the object, for overrides.
PREDICTION = ("model_predictions", "predict_start_from_noise", "predict_start_from_v", "predict_noise_from_start")
STEP = ("p_mean_variance", "q_posterior", *PREDICTION)

LOOP = "sampling loop time step"  # what the progress bar says


class GaussianDiffusion(nn.Module):
    """denoising_diffusion_pytorch.GaussianDiffusion on the fused operations; see the package.

    Images are in [0, 1], or in [-1, 1] with auto_normalize=False. Times t are integers (B,) in [0, timesteps).

    Args:
        model: model(x, t, x_self_cond) returns the prediction (B, C, H, W) of what `objective` says. It has the
            attributes channels, out_dim and self_condition.
        sampling_timesteps: if it is below timesteps, `sample` uses DDIM with eta ddim_sampling_eta.

    The other arguments are stock's. Raises: ValueError, naming the argument.
    """

    model: Any
    betas: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor

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
        image_size = (int(image_size),) * 2 if hasattr(image_size, "__index__") else image_size  # type: ignore[arg-type]
        if not isinstance(image_size, (tuple, list)) or len(image_size) != 2:
            raise ValueError(f"image_size: expected an int or two, got {image_size!r}")
        check_choice("objective", objective, OBJECTIVES)
        gamma = min_snr_gamma if min_snr_loss_weight else None
        make = functools.partial(make_buffers, beta_schedule, timesteps, schedule_fn_kwargs, objective, gamma)
        buffers = make()
        if sampling_timesteps is not None and not 1 <= sampling_timesteps <= timesteps:
            raise ValueError(f"sampling_timesteps: expected 1 to {timesteps}, got {sampling_timesteps}")

        self.model = model
        self.channels = model.channels
        self.self_condition = model.self_condition
        self.image_size = image_size
        self.objective = objective
        self.num_timesteps = len(buffers["betas"])
        self.sampling_timesteps = timesteps if sampling_timesteps is None else sampling_timesteps
        self.is_ddim_sampling = self.sampling_timesteps < timesteps
        self.ddim_sampling_eta = ddim_sampling_eta
        self.immiscible = immiscible
        self.offset_noise_strength = offset_noise_strength
        self.normalize = normalize_to_neg_one_to_one if auto_normalize else identity
        self.unnormalize = unnormalize_to_zero_to_one if auto_normalize else identity
        self._tables = Tables()

        self._make_buffers = make
        for name, value in buffers.items():
            self.register_buffer(name, value.to(torch.empty(0).device))
        self.register_load_state_dict_post_hook(functools.partial(fill_buffers, make))  # type: ignore[no-untyped-call]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GaussianDiffusion":
        """nn.Module's; buffers that come from the meta device, where they had no values, are made again."""
        empty = self.betas.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if empty and not self.betas.is_meta:
            for name, value in self._make_buffers().items():
                getattr(self, name).copy_(value)
        return self

    @property
    def device(self) -> torch.device:
        return self.betas.device

    # --- conversions

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_0 = x_t / sqrt(alpha_bar) - sqrt(1 / alpha_bar - 1) noise."""
        return self._sum(x_t, noise, t, "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", -1)

    def predict_noise_from_start(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """(x_t / sqrt(alpha_bar) - x_0) / sqrt(1 / alpha_bar - 1)."""
        rows = self._table("noise", noise_rows, ("sqrt_recip_alphas_cumprod",))
        # Divided as in stock: a reciprocal in the row would be off by the rounding of x_t over sigma.
        return self._combine(x_t, x0, rows, t).div_(values_at(self.sqrt_recipm1_alphas_cumprod, t, x_t))

    def predict_v(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0 (Salimans & Ho 2022, arXiv:2202.00512, appendix D)."""
        return self._sum(noise, x_start, t, "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", -1)

    def predict_start_from_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """x_0 = sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v."""
        return self._sum(x_t, v, t, "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", -1)

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance (B, 1, 1, 1) and its logarithm of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7)."""
        mean = self._sum(x_start, x_t, t, "posterior_mean_coef1", "posterior_mean_coef2")
        return mean, values_at(self.posterior_variance, t, x_t), values_at(self.posterior_log_variance_clipped, t, x_t)

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
        times = torch.full((len(x),), t, device=self.device, dtype=torch.long)
        if self._overridden(*STEP):
            moments = self.p_mean_variance(x=x, t=times, x_self_cond=x_self_cond, clip_denoised=True)
            mean, _, log_variance, x_start = moments
            return mean + (0.5 * log_variance).exp() * (torch.randn_like(x) if t > 0 else 0.0), x_start
        x_start = self._start(x, times, self.model(x, times, x_self_cond), True)
        noise = torch.randn_like(x) if t > 0 else None
        return self._combine(x, x_start, self._ancestral_rows(True), times, noise), x_start

    @torch.inference_mode()
    def p_sample_loop(self, shape: tuple[int, ...], return_all_timesteps: bool = False) -> Tensor:
        """Samples of all timesteps, (B, C, H, W), or (B, T + 1, C, H, W) from x_T to x_0 with return_all_timesteps."""
        img = torch.randn(shape, device=self.device)
        img = self._loop(img, range(self.num_timesteps)[::-1], self._ancestral, LOOP, return_all_timesteps)
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
        if x1.shape != x2.shape:
            raise ValueError(f"x2: expected shape {tuple(x1.shape)}, got {tuple(x2.shape)}")
        t = self.num_timesteps - 1 if t is None else t
        t_batched = torch.full((len(x1),), t, device=x1.device)
        xt1, xt2 = (self.q_sample(x, t=t_batched) for x in (x1, x2))
        img = (1 - lam) * xt1 + lam * xt2
        return self._loop(img, range(t)[::-1], self._ancestral, "interpolation sample time step")

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
        if loss_reduction not in ("mean", "none"):
            raise ValueError(f"loss_reduction: expected 'mean' or 'none', got {loss_reduction!r}")
        check_choice("objective", self.objective, OBJECTIVES)
        noise = torch.randn_like(x_start) if noise is None else noise
        strength = self.offset_noise_strength if offset_noise_strength is None else offset_noise_strength
        if strength > 0:
            offset = torch.randn(x_start.shape[:2], device=self.device)
            noise = noise + strength * offset[:, :, None, None]
        if self.immiscible:  # here, so that the loss knows the noise
            noise = noise[self.noise_assignment(x_start, noise)]
        if self.immiscible and not self._overridden("q_sample"):  # which would assign again
            x = self._noised(x_start, t, noise)
        else:
            x = self.q_sample(x_start=x_start, t=t, noise=noise)
        x_self_cond = None
        if self.self_condition and random.random() < 0.5:
            with torch.no_grad():
                x_self_cond = self._predicted_start(x, t, None, False)
        output = self.model(x, t, x_self_cond)
        if self.objective == "pred_v" and self._overridden("predict_v"):
            target = self.predict_v(x_start, t, noise)
            output, target = broadcast(t, output, target)
            return ops.loss(output, row_index(t), self._targets("pred_x0"), x0=target, reduction=loss_reduction)
        output, x_start, noise = broadcast(t, output, x_start, noise)
        return ops.loss(
            output,
            row_index(t),
            self._targets(self.objective),
            x0=None if self.objective == "pred_noise" else x_start,
            noise=None if self.objective == "pred_x0" else noise,
            reduction=loss_reduction,
        )

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
        """p_sample, without x_0 if nothing needs it."""
        if self.self_condition or self._overridden("p_sample", *STEP):
            return self.p_sample(x, t, x_self_cond)
        times = torch.full((len(x),), t, device=self.device, dtype=torch.long)
        output = self.model(x, times, None)
        noise = torch.randn_like(x) if t > 0 else None
        return self._combine(x, output, self._ancestral_rows(False), times, noise, clip=1.0), None

    def _ddim(self, x: Tensor, step: int, x_self_cond: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(x after this step, x_0 if it was on the way)."""
        times = ddim_times(self.num_timesteps, self.sampling_timesteps)
        t = torch.full((len(x),), times[step], device=self.device)
        last = step == self.sampling_timesteps - 1
        one_pass = not (self.self_condition or x.device.type in STOCK_ORDER or self._overridden(*PREDICTION))
        if one_pass:
            state, output, x_start = x, self.model(x, t, None), None
        else:
            state, x_start, *_ = self.model_predictions(x, t, x_self_cond, clip_x_start=True, rederive_pred_noise=True)
            if last:
                return x_start, x_start
            output = x_start
        noise = None if last else torch.randn_like(x)
        noise = noise if self.ddim_sampling_eta else None  # drawn, as in stock, but not read
        rows, clip = self._ddim_rows(times, one_pass), 1.0 if one_pass else None
        return self._combine(state, output, rows, step, noise, clip), x_start

    def _predicted_start(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None, clip: bool) -> Tensor:
        """pred_x_start of model_predictions. The noise beside it is left out unless model_predictions is overridden."""
        if self._overridden("model_predictions"):
            x_start = self.model_predictions(x, t, x_self_cond).pred_x_start
            return x_start.clamp(-1.0, 1.0) if clip else x_start
        return self._start(x, t, self.model(x, t, x_self_cond), clip)

    def _start(self, x: Tensor, t: Tensor, output: Tensor, clip: bool) -> Tensor:
        """x_0 from the model's output."""
        convert = {"pred_noise": "predict_start_from_noise", "pred_v": "predict_start_from_v"}.get(self.objective)
        if convert is not None and not self._overridden(convert):
            rows = self._table("start", start_rows, self._start_buffers())
            return self._combine(x, output, rows, t, clip=1.0 if clip else None)
        x_start = output if convert is None else getattr(self, convert)(x, t, output)
        return x_start.clamp(-1.0, 1.0) if clip else x_start

    # --- arithmetic: in the type of a product with a buffer, and broadcast as torch does

    def _combine(
        self, x: Tensor, y: Tensor, rows: Tensor, t: Any, noise: Tensor | None = None, clip: float | None = None
    ) -> Tensor:
        """from_x0 x_0 + from_x x + noise z, where x_0 = clip(x0_from_x x + x0_from_pred y)."""
        return combine(self._widened(x), y, rows, row_index(t), z=noise, clip=clip)

    def _sum(self, x: Tensor, y: Tensor, t: Tensor, alpha: str, sigma: str, sign: int = 1) -> Tensor:
        """alpha_t x + sign sigma_t y in one pass, where alpha and sigma are the names of buffers."""
        table = self._table("sum", lambda a, s: sum_table(a, s, sign), (alpha, sigma), sign)
        return noising(self._widened(x), y, row_index(t), table)

    def _noised(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return self._sum(x_start, noise, t, "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")

    def _widened(self, x: Tensor) -> Tensor:
        return x.to(torch.promote_types(x.dtype, self.betas.dtype))

    # --- tables

    def _start_buffers(self) -> tuple[str, ...]:
        """The names of `start` of this objective, see tables."""
        check_choice("objective", self.objective, OBJECTIVES)
        return START[self.objective]

    def _targets(self, objective: str) -> Tensor:
        names = ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "loss_weight")
        return self._table("targets", functools.partial(target_table, objective), names, objective)

    def _ancestral_rows(self, of_start: bool) -> Tensor:
        """One row per timestep, applied to x and the output, or with of_start to x and x_0."""
        names = ("posterior_mean_coef1", "posterior_mean_coef2", "posterior_log_variance_clipped")
        start = () if of_start else self._start_buffers()
        return self._table("ancestral", ancestral_rows, (*names, *start))

    def _ddim_rows(self, times: list[int], one_pass: bool) -> Tensor:
        eta, key = self.ddim_sampling_eta, (self.sampling_timesteps, self.ddim_sampling_eta)
        if not one_pass:
            return self._table("ddim", functools.partial(ddim_rows, times, eta), ("alphas_cumprod",), *key)
        names = ("alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", *self._start_buffers())
        return self._table("ddim", functools.partial(ddim_rows_of_output, times, eta), names, *key)

    def _table(self, name: str, build: Callable[..., Tensor], buffers: tuple[str, ...], *key: Any) -> Tensor:
        """build(*buffers), kept while neither they nor the key change."""
        sources = tuple(getattr(self, b) for b in buffers)
        key = (*key, *map(values, sources))
        return self._tables.get(f"{name} of {', '.join(buffers)}", lambda: build(*sources), sources, *key)

    def _overridden(self, *names: str) -> bool:
        """Whether a subclass, or somebody on this object, has put another method in the place of one of these."""
        return overridden(self, {name: ORIGINALS[name] for name in names})


ORIGINALS = {name: getattr(GaussianDiffusion, name) for name in ("p_sample", "q_sample", "predict_v", *STEP)}
