"""What every formulation shares: the training loss and the one sampling loop, around a network and a process."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import bound, ops
from .objective import OBJECTIVES, conversion_rows
from .ops.checks import as_sample_ids, as_seed, check_choice, check_floating, check_shape, check_state
from .ops.memory import LARGEST
from .process import Grid, Process
from .progress import bar, evaluating, state_dtype
from .steps import D, E, F, Sampler, StepTable, W, ddim_inversion, make_steps
from .unet import UNet

Noise = Tensor | Callable[[int], Tensor] | None
# The prediction, the raw variance, and the prediction without condition, where there are such.
Predicted = tuple[Tensor, Tensor | None, Tensor | None]


class How(NamedTuple):
    """What all steps of a run have in common."""

    clip: float | None
    keep: str
    noisy: bool
    learned: bool = False
    guided: bool = False


class Diffusion(nn.Module, ABC):
    """A network that denoises along a process: the base of DDPM, NCSN and ScoreSDE.

    `process` gives the noise levels and what the model is told of them, `objective` what it predicts, `clip` the range
    of its estimate of x_0 in sampling. Times t are levels 1..T in a chain, and times in (0, 1] of an SDE.
    """

    process: Process
    default_sampler: str

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The constructor's options but the model, JSON-serialisable. ValueError where there is no such form."""

    def __init__(self, model: nn.Module, objective: str, loss: str, clip: float | None) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        check_choice("objective", objective, OBJECTIVES)
        check_choice("loss", loss, self._losses)
        if clip is not None and not clip > 0:
            raise ValueError(f"clip: expected a number above 0 or None, got {clip}")
        self.model = model
        self.objective, self.loss_kind, self.clip = objective, loss, clip
        self._compiled_step: Callable[..., tuple[Tensor, ...]] | None = None

    # --- training ---------------------------------------------------------------------------------------------

    @abstractmethod
    def _times(self, name: str, x: Tensor, t: Any) -> Tensor:
        """(B,) times for the data x, drawn if t is None."""

    @abstractmethod
    def _rows(self, kind: str, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(table, the row of each sample) for the times t (B,) and data of a type; kind "noising", "loss" or
        "denoise"."""

    def forward(
        self,
        x0: Tensor,
        *,
        t: float | Tensor | None = None,
        seed: int | Tensor | None = None,
        noise: Tensor | None = None,
        reduction: str = "mean",
        **model_kwargs: Any,
    ) -> Tensor:
        """The training loss E[w_t rho(model(x_t, t) - y)], float32 (Ho et al. 2020, algorithm 1; denoising score
        matching where the model predicts the score).

        x0: (B, ...). t: times of the samples, a number, () or (B,); drawn if None. seed, noise: of x_t; drawn if None.
        reduction: "mean" gives (), "none" gives (B,).
        """
        t = self._times("x0", x0, t)
        table, row = self._rows("noising", t, x0.dtype)
        if noise is None:
            seed = as_seed(seed, x0.device)
            noise = None if self.objective == "x0" else kept_noise(x0, row, seed)
            seed = seed if noise is None else None
        x_t = ops.noising(x0, row, table, seed=seed, noise=noise)
        pred, raw, _ = self._predict(x_t, self._condition(t), model_kwargs)
        return self._loss(pred, raw, x_t, x0, t, seed, noise, reduction)

    def _loss(
        self, pred: Tensor, raw: Tensor | None, x_t: Tensor, x0: Tensor, t: Tensor,
        seed: int | Tensor | None, noise: Tensor | None, reduction: str, kind: str | None = None,
    ) -> Tensor:  # fmt: skip
        table, row = self._rows("loss", t, pred.dtype)
        return ops.loss(
            pred,
            row,
            table,
            x0=None if self.objective in ("eps", "score") else x0,
            seed=None if self.objective == "x0" else seed,
            noise=None if self.objective == "x0" else noise,
            kind=kind or self.loss_kind,
            reduction=reduction,
        )

    # --- one prediction ---------------------------------------------------------------------------------------

    def predict_x0(
        self, x_t: Tensor, t: float | Tensor, *, out: Tensor | None = None, **model_kwargs: Any
    ) -> Tensor:
        """The model's estimate of x_0 from x_t (Ho et al. 2020, eq. 15), clipped; t: times, a number, () or (B,). out:
        as in fastdiff.ops."""
        t = self._times("x_t", x_t, t)
        pred = self._predict(x_t, self._condition(t), model_kwargs)[0]
        table, row = self._rows("denoise", t, x_t.dtype)
        return ops.update(x_t, pred, table, row, clip=self.clip, noisy=False, out=out)

    def predict(
        self, x_t: Tensor, t: float | Tensor, wanted: str, *, out: Tensor | None = None, **model_kwargs: Any
    ) -> Tensor:
        """What the model says at x_t as "eps", "x0", "v" or "score", whichever it was trained on, unclipped:
        eps = -sigma score = (x_t - alpha x_0) / sigma, v = alpha eps - sigma x_0 (see fastdiff.objective).

        t: times, a number, () or (B,). out: as in fastdiff.ops. ValueError for an unknown name.
        """
        check_choice("wanted", wanted, OBJECTIVES)
        t = self._times("x_t", x_t, t)
        pred = self._predict(x_t, self._condition(t), model_kwargs)[0]
        u, v = conversion_rows(self.process.at(t.double()), self.objective, wanted)
        rows = u.new_zeros(len(t), 9)
        rows[:, D], rows[:, E] = u, v
        row = torch.arange(len(x_t), device=x_t.device)
        return ops.update(x_t, pred, rows.to(state_dtype(x_t.dtype)), row, noisy=False, out=out)

    # --- sampling ---------------------------------------------------------------------------------------------

    def sample(
        self,
        shape: int | tuple[int, ...],
        *,
        steps: int | Iterable[float] | Grid | None = None,
        sampler: str | Sampler | None = None,
        eta: float = 0.0,
        seed: int | Tensor | None = None,
        sample_ids: Tensor | Iterable[int] | None = None,
        x_T: Tensor | None = None,
        noise: Noise = None,
        guidance: float | None = None,
        uncond: dict[str, Any] | None = None,
        progress: bool = False,
        callback: Callable[[int, float, Tensor], None] | None = None,
        return_trajectory: bool = False,
        out: Tensor | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """Samples, (B, ...) float32 (float64 for a float64 model), drawn without gradients and in eval mode.

        shape: the number of samples, if model.sample_shape tells the rest, or (B, ...).
        steps: how many; in a chain all T if None, else the levels round(linspace(0, T, steps + 1)); for an SDE 1000
            equal strides if None. Or the decreasing levels or times to visit, or a grid of `process`.
        sampler: a name of fastdiff.steps.SAMPLERS, which says what each does; "ode", the probability-flow ODE by an
            adaptive solver (extra [ode]; steps is then left out); or one of those functions with options, as in
            functools.partial(steps.heun, noise_scale=1.003). eta: the noise of "ddim", 0 to 1.
        seed: an int or int64 tensor; drawn from PyTorch's default generator if None. sample_ids: (B,), the number of
            each sample in the seed's noise, 0..B-1 if None: sample i of a seed is the same in whatever batch.
        x_T: (B, ...), the start, in place of a draw from the prior. noise: (steps, B, ...), or a function from the
            step's number to (B, ...), in place of generated noise.
        guidance: classifier-free guidance, pred = uncond + guidance (cond - uncond), in one call of the model for both;
            `uncond` holds the model_kwargs of the other branch (Ho & Salimans 2022, arXiv:2207.12598).
        progress: show a bar (needs tqdm). callback(k, level, x): called after step k with the state at that level;
            x is overwritten by the next step. return_trajectory: give (steps + 1, B, ...), from x_T to x_0. out: the
            tensor to draw the samples in, on the model's device, in place of a new one.

        ValueError or TypeError, naming the argument, before anything is drawn.
        """
        shape = self._shape(shape)
        device, dtype = self._device(), self._dtype()
        ids = None if sample_ids is None else as_sample_ids(sample_ids, shape[0], device)
        if x_T is not None:
            check_shape("x_T", x_T, shape)
        if out is not None:
            check_state(out, shape, dtype, device)
            if return_trajectory:
                raise ValueError("out: expected None with return_trajectory, whose result is of another shape")
        if callback is not None and not callable(callback):
            raise TypeError(f"callback: expected a function, got {type(callback).__name__}")
        sampler = self.default_sampler if sampler is None else sampler
        both = _guided(guidance, uncond, model_kwargs, shape[0])
        table = None if sampler == "ode" else self.step_table(sampler, steps, eta)
        if table is None:
            from . import ode

            given = (steps, eta, noise, callback, return_trajectory, guidance)
            if given != (None, 0.0, None, None, False, None):
                raise ValueError(
                    "sampler: 'ode' chooses its own steps and expected no steps, eta, noise, callback, trajectory or "
                    "guidance"
                )
            ode.check(self.process)
        if noise is not None and not callable(noise) and table is not None:
            check_shape("noise", noise, (len(table), *shape))
        seed = as_seed(seed, device)
        if x_T is None:
            x = ops.normal(shape, seed, sample_ids=ids, dtype=dtype, device=device, out=out)
            x.mul_(self._prior_std() if table is None else table.start)
        else:
            x = x_T.detach().to(device, dtype, copy=True) if out is None else out.copy_(x_T.detach())
        if table is None:
            result = ode.sample(self, x, model_kwargs)
            return result if out is None else out.copy_(result)
        if guidance is not None:
            rows = table.rows.clone()
            rows[:, W] = guidance
            table = replace(table, rows=rows)
        how = How(self.clip, table.keep, table.noisy or noise is not None, table.learned, both is not None)
        kwargs = model_kwargs if both is None else both
        return self._run(table, how, x, seed, ids, noise, kwargs, progress, callback, return_trajectory)

    def encode(
        self,
        x0: Tensor,
        *,
        steps: int | Iterable[float] | None = None,
        progress: bool = False,
        out: Tensor | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """The noise x_T from which `sample(x_T=..., sampler="ddim", steps=steps)` comes back to x0, up to an error of
        first order in the steps (Song et al. 2021, arXiv:2010.02502, section 4.3); (B, ...), float32 or float64.

        out: as in `sample`. An SDE takes the data for its state at `process.first`. ValueError for a chain with
        objective "x0" or "score", which do not determine the noise in data, unless `steps` ends at level 1.
        """
        check_floating("x0", x0)
        schedule, levels = self.process.grid(steps)
        levels = levels.flip(0)
        table = ddim_inversion(schedule, levels if self._starts_at_data else levels[levels > 0], self.objective)
        if out is not None:
            check_state(out, tuple(x0.shape), self._dtype(), self._device())
        x = x0.detach().to(self._device(), self._dtype(), copy=True) if out is None else out.copy_(x0.detach())
        how = How(None, table.keep, noisy=False)
        return self._run(table, how, x, None, None, None, model_kwargs, progress, None, False)

    def bits_per_dim(self, x0: Tensor, **options: Any) -> "bound.Bound":
        """The variational bound of images x0, term by term: see fastdiff.bound.evaluate for the options."""
        return bound.evaluate(self, x0, **options)

    def log_likelihood(self, x0: Tensor, **options: Any) -> Tensor:
        """log p(x0) in nats, (B,), by the probability-flow ODE: see fastdiff.ode.log_likelihood for the options."""
        from . import ode

        return ode.log_likelihood(self, x0, **options)

    def compile(self, **options: Any) -> None:
        """Compile the training loss, and model and update of a sampling step together, with torch.compile.

        On a GPU the sampling step runs as a CUDA graph (mode "reduce-overhead"), unless `options` names a mode. On a
        CPU the weights of 2d convolutions become channels_last in place, the layout that Inductor convolves in: it
        would convert all others at every call, which costs a large network at batch 1 more than compiling gains.
        """
        super().compile(**options)
        device = self._device().type
        if device == "cpu":
            for module in self.model.modules():
                if isinstance(module, nn.Conv2d):
                    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        graph = {"mode": "reduce-overhead"} if device == "cuda" and "mode" not in options else {}
        self._compiled_step = torch.compile(self._step, **{**graph, **options})

    def __getstate__(self) -> dict[str, Any]:
        # As with any module, a copy or pickle is not compiled: the compiled step is bound to this model's weights.
        return {**super().__getstate__(), "_compiled_step": None}

    # --- the loop ---------------------------------------------------------------------------------------------

    def _run(
        self,
        table: StepTable,
        how: How,
        x: Tensor,
        seed: Tensor | None,
        ids: Tensor | None,
        noise: Noise,
        model_kwargs: dict[str, Any],
        progress: bool,
        callback: Callable[[int, float, Tensor], None] | None,
        return_trajectory: bool,
    ) -> Tensor:
        """Apply a step table to x, in place."""
        n, device = len(table), x.device
        rows = table.rows.to(device, state_dtype(x.dtype))
        t = self._condition(table.levels[:-1]).to(device)[:, None].expand(n, len(x)).contiguous()
        index = torch.arange(n, device=device)[:, None]
        hist = None if how.keep == "none" else torch.zeros_like(x)
        path = torch.empty(n + 1, *x.shape, dtype=x.dtype, device=device) if return_trajectory else None
        if path is not None:
            path[0] = x
        with evaluating(self), torch.inference_mode():
            # The embeddings depend on the step alone: all of them at once.
            emb = self.model.time_embedding(t[:, 0]) if isinstance(self.model, UNet) and len(x) else None
            for k in bar(n, progress):
                given = noise[k] if isinstance(noise, Tensor) else noise(k) if noise is not None else None
                key = seed if given is None and how.noisy else None
                kwargs = model_kwargs if emb is None else {"emb": emb[k : k + 1], **model_kwargs}
                operands = (index[k], rows, key, ids, given, hist, how)
                if table.kinds[k] == "add":
                    self._update(x, (x, None, None), *operands, inplace=True)
                elif table.kinds[k] == "correct":
                    self._correct(x, t[k], *operands, kwargs)
                elif self._compiled_step is None:
                    self._step(x, t[k], *operands, kwargs, inplace=True)
                else:
                    # The graph's outputs live in its own memory until the next replay.
                    torch.compiler.cudagraph_mark_step_begin()
                    new, *kept = self._compiled_step(x, t[k], *operands, kwargs)
                    x.copy_(new)
                    if hist is not None:
                        hist.copy_(kept[0])
                if path is not None:
                    path[k + 1] = x
                if callback is not None:
                    callback(k, table.levels[k + 1].item(), x)
        return x if path is None else path

    def _step(
        self, x: Tensor, t: Tensor, index: Tensor, rows: Tensor, seed: Tensor | None, ids: Tensor | None,
        noise: Tensor | None, hist: Tensor | None, how: How, model_kwargs: dict[str, Any], inplace: bool = False,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """(x', hist' if there is one): x and hist themselves, overwritten, if `inplace`; a CUDA graph must leave its
        inputs as they are."""
        predicted = self._predict(x, t, model_kwargs, how.guided)
        hist = hist.clone() if hist is not None and not inplace else hist
        out = self._update(x, predicted, index, rows, seed, ids, noise, hist, how, inplace)
        return (out,) if hist is None else (out, hist)

    def _update(
        self, x: Tensor, predicted: Predicted, index: Tensor, rows: Tensor, seed: Tensor | None, ids: Tensor | None,
        noise: Tensor | None, hist: Tensor | None, how: How, inplace: bool = False,
    ) -> Tensor:  # fmt: skip
        pred, raw, uncond = predicted
        return ops.update(
            x, pred, rows, index, seed=seed, sample_ids=ids, noise=noise, uncond=uncond,
            raw_variance=raw if how.learned else None, hist=hist, clip=how.clip, keep=how.keep, noisy=how.noisy,
            inplace=inplace,
        )  # fmt: skip

    def _correct(
        self, x: Tensor, t: Tensor, index: Tensor, rows: Tensor, seed: Tensor | None, ids: Tensor | None,
        noise: Tensor | None, hist: Tensor | None, how: How, model_kwargs: dict[str, Any],
    ) -> None:  # fmt: skip
        """x <- x + e score + sqrt(2 e) z, e = f (|z| / |score|)^2 of each sample, on the device (Song et al. 2021,
        arXiv:2011.13456, algorithms 4, 5)."""
        pred, _, uncond = self._predict(x, t, model_kwargs, how.guided)
        score = ops.update(x, pred, rows, index, uncond=uncond, clip=how.clip, noisy=False)
        if noise is None:
            noise = ops.normal(
                x.shape, seed, sample_ids=ids, step=index, stream=ops.REVERSE, dtype=x.dtype, device=x.device
            )
        sizes = [torch.linalg.vector_norm(v.flatten(1), dim=1, dtype=rows.dtype) for v in (noise, score)]
        e = rows[index, F] * (sizes[0] / sizes[1]).square()
        own = rows.new_zeros(len(x), 9)
        own[:, D], own[:, E], own[:, F] = 1.0, e, (2 * e).sqrt()
        ops.update(x, score, own, torch.arange(len(x), device=x.device), noise=noise, inplace=True)

    def _condition(self, times: Tensor) -> Tensor:
        """What the model is told of the times (N,): indices as they are, numbers typed like the state."""
        told = self.process.condition(times)
        return told.to(self._dtype()) if told.is_floating_point() else told

    def _predict(self, x: Tensor, t: Tensor, model_kwargs: dict[str, Any], guided: bool = False) -> Predicted:
        """(prediction, raw variance or None, unconditional prediction or None) at x for what the model is told of t."""
        dtype = self._parameter_dtype()
        # Under autocast the network casts for itself.
        x = x if dtype is None or torch.is_autocast_enabled(x.device.type) else x.to(dtype)
        if guided:
            x, t = torch.cat((x, x)), torch.cat((t, t))
        out = self.model(x, t, **model_kwargs)
        pred = out if isinstance(out, Tensor) else getattr(out, "sample", None)
        if not isinstance(pred, Tensor):
            raise TypeError(f"model: expected a tensor or an object with a tensor `sample`, got {type(out).__name__}")
        expected = (x.shape[0], 2 * x.shape[1], *x.shape[2:]) if self._learns_variance else tuple(x.shape)
        if pred.shape != expected:
            raise ValueError(f"model: expected an output of shape {expected}, got {tuple(pred.shape)}")
        pred, raw = pred.chunk(2, 1) if self._learns_variance else (pred, None)
        if not guided:
            return pred, raw, None
        (pred, other), raw = pred.chunk(2), None if raw is None else raw.chunk(2)[0]
        return pred, raw, other

    # --- what the formulations set ----------------------------------------------------------------------------

    _losses: tuple[str, ...] = ops.LOSSES
    variance = "posterior"
    _learns_variance = False
    _starts_at_data = False

    def step_table(self, sampler: str | Sampler, steps: Any = None, eta: float = 0.0) -> StepTable:
        """The table of numbers that `sample` applies with these arguments; ValueError as there."""
        if sampler == "ddim":
            return make_steps(self.process, sampler, steps, self.objective, self.clip, eta=eta)
        if eta != 0.0:
            raise ValueError(f"eta: expected 0 with sampler {sampler!r}, got {eta}")
        return make_steps(self.process, sampler, steps, self.objective, self.clip)

    def _prior_std(self) -> float:
        """Of the state at `process.last`."""
        return self.process.at(torch.tensor([self.process.last], dtype=torch.float64, device="cpu")).prior_std()

    # --- arguments --------------------------------------------------------------------------------------------

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

    def _device(self) -> torch.device:
        tensors = (*self.model.parameters(), *self.buffers())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    def _parameter_dtype(self) -> torch.dtype | None:
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), None)

    def _dtype(self) -> torch.dtype:
        return state_dtype(self._parameter_dtype() or torch.float32)


def kept_noise(x0: Tensor, index: Tensor, seed: Tensor) -> Tensor | None:
    """The noise of ops.noising(x0, index, seed=seed), where to keep it for the loss costs less than to draw it again:
    on a CPU, while its memory is recycled (see _pages). Else None."""
    if not x0.is_cpu or 4 * x0.numel() > LARGEST:
        return None
    dtype = state_dtype(x0.dtype)
    return ops.normal(x0.shape, seed, step=index, stream=ops.FORWARD, dtype=dtype, device=x0.device)


def _guided(
    guidance: float | None, uncond: dict[str, Any] | None, cond: dict[str, Any], batch: int
) -> dict[str, Any] | None:
    """The model's keyword arguments for both branches, stacked along the batch; None without guidance."""
    if guidance is None:
        if uncond is not None:
            raise ValueError("uncond: expected None without guidance, got the arguments of a branch")
        return None
    if isinstance(guidance, bool) or not isinstance(guidance, int | float) or not math.isfinite(guidance):
        raise ValueError(f"guidance: expected a finite number, got {guidance!r}")
    if not isinstance(uncond, dict) or uncond.keys() != cond.keys() or not cond:
        given = sorted(uncond) if isinstance(uncond, dict) else uncond
        raise ValueError(f"uncond: expected a dict of the model's arguments {sorted(cond)}, got {given}")
    both = {}
    for name, one in cond.items():
        other = uncond[name]
        if isinstance(one, Tensor) and isinstance(other, Tensor) and one.ndim and one.shape[0] == batch:
            if one.shape != other.shape:
                raise ValueError(f"uncond: expected {name} of shape {tuple(one.shape)}, got {tuple(other.shape)}")
            both[name] = torch.cat((one, other.to(one)))
        elif one is other or (not isinstance(one, Tensor) and one == other):
            both[name] = one
        else:
            raise ValueError(f"uncond: expected {name} to be tensors of {batch} samples, or the same for both branches")
    return both
