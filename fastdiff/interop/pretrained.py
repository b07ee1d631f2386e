"""Directories of diffusers: UNet2DModel, DiTTransformer2DModel, and whole DDPMPipelines. diffusers itself is not
needed; safetensors is, for files of that kind (extra `[train]`).

A network is config.json with diffusion_pytorch_model.safetensors or .bin, or with several .safetensors and an index
of them. A variant, such as fp16, has its name in that of the file. A pipeline holds one in unet/ or transformer/ and a
scheduler_config.json in scheduler/. The first published pipelines have all of these files in one folder. A key that
config.json or scheduler_config.json lacks has the default of its class. Anything more in a file is refused.

This module reads files into constructor arguments and weights, for `UNet.from_pretrained`, `DiT.from_pretrained` and
`DDPM.from_pretrained`.
"""

import json
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import write_json
from ..schedule import NoiseSchedule, linear, make_schedule, scaled_linear
from ..support.errors import blaming
from ..support.weights import (
    Network,
    TensorFile,
    check_length,
    check_shapes,
    read_pickled,
    save_tensors,
    shapes_of,
)

# The version of diffusers that the files are written for.
VERSION = "0.42.1"
WEIGHTS = "diffusion_pytorch_model"
# Names that attention had before diffusers 0.15.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Options of Transformer2DModel that a DiT leaves out.
OLD_TRANSFORMER = (
    *("attention_type", "caption_channels", "cross_attention_dim", "double_self_attention", "interpolation_scale"),
    *("num_vector_embeds", "only_cross_attention", "use_additional_conditions", "use_linear_projection"),
)
OBJECTIVES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
VARIANCES = {
    "fixed_small": "posterior",
    "fixed_small_log": "posterior",
    "fixed_large": "beta",
    "fixed_large_log": "beta",
    "learned_range": "learned",
}
# The defaults of DDPMScheduler, for keys that are absent.
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "variance_type": "fixed_small",
    "clip_sample": True,
    "prediction_type": "epsilon",
    "thresholding": False,
    "clip_sample_range": 1.0,
    "rescale_betas_zero_snr": False,
}
# Options that only say which levels fewer steps visit, or that thresholding alone reads.
UNUSED = ("set_alpha_to_one", "timestep_spacing", "steps_offset", "dynamic_thresholding_ratio", "sample_max_value")


class Content(dict[str, Any]):
    """What a file holds, by name, and the file."""

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.path = path

    def blamed(self) -> AbstractContextManager[None]:
        """A block that uses the content: its errors become a ValueError that names the file."""
        return blaming(self.path)


# --- networks ---------------------------------------------------------------------------------------------------


def check_torch_dtype(dtype: torch.dtype | None) -> None:
    """Raise TypeError unless it is None or a floating type."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"torch_dtype: expected None or a floating type, such as torch.bfloat16, got {dtype!r}")


def read_unet(folder: str | Path, variant: str | None = None) -> tuple[Content, Content]:
    """The constructor arguments and the weights of a UNet2DModel directory, or of the unet/ of a pipeline's.

    variant: of the weights' files, such as "fp16".

    Returns: (config, weights), floating tensors on the CPU under the names that UNet gives them.
    Raises: FileNotFoundError if a file is missing. ValueError, naming the file, if it is not of that kind.
    """
    folder = _network_folder(folder, "unet")
    config = _read_config(folder / "config.json", ("UNet2DModel",))
    for name in ("down_block_types", "up_block_types"):
        if isinstance(config.get(name), list):  # UNetResDownBlock2D and so on, before diffusers 0.3
            config[name] = [k.removeprefix("UNetRes") if isinstance(k, str) else k for k in config[name]]
    return config, _read_weights(folder, variant)


def build(kind: Callable[..., Network], config: Content, weights: Content, torch_dtype: torch.dtype | None) -> Network:
    """The network of a configuration and weights that were read, in eval mode; in its own type if torch_dtype is None.

    Raises: ValueError, naming the file, for options that the network lacks, and for weights that do not fit them.
    """
    with config.blamed():
        expected = shapes_of(kind, config, len(weights))
    with weights.blamed():
        check_shapes(expected, {name: tuple(tensor.shape) for name, tensor in weights.items()})
        network = kind(**config)
        network.load_state_dict(weights)
    return (network if torch_dtype is None else network.to(torch_dtype)).eval()


def write_unet(folder: str | Path, config: dict[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write config.json and diffusion_pytorch_model.safetensors, which UNet2DModel.from_pretrained reads."""
    _write_network(folder, "UNet2DModel", config, weights)


def read_dit(folder: str | Path, variant: str | None = None) -> tuple[Content, Content]:
    """As `read_unet`, of a DiTTransformer2DModel directory, or of the transformer/ of a pipeline's.

    The first published ones name the class Transformer2DModel, whose further options may be there but not be used.
    """
    folder = _network_folder(folder, "transformer")
    config = _read_config(folder / "config.json", ("DiTTransformer2DModel", "Transformer2DModel"))
    for name in [k for k in OLD_TRANSFORMER if config.get(k, False) in (None, False, "default")]:
        config.pop(name, None)
    return config, _read_weights(folder, variant)


