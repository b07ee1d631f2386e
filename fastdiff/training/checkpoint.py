"""Checkpoints: one safetensors file of weights, EMA, optimizer and RNG state, with JSON metadata; no pickle."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.ddpm import DDPM
from fastdiff.diffusion import Diffusion
from fastdiff.files import need, replacing
from fastdiff.score import NCSN, ScoreSDE
from fastdiff.unet import UNet

VERSION = 2
MODELS: dict[str, type[Diffusion]] = {"DDPM": DDPM, "NCSN": NCSN, "ScoreSDE": ScoreSDE}
METADATA_KEY = "fastdiff"
OPTIMIZER_KEYS = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class State:
    """Everything a run needs to go on as if it had never stopped, at the end of step `step`.

    diffusion: the DDPM, NCSN or ScoreSDE with the trained weights
    ema:       the UNet whose weights are the moving average (the one to sample from)
    optimizer: tensors of torch.optim.AdamW, optimizer[i][key] for parameter i
    rng:       state of PyTorch's default generators, by device type
    options:   the options of the run (JSON)
    """

    diffusion: Diffusion
    ema: UNet
    optimizer: dict[int, dict[str, Tensor]]
    rng: dict[str, Tensor]
    options: dict[str, Any]
    step: int


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """State of the generators that training on `device` draws from, as uint8 tensors."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Undo of `rng_state`."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def save(path: Path, state: State) -> None:
    """Write `state` to `path`; an error on the way leaves the old file as it was."""
    groups: dict[str, dict[str, Tensor]] = {
        "model": state.diffusion.model.state_dict(),
        "ema": state.ema.state_dict(),
        "rng": state.rng,
        **{f"optimizer.{index}": tensors for index, tensors in state.optimizer.items()},
    }
    tensors = {
        f"{group}.{name}": tensor.detach().contiguous()
        for group, members in groups.items()
        for name, tensor in members.items()
    }
    metadata = {
        "version": VERSION,
        "step": state.step,
        "unet": state.ema.config,
        "model": type(state.diffusion).__name__,
        "config": state.diffusion.config,
        "options": state.options,
    }
    with replacing(path) as temporary:
        need("safetensors.torch").save_file(tensors, temporary, {METADATA_KEY: json.dumps(metadata)})


def load(path: Path) -> State:
    """Read a checkpoint to the CPU.

    Raises OSError where the file cannot be read, and ValueError naming the file where it is cut short, is no
    fastdiff checkpoint, or does not fit the networks that its own metadata describes.
    """
    with open(path, "rb"):
        pass  # a missing file or a folder is told in the system's own words
    safetensors = need("safetensors")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = _metadata(file.metadata())
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _state(metadata, tensors)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or is cut short ({error})") from error
    except KeyError as error:
        raise ValueError(f"{path} is not a usable fastdiff checkpoint: it has no tensor {error}") from error
    except (ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a usable fastdiff checkpoint: {reason[:300]}") from error


def load_model(path: Path) -> Diffusion:
    """The DDPM, NCSN or ScoreSDE of a checkpoint with the EMA weights, in eval mode on the CPU. Raises as `load`."""
    state = load(path)
    return type(state.diffusion)(state.ema, **state.diffusion.config).eval()


def _metadata(header: dict[str, str] | None) -> dict[str, Any]:
    text = (header or {}).get(METADATA_KEY)
    if text is None:
        raise ValueError("it carries no fastdiff metadata")
    metadata = json.loads(text)
    kinds = {"version": int, "step": int, "unet": dict, "model": str, "config": dict, "options": dict}
    for name, kind in kinds.items():
        if not isinstance(metadata, dict) or not isinstance(metadata.get(name), kind):
            raise ValueError(f"its metadata has no {name!r} of type {kind.__name__}")
    if metadata["version"] != VERSION:
        raise ValueError(f"format version {metadata['version']}, expected {VERSION}")
    if metadata["model"] not in MODELS:
        raise ValueError(f"model {metadata['model']!r}, expected one of {', '.join(MODELS)}")
    return metadata


def _state(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> State:
    groups: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "rng": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        if group not in groups:
            raise ValueError(f"unknown tensor {name!r}")
        groups[group][rest] = tensor
    unet = UNet(**metadata["unet"])
    ema = copy.deepcopy(unet)
    unet.load_state_dict(groups["model"])
    ema.load_state_dict(groups["ema"])
    torch.Generator().set_state(groups["rng"]["cpu"])  # raises where it is no such state
    optimizer: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(unet.parameters()):
        optimizer[index] = {key: groups["optimizer"].pop(f"{index}.{key}") for key in OPTIMIZER_KEYS}
        if any(tensor.shape not in (parameter.shape, ()) for tensor in optimizer[index].values()):
            raise ValueError(f"the optimizer's state {index} does not fit its parameter")
    if groups["optimizer"]:
        raise ValueError(f"unknown tensor {'optimizer.' + next(iter(groups['optimizer']))!r}")
    diffusion = MODELS[metadata["model"]](unet, **metadata["config"])
    return State(diffusion, ema, optimizer, groups["rng"], metadata["options"], metadata["step"])
