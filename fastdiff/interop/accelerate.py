"""`accelerate` and `restore`: fused operations inside an existing pipeline or network, and back."""

import importlib
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..cast import channels_last_convolutions
from ..support import walk
from ..support.plain import has_plain_parameters
from .replay import put_in, take_out
from .together import arrange, separate

# The components of a pipeline that it calls at every step.
DENOISERS = ("unet", "transformer", "transformer_2")
# Where a network keeps the convolutions whose layout was changed.
LAID_OUT = "_channels_last_by_accelerate"
# Attributes that a fused scheduler has beside those of its stock class.
OWN = {
    *("_tables", "_tables_of", "_last_run", "fused_noise", "__module__"),
    *("_ring", "_in_ring", "_predicted", "_predicted_by", "_halfway"),
}


class Accelerated(list[str]):
    """The dotted names of what was replaced. `left`: what was left as it is, and why, by dotted name."""

    left: dict[str, str]

    def __init__(self) -> None:
        super().__init__()
        self.left = {}


def accelerate(
    target: Any, *, graph: bool = False, compile: bool = False, channels_last: bool | None = None
) -> Accelerated:
    """Put the fused operations into a pipeline of diffusers, or into a network, in place; `restore` undoes it.

    - In every ResnetBlock2D, GroupNorm, the scale and shift of the time embedding, and SiLU become one operation
      (`ops.group_norm_silu`), which also adds the bias of the convolution before it. UNet2DModel, UNet2DConditionModel
      and AutoencoderKL are made of such blocks. Parameters, their names and hooks on the blocks stay.
    - Without a gradient, a 1x1 shortcut on a map that is channels last becomes a matrix product. It adds both last
      biases. One product projects the time embedding for all blocks of a U-Net or ControlNetModel, and one operation
      sums their biases. An UpBlock2D or CrossAttnUpBlock2D has its blocks read a map and its skip where they lie.
    - A Transformer2DModel keeps maps that are channels last as they are. Its 1x1 convolutions become matrix products.
    - In a BasicTransformerBlock with plain norms, each sum before a norm becomes one operation with that norm
      (`ops.add_layer_norm`). The gate of its GEGLU becomes another (`ops.gated_gelu`). With a gradient, and where there
      are no kernels, stock's forward runs.
    - Attention with stock's AttnProcessor2_0 is computed without its division by 1. Without a gradient, projections of
      one input are one product while their weights lie side by side (`channels_last`). The processor stays. Another one
      is called, whenever it is set.
    - In blocks of Stable Diffusion 3, Flux, Qwen-Image, Wan, DiT and PixArt a norm with its scale and shift is one
      operation. It takes the gated sum before it too, if there is one. Rotary embedding becomes `ops.rotate` in
      attention of Flux, Qwen-Image and Wan with stock's processor. AdaLayerNormZero and others of its kind, and
      RMSNorm, become one operation in every transformer. With a gradient, autocast or a compiler stock's forward runs.
    - Every other GroupNorm of a module of diffusers becomes one operation too: those at the entry of transformers, in
      the attention of an autoencoder, and before the last convolution. Attention with a processor that is not of
      diffusers keeps its own.
    - Every scheduler of a pipeline, such as `low_res_scheduler` beside `scheduler`, becomes that of
      fastdiff.interop.diffusers with the same configuration and state. It is another object: take it from the
      pipeline. A scheduler that is assigned later, as in
      `pipe.scheduler = X.from_config(pipe.scheduler.config)`, is what X is: take X from fastdiff.interop.diffusers, or
      call `accelerate` again.

    With `graph` or `compile` the forward of the network becomes a replay of CUDA graphs, or compiled code. In a
    pipeline these are the components "unet", "transformer" and "transformer_2".

    What is done to a block later still counts. If its norms or its activation get hooks, another class or other tensors
    (offloading, LoRA, quantization, pruning), the block runs stock's forward. A convolution that is changed so is
    called as it is. A forward that is patched for a whole class, of diffusers or PyTorch, counts too, before or after
    this call. A second call replaces what is new. The Unet of denoising-diffusion-pytorch 2 has RMSNorm in its blocks,
    so nothing in it is replaced.

    A graph reads the weights where they lie. Each shape, type and plain value of the arguments has a graph of its own.
    All are dropped after a change of the network: moved weights, LoRA, other modules, processors or attributes. Calls
    run without a graph under gradients or autocast, and with hooks or offloading within the network. So does a network
    that reads numbers of the GPU, or changes itself at every call.

    Args:
        target: the pipeline or network.
        graph: replay a call of the network as one CUDA graph, kept for the most recent kinds of arguments. Each holds
            the memory of a call. Needs a network on CUDA in eval mode, without gradients.
        compile: compile the network with torch.compile, with the fused operations inside. Compiling takes minutes for
            a large network. With `graph` the compiled code is captured.
        channels_last: lay out the weights of 2d convolutions channels last, and those of projections of one input side
            by side. None does so for networks on CUDA in eval mode: an optimizer may keep its state in the layout of
            the weights.

    Returns: a list of the dotted names of what was replaced; that of a replayed or compiled forward is "unet.forward".
        Its attribute `left` says by name what was left as it is and why: a scheduler without a fused one, a block with
        another activation or with hooks on its norms, a forward that runs without a graph. Later calls of the network
        keep that last entry up to date. A warning says it too.
    Raises: TypeError for anything but a pipeline or an nn.Module, and for options that are no bools.
    """
    for option, value in (("graph", graph), ("compile", compile), ("channels_last", channels_last)):
        if not isinstance(value, bool) and (option, value) != ("channels_last", None):
            raise TypeError(f"{option}: expected True or False, got {value!r}")
    networks = _networks(target)
    done = Accelerated()
    if not networks and not _schedulers(target):  # diffusers counts no argument with a default unless it is told to
        done.left["components"] = "the pipeline's `components` have neither a network nor a scheduler"
    for name, part, owner in _parts(target):
        reason = _misfit(part, owner)
        if reason:
            done.left[name] = reason
        elif reason is None and type(part) in _kinds():
            if any(part is network for network in networks.values()):
                part.__module__ = type(part).__module__  # so a pipeline that is made of it saves it as stock's
            part.__class__ = _kinds()[type(part)]
            done.append(name)
    for name, scheduler, holders in _schedulers(target):
        if hasattr(scheduler, "stock"):  # it is one of ours
            continue
        replaced = [attribute for attribute, value in vars(scheduler).items() if callable(value)]
        ours = _fused_schedulers().get(type(scheduler))
        if ours is None:
            done.left[name] = f"{type(scheduler).__name__} has no fused scheduler"
        elif replaced:
            done.left[name] = f"this object has methods of its own: {', '.join(replaced)}"
        else:
            _hold(holders, _become(ours, scheduler))
            done.append(name)
    for network in networks.values():
        parameter = next(network.parameters(), None)
        on_gpu = parameter is not None and parameter.is_cuda and not network.training
        if on_gpu if channels_last is None else channels_last:
            _lay_out(network)
    if graph or compile:
        called = {name: network for name, network in networks.items() if name in ("", *DENOISERS)}
        if not called:
            done.left["forward"] = f"the pipeline has no {' or '.join(DENOISERS)}"
        for name, network in called.items():
            forward = ".".join(filter(None, (name, "forward")))
            if put_in(network, forward, done.left, graph, compile):
                done.append(forward)
    if done.left:
        reasons = "; ".join(f"{reason} ({n})" for reason, n in Counter(done.left.values()).items())
        parts = "1 part as it is" if len(done.left) == 1 else f"{len(done.left)} parts as they are"
        warnings.warn(f"accelerate left {parts}: {reasons}", stacklevel=2)
    return done


