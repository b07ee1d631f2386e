"""A diffusion over the levels of a chain: each number of a level comes from a table."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from . import ops, steps
from .diffusion import Diffusion
from .objective import WEIGHTINGS, Weighting, check_weighting, target_rows, weights
from .ops.checks import as_index, check_floating, check_like
from .process import Chain
from .rows import columns, make_rows
from .schedule import NoiseSchedule, make_schedule
from .support import transforms
from .support.scalars import integer
from .support.settable import settable


class Tables:
    """The tables that were made, as attributes. A copy or pickle starts without them, and makes its own.

    versions: of the tensors that they were made of.
    """

    def __init__(self, versions: tuple[int, ...] | None = None) -> None:
        self.versions = versions

    def __reduce__(self) -> tuple[Any, ...]:
        return Tables, ()


class ChainDiffusion(Diffusion):
    """A Diffusion whose times are the levels 1..T of a chain, with a table of each level's numbers.

    The tables are not buffers, so nothing averages, rounds, broadcasts or saves them. Each is made when it is first
    asked for, in float64 on the CPU, then cast and brought to the data's device. It is made again for data on another
    device, and after the schedule's tensors were changed in place. A change through `.data` or NumPy goes unseen: set
    `schedule` instead.

    `weighting` and `schedule` (also a name, or betas) may be set later, as the options of Denoiser may.
    """

    process: Chain
    weighting: str | Weighting = settable("weighting")
    _starts_at_data = True
    _rows_are_levels = True
    _named: tuple[str, NoiseSchedule] | None = None

    def __init__(
        self,
        model: nn.Module,
        process: Chain,
        objective: str,
        loss: str,
        weighting: str | Weighting,
        clip: float | None,
    ) -> None:
        super().__init__(model, process, objective, loss, clip)
        self.weighting = weighting
        ChainDiffusion.apply_options(self)

    def apply_options(self) -> None:
        super().apply_options()
        if not isinstance(self.process, Chain):
            raise TypeError(f"process: expected a Chain, got {type(self.process).__name__}")
        check_weighting(self.weighting, WEIGHTINGS)
        steps.check_signal(self.schedule, self._levels(), self.objective)
        self._tables = Tables()

    @property
    def schedule(self) -> NoiseSchedule:
        """The levels of the chain."""
        return self.process.schedule

    @schedule.setter
    def schedule(self, given: str | NoiseSchedule | Tensor) -> None:
        length = given.timesteps if isinstance(given, NoiseSchedule) else self.timesteps
        made = make_schedule(given, len(given) if isinstance(given, Tensor) and given.ndim else length)
        self.process = Chain(made)
        self._named = (given, made) if isinstance(given, str) else None

    @property
    def timesteps(self) -> int:
        """T, the number of levels."""
        return self.schedule.timesteps

    def _levels(self) -> Tensor:
        """1..T."""
        return torch.arange(1, self.timesteps + 1, device="cpu")

    def q_sample(
        self,
        x0: Tensor,
        t: int | Tensor,
        *,
        seed: int | Tensor | None = None,
        noise: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """x_t = alpha_t x_0 + sigma_t z, z ~ N(0, I).

        Args:
            x0: (B, ...), data.
            t: levels in 0..T, an int, () or (B,).
            seed, noise, out: as in fastdiff.ops.

        Returns: x_t, shaped and typed like x0.
        Raises: ValueError or TypeError, naming the argument.
        Reference: Ho et al. 2020, eq. 4.
        """
        check_floating("x0", x0)
        return ops.noising(x0, t, self._table("noising", x0.dtype, x0.device), seed=seed, noise=noise, out=out)

    def q_step(
        self,
        x: Tensor,
        t: int | Tensor,
        *,
        seed: int | Tensor | None = None,
        noise: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """One step of the forward chain, x_t ~ N(sqrt(1 - beta_t) x_{t-1}, beta_t I).

        Args:
            x: (B, ...), the state x_{t-1}.
            t: levels in 1..T, an int, () or (B,).
            seed, noise, out: as in fastdiff.ops.

        Returns: x_t, shaped and typed like x.
        Raises: ValueError or TypeError, naming the argument.
        Reference: Ho et al. 2020, eq. 2.
        """
        t = self.checked_times("x", x, t)
        rows = self._table("q_step", x.dtype, x.device)
        return ops.noising(x, t - 1, rows, seed=seed, noise=noise, out=out)

    def q_posterior(self, x0: Tensor, x_t: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """(mean, variance) of q(x_{t-1} | x_t, x_0), shaped (B, ...) and (B, 1, ...).

        mean = c x_0 + d x_t and variance beta~_t are those of NoiseSchedule.posterior.

        Args:
            x0, x_t: (B, ...), data and state.
            t: levels in 1..T, an int, () or (B,).

        Raises: ValueError or TypeError, naming the argument.
        Reference: Ho et al. 2020, eq. 6 and 7.
        """
        check_floating("x_t", x_t)
        check_like("x0", x0, x_t)
        t = self.checked_times("x_t", x_t, t)
        rows = self._table("q_posterior", x_t.dtype, x_t.device)
        variance = columns(rows).noise[t - 1].reshape(-1, *[1] * (x_t.ndim - 1))
        return ops.update(x_t, x0, rows, t - 1, noisy=False), variance

    def noising_rows(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self._table("noising", dtype, t.device), t

    def loss_rows(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self._table("loss", dtype, t.device), t

    def denoise_rows(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self._table("denoise", dtype, t.device), t

    def _table(self, kind: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A table for data of a type on a device, float64 for float64 and else float32."""
        name = f"{kind}_exact" if dtype == torch.float64 else kind
        if torch.compiler.is_compiling():
            if self._is_kept(kind, name, device):
                made: Tensor = getattr(self._tables, name)  # an input of the graph, and no constant in it
                return made
            return self._build(kind, name, device)
        return transforms.admitted(self._make(kind, name, device))

    def _make(self, kind: str, name: str, device: torch.device) -> Tensor:
        """The table, made unless it is there, and kept unless it has a gradient, as learned weights of a loss have."""
        schedule = self.process.schedule
        versions = tuple([t._version for t in (schedule.log_alpha, schedule.sigma) if not t.is_inference()])
        if self._tables.versions != versions:
            self._tables = Tables(versions)
        made: Tensor | None = getattr(self._tables, name, None)
        if made is None or made.device != device:
            with _disable_current_modes(), torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
                made = self._build(kind, name, device)
            if not (made.requires_grad or transforms.active()):  # there, all that is made belongs to the transform
                setattr(self._tables, name, made)
        return made

    def _build(self, kind: str, name: str, device: torch.device) -> Tensor:
        rows: Tensor = getattr(self, f"_{kind}_table")()
        return rows.to(device, torch.float64 if name != kind else torch.float32).contiguous()

    def _is_kept(self, kind: str, name: str, device: torch.device) -> bool:
        """Whether a table is kept; it is made. A trace runs this as it is, and does not look inside."""
        self._make(kind, name, device)
        return hasattr(self._tables, name)

    # torch.compiler.assume_constant_result would import the compiler.
    _is_kept._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _noising_table(self) -> Tensor:
        return torch.stack((self.schedule.alpha, self.schedule.sigma), 1)

    def _loss_table(self) -> Tensor:
        p, q = target_rows(self.schedule, self.objective)
        return torch.stack((p, q, weights(self.schedule, self.objective, self.weighting)), 1)

    def _denoise_table(self) -> Tensor:
        return steps.denoise_rows(self.schedule, self.objective)

    def _q_step_table(self) -> Tensor:
        alpha, beta = self.schedule.transition(self._levels(), self._levels() - 1)
        return torch.stack((alpha, beta.sqrt()), 1)

    def _q_posterior_table(self) -> Tensor:
        on_x0, on_x, variance = self.schedule.posterior(self._levels(), self._levels() - 1)
        return make_rows(on_x, from_x=on_x, from_pred=on_x0, noise=variance)

    def times_at(self, quantiles: Tensor) -> Tensor:
        return 1 + (quantiles.double() * self.timesteps).long().clamp(max=self.timesteps - 1)

    def checked_times(self, name: str, x: Tensor, t: Any) -> Tensor:
        """(B,) int64 levels in 1..T for the data x; drawn evenly if t is None. Errors name x or t."""
        check_floating(name, x)
        if t is None:
            return torch.randint(1, self.timesteps + 1, x.shape[:1], device=x.device)
        levels = as_index("t", t, x)
        number = None if isinstance(t, Tensor) else integer(t)
        if number is not None:
            wrong = not 1 <= number <= self.timesteps
        else:
            seen = transforms.visible(levels)
            wrong = seen is not None and bool(((seen < 1) | (seen > self.timesteps)).any())
        if wrong:
            other = "; timestep k of other libraries is level k + 1"
            raise ValueError(f"t: expected levels from 1 to {self.timesteps}, got {t}{other}")
        return levels.expand(x.shape[0])
