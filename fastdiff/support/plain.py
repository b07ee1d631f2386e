"""Whether the parameters of a child module may be read without calling it, and whether it is wrapped."""

from types import MethodType
from typing import Any

import torch.nn.modules.module as torch_module
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


def as_defined(kind: type, name: str) -> Any:
    """The method or property of a class as its library wrote it, or None if another was put in its place before."""
    owner = next(k for k in kind.__mro__ if name in vars(k))
    member = vars(owner)[name]
    function = getattr(member, "fget", member)
    name_of = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    written = name_of == (owner.__module__, f"{owner.__qualname__}.{name}")
    return member if written and not hasattr(function, "__wrapped__") else None


# What a call of PyTorch's layers runs. Tools patch it for all layers at once.
METHODS: dict[type[nn.Module], list[tuple[str, Any]]] = {
    kind: [(name, as_defined(kind, name)) for name in names]
    for kind, names in (
        (nn.Conv2d, ("forward", "_conv_forward")),
        (nn.Linear, ("forward",)),
        (nn.GroupNorm, ("forward",)),
        (nn.LayerNorm, ("forward",)),
        (nn.RMSNorm, ("forward",)),
        (nn.SiLU, ("forward",)),
        (nn.GELU, ("forward",)),
    )
}


def is_patched(kind: type[nn.Module]) -> bool:
    """Whether a layer of PyTorch's has another method in the place of its own."""
    for name, method in METHODS.get(kind, ()):  # noqa: SIM110, a generator costs more
        if getattr(kind, name) is not method:
            return True
    return False


def has_global_hooks() -> bool:
    """Whether something is called at every module. PyTorch 2.7 has no function for this."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` is `kind.forward` on ordinary parameters, and nothing else happens.

    A fused block reads the parameters of its children. It asks this at every call, and calls a child that is not plain:
    a subclass (LoRA, quantized layers, parametrizations, FSDP2), one with a forward of its own (offloading), with hooks
    (pruning, weight norm, ZeRO), or with parameters of another class (DTensor, quantized tensors). And all children of
    a class that was patched.
    """
    if type(module) is not kind or is_patched(kind):
        return False
    if "forward" in module.__dict__ or "_conv_forward" in module.__dict__:
        return False
    if module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks:
        return False
    if has_global_hooks():
        return False
    return has_plain_parameters(module)


def has_plain_parameters(module: nn.Module) -> bool:
    """Whether its own parameters are ordinary ones, not DTensors or quantized tensors."""
    for p in module._parameters.values():  # noqa: SIM110, this comes with every layer
        if not (p is None or is_ordinary(p)):
            return False
    return True


def is_ordinary(t: Any) -> bool:
    """Whether it is a tensor or parameter, not a DTensor or a quantized tensor."""
    return type(t) is nn.Parameter or type(t) is Tensor or isinstance(t, FakeTensor)


def is_wrapped(module: nn.Module) -> bool:
    """Whether the module itself has a forward. Taking a wrapper off may leave the forward of its class there."""
    return "forward" in vars(module) and vars(module)["forward"] != MethodType(type(module).forward, module)
