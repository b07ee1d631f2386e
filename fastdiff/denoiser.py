"""A network that denoises: model, process and objective together give one prediction, in any parametrisation."""

import copy
import itertools
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .arguments import check_call, merged
from .cast import TYPES, Casts
from .objective import OBJECTIVES, conversion_rows
from .ops.checks import FLOATING, as_clip, check_choice, check_floating, check_out
from .process import Process
from .reference import work_dtype
from .rows import make_rows
from .steps import VARIANCES, denoise_rows
from .support import modes, transforms, walk
from .support.settable import settable
from .support.shapes import fits
from .support.sharded import as_forward, is_sharded

# The argument by which a network is told its own estimate of x_0, see fastdiff.estimates.
TOLD = "x_self_cond"


class Prediction(NamedTuple):
    """What the model says of a state.

    pred: (B, ...), the prediction.
    raw_variance: (B, ...), or None if the variance is not learned.
    uncond: (B, ...), the prediction without the condition, or None without guidance.
    """

    pred: Tensor
    raw_variance: Tensor | None = None
    uncond: Tensor | None = None


def prediction_of(out: Any) -> Tensor:
    """The tensor in what a network returns. TypeError if there is none."""
    pred = out if isinstance(out, Tensor) else getattr(out, "sample", None)
    if not isinstance(pred, Tensor):
        raise TypeError(f"model: expected a tensor or an object with a tensor `sample`, got {type(out).__name__}")
    return pred