def restore(target: Any) -> list[str]:
    """Undo `accelerate`: blocks, norms and scheduler get their classes again, networks their forward and layout.

    Returns: the dotted names of what was put back.
    Raises: TypeError for anything but a pipeline or an nn.Module.
    """
    done = []
    for name, part, _ in _parts(target):
        for stock, fused in _kinds().items():
            if type(part) is fused:
                with torch.inference_mode(False):
                    for layers in _projections(part):
                        separate(layers)
                _put_back(part, stock, fused)
                done.append(name)
    for name, network in _networks(target).items():
        for inner, module in network.named_modules():  # a part may have been accelerated, or what is wrapped since
            for convolution in vars(module).pop(LAID_OUT, []):
                with torch.inference_mode(False):
                    convolution.weight.data = convolution.weight.data.to(memory_format=torch.contiguous_format)
            if take_out(module):
                done.append(".".join(filter(None, (name, inner, "forward"))))
    for name, scheduler, holders in _schedulers(target):
        if type(scheduler) in _fused_schedulers().values():
            _hold(holders, _become(type(scheduler).stock, scheduler))
            done.append(name)
    return done


@torch.inference_mode(False)  # tensors that are made in it could not be trained later
def _lay_out(network: nn.Module) -> None:
    """Convolutions channels last, projections of one input side by side."""
    changed = vars(network).setdefault(LAID_OUT, [])
    changed += channels_last_convolutions(network)
    for part in walk.modules(network):
        for layers in _projections(part):
            arrange(layers)


def _networks(target: Any) -> dict[str, nn.Module]:
    """The networks of a pipeline by their names, or a network itself by the name ""."""
    if isinstance(target, nn.Module):
        return {"": target}
    if isinstance(getattr(target, "components", None), dict):
        return {name: part for name, part in target.components.items() if isinstance(part, nn.Module)}
    raise TypeError(f"target: expected a pipeline of diffusers or an nn.Module, got {type(target).__name__}")


