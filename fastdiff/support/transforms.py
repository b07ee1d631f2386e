"""Transforms of torch.func (grad, vjp, jvp, vmap and what is made of them) and dual tensors of forward-mode AD.

The kernels have no rules for them. While one is active, every op computes through `fastdiff.reference`, whose plain
PyTorch operations have all rules.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes


def active() -> bool:
    """Whether a transform of torch.func or a level of dual tensors is active on this thread."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


# torch.compile asks once, while it traces, and guards the answer itself: it compiles anew within another transform.
# torch.compiler.assume_constant_result would import the compiler.
active._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextmanager
def without_gradients() -> Iterator[None]:
    """A block that leaves no gradient and, of what active transforms bring into it, no tangent.

    torch.no_grad() alone lets tangents through. Without a transform around it, dual tensors that are made within the
    block keep theirs.
    """
    with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False) if active() else nullcontext():
        yield


@contextmanager
def with_gradients() -> Iterator[None]:
    """A block that has gradients and tangents, within one of `without_gradients`."""
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True) if active() else nullcontext():
        yield


def has_rules(grad: Tensor) -> bool:
    """Whether an incoming gradient belongs to a transform, or is a batch of gradients (is_grads_batched)."""
    return is_legacy_batchedtensor(grad) or is_functorch_wrapped_tensor(grad) or active()


def stand_ins() -> bool:
    """Whether a mode is active whose tensors stand for others: fake tensors, and those of a trace."""
    if not _len_torch_dispatch_stack():
        return False
    keys = torch._C._TorchDispatchModeKey.__members__.values()
    return any(torch._C._get_dispatch_mode(key) is not None for key in keys)


def fake_mode() -> Any:
    """The FakeTensorMode that takes fake tensors alone, if one is active. That of a trace makes constants of others."""
    if torch.compiler.is_compiling() or not _len_torch_dispatch_stack():
        return None
    mode: Any = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    return None if mode is None or mode.allow_non_fake_inputs else mode


def with_values() -> AbstractContextManager[None]:
    """A block for the numbers of levels: they have values also where a mode's tensors stand for others."""
    return _disable_current_modes() if not torch.compiler.is_compiling() and stand_ins() else nullcontext()


def admitted(numbers: Tensor) -> Tensor:
    """Numbers of levels for data: fake ones where a mode takes no others."""
    mode = fake_mode()
    return mode.from_tensor(numbers) if mode is not None and type(numbers) is Tensor else numbers


def bare(index: Tensor | None) -> Tensor | None:
    """The values of an index below all transforms, with the batch of vmap as one more dimension.

    None if there are none to look at, as in a trace or on the meta device.
    """
    if index is None or torch.compiler.is_compiling() or stand_ins():
        return None
    while is_functorch_wrapped_tensor(index):
        index = torch._C._functorch.get_unwrapped(index)
    return index if type(index) is Tensor and not index.is_meta else None


def visible(index: Tensor | None) -> Tensor | None:
    """`bare`, if it lies on the CPU; else None: to read a GPU's values would wait for the device."""
    values = bare(index)
    return values if values is not None and values.is_cpu else None


def as_list(t: Tensor) -> Any:
    """t.tolist(); PyTorch 2.7 has none within a transform."""
    if not active():
        return t.tolist()
    return [as_list(part) for part in t] if t.ndim else t.item()


def overwrite(name: str, tensor: Tensor, value: Tensor) -> Tensor:
    """The tensor, which becomes `value` as the active transforms understand it.

    Raises: ValueError if they do not allow it: what lies outside of a transform cannot hold its batch or tangent.
    """
    try:
        return tensor.copy_(value)
    except RuntimeError as error:
        raise ValueError(
            f"{name}: expected a tensor that the torch.func transform around this call can overwrite; "
            f"leave {name} out ({str(error).splitlines()[0]})"
        ) from error
