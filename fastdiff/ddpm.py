"""DDPM: denoising diffusion over the levels of a chain (Ho et al. 2020, arXiv:2006.11239)."""

import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from . import bound, ops, sampling, steps
from .arguments import check_loss, merged, named, refuse_unnamed
from .chain import ChainDiffusion
from .denoiser import Prediction
from .estimates import with_own_estimates
from .forward_noise import Noised
from .importance import LossSecondMoment
from .interop import pretrained
from .interpolation import along_the_circle, mixing_weight
from .objective import Weighting
from .ops.checks import as_seed, check_choice, check_out, noise_source
from .process import Chain, Grid
from .reference import work_dtype
from .sampling import Run, StepOptions, Steps
from .schedule import NoiseSchedule, make_schedule
from .steps import Sampler, StepTable, ancestral, make_steps
from .support import run_file, transforms
from .support.scalars import integer
from .support.sharded import as_forward
from .unet import UNet

# With more alpha_bar at the last level, the prior is visibly not where the chain ends.
MAX_REMAINING_SIGNAL = 1e-3
# The weight of the bound in the hybrid loss (Nichol & Dhariwal 2021, section 3.1).
HYBRID_WEIGHT = 1e-3


class DDPM(ChainDiffusion):
    """A denoising diffusion model around a network (Ho et al. 2020, arXiv:2006.11239).

    Args:
        model: called as model(x_t, t, **model_kwargs) with x_t (B, ...) and t (B,) int64 in 0..T-1; returns the
            prediction, shaped like x_t, as a tensor or as the attribute `sample` of an object.
        schedule: a name of fastdiff.schedule.SCHEDULES, a NoiseSchedule, or betas (T,).
        timesteps: T, the number of noise levels; level 0 is data and the chain runs over t = 1..T.
        objective: what the model predicts: "eps", "x0", "v" = alpha eps - sigma x_0, or another of
            fastdiff.objective.OBJECTIVES.
        weighting: "simple" (1; sigma^2 for score), "min_snr" (Hang et al. 2023) or "vlb" (the bound's own weights);
            or a function of the levels, as fastdiff.objective.min_snr is.
        loss: "mse", "l1" or "huber" (with delta 1).
            "hybrid" is "mse" and 1e-3 of the variational bound, whose gradient is by the variance alone. "vlb" is the
            bound alone, in bits per dimension (Nichol & Dhariwal 2021, arXiv:2102.09672, section 3.1).
        variance: of the ancestral step: "posterior" (beta~), "beta", or "learned", between the two: the model then
            returns twice the channels; the second half is r in exp((r + 1)/2 log beta + (1 - r)/2 log beta~).
        importance: draw the levels in proportion to the root mean square of their last losses, which makes "vlb" less
            noisy (section 3.3 there).
        clip: the sampler keeps its estimate of x_0 in [-clip, clip]; None leaves it free.

    Data is expected around [-1, 1]. Warns if alpha_bar_T > 1e-3: samples start from N(0, I), and the chain ends
    elsewhere. A model may do before the sampling loop what depends on time alone, see fastdiff.sampling.

    Raises: ValueError for an unknown name, and for objective "eps" or "score" with alpha_bar_T = 0, where they do not
        determine x_0.

    `schedule`, `objective`, `weighting`, `variance`, `clip`, `process` and `loss_kind` (the loss) may be set later; all
    else follows.

    >>> blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    >>> ddpm = DDPM(UNet(sample_size=32, block_out_channels=(32, 64), layers_per_block=1, **blocks))
    >>> images = torch.rand(8, 3, 32, 32) * 2 - 1
    >>> ddpm(images).backward()
    >>> ddpm.sample(16, steps=50, sampler="ddim")
    """

    default_sampler = "ddpm"
    losses = (*ops.LOSSES, "hybrid", "vlb")

    def __init__(
        self,
        model: nn.Module,
        schedule: str | NoiseSchedule | Tensor = "linear",
        timesteps: int = 1000,
        objective: str = "eps",
        loss: str = "mse",
        weighting: str | Weighting = "simple",
        variance: str = "posterior",
        clip: float | None = 1.0,
        importance: bool = False,
    ) -> None:
        check_choice("variance", variance, steps.VARIANCES)
        with _disable_current_modes():  # the levels have values, also where fake weights have none
            made = make_schedule(schedule, timesteps)
            super().__init__(model, Chain(made), objective, loss, weighting, clip)
            self._named = (schedule, made) if isinstance(schedule, str) else None
            self.importance = LossSecondMoment(self.timesteps) if importance else None
            self.variance = variance  # all options are there: checks them together
            remaining = made.alpha_bar[-1].item()
        if made.vp and remaining > MAX_REMAINING_SIGNAL:
            warnings.warn(
                f"schedule: alpha_bar_T = {remaining:.3g} of the signal is left at the last level, where sampling "
                "starts from pure noise; more timesteps or larger betas bring it near 0",
                stacklevel=2,
            )

    def apply_options(self) -> None:
        super().apply_options()
        if self.loss_kind == "hybrid" and not self.learns_variance:
            raise ValueError(f"variance: expected 'learned' with loss 'hybrid', got {self.variance!r}")
        if self.learns_variance and self.loss_kind in ops.LOSSES:
            raise ValueError(
                f"loss: expected 'hybrid' or 'vlb', which train a learned variance, got {self.loss_kind!r}"
            )
        if self.importance is not None and len(self.importance.seen) != self.timesteps:
            self.importance = LossSecondMoment(self.timesteps)

    @property
    def schedule_name(self) -> str | None:
        """The schedule's name, a key of fastdiff.schedule.SCHEDULES; None if its values were given."""
        return self._named[0] if self._named is not None and self._named[1] is self.schedule else None

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, torch_dtype: torch.dtype | None = None, variant: str | None = None
    ) -> "DDPM":
        """The DDPM of a DDPMPipeline's directory of diffusers, in eval mode: its UNet and its scheduler's numbers.

        Its ancestral sampler over all levels is DDPMScheduler's. A learned variance is trained by the hybrid loss.

        Args:
            folder: the directory, or the folder of a run of `fastdiff train` or its model.safetensors. A run gives its
                averaged weights.
            torch_dtype, variant: as in UNet.from_pretrained; a run has no variants.

        Raises: FileNotFoundError if a file is missing. ValueError, naming the file, for what UNet or DDPM lacks.
        """
        pretrained.check_torch_dtype(torch_dtype)
        if run := run_file.find(folder):
            if variant is not None:
                raise ValueError(f"variant: expected None for a run of `fastdiff train`, got {variant!r}")
            made = super().from_pretrained(run)
            return made if torch_dtype is None else made.to(torch_dtype)
        arguments = pretrained.read_ddpm(folder, variant)
        unet = UNet.from_pretrained(folder, torch_dtype=torch_dtype, variant=variant)
        with arguments.blamed():
            return cls(unet, **arguments).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a directory that DDPMPipeline.from_pretrained of diffusers reads, with weights as safetensors.

        Raises: ValueError, before anything is written, if the model is no UNet, diffusers lacks the objective,
            or the schedule does not keep the variance.
        """
        if not isinstance(self.model, UNet):
            raise ValueError(f"model: expected a UNet, got {type(self.model).__name__}")
        pretrained.write_ddpm(
            folder,
            self.model.config,
            self.model.state_dict(),
            self.schedule,
            schedule_name=self.schedule_name,
            objective=self.objective,
            variance=self.variance,
            clip=self.clip,
        )

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's options but the model, JSON-serialisable. ValueError if the schedule has no name."""
        if self.schedule_name is None:
            raise ValueError("config: expected a schedule given by name, got one given by its values")
        return {
            "schedule": self.schedule_name,
            "timesteps": self.timesteps,
            "objective": self.objective,
            "loss": self.loss_kind,
            "weighting": named("weighting", self.weighting),
            "variance": self.variance,
            "clip": self.clip,
            "importance": self.importance is not None,
        }

    def forward(
        self, x0: Tensor, *unnamed: Any, t: float | Tensor | None = None, reduction: str = "mean", **options: Any
    ) -> Tensor:
        """The training loss E[w_t rho(model(x_t, t) - y)], float32: of the levels that are drawn, or of t.

        With `importance`, the levels that training draws have weights 1 / (T p_t), and their losses are noted for the
        next draws.

        Args:
            x0: (B, ...), data, scaled to about [-1, 1]: images in [0, 1] as 2 x - 1. Nothing looks at the values.
            unnamed: nothing; all but x0 is given by name.
            t: levels in 1..T of the samples, an int, () or (B,); drawn if None.
            reduction: "mean" gives (), "none" gives (B,).
            options: seed, sample_ids, noise and mask as in FlowMatching.forward, and the model's further arguments.

        Raises: ValueError or TypeError, naming the argument.
        Reference: Ho et al. 2020, algorithm 1.
        """
        if unnamed:
            refuse_unnamed(unnamed)
        if options.get("mask") is not None and self.loss_kind not in ops.LOSSES:
            raise ValueError(f"mask: expected None with loss {self.loss_kind!r}, whose bound has no mask")
        if t is not None or self.importance is None or not self.training:
            return super().forward(x0, t=t, reduction=reduction, **options)
        given = {name: options.get(name) for name in ("seed", "sample_ids", "noise", "mask")}
        options["seed"], options["sample_ids"] = check_loss(x0, **given, reduction=reduction)
        self.importance.to_device(x0.device)
        t, weight = self.importance.sample(len(x0))
        losses = super().forward(x0, t=t, reduction="none", **options)
        self.importance.update(t, losses.detach())
        return (weight * losses).mean() if reduction == "mean" else weight * losses

    def _loss(
        self, predicted: Prediction, noised: Noised, x0: Tensor, t: Tensor, mask: Tensor | None, reduction: str,
        kind: str | None = None,
    ) -> Tensor:  # fmt: skip
        if self.loss_kind in ops.LOSSES:
            return super()._loss(predicted, noised, x0, t, mask, reduction)
        hybrid = self.loss_kind == "hybrid"
        pred, raw, _ = predicted
        rows = self._table("bound", pred.dtype, t.device)
        nats = ops.vlb(pred, noised.x_t, x0, t, rows, raw_variance=raw, detach_mean=hybrid, reduction=reduction)
        bits = nats * (self.timesteps / math.log(2))
        if not hybrid:
            return bits
        simple = super()._loss(predicted, noised, x0, t, None, reduction, "mse")
        return simple + HYBRID_WEIGHT * bits

    def p_sample(
        self,
        x_t: Tensor,
        t: int | Tensor,
        *,
        seed: int | Tensor | None = None,
        noise: Tensor | None = None,
        out: Tensor | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """x_{t-1} ~ p(x_{t-1} | x_t), one step of the ancestral sampler.

        Args:
            x_t: (B, ...), the state.
            t: its levels in 1..T, an int, () or (B,).
            seed, noise, out: as in fastdiff.ops.
            model_kwargs: the model's further arguments.

        Returns: (B, ...), typed like x_t.
        Raises: ValueError or TypeError, naming the argument.
        Reference: Ho et al. 2020, algorithm 2, line 4.
        """
        t = self.checked_times("x_t", x_t, t)
        rows = self._table("p_sample", x_t.dtype, x_t.device)
        if noise is not None or seed is not None:
            seed = noise_source(x_t, seed, noise)
        if out is not None:
            check_out(out, x_t, x_t)
        pred, raw, _ = as_forward(self, self.call_model)(x_t, self.condition(t), merged(model_kwargs))
        return ops.update(
            x_t, pred, rows, self.timesteps - t, seed=seed, noise=noise, raw_variance=raw, clip=self.clip, out=out
        )

    def interpolate(
        self,
        x0: Tensor,
        x1: Tensor,
        weight: float | Tensor = 0.5,
        *,
        t: int | None = None,
        sampler: str = "ddpm",
        steps: int | Iterable[float] | Grid | None = None,
        seed: int | Tensor | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """Samples between two images.

        Args:
            x0, x1: (B, ...), the images.
            weight: of x1, in [0, 1], a number or (B,).
            sampler: "ddpm" noises both to level t, mixes them, and denoises by the ancestral sampler. The mixed noise
                is rescaled to unit variance, so that the mixture is as noisy as level t. "ddim" encodes both to the
                noise they come from, mixes along the great circle between them (slerp), and decodes; it draws nothing.
            t: the level of "ddpm", T/2 if None.
            steps: of "ddim", as in `sample`.
            seed: of "ddpm"; drawn if None.
            model_kwargs: the model's further arguments.

        Raises: ValueError or TypeError, naming the argument.
        Reference: Ho et al. 2020, section 4.4; Song et al. 2021, arXiv:2010.02502, section 5.3.
        """
        check_choice("sampler", sampler, ("ddpm", "ddim"))
        if sampler == "ddim":
            if t is not None or seed is not None:
                raise ValueError("t, seed: expected None with sampler 'ddim', which goes all the way and draws nothing")
            return along_the_circle(self, x0, x1, weight, steps=steps, **model_kwargs)
        mix = mixing_weight(x0, x1, weight)
        if steps is not None:
            raise ValueError("steps: expected None with sampler 'ddpm', which takes every step from level t")
        level = max(1, self.timesteps // 2) if t is None else integer(t)
        if level is None or not 1 <= level <= self.timesteps:
            raise ValueError(f"t: expected a level from 1 to {self.timesteps}, got {t!r}")
        seed = as_seed(seed, x0.device)
        first, second = (
            ops.normal(x0.shape, seed, step=k, stream=ops.FORWARD, dtype=work_dtype(x0.dtype), device=x0.device)
            for k in (0, 1)
        )
        mix = mix.to(first.dtype)
        z = torch.lerp(first, second, mix) / (mix**2 + (1 - mix) ** 2).sqrt()
        x = self.q_sample(torch.lerp(x0.to(z.dtype), x1.to(z.dtype), mix), level, noise=z).detach()
        model_kwargs = merged(model_kwargs)
        with transforms.with_values():
            table = with_own_estimates(self.step_table("ddpm", range(level, -1, -1)), self, model_kwargs)
        options = StepOptions.of(table, self.clip)
        run = Run(self, table, x, options, seed, model_kwargs=model_kwargs, compiled=self._compiled_step)
        return as_forward(self, sampling.walk)(Steps(run))

    def _bound_table(self) -> Tensor:
        return bound.vlb_rows(self.schedule, self.objective, self.variance)

    def _p_sample_table(self) -> Tensor:
        return self.step_table("ddpm").rows

    def step_table(self, sampler: str | Sampler, steps: Any = None, eta: float = 0.0) -> StepTable:
        """The table of numbers that `sample` applies, a row a step: see fastdiff.rows for the columns.

        Args:
            sampler, steps, eta: as in `sample`.

        Raises: ValueError or TypeError, naming the argument.
        """
        if sampler in ("ddpm", ancestral) and eta == 0.0:
            return make_steps(self.process, sampler, steps, self.objective, self.clip, variance=self.variance)
        return super().step_table(sampler, steps, eta)
