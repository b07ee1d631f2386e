"""How well drawn digits match real ones: the Frechet distance of their pixels, and what a classifier sees in them."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastdiff.training.data import digits
from fastdiff.training.features import classified


def _sqrt(matrix: np.ndarray) -> np.ndarray:
    """Square root of a symmetric positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    root: np.ndarray = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return root


def frechet_gaussian(m1: np.ndarray, s1: np.ndarray, m2: np.ndarray, s2: np.ndarray) -> float:
    """Squared Frechet distance of two Gaussians N(m1, S1) and N(m2, S2).

        d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2)

    The matrix under the root is symmetric, so singular covariances (pixels that never change) do no harm.

    Args:
        m1, m2: means, (D,), float64.
        s1, s2: covariances, (D, D), float64.

    Returns: d^2.
    Reference: Dowson and Landau 1982, eq. 4; Heusel et al. 2017 (FID), eq. 6, which has the same trace.
    """
    root = _sqrt(s1)
    cross = np.sqrt(np.linalg.eigvalsh(root @ s2 @ root).clip(0)).sum()
    return float(((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * cross)


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """`frechet_gaussian` of Gaussians fitted to the pixels of two sets of images.

    Args:
        x, y: images, (N, C, H, W) in [-1, 1], at least 2 each.

    Raises: ValueError for fewer images, or images of different shapes.
    """
    if min(len(x), len(y)) < 2 or x.shape[1:] != y.shape[1:]:
        raise ValueError(f"x, y: expected 2 or more images of one shape, got {tuple(x.shape)}, {tuple(y.shape)}")
    a, b = (images.flatten(1).double().numpy() for images in (x, y))
    return frechet_gaussian(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))


@dataclass
class Report:
    """Figures of the samples. A name that ends in _real is the same figure of real digits.

    Args:
        frechet_distance: of the samples to the held-out half; _real is that of the train half to the held-out half.
        classifier_confidence: mean of the largest probability; _real is that on the held-out half.
        classifier_accuracy: on the held-out half, by a network trained on the train half.
        class_entropy: of the histogram of predicted classes, in nats; _max is ln 10.
        nearest_distance: mean L2 distance to the nearest image of the train half; _real is that from the held-out
            half. Samples that are far nearer than real digits are copies.
    """

    n_samples: int
    frechet_distance: float
    frechet_distance_real: float
    classifier_confidence: float
    classifier_confidence_real: float
    classifier_accuracy: float
    class_entropy: float
    class_entropy_max: float
    classes_present: int
    class_counts: list[int]
    nearest_distance: float
    nearest_distance_real: float


def evaluate(samples: Tensor) -> Report:
    """Compare samples with the real digits.

    Args:
        samples: (N, 1, 8, 8) in [-1, 1], N of at least 2.

    Raises: ValueError for another shape.
    """
    if samples.ndim != 4 or samples.shape[1:] != (1, 8, 8) or len(samples) < 2:
        raise ValueError(f"samples: expected (N, 1, 8, 8) with N of at least 2, got {tuple(samples.shape)}")
    train_images, _, held_out_images, held_out_labels = digits()
    train, held_out = train_images[:], held_out_images[:]
    seen, seen_real = (classified("digits", images)[1].softmax(1).numpy() for images in (samples, held_out))
    counts = np.bincount(seen.argmax(1), minlength=10)
    share = counts[counts > 0] / counts.sum()
    return Report(
        n_samples=len(samples),
        frechet_distance=frechet_distance(samples, held_out),
        frechet_distance_real=frechet_distance(train, held_out),
        classifier_confidence=float(seen.max(1).mean()),
        classifier_confidence_real=float(seen_real.max(1).mean()),
        classifier_accuracy=float((seen_real.argmax(1) == held_out_labels.numpy()).mean()),
        class_entropy=float(-(share * np.log(share)).sum()),
        class_entropy_max=float(np.log(10)),
        classes_present=int((counts > 0).sum()),
        class_counts=counts.tolist(),
        nearest_distance=_nearest(samples, train),
        nearest_distance_real=_nearest(held_out, train),
    )


def _nearest(x: Tensor, y: Tensor) -> float:
    """Mean distance from an image of x to the nearest one of y."""
    return float(torch.cdist(x.flatten(1), y.flatten(1)).amin(1).mean())
