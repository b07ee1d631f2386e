"""Checks of the arguments of a formulation: what a user gives, as its methods take it."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .ops.checks import (
    as_sample_ids,
    as_shape,
    check_floating,
    check_mask,
    check_reduction,
    check_shape,
    check_state,
    noise_source,
)
from .ops.overlap import check_memory
from .steps import StepTable
from .support import transforms
from .support.choices import did_you_mean
from .support.scalars import integer

# What `sample` takes and newcomers look for under another name.
OPTIONS = ("steps", "guidance", "x_T", "x_init", "known", "return_trajectory")


def merged(model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The model's further arguments: those given by name, and those in a dict under the name `model_kwargs`.

    Raises: TypeError if that is no dict; ValueError for an argument given twice.
    """
    if "model_kwargs" not in model_kwargs:
        return model_kwargs
    rest = {**model_kwargs}
    given = rest.pop("model_kwargs")
    if not isinstance(given, dict):
        raise TypeError(f"model_kwargs: expected a dict, got {type(given).__name__}")
    twice = sorted(given.keys() & rest.keys())
    if twice:
        raise ValueError(f"model_kwargs: expected {twice[0]} once, got it by name too")
    return {**rest, **given}


def check_call(model: nn.Module, x: Tensor, condition: Tensor, model_kwargs: dict[str, Any]) -> None:
    """Check that the model's forward takes (x, condition, **model_kwargs), by the number and names of arguments.

    Raises: TypeError, naming the argument.
    """
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # of a function that was not written in Python
        return
    call = f"{type(model).__name__}.forward"
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    for name in () if inspect.Parameter.VAR_KEYWORD in kinds else model_kwargs.keys() - signature.parameters.keys():
        meant = did_you_mean(name, (*signature.parameters, *OPTIONS))
        raise TypeError(f"{name}: expected an option of this method or an argument of {call}, got neither{meant}")
    try:
        signature.bind(x, condition, **model_kwargs)
    except TypeError as error:
        names = ", ".join(("x", "t", *model_kwargs))
        raise TypeError(f"model: expected {call} to take ({names}), got {error}") from None


def refuse_unnamed(given: tuple[Any, ...]) -> None:
    """Say how the arguments behind x0 are given. Raises: TypeError."""
    raise TypeError(
        f"x0: expected one argument without a name, got {1 + len(given)}; name the others, "
        "as in t=..., class_labels=... or noise=..."
    )


def named(option: str, value: Any) -> str:
    """The name that an option of a formulation has in its config. ValueError if it was given as a function."""
    if not isinstance(value, str):
        raise ValueError(f"config: expected {option} given by name, got a function")
    return value


def check_loss(
    x0: Tensor,
    seed: int | Tensor | None,
    sample_ids: Any,
    noise: Tensor | None,
    mask: Tensor | None = None,
    reduction: Any = "mean",
) -> tuple[Tensor | None, Tensor | None]:
    """(seed, sample_ids) of a loss as tensors, None if they are not given; all are checked before anything is drawn.

    Raises: TypeError or ValueError, naming the argument.
    """
    check_floating("x0", x0)
    check_reduction(reduction)
    if noise is not None or seed is not None:
        seed = noise_source(x0, seed, noise)
    if mask is not None:
        check_mask(mask, x0)
    return seed, as_sample_ids(sample_ids, x0.shape[0], x0.device)


def check_labels(model: nn.Module, model_kwargs: dict[str, Any]) -> None:
    """Class labels lie within the classes of the model, as far as their values may be read."""
    given = model_kwargs.get("class_labels")
    labels = transforms.visible(given) if isinstance(given, Tensor) else None
    if labels is None or labels.is_floating_point() or not labels.numel():
        return
    classes = getattr(getattr(model, "class_embedding", None), "num_embeddings", None)
    if classes is None:
        return
    low, high = (int(end) for end in labels.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(f"class_labels: expected values from 0 to {classes - 1}, got {low if low < 0 else high}")


def shape_of(model: nn.Module, shape: int | tuple[int, ...]) -> tuple[int, ...]:
    """The shape (B, ...), given as it is or as B, to which model.sample_shape is added. TypeError or ValueError."""
    if isinstance(shape, bool):
        raise TypeError("shape: expected a number of samples or (B, ...), got a bool")
    number = integer(shape)
    if number is not None:
        rest = getattr(model, "sample_shape", None)
        if rest is None:
            raise ValueError("shape: expected (B, ...), since the model has no sample_shape; got a number alone")
        shape = (number, *rest)
    sizes = [integer(d) for d in shape] if isinstance(shape, Iterable) else []
    if not sizes or any(d is None or d < 0 for d in sizes):
        raise ValueError(f"shape: expected a number of samples or (B, ...), got {shape!r}")
    return as_shape(sizes)


def check_gradients(steps: Any, table: StepTable, *excluded: Any) -> None:
    """A number of steps of the table can have a gradient, and nothing is given that would change its tensors."""
    if not steps:
        return
    number = integer(steps)
    if number is None or not 0 <= number <= len(table):
        raise ValueError(f"grad_steps: expected an integer from 0 to {len(table)}, got {steps!r}")
    if torch.is_inference_mode_enabled():
        raise ValueError("grad_steps: expected 0 within torch.inference_mode, which records no gradient")
    if table.keep != "none" or "correct" in table.kinds:
        raise ValueError("grad_steps: expected 0 with a sampler that remembers steps or corrects; use 'ddim' or 'ddpm'")
    if any(value is not None and value is not False for value in excluded):
        raise ValueError("grad_steps: expected 0 with callback, return_trajectory, out, dtype, known or graph")


def check_sampling(
    shape: tuple[int, ...],
    x_T: Tensor | None,
    callback: Callable[..., Any] | None,
    return_trajectory: bool,
    out: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Check that arguments of `sample` fit each other. The state has this dtype and device."""
    if x_T is not None:
        check_shape("x_T", x_T, shape)
    if out is not None:
        check_state(out, shape, dtype, device)
        if return_trajectory:
            raise ValueError("out: expected None with return_trajectory, whose result is of another shape")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback: expected a function, got {type(callback).__name__}")


def check_out_apart(out: Tensor | None, x_T: Tensor | None, uncond: Any, others: dict[str, Any]) -> None:
    """`out` of `sample` shares no memory with what the steps read: it may be x_T itself, but no other argument."""
    if out is None:
        return
    branch = uncond if isinstance(uncond, dict) else {}
    check_memory("out", out, {"x_T": x_T}, {**{f"uncond's {name}": value for name, value in branch.items()}, **others})


def check_noise(noise: Any, steps: int, shape: tuple[int, ...]) -> None:
    """The noise of `sample` is None, a function, or a tensor with the noise of each step."""
    if noise is not None and not callable(noise):
        check_shape("noise", noise, (steps, *shape))
