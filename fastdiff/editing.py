"""Editing: samples that start from an image, and samples of which a part is known.

    sample(shape, x_init=image, strength=0.6)       the image, noised, then denoised (img2img)
    sample(shape, x_init=image, known=mask)         what the mask marks stays, the rest is drawn (inpainting)

After each step to level s, `known` brings back what is known, at the noise of that level:

    x = known (alpha_s x_init + sigma_s z) + (1 - known) x

`resample` goes back up after a step and takes it again, so that what is drawn fits better to what is known. Either way
is biased: what is drawn is no sample of the model's distribution given what is known.

Reference: SDEdit, Meng et al. 2022, arXiv:2108.01073, algorithm 1; replacement, Song et al. 2021, arXiv:2011.13456,
    section I.2; RePaint, Lugmayr et al. 2022, arXiv:2201.09865, algorithm 1.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import ops
from .estimates import Callback
from .ops.checks import as_mask, check_shape
from .process import Process
from .reference import work_dtype
from .rows import make_rows
from .steps import Sampler, StepTable, part_of
from .support import transforms
from .support.scalars import as_count, as_number


@dataclass(frozen=True, eq=False)
class Edit:
    """The arguments of `sample` that say which part of the samples is given."""

    x_init: Tensor | None
    strength: float
    known: Tensor | None
    resample: int

    def checked(self, shape: tuple[int, ...], x_T: Tensor | None) -> "Edit":
        """Itself, if they fit each other and samples of a shape. TypeError or ValueError, naming the argument."""
        x_init, known = self.x_init, self.known
        if x_init is not None:
            check_shape("x_init", x_init, shape)
            if x_T is not None:
                raise ValueError("x_T: expected None with x_init, which the start is made of")
        if not 0 < as_number("strength", self.strength) <= 1:
            raise ValueError(f"strength: expected a number above 0 and up to 1, got {self.strength}")
        as_count("resample", self.resample)
        if x_init is None and (self.strength != 1 or known is not None):
            raise ValueError(f"x_init: expected an image with {'strength' if known is None else 'known'}, got None")
        if known is None and self.resample != 1:
            raise ValueError("known: expected a mask with resample, got None")
        if known is not None and x_init is not None:
            mask = as_mask(known.to(x_init.device) if isinstance(known, Tensor) else known, x_init, "known")
            seen = transforms.visible(mask)
            if seen is not None and not bool(((seen >= 0) & (seen <= 1)).all()):
                raise ValueError(f"known: expected numbers in [0, 1], got {seen.min():g} to {seen.max():g}")
        return self

    def steps(self, process: Process, sampler: str | Sampler, steps: Any, stop_at: float | None) -> Any:
        """The steps of `sample` that are taken: those at the end, down to stop_at."""
        if self.x_init is None and stop_at is None:
            return steps
        return part_of(process, sampler, steps, self.strength, stop_at)

    def table(self, table: StepTable, process: Process) -> StepTable:
        """The table that starts from x_init at the noise of its first level, with each step `resample` times."""
        if self.x_init is None:
            return table
        table = resampled(table, process, self.resample)
        return replace(table, start=noise_levels(process, table.levels[:1])[0, 1].item())

    def begin(
        self, x: Tensor, table: StepTable, process: Process, seed: Tensor, sample_ids: Tensor | None,
        callback: Callback | None,
    ) -> Callback | None:  # fmt: skip
        """Add x_init to the noise x of the first level. Returns the callback that also keeps what is known."""
        if self.x_init is None:
            return callback
        x_init = self.x_init.detach().to(x.device, x.dtype)
        with transforms.with_values():
            alpha = noise_levels(process, table.levels[:1])[0, 0].item()
        x.add_(x_init, alpha=alpha)
        if self.known is None:
            return callback
        return keeping(process, table, x_init, self.known, seed, sample_ids, callback)


def noise_levels(process: Process, times: Tensor) -> Tensor:
    """(N, 2) rows (alpha, sigma) of levels or times (N,), float64. At 0, which is data, they are (1, 0)."""
    is_data = times == 0
    made = process.at(torch.where(is_data, process.last, times.double()))
    return torch.stack((made.alpha.where(~is_data, 1.0), made.sigma.where(~is_data, 0.0)), 1)


def resampled(table: StepTable, process: Process, times: int) -> StepTable:
    """The table with each step but the last taken `times` times: between them the noise of the step comes back.

        x_t = alpha_t / alpha_s x_s + sqrt(sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2) z

    Raises: ValueError for a sampler that remembers, or whose steps are not all of one call.
    """
    if times == 1:
        return table
    if table.keep != "none" or table.learned or set(table.kinds) != {"predict"}:
        raise ValueError("resample: expected 1 with a sampler that remembers steps, corrects or learns its noise")
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (noise_levels(process, v).T for v in (table.levels[:-1], table.levels[1:]))
    back = alpha_t / alpha_s
    up = make_rows(back, from_x=back, noise=(sigma_t**2 - (back * sigma_s) ** 2).clamp(min=0).sqrt(), guidance=1.0)
    rows, levels, kinds = [], [table.levels[:1]], []
    for k in range(len(table)):
        count = times if k < len(table) - 1 else 1
        step, again, here, there = (v[k : k + 1] for v in (table.rows, up, table.levels, table.levels[1:]))
        rows += [step, again] * (count - 1) + [step]
        levels += [there, here] * (count - 1) + [there]
        kinds += ["predict", "add"] * (count - 1) + ["predict"]
    return replace(table, rows=torch.cat(rows), levels=torch.cat(levels), kinds=kinds, noisy=True)


def keeping(
    process: Process,
    table: StepTable,
    x_init: Tensor,
    known: Tensor,
    seed: Tensor,
    sample_ids: Tensor | None,
    callback: Callback | None,
) -> Callback:
    """A callback that brings back what is known after each step, then calls the given one.

    Its noise is that of ops.FORWARD in step k, apart from the sampler's.
    """
    with transforms.with_values():
        rows = noise_levels(process, table.levels[1:])
    rows = transforms.admitted(rows).to(seed.device, work_dtype(x_init.dtype))
    mask = as_mask(known.to(x_init.device), x_init, "known").to(x_init.dtype)

    def restore(k: int, level: float, x: Tensor, *more: Any) -> Any:
        x.lerp_(ops.noising(x_init, k, rows, seed=seed, sample_ids=sample_ids), mask)
        return None if callback is None else callback(k, level, x, *more)

    return restore
