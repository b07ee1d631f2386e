"""What the classes with a chain of timesteps share: buffers, conversions, and the steps as rows of numbers."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ... import ops
from ...ops.checks import check_choice
from ...support.cache import Tables
from ..stock import broadcast, combine, noising, overridden, stamp
from .images import check_reduction
from .schedules import fill_buffers, make_buffers
from .tables import (
    OBJECTIVES,
    START,
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
State = tuple[Tensor, Tensor | None]  # x after a step, and x_0 if it was on the way


class Discrete(nn.Module):
    """A diffusion with timesteps 0 to T - 1 and the buffers of stock.

    A class of this kind has `model_predictions`, and is a class `remembered`.

    Args:
        beta_schedule, timesteps, schedule_options, gamma: of the buffers, see make_buffers.
        sampling_timesteps: steps of DDIM; None for all of them by the ancestral sampler.
        eta: of DDIM.
    """

    originals: ClassVar[dict[str, Any]]
    model: Any
    betas: Tensor
    loss_weight: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor

    def __init__(
        self,
        model: Any,
        objective: str,
        beta_schedule: str,
        timesteps: int,
        sampling_timesteps: int | None,
        eta: float,
        gamma: float | None = None,
        schedule_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_choice("objective", objective, OBJECTIVES)
        make = functools.partial(make_buffers, beta_schedule, timesteps, schedule_options, objective, gamma)
        buffers = make()
        timesteps = len(buffers["betas"])
        if sampling_timesteps is not None and not 1 <= sampling_timesteps <= timesteps:
            raise ValueError(f"sampling_timesteps: expected 1 to {timesteps}, got {sampling_timesteps}")
        self.model = model
        self.objective = objective
        self.num_timesteps = timesteps
        self.sampling_timesteps = timesteps if sampling_timesteps is None else sampling_timesteps
        self.is_ddim_sampling = self.sampling_timesteps < timesteps
        self.ddim_sampling_eta = eta
        self._tables = Tables(stamp)
        self._make_buffers = make
        for name, value in buffers.items():
            self.register_buffer(name, value.to(torch.empty(0).device))
        self.register_load_state_dict_post_hook(functools.partial(fill_buffers, make))  # type: ignore[no-untyped-call]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Discrete":
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

    def random_times(self, batch_size: int) -> Tensor:
        return torch.randint(0, self.num_timesteps, (batch_size,), device=self.device)

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

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise (Ho et al. 2020, eq. 4); noise None draws it."""
        return self._noised(x_start, t, torch.randn_like(x_start) if noise is None else noise)

    # --- steps; `output` gives what the model predicts at times (B,)

    def _loop(
        self,
        img: Tensor,
        steps: range,
        step: Callable[[Tensor, int, Tensor | None], State],
        desc: str,
        return_all: bool = False,
    ) -> Tensor:
        """The state after all steps, or with return_all (B, steps + 1, ...), all of them from the first."""
        imgs, x_start = [img], None
        for i in tqdm(steps, desc=desc):
            img, x_start = step(img, i, x_start)
            if return_all:
                imgs.append(img)
        return torch.stack(imgs, dim=1) if return_all else img

    def _interpolate(
        self, x1: Tensor, x2: Tensor, t: int | None, lam: float, step: Callable[[Tensor, int, Tensor | None], State]
    ) -> Tensor:
        if x1.shape != x2.shape:
            raise ValueError(f"x2: expected shape {tuple(x1.shape)}, got {tuple(x2.shape)}")
        t = self.num_timesteps - 1 if t is None else t
        t_batched = torch.full((len(x1),), t, device=x1.device)
        xt1, xt2 = (self.q_sample(x, t=t_batched) for x in (x1, x2))
        img = (1 - lam) * xt1 + lam * xt2
        return self._loop(img, range(t)[::-1], step, "interpolation sample time step")

    def _reversed(self) -> range:
        return range(self.num_timesteps)[::-1]

    def _times(self, x: Tensor, t: int) -> Tensor:
        return torch.full((len(x),), t, device=x.device, dtype=torch.long)

    def _step_through_start(
        self, x: Tensor, t: int, output: Callable[[Tensor], Tensor], clip: bool
    ) -> tuple[Tensor, Tensor]:
        """(x_{t-1}, x_0) of the ancestral sampler."""
        times = self._times(x, t)
        x_start = self._start(x, times, output(times), clip)
        noise = torch.randn_like(x) if t > 0 else None
        return self._combine(x, x_start, self._ancestral_rows(True), times, noise), x_start

    def _step_in_one_pass(self, x: Tensor, t: int, output: Callable[[Tensor], Tensor]) -> State:
        """The same without x_0, clipped."""
        times = self._times(x, t)
        prediction = output(times)
        noise = torch.randn_like(x) if t > 0 else None
        return self._combine(x, prediction, self._ancestral_rows(False), times, noise, clip=1.0), None

    def _step_of_moments(self, x: Tensor, t: int, moments: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The same of what p_mean_variance returned, in stock's operations."""
        mean, _, log_variance, x_start = moments
        return mean + (0.5 * log_variance).exp() * (torch.randn_like(x) if t > 0 else 0.0), x_start

    def _ddim_step(
        self,
        x: Tensor,
        step: int,
        output: Callable[[Tensor], Tensor] | None,
        predictions: Callable[[Tensor], tuple[Tensor, ...]],
        rederived: bool = True,
        clip: bool = True,
    ) -> State:
        """(x after this step of DDIM, x_0 if it was on the way).

        Args:
            output: for one pass where that is possible; None if x_0 is wanted.
            predictions: the noise and x_0 at times (B,), for several passes.
            rederived: the noise is that of the clipped x_0 also if the model predicts noise.
        """
        times = ddim_times(self.num_timesteps, self.sampling_timesteps)
        t = self._times(x, times[step])
        last = step == self.sampling_timesteps - 1
        if x.device.type in STOCK_ORDER or self._overridden(*PREDICTION):
            output = None
        if output is not None:
            state, prediction, x_start = x, output(t), None
        else:
            state, x_start, *_ = predictions(t)
            if last:
                return x_start, x_start
            prediction = x_start
        noise = None if last else torch.randn_like(x)
        noise = noise if self.ddim_sampling_eta else None  # drawn, as in stock, but not read
        rows = self._ddim_rows(times, output is not None, rederived)
        return self._combine(
            state, prediction, rows, step, noise, 1.0 if clip and output is not None else None
        ), x_start

    def _start(self, x: Tensor, t: Tensor, output: Tensor, clip: bool) -> Tensor:
        """x_0 from the model's output."""
        convert = {"pred_noise": "predict_start_from_noise", "pred_v": "predict_start_from_v"}.get(self._predicted)
        if convert is not None and not self._overridden(convert):
            rows = self._table("start", start_rows, self._start_buffers())
            return self._combine(x, output, rows, t, clip=1.0 if clip else None)
        x_start = output if convert is None else getattr(self, convert)(x, t, output)
        return x_start.clamp(-1.0, 1.0) if clip else x_start

    def _loss(self, output: Tensor, x_start: Tensor, t: Tensor, noise: Tensor, reduction: str) -> Tensor:
        """The weighted squared error of the output, as () for reduction "mean" and (B,) for "none"."""
        if self.objective == "pred_v" and self._overridden("predict_v"):
            target = self.predict_v(x_start, t, noise)
            output, target = broadcast(t, output, target)
            return ops.loss(output, row_index(t), self._targets("pred_x0"), x0=target, reduction=reduction)
        output, x_start, noise = broadcast(t, output, x_start, noise)
        return ops.loss(
            output,
            row_index(t),
            self._targets(self.objective),
            x0=None if self.objective == "pred_noise" else x_start,
            noise=None if self.objective == "pred_x0" else noise,
            reduction=reduction,
        )

    def _check_loss(self, loss_reduction: str) -> None:
        check_reduction(loss_reduction)
        check_choice("objective", self.objective, OBJECTIVES)

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

    @property
    def _predicted(self) -> str:
        """What the output is: the objective, but for a class whose output is noise whatever that says."""
        return self.objective

    def _start_buffers(self) -> tuple[str, ...]:
        """The names of `start` of this objective, see tables."""
        check_choice("objective", self._predicted, OBJECTIVES)
        return START[self._predicted]

    def _targets(self, objective: str) -> Tensor:
        names = ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "loss_weight")
        return self._table("targets", functools.partial(target_table, objective), names, objective)

    def _ancestral_rows(self, of_start: bool) -> Tensor:
        """One row per timestep, applied to x and the output, or with of_start to x and x_0."""
        names = ("posterior_mean_coef1", "posterior_mean_coef2", "posterior_log_variance_clipped")
        start = () if of_start else self._start_buffers()
        return self._table("ancestral", ancestral_rows, (*names, *start))

    def _ddim_rows(self, times: list[int], one_pass: bool, rederived: bool) -> Tensor:
        eta = self.ddim_sampling_eta
        if not one_pass:
            key = (self.sampling_timesteps, eta)
            return self._table("ddim", functools.partial(ddim_rows, times, eta), ("alphas_cumprod",), *key)
        build = functools.partial(ddim_rows_of_output, times, eta, rederived or self._predicted != "pred_noise")
        names = ("alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", *self._start_buffers())
        return self._table("ddim", build, names, self.sampling_timesteps, eta, rederived)

    def _table(self, name: str, build: Callable[..., Tensor], buffers: tuple[str, ...], *key: Any) -> Tensor:
        """build(*buffers), kept while neither they nor the key change."""
        sources = tuple(getattr(self, b) for b in buffers)
        return self._tables.get(f"{name} of {', '.join(buffers)}", lambda: build(*sources), sources, *key)

    def _overridden(self, *names: str) -> bool:
        """Whether a subclass, or somebody on this object, has put another method in the place of one of these."""
        return overridden(self, {name: self.originals[name] for name in names})
