"""Samples of a run: the sampler that suits a formulation, the labels of each sample, and the grid that a run shows."""

import warnings
from typing import Any

import torch
from torch import Tensor

from fastdiff.diffusion import Diffusion
from fastdiff.networks import Network

# The sampler, and its steps, that suits a formulation unless one is named.
SUITED: dict[str, tuple[str, int]] = {
    "DDPM": ("ddim", 50),
    "NCSN": ("annealed_langevin", 10),
    "ScoreSDE": ("heun", 18),
    "FlowMatching": ("ddim", 50),
    "Edm": ("heun", 18),
}
# Images of a grid, at most; classes that get a column each, at most.
IMAGES, COLUMNS = 64, 16


def number_of_classes(model: Diffusion) -> int:
    """The classes of a model besides "no label", which is the number after them; 0 if it is not class-conditional."""
    embedding = getattr(model.model, "class_embedding", None)
    return 0 if embedding is None else embedding.num_embeddings - 1


def conditions(
    model: Diffusion, ids: Tensor, label: int | None = None, guidance: float | None = None
) -> dict[str, Any]:
    """The arguments of `sample` for samples of these numbers.

    Args:
        model: with classes or without.
        ids: (B,), the numbers of the samples.
        label: of all; None gives sample i the label i modulo the number of classes.
        guidance: of classifier-free guidance, w in uncond + w (cond - uncond); None is the conditional model alone.

    Raises: ValueError if the model has no classes, or not this one.
    """
    classes = number_of_classes(model)
    if not classes:
        if label is not None or guidance is not None:
            raise ValueError("label, guidance: expected a class-conditional model, trained with --classes")
        return {}
    if label is not None and not 0 <= label < classes:
        raise ValueError(f"label: expected 0 to {classes - 1}, got {label}")
    labels = ids % classes if label is None else torch.full_like(ids, label)
    if guidance is None:
        return {"class_labels": labels}
    uncond = {"class_labels": torch.full_like(labels, classes)}
    return {"class_labels": labels, "guidance": guidance, "uncond": uncond}


def columns_of(model: Diffusion) -> int | None:
    """How many samples stand side by side in a grid: one of each class, if there are few classes."""
    classes = number_of_classes(model)
    return classes if 1 < classes <= COLUMNS else None


def suited(model: Diffusion) -> tuple[str, int]:
    """The sampler that suits a model, and its steps."""
    sampler, steps = SUITED[type(model).__name__]
    return sampler, min(steps, getattr(model, "timesteps", steps)) if sampler == "ddim" else steps


def averaged(diffusion: Diffusion, ema: Network) -> Diffusion:
    """The same formulation around the moving average of the weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the same options, heard before
        return type(diffusion)(ema, **diffusion.config)


def draw_grid(model: Diffusion, seed: int) -> Tensor:
    """The samples that a run shows: always of the same noise and, with classes, as many of each class.

    Returns: (N, C, H, W) on the CPU, of up to IMAGES.
    """
    columns, device = columns_of(model) or 1, next(model.parameters()).device
    ids = torch.arange(IMAGES // columns * columns, device=device)
    (sampler, steps), labels = suited(model), conditions(model, ids)
    drawn = model.sample(len(ids), sampler=sampler, steps=steps, seed=seed, sample_ids=ids, graph=False, **labels)
    return drawn.cpu()
