"""One step of training: loss, gradient, clipping, optimizer and moving average; on CUDA as one captured graph."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdiff.cast import weights_cast
from fastdiff.diffusion import Diffusion
from fastdiff.graphs import CudaGraphs, WatchedCalls, what_forbids_here
from fastdiff.networks import NETWORKS
from fastdiff.support.plain import is_ordinary
from fastdiff.support.scalars import as_number

TINY = 1e-6  # added to the norm of a gradient, as PyTorch's clip_grad_norm_ does


class TrainingStep:
    """A step of an optimizer, called with a batch:

        g = clip(grad mean(loss(batch))),   w <- optimizer(w, g),   average(decay)

    Where the loss or the gradient is not finite, a fused optimizer leaves the weights as they are.

    On CUDA the whole step is captured as a CUDA graph at its fourth call, and replayed from then on. A replay is one
    launch; it runs no Python of the loss. It is captured anew for batches of other shapes, and after changes of the
    network, of the optimizer's state and of its options. The learning rate may change at every step.

    Args:
        loss: called with the batch, gives the loss (), or the losses of the samples (B,). A Diffusion, or any function;
            one that is no module must not read anything that changes but tensors in their places.
        optimizer: of the parameters. To be captured it needs the option `capturable`, as Adam and AdamW have; the step
            sets it, and keeps learning rates as tensors on the device.
        average: called after each step with `decay`, to update a moving average. Captured too, so it has to write to
            the same tensors each time. A number that it counts or computes on the host stays as it was captured.
        clip_grad: largest norm of the gradient, above 0, or None.
        autocast: the type of autocast for the loss, such as torch.bfloat16, or None. In a Diffusion of a UNet or
            DiT, layers then have tensors of that type in place of their weights while a step computes its gradient.
        graph: None captures on CUDA unless something forbids it, and warns if so; False never does; True raises then.

    `reason` says what the last step would have needed to be a graph; None if nothing forbade it. `norm` () is the norm
    of its gradient before it was clipped, and `bad` () whether that or the loss was not finite.

    Raises: TypeError or ValueError, naming the argument: for a loss or an optimizer that is none, and one that asks for
        a closure; by a call, for a loss or gradients that no step can be made of. ValueError with graph=True, if
        something forbids a capture; the step is then taken if that shows only in it.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        average: Callable[[float | Tensor], object] | None = None,
        clip_grad: float | None = None,
        autocast: torch.dtype | None = None,
        graph: bool | None = None,
    ) -> None:
        if not callable(loss):
            raise TypeError(f"loss: expected a function or a module, got {type(loss).__name__}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise TypeError(f"optimizer: expected one that steps without a closure, got {type(optimizer).__name__}")
        if average is not None and not callable(average):
            raise TypeError(f"average: expected a function or None, got {type(average).__name__}")
        if clip_grad is not None and not as_number("clip_grad", clip_grad) > 0:
            raise ValueError(f"clip_grad: expected a number above 0 or None, got {clip_grad}")
        if autocast not in (None, torch.bfloat16, torch.float16):
            raise TypeError(f"autocast: expected torch.bfloat16, torch.float16 or None, got {autocast!r}")
        if graph is not None and not isinstance(graph, bool):
            raise TypeError(f"graph: expected a bool or None, got {graph!r}")
        self.loss, self.optimizer, self.average, self.graph = loss, optimizer, average, graph
        self.clip_grad, self.autocast = clip_grad, autocast
        self.device = self.parameters[0].device
        networks = [loss] if isinstance(loss, nn.Module) else []
        self.calls = WatchedCalls(self._take, (loss, optimizer), networks, CudaGraphs)
        self.rates: list[Tensor] = []
        self.norm = self.bad = torch.zeros((), device=self.device)
        leave_out(optimizer, self.bad)
        self.reason = "graph=False" if graph is False else self._prepare()
        if graph and self.reason is not None:
            raise ValueError(f"graph: expected {self.reason}")
        if graph is None and self.device.type == "cuda" and self.reason is not None:
            warnings.warn(f"graph: the step runs without, which needs {self.reason}", stacklevel=2)

    @property
    def parameters(self) -> list[Tensor]:
        """Those of the optimizer, to which groups may be added."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def __call__(self, *batch: Any, decay: float = 0.0, **model_kwargs: Any) -> Tensor:
        """Take one step.

        Args:
            batch, model_kwargs: the arguments of the loss; tensors on the device, to be captured.
            decay: what `average` gets, as a tensor () on the device if the step may be captured.

        Returns: what the loss gave, detached.
        """
        taken: tuple[Tensor, Tensor, Tensor] = self._captured(batch, decay, model_kwargs)
        losses, self.norm, self.bad = taken
        return losses

    def _captured(self, batch: tuple[Any, ...], decay: float, model_kwargs: dict[str, Any]) -> Any:
        if not self.rates:  # never to be captured
            return self._take(decay, *batch, **model_kwargs)
        self._make_capturable()
        on_device = torch.full((), decay, device=self.device)
        self._say(self.calls.what_forbids((batch, model_kwargs), self.device))
        if self.reason is not None:
            return self._take(on_device, *batch, **model_kwargs)
        taken = self.calls(on_device, *batch, **model_kwargs)
        self._say(self.calls.forbidden)
        return taken

    def _prepare(self) -> str | None:
        """Make the optimizer one that can be captured. Returns what forbids it."""
        reason = what_forbids_here(self.device)
        groups = self.optimizer.param_groups
        if reason is None and exchanges_gradients(self.loss):
            reason = "one process; DistributedDataParallel exchanges gradients while they are computed"
        if reason is None and any("capturable" not in group for group in groups):
            reason = f"an optimizer with the option capturable, got {type(self.optimizer).__name__}"
        if reason is None:
            self._make_capturable()
            vars(self.optimizer)["_warned_capturable_if_run_uncaptured"] = True  # its first steps are not captured
        return reason

    def _make_capturable(self) -> None:
        """Bring what the optimizer counts with to the device, again if a checkpoint was loaded into it."""
        groups = self.optimizer.param_groups
        self.rates += [torch.empty((), device=self.device) for _ in groups[len(self.rates) :]]
        for group, rate in zip(groups, self.rates, strict=True):
            if group["lr"] is not rate:
                group["lr"] = rate.fill_(group["lr"])
            if not group["capturable"]:
                group["capturable"] = True
                for parameter in group["params"]:
                    state = self.optimizer.state.get(parameter, {})
                    if isinstance(steps := state.get("step"), Tensor):
                        state["step"] = steps.to(parameter.device)

    def _say(self, reason: str | None) -> None:
        """Keep `reason` up to date. A new one is a warning, or an error if a graph is required."""
        new, self.reason = reason not in (None, self.reason), reason
        if new and self.graph:
            raise ValueError(f"graph: expected {reason}")
        if new:
            warnings.warn(f"graph: the step runs without, which needs {reason}", stacklevel=3)

    def _take(self, decay: float | Tensor, *batch: Any, **model_kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(what the loss gave, the norm of the gradient, whether one of them is not finite)."""
        with self._weights():
            with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                losses = self.loss(*batch, **model_kwargs)
            if not isinstance(losses, Tensor) or not losses.requires_grad:
                got = "one without" if isinstance(losses, Tensor) else type(losses).__name__
                raise TypeError(f"loss: expected a tensor with a gradient by the parameters, got {got}")
            self.optimizer.zero_grad()
            losses.mean().backward()
        if any(p.grad is not None and p.grad.is_sparse for p in self.parameters):
            raise TypeError("optimizer: expected parameters with dense gradients")
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        bad = ~(losses.isfinite().all() & norm.isfinite())
        leave_out(self.optimizer, bad)
        with clipped(self.optimizer, self.parameters, norm, self.clip_grad):
            self.optimizer.step()
        if self.average is not None:
            self.average(decay)
        return losses.detach(), norm, bad

    def _weights(self) -> AbstractContextManager[None]:
        """What lets the layers of this package's networks have their weights in autocast's type, for one step.

        Layers of other networks have their parameters, which a forward may read. So have those whose gradients are
        exchanged while they are computed, not together at the end.
        """
        network = self.loss.model if isinstance(self.loss, Diffusion) else None
        if self.autocast is None or type(network) not in NETWORKS.values() or exchanges_gradients(self.loss):
            return nullcontext()
        return weights_cast(cast(nn.Module, network), self.autocast)


def exchanges_gradients(loss: Callable[..., Tensor]) -> bool:
    """Whether the backward pass of a loss may exchange gradients with other processes."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return True
    parts = loss.modules() if isinstance(loss, nn.Module) else ()
    return any(isinstance(part, nn.parallel.DistributedDataParallel) for part in parts)


@contextmanager
def clipped(
    optimizer: torch.optim.Optimizer, parameters: list[Tensor], norm: Tensor, largest: float | None
) -> Iterator[None]:
    """Let the step of an optimizer in the block see a gradient of at most that norm; `norm` is what it has.

    A fused optimizer divides the gradients while it reads them, which saves a pass, by a float32 number.
    """
    known: Any = vars(optimizer)
    divides = is_fused(optimizer) and known.get("_step_supports_amp_scaling")
    if largest is None:
        yield
    elif divides and is_ordinary(norm) and norm.dtype != torch.float64:
        known["grad_scale"] = ((norm.float() + TINY) / largest).clamp(min=1)
        try:
            yield
        finally:
            del known["grad_scale"]
    else:
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)
        yield


def leave_out(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """Let the next step of a fused optimizer change nothing where bad () is true, without a wait for the device."""
    if is_fused(optimizer):  # others refuse to step
        known: Any = vars(optimizer)
        if "found_inf" not in known:
            known["found_inf"] = torch.zeros((), device=bad.device)
        known["found_inf"].copy_(bad)


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether all groups take the steps of PyTorch's fused kernels."""
    return all(group.get("fused") for group in optimizer.param_groups)
