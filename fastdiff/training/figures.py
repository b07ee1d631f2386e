"""`fastdiff eval`: which figures a run gets, and of which real data."""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.diffusion import Diffusion
from fastdiff.support.run_file import RunFile
from fastdiff.training.assess import assess, collect
from fastdiff.training.data.opening import SETS, is_path, known_set, open_source
from fastdiff.training.data.sources import Arrays, Source
from fastdiff.training.evaluate import evaluate
from fastdiff.training.features import classified, features_of
from fastdiff.training.metrics import frechet
from fastdiff.training.ranks import Ranks
from fastdiff.training.samples import conditions, number_of_classes

# Samples to draw unless a number is given: of a known set as many as the half that is trained on; else the least that
# is usual, since the distance of few samples is too large.
SAMPLES = 10_000


def figures(
    args: argparse.Namespace, model: Diffusion, draw: Callable[[int], Iterable[tuple[int, Tensor]]], ranks: Ranks
) -> dict[str, Any]:
    """The figures of the samples of a run, by name, on the process that writes; nothing elsewhere.

    Args:
        args: of the command: checkpoint, data, features, reference, n, label, batch_size.
        model: of the run, on the device where to compute.
        draw: draws the batches of this process, with their numbers, of a number of samples.
        ranks: the processes.

    Raises: ValueError or OSError if the real data cannot be read, or are of another shape.
    """
    options = RunFile.open(args.checkpoint).options
    data = args.data or options.get("data", "")
    halves = known_set(data)[::2] if data in SETS else None
    number = args.n or (len(halves[0]) if halves else SAMPLES)
    if data == "digits" and not (args.features or args.reference):
        batches = ranks.gathered(dict(draw(number)))
        if not ranks.leads:
            return {}
        samples = torch.cat(batches)
        return asdict(evaluate(samples)) | accuracy(model, classified("digits", samples)[1], args.label)
    name = args.features or ("classifier" if data in SETS else "inception")
    features = features_of(name, data, next(model.parameters()).device)
    shape: tuple[int, int, int] | None = model.model.sample_shape  # type: ignore[assignment]
    if shape is None:
        raise ValueError(f"{args.checkpoint}: expected a network with a sample_size, which says how large images are")
    source: Source | None = None
    if halves:
        source = Arrays(halves[1].pixels, white=halves[1].white)
    elif not (args.reference and Path(args.reference).exists()):
        source = open_source(str(Path(data).resolve()) if is_path(data) else data, shape[1:], shape[0])
    if source is not None and tuple(source.shape) != shape:
        raise ValueError(f"data: expected images of {shape} in {data}, got {tuple(source.shape)}")
    drawn = collect(draw(number), features, ranks)
    found = assess(drawn, source, features, args.batch_size, args.reference, ranks)
    if halves and ranks.leads:
        first, second = (collect(enumerate(half[:].split(args.batch_size)), features).sums for half in halves)
        found["frechet_distance_real"] = frechet(first.statistics(), second.statistics())
        if name == "classifier" and drawn.logits is not None:
            found |= accuracy(model, drawn.logits, args.label)
    return found


def accuracy(model: Diffusion, logits: Tensor, label: int | None) -> dict[str, float]:
    """The share of samples that a classifier's logits give the class that was asked for; none without classes."""
    if number_of_classes(model) != 10:
        return {}
    asked = conditions(model, torch.arange(len(logits)), label)["class_labels"]
    return {"label_accuracy": float((logits.argmax(1) == asked).double().mean())}
