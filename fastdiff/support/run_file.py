"""The file of a training run, model.safetensors: what it holds, checked before anything is built from it.

Tensors are in groups: model.* (trained weights), ema.* (their moving average, to sample from), averages.* (further
averages, by their names), optimizer.N.* (of parameter N), rng.* (states of generators), and importance.* (the losses
that importance sampling remembers). There is no pickle. The metadata is JSON: the format's version, the step, and the
configurations of the network (under its name, "unet" or "dit") and of the formulation around it. It also has the
options of the run, and what it noted of its data.
"""

import errno
import json
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from .errors import blaming
from .weights import (
    Network,
    TensorFile,
    build_to_fit,
    check_finite,
    check_length,
    check_shapes,
    save_tensors,
)

NAME = "model.safetensors"
VERSION = 2
METADATA_KEY = "fastdiff"
GROUPS = ("model", "ema", "averages", "optimizer", "rng", "importance")
METADATA = {"version": int, "step": int, "model": str, "config": dict, "options": dict, "classes": list, "data": dict}
NETWORKS = ("unet", "dit")
# What each formulation has to be told. A wrong default would go unseen: no tensor's shape depends on these.
REQUIRED = {
    "DDPM": ("schedule", "timesteps", "objective", "variance"),
    "NCSN": ("sigma_max", "sigma_min", "levels", "objective"),
    "ScoreSDE": ("sde", "objective"),
    "FlowMatching": ("objective", "shift", "last"),
    "Edm": ("sigma_data", "objective"),
}
Formulation = TypeVar("Formulation", bound=nn.Module)


def find(path: str | Path) -> Path | None:
    """The file of a run, given it or the run's folder; None if there is none."""
    path = Path(path)
    path = path / NAME if path.is_dir() else path
    return path if path.is_file() else None


def write(path: Path, groups: Mapping[str, Mapping[str, Tensor]], metadata: dict[str, Any]) -> None:
    """Write the file of a run. An error on the way leaves the old file as it was.

    Args:
        groups: tensors by name, by group.
        metadata: as in METADATA without the version, and the arguments of the network by its name.

    Raises: ValueError for a tensor with NaN or infinity; OSError if the disk does not take the file.
    """
    tensors = {f"{group}.{name}": tensor for group, members in groups.items() for name, tensor in members.items()}
    check_finite(tensors)
    save_tensors(path, tensors, {METADATA_KEY: json.dumps({"version": VERSION, **metadata})})


