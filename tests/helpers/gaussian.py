"""Data N(MEAN, STD^2), on which the exact prediction makes every sampler an affine map of its start and its noises."""

import functools
from typing import Any

import torch
from objectives import target
from torch import Tensor, nn

from fastdiff.diffusion import Diffusion
from fastdiff.edm import Preconditioned
from fastdiff.flow import Flow
from fastdiff.process import VE, VP, Ladder, Process
from fastdiff.rows import columns

MEAN, STD = (0.3, -0.5, 0.0, 0.2), (0.5, 0.1, 1.0, 0.02)


def alpha_sigma(process: Process, condition: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma), (B, 1) float64, from what the model sees: sigma, ln(sigma) / 4, 1000 t, 999 t, or t - 1."""
    c = condition.double()
    if isinstance(process, Flow):
        return (1 - c / 1000)[:, None], (c / 1000)[:, None]
    if isinstance(process, Preconditioned):
        scale = ((8 * c).exp() + process.sigma_data**2).rsqrt()
        return scale[:, None], (scale * (4 * c).exp())[:, None]
    if isinstance(process, VE | Ladder):
        return torch.ones_like(c)[:, None], c[:, None]
    made = process.at(c / 999 if isinstance(process, VP) else c + 1)
    return made.alpha[:, None], made.sigma[:, None]


class Exact(nn.Module):
    """The best prediction for the data: with r = (x_t - alpha MEAN) / (alpha^2 STD^2 + sigma^2), E[x_0 | x_t] = MEAN +
    alpha STD^2 r, E[eps | x_t] = sigma r, and the others follow."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype_of_state = nn.Parameter(torch.zeros((), dtype=dtype))
        self.mean, self.var = (torch.tensor(v, dtype=torch.float64) for v in (MEAN, [s * s for s in STD]))

    def time_arguments(self, c: Tensor) -> dict[str, Tensor]:
        """The prediction is slope x + rest, (N, 4) each: a loop asks for both once."""
        alpha, sigma = alpha_sigma(self.process, c)
        slope = 1 / (alpha**2 * self.var + sigma**2)  # of r
        rest = -alpha * self.mean * slope
        predicted = functools.partial(target, self.objective, alpha, sigma)  # linear in (x_0, eps)
        return {
            "slope": predicted(alpha * self.var * slope, sigma * slope),
            "rest": predicted(self.mean + alpha * self.var * rest, sigma * rest),
        }

    def forward(self, x: Tensor, c: Tensor, slope: Tensor | None = None, rest: Tensor | None = None) -> Tensor:
        if slope is None or rest is None:
            return self.forward(x, c, **self.time_arguments(c))
        return (slope * x.double() + rest).to(x.dtype)


def exact(made: type[Diffusion], *args: Any, dtype: torch.dtype = torch.float64, **options: Any) -> Diffusion:
    """A diffusion of that class, whose model predicts exactly, unclipped."""
    model = Exact(dtype)
    diffusion = made(model, *args, clip=None, **options)
    model.process, model.objective = diffusion.process, diffusion.objective
    return diffusion


def moments(diffusion: Diffusion, sampler: Any = None, steps: Any = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the samples, without chance: sample 0 starts from 0 without noise, sample 1 from
    one standard deviation of the prior, and each further one has noise 1 at one step, so that the differences from
    sample 0 are the coefficients of the map."""
    sampler = diffusion.default_sampler if sampler is None else sampler
    table = diffusion.step_table(sampler, steps)
    where = {k: 2 + i for i, k in enumerate((columns(table.rows).noise != 0).nonzero().flatten().tolist())}
    x_T = torch.zeros(2 + len(where), 4, dtype=diffusion.model.dtype_of_state.dtype)
    x_T[1] = table.start

    def noise(k: int) -> Tensor:
        z = torch.zeros_like(x_T)
        if k in where:
            z[where[k]] = 1
        return z

    given = noise if where else None
    x = diffusion.sample(tuple(x_T.shape), x_T=x_T, noise=given, sampler=sampler, steps=steps, **options).double()
    return x[0], (x[1:] - x[0]).norm(dim=0)