def _parts(target: Any) -> Iterator[tuple[str, Any, nn.Module]]:
    """What is fused, or could be: (dotted name, module, the module that holds it).

    The layers of a network, or of a pipeline's networks, that `_kinds` has, but GroupNorms only of other modules of
    diffusers.
    """
    networks = _networks(target)
    if not (kinds := _kinds()):  # then no network has modules of diffusers
        return
    resnet, *_ = layers = tuple(kind for kind in kinds if kind is not nn.GroupNorm)
    for name, network in networks.items():
        for inner, module in network.named_modules():
            prefix = [part for part in (name, inner) if part]
            if isinstance(module, layers):
                yield ".".join(prefix), module, module
            if not isinstance(module, resnet) and _of_diffusers(type(module)):
                for child, part in module.named_children():
                    if isinstance(part, nn.GroupNorm):
                        yield ".".join((*prefix, child)), part, module


def _of_diffusers(kind: type) -> bool:
    return any(base.__module__.startswith("diffusers.") for base in kind.__mro__)


def _misfit(part: Any, owner: Any) -> str | None:
    """Why a layer cannot be fused, "" if there is nothing in it to fuse, or None."""
    for stock, fused in _kinds().items():
        if isinstance(part, stock) and type(part) not in (stock, fused):
            return f"{type(part).__name__} is a subclass of {stock.__name__}"
    if isinstance(part, nn.GroupNorm):
        return _norm_misfit(part, owner)
    fused = _kinds().get(type(part), type(part))
    reason: str | None = fused.misfit(part)
    return reason


def _norm_misfit(norm: Any, owner: Any) -> str | None:
    """Why a norm cannot become one operation, or None. Hooks on it are called all the same."""
    processor = getattr(owner, "processor", None)
    if processor is not None and not type(processor).__module__.startswith("diffusers."):
        return f"its attention has a processor of its own, {type(processor).__name__}"
    if type(norm) is nn.GroupNorm and "forward" in vars(norm):
        return "its forward is wrapped, as offloading does"
    if norm.weight is None or norm.bias is None:
        return "it has no weight or no bias"
    if not has_plain_parameters(norm):
        return "it has parameters of another kind"
    return None


def _schedulers(target: Any) -> list[tuple[str, Any, list[tuple[Any, str]]]]:
    """The schedulers of a pipeline: (name, scheduler, who holds it under which name).

    Pipelines within it hold what it holds too, as in those that combine a prior and a decoder.
    """
    if isinstance(target, nn.Module):
        return []
    found: dict[int, tuple[str, Any, list[tuple[Any, str]]]] = {}
    for name, part in target.components.items():
        known = any(base.__name__ == "SchedulerMixin" for base in type(part).__mro__)
        if known or (name == "scheduler" and part is not None):
            found.setdefault(id(part), (name, part, []))
    within = [part for part in vars(target).values() if isinstance(getattr(part, "components", None), dict)]
    for holder in (target, *within):
        for name, part in holder.components.items():
            if id(part) in found:
                found[id(part)][2].append((holder, name))
    return list(found.values())


def _hold(holders: list[tuple[Any, str]], scheduler: Any) -> None:
    for holder, name in holders:
        setattr(holder, name, scheduler)


def _fused_schedulers() -> dict[type, Any]:
    """Our schedulers by stock's, or none if nothing has imported diffusers."""
    if "diffusers" not in sys.modules:
        return {}
    return {kind.stock: kind for kind in importlib.import_module(".diffusers", __package__).SCHEDULERS}


def _kinds() -> dict[Any, Any]:
    """The fused classes of modules by stock's. Their `misfit` says what `_misfit` does."""
    if "diffusers.models" not in sys.modules:
        return {}
    return {kind.__base__: kind for kind in importlib.import_module(".diffusers.layers", __package__).LAYERS}


def _projections(part: Any) -> list[list[nn.Module]]:
    """Lists of layers of a fused part that take one input; see together.py."""
    named = type(part) in _kinds().values() and hasattr(part, "projections")
    found: list[list[nn.Module]] = part.projections() if named else []
    return found


def _put_back(part: Any, stock: Any, fused: Any) -> None:
    """Give a module its stock class, also within a wrapper of its forward, which keeps the one that it found."""
    part.__class__ = stock
    vars(part).pop("__module__", None)
    for attribute in ("forward", "_old_forward"):
        if getattr(vars(part).get(attribute), "__func__", None) is fused.forward:
            setattr(part, attribute, MethodType(stock.forward, part))


def _become(kind: Any, scheduler: Any) -> Any:
    """A scheduler of another class, with the configuration and state of the given one."""
    new = kind.from_config(scheduler.config)
    # UniPC's last_sample and Heun's prev_derivative are computed when they are asked for.
    new.__dict__.update({k: getattr(scheduler, k) for k in scheduler.__dict__ if k not in OWN})
    return new
