"""What the schedulers of fastdiff.interop.diffusers share: cached tables, timesteps on the host, noise."""

import functools
import inspect
import math
import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ... import ops
from ...cache import Tables

Generators = torch.Generator | list[torch.Generator] | None


def with_fused_noise(stock: type) -> Callable[..., None]:
    """stock.__init__ with the keyword fused_noise, which stays out of the configuration."""

    @functools.wraps(stock.__init__)  # type: ignore[misc]
    def __init__(self: Any, *args: Any, fused_noise: bool = False, **kwargs: Any) -> None:
        stock.__init__(self, *args, **kwargs)  # type: ignore[misc]
        self.fused_noise = fused_noise

    signature = inspect.signature(stock.__init__)  # type: ignore[misc]
    keyword = inspect.Parameter("fused_noise", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool)
    __init__.__signature__ = signature.replace(parameters=[*signature.parameters.values(), keyword])  # type: ignore[attr-defined]
    return __init__


class FusedScheduler:
    """What the schedulers share: cached tables, timesteps on the host, noise."""

    config: Any
    timesteps: Tensor
    fused_noise: bool
    _tables: Tables
    _run: tuple[Tensor, list[tuple[int, int]], list[bytes]] | None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        scheduler = super().__new__(cls)
        scheduler._tables, scheduler._run = Tables(), None
        if cls.__module__ == "fastdiff.interop.diffusers":
            # Pipelines write this into model_index.json as the library that the class comes from.
            scheduler.__module__ = "diffusers"
        return scheduler

    def _host_timesteps(self) -> list[float]:
        return self._tables.get("timesteps", self.timesteps.tolist, (self.timesteps,))

    def _number(self, timestep: Any) -> Any:
        """The timestep as a number, or None where finding out would wait for a device or break a graph."""
        if not isinstance(timestep, Tensor):
            return timestep if isinstance(timestep, float) else operator.index(timestep)
        if torch.compiler.is_compiling() or timestep.numel() != 1:
            return None
        if timestep.device.type == "cpu":
            return timestep.reshape(()).tolist()
        steps = self.timesteps
        if steps.device == timestep.device and _memory(steps) == _memory(timestep) and steps.dtype == timestep.dtype:
            place, rest = divmod(int(timestep.storage_offset() - steps.storage_offset()), int(steps.stride(0)))
            if rest == 0 and 0 <= place < len(steps):
                return self._host_timesteps()[place]
        return None

    def _threshold_sample(self, sample: Tensor) -> Tensor:
        """Dynamic thresholding (Saharia et al. 2022, arXiv:2205.11487, section 2.3); stock's breaks the graph."""
        x0 = sample.flatten(1).to(table_dtype(sample))
        s = quantile(x0.abs(), self.config.dynamic_thresholding_ratio).clamp(min=1, max=self.config.sample_max_value)
        return (x0.clamp(-s, s) / s).reshape(sample.shape).to(sample.dtype)

    def _noise(self, like: Tensor, generator: Generators, index: Tensor) -> dict[str, Any]:
        """The noise of a step as arguments of `ops.update`: the stock draw, or the seed of the kernel's."""
        if not self.fused_noise:
            return {"noise": randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)}
        if generator is None:
            return {"seed": None}
        generators = generator if isinstance(generator, list) else [generator]
        if len(generators) not in (1, len(like)):
            raise ValueError(f"generator: expected a list of {len(like)}, one per sample, got {len(generators)}")
        self._warn_of_used(generators)
        if len(generators) == 1:
            return {"seed": generators[0].initial_seed()}
        rows = zip(like.split(1), generators, index.expand(len(like)).split(1), strict=True)
        return {"noise": torch.cat([normal(one, g.initial_seed(), step) for one, g, step in rows])}

    def _warn_of_used(self, generators: list[torch.Generator]) -> None:
        """Loops over pipelines go on with one generator, for new images; its seed has the noise of one run only."""
        if self._run is not None and self._run[0] is self.timesteps:  # set_timesteps starts a run
            return
        names = [(id(g), g.initial_seed()) for g in generators]
        states = [g.get_state().numpy().tobytes() for g in generators]
        if self._run is not None and self._run[1] == names and self._run[2] != states:
            seeds = ", ".join(str(seed) for _, seed in names)
            warnings.warn(
                f"fused_noise: the noise of seed {seeds} again; seed the generator for each run", stacklevel=4
            )
        self._run = self.timesteps, names, states


def quantile(values: Tensor, q: float) -> Tensor:
    """torch.quantile(values, q, dim=1, keepdim=True) of values (B, n), to the bit. That one sorts all of a row, takes
    rows of up to 16 million, and in torch 2.11 waits for the device."""
    n = values.shape[1]
    # The rank is rounded in the type of the values, as torch.quantile does, by no more than 1 + n / 2^22 places.
    top = values.topk(min(n, n - math.floor(q * (n - 1)) + 1 + (n >> 22)), dim=1).values
    largest = top[:, :1]  # NaN where any value is
    rank = torch.full_like(largest, q) * (n - 1)
    below = rank.floor()
    low, high = (top.gather(1, (n - 1 - place.long()).clamp(min=0)) for place in (below, rank.ceil()))
    return torch.where(largest.isnan(), largest, low.lerp(high, rank - below))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def normal(like: Tensor, seed: int | None, index: Tensor) -> Tensor:
    return ops.normal(like.shape, seed, step=index, stream=ops.REVERSE, dtype=like.dtype, device=like.device)


def index_of(timestep: Any, device: torch.device) -> Tensor:
    """(1,) or (B,) int64 on the device; one number of the host gets there as an argument of a kernel, not as a copy."""
    if isinstance(timestep, Tensor):
        compiling = torch.compiler.is_compiling()
        if timestep.device == device or compiling or timestep.device.type != "cpu" or timestep.numel() != 1:
            return timestep.to(device, torch.int64).reshape(-1)
        timestep = timestep.reshape(()).tolist()
    return torch.full((1,), int(timestep), dtype=torch.int64, device=device)


def promoted(*tensors: Tensor) -> tuple[Tensor, ...]:
    if all(t.dtype == tensors[0].dtype for t in tensors):
        return tensors
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    return tuple(t.to(dtype) for t in tensors)


def table_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def noising(x: Tensor, noise: Tensor, index: Tensor, table: Tensor) -> Tensor:
    """alpha x + sigma noise with the promotion and broadcasting of stock."""
    x, noise = promoted(x, noise)
    shape = torch.broadcast_shapes(x.shape, noise.shape, (len(index), *[1] * (x.ndim - 1)))
    if not x.shape == noise.shape == shape:
        x, noise = x.expand(shape), noise.expand(shape)
    return ops.noising(x, index, table, noise=noise)
