"""What the schedulers of fastdiff.interop.diffusers share: kept tables, timesteps on the host, noise, levels."""

import functools
import inspect
import math
import operator
import warnings
from collections.abc import Callable
from numbers import Integral
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ... import ops
from ...ops.checks import FLOATING
from ...reference import work_dtype
from ...rows import make_rows
from ...support import transforms
from ...support.cache import Tables
from ...support.plain import as_defined
from ..stock import noising, overridden, reached, stamp

PREDICTIONS = ("epsilon", "sample", "v_prediction")
LARGE = 2.0**60  # a power of 2 beyond all 1 / alpha but infinity
DOUBLE_RANKS = torch.__version__ >= "2.14"  # of quantiles, where the device has float64
Generators = torch.Generator | list[torch.Generator] | None


class FusedScheduler:
    """The base of our schedulers. It keeps their tables, reads timesteps without a wait and makes their noise.

    A scheduler is a class that names the one of diffusers that it stands for:

        class DDPMScheduler(FusedScheduler, diffusers.DDPMScheduler, stock=diffusers.DDPMScheduler)

    It gets the constructor of that class with the keyword fused_noise, and the public path of this package. Stock's
    method runs instead of one here that returns NotImplemented, and on objects that override what stock's calls.
    """

    stock: ClassVar[type]
    config: Any
    timesteps: Tensor
    fused_noise: bool
    _tables: Tables
    _tables_of: Any  # the configuration that they are made of
    _last_run: tuple[Tensor, list[tuple[int, int]], list[bytes]] | None

    def __init_subclass__(cls, stock: type | None = None) -> None:
        super().__init_subclass__()
        if stock is None:  # a subclass of the user's, or a base
            return
        cls.stock, cls.__module__ = stock, __package__
        cls.__init__ = with_fused_noise(stock)  # type: ignore[method-assign]
        replaced: dict[str, dict[str, Any]] = {}
        for name in dir(stock):
            ours, theirs = getattr(cls, name), getattr(stock, name)
            if not name.startswith("__") and inspect.isfunction(theirs) and ours is not theirs:
                replaced[name] = {}
                setattr(cls, name, or_stock(ours, stock, name, replaced[name]))
        for name, used in replaced.items():  # once all of them are in their places
            used.update({n: as_defined(stock, n) and getattr(cls, n) for n in reached(stock, name)})

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        scheduler = super().__new__(cls)
        scheduler._tables, scheduler._tables_of, scheduler._last_run = Tables(stamp), None, None
        if "stock" in vars(cls):
            # Pipelines write this into model_index.json as the library that the class comes from.
            scheduler.__module__ = "diffusers"
        return scheduler

    def _table(self, name: str, build: Callable[[], Any], sources: tuple[Tensor, ...], *key: Any) -> Any:
        """build(), kept while the key and the values of the sources stay as they are, also in tensors of later runs."""
        if self._tables_of is not self.config:
            self._tables, self._tables_of = Tables(stamp), self.config
        return self._tables.get(name, build, sources, *key)

    def _host_timesteps(self) -> list[float]:
        return self._table("timesteps", lambda: transforms.as_list(self.timesteps), (self.timesteps,))

    def _number(self, timestep: Any) -> Any:
        """The timestep as a number, or None if finding out would wait for a device or break a graph."""
        if not isinstance(timestep, Tensor):
            if isinstance(timestep, np.ndarray):
                return timestep.item() if timestep.size == 1 else None
            return float(timestep) if isinstance(timestep, float | np.floating) else operator.index(timestep)
        if torch.compiler.is_compiling() or timestep.numel() != 1:
            return None
        if timestep.device.type == "cpu":
            return transforms.as_list(timestep.reshape(()))
        steps = self.timesteps
        if steps.device == timestep.device and _memory(steps) == _memory(timestep) and steps.dtype == timestep.dtype:
            place, rest = divmod(int(timestep.storage_offset() - steps.storage_offset()), int(steps.stride(0)))
            if rest == 0 and 0 <= place < len(steps):
                return self._host_timesteps()[place]
        return None

    def _threshold_sample(self, sample: Tensor) -> Tensor:
        """Dynamic thresholding (Saharia et al. 2022, arXiv:2205.11487, section 2.3). Stock's breaks the graph."""
        x0 = sample.flatten(1).to(work_dtype(sample))
        s = quantile(x0.abs(), self.config.dynamic_thresholding_ratio).clamp(min=1, max=self.config.sample_max_value)
        return (x0.clamp(-s, s) / s).reshape(sample.shape).to(sample.dtype)

    def _noise(self, like: Tensor, generator: Generators, index: Tensor | int) -> dict[str, Any]:
        """The noise of a step as arguments of `ops.update`: the tensor that stock draws, or the kernel's seed."""
        if not self.fused_noise:
            return {"noise": drawn(like, generator)}
        if generator is None:
            return {"seed": None}
        generators = generator if isinstance(generator, list) else [generator]
        if len(generators) not in (1, len(like)):
            raise ValueError(f"generator: expected a list of {len(like)}, one per sample, got {len(generators)}")
        self._warn_of_used(generators)
        if len(generators) == 1:
            return {"seed": generators[0].initial_seed()}
        steps = index_of(index, like.device).expand(len(like)).split(1)
        rows = zip(like.split(1), generators, steps, strict=True)
        return {"noise": torch.cat([normal(one, g.initial_seed(), step) for one, g, step in rows])}

    def _warn_of_used(self, generators: list[torch.Generator]) -> None:
        """Warn if a second run goes on with the same generator: its seed would give the noise of the first run."""
        if self._last_run is not None and self._last_run[0] is self.timesteps:  # set_timesteps starts a run
            return
        names = [(id(g), g.initial_seed()) for g in generators]
        states = [g.get_state().numpy().tobytes() for g in generators]
        if self._last_run is not None and self._last_run[1] == names and self._last_run[2] != states:
            seeds = ", ".join(str(seed) for _, seed in names)
            warnings.warn(
                f"fused_noise: the noise of seed {seeds} again; seed the generator for each run", stacklevel=4
            )
        self._last_run = self.timesteps, names, states