@dataclass(frozen=True)
class RunFile:
    """The file of a run by its header.

    Args:
        file: its tensors' names, shapes and types.
        model: the formulation, a name of REQUIRED; config: the arguments of its constructor but the network.
        kind: of network, a name of NETWORKS; arguments: those of its constructor.
        options, step: the options of the run, and the step at whose end it was written.
        classes: the names of the classes that the network knows, in the order of their numbers.
        data: what the run noted of its data.
    """

    file: TensorFile
    model: str
    config: dict[str, Any]
    kind: str
    arguments: dict[str, Any]
    options: dict[str, Any]
    step: int
    classes: list[str]
    data: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> "RunFile":
        """Read the header and check the metadata.

        Args:
            path: the file of a run, or the run's folder.

        Raises: OSError if the file cannot be read; ValueError naming the file if it is not the file of a run.
        """
        path = Path(path)
        found = find(path)
        if found is None and path.is_dir():
            raise IsADirectoryError(errno.EISDIR, f"{os.strerror(errno.EISDIR)} without {NAME}", str(path))
        if not path.exists():
            said = f"{os.strerror(errno.ENOENT)}; expected the folder of a run, or its {NAME}"
            raise FileNotFoundError(errno.ENOENT, said, str(path))
        file = TensorFile.open(found or path)
        with blaming(file.path, "a usable fastdiff checkpoint"):
            metadata = _metadata(file.metadata)
            for name in file.shapes:
                if name.partition(".")[0] not in GROUPS:
                    raise ValueError(f"unknown tensor {name!r}")
            for name in ("timesteps", "levels"):
                if name in metadata["config"]:
                    check_length(name, metadata["config"][name], file.size)
        kind, rest = _kind(metadata), (metadata[name] for name in ("options", "step", "classes", "data"))
        return cls(file, metadata["model"], metadata["config"], kind, metadata[kind], *rest)

    def blamed(self) -> AbstractContextManager[None]:
        """A block that uses what the file holds: its errors name the file."""
        return blaming(self.file.path, "a usable fastdiff checkpoint")

    def network(self, kind: Callable[..., Network], group: str = "ema") -> Network:
        """The network with the weights of a group.

        Args:
            kind: what builds it, as fastdiff.networks.NETWORKS has it by the name `kind`.
            group: "ema", or "model" for the weights without the average.

        Raises: ValueError naming the file if configuration, shapes, types or numbers do not fit each other.
        """
        with self.blamed():
            network = build_to_fit(kind, self.arguments, self.file.floating(f"{group}."))
            network.load_state_dict(self.tensors(group))
        return network

    def formulation(self, kind: type[Formulation], networks: Mapping[str, Callable[..., nn.Module]]) -> Formulation:
        """The model of the run with the averaged weights, in eval mode on the CPU.

        Args:
            kind: the class of the formulation, that the run has to be of.
            networks: fastdiff.networks.NETWORKS.

        Raises: ValueError naming the file if it is of another formulation, or its content does not fit.
        """
        if self.model not in {base.__name__ for base in kind.__mro__}:
            raise ValueError(f"{self.file.path} is the run of a {self.model}, expected a {kind.__name__}")
        built = self.network(networks[self.kind])
        with self.blamed():
            return kind(built, **self.config).eval()

    def tensors(self, group: str) -> dict[str, Tensor]:
        """The tensors of a group. Raises ValueError if one holds NaN or infinity."""
        tensors = self.file.read(f"{group}.")
        check_finite({f"{group}.{name}": tensor for name, tensor in tensors.items()})
        return tensors

    def fitting(self, group: str, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """The floating tensors of a group that has to hold exactly these shapes. Raises ValueError otherwise."""
        prefix = f"{group}."
        shapes = {prefix + name: shape for name, shape in self.file.floating(prefix).items()}
        check_shapes({prefix + name: shape for name, shape in expected.items()}, shapes)
        return self.tensors(group)


def _metadata(header: Mapping[str, str]) -> dict[str, Any]:
    """The metadata in a header. Raises ValueError if something is missing or of a wrong type."""
    text = header.get(METADATA_KEY)
    if text is None:
        raise ValueError("it carries no fastdiff metadata")
    metadata: dict[str, Any] = json.loads(text)
    if isinstance(metadata, dict):
        metadata.setdefault("classes", [])  # files of 0.1 have none
        metadata.setdefault("data", {})
    for name, kind in METADATA.items():
        value = metadata.get(name) if isinstance(metadata, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"its metadata has no {name!r} of type {kind.__name__}")
    _kind(metadata)
    if metadata["version"] != VERSION:
        raise ValueError(f"format version {metadata['version']}, expected {VERSION}")
    if metadata["step"] < 0:
        raise ValueError(f"step: expected at least 0, got {metadata['step']}")
    if metadata["model"] not in REQUIRED:
        raise ValueError(f"model {metadata['model']!r}, expected one of {', '.join(REQUIRED)}")
    for name in REQUIRED[metadata["model"]]:
        if name not in metadata["config"]:
            raise ValueError(f"its configuration of {metadata['model']} has no {name!r}")
    return metadata


def _kind(metadata: Mapping[str, Any]) -> str:
    """The name of the network that the metadata describe. Raises ValueError unless there is one."""
    found = [name for name in NETWORKS if isinstance(metadata.get(name), dict)]
    if len(found) != 1:
        raise ValueError(f"its metadata has {len(found)} of {NETWORKS} of type dict, expected 1")
    return found[0]
