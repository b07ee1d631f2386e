"""The parts of a network, as lists.

PyTorch's own generators hand each part up through all of its parents. For a U-Net they take a millisecond, and a
sampling call asks a dozen times, before the first of its steps.
"""

from torch import Tensor, nn


def modules(network: nn.Module) -> list[nn.Module]:
    """network.modules(): each once, parents before their children."""
    found: dict[int, nn.Module] = {}
    todo = [network]
    while todo:
        module = todo.pop()
        if id(module) not in found:
            found[id(module)] = module
            if module._modules:
                todo += [child for child in reversed(module._modules.values()) if child is not None]
    return [*found.values()]


def parameters(network: nn.Module) -> list[nn.Parameter]:
    """network.parameters(): each once."""
    return [*{id(p): p for m in modules(network) for p in m._parameters.values() if p is not None}.values()]


def tensors(network: nn.Module) -> list[Tensor]:
    """The parameters, then the buffers."""
    buffers = {id(b): b for m in modules(network) for b in m._buffers.values() if b is not None}
    return [*parameters(network), *buffers.values()]
