"""The DDPM module: the training loss and the one sampling loop."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from . import ops, steps
from ._check import as_index, as_seed, check_floating, check_like
from .objective import OBJECTIVES, WEIGHTINGS, target_rows, weights
from .schedule import NoiseSchedule, make_schedule
from .steps import StepTable
from .unet import UNet

SAMPLERS = ("ddpm", "ddim")
VARIANCES = ("posterior", "beta")


class DDPM(nn.Module):
    """A denoising diffusion model around a network (Ho et al. 2020, arXiv:2006.11239).

    Args:
        model: called as model(x_t, t, **model_kwargs) with x_t (B, ...) and t (B,) int64 in 0..T-1; returns the
            prediction, shaped like x_t, as a tensor or as the attribute `sample` of an object.
        schedule: a name of fastdiff.schedule.SCHEDULES, a NoiseSchedule, or betas (T,).
        timesteps: T, the number of noise levels; level 0 is data and the chain runs over t = 1..T.
        objective: what the model predicts: "eps", "x0", or "v" = alpha eps - sigma x_0.
        loss: "mse", "l1" or "huber" (with delta 1).
        weighting: "simple" (1) or "min_snr" (Hang et al. 2023).
        variance: of the ancestral step: "posterior" (beta~) or "beta".
        clip: the sampler keeps its estimate of x_0 in [-clip, clip]; None leaves it free.

    Data is expected around [-1, 1]. ValueError for an unknown name, and where objective "eps" meets a schedule with
    alpha_bar_T = 0, from which eps cannot determine x_0.

    >>> ddpm = DDPM(UNet(sample_size=32))
    >>> ddpm(images).backward()
    >>> ddpm.sample(16, steps=50, sampler="ddim")
    """

    # float32 tables are kept as int32 bits, so that .half() or .bfloat16() of the module cannot round them.
    _noising_bits: Tensor
    _loss_bits: Tensor
    _denoise_bits: Tensor

    def __init__(
        self,
        model: nn.Module,
        schedule: str | NoiseSchedule | Tensor = "linear",
        timesteps: int = 1000,
        objective: str = "eps",
        loss: str = "mse",
        weighting: str = "simple",
        variance: str = "posterior",
        clip: float | None = 1.0,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("objective", objective, OBJECTIVES),
            ("loss", loss, ops.LOSSES),
            ("weighting", weighting, WEIGHTINGS),
            ("variance", variance, VARIANCES),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
        if clip is not None and not clip > 0:
            raise ValueError(f"clip: expected a number above 0 or None, got {clip}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        self.schedule = make_schedule(schedule, timesteps)
        if objective == "eps":
            steps.check_eps(self.schedule, torch.arange(1, timesteps + 1, device="cpu"))
        self.model = model
        self.schedule_name = schedule if isinstance(schedule, str) else None
        self.timesteps, self.objective, self.loss_kind = timesteps, objective, loss
        self.weighting, self.variance, self.clip = weighting, variance, clip
        self._compiled_step: Callable[..., Tensor] | None = None

        p, q = target_rows(self.schedule, objective)
        w = weights(self.schedule, objective, weighting)
        self._uses_x0, self._uses_noise = bool((p != 0).any()), bool((q != 0).any())
        device = next((p.device for p in model.parameters()), None)
        for name, columns in (
            ("_noising_bits", torch.stack((self.schedule.alpha, self.schedule.sigma), 1)),
            ("_loss_bits", torch.stack((p, q, w), 1)),
            ("_denoise_bits", steps.denoise(self.schedule, objective)),
        ):
            self.register_buffer(name, columns.float().contiguous().view(torch.int32).to(device), persistent=False)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's options but the model, JSON-serialisable. ValueError where the schedule has no name."""
        if self.schedule_name is None:
            raise ValueError("config: expected a schedule given by name, got one given by its values")
        return {
            "schedule": self.schedule_name,
            "timesteps": self.timesteps,
            "objective": self.objective,
            "loss": self.loss_kind,
            "weighting": self.weighting,
            "variance": self.variance,
            "clip": self.clip,
        }

    # --- training ---------------------------------------------------------------------------------------------

    def forward(
        self,
        x0: Tensor,
        *,
        t: int | Tensor | None = None,
        seed: int | Tensor | None = None,
        noise: Tensor | None = None,
        reduction: str = "mean",
        **model_kwargs: Any,
    ) -> Tensor:
        """The training loss E[w_t rho(model(x_t, t - 1) - y)] (Ho et al. 2020, algorithm 1), float32.

        x0: (B, ...). t: levels in 1..T, an int or int64 () or (B,); uniformly drawn if None. seed, noise: of x_t; drawn
        if None. reduction: "mean" gives (), "none" gives (B,).
        """
        t = self._levels("x0", x0, t)
        if noise is None:
            seed = as_seed(seed, x0.device)
        x_t = ops.noising(x0, t, self._table("_noising_bits"), seed=seed, noise=noise)
        pred = self._predict(x_t, t - 1, model_kwargs)
        return ops.loss(
            pred,
            t,
            self._table("_loss_bits"),
            x0=x0 if self._uses_x0 else None,
            seed=seed if self._uses_noise else None,
            noise=noise if self._uses_noise else None,
            kind=self.loss_kind,
            reduction=reduction,
        )

    def q_sample(
        self, x0: Tensor, t: int | Tensor, *, seed: int | Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """x_t = alpha_t x_0 + sigma_t z, z ~ N(0, I) (Ho et al. 2020, eq. 4); t: levels in 0..T, an int, () or (B,)."""
        return ops.noising(x0, t, self._table("_noising_bits"), seed=seed, noise=noise)

    # --- one step ---------------------------------------------------------------------------------------------

    def predict_x0(self, x_t: Tensor, t: int | Tensor, **model_kwargs: Any) -> Tensor:
        """The model's estimate of x_0 from x_t (Ho et al. 2020, eq. 15), clipped; t: levels in 1..T, an int, () or
        (B,)."""
        t = self._levels("x_t", x_t, t)
        pred = self._predict(x_t, t - 1, model_kwargs)
        return ops.update(x_t, pred, self._table("_denoise_bits"), t, clip=self.clip, noisy=False)

    def p_sample(
        self,
        x_t: Tensor,
        t: int | Tensor,
        *,
        seed: int | Tensor | None = None,
        noise: Tensor | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """x_{t-1} ~ p(x_{t-1} | x_t) (Ho et al. 2020, algorithm 2, line 4); t: levels in 1..T, an int, () or (B,)."""
        t = self._levels("x_t", x_t, t)
        table = self._steps("ddpm", None, 0.0)
        pred = self._predict(x_t, t - 1, model_kwargs)
        rows = table.rows.to(x_t.device, _state_dtype(x_t.dtype))
        return ops.update(x_t, pred, rows, self.timesteps - t, seed=seed, noise=noise, clip=self.clip)

    # --- sampling ---------------------------------------------------------------------------------------------

    def sample(
        self,
        shape: int | tuple[int, ...],
        *,
        steps: int | None = None,
        sampler: str = "ddpm",
        eta: float = 0.0,
        seed: int | Tensor | None = None,
        sample_ids: Tensor | Iterable[int] | None = None,
        x_T: Tensor | None = None,
        noise: Tensor | Callable[[int], Tensor] | None = None,
        progress: bool = False,
        callback: Callable[[int, int, Tensor], None] | None = None,
        return_trajectory: bool = False,
        **model_kwargs: Any,
    ) -> Tensor:
        """Samples, (B, ...) float32 (float64 for a float64 model), drawn without gradients and in eval mode.

        shape: the number of samples, if model.sample_shape tells the rest, or (B, ...).
        steps: T if None, else the levels round(linspace(0, T, steps + 1)).
        sampler: "ddpm" (Ho et al. 2020, algorithm 2, respaced where steps < T) or "ddim" with eta (Song et al. 2021).
        seed: an int or int64 tensor; drawn from PyTorch's default generator if None. sample_ids: (B,), the number of
            each sample in the seed's noise, 0..B-1 if None: sample i of a seed is the same in whatever batch.
        x_T: (B, ...), the start, in place of N(0, prior_std^2 I). noise: (steps, B, ...), or a function from the step's
            number to (B, ...), in place of generated noise.
        progress: show a bar (needs tqdm). callback(k, level, x): called after step k with the state at that level;
            x is overwritten by the next step. return_trajectory: give (steps + 1, B, ...), from x_T to x_0.

        ValueError or TypeError, naming the argument, before anything is drawn.
        """
        shape = self._shape(shape)
        table = self._steps(sampler, steps, eta)
        device, dtype = self._device(), self._dtype()
        ids = None if sample_ids is None else _sample_ids(sample_ids, shape[0], device)
        if noise is not None and not callable(noise):
            _check_shape("noise", noise, (len(table), *shape))
        if x_T is not None:
            _check_shape("x_T", x_T, shape)
        if callback is not None and not callable(callback):
            raise TypeError(f"callback: expected a function, got {type(callback).__name__}")
        seed = as_seed(seed, device)
        if x_T is None:
            x = ops.normal(shape, seed, sample_ids=ids, dtype=dtype, device=device)
            x.mul_(self.schedule.prior_std)
        else:
            x = x_T.detach().to(device, dtype, copy=True)
        return self._run(table, x, seed, ids, noise, progress, callback, return_trajectory, model_kwargs)

    def interpolate(
        self,
        x0: Tensor,
        x1: Tensor,
        weight: float | Tensor = 0.5,
        *,
        t: int | None = None,
        seed: int | Tensor | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """Samples between two images: both are noised to level t (T/2 if None), mixed, and denoised by the ancestral
        sampler (Ho et al. 2020, section 4.4).

        x0, x1: (B, ...). weight: of x1, in [0, 1], a number or (B,). The mixed noise is rescaled to unit variance, so
        that the mixture is as noisy as level t.
        """
        check_floating("x0", x0)
        check_like("x1", x1, x0)
        t = max(1, self.timesteps // 2) if t is None else t
        if isinstance(t, bool) or not isinstance(t, int) or not 1 <= t <= self.timesteps:
            raise ValueError(f"t: expected a level from 1 to {self.timesteps}, got {t!r}")
        mix = torch.as_tensor(weight, dtype=torch.float32, device=x0.device).reshape(-1, *[1] * (x0.ndim - 1))
        if len(mix) not in (1, len(x0)) or not bool(((mix >= 0) & (mix <= 1)).all()):
            raise ValueError(f"weight: expected one or {len(x0)} numbers in [0, 1], got {weight}")
        seed = as_seed(seed, x0.device)
        first, second = (
            ops.normal(x0.shape, seed, step=k, stream=ops.FORWARD, dtype=_state_dtype(x0.dtype), device=x0.device)
            for k in (0, 1)
        )
        mix = mix.to(first.dtype)
        z = torch.lerp(first, second, mix) / (mix**2 + (1 - mix) ** 2).sqrt()
        x = self.q_sample(torch.lerp(x0.to(z.dtype), x1.to(z.dtype), mix), t, noise=z).detach()
        table = self._steps("ddpm", None, 0.0)
        tail = StepTable(table.levels[self.timesteps - t :], table.rows[self.timesteps - t :], table.noisy)
        return self._run(tail, x, seed, None, None, False, None, False, model_kwargs)

    def compile(self, **options: Any) -> None:
        """Compile the training loss, and model and update of a sampling step together, with torch.compile.

        On a GPU the sampling step runs as a CUDA graph (mode "reduce-overhead"), unless `options` names a mode.
        """
        super().compile(**options)
        graph = {"mode": "reduce-overhead"} if self._device().type == "cuda" and "mode" not in options else {}
        self._compiled_step = torch.compile(self._step, **{**graph, **options})

    def __getstate__(self) -> dict[str, Any]:
        # As with any module, a copy or pickle is not compiled: the compiled step is bound to this model's weights.
        return {**super().__getstate__(), "_compiled_step": None}

    # --- the loop ---------------------------------------------------------------------------------------------

    def _run(
        self,
        table: StepTable,
        x: Tensor,
        seed: Tensor,
        ids: Tensor | None,
        noise: Tensor | Callable[[int], Tensor] | None,
        progress: bool,
        callback: Callable[[int, int, Tensor], None] | None,
        return_trajectory: bool,
        model_kwargs: dict[str, Any],
    ) -> Tensor:
        """Apply a step table to x, in place."""
        n, device = len(table), x.device
        rows = table.rows.to(device, _state_dtype(x.dtype))
        t = (table.levels[:-1] - 1).to(device)[:, None].expand(n, len(x)).contiguous()
        index = torch.arange(n, device=device)[:, None]
        noisy = table.noisy or noise is not None
        path = torch.empty(n + 1, *x.shape, dtype=x.dtype, device=device) if return_trajectory else None
        if path is not None:
            path[0] = x
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            with torch.inference_mode():
                # The embeddings depend on the step alone: all of them at once.
                emb = self.model.time_embedding(t[:, 0]) if isinstance(self.model, UNet) and len(x) else None
                for k in _bar(n, progress):
                    given = noise[k] if isinstance(noise, Tensor) else noise(k) if noise is not None else None
                    key = seed if given is None and noisy else None
                    kwargs = model_kwargs if emb is None else {"emb": emb[k : k + 1], **model_kwargs}
                    args = (t[k], index[k], rows, key, ids, given, noisy, kwargs)
                    if self._compiled_step is None:
                        self._step(x, *args, inplace=True)
                    else:
                        # The graph's output lives in its own memory until the next replay.
                        torch.compiler.cudagraph_mark_step_begin()
                        x.copy_(self._compiled_step(x, *args))
                    if path is not None:
                        path[k + 1] = x
                    if callback is not None:
                        callback(k, int(table.levels[k + 1]), x)
        finally:
            for module in training:
                module.training = True
        return x if path is None else path

    def _step(
        self,
        x: Tensor,
        t: Tensor,
        index: Tensor,
        rows: Tensor,
        seed: Tensor | None,
        ids: Tensor | None,
        noise: Tensor | None,
        noisy: bool,
        model_kwargs: dict[str, Any],
        inplace: bool = False,
    ) -> Tensor:
        pred = self._predict(x, t, model_kwargs)
        return ops.update(
            x, pred, rows, index, seed=seed, sample_ids=ids, noise=noise, clip=self.clip, noisy=noisy, inplace=inplace
        )

    def _predict(self, x: Tensor, t: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        """The model's output at x for t, the 0-based index that it is trained on."""
        dtype = self._parameter_dtype()
        # Under autocast the network casts for itself.
        x = x if dtype is None or torch.is_autocast_enabled(x.device.type) else x.to(dtype)
        out = self.model(x, t, **model_kwargs)
        pred = out if isinstance(out, Tensor) else getattr(out, "sample", None)
        if not isinstance(pred, Tensor):
            raise TypeError(f"model: expected a tensor or an object with a tensor `sample`, got {type(out).__name__}")
        if pred.shape != x.shape:
            raise ValueError(f"model: expected an output of shape {tuple(x.shape)}, got {tuple(pred.shape)}")
        return pred

    def _steps(self, sampler: str, n: int | None, eta: float) -> StepTable:
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler: expected one of {', '.join(SAMPLERS)}, got {sampler!r}")
        levels = steps.grid(self.timesteps, n)
        if sampler == "ddim":
            return steps.ddim(self.schedule, levels, self.objective, self.clip, eta)
        if eta != 0.0:
            raise ValueError(f"eta: expected 0 with sampler 'ddpm', got {eta}")
        return steps.ancestral(self.schedule, levels, self.objective, self.clip, self.variance)

    def _levels(self, name: str, x: Tensor, t: int | Tensor | None) -> Tensor:
        """(B,) int64 levels in 1..T for the data x."""
        check_floating(name, x)
        if t is None:
            return torch.randint(1, self.timesteps + 1, x.shape[:1], device=x.device)
        levels = as_index("t", t, x)
        if isinstance(t, int):
            wrong = not 1 <= t <= self.timesteps
        else:  # a look at a GPU's tensor would wait for it
            visible = levels.device.type == "cpu" and not torch.compiler.is_compiling()
            wrong = visible and bool(((levels < 1) | (levels > self.timesteps)).any())
        if wrong:
            raise ValueError(f"t: expected levels from 1 to {self.timesteps}, got {t}")
        return levels.expand(len(x))

    def _shape(self, shape: int | tuple[int, ...]) -> tuple[int, ...]:
        if isinstance(shape, bool):
            raise TypeError("shape: expected a number of samples or (B, ...), got a bool")
        if isinstance(shape, int):
            rest = getattr(self.model, "sample_shape", None)
            if rest is None:
                raise ValueError("shape: expected (B, ...), since the model has no sample_shape; got a number alone")
            shape = (shape, *rest)
        sizes = tuple(shape) if isinstance(shape, Iterable) else ()
        if not sizes or any(isinstance(d, bool) or not isinstance(d, int) or d < 0 for d in sizes):
            raise ValueError(f"shape: expected a number of samples or (B, ...), got {shape}")
        return sizes

    def _table(self, name: str) -> Tensor:
        return getattr(self, name).view(torch.float32)

    def _device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), self._loss_bits.device)

    def _parameter_dtype(self) -> torch.dtype | None:
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), None)

    def _dtype(self) -> torch.dtype:
        return _state_dtype(self._parameter_dtype() or torch.float32)


def _check_shape(name: str, given: Any, shape: tuple[int, ...]) -> None:
    check_floating(name, given)
    if given.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(given.shape)}")


def _sample_ids(given: Tensor | Iterable[int], batch: int, device: torch.device) -> Tensor:
    ids = given if isinstance(given, Tensor) else torch.as_tensor(list(given), device="cpu")
    if ids.dtype != torch.int64:
        raise TypeError(f"sample_ids: expected int64, got {ids.dtype}")
    if ids.shape != (batch,):
        raise ValueError(f"sample_ids: expected shape ({batch},), got {tuple(ids.shape)}")
    if ids.device.type == "cpu" and bool(((ids < 0) | (ids >= 2**32)).any()):
        raise ValueError(f"sample_ids: expected values in [0, 2^32), got {ids.tolist()}")
    return ids.to(device)


def _state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _bar(n: int, progress: bool) -> Iterable[int]:
    if not progress:
        return range(n)
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress: needs tqdm; pip install fastdiff[train]") from error
    return tqdm(range(n), desc="sampling", unit="step")
