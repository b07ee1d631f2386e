"""Samples against real data, by features: the figures of `fastdiff eval`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.files import replacing
from fastdiff.training.data.sources import Source, reason, scaled, warn_left_out
from fastdiff.training.features import Features
from fastdiff.training.metrics import Sums, frechet, inception_score, kernel_distance, precision_recall

# Features that KID, precision and recall compare, at most, of real data and of samples.
KEPT = 10_000


@dataclass
class Collected:
    """The features of many images: their sums, the first KEPT of them, and their logits if there are any."""

    sums: Sums
    kept: Tensor
    logits: Tensor | None


def collect(batches: Iterable[Tensor], features: Features) -> Collected:
    """The features of images that come in batches (B, C, H, W). Raises ValueError if there are none."""
    sums: Sums | None = None
    kept: list[Tensor] = []
    logits: list[Tensor] = []
    for images in batches:
        with torch.no_grad():
            found, scores = features(images)
        sums = sums or Sums(found.shape[1])
        sums.add(found)
        if sums.count <= KEPT:
            kept.append(found.cpu().double())
        if scores is not None:
            logits.append(scores.cpu().double())
    if sums is None:
        raise ValueError("features: expected images, got none")
    return Collected(sums, torch.cat(kept), torch.cat(logits) if logits else None)


def in_order(source: Source, batch_size: int) -> Iterator[Tensor]:
    """All data of a source as float32, in batches. What cannot be read is left out and named on stderr."""
    skipped: dict[str, str] = {}
    values: list[Tensor] = []
    for index in range(len(source)):
        try:
            values.append(source.read(index))
        except Exception as error:  # decoders of broken files raise whatever they meet
            skipped[source.name(index)] = reason(error)
        if len(values) == batch_size or (values and index == len(source) - 1):
            yield scaled(torch.stack(values), source.white)
            values = []
    if skipped:
        warn_left_out(skipped, len(source))


def assess(
    samples: Tensor, source: Source | None, features: Features, batch_size: int, reference: Path | None = None
) -> dict[str, Any]:
    """The figures of samples.

    Args:
        samples: (N, C, H, W) in [-1, 1], N of 4 or more.
        source: the real data; None if `reference` has their statistics.
        features: of images.
        batch_size: images at a time.
        reference: a .npz file with the mean `mu` and the covariance `sigma` of the real data's features. It is read if
            it is there, else written.

    Returns: frechet_distance; with `source` kernel_distance, precision and recall too; with logits inception_score.
    Raises: ValueError for too few samples, or a reference of another size.
    """
    drawn = collect(samples.split(batch_size), features)
    figures: dict[str, Any] = {"n_samples": len(samples)}
    if reference and reference.exists():
        statistics = read_statistics(reference)
    elif source is None:
        raise ValueError("reference: expected real data, or a file of their statistics")
    else:
        real = collect(in_order(source, batch_size), features)
        statistics = real.sums.statistics()
        figures["kernel_distance"], figures["kernel_distance_std"] = kernel_distance(real.kept, drawn.kept)
        figures["precision"], figures["recall"] = precision_recall(real.kept, drawn.kept)
        if reference:
            with replacing(reference) as temporary, open(temporary, "wb") as file:
                np.savez(file, mu=statistics[0], sigma=statistics[1])
    mine = drawn.sums.statistics()
    if mine[0].shape != statistics[0].shape:
        raise ValueError(f"{reference}: expected {len(mine[0])} features, got {len(statistics[0])}")
    figures["frechet_distance"] = frechet(mine, statistics)
    if drawn.logits is not None:
        figures["inception_score"], figures["inception_score_std"] = inception_score(drawn.logits)
    return figures


def read_statistics(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(mu, sigma) of a .npz file, float64. Raises ValueError naming the file if it has no such arrays."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            mean, covariance = (np.asarray(stored[name], np.float64) for name in ("mu", "sigma"))
    except OSError:
        raise
    except Exception as error:  # a damaged file is met by any exception
        raise ValueError(f"{path}: expected the arrays mu and sigma ({' '.join(str(error).split())})") from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"{path}: expected mu (D,) and sigma (D, D), got {mean.shape} and {covariance.shape}")
    return mean, covariance
