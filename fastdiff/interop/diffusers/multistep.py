"""What the multistep schedulers share: a step in one pass over a ring of what the model said before.

    m  = what the solver integrates, x_0 or eps, from x and the output of the model
    x' = from_x x + from_x0 m + noise z + the shares of what m was in the steps before

Stock keeps its outputs in a list, model_outputs. Here they are views of one tensor (order, B, ...), in which the m of
step i takes the place i % order, so nothing is moved.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import ops, reference
from ...ops.checks import wants_gradient
from ...reference import work_dtype
from ...rows import MAX_SLOTS, make_rows
from ...steps.weights import ring
from ...support import transforms
from ..stock import noising
from .common import FusedScheduler, addable, alike, index_of, say_once


class HistoryScheduler(FusedScheduler):
    """A scheduler whose steps use what the model said before."""

    _ring: Tensor | None = None
    _in_ring: tuple[Tensor | None, ...] = ()  # the tensors of stock's list that the slots stand for

    def _with_history(
        self, x: Tensor, pred: Tensor, rows: Tensor, i: int | Tensor, past: list[Tensor | None], slot: int | None,
        keep: str, **noise: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """(x', what row i keeps), by one launch.

        Args:
            past: what stock's list holds for each slot, None if nothing.
            slot: which slot the row overwrites, None if none.

        The kept tensor is a view of the ring, or without a kernel, where gradients are wanted, a tensor of its own.
        """
        noise = noise or {"noisy": False}
        several = len(past) > 1
        if wants_gradient(x, pred, *past, *noise.values()) or transforms.active():
            hist = torch.stack([torch.zeros_like(x) if p is None else p.to(x) for p in past])
            seed = noise.get("seed")
            if not noise.get("noisy", True) or "noise" in noise:
                z = noise.get("noise")
            else:
                z = ops.normal(x.shape, seed, step=index_of(i, x.device), stream=ops.REVERSE, device=x.device)
            step = index_of(i, x.device)
            self._ring = None
            out, kept = reference.update(
                x, pred, rows, step, None, None, None, None, z, hist if several else hist[0], None, keep, ops.REVERSE
            )
            return out, None if slot is None or kept is None else kept[slot] if several else kept
        hist = self._history(x, past)
        out = ops.update(x, pred, rows, i, hist=hist if several else hist[0], keep=keep, **noise)
        return out, None if slot is None else hist[slot]

    def _in_turn(
        self, x: Tensor, pred: Tensor, rows: Tensor, i: int, outputs: Sequence[Tensor | None], slots: int, **noise: Any
    ) -> tuple[Tensor, Tensor]:
        """(x', m) of step i; `outputs` are the m of the steps before it, the newest last."""
        # Slot j holds the m of step i - age, where age = 1..slots and (i - age) % slots = j.
        ages = [(i - 1 - j) % slots + 1 for j in range(slots)]
        past = [outputs[-age] if age <= len(outputs) else None for age in ages]
        prev_sample, kept = self._with_history(x, pred, rows, i, past, i % slots, "mix", **noise)
        past[i % slots] = kept
        self._in_ring = tuple(past)
        return prev_sample, kept  # type: ignore[return-value]  # it is kept, as a slot is named

    def _history(self, x: Tensor, past: list[Tensor | None]) -> Tensor:
        """The ring with `past` in its slots. It is filled anew unless the last step left it so."""
        held, old = self._ring, self._in_ring
        if (
            held is None
            or held.shape[1:] != x.shape
            or held.dtype != x.dtype
            or held.device != x.device
            or (not torch.compiler.is_compiling() and held.is_inference() != torch.is_inference_mode_enabled())
            or len(old) != len(past)
            or any(a is not b for a, b in zip(old, past, strict=True))
        ):
            held = torch.zeros_like(x[None].expand(len(past), *x.shape))
            for slot, tensor in zip(held, past, strict=True):
                if tensor is not None:
                    slot.copy_(tensor)
            self._ring = held
        return held


class MultistepScheduler(HistoryScheduler):
    """A solver of up to three orders that counts its steps, over levels x = alpha x_0 + sigma eps made of sigmas."""

    sigmas: Tensor
    model_outputs: list[Tensor | None]
    lower_order_nums: int
    step_index: int
    _begin_index: int | None

    def _takes(self, output: Tensor, sample: Tensor) -> bool:
        """Whether a fused step takes them, and what is remembered fits them."""
        order = self.config.solver_order
        if order > MAX_SLOTS:
            say_once(f"{type(self).__name__} with solver_order={order}")
        return (
            self.num_inference_steps is not None  # type: ignore[attr-defined]
            and 1 <= order <= MAX_SLOTS
            and len(self.model_outputs) == order
            and alike(sample, output)
            and all(m is None or (m.shape == sample.shape and m.device == sample.device) for m in self.model_outputs)
        )

    def _place(self, timestep: int | Tensor) -> int:
        """The number of this step."""
        if self.step_index is None:
            self._init_step_index(timestep)
        return self.step_index

    def _step_with(self, x: Tensor, pred: Tensor, rows: Tensor, i: int, **noise: Any) -> Tensor:
        """Step i by its row; its m becomes the last of model_outputs."""
        outputs = self.model_outputs
        prev_sample, kept = self._in_turn(x, pred, rows, i, outputs, len(outputs), **noise)
        outputs[:] = [*outputs[1:], kept]
        self.lower_order_nums = min(self.lower_order_nums + 1, len(outputs))
        self._step_index = i + 1
        return prev_sample

    def _thresholded(self, x: Tensor, output: Tensor, i: int, of_noise: bool) -> Tensor:
        """m of step i from the thresholded x_0."""
        device, config = x.device, self.config

        def build() -> tuple[Tensor, Tensor]:
            alpha, sigma = self._levels()
            x0 = self._columns(alpha, sigma, False)
            rows = make_rows(alpha, torch.float32, x0_from_x=x0[0], x0_from_pred=x0[1], from_x0=x0[2])
            if config.prediction_type == "flow_prediction":  # see _columns
                sigma = self.sigmas[:-1]
            eps = make_rows(alpha, torch.float32, x0_from_x=1.0, x0_from_pred=-alpha, from_x0=1 / sigma)
            return rows.to(device), eps.to(device)

        x0_rows, eps_rows = self._table("x0", build, (self.sigmas,), device, *self._levels_key())
        if config.prediction_type != "sample":
            output = ops.combine(x, output, x0_rows, i)
        x0 = self._threshold_sample(output)
        return ops.combine(x, x0, eps_rows, i) if of_noise else x0

    def _levels_key(self) -> tuple[Any, ...]:
        """What of the configuration `_levels` and `_columns` depend on."""
        return self.config.prediction_type, self.config.use_flow_sigmas

    def _levels(self) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of the steps, in stock's arithmetic."""
        alpha, sigma = self._sigma_to_alpha_sigma_t(self.sigmas)  # type: ignore[attr-defined]
        return alpha[:-1], sigma[:-1]

    def _columns(self, alpha: Tensor, sigma: Tensor, of_noise: bool) -> tuple[Tensor | float, Tensor | float, Any]:
        """(a, b, c) of m = c (a x + b pred), where m is eps or x_0. As in stock the bracket is rounded before c."""
        prediction = self.config.prediction_type
        if prediction == ("epsilon" if of_noise else "sample"):
            return 0.0, 1.0, 1.0
        if prediction == "epsilon":
            return 1.0, -sigma, 1 / alpha
        if prediction == "sample":
            return 1.0, -alpha, 1 / sigma
        if prediction == "v_prediction":
            return (sigma, alpha, 1.0) if of_noise else (alpha, -sigma, 1.0)
        shift = self.sigmas[:-1]  # flow_prediction: x_0 = x - sigma pred
        if not of_noise:
            return 1.0, -shift, 1.0
        # Like stock this divides x - alpha x_0 by the sigma of the flow, also if the levels are not those of the flow.
        return ((1 - alpha.double()) / shift).float(), alpha, 1.0

    def _rows_by_order(
        self, rules: Sequence[Callable[..., Tensor]], device: torch.device, of_noise: bool, random: bool = False
    ) -> list[Tensor]:
        """Rows of the steps by stock's updates of each order that the solver has."""
        tables = [
            self._rows_of(*self._shares(rule, order, random), self.config.thresholding, of_noise)
            for order, rule in enumerate(rules[: len(self.model_outputs)], 1)
        ]
        return list(torch.stack(tables).to(device).unbind())

    def _shares(
        self, rule: Callable[..., Tensor], order: int, random: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(from_x, from_m, ages (n, orders), noise) of stock's update of an order, at every step.

        It is linear, so it is run on unit vectors, at all steps at once: the numbers are those of its own arithmetic.
        """
        steps = AllSteps(self)
        x, z, *ms = torch.eye(order + 2, dtype=self.sigmas.dtype, device=self.sigmas.device)[..., None].unbind()
        noise = {"noise": z} if random else {}
        given = ms[0] if order == 1 else ms[::-1]
        found = rule(steps, given, sample=x, **noise)
        # A step to the same level changes nothing. Some of stock's divide by its length.
        staying = (self.sigmas[1:] == self.sigmas[:-1]) & ~found.isfinite().all(0)
        found = torch.where(staying, x, found)
        from_x, from_z, from_m, *before = found.unbind()
        nothing = torch.zeros_like(from_x)
        before += [nothing] * (len(self.model_outputs) - len(before))
        return from_x, from_m, torch.stack(before, 1), from_z if random else nothing

    def _rows_of(
        self, from_x: Tensor, from_m: Tensor, ages: Tensor, noise: Tensor | float, converted: bool, of_noise: bool
    ) -> Tensor:
        """Rows (n, WIDE) of x' = from_x x + from_m m + noise z + the shares (n, order) of the m before, newest first.

        If `converted`, the prediction that the rows are applied to is m.
        """
        a, b, c = (0.0, 1.0, 1.0) if converted else self._columns(*self._levels(), of_noise)
        return make_rows(
            from_x, torch.float32, x0_from_x=a, x0_from_pred=b, from_x0=from_m * c, kept_from_x0=c,
            from_x=from_x, noise=noise, **ring(ages),
        )  # fmt: skip

    def _init_step_index(self, timestep: int | Tensor) -> None:
        t = self._number(timestep) if self._begin_index is None else None
        if t is None:
            return NotImplemented
        found = [i for i, s in enumerate(self._host_timesteps()) if s == t]
        # As index_for_timestep: the second of several, and the last step if there is none.
        self._step_index = found[min(len(found), 2) - 1] if found else len(self.timesteps) - 1
        return None

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x_0 + sigma noise at the timesteps' places in self.timesteps, or at the current step of a pipeline."""
        if not addable(original_samples, noise):
            return NotImplemented

        def build() -> Tensor:
            levels = self._sigma_to_alpha_sigma_t(self.sigmas.to(dtype))  # type: ignore[attr-defined]
            return torch.stack(levels, 1).to(device)

        device, dtype = original_samples.device, work_dtype(original_samples)
        table = self._table("levels", build, (self.sigmas,), device, dtype, *self._levels_key())
        if self._begin_index is None:
            # As index_for_timestep: the second of several, and the last step if there is none.
            hits = self.timesteps.to(device) == timesteps.to(device).reshape(-1, 1)
            count = hits.sum(1, keepdim=True)
            place = (hits & (hits.cumsum(1) == count.clamp(max=2))).int().argmax(1)
            index = torch.where(count[:, 0] > 0, place, len(self.timesteps) - 1)
        else:
            index = index_of(self._begin_index if self.step_index is None else self.step_index, device)
        return noising(original_samples, noise, index, table)


class AllSteps:
    """A scheduler as stock's updates see it, at all of its steps at once."""

    def __init__(self, scheduler: Any) -> None:
        self.sigmas, self.config = scheduler.sigmas, scheduler.config
        self.step_index = torch.arange(len(self.sigmas) - 1, device=self.sigmas.device)
        self._sigma_to_alpha_sigma_t = scheduler._sigma_to_alpha_sigma_t


def weights_at(nodes: Tensor, moments: Tensor) -> Tensor:
    """The weights w (n, K) with sum_k w_k nodes_k^j = moments_j of each row; what is no number gives none."""
    powers = torch.stack([nodes**j for j in range(nodes.shape[1])], 1)
    return torch.linalg.solve_ex(powers, moments[..., None]).result[..., 0]
