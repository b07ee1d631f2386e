"""Files of weights: written whole, and measured before anything is built from them.

A small file may ask for a huge network. So the sizes in its header are first compared with the network on the meta
device, where it takes no memory. Only a network that fits is built.
"""

import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..files import need, replacing
from .errors import reason

# The types of safetensors that weights may have.
FLOATING = ("F64", "F32", "F16", "BF16")
Network = TypeVar("Network", bound=nn.Module)


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, or leave the old one as it was. Raises OSError if the disk does not take it."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            need("safetensors.torch").save_file(plain, temporary, metadata)
        except need("safetensors").SafetensorError as error:  # it hides the system's error
            raise OSError(f"{path}: {error}") from error


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file by its header.

    Args:
        path, size: the file, and its bytes.
        metadata: what the writer noted.
        shapes, dtypes: of each tensor, by name; dtypes as safetensors names them ("F32").
    """

    path: Path
    size: int
    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    @classmethod
    def open(cls, path: str | Path) -> "TensorFile":
        """Read the header. Raises OSError if the file cannot be read, ValueError if it is of another kind."""
        path = Path(path)
        with open(path, "rb") as file:  # a missing file or a folder is reported in the system's own words
            size = os.fstat(file.fileno()).st_size
        safetensors = need("safetensors")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
                dtypes = {name: part.get_dtype() for name, part in slices.items()}
                return cls(path, size, file.metadata() or {}, shapes, dtypes)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file, or is cut short ({error})") from error

    def read(self, prefix: str = "") -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, on the CPU, under the rest of their names."""
        with need("safetensors").safe_open(self.path, framework="pt") as file:
            return {name[len(prefix) :]: file.get_tensor(name) for name in self.shapes if name.startswith(prefix)}

    def floating(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """The shapes under `prefix`, by the rest of their names. Raises ValueError if one is of no floating type."""
        for name, dtype in self.dtypes.items():
            if name.startswith(prefix) and dtype not in FLOATING:
                raise ValueError(f"{name}: expected a tensor of type {', '.join(FLOATING)}, got {dtype}")
        return {name[len(prefix) :]: shape for name, shape in self.shapes.items() if name.startswith(prefix)}


def shapes_of(kind: Callable[..., nn.Module], config: Mapping[str, Any], tensors: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights of kind(**config), a network, from the meta device, where it takes no memory.

    Args:
        tensors: how many there are. More layers than that are not laid out, since each takes time.

    Raises: ValueError for more layers; what `kind` raises.
    """
    layers = config.get("layers_per_block", config.get("num_layers", 1))
    levels = config.get("block_out_channels", (0,))
    if isinstance(layers, int) and isinstance(levels, list | tuple) and layers * len(levels) > tensors:
        raise ValueError(f"the configuration has {layers} layers in {len(levels)} blocks, for {tensors} tensors")
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in kind(**config).state_dict().items()}


def build_to_fit(
    kind: Callable[..., Network], config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> Network:
    """Build the network kind(**config), once it is certain that weights of these shapes fit it.

    Raises: ValueError naming the first tensor that is missing, unknown or of another shape; what `kind` raises.
    """
    check_shapes(shapes_of(kind, config, len(shapes)), shapes)
    return kind(**config)


def check_shapes(expected: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError naming the first tensor that is missing, unknown or of another shape."""
    for name, shape in expected.items():
        if name not in shapes:
            raise ValueError(f"it has no tensor {name!r}")
        if shapes[name] != shape:
            raise ValueError(f"{name}: the configuration gives the shape {shape}, the file has {shapes[name]}")
    for name in shapes:
        if name not in expected:
            raise ValueError(f"unknown tensor {name!r}")


def check_length(name: str, length: Any, size: int) -> None:
    """Raise ValueError if a table of `length` rows does not match a file of `size` bytes, one byte a row at least."""
    if not isinstance(length, int) or length > size:
        raise ValueError(f"{name}: expected an integer of at most {size}, the bytes of the file, got {length!r}")


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError naming the first floating tensor that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinity")


def read_pickled(path: Path) -> Any:
    """What a file of torch.save holds, if it holds nothing but tensors and containers of them.

    Raises: ValueError naming the file if it holds anything else, or takes more memory than disk.
    """
    check_stored(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # content that nobody expected is met by any exception
        raise ValueError(f"{path}: expected tensors alone, got something else ({reason(error)})") from error
    tensors = content.values() if isinstance(content, dict) else ()
    size = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
    if size > path.stat().st_size:  # tensors may share their numbers, or repeat them
        raise ValueError(f"{path}: expected no more numbers than the file holds, got tensors of {size} bytes")
    return content


def check_stored(path: Path) -> None:
    """Raise ValueError if a zip file inflates: PyTorch writes zip files that hold its tensors as they are."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            inflated = sum(entry.file_size for entry in archive.infolist())
        if inflated > path.stat().st_size:
            raise ValueError(f"{path}: expected a file of PyTorch, got a zip file that inflates to {inflated} bytes")
