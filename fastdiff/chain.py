"""What DDPM and NCSN share: the levels 1..T of a chain, and a table of the numbers of each."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .cache import Tables
from .diffusion import Diffusion
from .objective import WEIGHTINGS, target_rows, weights
from .ops.checks import as_index, check_choice, check_floating, check_like
from .process import Chain
from .reference import work_dtype
from .rows import columns, make_rows
from .steps import check_signal, denoise_rows


class ChainDiffusion(Diffusion):
    """A Diffusion whose times are the levels 1..T of a chain, with a table of each level's numbers."""

    process: Chain
    _starts_at_data = True
    # float32 tables are stored as int32 bits, so that .half() or .bfloat16() of the module cannot round them.
    _noising_bits: Tensor
    _loss_bits: Tensor
    _denoise_bits: Tensor

    def __init__(
        self, model: nn.Module, process: Chain, objective: str, loss: str, weighting: str, clip: float | None
    ) -> None:
        super().__init__(model, process, objective, loss, clip)
        check_choice("weighting", weighting, WEIGHTINGS)
        self.schedule, self.timesteps = process.schedule, process.schedule.timesteps
        self.weighting = weighting
        self._tables = Tables()
        self._exact: dict[str, Tensor] = {}  # the same in float64, for data of that type
        schedule = self.schedule
        check_signal(schedule, torch.arange(1, self.timesteps + 1, device="cpu"), objective)
        p, q = target_rows(schedule, objective)
        w = weights(schedule, objective, weighting)
        for kind, rows in (
            ("noising", torch.stack((schedule.alpha, schedule.sigma), 1)),
            ("loss", torch.stack((p, q, w), 1)),
            ("denoise", denoise_rows(schedule, objective)),
        ):
            self._register(kind, rows)

    def _register(self, kind: str, rows: Tensor) -> None:
        self._exact[kind] = rows.contiguous()
        device = next((p.device for p in self.model.parameters()), None)
        bits = rows.float().contiguous().view(torch.int32).to(device)
        self.register_buffer(f"_{kind}_bits", bits, persistent=False)

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

        Reference: Ho et al. 2020, eq. 4.
        """
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

        Reference: Ho et al. 2020, eq. 2.
        """
        t = self.checked_times("x", x, t)

        def build() -> Tensor:
            level = torch.arange(1, self.timesteps + 1, device="cpu")
            alpha, beta = self.schedule.transition(level, level - 1)
            return torch.stack((alpha, beta.sqrt()), 1)

        rows = self._cached("q_step", build, x)
        return ops.noising(x, t - 1, rows, seed=seed, noise=noise, out=out)

    def q_posterior(self, x0: Tensor, x_t: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """(mean, variance) of q(x_{t-1} | x_t, x_0), shaped (B, ...) and (B, 1, ...).

        mean = c x_0 + d x_t and variance beta~_t are those of NoiseSchedule.posterior.

        Args:
            x0, x_t: (B, ...), data and state.
            t: levels in 1..T, an int, () or (B,).

        Reference: Ho et al. 2020, eq. 6 and 7.
        """
        check_like("x0", x0, x_t)
        t = self.checked_times("x_t", x_t, t)

        def build() -> Tensor:
            level = torch.arange(1, self.timesteps + 1, device="cpu")
            on_x0, on_x, variance = self.schedule.posterior(level, level - 1)
            return make_rows(on_x, from_x=on_x, from_pred=on_x0, noise=variance)

        rows = self._cached("q_posterior", build, x_t)
        variance = columns(rows).noise[t - 1].reshape(-1, *[1] * (x_t.ndim - 1))
        return ops.update(x_t, x0, rows, t - 1, noisy=False), variance

    def _cached(self, name: str, build: Callable[[], Tensor], like: Tensor, *key: Any) -> Tensor:
        """build() on the data's device and in the type of its state, built again only when the key changes."""
        device, dtype = like.device, work_dtype(like.dtype)
        return self._tables.get(name, lambda: build().to(device, dtype), (), self.schedule, device, dtype, *key)

    def noising_rows(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self._table("noising", dtype, t.device), t

    def loss_rows(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self._table("loss", dtype, t.device), t

    def denoise_rows(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self._table("denoise", dtype, t.device), t

    def _table(self, kind: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A registered table for data of a type: exact for float64."""
        if dtype == torch.float64:
            return self._exact[kind].to(device)
        bits: Tensor = getattr(self, f"_{kind}_bits")
        return bits.view(torch.float32)

    def checked_times(self, name: str, x: Tensor, t: Any) -> Tensor:
        """(B,) int64 levels in 1..T for the data x; uniformly drawn if t is None. ValueError or TypeError as there."""
        check_floating(name, x)
        if t is None:
            return torch.randint(1, self.timesteps + 1, x.shape[:1], device=x.device)
        levels = as_index("t", t, x)
        if isinstance(t, int):
            wrong = not 1 <= t <= self.timesteps
        else:  # a look at a GPU's tensor would wait for it
            visible = levels.device.type == "cpu" and not torch.compiler.is_compiling()
            wrong = visible and bool(((levels < 1) | (levels > self.timesteps)).any())
        if wrong:
            raise ValueError(f"t: expected levels from 1 to {self.timesteps}, got {t}")
        return levels.expand(len(x))
