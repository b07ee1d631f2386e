"""k-diffusion's samplers by their formulas, for a denoiser D(x; sigma) of x = x_0 + sigma eps and sigmas that end at 0.

Each gives the state after every step. Those with noise take that of all steps, (n, B, ...).
"""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]


def sample_euler(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[Tensor]:
    """x + (s' - s) (x - D(x; s)) / s."""
    for s, after in itertools.pairwise(sigmas):
        x = x + (after - s) * (x - denoise(x, s.expand(len(x)))) / s
        yield x


def sample_heun(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[Tensor]:
    """Karras et al. 2022, algorithm 1."""
    for s, after in itertools.pairwise(sigmas):
        slope = (x - denoise(x, s.expand(len(x)))) / s
        end = x + (after - s) * slope
        x = end if after == 0 else x + (after - s) / 2 * (slope + (end - denoise(end, after.expand(len(x)))) / after)
        yield x


def sample_dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[Tensor]:
    """Lu et al. 2022, arXiv:2211.01095, algorithm 2, with alpha = 1."""
    return sample_dpmpp_2m_sde(denoise, x, sigmas, x[None], eta=0.0)


def sample_dpmpp_2m_sde(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Tensor, eta: float = 1.0
) -> Iterator[Tensor]:
    """s' / s e^(-eta h) x + (1 - e^(-(1 + eta) h)) (D + h / (2 h_before) (D - D_before)) + s' sqrt(1 - e^(-2 eta h)) z,
    with h = ln(s / s')."""
    before = last = None
    for k, (s, after) in enumerate(itertools.pairwise(sigmas)):
        x0 = denoise(x, s.expand(len(x)))
        if after == 0:
            yield x0
            return
        h = (s / after).log()
        best = x0 if before is None else x0 + (x0 - before) * h / (2 * last)
        x = after / s * (-eta * h).exp() * x - torch.expm1(-(1 + eta) * h) * best
        if eta:
            x = x + after * (-torch.expm1(-2 * eta * h)).sqrt() * noise[k]
        before, last = x0, h
        yield x


def sample_dpmpp_3m_sde(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Tensor, eta: float = 1.0
) -> Iterator[Tensor]:
    """e^-H x + (1 - e^-H) D + p slope + (1/2 - p / H) bend + s' sqrt(1 - e^(-2 eta h)) z, with H = (1 + eta) h and
    p = 1 - (1 - e^-H) / H. The slope and the bend are those of D, per h, by its last values."""
    known: list[Tensor] = []
    lengths: list[Tensor] = []
    for k, (s, after) in enumerate(itertools.pairwise(sigmas)):
        known.insert(0, denoise(x, s.expand(len(x))))
        if after == 0:
            yield known[0]
            return
        h = (s / after).log()
        total = (1 + eta) * h
        p = 1 + torch.expm1(-total) / total
        x = (-total).exp() * x - torch.expm1(-total) * known[0]
        if len(known) > 1:
            first = (known[0] - known[1]) * h / lengths[0]
            slope, bend = first, 0.0
            if len(known) > 2:
                second = (known[1] - known[2]) * h / lengths[1]
                bend = (first - second) * h / (lengths[0] + lengths[1])
                slope = first + bend * lengths[0] / h
            x = x + p * slope + (0.5 - p / total) * bend
        if eta:
            x = x + after * (-torch.expm1(-2 * eta * h)).sqrt() * noise[k]
        lengths.insert(0, h)
        yield x


# By the names that our samplers have; the latter two take noise.
RULES: dict[str, Callable[..., Iterator[Tensor]]] = {
    "ddim": sample_euler,
    "heun": sample_heun,
    "dpm++2m": sample_dpmpp_2m,
    "dpm++2m_sde": sample_dpmpp_2m_sde,
    "dpm++3m_sde": sample_dpmpp_3m_sde,
}