def write_dit(folder: str | Path, config: dict[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write config.json and diffusion_pytorch_model.safetensors, which DiTTransformer2DModel.from_pretrained reads."""
    _write_network(folder, "DiTTransformer2DModel", config, weights)


def _write_network(folder: str | Path, kind: str, config: dict[str, Any], weights: Mapping[str, Tensor]) -> None:
    if config.get("self_condition"):
        raise ValueError("self_condition: expected False, as diffusers has no network that takes x_self_cond, got True")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"_class_name": kind, "_diffusers_version": VERSION, **config})
    save_tensors(folder / f"{WEIGHTS}.safetensors", weights, {"format": "pt"})


def _new_name(name: str) -> str:
    """A parameter's name. The layers of attention get the names that they have today."""
    parts = name.split(".")
    if "attentions" in parts and parts[-2] in OLD_ATTENTION:
        parts[-2] = OLD_ATTENTION[parts[-2]]
    return ".".join(parts)


def _network_folder(folder: str | Path, part: str) -> Path:
    """The folder itself, or in a pipeline's folder the one of its network."""
    folder = _existing(folder)
    return folder / part if not (folder / "config.json").is_file() and (folder / part).is_dir() else folder


def _weights_files(folder: Path, variant: str | None) -> tuple[Path, list[Path]]:
    """The file of weights in a folder, twice; or the index and the files that it names.

    Raises: FileNotFoundError if there is none. ValueError for a variant that is no name, and for another index.
    """
    if variant is not None and not (isinstance(variant, str) and re.fullmatch(r"[\w-]+", variant)):
        raise ValueError(f"variant: expected a name, such as 'fp16', got {variant!r}")
    infix = "" if variant is None else f".{variant}"
    names = [f"{WEIGHTS}{infix}.safetensors", f"{WEIGHTS}{infix}.bin"]
    for path in (folder / name for name in names):
        if path.is_file():
            return path, [path]
    index = folder / f"{WEIGHTS}.safetensors.index{infix}.json"
    if not index.is_file():
        raise FileNotFoundError(f"{folder}: expected {' or '.join(names)} in it, or {index.name}")
    with blaming(index, "an index of weights"):
        parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not parts or any(Path(part).name != part or not part.endswith(".safetensors") for part in parts):
            raise ValueError(f"expected names of .safetensors files beside it, got {parts}")
    return index, [folder / part for part in parts]


def _read_weights(folder: Path, variant: str | None) -> Content:
    """The floating tensors of the weights' files, by name. Nothing but tensors is unpickled from a .bin."""
    path, files = _weights_files(folder, variant)
    weights: Any = {}
    for part in files:
        weights |= TensorFile.open(part).read() if part.suffix == ".safetensors" else _read_bin(part)
    for name, tensor in weights.items():
        if not isinstance(name, str) or type(tensor) is not Tensor or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{path}: expected floating tensors by name, got {name!r}: {got}")
    return Content(path, {_new_name(name): tensor for name, tensor in weights.items()})


def _read_bin(path: Path) -> dict[Any, Any]:
    weights = read_pickled(path)
    if not isinstance(weights, dict):
        raise ValueError(f"{path}: expected tensors by name, got {type(weights).__name__}")
    return weights


# --- DDPMPipeline -----------------------------------------------------------------------------------------------


def read_ddpm(folder: str | Path, variant: str | None = None) -> Content:
    """The constructor arguments of DDPM, but for the model, that the scheduler of a DDPMPipeline's directory gives.

    DDPM's ancestral sampler over all levels is then DDPMScheduler's. Which levels fewer steps visit (timestep_spacing,
    steps_offset) is the sampler's own matter. A learned variance is trained by the hybrid loss.

    Raises: FileNotFoundError if the file is missing. ValueError, naming the file, for what DDPM lacks: thresholding, or
        a variance or a schedule of betas that it does not know.
    """
    folder = _existing(folder)
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        path = folder / "scheduler_config.json"
    given = _read_config(path, ("DDPMScheduler", "DDIMScheduler"))
    with given.blamed():
        unknown = [k for k in given if k not in SCHEDULER and k not in UNUSED]
        if unknown:
            raise ValueError(f"expected the options of DDPMScheduler, got {', '.join(unknown)}")
        config = SCHEDULER | given
        known = {"prediction_type": OBJECTIVES, "variance_type": VARIANCES, "thresholding": (False,)}
        for name, choices in known.items():
            if config[name] not in choices:
                raise ValueError(f"{name}: expected {' or '.join(map(repr, choices))}, got {config[name]!r}")
        variance = VARIANCES[config["variance_type"]]
        size = sum(path.stat().st_size for path in _weights_files(_network_folder(folder, "unet"), variant)[1])
        check_length("num_train_timesteps", config["num_train_timesteps"], size)
        arguments = {
            "schedule": _schedule(config),
            "timesteps": config["num_train_timesteps"],
            "objective": OBJECTIVES[config["prediction_type"]],
            "loss": "hybrid" if variance == "learned" else "mse",
            "variance": variance,
            "clip": config["clip_sample_range"] if config["clip_sample"] else None,
        }
    return Content(path, arguments)


def write_ddpm(
    folder: str | Path,
    config: dict[str, Any],
    weights: Mapping[str, Tensor],
    schedule: NoiseSchedule,
    *,
    schedule_name: str | None,
    objective: str,
    variance: str,
    clip: float | None,
) -> None:
    """Write a directory that DDPMPipeline.from_pretrained of diffusers reads, with weights as safetensors.

    Args:
        config, weights: of the UNet.
        schedule, schedule_name, objective, variance, clip: of the DDPM.

    Raises: ValueError, before anything is written, if diffusers lacks the objective, or if the schedule does
        not keep the variance.
    """
    if not schedule.vp:
        raise ValueError("schedule: expected one that keeps the variance, as diffusers' DDPMScheduler does")
    objectives = {ours: theirs for theirs, ours in OBJECTIVES.items()}
    if objective not in objectives:
        raise ValueError(f"objective: expected one of {', '.join(objectives)}, got {objective!r}")
    variances = {"posterior": "fixed_small", "beta": "fixed_large", "learned": "learned_range"}
    scheduler = SCHEDULER | {
        "num_train_timesteps": schedule.timesteps,
        **_betas(schedule, schedule_name),
        "variance_type": variances[variance],
        "clip_sample": clip is not None,
        "clip_sample_range": 1.0 if clip is None else clip,
        "prediction_type": objectives[objective],
    }
    folder = Path(folder)
    write_unet(folder / "unet", config, weights)
    (folder / "scheduler").mkdir(exist_ok=True)
    version = {"_diffusers_version": VERSION}
    path = folder / "scheduler" / "scheduler_config.json"
    write_json(path, {"_class_name": "DDPMScheduler", **version, **scheduler})
    parts = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    write_json(folder / "model_index.json", {"_class_name": "DDPMPipeline", **version, **parts})


def _schedule(config: dict[str, Any]) -> str | NoiseSchedule:
    """The schedule of a configuration: its name if it has one, so that the DDPM's own config can name it."""
    timesteps, start, end = (config[k] for k in ("num_train_timesteps", "beta_start", "beta_end"))
    kind = config["beta_schedule"]
    made: str | NoiseSchedule
    if config["trained_betas"] is not None:
        made = NoiseSchedule.from_betas(config["trained_betas"])
    elif kind == "linear":
        made = "linear" if (start, end) == (1e-4, 0.02) else linear(timesteps, start, end)
    elif kind == "scaled_linear":
        made = "scaled_linear" if (start, end) == (0.00085, 0.012) else scaled_linear(timesteps, start, end)
    elif kind == "squaredcos_cap_v2":
        made = "cosine"
    elif kind == "sigmoid":
        betas = torch.linspace(-6, 6, timesteps, dtype=torch.float64).sigmoid() * (end - start) + start
        made = NoiseSchedule.from_betas(betas)
    else:
        raise ValueError(
            f"beta_schedule: expected 'linear', 'scaled_linear', 'squaredcos_cap_v2' or 'sigmoid', got {kind!r}"
        )
    if not config["rescale_betas_zero_snr"]:
        return made
    alpha = make_schedule(made, timesteps).alpha[1:]
    # Lin et al. 2023, arXiv:2305.08891, algorithm 1. DDPMScheduler then puts alpha_bar_T = 2^-24, above alpha_bar_T-1.
    alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    return NoiseSchedule.from_log_alpha_bar(torch.cat((alpha.new_zeros(1), 2 * alpha.log())))


def _betas(schedule: NoiseSchedule, name: str | None) -> dict[str, Any]:
    """The options that give DDPMScheduler the betas of the chain: a name if it has one, or else the numbers."""
    names: dict[str | None, dict[str, Any]] = {
        "linear": {"beta_schedule": "linear"},
        "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    }
    if name in names:
        return names[name]
    return {"trained_betas": (-torch.expm1(2 * schedule.log_alpha.diff())).tolist()}


# --- files ------------------------------------------------------------------------------------------------------


def _existing(folder: str | Path) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected a directory; a model of the Hub has to be downloaded first")
    return folder


def _read_config(path: Path, classes: tuple[str, ...]) -> Content:
    """The options in a configuration of one of `classes`."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON, or of UTF-8
        raise ValueError(f"{path}: expected JSON ({error})") from error
    if not isinstance(config, dict) or config.get("_class_name") not in classes:
        got = config.get("_class_name") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path}: expected the configuration of a {' or '.join(classes)}, got {got!r}")
    return Content(path, {k: v for k, v in config.items() if not k.startswith("_")})
