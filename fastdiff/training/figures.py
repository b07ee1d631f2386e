"""`fastdiff eval`: which figures a run gets, and of which real data."""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.diffusion import Diffusion
from fastdiff.support.run_file import RunFile, find
from fastdiff.training.assess import assess, collect
from fastdiff.training.data.opening import SETS, is_path, known_set, open_source
from fastdiff.training.data.sources import Arrays, Source
from fastdiff.training.evaluate import evaluate
from fastdiff.training.features import classified, features_of
from fastdiff.training.metrics import frechet
from fastdiff.training.samples import conditions, number_of_classes

# Samples to draw unless a number is given: of a known set as many as the half that is trained on; else the least that
# is usual, since the distance of few samples is too large.
SAMPLES = 10_000


def figures(args: argparse.Namespace, model: Diffusion, draw: Callable[[int], Tensor]) -> dict[str, Any]:
    """The figures of the samples of a run, by name.

    Args:
        args: of the command: checkpoint, data, features, reference, n, label, batch_size, device.
        model: of the run.
        draw: draws a number of samples, (N, C, H, W).

    Raises: ValueError or OSError if the real data cannot be read, or are of another shape.
    """
    options = RunFile.open(find(args.checkpoint) or args.checkpoint).options
    data = args.data or options.get("data", "")
    halves = known_set(data)[::2] if data in SETS else None
    number = args.n or (len(halves[0]) if halves else SAMPLES)
    if data == "digits" and not (args.features or args.reference):
        samples = draw(number)
        return asdict(evaluate(samples)) | accuracy(model, "digits", samples, args.label)
    name = args.features or ("classifier" if data in SETS else "inception")
    features = features_of(name, data, torch.device(args.device))
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
    samples = draw(number)
    found = assess(samples, source, features, args.batch_size, args.reference)
    if halves:
        first, second = (collect(half[:].split(args.batch_size), features).sums for half in halves)
        found["frechet_distance_real"] = frechet(first.statistics(), second.statistics())
    return found | (accuracy(model, data, samples, args.label) if name == "classifier" else {})


def accuracy(model: Diffusion, data: str, samples: Tensor, label: int | None) -> dict[str, float]:
    """The share of samples that the classifier of a set gives the class that was asked for; none without classes."""
    if number_of_classes(model) != 10:
        return {}
    asked = conditions(model, torch.arange(len(samples)), label)["class_labels"]
    return {"label_accuracy": float((classified(data, samples)[1].argmax(1) == asked).double().mean())}
