"""How far samples are from real data, by features of both: FID, KID, inception score, precision and recall."""

import numpy as np
import torch
from torch import Tensor

from fastdiff.training.evaluate import frechet_gaussian

# KID: so many subsets of at most so many samples.
SUBSETS, SUBSET_SIZE = 100, 1000
# Precision and recall: the neighbour whose distance is the radius.
NEIGHBOUR = 3
SPLITS = 10
CHUNK = 1000


class Sums:
    """Sums of features that give their mean and covariance, in float64; sums of several processes add up.

    Args:
        size: D, how many numbers a feature has.
    """

    def __init__(self, size: int) -> None:
        self.count = torch.zeros((), dtype=torch.float64)
        self.sum = torch.zeros(size, dtype=torch.float64)
        self.outer = torch.zeros(size, size, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Take in features (B, D)."""
        x = features.detach().double().cpu()
        self.count += len(x)
        self.sum += x.sum(0)
        self.outer += x.T @ x

    def all_reduce(self) -> None:
        """Add up the sums of all processes, if there are several."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for part in (self.count, self.sum, self.outer):
                torch.distributed.all_reduce(part)

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """(mean (D,), covariance (D, D), without bias). Raises ValueError for fewer than 2 samples."""
        if self.count < 2:
            raise ValueError(f"features: expected those of 2 samples or more, got {int(self.count)}")
        mean = self.sum / self.count
        covariance = (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return mean.numpy(), covariance.numpy()


def frechet(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> float:
    """The Frechet distance of two (mean, covariance); with Inception's features the FID. See `frechet_gaussian`.

    Reference: Heusel et al. 2017, arXiv:1706.08500.
    """
    return frechet_gaussian(*first, *second)


def kernel_distance(real: Tensor, drawn: Tensor, seed: int = 0) -> tuple[float, float]:
    """KID: the squared maximum mean discrepancy with the kernel (x.y / D + 1)^3, without bias.

    Args:
        real, drawn: features (N, D) and (M, D), 2 or more each.
        seed: of the subsets.

    Returns: mean and standard deviation over SUBSETS subsets.
    Reference: Binkowski et al. 2018, arXiv:1801.01401, section 4.
    """
    size, generator = min(SUBSET_SIZE, len(real), len(drawn)), torch.Generator().manual_seed(seed)
    found = []
    for _ in range(SUBSETS):
        x, y = (f[torch.randperm(len(f), generator=generator)[:size]].double() for f in (real, drawn))
        xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = sum((k.sum() - k.trace()) / (size * (size - 1)) for k in (xx, yy))
        found.append(float(within - 2 * xy.mean()))
    return float(np.mean(found)), float(np.std(found))


def inception_score(logits: Tensor) -> tuple[float, float]:
    """exp E[KL(p(y|x) || p(y))] of a classifier's logits; higher is better.

    Args:
        logits: (N, K), of K classes.

    Returns: mean and standard deviation over SPLITS parts, in the order given.
    Reference: Salimans et al. 2016, arXiv:1606.03498, section 4.
    """
    found = []
    for part in logits.double().chunk(min(SPLITS, len(logits))):
        log_p = part.log_softmax(1)
        log_mean = log_p.logsumexp(0) - np.log(len(part))
        found.append(float((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp()))
    return float(np.mean(found)), float(np.std(found))


def precision_recall(real: Tensor, drawn: Tensor) -> tuple[float, float]:
    """The share of drawn samples among real ones, and of real ones among drawn samples.

    A sample is among others if it lies within the distance of one of them to its third neighbour.

    Args:
        real, drawn: features (N, D) and (M, D), more than NEIGHBOUR each.

    Raises: ValueError for fewer.
    Reference: Kynkaanniemi et al. 2019, arXiv:1904.06991, eq. 1 and 2.
    """
    if min(len(real), len(drawn)) <= NEIGHBOUR:
        raise ValueError(f"features: expected those of more than {NEIGHBOUR} samples, got {len(real)}, {len(drawn)}")
    return _share_among(drawn, real), _share_among(real, drawn)


def _share_among(x: Tensor, others: Tensor) -> float:
    # The nearest of a sample's neighbours is the sample itself.
    radii = [torch.cdist(part, others.double()).kthvalue(NEIGHBOUR + 1).values for part in others.double().split(CHUNK)]
    radius = torch.cat(radii)
    inside = [(torch.cdist(part, others.double()) <= radius).any(1) for part in x.double().split(CHUNK)]
    return float(torch.cat(inside).double().mean())
