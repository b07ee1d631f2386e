"""The variational bound (Ho et al. 2020, arXiv:2006.11239, eq. 5): the rows of its terms, its constant, and the choice
of the terms that training sees.

bound(x_0) = KL(q(x_T | x_0) || N(0, 1)) + sum over t = 2..T of KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))
- log p(x_0 | x_1): `prior_kl`, and `ops.vlb` with `vlb_rows`. All in nats per dimension; over ln 2 they are bits.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .arguments import merged
from .denoiser import Denoiser
from .objective import x0_rows
from .ops.checks import as_seed, check_floating
from .process import Grid
from .reference import work_dtype
from .schedule import NoiseSchedule
from .steps import VARIANCES, check_signal, decreasing
from .support.progress import bar
from .support.scalars import integer
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
    return schedule.prior_kl(0.0) + 0.5 * schedule.alpha_bar[-1].item() / schedule.prior_std() ** 2 * second_moment


class LossSecondMoment(nn.Module):
    """Levels drawn in proportion to sqrt(E[L_t^2]), which makes the estimate of the bound least noisy.

    E is the mean over the last 10 losses of a level. Until each of the levels 1..T has 10 losses, all are drawn evenly;
    after that one draw in a thousand is.

    Reference: Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 18.
    """

    HISTORY = 10
    UNIFORM = 0.001
    losses: Tensor  # (T, HISTORY) float32, a ring for each level
    seen: Tensor  # (T,) int64, losses that came in

    def __init__(self, timesteps: int) -> None:
        super().__init__()
        number = integer(timesteps)
        if number is None or number < 1:
            raise ValueError(f"timesteps: expected an integer of at least 1, got {timesteps!r}")
        # State, but no buffers: an average of weights would average it, and .half() would round it.
        self.losses = torch.zeros(number, self.HISTORY, device="cpu")
        self.seen = torch.zeros(number, dtype=torch.int64, device="cpu")

    def to_device(self, device: torch.device) -> None:
        """Bring the history to a device. On the meta device, which has no values, it stays where it is."""
        if self.losses.device != device and device.type != "meta":
            with torch.inference_mode(False), torch.no_grad():
                self.losses, self.seen = self.losses.to(device), self.seen.to(device)

    def _apply(self, fn: Any, recurse: bool = True) -> "LossSecondMoment":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.to_device(fn(torch.empty(0, device=self.losses.device)).device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}losses"], destination[f"{prefix}seen"] = self.losses, self.seen

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        for name, own in (("losses", self.losses), ("seen", self.seen)):
            key = prefix + name
            given = state_dict.get(key)
            if given is None:
                missing_keys += [key] if strict else []
            elif given.shape != own.shape:
                error_msgs.append(f"{key}: expected shape {tuple(own.shape)}, got {tuple(given.shape)}")
            elif given.device.type != "meta":
                own.copy_(given.detach())
        unexpected_keys += [
            key for key in state_dict
            if strict and key.startswith(prefix) and key[len(prefix) :] not in ("losses", "seen")
        ]  # fmt: skip

    def probabilities(self) -> Tensor:
        """p_t for t = 1..T, (T,)."""
        size = self.losses.square().mean(1).sqrt()
        even = torch.full_like(size, 1 / len(size))
        known = (self.seen >= self.HISTORY).all() & (size.sum() > 0)
        return torch.where(known, (1 - self.UNIFORM) * size / size.sum() + self.UNIFORM * even, even)

    def sample(self, batch: int) -> tuple[Tensor, Tensor]:
        """(t, weights), each (batch,): levels in 1..T from PyTorch's default generator, and 1 / (T p_t).

        With these weights E[weight L_t] is the mean of L over the levels. Nothing waits for the device.
        """
        p = self.probabilities()
        index = torch.multinomial(p, batch, replacement=True)
        return index + 1, 1 / (len(p) * p[index])

    def sample_at(self, quantiles: Tensor) -> tuple[Tensor, Tensor]:
        """As `sample`, at given quantiles (batch,) in [0, 1) of the distribution of the levels."""
        p = self.probabilities()
        ends = p.double().cumsum(0)
        index = torch.searchsorted(ends, quantiles.double() * ends[-1], right=True).clamp(max=len(p) - 1)
        return index + 1, 1 / (len(p) * p[index])

    @torch.no_grad()
    def update(self, t: Tensor, losses: Tensor) -> None:
        """Note the losses (B,) of the levels t (B,) in 1..T, without weights and in the order of the batch.

        Losses that are not finite are left out. Nothing waits for the device.
        """
        if losses.device.type == "meta":
            return
        losses = losses.detach().to(self.losses.dtype)
        valid = losses.isfinite()
        same = (t[:, None] == t[None, :]) & valid[None, :]
        before = same.tril(-1).sum(1)
        fits = valid & (same.sum(1) - before <= self.HISTORY)  # if a ring is too small for them all, the last ones
        level = t - 1
        slot = torch.where(fits, (self.seen[level] + before) % self.HISTORY, self.HISTORY)
        padded = nn.functional.pad(self.losses, (0, 1))  # one more column takes the others
        padded[level, slot] = losses
        self.losses.copy_(padded[:, :-1])
        self.seen.index_add_(0, level, valid.long())


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
    check_floating("x0", x0)
    if x0.numel() == 0:
        raise ValueError(f"x0: expected at least one image, got shape {tuple(x0.shape)}")
    x0 = x0.detach().to(denoiser.device_for(x0), denoiser.dtype)
    grid, levels = decreasing(denoiser.process, steps)
    if levels[-1] != 0:
        raise ValueError(f"steps: expected levels that end at 0 (data), got {levels.tolist()}")
    times = grid.times(levels)[:-1]
    made = denoiser.process.discretize(times.flip(0).double())
    n, dtype = len(times), work_dtype(x0.dtype)
    rows = vlb_rows(made, denoiser.objective, denoiser.variance).to(x0.device, dtype)
    noising = torch.stack((made.alpha, made.sigma), 1).to(x0.device, dtype)
    condition = denoiser.condition(times).to(x0.device)
    seed = as_seed(seed, x0.device)
    terms = x0.new_empty(len(x0), n)
    eval_mode = denoiser.evaluating()
    with torch.no_grad():
        for k in bar(n, progress):
            x_t = ops.noising(x0, n - k, noising, seed=seed)
            with eval_mode:
                pred, raw, _ = denoiser.call_model(x_t, condition[k].expand(len(x0)), merged(model_kwargs))
            terms[:, k] = ops.vlb(pred, x_t, x0, n - k, rows, raw_variance=raw, clip=denoiser.clip)
        prior = prior_kl(made, x0)
    return Bound(prior / math.log(2), terms / math.log(2))