class Denoiser(nn.Module):
    """A network that denoises along a process.

    Args:
        model: called as model(x_t, condition, **model_kwargs) with x_t (B, ...) and condition (B,), what
            process.condition makes of the times; returns the prediction, shaped like x_t, as a tensor or as the
            attribute `sample` of an object. With a learned variance it returns twice the channels.
        process: the noise levels, and what the model sees of them.
        objective: what the model predicts, a name of fastdiff.objective.OBJECTIVES.
        clip: the estimate of x_0 is kept in [-clip, clip] in sampling and in the bound; None leaves it free.

    `process`, `objective`, `clip` and `variance` (of the reverse steps, "posterior" at first) may be set later; all
    else follows. Times t are levels 1..T in a chain, and else in (0, process.last].

    Raises: TypeError or ValueError, naming the argument.
    """

    process: Process = settable("process")
    objective: str = settable("objective")
    clip: float | None = settable("clip", as_clip)
    variance: str = settable("variance")

    def __init__(self, model: nn.Module, process: Process, objective: str, clip: float | None = None) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        self.model, self.process = model, process
        self.objective, self.clip, self.variance = objective, clip, "posterior"
        self._casts = Casts()
        Denoiser.apply_options(self)

    def apply_options(self) -> None:
        """Check the options together, after one was set. Raises: TypeError or ValueError, naming the option."""
        if not isinstance(self.process, Process):
            raise TypeError(f"process: expected a fastdiff.process.Process, got {type(self.process).__name__}")
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("variance", self.variance, VARIANCES)

    @property
    def learns_variance(self) -> bool:
        """Whether the model returns twice the channels, the second half for the variance."""
        return self.variance == "learned"

    @property
    def self_conditioned(self) -> bool:
        """Whether the model says that it takes its own estimate of x_0."""
        return bool(getattr(self.model, "self_condition", False))

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(getattr(type(self), name, None), "__set__"):  # an option, though its value may be a module
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    # --- what the model says ----------------------------------------------------------------------------------

    def predict_x0(self, x_t: Tensor, t: float | Tensor, *, out: Tensor | None = None, **model_kwargs: Any) -> Tensor:
        """The model's estimate of x_0, clipped.

        Args:
            x_t: (B, ...), the state.
            t: its times, a number, () or (B,).
            out: as in fastdiff.ops.

        Returns: (B, ...), typed like x_t.
        Raises: ValueError or TypeError, naming the argument.
        Reference: Ho et al. 2020, eq. 15.
        """
        t = self.checked_times("x_t", x_t, t)
        if out is not None:
            check_out(out, x_t, x_t)
        pred = as_forward(self, self.call_model)(x_t, self.condition(t), merged(model_kwargs)).pred
        rows, index = self.denoise_rows(t, x_t.dtype)
        return ops.update(x_t, pred, rows, index, clip=self.clip, noisy=False, out=out)

    def predict(
        self, x_t: Tensor, t: float | Tensor, wanted: str, *, out: Tensor | None = None, **model_kwargs: Any
    ) -> Tensor:
        """The prediction as "eps", "x0", "v", "score", "flow" or "edm", whatever the model was trained on, unclipped.

        Args:
            x_t: (B, ...), the state.
            t: its times, a number, () or (B,).
            wanted: one of them, a name of fastdiff.objective.OBJECTIVES.
            out: as in fastdiff.ops.

        Returns: (B, ...), typed like x_t.
        Raises: ValueError or TypeError, naming the argument.
        """
        check_choice("wanted", wanted, OBJECTIVES)
        t = self.checked_times("x_t", x_t, t)
        if out is not None:
            check_out(out, x_t, x_t)
        pred = as_forward(self, self.call_model)(x_t, self.condition(t), merged(model_kwargs)).pred
        from_x, from_pred = conversion_rows(self.process.at(t.double()), self.objective, wanted)
        rows, index = own_rows(make_rows(from_x, from_x=from_x, from_pred=from_pred), x_t.dtype)
        return ops.update(x_t, pred, rows, index, noisy=False, out=out)

    def call_model(
        self,
        x: Tensor,
        condition: Tensor,
        model_kwargs: dict[str, Any],
        guided: bool = False,
        own_estimate: Tensor | None = None,
    ) -> Prediction:
        """One call of the model.

        Args:
            x: (B, ...), the state, in any floating type. It is cast to the model's type if all weights have the same.
            condition: (B,), see `condition`; (2 B,) if guided.
            model_kwargs: the model's further arguments; if guided, those of both branches stacked along the batch.
            guided: whether to ask for the prediction without the condition too, in the same call.
            own_estimate: (B, ...), the estimate of x_0 that a self-conditioned model is given, in both branches.

        Raises: TypeError or ValueError if the model returns anything but a prediction of the right shape.
        """
        x = self._as_model(x)
        x = torch.cat((x, x)) if guided else x
        if own_estimate is not None:
            estimate = self._as_model(own_estimate)
            model_kwargs = {**model_kwargs, TOLD: torch.cat((estimate, estimate)) if guided else estimate}
        try:
            out = modes.call(self.model, x, condition, **model_kwargs)
        except (RuntimeError, IndexError, TypeError) as error:
            self._explain(error, x, condition, model_kwargs)
            raise
        pred = prediction_of(out)
        if self.learns_variance and x.ndim < 2:
            raise ValueError(f"x: expected channels, (B, C, ...), with a learned variance, got shape {tuple(x.shape)}")
        expected = (x.shape[0], 2 * x.shape[1], *x.shape[2:]) if self.learns_variance else tuple(x.shape)
        if pred.shape != expected:
            raise ValueError(f"model: expected an output of shape {expected}, got {tuple(pred.shape)}")
        pred, raw = pred.chunk(2, 1) if self.learns_variance else (pred, None)
        if not guided:
            return Prediction(pred, raw)
        pred, uncond = pred.chunk(2)
        return Prediction(pred, None if raw is None else raw.chunk(2)[0], uncond)

    def evaluating(self) -> modes.evaluating:
        """A block in eval mode, for a step of a walk. Calls of the model by other threads wait for its end."""
        return modes.evaluating(self.model, self)

    def _as_model(self, x: Tensor) -> Tensor:
        """x in the type of the model's weights; as it is if they differ, or where autocast has the network cast."""
        first = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), None)
        if first is None or first == x.dtype or _is_autocast(x.device):
            return x
        dtype = self.parameter_dtype
        return x if dtype is None else x.to(dtype)

    def _explain(self, error: Exception, x: Tensor, condition: Tensor, model_kwargs: dict[str, Any]) -> None:
        """Say why the model failed, if it was its arguments, another device, or a time between the levels of a chain.

        Raises: ValueError or TypeError, naming the argument.
        """
        check_call(self.model, x, condition, model_kwargs)
        if x.device != self.device and not isinstance(error, torch.OutOfMemoryError):
            raise ValueError(f"x: expected device {self.device}, where the model is, got {x.device}") from error
        whole = condition.round().long()
        if not condition.is_floating_point() or self.process.condition(whole).is_floating_point():
            return
        try:
            modes.call(self.model, x, whole, **model_kwargs)
        except Exception:
            return
        raise ValueError(
            "model: expected a network of real times, since sampler 'heun' on Karras' levels, sampler 'ode' and "
            f"log_likelihood ask between levels; this one takes whole times only ({str(error).splitlines()[0]}). "
            "sampler='heun' also takes whole levels, as in steps=model.process.grid(20)"
        ) from error

    def time_arguments(self, condition: Tensor) -> dict[str, Tensor]:
        """What the model computes ahead of a loop from the conditions (N,), see fastdiff.sampling; {} if nothing.

        A copy of another type takes it from the model that it is a copy of: in float32, rounded once. Weights that FSDP
        splits are whole within the model's forward alone, which then computes it.
        """
        if is_sharded(self):
            return {}
        declared = getattr(self.__dict__.get("_original", self).model, "time_arguments", None)
        computed: dict[str, Tensor] = {} if declared is None else declared(condition)
        dtype = self.parameter_dtype
        if dtype is None:
            return computed
        return {name: rows.to(dtype) if rows.is_floating_point() else rows for name, rows in computed.items()}

    def cast(self, dtype: torch.dtype | None) -> "Denoiser":
        """This denoiser with a copy of its model in another type, or itself if dtype is None or the model's own.

        The copy is kept, and follows the weights at every call. The state and all tables stay as they are.

        Raises: TypeError for a type other than bfloat16 and float16; ValueError for weights that FSDP splits.
        """
        if dtype is None or dtype == self.parameter_dtype:
            return self
        if dtype not in TYPES:
            raise TypeError(f"dtype: expected torch.bfloat16 or torch.float16, got {dtype!r}")
        if is_sharded(self):
            raise ValueError("dtype: expected None with weights that FSDP splits; its MixedPrecisionPolicy casts them")
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
        """(B,) float64 times for the data x, drawn as training does if t is None.

        Raises: ValueError or TypeError, naming x or t.
        """
        check_floating(name, x)
        last = self.process.last
        if t is None:
            return self.times_at(torch.rand(x.shape[:1], dtype=torch.float64, device=x.device))
        if not isinstance(t, Tensor):
            if isinstance(t, bool) or not isinstance(t, Real):
                raise TypeError(f"t: expected a number or a tensor, got {type(t).__name__}")
            t = float(t)
            if not 0 < t <= last:
                raise ValueError(f"t: expected times in (0, {last:g}], got {t}")
            return torch.full(x.shape[:1], t, dtype=torch.float64, device=x.device)
        if not t.is_floating_point() or t.device != x.device:
            raise TypeError(f"t: expected a floating tensor on {x.device}, got {t.dtype} on {t.device}")
        if t.ndim > 1 or (t.ndim == 1 and not fits(t.shape[0], x.shape[0])):
            raise ValueError(f"t: expected shape () or ({x.shape[0]},), got {tuple(t.shape)}")
        seen = transforms.visible(t)
        if seen is not None and not bool(((seen > 0) & (seen <= last)).all()):
            raise ValueError(f"t: expected times in (0, {last:g}], got {t}")
        return t.double().expand(x.shape[0])

    def times_at(self, quantiles: Tensor) -> Tensor:
        """The times (B,) at quantiles (B,) in [0, 1) of the distribution that training draws them from."""
        first, last = self.process.first, self.process.last
        return first + (last - first) * quantiles.double()

    def denoise_rows(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(rows, the row of each sample) that make x0hat of x_t and pred, for the times t (B,) and data of a type."""
        return own_rows(denoise_rows(self.process.at(t.double()), self.objective), dtype)

    def prior_std(self) -> float:
        """Standard deviation of the draw that sampling starts from, at `process.last`."""
        with transforms.with_values():
            return self.process.at(torch.tensor([self.process.last], dtype=torch.float64, device="cpu")).prior_std()

    # --- where it lives ---------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the model computes, see `device_for`."""
        return self.device_for()

    def device_for(self, *given: Tensor | None) -> torch.device:
        """Where to compute: where the weights lie. Offloaded weights (all on the meta device, with hooks of Accelerate)
        say where they will be. A model without weights follows the first given tensor, else PyTorch's default device.
        """
        tensors = itertools.chain(self.model.parameters(), self.model.buffers())
        found = next(tensors, None)
        if found is not None and found.device.type == "meta":
            found = next((t for t in tensors if t.device.type != "meta"), found)
            hooked = _execution_device(self.model)
            if hooked is not None:
                return hooked
        if found is not None:
            return found.device
        return next((t.device for t in given if isinstance(t, Tensor)), torch.get_default_device())

    @property
    def parameter_dtype(self) -> torch.dtype | None:
        """The type of the model's floating parameters; None if there are none, several, or one without arithmetic."""
        found = {p.dtype for p in walk.parameters(self.model)}
        floating = [dtype for dtype in found if dtype.is_floating_point]
        return floating[0] if len(floating) == 1 and floating[0] in FLOATING else None

    @property
    def dtype(self) -> torch.dtype:
        """The type of the state: float64 for a float64 model, else float32."""
        return work_dtype(self.parameter_dtype or torch.float32)


def _is_autocast(device: torch.device) -> bool:
    """Whether autocast is on; there is none on the meta device."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def _execution_device(model: nn.Module) -> torch.device | None:
    """Where Accelerate's hooks bring the inputs of a model or a part of it; None without them."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return None


def own_rows(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(rows, the row of each sample) where each sample has its own row, in the type that such data is computed in."""
    index = torch.arange(rows.shape[0], device=rows.device)
    if rows.shape[0] == 0:  # a table has a row, also for no samples
        rows = rows.new_zeros(1, rows.shape[1])
    return rows.to(work_dtype(dtype)), index
