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

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import ops
from .ops.checks import as_mask, check_shape
from .process import Process
from .reference import work_dtype
from .rows import make_rows
from .steps import StepTable
from .support.scalars import as_number, integer


def check_edit(
    shape: tuple[int, ...],
    x_T: Tensor | None,
    x_init: Tensor | None,
    strength: float,
    known: Tensor | None,
    resample: int,
) -> None:
    """Arguments of `sample` that edit fit each other. TypeError or ValueError, naming the argument."""
    if x_init is not None:
        check_shape("x_init", x_init, shape)
        if x_T is not None:
            raise ValueError("x_T: expected None with x_init, which the start is made of")
    if not 0 < as_number("strength", strength) <= 1:
        raise ValueError(f"strength: expected a number above 0 and up to 1, got {strength}")
    if (integer(resample) or 0) < 1:
        raise ValueError(f"resample: expected an integer of at least 1, got {resample!r}")
    if x_init is None and (strength != 1 or known is not None):
        raise ValueError(f"x_init: expected an image with {'strength' if known is None else 'known'}, got None")
    if known is None and resample != 1:
        raise ValueError("known: expected a mask with resample, got None")
    if known is not None and x_init is not None:
        mask = as_mask(known.to(x_init.device) if isinstance(known, Tensor) else known, x_init, "known")
        # A look at a GPU's tensor would wait for it.
        if mask.is_cpu and not bool(((mask >= 0) & (mask <= 1)).all()):
            low, high = (value.item() for value in mask.aminmax())
            raise ValueError(f"known: expected numbers from 0 to 1, got {low:g} to {high:g}")


def noise_levels(process: Process, times: Tensor) -> Tensor:
    """(N, 2) rows (alpha, sigma) of levels or times (N,), float64; those of data at 0."""
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
    callback: Callable[..., Any] | None,
) -> Callable[..., Any]:
    """A callback that brings back what is known after each step, then calls the given one.

    Its noise is that of ops.FORWARD in step k, apart from the sampler's.
    """
    rows = noise_levels(process, table.levels[1:]).to(seed.device, work_dtype(x_init.dtype))
    mask = as_mask(known.to(x_init.device), x_init, "known").to(x_init.dtype)

    def restore(k: int, level: float, x: Tensor, *more: Any) -> Any:
        x.lerp_(ops.noising(x_init, k, rows, seed=seed, sample_ids=sample_ids), mask)
        return None if callback is None else callback(k, level, x, *more)

    return restore
