"""Checkpoints: all that a run needs to go on, in one safetensors file; fastdiff.support.run_file describes it."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.ddpm import DDPM
from fastdiff.diffusion import Diffusion
from fastdiff.score import NCSN, ScoreSDE
from fastdiff.support import run_file
from fastdiff.support.run_file import RunFile
from fastdiff.unet import UNet

MODELS: dict[str, type[Diffusion]] = {"DDPM": DDPM, "NCSN": NCSN, "ScoreSDE": ScoreSDE}
OPTIMIZER_KEYS = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class State:
    """Everything a run needs to go on as if it had never stopped, at the end of step `step`.

    Args:
        diffusion: the DDPM, NCSN or ScoreSDE with the trained weights, and what its importance sampling remembers.
        ema: the UNet whose weights are the moving average, the one to sample from.
        optimizer: tensors of torch.optim.AdamW, optimizer[i][key] for parameter i.
        rng: states of PyTorch's default generators, by device type.
        options: the options of the run (JSON).
        step: the optimizer steps done.
        classes: the names of the classes, none without.
    """

    diffusion: Diffusion
    ema: UNet
    optimizer: dict[int, dict[str, Tensor]]
    rng: dict[str, Tensor]
    options: dict[str, Any]
    step: int
    classes: list[str] = field(default_factory=list)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The states of the generators that training on `device` draws from, as uint8 tensors."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Set the generators to the states that `rng_state` gave."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def save(path: str | Path, state: State) -> None:
    """Write a checkpoint. An error on the way leaves the old file as it was.

    Raises: ValueError naming a tensor that holds NaN or infinity; OSError if the disk does not take the file.
    """
    groups: dict[str, dict[str, Tensor]] = {
        "model": state.diffusion.model.state_dict(),
        "ema": state.ema.state_dict(),
        "rng": state.rng,
        **{f"optimizer.{index}": tensors for index, tensors in state.optimizer.items()},
    }
    if history := importance(state.diffusion):
        groups["importance"] = history.state_dict()
    metadata = {
        "step": state.step,
        "unet": state.ema.config,
        "model": type(state.diffusion).__name__,
        "config": state.diffusion.config,
        "options": state.options,
        "classes": state.classes,
    }
    run_file.write(Path(path), groups, metadata)


def load(path: str | Path) -> State:
    """Read a checkpoint to the CPU.

    Raises: OSError if the file cannot be read. ValueError naming the file if it is cut short, is no fastdiff
        checkpoint, or does not fit the networks that its own metadata describes.
    """
    stored = RunFile.open(path)
    unet, ema = (stored.network(UNet, group) for group in ("model", "ema"))
    with stored.blamed():
        diffusion = MODELS[stored.model](unet, **stored.config)
        _load_importance(stored, diffusion)
        rng = stored.tensors("rng")
        if "cpu" not in rng:
            raise ValueError("it has no tensor 'rng.cpu'")
        torch.Generator().set_state(rng["cpu"])  # raises if it is no such state
        return State(diffusion, ema, _optimizer(stored, unet), rng, stored.options, stored.step, stored.classes)


def load_model(path: str | Path) -> Diffusion:
    """The DDPM, NCSN or ScoreSDE of a run with the averaged weights, in eval mode on the CPU.

    Args:
        path: model.safetensors of a run, or the run's folder.

    Raises: as `load`.
    """
    stored = RunFile.open(run_file.find(path) or path)
    return stored.formulation(MODELS[stored.model], UNet)


def importance(diffusion: Diffusion) -> nn.Module | None:
    """What importance sampling of a DDPM remembers; None without it."""
    return getattr(diffusion, "importance", None)


def _load_importance(stored: RunFile, diffusion: Diffusion) -> None:
    """Take over the losses that importance sampling remembers."""
    history, tensors = importance(diffusion), stored.tensors("importance")
    if history is None and tensors:
        raise ValueError("it holds a history of importance sampling, which its configuration does not use")
    if history is not None and tensors:
        for name, tensor in history.state_dict().items():
            if name in tensors and tensors[name].dtype != tensor.dtype:
                raise ValueError(f"importance.{name}: expected {tensor.dtype}, got {tensors[name].dtype}")
        history.load_state_dict(tensors)
    elif history is not None:
        warnings.warn(f"{stored.file.path} has no history of importance sampling: it starts anew", stacklevel=3)


def _optimizer(stored: RunFile, unet: UNet) -> dict[int, dict[str, Tensor]]:
    """The optimizer's tensors by parameter. Raises ValueError if they do not fit the parameters."""
    shapes = {i: tuple(parameter.shape) for i, parameter in enumerate(unet.parameters())}
    expected = {f"{i}.{key}": () if key == "step" else shapes[i] for i in shapes for key in OPTIMIZER_KEYS}
    tensors = stored.fitting("optimizer", expected)
    return {i: {key: tensors[f"{i}.{key}"] for key in OPTIMIZER_KEYS} for i in shapes}
