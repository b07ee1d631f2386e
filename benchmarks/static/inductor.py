"""The Triton kernels that torch.compile makes of the same operations for an H100, on a machine without one.

Inductor is told of a device that is not there, and stopped once it has written its kernels. Nothing is run. This needs
internals of PyTorch 2.13 and 2.14.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from . import machine_code

TARGET = "sm_90"
OPTIONS = {
    "fx_graph_cache": False,
    "compile_threads": 1,
    "use_static_cuda_launcher": False,  # keeps the compiled kernel's code
    "joint_graph_constant_folding": False,  # would run on the device
}


class _Stop(BaseException):
    """Raised instead of loading the code that Inductor wrote; Inductor wraps any Exception."""


def noising(x0: Tensor, t: Tensor, table: Tensor) -> Tensor:
    alpha, sigma = (column.view(-1, 1, 1, 1) for column in table[t].unbind(-1))
    return (alpha * x0 + sigma * torch.randn_like(x0)).to(x0.dtype)


def loss(pred: Tensor, noise: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted loss and its gradient; the noise has passed the network as a tensor."""

    def weighted(pred: Tensor) -> Tensor:
        return (w[t].view(-1, 1, 1, 1) * (pred.float() - noise.float()).square()).mean()

    grad, value = torch.func.grad_and_value(weighted)(pred)
    return value, grad


def update(x: Tensor, pred: Tensor, rows: Tensor, step: Tensor) -> Tensor:
    """One step of ancestral sampling."""
    a, b, c, d, f = rows[step].unbind(-1)
    x0 = (a * x.float() + b * pred).clamp(-1, 1)
    return (c * x0 + d * x + f * torch.randn_like(x)).to(x.dtype)


def operations(dtype: torch.dtype) -> Iterator[tuple[str, str, str, Callable[..., Any], tuple[Tensor, ...]]]:
    """(kernel and options as in the table of the library's own, noise, function, its arguments)."""
    x, t, step = torch.empty(64, 3, 128, 128, dtype=dtype), torch.zeros(64, dtype=torch.int64), torch.zeros(1).long()
    yield "noising", "plain", "generated", noising, (x, t, torch.empty(1001, 2))
    yield "loss", "grad", "given", loss, (x, x.clone(), torch.empty(1001), t)
    yield "update", "clip", "generated", update, (x, x.clone(), torch.empty(1000, 5), step)


def kernels(function: Callable[..., Any], *arguments: Tensor) -> list[tuple[Any, int]]:
    """The kernels that Inductor writes for function(*arguments), in the first configuration that it would try.

    Args:
        arguments: only their shapes, strides and types are used.

    Returns: (compiled kernel, elements that one program owns) of each.
    """
    from torch._inductor.codecache import PyCodeCache

    with _written(function, *arguments) as module:
        sources = re.findall(r"async_compile\.triton\('(\w+)', \'\'\'(.*?)\'\'\'", module, re.DOTALL)
        tuners = [getattr(PyCodeCache.load(source), name) for name, source in sources]
        compiled = [tuner._precompile_config(tuner.configs[0]).kernel for tuner in tuners]
    return [(kernel, machine_code.largest_tensor(kernel.asm["ttgir"])) for kernel in compiled]


def source(function: Callable[..., Any], *arguments: Tensor) -> str:
    """The module that Inductor writes for function(*arguments); of these only shapes, strides and types are used."""
    with _written(function, *arguments) as module:
        return module


@contextlib.contextmanager
def _written(function: Callable[..., Any], *arguments: Tensor) -> Iterator[str]:
    """The module of `source`; within the block it may be loaded, as if the H100 were there."""
    from torch._inductor.compile_fx import compile_fx
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(argument) for argument in arguments]
        on_gpu = [torch.empty_strided(f.shape, f.stride(), dtype=f.dtype, device="cuda") for f in fake]
        graph = make_fx(function)(*fake)
        for node in graph.graph.nodes:  # casts of gradients name the device that was traced
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": on_gpu[0].device}
        graph.recompile()
        with _h100() as written:
            with contextlib.suppress(_Stop):
                compile_fx(graph, on_gpu)
            yield written[0]


@contextlib.contextmanager
def _h100() -> Iterator[list[str]]:
    """Let Inductor believe in an H100; the list gets the module that it writes."""
    import torch._inductor.config
    import torch._inductor.inductor_prims
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._prims import TensorMeta
    from torch.utils._triton import has_triton

    written: list[str] = []

    def take(source: str) -> None:
        written.append(source)
        raise _Stop

    def one_seed(seeds: Tensor, index: int) -> Any:
        return TensorMeta(shape=(), strides=(), dtype=torch.int64, device=seeds.device)

    h100 = DeviceProperties(
        type="cuda", index=0, multi_processor_count=132, cc=90, major=9, regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32,
    )  # fmt: skip
    random_state = torch.zeros(16, dtype=torch.uint8)
    cuda = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_capability": (9, 0),
        "get_device_name": "NVIDIA H100", "get_device_properties": h100, "get_rng_state": random_state,
        "set_rng_state": None, "synchronize": None, "_lazy_init": None, "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, return_value=value))
        stack.enter_context(mock.patch.object(DeviceProperties, "create", return_value=h100))
        stack.enter_context(mock.patch.object(GraphLowering, "save_output_code", side_effect=take))
        # The patterns of attention, which it would trace on the device.
        stack.enter_context(mock.patch("torch._inductor.fx_passes.joint_graph.lazy_init"))
        lookup = torch.ops.prims.inductor_lookup_seed.default
        stack.enter_context(mock.patch.object(lookup, "prim_meta_impl", one_seed))
        stack.enter_context(mock.patch("torch._inductor.runtime.triton_helpers.set_driver_to_gpu"))
        stack.enter_context(torch._inductor.config.patch(OPTIONS))
        stack.enter_context(machine_code.compile_only(machine_code.target_of(TARGET)))
        has_triton.cache_clear()  # it remembers a machine without a GPU, and would remember this one
        stack.callback(has_triton.cache_clear)
        yield written