def or_stock(ours: Any, kind: type, name: str, used: dict[str, Any]) -> Any:
    """`ours`, or the method `name` of the stock class `kind`.

    Stock's runs if `ours` returns NotImplemented, if the object overrides one of `used`, or if it was patched.
    """
    original = as_defined(kind, name)
    draws = "generator" in inspect.signature(getattr(kind, name)).parameters

    @functools.wraps(ours)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        stock = getattr(kind, name)
        if stock is original and not overridden(self, used):
            result = ours(self, *args, **kwargs)
            if result is not NotImplemented:
                return result
        if draws and self.fused_noise:
            warnings.warn(f"fused_noise: {kind.__name__}.{name} runs here and draws the noise as stock", stacklevel=2)
        return stock(self, *args, **kwargs)

    return method


@functools.cache
def say_once(what: str) -> None:
    """Warn, once in a process, that stock's code runs."""
    warnings.warn(f"{what}: stock's step runs, which is not fused", stacklevel=4)


def alike(first: Tensor, *others: Tensor) -> bool:
    """Whether a fused step takes them: floating tensors of one shape, with a batch, on one device."""
    shape, device = first.shape, first.device
    for t in others:  # no generator: this comes with every step
        if t.dtype not in FLOATING or t.shape != shape or t.device != device:
            return False
    return first.dtype in FLOATING and len(shape) > 0


def addable(x: Tensor, noise: Tensor) -> bool:
    """Whether fused noising takes them: floating tensors with a batch on one device, which may broadcast."""
    return 0 < x.ndim == noise.ndim and x.device == noise.device and x.dtype in FLOATING and noise.dtype in FLOATING


def typed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x, or an empty tensor like it of this type: what noise is to be like."""
    return x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)


def is_level(timestep: Any) -> bool:
    """Whether it is an integer or a tensor of integers."""
    if isinstance(timestep, Tensor):
        return not timestep.is_floating_point() and timestep.dtype not in (torch.bool, torch.uint8)  # these are masks
    return isinstance(timestep, Integral) and not isinstance(timestep, bool)


class LevelScheduler(FusedScheduler):
    """A scheduler whose timestep is a level of alphas_cumprod."""

    alphas_cumprod: Tensor

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise in one pass."""
        if not (is_level(timesteps) and addable(original_samples, noise)):
            return NotImplemented
        table = self._levels(original_samples, 1)
        return noising(original_samples, noise, index_of(timesteps, original_samples.device), table)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) x_0 in one pass."""
        if not (is_level(timesteps) and addable(sample, noise)):
            return NotImplemented
        return noising(noise, sample, index_of(timesteps, sample.device), self._levels(sample, -1))

    def _levels(self, like: Tensor, sign: int) -> Tensor:
        """(alpha_t, sign sigma_t), one row per timestep."""

        def build() -> Tensor:
            alpha_bar = self.alphas_cumprod.to(dtype)
            return torch.stack((alpha_bar**0.5, sign * (1 - alpha_bar) ** 0.5), 1).to(like.device)

        dtype = work_dtype(like)
        return self._table(f"levels {sign}", build, (self.alphas_cumprod,), like.device, dtype)

    def _ratio(
        self,
        name: str,
        terms: Callable[[Tensor, Tensor], tuple[Tensor | float, Tensor, Tensor | float]],
        x: Tensor,
        y: Tensor,
        index: Tensor,
        clip: float | None = None,
    ) -> Tensor:
        """clip((a x + b y) / divisor) at the timesteps `index`, where a, b, divisor = terms(alpha, sigma).

        On the CPU stock divides, and so does this, to the bit. On a GPU stock multiplies by the reciprocal.
        """
        cpu = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)

        def build() -> tuple[Tensor, Tensor | None]:
            alpha_bar = self.alphas_cumprod
            a, b, divisor = terms(alpha_bar**0.5, (1 - alpha_bar) ** 0.5)
            if cpu and isinstance(divisor, Tensor):
                rows = make_rows(alpha_bar, torch.float32, x0_from_x=a, x0_from_pred=b, from_x0=1.0)
                return rows.to(x.device), divisor.to(x.device)
            scale, after = 1 / divisor, 1.0
            if clip is None:
                scale, after = 1.0, scale
            elif isinstance(scale, Tensor):  # at alpha = 0 the clip says x_0 by the sign, which inf - inf does not have
                scale = scale.clamp(max=LARGE)
            rows = make_rows(
                alpha_bar, torch.float32, x0_from_x=a * scale, x0_from_pred=b * scale, from_x0=after
            )  # fmt: skip
            return rows.to(x.device), None

        rows, divisor = self._table(name, build, (self.alphas_cumprod,), x.device, cpu, clip is None)
        if divisor is None:
            return ops.combine(x, y, rows, index, clip=clip)
        out = ops.combine(x, y, rows, index).div_(divisor[index].reshape(-1, *[1] * (x.ndim - 1)))
        return out if clip is None else out.clamp_(-clip, clip)

    def _x0(self, model_output: Tensor, sample: Tensor, index: Tensor) -> Tensor:
        """The prediction of x_0, clipped or thresholded."""
        config = self.config
        clip = config.clip_sample_range if config.clip_sample and not config.thresholding else None
        if config.prediction_type == "epsilon":
            x0 = self._ratio("x0 of eps", lambda a, s: (1.0, -s, a), sample, model_output, index, clip)
        elif config.prediction_type == "v_prediction":
            x0 = self._ratio("x0 of v", lambda a, s: (a, -s, 1.0), sample, model_output, index, clip)
        else:
            x0 = model_output if clip is None else model_output.clamp(-clip, clip)
        return self._threshold_sample(x0) if config.thresholding else x0


def x0_from_level(prediction: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(a, b, c) of x_0 = c (a x + b pred) where x = alpha x_0 + sigma noise. As in stock the bracket is rounded before
    c."""
    one = torch.ones_like(alpha)
    if prediction == "epsilon":
        return one, -sigma, 1 / alpha
    return (0 * one, one, one) if prediction == "sample" else (alpha, -sigma, one)


