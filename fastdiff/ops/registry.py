"""Registration of the ops with PyTorch, each on a torch.library.Library of its own.

A bare Library is used because its dispatch costs a few microseconds, while custom_op and register_autograd cost tens
(`pytest benchmarks/test_dispatch.py` measures it).
"""

import re
from collections.abc import Callable
from typing import Any

import torch

from .. import transforms

NOISE = "Tensor? seed, Tensor? ids"  # in the schema of every op that may generate noise
# The library of each op by name. It is kept with the ops themselves: they outlive this module if it is imported again.
_libraries: dict[str, torch.library.Library] = vars(torch.ops.fastdiff).setdefault("_libraries", {})
# Of each op, by name: its schema, and what runs on a CPU or GPU.
SCHEMAS: dict[str, str] = {}
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}


def define(name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Make torch.ops.fastdiff.<name>.

    Args:
        schema: arguments and results in the language of torch.library, "(Tensor x) -> Tensor".
        implementation: what runs on any device.
        fake: what is traced: results of the right shape, type and layout, without values.

    An op of that name is replaced: it is that of an earlier import of the package in this process, or of a reload.
    """
    SCHEMAS[name], IMPLEMENTATIONS[name] = schema, implementation
    if earlier := _libraries.pop(name, None):
        earlier._destroy()
    library = _libraries[name] = torch.library.Library("fastdiff", "FRAGMENT")
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastdiff::{name}", fake, lib=library)


def differentiate(name: str, function: type[torch.autograd.Function], *inputs: int) -> None:
    """Give an op the gradient of an autograd.Function, by the arguments with these numbers."""
    op = getattr(torch.ops.fastdiff, name).default

    def autograd(*args: Any) -> Any:
        if transforms.active():
            raise RuntimeError(
                f"torch.ops.fastdiff.{name} has no rule for transforms of torch.func and dual tensors; "
                "the functions of fastdiff.ops have"
            )
        if torch.is_grad_enabled() and any(args[i] is not None and args[i].requires_grad for i in inputs):
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    _libraries[name].impl(name, autograd, "Autograd")


def names_of(arguments: str) -> tuple[str, ...]:
    """The names in a list of arguments of a schema."""
    return tuple(re.findall(r"(\w+)(?:,|$)", arguments))


def nothing(*args: Any) -> None:
    """The fake of an op that returns nothing."""
