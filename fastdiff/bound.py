"""The variational bound (Ho et al. 2020, arXiv:2006.11239, eq. 5): the rows of its terms, its constant, and its value.

bound(x_0) = KL(q(x_T | x_0) || N(0, 1)) + sum over t = 2..T of KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))
- log p(x_0 | x_1): `prior_kl`, and `ops.vlb` with `vlb_rows`. All in nats per dimension; over ln 2 they are bits.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops
from .arguments import merged
from .denoiser import Denoiser
from .importance import LossSecondMoment as LossSecondMoment
from .objective import x0_rows
from .ops.checks import as_seed, check_floating
from .process import Grid
from .reference import work_dtype
from .schedule import NoiseSchedule
from .steps import VARIANCES, check_signal, decreasing
from .support import transforms
from .support.progress import bar
from .support.shapes import flat


def vlb_rows(schedule: NoiseSchedule, objective: str, variance: str) -> Tensor:
    """Rows (a, b, w, low, high, decoder) of `ops.vlb`, one per level.

    x0hat = a x_t + b pred. The means of q and p share their part from x_t, so they differ by c (x_0 - x0hat), and
    w = c^2 / beta~. low and high are logarithms of the variance of p over beta~. At level 1, where beta~ = 0, they are
    logarithms of the variance itself, and decoder is 1.

    Args:
        schedule: the noise levels.
        objective: what the model predicts.
        variance: of p. "posterior" is beta~ (at level 1 that of level 2), "beta" is beta, "learned" is in between.

    Returns: (T + 1, 6) float64; NaN at level 0, which has no term.
    Raises: ValueError for another variance, and if the prediction does not determine x_0.
    Reference: Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 14 and 15.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance: expected one of {', '.join(VARIANCES)}, got {variance!r}")
    t = torch.arange(1, schedule.timesteps + 1, device="cpu")
    check_signal(schedule, t, objective)
    a, b = x0_rows(schedule, objective)
    c, _, posterior = schedule.posterior(t, t - 1)
    beta = schedule.transition(t, t - 1)[1]
    # beta / beta~ = sigma_t^2 / sigma_s^2, which comes near 1.
    var_s, var_t = schedule.sigma[t - 1] ** 2, schedule.sigma[t] ** 2
    log_beta = torch.log1p((schedule.alpha[t - 1] ** 2 * beta if schedule.vp else var_t - var_s) / var_s)
    log_posterior = torch.zeros_like(log_beta)
    log_beta[0] = beta[0].log()
    log_posterior[0] = posterior[1].log() if schedule.timesteps > 1 else log_beta[0]
    w = c**2 / posterior
    w[0] = 0.0
    low = log_beta if variance == "beta" else log_posterior
    high = log_posterior if variance == "posterior" else log_beta
    rows = torch.stack((a[t], b[t], w, low, high, (t == 1).double()), 1)
    return torch.cat((torch.full_like(rows[:1], torch.nan), rows))


def prior_kl(schedule: NoiseSchedule, x0: Tensor) -> Tensor:
    """KL(q(x_T | x_0) || N(0, s^2)) in nats per dimension, s = schedule.prior_std(): the bound's L_T.

    Args:
        schedule: the noise levels.
        x0: (B, ...), data.

    Returns: (B,) float32, or float64 for float64 data. No model changes it.
    """
    second_moment = flat(x0.to(work_dtype(x0))).square().mean(1)
    with transforms.with_values():
        without_data = schedule.prior_kl(0.0)
        by_moment = 0.5 * schedule.alpha_bar[-1].item() / schedule.prior_std() ** 2
    return without_data + by_moment * second_moment


@dataclass(frozen=True)
class Bound:
    """The variational bound of images, in bits per dimension.

    prior: (B,), the KL from q(x_T | x_0) to the draw that sampling starts from.
    terms: (B, n), those of the n steps from noise to data; the last is the decoder's.
    """

    prior: Tensor
    terms: Tensor

    @property
    def total(self) -> Tensor:
        """(B,): their sum, an upper bound on -log2 p(x_0) per dimension."""
        return self.prior + self.terms.sum(1)


def evaluate(
    denoiser: Denoiser,
    x0: Tensor,
    *,
    steps: int | Iterable[float] | Grid | None = None,
    seed: int | Tensor | None = None,
    progress: bool = False,
    **model_kwargs: Any,
) -> Bound:
    """Every term of the bound of images, by one draw of x_t and one call of the model each.

    Args:
        denoiser: its variance is that of the reverse steps, its clip that of x0hat.
        x0: (B, ...), images in 256 steps over [-1, 1].
        steps: as in Diffusion.sample; every level of a chain if None. Fewer bound the likelihood of the respaced chain.
        seed: of the draws; drawn if None.
        progress: show a bar (needs tqdm).
        model_kwargs: the model's further arguments.

    Raises: ValueError if the prediction does not determine x_0, and for levels that do not end at 0.
    Reference: Ho et al. 2020, eq. 5.
    """
    model_kwargs = merged(model_kwargs)
    check_floating("x0", x0)
    if x0.numel() == 0:
        raise ValueError(f"x0: expected at least one image, got shape {tuple(x0.shape)}")
    x0 = x0.detach().to(denoiser.device_for(x0), denoiser.dtype)
    with transforms.with_values():
        grid, levels = decreasing(denoiser.process, steps)
        if levels[-1] != 0:
            raise ValueError(f"steps: expected levels that end at 0 (data), got {levels.tolist()}")
        times = grid.times(levels)[:-1]
        made = denoiser.process.discretize(times.flip(0).double())
        n, dtype = len(times), work_dtype(x0.dtype)
        rows = vlb_rows(made, denoiser.objective, denoiser.variance)
        noising = torch.stack((made.alpha, made.sigma), 1)
        condition = denoiser.condition(times)
    rows, noising = (transforms.admitted(v).to(x0.device, dtype) for v in (rows, noising))
    condition = transforms.admitted(condition).to(x0.device)
    seed = as_seed(seed, x0.device)
    terms = x0.new_empty(len(x0), n)
    eval_mode = denoiser.evaluating()
    with transforms.without_gradients():
        for k in bar(n, progress):
            x_t = ops.noising(x0, n - k, noising, seed=seed)
            with eval_mode:
                pred, raw, _ = denoiser.call_model(x_t, condition[k].expand(len(x0)), model_kwargs)
            terms[:, k] = ops.vlb(pred, x_t, x0, n - k, rows, raw_variance=raw, clip=denoiser.clip)
        prior = prior_kl(made, x0)
    return Bound(prior / math.log(2), terms / math.log(2))
