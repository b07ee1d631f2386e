"""Noise schedules: x_t = alpha_t x_0 + sigma_t eps at the levels t = 0 (data) to T.

Everything is built from the logarithm of alpha in float64. A chain that keeps its variance (VP) is given by
L_t = log alpha_bar_t: alpha = exp(L / 2), sigma^2 = -expm1(L), alpha_t / alpha_s = exp((L_t - L_s) / 2). So an
alpha_bar of 1 - 1e-10 or 1e-600 keeps all its digits, and alpha_bar_T = 0 is an ordinary value.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .support.choices import did_you_mean
from .support.scalars import as_count, integer


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Levels 0..T of a forward process q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I); level 0 is data.

    Args:
        log_alpha: (T + 1,) float64, log_alpha[0] = 0, never increasing; -inf if no signal is left.
        sigma: (T + 1,) float64, >= 0.
        vp: whether alpha^2 + sigma^2 = 1 throughout, so that small differences follow from log_alpha exactly.
        time: (T + 1,), the time of each level; its number if None.
        drift, g2: (T + 1,) float64, f and g^2 of dx = f x dt + g dw at each level; None if the levels are of no SDE.
        sigma_data: the standard deviation of the data, for objective "edm" alone.
    """

    log_alpha: Tensor
    sigma: Tensor
    vp: bool
    time: Tensor | None = None
    drift: Tensor | None = None
    g2: Tensor | None = None
    sigma_data: float = 0.5

    @classmethod
    def from_log_alpha_bar(cls, log_alpha_bar: Tensor) -> "NoiseSchedule":
        """The variance-preserving chain with the given log alpha_bar_t.

        Args:
            log_alpha_bar: (T + 1,): 0 at level 0, never increasing, -inf only at the end.

        Raises: ValueError for other values.
        """
        log_alpha_bar = as_float64("log_alpha_bar", log_alpha_bar)
        if log_alpha_bar.ndim != 1 or len(log_alpha_bar) < 2:
            raise ValueError(f"log_alpha_bar: expected shape (T + 1,), got {tuple(log_alpha_bar.shape)}")
        falls = log_alpha_bar[0] == 0 and (log_alpha_bar.diff() <= 0).all()
        if not (bool(falls) and bool(log_alpha_bar[:-1].isfinite().all())):
            raise ValueError("log_alpha_bar: expected 0, then values that never increase, -inf only at the end")
        # abs: -expm1(0) would be -0
        return cls(log_alpha_bar / 2, torch.expm1(log_alpha_bar).abs().sqrt(), vp=True)

    @classmethod
    def from_betas(cls, betas: Tensor) -> "NoiseSchedule":
        """The DDPM chain with q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I).

        Args:
            betas: (T,) for t = 1..T, each in (0, 1]; 1 only at the end.

        Raises: ValueError for other values.
        Reference: Ho et al. 2020, arXiv:2006.11239, eq. 2.
        """
        betas = as_float64("betas", betas)
        if betas.ndim != 1 or len(betas) == 0:
            raise ValueError(f"betas: expected a non-empty 1-D sequence, got shape {tuple(betas.shape)}")
        if not bool(((betas > 0) & (betas <= 1)).all()):
            wrong = betas[~((betas > 0) & (betas <= 1))][0].item()
            raise ValueError(f"betas: expected values in (0, 1], got {wrong}")
        if bool((betas[:-1] == 1).any()):
            raise ValueError("betas: 1 removes all signal and may stand only at the last timestep")
        return cls.from_log_alpha_bar(_from_zero(torch.log1p(-betas)))

    @classmethod
    def from_alpha_sigma(cls, alpha: Tensor, sigma: Tensor) -> "NoiseSchedule":
        """Any process with x_t = alpha_t x_0 + sigma_t eps at t = 1..T; level 0 (alpha 1, sigma 0) is added.

        Args:
            alpha: (T,) in [0, 1], never increasing.
            sigma: (T,), above 0; sigma / alpha increases.

        Raises: ValueError for other values.
        """
        alpha, sigma = as_float64("alpha", alpha), as_float64("sigma", sigma)
        if alpha.ndim != 1 or len(alpha) == 0 or alpha.shape != sigma.shape:
            raise ValueError(
                "alpha, sigma: expected two equal non-empty 1-D shapes, "
                f"got {tuple(alpha.shape)} and {tuple(sigma.shape)}"
            )
        if not bool(((alpha >= 0) & (alpha <= 1)).all()) or bool((alpha.diff() > 0).any()):
            raise ValueError("alpha: expected values in [0, 1] that never increase")
        if not bool((torch.isfinite(sigma) & (sigma > 0)).all()):
            raise ValueError("sigma: expected finite values above 0")
        # In this form 0 is an ordinary alpha: log(alpha / sigma) = -inf.
        if not bool(((alpha / sigma).diff() < 0).all()):
            raise ValueError("sigma / alpha: expected strictly increasing noise")
        zero = alpha.new_zeros(1)
        return cls(torch.cat((zero, alpha.log())), torch.cat((zero, sigma)), vp=False)

    @property
    def timesteps(self) -> int:
        """T, the number of noise levels above the data."""
        return len(self.sigma) - 1

    @property
    def alpha(self) -> Tensor:
        """alpha_t, (T + 1,); sqrt(alpha_bar_t) of Ho et al."""
        return self.log_alpha.exp()

    @property
    def alpha_bar(self) -> Tensor:
        """alpha_t^2, (T + 1,)."""
        return (2 * self.log_alpha).exp()

    @property
    def betas(self) -> Tensor:
        """beta_t of q(x_t | x_{t-1}), (T,) for t = 1..T."""
        t = torch.arange(1, self.timesteps + 1, device="cpu")
        return self.transition(t, t - 1)[1]

    @property
    def snr(self) -> Tensor:
        """alpha_t^2 / sigma_t^2, (T + 1,); inf at level 0."""
        return self.log_snr.exp()

    @property
    def log_snr(self) -> Tensor:
        """log(alpha_t^2 / sigma_t^2), (T + 1,); inf at level 0, -inf where alpha = 0."""
        return 2 * (self.log_alpha - self.sigma.log())

    @property
    def rates(self) -> tuple[Tensor, Tensor]:
        """(f, g^2) of dx = f x dt + g dw at each level; ValueError if the levels are of no SDE."""
        if self.drift is None or self.g2 is None:
            raise ValueError("schedule: expected the levels of an SDE, got a chain without rates")
        return self.drift, self.g2

    def times(self, levels: Tensor) -> Tensor:
        """The time of each of the levels: the level itself, int64, or float64."""
        return levels if self.time is None else self.time[levels]

    def prior_std(self, level: int = -1) -> float:
        """Standard deviation of the draw that sampling starts from: 1 for VP (Ho et al. 2020), else sigma."""
        return 1.0 if self.vp else self.sigma[level].item()

    def increments(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """(f dt, g^2 dt) of dx = f x dt + g dw from level s up to level t.

        f = d log alpha / dt and g^2 = d sigma^2 / dt - 2 f sigma^2. Levels with rates use those at t (Euler's rule).
        For others it is what log alpha and sigma^2 gain from s to t.

        Reference: Song et al. 2021, arXiv:2011.13456, eq. 5.
        """
        if self.time is not None and self.drift is not None:
            dt = self.time[t] - self.time[s]
            f, g2 = self.rates
            return f[t] * dt, g2[t] * dt
        drift = self.log_alpha[t] - self.log_alpha[s]
        if self.vp:
            return drift, -2 * drift
        return drift, self.sigma[t] ** 2 * (1 - 2 * drift) - self.sigma[s] ** 2

    def transition(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha_ts, beta_ts) of q(x_t | x_s) = N(alpha_ts x_s, beta_ts I) for levels s < t.

        alpha_ts = alpha_t / alpha_s; beta_ts = sigma_t^2 - alpha_ts^2 sigma_s^2, which is 1 - alpha_ts^2 for VP.
        """
        log_alpha_ts = self.log_alpha[t] - self.log_alpha[s]
        alpha_ts = log_alpha_ts.exp()
        if self.vp:
            return alpha_ts, -torch.expm1(2 * log_alpha_ts)
        part = alpha_ts * self.sigma[s]
        return alpha_ts, (self.sigma[t] - part) * (self.sigma[t] + part)

    def posterior(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(c, d, beta~) of q(x_s | x_t, x_0) = N(c x_0 + d x_t, beta~ I) for levels s < t.

        c = alpha_s beta_ts / sigma_t^2, d = alpha_ts sigma_s^2 / sigma_t^2, beta~ = beta_ts sigma_s^2 / sigma_t^2.

        Reference: Ho et al. 2020, eq. 6 and 7.
        """
        alpha_ts, beta_ts = self.transition(t, s)
        var_s, var_t = self.sigma[s] ** 2, self.sigma[t] ** 2
        return self.alpha[s] * beta_ts / var_t, alpha_ts * var_s / var_t, beta_ts * var_s / var_t

    def prior_kl(self, second_moment: float = 1.0) -> float:
        """KL(q(x_T | x_0) || N(0, prior_std^2)) in nats per dimension at E[x_0^2] = second_moment.

        It is what sampling from the prior leaves out, near 0 for a chain that ends in noise.

        Reference: Ho et al. 2020, L_T of eq. 5.
        """
        signal = self.alpha_bar[-1].item()
        if self.vp:  # log sigma_T^2 through log1p, as sigma_T^2 = 1 - alpha_bar_T
            return 0.5 * (signal * (second_moment - 1) - math.log1p(-signal))
        return 0.5 * signal * second_moment / self.sigma[-1].item() ** 2


def linear(timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
    """beta_t evenly spaced from beta_start to beta_end for t = 1..T.

    Args:
        timesteps: T, at least 1.
        beta_start, beta_end: in (0, 1].

    Raises: ValueError or TypeError for other values.
    Reference: Ho et al. 2020, arXiv:2006.11239, section 4.
    """
    timesteps, (start, end) = as_count("timesteps", timesteps), _ends(beta_start, beta_end)
    return NoiseSchedule.from_betas(torch.linspace(start, end, timesteps, dtype=torch.float64))


def scaled_linear(timesteps: int, beta_start: float = 0.00085, beta_end: float = 0.012) -> NoiseSchedule:
    """sqrt(beta_t) evenly spaced, beta_t from beta_start to beta_end, for t = 1..T, as in latent diffusion.

    Args:
        timesteps, beta_start, beta_end: as of `linear`.

    Raises: ValueError or TypeError as `linear`.
    Reference: Rombach et al. 2022, arXiv:2112.10752.
    """
    timesteps, (start, end) = as_count("timesteps", timesteps), _ends(beta_start, beta_end)
    return NoiseSchedule.from_betas(torch.linspace(start**0.5, end**0.5, timesteps, dtype=torch.float64) ** 2)


def proportional(timesteps: int, max_beta: float = 0.02) -> NoiseSchedule:
    """beta_t = max_beta t / T for t = 1..T: the chain of Ho et al. 2020, with betas that begin near 0.

    Args:
        timesteps: T, at least 1.
        max_beta: beta_T, in (0, 1].

    Raises: ValueError or TypeError for other values.
    """
    timesteps = as_count("timesteps", timesteps)
    return NoiseSchedule.from_betas(max_beta * torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps)


def raised_cosine(timesteps: int) -> NoiseSchedule:
    """beta_t = (1 - cos(pi t / T)) / 2 = sin^2(pi t / 2T) for t = 1..T.

    It ends in pure noise: beta_T = 1 and alpha_bar_T = 0, so the last step determines nothing of x_0 from eps; use
    objective "x0" or "v".

    Args:
        timesteps: T, at least 1.

    Raises: ValueError or TypeError for another T.
    """
    timesteps = as_count("timesteps", timesteps)
    t = torch.arange(1, timesteps + 1, dtype=torch.float64)
    early = torch.log1p(-(torch.sin(math.pi * t / (2 * timesteps)) ** 2))
    late = 2 * torch.sin(math.pi * (timesteps - t) / (2 * timesteps)).log()
    return NoiseSchedule.from_log_alpha_bar(_from_zero(torch.where(2 * t < timesteps, early, late)))


def cosine(timesteps: int, s: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
    """alpha_bar_t = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) pi/2), with beta_t at most max_beta.

    Args:
        timesteps: T, at least 1.
        s: at least 0; it keeps the first betas from being too small.
        max_beta: in (0, 1).

    Raises: ValueError or TypeError for other values.
    Reference: Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17.
    """
    timesteps = as_count("timesteps", timesteps)
    if not s >= 0:
        raise ValueError(f"s: expected a number of at least 0, got {s}")
    u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    log_f = 2 * torch.cos((u + s) / (1 + s) * math.pi / 2).clamp(min=0).log()
    return _with_max_beta(log_f, max_beta)


def sigmoid(timesteps: int, start: float = -3.0, end: float = 3.0, max_beta: float = 0.999) -> NoiseSchedule:
    """alpha_bar_t = (S(end) - S(v_t)) / (S(end) - S(start)), v_t from start to end, S the logistic function.

    Args:
        timesteps: T, at least 1.
        start, end: start below end. Here tau of the paper is 1.
        max_beta: the largest beta_t, in (0, 1).

    Raises: ValueError or TypeError for other values.
    Reference: Jabri et al. 2022, arXiv:2212.11972, algorithm 1.
    """
    timesteps = as_count("timesteps", timesteps)
    if not start < end:
        raise ValueError(f"start, end: expected start below end, got {start} and {end}")
    v = torch.linspace(start, end, timesteps + 1, dtype=torch.float64)
    # S(e) - S(v) = S(e) S(-v) (1 - exp(v - e)): no two near numbers are subtracted.
    log_f = torch.nn.functional.logsigmoid(-v) + torch.log(-torch.expm1(v - end))
    return _with_max_beta(log_f, max_beta)


SCHEDULES: dict[str, Callable[..., NoiseSchedule]] = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "proportional": proportional,
    "raised_cosine": raised_cosine,
    "cosine": cosine,
    "sigmoid": sigmoid,
}


def make_schedule(schedule: "str | NoiseSchedule | Tensor", timesteps: int) -> NoiseSchedule:
    """The NoiseSchedule of a name of SCHEDULES and T, of betas (T,), or as it is.

    Raises: ValueError for an unknown name, and unless timesteps is the length of what is given.
    """
    timesteps = as_count("timesteps", timesteps)
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise ValueError(
                f"schedule: expected one of {', '.join(SCHEDULES)}, got {schedule!r}{did_you_mean(schedule, SCHEDULES)}"
            )
        with torch.device("cpu"):
            return SCHEDULES[schedule](timesteps)
    with torch.device("cpu"):
        made = schedule if isinstance(schedule, NoiseSchedule) else NoiseSchedule.from_betas(schedule)
    if made.timesteps != timesteps:
        raise ValueError(f"timesteps: expected {made.timesteps}, the length of the given schedule, got {timesteps}")
    return made


def grid(timesteps: int, steps: int | None) -> Tensor:
    """Levels from T down to 0 in `steps` near-equal strides, round(linspace(0, T, steps + 1)); all of them if None.

    ValueError unless 1 <= steps <= T.
    """
    number = timesteps if steps is None else integer(steps)
    if number is None or not 1 <= number <= timesteps:
        raise ValueError(f"steps: expected an integer from 1 to {timesteps}, got {steps!r}")
    return torch.linspace(0, timesteps, number + 1, dtype=torch.float64, device="cpu").round().long().flip(0)


def as_float64(name: str, values: Any) -> Tensor:
    """Numbers as a float64 tensor on the CPU. TypeError if they are not numbers."""
    # dtype in the call: a list of Python floats would become float32 first
    try:
        return torch.as_tensor(values, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected numbers, got {type(values).__name__}") from error


def _from_zero(log_terms: Tensor) -> Tensor:
    return torch.cat((log_terms.new_zeros(1), log_terms.cumsum(0)))


def _ends(beta_start: float, beta_end: float) -> tuple[float, float]:
    """Both, if they are numbers in (0, 1]."""
    for name, beta in (("beta_start", beta_start), ("beta_end", beta_end)):
        if not 0 < beta <= 1:
            raise ValueError(f"{name}: expected a number in (0, 1], got {beta}")
    return beta_start, beta_end


def _with_max_beta(log_f: Tensor, max_beta: float) -> NoiseSchedule:
    if not 0 < max_beta < 1:
        raise ValueError(f"max_beta: expected a number between 0 and 1, got {max_beta}")
    return NoiseSchedule.from_log_alpha_bar(_from_zero(log_f.diff().clamp(min=math.log1p(-max_beta))))
