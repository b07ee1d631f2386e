"""Samplers that step along the score s(x, t) = grad log p_t(x): reverse SDEs, their ODE, and Langevin dynamics.

In the docstrings t -> s is one step of the SDE dx = f x dt + g dw, z is standard normal noise, and x0 the model's
estimate of the data. An objective other than the score is converted. Where clip is set, the score is taken from the
clipped x0. With denoise the step to level 0 gives x0 (Tweedie's formula; Song et al. 2021, app. G).
`fastdiff.steps` describes the arguments.

All raise ValueError if the prediction does not determine the score at a level, and if no step is left.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..rows import make_rows
from ..schedule import NoiseSchedule
from ..support.scalars import as_count, as_positive
from .table import StepTable, check_finite_ratio, make_table, score_columns, x0_columns
from .through_x0 import ancestral


def euler_maruyama(
    schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None = None, denoise: bool = True
) -> StepTable:
    """Euler-Maruyama's rule for the reverse SDE dx = (f x - g^2 s(x, t)) dt + g dw.

        score = predict(x_t)
        x_s   = x_t - f dt x_t + g^2 dt score + sqrt(g^2 dt) z
        x_0   = denoise(x)    at the last step

    Row: from_x = 1 - f dt, with what the score takes from x; from_pred (or from_x0) = g^2 dt times the score's;
    noise = sqrt(g^2 dt).

    Args:
        schedule, levels, objective, clip, denoise: see `fastdiff.steps`.

    Returns: one row and one call of the model per step.
    Raises: ValueError if sigma / alpha is infinite at a level.
    Reference: Song et al. 2021, arXiv:2011.13456, eq. 6.
    """
    t, s = levels[:-1], levels[1:]
    check_finite_ratio("euler_maruyama", schedule, t)
    drift, g2 = schedule.increments(t, s)
    return _score_table(schedule, levels, objective, clip, 1 - drift, g2, g2.sqrt(), denoise)


def probability_flow(
    schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None = None, denoise: bool = False
) -> StepTable:
    """Euler's rule for the probability-flow ODE dx/dt = f x - g^2/2 s(x, t), whose marginals are those of the SDE.

        score = predict(x_t)
        x_s   = x_t - f dt x_t + g^2/2 dt score
        x_0   = denoise(x)    at the last step, if asked for

    `sample` asks for it unless denoise is given, or the last level before data is the first of the process: its noise
    is too small to see.

    Row: from_x = 1 - f dt, with what the score takes from x; from_pred (or from_x0) = g^2/2 dt times the score's.

    Args:
        schedule, levels, objective, clip, denoise: see `fastdiff.steps`.

    Returns: one row and one call of the model per step; deterministic, first order.
    Raises: ValueError if sigma / alpha is infinite at a level.
    Reference: Song et al. 2021, arXiv:2011.13456, eq. 13.
    """
    t, s = levels[:-1], levels[1:]
    check_finite_ratio("probability_flow", schedule, t)
    drift, g2 = schedule.increments(t, s)
    return _score_table(schedule, levels, objective, clip, 1 - drift, g2 / 2, torch.zeros_like(g2), denoise)


def reverse_diffusion(
    schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None = None, denoise: bool = True
) -> StepTable:
    """The reverse SDE discretised as the forward chain x_t = alpha_ts x_s + sqrt(beta_ts) z is.

        score = predict(x_t)
        x_s   = (2 - alpha_ts) x_t + beta_ts score + sqrt(beta_ts) z
        x_0   = denoise(x)    at the last step

    Row: from_x = 2 - alpha_ts, with what the score takes from x; from_pred (or from_x0) = beta_ts times the score's;
    noise = sqrt(beta_ts).

    Args:
        schedule, levels, objective, clip, denoise: see `fastdiff.steps`.

    Returns: one row and one call of the model per step.
    Raises: ValueError if the prediction does not determine the score at a level.
    Reference: Song et al. 2021, arXiv:2011.13456, app. E.
    """
    alpha_ts, beta = schedule.transition(levels[:-1], levels[1:])
    return _score_table(schedule, levels, objective, clip, 2 - alpha_ts, beta, beta.sqrt(), denoise)


PREDICTORS: dict[str, Callable[..., StepTable]] = {
    "reverse_diffusion": reverse_diffusion,
    "euler_maruyama": euler_maruyama,
    "ddpm": ancestral,
}


def predictor_corrector(
    schedule: NoiseSchedule,
    levels: Tensor,
    objective: str,
    clip: float | None = None,
    predictor: str = "reverse_diffusion",
    corrections: int = 1,
    snr: float = 0.16,
) -> StepTable:
    """Langevin dynamics at every level, then a step of the predictor to the next.

        score = predict(x),    e = 2 alpha_ts^2 (snr |z| / |score|)^2    of each sample by itself
        x     = x + e score + sqrt(2 e) z    `corrections` times
        x_s   = predictor(x)

    Rows: the predictor's, and before each `corrections` rows of kind "correct", which give the score;
    noise = 2 alpha_ts^2 snr^2.

    Args:
        schedule, levels, objective, clip: see `fastdiff.steps`.
        predictor: "reverse_diffusion", "euler_maruyama" or "ddpm" (ancestral).
        corrections: steps of Langevin dynamics at each level, at least 1.
        snr: the ratio of the norms of step and noise, above 0.

    Returns: corrections + 1 rows and calls of the model per level; one to data, which denoises.
    Raises: ValueError for other arguments.
    Reference: Song et al. 2021, arXiv:2011.13456, algorithms 2 to 5.
    """
    if predictor not in PREDICTORS:
        raise ValueError(f"predictor: expected one of {', '.join(PREDICTORS)}, got {predictor!r}")
    repeats = as_count("corrections", corrections)
    as_positive("snr", snr)
    steps = PREDICTORS[predictor](schedule, levels, objective, clip).rows
    n = int((levels[1:] > 0).sum())  # the step to data has nothing to correct
    t, s = levels[:n], levels[1 : n + 1]
    size = 2 * schedule.transition(t, s)[0] ** 2 * snr**2
    correct = make_rows(size, noise=size, guidance=1.0, **score_columns(schedule, t, s, objective, clip))
    rows, visited, kinds = [], [levels[:1]], []
    for k in range(len(steps)):
        count = repeats if k < n else 0
        rows += [correct[k : k + 1]] * count + [steps[k : k + 1]]
        visited += [levels[k : k + 1]] * count + [levels[k + 1 : k + 2]]
        kinds += ["correct"] * count + ["predict"]
    return make_table(schedule, torch.cat(visited), torch.cat(rows), kinds=kinds)


def annealed_langevin(
    schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None = None, eps: float = 2e-5
) -> StepTable:
    """Annealed Langevin dynamics: some steps at each level of a ladder, from the most noise to the least.

        score = predict(x),    e = eps sigma_t^2 / sigma_1^2
        x     = x + e score + sqrt(2 e) z
        x_0   = denoise(x)    at the last step

    Row: from_x = 1, with what the score takes from x; from_pred (or from_x0) = e times the score's; noise = sqrt(2 e).
    The paper's step size alpha_i is 2 e.

    Args:
        schedule, objective, clip: see `fastdiff.steps`.
        levels: (n + 1,) int64, never increasing; a level that is repeated gets as many steps.
        eps: the step size e at level 1, above 0.

    Returns: one row and one call of the model per step.
    Raises: ValueError unless alpha = 1: between levels nothing is rescaled.
    Reference: Song & Ermon 2019, arXiv:1907.05600, algorithm 1; the last step: Jolicoeur-Martineau et al. 2021,
        arXiv:2009.05475.
    """
    as_positive("eps", eps)
    if bool((schedule.log_alpha != 0).any()):
        raise ValueError("sampler: 'annealed_langevin' expected alpha = 1 at every level (NCSN), got less")
    size = eps * (schedule.sigma[levels[:-1]] / schedule.sigma[1]) ** 2
    return _score_table(schedule, levels, objective, clip, torch.ones_like(size), size, (2 * size).sqrt(), True)


def _score_table(
    schedule: NoiseSchedule, levels: Tensor, objective: str, clip: float | None,
    on_x: Tensor, on_score: Tensor, on_noise: Tensor, denoise: bool,
) -> StepTable:  # fmt: skip
    """x_s = on_x x + on_score score + on_noise z; the step to level 0 gives x0hat, or is left out."""
    t, s = levels[:-1], levels[1:]
    n = int((s > 0).sum())
    if n + denoise == 0:
        raise ValueError("steps: expected a step that does not end at level 0, where there is no denoising")
    values = score_columns(schedule, t[:n], s[:n], objective, clip, on_score[:n])
    values["from_x"] = values["from_x"] + on_x[:n]
    rows = make_rows(on_x[:n], guidance=1.0, noise=on_noise[:n], **values)
    if n < len(t) and denoise:
        last = x0_columns(schedule, t[n:], s[n:], objective, clip)
        rows = torch.cat((rows, make_rows(on_x[n:], guidance=1.0, from_x0=1.0, **last)))
    return make_table(schedule, levels[: len(rows) + 1], rows)
