"""A diffusion in continuous time: each sample has a time of its own, and the numbers of its level."""

import torch
from torch import Tensor, nn

from . import ops
from .denoiser import own_rows
from .diffusion import Diffusion
from .objective import Weighting, check_weighting, target_rows, weights
from .process import Process
from .support.settable import settable


class ContinuousDiffusion(Diffusion):
    """A Diffusion whose times are real numbers: the base of ScoreSDE, FlowMatching and Edm.

    `weighting`, one of `weightings` or a function, may be set later, as the options of Denoiser may.
    """

    weightings: tuple[str, ...] = ("simple", "min_snr")
    weighting: str | Weighting = settable("weighting")

    def __init__(
        self,
        model: nn.Module,
        process: Process,
        objective: str,
        loss: str,
        weighting: str | Weighting,
        clip: float | None,
    ) -> None:
        super().__init__(model, process, objective, loss, clip)
        self.weighting = weighting
        ContinuousDiffusion.apply_options(self)

    def apply_options(self) -> None:
        super().apply_options()
        check_weighting(self.weighting, self.weightings)

    def q_sample(
        self,
        x0: Tensor,
        t: float | Tensor,
        *,
        seed: int | Tensor | None = None,
        noise: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """x_t = alpha(t) x_0 + sigma(t) z, z ~ N(0, I).

        Args:
            x0: (B, ...), data.
            t: times, a number, () or (B,).
            seed, noise, out: as in fastdiff.ops.

        Returns: x_t, shaped and typed like x0.
        Raises: ValueError or TypeError, naming the argument.
        Reference: Song et al. 2021, arXiv:2011.13456, eq. 29.
        """
        rows, row = self.noising_rows(self.checked_times("x0", x0, t), x0.dtype)
        return ops.noising(x0, row, rows, seed=seed, noise=noise, out=out)

    def noising_rows(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        made = self.process.at(t.double())
        return own_rows(torch.stack((made.alpha, made.sigma), 1), dtype)

    def loss_rows(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        made = self.process.at(t.double())
        p, q = target_rows(made, self.objective)
        return own_rows(torch.stack((p, q, weights(made, self.objective, self.weighting)), 1), dtype)
