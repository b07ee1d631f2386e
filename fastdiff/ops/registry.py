"""Registration of the ops with PyTorch, on one torch.library.Library.

A bare Library is used because its dispatch costs a few microseconds, while custom_op and register_autograd cost tens
(`pytest benchmarks/test_dispatch.py` measures it).
"""

import re
from collections.abc import Callable
from typing import Any

import torch

NOISE = "Tensor? seed, Tensor? ids"  # in the schema of every op that may generate noise
_library = torch.library.Library("fastdiff", "DEF")
# Of each op, by name: its schema, and what runs on a CPU or GPU.
SCHEMAS: dict[str, str] = {}
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}


def define(name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Make torch.ops.fastdiff.<name>.

    Args:
        schema: arguments and results in the language of torch.library, "(Tensor x) -> Tensor".
        implementation: what runs on a CPU or GPU.
        fake: what is traced: results of the right shape, type and layout, without values.
    """
    SCHEMAS[name], IMPLEMENTATIONS[name] = schema, implementation
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CPU")
    _library.impl(name, implementation, "CUDA")
    torch.library.register_fake(f"fastdiff::{name}", fake, lib=_library)


def differentiate(name: str, function: type[torch.autograd.Function], *inputs: int) -> None:
    """Give an op the gradient of an autograd.Function, by the arguments with these numbers."""
    op = getattr(torch.ops.fastdiff, name).default

    def autograd(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(args[i] is not None and args[i].requires_grad for i in inputs):
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    _library.impl(name, autograd, "Autograd")


def names_of(arguments: str) -> tuple[str, ...]:
    """The names in a list of arguments of a schema."""
    return tuple(re.findall(r"(\w+)(?:,|$)", arguments))


def nothing(*args: Any) -> None:
    """The fake of an op that returns nothing."""
