"""What every formulation shares: the training loss, and sampling along a step table."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import bound, ode, ops, sampling
from .arguments import (
    check_gradients,
    check_labels,
    check_loss,
    check_noise,
    check_out_apart,
    check_sampling,
    merged,
    refuse_unnamed,
    shape_of,
)
from .capture import Captures, is_captured
from .cast import channels_last_convolutions
from .denoiser import Denoiser, Prediction
from .editing import Edit
from .estimates import Callback, wants_estimate, with_estimates, with_own_estimates
from .forward_noise import Noised, kept_noise
from .guidance import Guidance, Rule, beside, stack_branches, with_guidance
from .networks import NETWORKS
from .objective import uses_noise, uses_x0
from .ops.checks import (
    as_device,
    as_sample_ids,
    as_seed,
    check_choice,
    check_floating,
    check_generator,
    check_state,
    seed_of,
)
from .ops.overlap import check_memory
from .process import Grid, Process
from .sampling import Noise, Run, StepOptions, Steps, steps_of
from .steps import Sampler, StepTable, check_learned, ddim_inversion, decreasing, make_steps
from .support import transforms
from .support.run_file import RunFile
from .support.scalars import as_number
from .support.settable import settable
from .support.sharded import as_forward

Made = TypeVar("Made", bound="Diffusion")


class Diffusion(Denoiser, ABC):
    """A Denoiser that trains and samples: the base of all formulations.

    `loss_kind` is the loss between prediction and target, and may be set later. Times t are levels 1..T in a chain, and
    else in (0, process.last].
    """

    default_sampler: str
    losses: tuple[str, ...] = ops.LOSSES
    loss_kind: str = settable("loss_kind")

    def __init__(self, model: nn.Module, process: Process, objective: str, loss: str, clip: float | None) -> None:
        super().__init__(model, process, objective, clip)
        self.loss_kind = loss
        self._compiled_step: Callable[..., tuple[Tensor, ...]] | None = None
        self._captures = Captures()
        Diffusion.apply_options(self)

    def apply_options(self) -> None:
        super().apply_options()
        check_choice("loss", self.loss_kind, self.losses)
        self._captures.kept.clear()

    @classmethod
    def from_pretrained(cls: type[Made], path: str | Path) -> Made:
        """The model of a run of `fastdiff train`, with its averaged weights, in eval mode on the CPU.

        Args:
            path: the run's folder, or its model.safetensors.

        Raises: OSError if it cannot be read; ValueError naming the file if it is the run of another formulation.
        """
        return RunFile.open(path).formulation(cls, NETWORKS)

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The constructor's options but the model, JSON-serialisable. ValueError if there is no such form."""

    @abstractmethod
    def noising_rows(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(table of rows (alpha, sigma), the row of each sample) for the times t (B,) and data of a type."""

    @abstractmethod
    def loss_rows(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(table of rows (p, q, w), the row of each sample) for the times t (B,) and predictions of a type."""

    # --- training ---------------------------------------------------------------------------------------------

    def forward(
        self,
        x0: Tensor,
        *unnamed: Any,
        t: float | Tensor | None = None,
        seed: int | Tensor | None = None,
        sample_ids: Tensor | Iterable[int] | None = None,
        noise: Tensor | None = None,
        mask: Tensor | None = None,
        reduction: str = "mean",
        **model_kwargs: Any,
    ) -> Tensor:
        """The training loss E[w_t rho(model(x_t, t) - y)], float32.

        Args:
            x0: (B, ...), data, scaled to about [-1, 1]: images in [0, 1] as 2 x - 1. Nothing looks at the values.
            unnamed: nothing; all but x0 is given by name.
            t: times of the samples, a number, () or (B,); drawn if None.
            seed, noise: of x_t; drawn if None.
            sample_ids: (B,), the number of each sample in the seed's noise; None draws by its place in the batch. With
                continuous times that is other noise than the numbers 0..B-1 draw.
            mask: (B, ...) or a shape that expands to it, a weight of each element: 0 where data is padded or missing.
                The mean is over all elements, see ops.loss.
            reduction: "mean" gives (), "none" gives (B,).
            model_kwargs: the model's further arguments. Those that are named as one of ours go into a dict,
                model_kwargs={"t": ...}.

        Raises: ValueError or TypeError, naming the argument.
        Reference: Ho et al. 2020, algorithm 1; denoising score matching if the model predicts the score (Song & Ermon
            2019, arXiv:1907.05600, eq. 5).
        """
        if unnamed:
            refuse_unnamed(unnamed)
        model_kwargs = merged(model_kwargs)
        seed, ids = check_loss(x0, seed, sample_ids, noise, mask, reduction)
        check_labels(self.model, model_kwargs)
        t = self.checked_times("x0", x0, t)
        noised = self.noised(x0, t, seed, ids, noise)
        predicted = self.call_model(noised.x_t, self.condition(t), model_kwargs)
        return self._loss(predicted, noised, x0, t, mask, reduction)

    def noised(self, x0: Tensor, t: Tensor, seed: Tensor | None, ids: Tensor | None, noise: Tensor | None) -> Noised:
        """The states at times t (B,) that the loss asks about, of arguments that check_loss gives."""
        table, row = self.noising_rows(t, x0.dtype)
        if noise is None:
            seed = drawn = as_seed(seed, x0.device)
            placed = ids is not None and not self._rows_are_levels  # a row is a place in the batch
            if placed or uses_noise(self.objective):
                noise = kept_noise(x0, 0 if placed else row, drawn, ids, always=placed)
            seed = seed if noise is None else None
        ids = ids if noise is None else None
        return Noised(ops.noising(x0, row, table, seed=seed, sample_ids=ids, noise=noise), seed, ids, noise)

    def _loss(
        self, predicted: Prediction, noised: Noised, x0: Tensor, t: Tensor, mask: Tensor | None, reduction: str,
        kind: str | None = None,
    ) -> Tensor:  # fmt: skip
        table, row = self.loss_rows(t, predicted.pred.dtype)
        noisy = uses_noise(self.objective)
        return ops.loss(
            predicted.pred,
            row,
            table,
            x0=x0 if uses_x0(self.objective) else None,
            seed=noised.seed if noisy else None,
            sample_ids=noised.sample_ids if noisy else None,
            noise=noised.noise if noisy else None,
            mask=mask,
            kind=kind or self.loss_kind,
            reduction=reduction,
        )

    # --- sampling ---------------------------------------------------------------------------------------------

    def sample(
        self,
        shape: int | tuple[int, ...],
        *,
        steps: int | Iterable[float] | Grid | None = None,
        sampler: str | Sampler | None = None,
        eta: float = 0.0,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
        sample_ids: Tensor | Iterable[int] | None = None,
        x_T: Tensor | None = None,
        x_init: Tensor | None = None,
        strength: float = 1.0,
        known: Tensor | None = None,
        resample: int = 1,
        stop_at: float | None = None,
        grad_steps: int = 0,
        noise: Noise = None,
        guidance: Guidance | None = None,
        guidance_rule: Rule | None = None,
        uncond: dict[str, Any] | nn.Module | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        graph: bool | None = None,
        progress: bool = False,
        callback: Callback | None = None,
        return_trajectory: bool = False,
        out: Tensor | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """Samples, drawn in eval mode, and without gradients unless grad_steps says so.

        Args:
            shape: the number of samples, if model.sample_shape gives the rest, or (B, ...).
            steps: how many; process.default_steps if None: all T levels of a chain, 1000 for an SDE, 50 for flow
                matching, 18 for EDM. n of a chain are the levels round(linspace(0, T, n + 1)). "heun" counts Karras'
                levels, "annealed_langevin" steps at each level. Or decreasing levels or times, or a grid of `process`.
            sampler: a name of fastdiff.steps.SAMPLERS, or one of those functions with options, as in
                functools.partial(steps.heun, noise_scale=1.003). "ode" is the probability-flow ODE by an adaptive
                solver (extra [ode]); steps is then left out. None is `default_sampler`.
            eta: the noise of "ddim", 0 to 1.
            seed: an int or int64 tensor; drawn from PyTorch's default generator if None.
            generator: draw the seed from this one. Equal generators give equal samples, though not those of `randn`.
            sample_ids: (B,), the number of each sample in the seed's noise, 0..B-1 if None. Sample i of a seed is the
                same in every batch.
            x_T: (B, ...), the start, in place of a draw from the prior.
            x_init: (B, ...), an image to start from, in place of x_T: alpha x_init + sigma z at the first level.
            strength: the share of the steps that are taken, the last ones, above 0 to 1 (SDEdit); with x_init.
            known: (B, ...) or a shape that expands to it, in [0, 1] or bool: 1 where x_init stays, 0 where it is drawn
                anew (inpainting). Biased, see fastdiff.editing.
            resample: how often each step is taken with `known`, with its noise added again in between (RePaint).
            stop_at: a level or time. The state at the first visited one that is not above it is returned.
            grad_steps: the result has a gradient through so many of the last steps (DRaFT, Clark et al. 2024,
                arXiv:2309.17400). With samplers that do not remember; without callback, trajectory, out, dtype, known.
            noise: (steps, B, ...), or a function from the step's number to (B, ...), in place of generated noise.
            guidance: classifier-free guidance, pred = uncond + guidance (cond - uncond), in one call of the model for
                both (Ho & Salimans 2022, arXiv:2207.12598): a number, one for each row of the table, or a function of
                the row's number and level. guidance_rule: another rule of fastdiff.guidance.
            uncond: the model_kwargs of the other branch. Tensors of B samples, also in dicts and lists, and numbers may
                differ. Or another network, asked with the same arguments (autoguidance).
            dtype: torch.bfloat16 or torch.float16 runs a copy of the model in that type, with channels_last
                convolutions. The copy is kept and follows the weights at every call. The state stays float32.
            device: where the state lives. None takes the device of the weights, or where hooks of Accelerate bring
                offloaded weights; for a model without weights that of x_T or out, else PyTorch's default device.
            graph: whether to capture a step as a CUDA graph and replay it, bit for bit the same. None does so on CUDA
                unless something forbids it; True raises then. A graph does not run the model's Python again: it sees
                changed weights and modules, but no changed plain attribute. Then make a new formulation around it.
            progress: show a bar (needs tqdm).
            callback: called as callback(k, level, x) after step k, with the state at that level, without gradients. One
                of (k, level, x, x0hat) is told the estimate of x_0 too, or None if the step made none. It
                may write into x, or return the state to go on from. Within torch.enable_grad() it may take
                gradients of the model (guidance). The next step reuses x and x0hat; clone them to keep them.
            return_trajectory: return (steps + 1, B, ...), from x_T to x_0, as the callback leaves them.
            out: the tensor to draw the samples in, on that device, in place of a new one. It may be x_T, and shares no
                memory with other arguments.
            model_kwargs: the model's further arguments, as in `forward`.

        Returns: (B, ...) float32, or float64 for a float64 model.
        Raises: ValueError or TypeError, naming the argument, before anything is drawn.

        Threads may share the model. It is in eval mode during a step and its callback, and in its own mode between
        steps. Meanwhile losses and predictions that other threads ask for wait, unless they are compiled.
        """
        model_kwargs, shape = merged(model_kwargs), shape_of(self.model, shape)
        sampler = self.default_sampler if sampler is None else sampler
        device = self.device_for(x_T, out) if device is None else as_device(device)
        ids = None if sample_ids is None else as_sample_ids(sample_ids, shape[0], device)
        check_sampling(shape, x_T, callback, return_trajectory, out, self.dtype, device)
        check_generator(seed, generator)
        check_labels(self.model, model_kwargs)
        edit = Edit(x_init, strength, known, resample).checked(shape, x_T)
        kwargs = stack_branches(guidance, guidance_rule, uncond, model_kwargs, shape[0], device)
        others = {"noise": noise, "seed": seed, "sample_ids": sample_ids, "x_init": x_init, "known": known}
        check_out_apart(out, x_T, uncond, {**others, **model_kwargs})
        if sampler == "ode":
            ode.check_sampling(
                self.process, device, steps=steps, eta=eta or None, noise=noise, x_init=x_init, stop_at=stop_at,
                callback=callback, return_trajectory=return_trajectory or None, guidance=guidance, dtype=dtype,
                graph=graph or None, grad_steps=grad_steps or None,
            )  # fmt: skip
            x = self._start(shape, seed_of(seed, generator, device), ids, x_T, self.prior_std(), out)
            return x.copy_(ode.sample(self, x, kwargs))
        # The table.
        with transforms.with_values():
            table = self.step_table(sampler, edit.steps(self.process, sampler, steps, stop_at), eta)
            table = edit.table(table, self.process)
        denoiser = self.cast(dtype)
        check_gradients(grad_steps, table, callback, return_trajectory, out, dtype, known, graph or None)
        denoiser = beside(denoiser, uncond, dtype)
        captured = not grad_steps and is_captured(graph, denoiser, kwargs, shape[0], self._compiled_step is not None)
        check_noise(noise, len(table), shape)
        estimates = wants_estimate(callback)
        with transforms.with_values():
            table = with_guidance(table, guidance, guidance_rule, self.process, self.objective)
            if estimates:
                table = with_estimates(table, self.process, self.objective)
            table = table if grad_steps else with_own_estimates(table, denoiser, kwargs)
        # The start.
        seed = seed_of(seed, generator, device)
        x = self._start(shape, seed, ids, x_T, table.start, out)
        callback = edit.begin(x, table, self.process, seed, ids, callback)
        # The run.
        options = StepOptions.of(table, self.clip, noise, guidance is not None, guidance_rule)
        run = Run(denoiser, table, x, options, seed, ids, noise, kwargs, self._compiled_step, estimates)
        walker = self._captures.steps(run, required=graph is True) if captured else steps_of(run, grad_steps)
        walk = as_forward(self, sampling.walk)
        return walk(walker, progress=progress, callback=callback, return_trajectory=return_trajectory)

    def encode(
        self,
        x0: Tensor,
        *,
        steps: int | Iterable[float] | Grid | None = None,
        progress: bool = False,
        out: Tensor | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """The noise x_T from which `sample(x_T=..., sampler="ddim", steps=steps)` comes back to x0.

        Args:
            x0: (B, ...), data. An SDE takes it for its state at `process.first`.
            steps, progress, out: as in `sample`.
            model_kwargs: the model's further arguments.

        Returns: (B, ...), float32 or float64, with an error of first order in the steps.
        Raises: ValueError for levels that rise; and from data, where a chain and FlowMatching start unless `steps` ends
            above 0, with objective "x0" or "score", which do not determine its noise.
        Reference: Song et al. 2021, arXiv:2010.02502, section 4.3.
        """
        model_kwargs = merged(model_kwargs)
        check_floating("x0", x0)
        with transforms.with_values():
            schedule, levels = decreasing(self.process, steps)
            levels = levels.flip(0)
            table = ddim_inversion(schedule, levels if self._starts_at_data else levels[levels > 0], self.objective)
            table = with_own_estimates(table, self, model_kwargs)
        device = self.device_for(x0, out)
        if out is not None:
            check_state(out, tuple(x0.shape), self.dtype, device)
            check_memory("out", out, {"x0": x0}, model_kwargs)
        x = x0.detach().to(device, self.dtype, copy=True) if out is None else out.copy_(x0.detach())
        if not self._starts_at_data:
            x.mul_(self.process.first_scale)
        options = StepOptions.of(table, clip=None)
        run = Run(self, table, x, options, model_kwargs=model_kwargs, compiled=self._compiled_step)
        return as_forward(self, sampling.walk)(Steps(run), progress=progress)

    def step_table(self, sampler: str | Sampler, steps: Any = None, eta: float = 0.0) -> StepTable:
        """The table of numbers that `sample` applies with these arguments. Raises what `sample` raises."""
        eta = as_number("eta", eta)
        if eta != 0.0 and sampler != "ddim":
            raise ValueError(f"eta: expected 0 with sampler {sampler!r}, got {eta}")
        options = {"eta": eta} if sampler == "ddim" else {}
        table = make_steps(self.process, sampler, steps, self.objective, self.clip, **options)
        check_learned(table, self.learns_variance)
        return table

    # --- likelihoods ------------------------------------------------------------------------------------------

    def bits_per_dim(self, x0: Tensor, **options: Any) -> bound.Bound:
        """The variational bound of images x0, term by term: see fastdiff.bound.evaluate for the options."""
        return as_forward(self, bound.evaluate)(self, x0, **options)

    def log_likelihood(self, x0: Tensor, **options: Any) -> Tensor:
        """log p(x0) in nats, (B,), by the probability-flow ODE: see fastdiff.ode.log_likelihood for the options."""
        return ode.log_likelihood(self, x0, **options)

    # --- compilation ------------------------------------------------------------------------------------------

    def compile(self, **options: Any) -> None:
        """Compile the training loss, and model and update of a sampling step together, with torch.compile.

        On a GPU the sampling step runs as a CUDA graph (mode "reduce-overhead"), unless `options` names a mode. The
        weights of 2d convolutions become channels_last in place, the layout that Inductor convolves in: it would
        convert all others at every call, which costs a large network at batch 1 more than compiling gains.
        """
        super().compile(**options)
        device = self.device.type
        if device in ("cpu", "cuda"):
            channels_last_convolutions(self.model)
        graph = {"mode": "reduce-overhead"} if device == "cuda" and "mode" not in options else {}
        self._compiled_step = torch.compile(sampling.step, **{**graph, **options})

    def __getstate__(self) -> dict[str, Any]:
        # As with any module, a copy or pickle is not compiled: the compiled step is bound to this model's weights.
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "_compiled_step": None}

    # --- arguments --------------------------------------------------------------------------------------------

    _starts_at_data = False
    _rows_are_levels = False

    def _start(
        self, shape: tuple[int, ...], seed: Tensor, ids: Tensor | None, x_T: Tensor | None, std: float,
        out: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The state to start from, where the seed is: x_T, or a draw of that standard deviation; in `out` if given."""
        if x_T is not None:
            return x_T.detach().to(seed.device, self.dtype, copy=True) if out is None else out.copy_(x_T.detach())
        x = ops.normal(shape, seed, sample_ids=ids, dtype=self.dtype, device=seed.device, out=out)
        return x.mul_(std)
