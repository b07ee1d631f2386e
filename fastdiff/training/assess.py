"""Samples against real data, by features: the figures of `fastdiff eval`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.files import replacing
from fastdiff.support.errors import reason
from fastdiff.training.data.sources import Source, finite, scaled, warn_left_out
from fastdiff.training.features import Features
from fastdiff.training.metrics import Sums, frechet, inception_score, kernel_distance, precision_recall
from fastdiff.training.ranks import ALONE, Ranks

# Features that KID, precision and recall compare, at most, of real data and of samples.
KEPT = 10_000


@dataclass
class Collected:
    """The features of many images: their sums, on all processes; the first KEPT of them, and their logits if there are
    any, on the process that writes."""

    sums: Sums
    kept: Tensor
    logits: Tensor | None


def collect(batches: Iterable[tuple[int, Tensor]], features: Features, ranks: Ranks = ALONE) -> Collected:
    """The features of images that come in batches, whichever process has which.

    Args:
        batches: (the number of a batch, its images (B, C, H, W)) of this process.
        features: of images.
        ranks: the processes.

    Raises: ValueError if there are no images, or features are not finite.
    """
    sums: Sums | None = None
    kept: dict[int, Tensor] = {}
    logits: dict[int, Tensor] = {}
    for number, images in batches:
        with torch.no_grad():
            found, scores = features(images)
        if len(found) != len(images) or not found.isfinite().all():
            got = f"{len(found)} rows" if len(found) != len(images) else "NaN or infinity"
            raise ValueError(f"features: expected finite numbers of {len(images)} images, got {got}")
        sums = sums or Sums(found.shape[1])
        if sums.count < KEPT:
            kept[number] = found.cpu()
        sums.add(found)
        if scores is not None:
            logits[number] = scores.cpu()
    size = ranks.largest(len(sums.sum) if sums else 0)
    if not size:
        raise ValueError("features: expected images, got none")
    sums = sums or Sums(size)
    if ranks.size > 1:
        sums.all_reduce()
    every, scored = ranks.gathered(kept), ranks.gathered(logits)
    return Collected(sums, torch.cat(every)[:KEPT] if every else torch.empty(0), torch.cat(scored) if scored else None)


def in_order(source: Source, batch_size: int, ranks: Ranks = ALONE) -> Iterator[tuple[int, Tensor]]:
    """The data of a source as float32, in batches with their numbers, of which the processes take turns.

    What cannot be read is left out and named on stderr. All processes have to read to the end.
    """
    skipped: dict[int, tuple[str, str]] = {}
    for number in range(ranks.rank, -(-len(source) // batch_size), ranks.size):
        values: list[Tensor] = []
        for index in range(number * batch_size, min((number + 1) * batch_size, len(source))):
            try:
                values.append(finite(source, index))
            except Exception as error:  # decoders of broken files raise whatever they meet
                skipped[index] = (source.name(index), reason(error))
        if values:
            yield number, scaled(torch.stack(values), source.white)
    if every := ranks.gathered(skipped):
        warn_left_out(dict(every), len(source))


def assess(
    drawn: Collected,
    source: Source | None,
    features: Features,
    batch_size: int,
    reference: Path | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """The figures of samples, on the process that writes; nothing elsewhere.

    Args:
        drawn: the features of 4 samples or more.
        source: the real data; None if `reference` has their statistics.
        features: of images.
        batch_size: images at a time.
        reference: a .npz file with the mean `mu` and the covariance `sigma` of the real data's features. It is read if
            it is there, else written.
        ranks: the processes, which share the real data.

    Returns: frechet_distance; with `source` kernel_distance, precision and recall too; with logits inception_score.
    Raises: ValueError for too few samples, or a reference of another size.
    """
    figures: dict[str, Any] = {"n_samples": int(drawn.sums.count)}
    there = bool(reference and reference.exists())
    ranks.agree("reference", there)
    if there and reference:
        statistics = read_statistics(reference)
    elif source is None:
        raise ValueError("reference: expected real data, or a file of their statistics")
    else:
        real = collect(in_order(source, batch_size, ranks), features, ranks)
        statistics = real.sums.statistics()
    if not ranks.leads:
        return {}
    if not there:
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
        raise ValueError(f"{path}: expected the arrays mu and sigma ({reason(error)})") from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"{path}: expected mu (D,) and sigma (D, D), got {mean.shape} and {covariance.shape}")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{path}: expected finite numbers, got NaN or infinity")
    return mean, covariance
