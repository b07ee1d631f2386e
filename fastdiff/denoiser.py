"""A network that denoises: model, process and objective together give one prediction, in any parametrisation."""

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import ops, transforms
from .cast import TYPES, Casts
from .objective import OBJECTIVES, conversion_rows
from .ops.checks import check_choice, check_floating
from .process import Process
from .reference import work_dtype
from .rows import make_rows
from .steps import denoise_rows


class Prediction(NamedTuple):
    """What the model says of a state.

    pred: (B, ...), the prediction.
    raw_variance: (B, ...), or None if the variance is not learned.
    uncond: (B, ...), the prediction without the condition, or None without guidance.
    """

    pred: Tensor
    raw_variance: Tensor | None = None
    uncond: Tensor | None = None


class Denoiser(nn.Module):
    """A network that denoises along a process.

    Args:
        model: called as model(x_t, condition, **model_kwargs) with x_t (B, ...) and condition (B,), what
            process.condition makes of the times; returns the prediction, shaped like x_t, as a tensor or as the
            attribute `sample` of an object. With a learned variance it returns twice the channels.
        process: the noise levels, and what the model sees of them.
        objective: what the model predicts, a name of fastdiff.objective.OBJECTIVES.
        clip: the estimate of x_0 is kept in [-clip, clip] in sampling and in the bound; None leaves it free.

    Attributes that a formulation may set: `variance`, of the reverse steps, and `learns_variance`. Times t are levels
    1..T in a chain, and times in (0, 1] of an SDE.

    Raises: TypeError or ValueError, naming the argument.
    """

    variance = "posterior"
    learns_variance = False

    def __init__(self, model: nn.Module, process: Process, objective: str, clip: float | None = None) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        check_choice("objective", objective, OBJECTIVES)
        if clip is not None and not clip > 0:
            raise ValueError(f"clip: expected a number above 0 or None, got {clip}")
        self.model, self.process = model, process
        self.objective, self.clip = objective, clip
        self._casts = Casts()

    # --- what the model says ----------------------------------------------------------------------------------

    def predict_x0(self, x_t: Tensor, t: float | Tensor, *, out: Tensor | None = None, **model_kwargs: Any) -> Tensor:
        """The model's estimate of x_0, clipped.

        Args:
            x_t: (B, ...), the state.
            t: its times, a number, () or (B,).
            out: as in fastdiff.ops.

        Reference: Ho et al. 2020, eq. 15.
        """
        t = self.checked_times("x_t", x_t, t)
        pred = self.call_model(x_t, self.condition(t), model_kwargs).pred
        rows, index = self.denoise_rows(t, x_t.dtype)
        return ops.update(x_t, pred, rows, index, clip=self.clip, noisy=False, out=out)

    def predict(
        self, x_t: Tensor, t: float | Tensor, wanted: str, *, out: Tensor | None = None, **model_kwargs: Any
    ) -> Tensor:
        """The prediction as "eps", "x0", "v" or "score", whichever the model was trained on, unclipped.

        Args:
            x_t: (B, ...), the state.
            t: its times, a number, () or (B,).
            wanted: a name of fastdiff.objective.OBJECTIVES, which says how they follow from each other.
            out: as in fastdiff.ops.

        Raises: ValueError for an unknown name.
        """
        check_choice("wanted", wanted, OBJECTIVES)
        t = self.checked_times("x_t", x_t, t)
        pred = self.call_model(x_t, self.condition(t), model_kwargs).pred
        from_x, from_pred = conversion_rows(self.process.at(t.double()), self.objective, wanted)
        rows = make_rows(from_x, work_dtype(x_t.dtype), from_x=from_x, from_pred=from_pred)
        return ops.update(x_t, pred, rows, torch.arange(len(x_t), device=x_t.device), noisy=False, out=out)

    def call_model(
        self, x: Tensor, condition: Tensor, model_kwargs: dict[str, Any], guided: bool = False
    ) -> Prediction:
        """One call of the model.

        Args:
            x: (B, ...), the state, in any floating type; it is cast to the model's.
            condition: (B,), see `condition`.
            model_kwargs: the model's further arguments; if guided, those of both branches stacked along the batch.
            guided: whether to ask for the prediction without the condition too, in the same call.

        Raises: TypeError or ValueError if the model returns anything but a prediction of the right shape.
        """
        dtype = self.parameter_dtype
        # Under autocast the network casts for itself.
        x = x if dtype is None or torch.is_autocast_enabled(x.device.type) else x.to(dtype)
        if guided:
            x, condition = torch.cat((x, x)), torch.cat((condition, condition))
        out = self.model(x, condition, **model_kwargs)
        pred = out if isinstance(out, Tensor) else getattr(out, "sample", None)
        if not isinstance(pred, Tensor):
            raise TypeError(f"model: expected a tensor or an object with a tensor `sample`, got {type(out).__name__}")
        expected = (x.shape[0], 2 * x.shape[1], *x.shape[2:]) if self.learns_variance else tuple(x.shape)
        if pred.shape != expected:
            raise ValueError(f"model: expected an output of shape {expected}, got {tuple(pred.shape)}")
        pred, raw = pred.chunk(2, 1) if self.learns_variance else (pred, None)
        if not guided:
            return Prediction(pred, raw)
        pred, uncond = pred.chunk(2)
        return Prediction(pred, None if raw is None else raw.chunk(2)[0], uncond)

    def time_arguments(self, condition: Tensor) -> dict[str, Tensor]:
        """What the model computes ahead of a loop from the conditions (N,), see fastdiff.sampling; {} if nothing.

        A copy of another type takes it from the model that it is a copy of: in float32, rounded once.
        """
        declared = getattr(self.__dict__.get("_original", self).model, "time_arguments", None)
        computed: dict[str, Tensor] = {} if declared is None else declared(condition)
        dtype = self.parameter_dtype
        return {name: rows.to(dtype) if rows.is_floating_point() else rows for name, rows in computed.items()}

    def cast(self, dtype: torch.dtype | None) -> "Denoiser":
        """This denoiser with a copy of its model in another type, or itself if dtype is None or the model's own.

        The copy is kept, and follows the weights at every call. The state and all tables stay as they are.

        Raises: TypeError for a type other than bfloat16 and float16.
        """
        if dtype is None:
            return self
        if dtype not in TYPES:
            raise TypeError(f"dtype: expected torch.bfloat16 or torch.float16, got {dtype}")
        if dtype == self.parameter_dtype:
            return self
        made = copy.copy(self)
        made.__dict__["_modules"] = {**self._modules, "model": self._casts.get(self.model, dtype)}
        made.__dict__["_original"] = self
        return made

    # --- times and rows ---------------------------------------------------------------------------------------

    def condition(self, times: Tensor) -> Tensor:
        """What the model sees of the times (N,): indices as they are, numbers in the type of the state."""
        condition = self.process.condition(times)
        return condition.to(self.dtype) if condition.is_floating_point() else condition

    def checked_times(self, name: str, x: Tensor, t: Any) -> Tensor:
        """(B,) float64 times for the data x; uniformly drawn from [first, last] if t is None.

        Raises: ValueError or TypeError, naming x or t.
        """
        check_floating(name, x)
        first, last = self.process.first, self.process.last
        if t is None:
            return first + (last - first) * torch.rand(x.shape[:1], dtype=torch.float64, device=x.device)
        if not isinstance(t, Tensor):
            if isinstance(t, bool) or not isinstance(t, int | float):
                raise TypeError(f"t: expected a number or a tensor, got {type(t).__name__}")
            if not 0 < t <= last or not math.isfinite(t):
                raise ValueError(f"t: expected times in (0, {last:g}], got {t}")
            return torch.full(x.shape[:1], t, dtype=torch.float64, device=x.device)
        if not t.is_floating_point() or t.device != x.device:
            raise TypeError(f"t: expected a floating tensor on {x.device}, got {t.dtype} on {t.device}")
        if t.ndim > 1 or (t.ndim == 1 and len(t) not in (1, len(x))):
            raise ValueError(f"t: expected shape () or ({len(x)},), got {tuple(t.shape)}")
        # A look at a GPU's tensor would wait for it.
        seen = transforms.bare(t)
        if seen is not None and seen.is_cpu and not bool(((seen > 0) & (seen <= last)).all()):
            raise ValueError(f"t: expected times in (0, {last:g}], got {t}")
        return t.double().expand(len(x))

    def denoise_rows(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(rows, the row of each sample) that make x0hat of x_t and pred, for the times t (B,) and data of a type."""
        return own_rows(denoise_rows(self.process.at(t.double()), self.objective), dtype)

    def prior_std(self) -> float:
        """Standard deviation of the draw that sampling starts from, at `process.last`."""
        return self.process.at(torch.tensor([self.process.last], dtype=torch.float64, device="cpu")).prior_std()

    # --- where it lives ---------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        tensors = (*self.model.parameters(), *self.buffers())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    @property
    def parameter_dtype(self) -> torch.dtype | None:
        """The type of the model's parameters; None if it has none that is floating."""
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), None)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the state: float64 for a float64 model, else float32."""
        return work_dtype(self.parameter_dtype or torch.float32)


def own_rows(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(rows, the row of each sample), if each sample has a row of its own; in the type of the state of such data."""
    return rows.to(work_dtype(dtype)), torch.arange(len(rows), device=rows.device)
