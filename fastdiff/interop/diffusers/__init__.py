"""Schedulers of diffusers with their arithmetic on the fused operations: change the import, keep the code.

    from fastdiff.interop.diffusers import DDPMScheduler

A class here is the stock class of that name and overrides add_noise, get_velocity and step (step_pred) alone, so
configurations, files, set_timesteps and signatures are the stock ones; what is saved loads in diffusers on a machine
without fastdiff. For the same `generator` the stock noise is drawn in the stock order and the result is the stock one,
to rounding: the coefficients are computed in float32 in the stock order of operations. On the CPU DDPM and DDIM give
the stock bits, but for learned_range; on a GPU multiplications are fused with additions.

    fused_noise: a keyword of the constructor, from_config and from_pretrained, and an attribute; not saved. True draws
        the noise of step (step_pred) in the kernel: z(seed, sample, timestep), the same whatever the batch or device.
        The seed is generator.initial_seed(), of one generator for the batch or of a list of one per sample, which is
        then sample 0 of its seed; without a generator every step draws a seed. The generator does not advance: a seed
        stands for one run, and a second run that goes on with the generator has the same noise and warns.

Neither a step nor add_noise waits for the device or breaks a graph. A timestep is read only where that is free: a
number, a CPU tensor, or an element of self.timesteps, of which the first step after set_timesteps makes a copy on the
host. A DDPM step that can not tell whether t > 0 (another GPU tensor; under torch.compile any tensor) draws noise at
t = 0 too and multiplies it by 0. DPMSolverMultistepScheduler counts its steps; where it has to look for the first one
in a tensor that is not free to read it does as stock, unless set_begin_index was called.

Tables are kept until what they are made of is replaced or changed in place; only changes in place of a GPU tensor that
was made in inference mode, which leave no trace, are missed.

Differences from stock, all of them defects there:
    - variance_type "fixed_large_log" gives what "fixed_large" gives; stock takes the root of a logarithm: NaN.
    - bfloat16 and float16 are computed in float32; x_0 and the result are rounded once. In stock's bfloat16 add_noise
      alpha_bar rounds to 1 for t = 0 to 9 of the default schedule: no noise is added at all.

DDIMPipeline converts what it is given to the stock DDIMScheduler: assign pipeline.scheduler afterwards.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import diffusers
    from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
    from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
    from diffusers.schedulers.scheduling_sde_ve import SdeVeOutput
    from diffusers.schedulers.scheduling_utils import SchedulerOutput
except ImportError as error:
    message = "fastdiff.interop.diffusers needs diffusers: pip install 'fastdiff[diffusers]'"
    raise ImportError(f"{message} ({error})") from error

from ... import ops
from ...steps import LOG_ZERO
from .._rows import rows_of
from .common import (
    FusedScheduler,
    Generators,
    index_of,
    noising,
    normal,
    promoted,
    table_dtype,
    with_fused_noise,
)

PREDICTIONS = ("epsilon", "sample", "v_prediction")


class _Discrete(FusedScheduler):
    """DDPM and DDIM: levels by alphas_cumprod."""

    alphas_cumprod: Tensor

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise in one pass."""
        table = self._levels(original_samples, 1)
        return noising(original_samples, noise, index_of(timesteps, original_samples.device), table)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) x_0 in one pass."""
        return noising(noise, sample, index_of(timesteps, sample.device), self._levels(sample, -1))

    def _levels(self, like: Tensor, sign: int) -> Tensor:
        """(alpha_t, sign sigma_t) by timestep."""

        def build() -> Tensor:
            alpha_bar = self.alphas_cumprod.to(dtype)
            return torch.stack((alpha_bar**0.5, sign * (1 - alpha_bar) ** 0.5), 1).to(like.device)

        dtype = table_dtype(like)
        return self._tables.get(f"levels {sign}", build, (self.alphas_cumprod,), like.device, dtype)

    def _solved(
        self,
        name: str,
        terms: Callable[[Tensor, Tensor], tuple[Tensor | float, Tensor, Tensor | float]],
        x: Tensor,
        y: Tensor,
        index: Tensor,
        clip: float | None = None,
    ) -> Tensor:
        """clip((a x + b y) / e) with (a, b, e) = terms(alpha, sigma) by timestep.

        On the CPU stock divides, and so does this, to the bit; on a GPU stock multiplies by the reciprocal.
        """
        cpu = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)

        def build() -> tuple[Tensor, Tensor | None]:
            alpha_bar = self.alphas_cumprod
            a, b, e = terms(alpha_bar**0.5, (1 - alpha_bar) ** 0.5)
            if cpu and isinstance(e, Tensor):
                return rows_of(alpha_bar, a=a, b=b, c=1.0).to(x.device), e.to(x.device)
            return rows_of(alpha_bar, a=a / e, b=b / e, c=1.0).to(x.device), None

        rows, divisor = self._tables.get(name, build, (self.alphas_cumprod,), x.device, cpu)
        if divisor is None:
            return ops.update(x, y, rows, index, noisy=False, clip=clip)
        out = ops.update(x, y, rows, index, noisy=False).div_(divisor[index].reshape(-1, *[1] * (x.ndim - 1)))
        return out if clip is None else out.clamp_(-clip, clip)

    def _x0(self, model_output: Tensor, sample: Tensor, index: Tensor) -> Tensor:
        """The prediction of x_0, clipped or thresholded."""
        config = self.config
        clip = config.clip_sample_range if config.clip_sample and not config.thresholding else None
        if config.prediction_type == "epsilon":
            x0 = self._solved("x0 of eps", lambda a, s: (1.0, -s, a), sample, model_output, index, clip)
        elif config.prediction_type == "v_prediction":
            x0 = self._solved("x0 of v", lambda a, s: (a, -s, 1.0), sample, model_output, index, clip)
        else:
            x0 = model_output if clip is None else model_output.clamp(-clip, clip)
        return self._threshold_sample(x0) if config.thresholding else x0


class DDPMScheduler(_Discrete, diffusers.DDPMScheduler):
    """diffusers.DDPMScheduler (Ho et al. 2020, arXiv:2006.11239) on the fused operations; see the module."""

    __init__ = with_fused_noise(diffusers.DDPMScheduler)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, ...]:
        """One step of the ancestral sampler: x_0, then c x_0 + d x_t + std z (Ho et al. 2020, eq. 6, 7)."""
        kind = self.config.variance_type
        raw = None
        if model_output.shape[1] == sample.shape[1] * 2 and self.variance_type in ("learned", "learned_range"):
            model_output, raw = model_output.split(sample.shape[1], dim=1)
        if self.config.prediction_type not in PREDICTIONS:
            return super().step(model_output, timestep, sample, generator, return_dict)  # stock's error
        t = self._number(timestep)
        known = t is not None and not torch.compiler.is_compiling()
        if known and self._respaced() and t not in self._host_timesteps():
            raise ValueError(f"timestep: expected one of self.timesteps, got {t}")
        noisy = t is None or t > 0
        if noisy and kind in ("learned", "learned_range") and raw is None:
            raise TypeError(
                f"model_output: expected {2 * sample.shape[1]} channels for variance_type {kind!r}, "
                f"got {model_output.shape[1]}"
            )
        index = index_of(timestep, sample.device)
        noise: dict[str, Any] = self._noise(model_output, generator, index) if noisy else {"noisy": False}
        if noisy and kind == "learned_range":
            noise["raw_variance"] = raw
        elif noisy and kind == "learned":
            z = noise["noise"] if "noise" in noise else normal(model_output, noise["seed"], index)
            noise = {"noise": raw**0.5 * z}  # type: ignore[operator]
        sample, model_output = promoted(sample, model_output)
        x0 = self._x0(model_output, sample, index)
        prev_sample = ops.update(sample, x0, self._steps(sample.device), index, **noise)
        if not return_dict:
            return (prev_sample, x0)
        return DDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)

    def _respaced(self) -> bool:
        return bool(self.custom_timesteps or self.num_inference_steps)

    def _steps(self, device: torch.device) -> Tensor:
        """Rows by timestep; NaN at those that are not in self.timesteps."""
        respaced = self._respaced()
        kind, form = self.config.variance_type, self.variance_type

        def build() -> Tensor:
            alpha_bars = self.alphas_cumprod
            if respaced:
                t = self.timesteps.to(alpha_bars.device)
                previous = torch.cat((t[1:], t.new_full((1,), -1)))
            else:
                t = torch.arange(len(alpha_bars), device=alpha_bars.device)
                previous = t - 1
            # From here on the operations of the stock step and _get_variance, in their order.
            alpha_bar = alpha_bars[t]
            one = self.one.to(alpha_bars)
            alpha_bar_prev = torch.where(previous >= 0, alpha_bars[previous.clamp(min=0)], one)
            beta_bar, beta_bar_prev = 1 - alpha_bar, 1 - alpha_bar_prev
            alpha = alpha_bar / alpha_bar_prev
            beta = 1 - alpha
            c = alpha_bar_prev**0.5 * beta / beta_bar
            d = alpha**0.5 * beta_bar_prev / beta_bar
            small = torch.clamp((1 - alpha_bar_prev) / (1 - alpha_bar) * beta, min=1e-20)
            last = t == 0
            if kind == "learned_range":  # between the logarithms f and h
                f, h = (torch.where(last, LOG_ZERO, 0.5 * v.log()) for v in (small, beta))
            else:
                h = torch.zeros_like(beta)
                if kind == "learned":
                    f = torch.ones_like(beta)
                elif kind == "fixed_small_log":
                    f = torch.exp(0.5 * torch.log(small))
                else:
                    f = beta if kind in ("fixed_large", "fixed_large_log") else small
                if form != "fixed_small_log" and kind != "learned":
                    f = f**0.5
                f = torch.where(last, 0.0, f)
            rows = rows_of(t, b=1.0, c=c, d=d, f=f, h=h)
            if respaced:
                # Where a timestep occurs twice, stock goes by the first.
                table = rows.new_full((len(alpha_bars), 9), torch.nan)
                rows = table.index_put((t.flip(0),), rows.flip(0))
            return rows.to(device)

        sources = (self.alphas_cumprod, self.timesteps, self.one)
        return self._tables.get("steps", build, sources, device, respaced, kind, form)


class DDIMScheduler(_Discrete, diffusers.DDIMScheduler):
    """diffusers.DDIMScheduler (Song et al. 2021, arXiv:2010.02502) on the fused operations; see the module."""

    __init__ = with_fused_noise(diffusers.DDIMScheduler)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, ...]:
        """One step: x_0, then sqrt(alpha_bar_s) x_0 + sqrt(1 - alpha_bar_s - std^2) eps + std z (eq. 12, 16)."""
        prediction = self.config.prediction_type
        both = eta > 0 and variance_noise is not None and generator is not None
        if self.num_inference_steps is None or prediction not in PREDICTIONS or both:
            return super().step(  # stock's error
                model_output, timestep, sample, eta, use_clipped_model_output, generator, variance_noise, return_dict
            )
        index = index_of(timestep, sample.device)
        noise: dict[str, Any] = {"noisy": False}
        if eta > 0 and variance_noise is None:
            noise = self._noise(model_output, generator, index)
        elif eta > 0:
            noise = {"noise": variance_noise.expand(sample.shape)}  # type: ignore[union-attr]
        sample, model_output = promoted(sample, model_output)
        x0 = self._x0(model_output, sample, index)
        if use_clipped_model_output or prediction == "sample":
            clean = x0 if use_clipped_model_output else model_output
            eps = self._solved("eps of x0", lambda a, s: (1.0, -a, s), sample, clean, index)
        elif prediction == "v_prediction":
            eps = self._solved("eps of v", lambda a, s: (s, a, 1.0), sample, model_output, index)
        else:
            eps = model_output
        prev_sample = ops.update(eps, x0, self._steps(sample.device, float(eta)), index, **noise)
        if not return_dict:
            return (prev_sample, x0)
        return DDIMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)

    def _steps(self, device: torch.device, eta: float) -> Tensor:
        """Rows by timestep, of x = eps and pred = x_0."""
        stride = self.config.num_train_timesteps // self.num_inference_steps

        def build() -> Tensor:
            alpha_bar = self.alphas_cumprod
            previous = torch.arange(len(alpha_bar), device=alpha_bar.device) - stride
            final = self.final_alpha_cumprod.to(alpha_bar)
            alpha_bar_prev = torch.where(previous >= 0, alpha_bar[previous.clamp(min=0)], final)
            beta_bar, beta_bar_prev = 1 - alpha_bar, 1 - alpha_bar_prev
            variance = (beta_bar_prev / beta_bar) * (1 - alpha_bar / alpha_bar_prev)
            std = eta * variance**0.5
            rows = rows_of(alpha_bar, b=1.0, c=alpha_bar_prev**0.5, d=(1 - alpha_bar_prev - std**2) ** 0.5, f=std)
            return rows.to(device)

        return self._tables.get("steps", build, (self.alphas_cumprod, self.final_alpha_cumprod), device, stride, eta)


class DPMSolverMultistepScheduler(FusedScheduler, diffusers.DPMSolverMultistepScheduler):
    """diffusers.DPMSolverMultistepScheduler on the fused operations; see the module.

    Fused is DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2): algorithm_type "dpmsolver++",
    solver_order 2, solver_type "midpoint", the defaults. Anything else is the stock step.
    """

    lower_order_nums: int
    __init__ = with_fused_noise(diffusers.DPMSolverMultistepScheduler)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """One step: x_0, then d x_t + c x_0 + g (x_0 of the step before)."""
        config = self.config
        if (
            self.num_inference_steps is None
            or (config.algorithm_type, config.solver_order, config.solver_type) != ("dpmsolver++", 2, "midpoint")
            or config.prediction_type not in (*PREDICTIONS, "flow_prediction")
        ):
            return super().step(model_output, timestep, sample, generator, variance_noise, return_dict)
        if self.step_index is None:
            self._init_step_index(timestep)
        i, n = self.step_index, len(self.timesteps)
        if i >= n:
            return super().step(model_output, timestep, sample, generator, variance_noise, return_dict)  # stock's error
        last = i == n - 1 and (
            config.euler_at_final or (config.lower_order_final and n < 15) or config.final_sigmas_type == "zero"
        )
        second = self.lower_order_nums > 0 and not last
        if config.prediction_type == "epsilon" and config.variance_type in ("learned", "learned_range"):
            model_output = model_output[:, :3]
        sample, model_output = promoted(sample, model_output)
        x0_rows, rows = self._tables.get(
            "steps", functools.partial(self._steps, sample.device), (self.sigmas,),
            sample.device, config.prediction_type, config.use_flow_sigmas,
        )  # fmt: skip
        x0 = model_output
        if config.prediction_type != "sample":
            x0 = ops.update(sample, model_output, x0_rows, i, noisy=False)
        if config.thresholding:
            x0 = self._threshold_sample(x0)
        before = self.model_outputs[-1]
        self.model_outputs[0], self.model_outputs[1] = before, x0
        history = {"noise": before} if second else {"noisy": False}  # the third operand of the row
        prev_sample = ops.update(sample, x0, rows, 2 * i + second, **history)
        self.lower_order_nums = min(self.lower_order_nums + 1, 2)
        self._step_index += 1
        if not return_dict:
            return (prev_sample,)
        return SchedulerOutput(prev_sample=prev_sample)

    def _steps(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows (n, 9) of x_0 and (2 n, 9) of the steps, of first and second order in turn."""
        alphas, sigmas = self._sigma_to_alpha_sigma_t(self.sigmas)
        if self.config.prediction_type == "flow_prediction":
            x0 = rows_of(alphas, a=1.0, b=-self.sigmas, c=1.0)
        elif self.config.prediction_type == "v_prediction":
            x0 = rows_of(alphas, a=alphas, b=-sigmas, c=1.0)
        else:
            x0 = rows_of(alphas, a=1.0, b=-sigmas, c=1 / alphas)
        lambdas = torch.log(alphas) - torch.log(sigmas)
        h = lambdas[1:] - lambdas[:-1]
        h_last = h.roll(1)  # of row 0, which is never of second order, anything
        d = sigmas[1:] / sigmas[:-1]
        c = -(alphas[1:] * (torch.exp(-h) - 1.0))
        w = 0.5 * c * (1.0 / (h_last / h))
        first, second = rows_of(h, b=1.0, c=c, d=d), rows_of(h, b=1.0, c=c + w, d=d, f=-w)
        return x0.to(device), torch.stack((first, second), 1).flatten(0, 1).to(device)

    def _init_step_index(self, timestep: int | Tensor) -> None:
        t = self._number(timestep) if self.begin_index is None else None
        if t is None:
            super()._init_step_index(timestep)
            return
        found = [i for i, s in enumerate(self._host_timesteps()) if s == t]
        # As index_for_timestep: the second of several, and the last step if there is none.
        self._step_index = found[min(len(found), 2) - 1] if found else len(self.timesteps) - 1

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x_0 + sigma noise at the timesteps' places in self.timesteps, or at the current step of a pipeline."""

        def build() -> Tensor:
            levels = self._sigma_to_alpha_sigma_t(self.sigmas.to(dtype))
            return torch.stack(levels, 1).to(device)

        device, dtype = original_samples.device, table_dtype(original_samples)
        table = self._tables.get("levels", build, (self.sigmas,), device, dtype, self.config.use_flow_sigmas)
        if self.begin_index is None:
            # As index_for_timestep: the second of several, and the last step if there is none.
            hits = self.timesteps.to(device) == timesteps.to(device).reshape(-1, 1)
            count = hits.sum(1, keepdim=True)
            place = (hits & (hits.cumsum(1) == count.clamp(max=2))).int().argmax(1)
            index = torch.where(count[:, 0] > 0, place, len(self.timesteps) - 1)
        else:
            index = index_of(self.begin_index if self.step_index is None else self.step_index, device)
        return noising(original_samples, noise, index, table)