def with_fused_noise(stock: type) -> Callable[..., None]:
    """stock.__init__ with the keyword fused_noise, which stays out of the configuration."""

    @functools.wraps(stock.__init__)  # type: ignore[misc]
    def __init__(self: Any, *args: Any, fused_noise: bool = False, **kwargs: Any) -> None:
        stock.__init__(self, *args, **kwargs)  # type: ignore[misc]
        self.fused_noise = fused_noise

    signature = inspect.signature(stock.__init__)  # type: ignore[misc]
    keyword = inspect.Parameter("fused_noise", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool)
    parameters = sorted((*signature.parameters.values(), keyword), key=lambda p: p.kind)  # before **kwargs, if any
    __init__.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return __init__


def quantile(values: Tensor, q: float) -> Tensor:
    """torch.quantile(values, q, dim=1, keepdim=True) of values (B, n), to the bit.

    Torch's own sorts the whole row on a GPU. Before torch 2.14 it takes at most 16 million values, and in 2.11 it waits
    for the device too.
    """
    n = values.shape[1]
    # Torch rounds q to the type of the values, and before 2.14 its rank too: by no more than 1 + n / 2^22 places.
    top = values.topk(min(n, n - math.floor(q * (n - 1)) + 1 + (n >> 22)), dim=1).values
    largest = top[:, :1]  # NaN if any value is
    in_double = DOUBLE_RANKS and values.device.type != "mps"
    rank = torch.full_like(largest, q).to(torch.float64 if in_double else largest.dtype) * (n - 1)
    below = rank.floor()
    places = n - 1 - torch.cat((below, rank.ceil()), 1).long()
    low, high = top.gather(1, places.clamp(min=0)).chunk(2, 1)
    return torch.where(largest.isnan(), largest, low.lerp(high, (rank - below).to(largest.dtype)))


def drawn(like: Tensor, generator: Generators) -> Tensor:
    """randn_tensor of diffusers; without a generator, where one call draws the same in less of the host's time."""
    if generator is None and type(like) is Tensor and (like.is_cpu or like.is_cuda) and like.is_contiguous():
        return torch.randn_like(like)
    return randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def normal(like: Tensor, seed: int | None, index: Tensor) -> Tensor:
    """The noise that the kernel draws at the timesteps `index`, shaped and typed like `like`."""
    return ops.normal(like.shape, seed, step=index, stream=ops.REVERSE, dtype=like.dtype, device=like.device)


def index_of(timestep: Any, device: torch.device) -> Tensor:
    """(1,) or (B,) int64 on the device. A number of the host gets there as a kernel's argument, not as a copy."""
    if isinstance(timestep, Tensor):
        compiling = torch.compiler.is_compiling()
        if timestep.device == device or compiling or timestep.device.type != "cpu" or timestep.numel() != 1:
            return timestep.to(device, torch.int64).reshape(-1)
        timestep = transforms.as_list(timestep.reshape(()))
    return torch.full((1,), int(timestep), dtype=torch.int64, device=device)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
