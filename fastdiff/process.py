"""Forward processes in continuous time: dx = f(t) x dt + g(t) dw, or x_t = alpha(t) x_0 + sigma(t) eps in closed form.

A process is a source of noise schedules: samplers and losses work on the levels that it puts at given times, so that
the same step tables serve chains and SDEs.

    VP        dx = -beta/2 x dt + sqrt(beta) dw                          the limit of DDPM for T to infinity
    sub-VP    dx = -beta/2 x dt + sqrt(beta (1 - exp(-2 B))) dw          B = integral of beta
    VE        dx = sqrt(d sigma^2 / dt) dw                               the limit of the NCSN ladder

Karras et al. 2022 is arXiv:2206.00364 (EDM).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .schedule import NoiseSchedule, as_float64, grid
from .support import transforms
from .support.scalars import as_count, as_number, as_positive, integer
from .support.settable import fixed

# Noise levels sigma / alpha between which Karras et al. 2022 sample.
KARRAS_RANGE = (0.002, 80.0)
Grid = tuple[NoiseSchedule, Tensor]


class Process(ABC):
    """x_t = alpha(t) x_0 + sigma(t) eps for t from `first`, the least noise that a model is trained on, to `last`.

    default_steps: the number of steps if a sampler is given none.
    straight: whether alpha = 1 - t and sigma = t, so that dx/dt is what objective "flow" predicts.
    first_scale: what makes data a state at `first`, where alpha is near 1 unless states are scaled.
    """

    first: float
    last: float
    default_steps: int
    straight = False
    first_scale = 1.0

    @abstractmethod
    def at(self, times: Tensor) -> NoiseSchedule:
        """A level for each of the times (N,), in that order, on their device; level 0 is then not data."""

    @abstractmethod
    def condition(self, times: Tensor) -> Tensor:
        """What the model sees of the times (N,): int64 indices, or numbers, float64 for float64 times."""

    @abstractmethod
    def time_of(self, ratio: Tensor) -> Tensor:
        """The times at which sigma / alpha = ratio, (N,) float64 each."""

    def noisiness(self, times: Tensor) -> Tensor:
        """How far times are on the way from data, 0, to noise, 1: the share of the last time."""
        return times / self.last

    def sigma_range(self) -> tuple[float, float]:
        """sigma / alpha at `first` and at `last`."""
        ends = self.at(torch.tensor([self.first, self.last], dtype=torch.float64, device="cpu"))
        low, high = (-ends.log_snr / 2).exp().tolist()
        return low, high

    def largest_ratio(self) -> float:
        """The largest finite sigma / alpha of the process; infinity for an SDE, whose formula goes on past `last`."""
        return math.inf

    def ratio_range(self, sigma_min: float | None = None, sigma_max: float | None = None) -> tuple[float, float]:
        """The range of sigma / alpha to sample in; None stands for the end of the process, or of [0.002, 80].
        ValueError unless 0 < sigma_min <= sigma_max < inf. A process without a largest ratio needs sigma_max."""
        low, high = self.sigma_range()
        if sigma_max is None and not math.isfinite(high):
            way = "as in steps=model.process.karras(18, sigma_max=80)"
            raise ValueError(f"sigma_max: expected a finite number, since sigma / alpha ends at infinity; {way}")
        low = max(low, KARRAS_RANGE[0]) if sigma_min is None else as_number("sigma_min", sigma_min)
        high = min(high, KARRAS_RANGE[1]) if sigma_max is None else as_number("sigma_max", sigma_max)
        if not 0 < low <= high < math.inf:
            raise ValueError(f"sigma_min, sigma_max: expected 0 < sigma_min <= sigma_max < inf, got {low} and {high}")
        return low, high

    def discretize(self, times: Tensor) -> NoiseSchedule:
        """Level 0 (data) and a level for each of the increasing times (N,) > 0."""
        levels = self.at(times)
        zero = levels.sigma.new_zeros(1)

        def from_zero(values: Tensor | None) -> Tensor | None:
            return None if values is None else torch.cat((zero.to(values), values))

        log_alpha, sigma = (torch.cat((zero, values)) for values in (levels.log_alpha, levels.sigma))
        time, drift, g2 = (from_zero(values) for values in (levels.time, levels.drift, levels.g2))
        return NoiseSchedule(log_alpha, sigma, levels.vp, time, drift, g2, levels.sigma_data)

    def grid(self, steps: int | Iterable[float] | None) -> Grid:
        """(levels, those to visit in turn).

        Args:
            steps: a number of equal strides from `last` to `first`, then data; default_steps if None. Or decreasing
                times, the last of which may be 0 (data).

        Raises: ValueError for anything else.
        """
        if isinstance(steps, Iterable) and integer(steps) is None:
            times = self._given(steps)
            times = times[:-1] if times[-1] == 0 else times
        else:
            n = as_count("steps", self.default_steps if steps is None else steps)
            times = torch.linspace(self.last, self.first, n + 1, dtype=torch.float64, device="cpu")
        made = self.discretize(times.flip(0))
        return made, torch.arange(len(times), -1, -1, device="cpu")

    def karras(
        self,
        steps: int | None = None,
        *,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        rho: float = 7.0,
        churn: float = 0.0,
        churn_min: float = 0.0,
        churn_max: float = math.inf,
    ) -> Grid:
        """EDM's grid: n ratios sigma / alpha, even in their power 1/rho from the largest to the smallest, then data.

            ratio_i = (max^(1/rho) + i / (n - 1) (min^(1/rho) - max^(1/rho)))^rho,    i = 0..n-1

        Args:
            steps: n, 18 if None.
            sigma_min, sigma_max: the range of ratios; that of the process within [0.002, 80] if None.
            rho: above 0; larger puts more levels near data.
            churn, churn_min, churn_max: a ratio within [churn_min, churn_max] is first raised by the factor
                1 + min(churn / n, sqrt(2) - 1), as far as the process is defined: a chain stops it at its last level
                with signal.

        A range of one ratio is one level, visited once. Raises: ValueError for other values. A process that ends
        without signal has no largest ratio: give sigma_max.
        Reference: Karras et al. 2022, eq. 5 and algorithm 2; the end of a chain: its reference code's `round_sigma`.
        """
        n = as_count("steps", 18 if steps is None else steps)
        low, high = self.ratio_range(sigma_min, sigma_max)
        rho, churn = as_positive("rho", rho), as_number("churn", churn)
        churn_min, churn_max = as_number("churn_min", churn_min), as_number("churn_max", churn_max)
        if not max(abs(math.log(low)), abs(math.log(high))) < 700 * rho:  # beyond, no float64 has sigma^(1/rho)
            raise ValueError(f"rho: expected a larger number for sigmas from {low:g} to {high:g}, got {rho}")
        if not churn >= 0:
            raise ValueError(f"churn: expected a number of at least 0, got {churn}")
        if math.isnan(churn_min) or math.isnan(churn_max):
            raise ValueError(f"churn_min, churn_max: expected numbers, got {churn_min} and {churn_max}")
        share = torch.linspace(0, 1, 1 if low == high else n, dtype=torch.float64, device="cpu")
        ratios = (high ** (1 / rho) + share * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        gamma = min(churn / n, math.sqrt(2) - 1)
        visited, end = [], self.largest_ratio()
        for ratio in ratios.tolist():
            raised = min(ratio * (1 + gamma), end) if churn_min <= ratio <= churn_max else ratio
            visited += [ratio, raised] if raised > ratio * (1 + 1e-9) else [ratio]
        levels, where = torch.tensor(visited, dtype=torch.float64, device="cpu").unique(return_inverse=True)
        return self.discretize(self.time_of(levels)), torch.cat((where + 1, where.new_zeros(1)))

    def ladder(self, steps: int | None) -> Grid:
        """Every level from noise to data, each visited `steps` times (100 if None); for chains alone."""
        raise ValueError("sampler: 'annealed_langevin' expected the levels of a ladder (NCSN), got an SDE")

    def _given(self, steps: Any) -> Tensor:
        """Decreasing times, (n + 1,) float64, between 0 and `last`."""
        if isinstance(steps, str):
            raise TypeError(f"steps: expected numbers, got {steps!r}; a grid is one of model.process.karras(18)")
        times = as_float64("steps", steps if isinstance(steps, Tensor) else list(steps))
        if times.ndim != 1 or len(times) < 2 or not bool((times.diff() < 0).all()):
            raise ValueError(f"steps: expected a number, or two or more decreasing times, got {times.tolist()}")
        if not (times[-1] >= 0 and times[0] <= self.last):
            hint = f"got {times[0]:g} to {times[-1]:g}; grids.given(process, sigmas) takes values of sigma / alpha"
            raise ValueError(f"steps: expected times from {self.last:g} to 0, {hint}")
        return times


class Chain(Process):
    """A NoiseSchedule as a process whose time is the level.

    Whole numbers are its levels. In between log alpha is interpolated linearly, so beta(t) is constant from level to
    level; so is log sigma, if the variance is not kept. The model sees t - 1, as published checkpoints are trained: an
    int64 index if all times are levels.
    """

    first = 1.0

    def __init__(self, schedule: NoiseSchedule) -> None:
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(f"schedule: expected a NoiseSchedule, got {type(schedule).__name__}")
        self._schedule = schedule
        self.last = float(schedule.timesteps)
        self.default_steps = schedule.timesteps

    @property
    def schedule(self) -> NoiseSchedule:
        """The levels; another schedule is another chain."""
        return self._schedule

    def largest_ratio(self) -> float:
        return float((-self.schedule.log_snr / 2).exp()[self._last_with_signal()])

    def _last_with_signal(self) -> int:
        with transforms.with_values():
            return self.schedule.timesteps - int(bool(self.schedule.log_alpha[-1] == -math.inf))

    # A trace asks once: it cannot look at a value. torch.compiler.assume_constant_result would import the compiler.
    _last_with_signal._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def at(self, times: Tensor) -> NoiseSchedule:
        # Unless the variance is kept, log sigma is infinite at level 0: nothing to interpolate from.
        made, lowest = self.schedule, 0 if self.schedule.vp else 1
        seen = transforms.visible(times)
        if seen is not None and not bool(((seen >= lowest) & (seen <= self.last)).all()):
            raise ValueError(f"times: expected them from {lowest} to {self.last:g}, got {seen.tolist()}")
        log_alpha, sigma = (transforms.admitted(v).to(times.device) for v in (made.log_alpha, made.sigma))
        upper = times.ceil().long().clamp(min=lowest + 1).clamp(max=made.timesteps)
        share = times - (upper - 1)

        def between(values: Tensor) -> Tensor:
            # The ends as they are: 0 times -inf would be NaN.
            low, high = values[upper - 1], values[upper]
            return torch.where(share == 1, high, torch.where(share == 0, low, low + share * (high - low)))

        drift = log_alpha[upper] - log_alpha[upper - 1]
        here = between(log_alpha)
        if made.vp:
            return NoiseSchedule(here, torch.expm1(2 * here).abs().sqrt(), True, times, drift, -2 * drift)
        log_sigma = sigma.log()
        spread = between(log_sigma).exp()
        growth = log_sigma[upper] - log_sigma[upper - 1]
        return NoiseSchedule(here, spread, False, times, drift, 2 * spread**2 * (growth - drift))

    def condition(self, times: Tensor) -> Tensor:
        # Below the first level, where only an inversion looks, the model is asked at the first.
        return (times - 1).clamp(min=0)

    def time_of(self, ratio: Tensor) -> Tensor:
        made = self.schedule
        with transforms.with_values():  # log alpha = -log(1 + ratio^2) / 2, and time is linear in it
            known = -made.log_alpha if made.vp else -made.log_snr[1:] / 2
        wanted = torch.log1p(ratio**2) / 2 if made.vp else ratio.log()
        # No level without signal has a ratio, and none between it and the one before.
        last = self._last_with_signal()
        known = transforms.admitted(known).to(ratio.device)[: last + made.vp]
        if last == 0:
            raise ValueError("sigma: expected a schedule with signal at one level at least, got one of noise alone")
        # Both ends may have come from sigma_range with a rounding.
        inside = wanted.clamp(known[0], known[-1])
        found = transforms.bare((wanted - inside).abs() <= 1e-9 * inside.abs() + 1e-12)
        if found is not None and not bool(found.all()):
            low, high = self.sigma_range()[0], self.largest_ratio()
            raise ValueError(f"sigma: expected levels from {low:.4g} to {high:.4g}, those of the schedule")
        wanted = inside
        if len(known) == 1:
            return torch.full_like(wanted, self.last if not made.vp else 0.0)
        upper = torch.searchsorted(known, wanted).clamp(1, len(known) - 1)
        share = (wanted - known[upper - 1]) / (known[upper] - known[upper - 1])
        return upper - 1 + share + (0 if made.vp else 1)

    def grid(self, steps: int | Iterable[float] | None) -> Grid:
        """(the schedule, levels to visit).

        Args:
            steps: a number from 1 to T, which visits round(linspace(0, T, steps + 1)) downwards; all levels if None. Or
                decreasing levels.

        Raises: ValueError for anything else.
        """
        if isinstance(steps, Iterable) and integer(steps) is None:
            levels = self._given(steps)
            if bool((levels != levels.round()).any()):
                raise ValueError(f"steps: expected whole levels, got {levels.tolist()}")
            return self.schedule, levels.long()
        return self.schedule, grid(self.schedule.timesteps, steps)  # type: ignore[arg-type]

    def ladder(self, steps: int | None) -> Grid:
        n = as_count("steps", 100 if steps is None else steps)
        levels = torch.arange(self.schedule.timesteps, 0, -1, device="cpu").repeat_interleave(n)
        return self.schedule, torch.cat((levels, torch.tensor([1, 0], device="cpu")))


class Ladder(Chain):
    """The noise levels of NCSN: sigma_i geometric from sigma_min (level 1) to sigma_max (level n), and alpha = 1. The
    model sees sigma. Raises: ValueError unless 0 < sigma_min < sigma_max, and there are at least 2 levels.
    Reference: Song & Ermon 2019, arXiv:1907.05600, section 4.2."""

    sigma_min: float = fixed()
    sigma_max: float = fixed()

    def __init__(self, sigma_max: float = 1.0, sigma_min: float = 0.01, levels: int = 10) -> None:
        self.sigma_min, self.sigma_max = _sigmas(sigma_min, sigma_max)
        ends = math.log(sigma_min), math.log(sigma_max)
        levels = as_count("levels", levels)
        if levels == 1:
            raise ValueError("levels: expected at least 2, from sigma_min to sigma_max, got 1")
        sigma = torch.linspace(*ends, levels, dtype=torch.float64, device="cpu").exp()
        super().__init__(NoiseSchedule.from_alpha_sigma(torch.ones_like(sigma), sigma))

    def condition(self, times: Tensor) -> Tensor:
        # Level 0 is data, where only an inversion looks: the model is asked at the first.
        return self.at(times.double().clamp(min=1)).sigma


class VP(Process):
    """Variance preserving: beta(t) = beta_min + t (beta_max - beta_min), B(t) its integral, t in [1e-3, 1];
    alpha = exp(-B/2), sigma^2 = 1 - exp(-B), f = -beta/2, g^2 = beta.

    DDPM with beta_i = beta(i/T)/T tends to it as T grows, and is not equal to it: alpha_bar at the end is 4.0358e-5 for
    beta = 1e-4..0.02 with T = 1000, and 4.3186e-5 here. The model sees 999 t.
    Raises: ValueError unless 0 < beta_min <= beta_max. Reference: Song et al. 2021, arXiv:2011.13456, eq. 11, 32, 33.
    """

    first, last, default_steps = 1e-3, 1.0, 1000
    beta_min: float = fixed()
    beta_max: float = fixed()

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        beta_min, beta_max = as_number("beta_min", beta_min), as_number("beta_max", beta_max)
        if not 0 < beta_min <= beta_max < math.inf:
            raise ValueError(f"beta_min, beta_max: expected 0 < beta_min <= beta_max, got {beta_min} and {beta_max}")
        self.beta_min, self.beta_max = beta_min, beta_max

    def _beta(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """(beta, B) at the times."""
        slope = self.beta_max - self.beta_min
        return self.beta_min + times * slope, times * (self.beta_min + 0.5 * slope * times)

    def at(self, times: Tensor) -> NoiseSchedule:
        beta, total = self._beta(times.double())
        return NoiseSchedule(-total / 2, (-torch.expm1(-total)).sqrt(), True, times.double(), -beta / 2, beta)

    def condition(self, times: Tensor) -> Tensor:
        return 999 * times

    def time_of(self, ratio: Tensor) -> Tensor:
        return self._time_of_total(torch.log1p(ratio**2))

    def _time_of_total(self, total: Tensor) -> Tensor:
        slope = self.beta_max - self.beta_min
        return 2 * total / (self.beta_min + (self.beta_min**2 + 2 * slope * total).sqrt())


class SubVP(VP):
    """Sub-VP: beta and alpha of VP, sigma = 1 - exp(-B), g^2 = beta (1 - exp(-2 B)).
    Raises: as VP. Reference: Song et al. 2021, arXiv:2011.13456, eq. 27, 29."""

    def at(self, times: Tensor) -> NoiseSchedule:
        beta, total = self._beta(times.double())
        g2 = -beta * torch.expm1(-2 * total)
        return NoiseSchedule(-total / 2, -torch.expm1(-total), False, times.double(), -beta / 2, g2)

    def time_of(self, ratio: Tensor) -> Tensor:
        # sigma / alpha = exp(B/2) - exp(-B/2)
        return self._time_of_total(2 * torch.asinh(ratio / 2))


class VE(Process):
    """Variance exploding: sigma = sigma_min (sigma_max / sigma_min)^t, alpha = 1, f = 0,
    g^2 = 2 sigma^2 log(sigma_max / sigma_min), t in [1e-5, 1]. The model sees sigma.
    Raises: ValueError unless 0 < sigma_min < sigma_max. Reference: Song et al. 2021, arXiv:2011.13456, eq. 9, 30."""

    first, last, default_steps = 1e-5, 1.0, 1000
    sigma_min: float = fixed()
    sigma_max: float = fixed()

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0) -> None:
        self.sigma_min, self.sigma_max = _sigmas(sigma_min, sigma_max)

    @property
    def log_range(self) -> float:
        """log(sigma_max / sigma_min)."""
        return math.log(self.sigma_max / self.sigma_min)

    def at(self, times: Tensor) -> NoiseSchedule:
        times = times.double()
        sigma = self.sigma_min * (self.log_range * times).exp()
        zero = torch.zeros_like(times)
        return NoiseSchedule(zero, sigma, False, times, zero, 2 * self.log_range * sigma**2)

    def condition(self, times: Tensor) -> Tensor:
        return self.at(times).sigma

    def time_of(self, ratio: Tensor) -> Tensor:
        return ((ratio / self.sigma_min).log() / self.log_range).where(ratio != self.sigma_min, 1e-300)  # 0 is data

    def sigma_range(self) -> tuple[float, float]:
        """sigma at time 0 and at `last`."""
        return self.sigma_min, self.sigma_min * math.exp(self.log_range)


SDES: dict[str, type[Process]] = {"vp": VP, "subvp": SubVP, "ve": VE}


def _sigmas(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    low, high = as_number("sigma_min", sigma_min), as_number("sigma_max", sigma_max)
    if not 0 < low < high < math.inf:
        raise ValueError(f"sigma_min, sigma_max: expected 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    return low, high