class ScoreSdeVeScheduler(FusedScheduler, diffusers.ScoreSdeVeScheduler):
    """diffusers.ScoreSdeVeScheduler (Song et al. 2021, arXiv:2011.13456) on the fused operations; see the module.

    step_correct is the stock one: its step size is found on the device already.
    """

    __init__ = with_fused_noise(diffusers.ScoreSdeVeScheduler)

    def step_pred(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SdeVeOutput | tuple[Tensor, ...]:
        """The predictor: x + g^2 score and that + g z, g^2 = sigma_i^2 - sigma_{i-1}^2 (eq. 6, 47)."""
        if self.timesteps is None:
            return super().step_pred(model_output, timestep, sample, generator, return_dict)  # stock's error

        def build() -> Tensor:
            sigma = self.discrete_sigmas
            before = torch.cat((torch.zeros_like(sigma[:1]), sigma[:-1]))
            g = (sigma**2 - before**2) ** 0.5
            return rows_of(sigma, d=1.0, e=g**2, f=g).to(sample.device)

        rows = self._tables.get("steps", build, (self.discrete_sigmas,), sample.device)
        index = (timestep * torch.ones(len(sample), device=sample.device) * (len(self.timesteps) - 1)).long()
        noise = self._noise(sample, generator, index)
        sample, model_output, _ = promoted(sample, model_output, self.discrete_sigmas)
        prev_sample_mean = ops.update(sample, model_output, rows, index, noisy=False)
        prev_sample = ops.update(sample, model_output, rows, index, **noise)
        if not return_dict:
            return (prev_sample, prev_sample_mean)
        return SdeVeOutput(prev_sample=prev_sample, prev_sample_mean=prev_sample_mean)

    def add_noise(self, original_samples: Tensor, noise: Tensor | None, timesteps: Tensor) -> Tensor:
        """x_0 + sigma_t noise; noise None draws it."""

        def build() -> Tensor:
            sigma = self.discrete_sigmas.to(table_dtype(original_samples))
            return torch.stack((torch.ones_like(sigma), sigma), 1).to(device)

        device = original_samples.device
        noise = torch.randn_like(original_samples) if noise is None else noise
        original_samples, _ = promoted(original_samples, self.discrete_sigmas)
        table = self._tables.get("levels", build, (self.discrete_sigmas,), device, table_dtype(original_samples))
        return noising(original_samples, noise, index_of(timesteps, device), table)
