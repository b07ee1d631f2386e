"""What counts the GPU kernels that PyTorch launches, and the bytes that they read and write, without a GPU.

The count is an estimate by rules, see `cost`: a kernel for each operator that is no view, two for a convolution with a
bias (cuDNN convolves, PyTorch adds), three for GroupNorm. Bytes are those of all operands, once each; caches hold some.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators that launch nothing: views, and memory that is not written.
VIEWS = {
    "view", "reshape", "transpose", "unsqueeze", "squeeze", "expand", "select", "slice", "split", "split_with_sizes",
    "chunk", "permute", "t", "detach", "alias", "_unsafe_view", "as_strided", "unbind", "lift_fresh", "empty",
    "empty_like", "new_empty", "empty_strided", "empty_permuted", "_reshape_alias", "unsafe_split", "device",
    "view_as_complex", "view_as_real", "new_empty_strided",
}  # fmt: skip


class Cost(NamedTuple):
    """GPU kernels, and bytes read and written."""

    kernels: int
    bytes: int


class Row(NamedTuple):
    """What a call of a network, or a step of training, costs. by_operator: kernels of each."""

    network: str
    batch: int
    kernels: int
    megabytes_per_image: float
    by_operator: dict[str, int]


GRADIENTS = {"convolution_backward", "native_group_norm_backward", "group_norm_silu_grad", "attention_backward"}
DENSE = {"convolution", "convolution_backward", "group_norm_silu", "group_norm_silu_grad"}  # need maps without gaps
# How many tensors and blocks a launch over lists takes, by the number of lists; a block has so many elements.
TENSORS_A_LAUNCH, BLOCKS_A_LAUNCH, BLOCK = (110, 64, 48, 36, 30), 320, 65536
# Operators that write into their first operand and do not read it.
OVERWRITE = {"copy_", "fill_", "zero_", "normal_", "random_"}


def size(*tensors: Tensor) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in tensors)


def launches(numbers: Sequence[int], lists: int) -> int:
    """Of PyTorch's kernels over lists of tensors with so many elements: each launch is filled in turn."""
    made, tensors, blocks = 0, 0, 0
    for number in numbers:
        tensors += 1
        for left in range(-(-number // BLOCK) - 1, -1, -1):
            blocks += 1
            if blocks == BLOCKS_A_LAUNCH or (tensors == TENSORS_A_LAUNCH[lists - 1] and not left):
                made, blocks, tensors = made + 1, 0, int(left > 0)
    return made + (blocks > 0)


def cost_of_lists(name: str, args: Sequence[Any], out: Any, scaled: bool) -> Cost:
    """Of a `_foreach_` operator, and of `_fused_adamw_` and `_fused_sgd_`; `scaled` if those divide the gradients."""
    lists = [given for given in args if isinstance(given, (list, tuple)) and given and isinstance(given[0], Tensor)]
    first, numbers = lists[0], [t.numel() for t in lists[0]]
    if numbers == [1] * len(first) and first[0].ndim == 0:
        return Cost(launches(numbers, 1), 0)  # the counts of steps
    moved = [size(*given) for given in lists]
    if name == "_foreach_norm":  # sums of blocks, then of tensors
        return Cost(launches(numbers, 1) + 1, moved[0])
    if name == "_fused_adamw_":  # weights, gradients, both moments; of the gradients only a scaled one is written
        return Cost(launches(numbers, 4), sum(moved[:4]) + moved[0] + sum(moved[2:4]) + scaled * moved[1])
    if name == "_fused_sgd_":
        return Cost(launches(numbers, 2), sum(moved[:2]) + moved[0])
    made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    read = 0 if name == "_foreach_copy_" else moved[0]
    return Cost(launches(numbers, len(lists) + bool(made)), read + sum(moved[1:]) + (size(*made) or moved[0]))


def copies(*maps: Tensor) -> Cost:
    """What a kernel that needs its maps without gaps makes of them first, such as of the halves of a concatenation."""
    last = torch.channels_last
    gaps = [x for x in maps if x.ndim == 4 and not (x.is_contiguous() or x.is_contiguous(memory_format=last))]
    return Cost(len(gaps), 2 * size(*gaps))


def cost_of_gradient(name: str, given: list[Tensor], made: list[Tensor]) -> Cost:
    """Of a backward operator whose first operands are the gradient and what the forward read.

    made: one of its results each; those that are not wanted are left out.
    """
    grad, x = given[:2]
    if name == "convolution_backward":  # a kernel by x, one by the weight, and a sum for the bias
        shapes = [t.shape for t in made]
        by_x, by_weight = x.shape in shapes, given[2].shape in shapes
        reads = by_x * size(grad, given[2]) + by_weight * size(grad, x) + (len(made) - by_x - by_weight) * size(grad)
        return Cost(len(made), reads + size(*made))
    if name == "native_group_norm_backward":  # sums by channel, factors, the gradient by x, those by weight and bias
        return Cost(4, 2 * size(grad, x) + size(x))
    if name == "group_norm_silu_grad":  # a group stays on the chip; then come the sums over samples
        maps = [t for t in given if t.ndim == x.ndim]
        return Cost(2, size(*maps) + size(*(t for t in made if t.ndim == x.ndim)))
    return Cost(3, 2 * size(*given) + size(*made))  # attention_backward: rows, both products, a last cast


def cost(name: str, given: list[Tensor], made: list[Tensor], has_bias: bool) -> Cost:
    """Of one operator with these operands and results."""
    read, written = size(*given), size(*made)
    if name in VIEWS or name.startswith("_record_function"):
        return Cost(0, 0)
    if name in GRADIENTS:
        return cost_of_gradient(name, given, made)
    if name == "convolution":  # the bias is added in a pass of its own
        return Cost(2, read + 3 * written) if has_bias else Cost(1, read + written)
    if name == "native_group_norm":  # moments read x; their merging is small; the last pass reads and writes it
        x = size(given[0])
        return Cost(3, 2 * x + x)
    if name == "group_norm_silu":  # a group stays on the chip
        return Cost(1, read + size(made[0]))
    if name in OVERWRITE:
        return Cost(1, read - size(given[0]) + written)
    return Cost(1, read + written)


class Meter(TorchDispatchMode):
    """Adds up the cost of the operators that run inside, by name.

    A backward pass is counted on the CPU alone: for other devices autograd has threads of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.bytes_by: Counter[str] = Counter()

    @property
    def bytes(self) -> int:
        return sum(self.bytes_by.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        read = args, {key: value for key, value in kwargs.items() if key != "out"}  # that is only written
        given, made = ([leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in (read, out))
        if name.startswith(("_foreach_", "_fused_")):
            one = cost_of_lists(name, args, out, kwargs.get("grad_scale") is not None)
        else:
            one = cost(name, given, made, name == "convolution" and args[2] is not None)
        self._add(name, one)
        if name in DENSE:
            self._add("copies", copies(*given))
        return out

    def _add(self, name: str, one: Cost) -> None:
        if one.kernels:
            self.kernels[name] += one.kernels
            self.bytes_by[name] += one.bytes


@contextmanager
def as_on_a_gpu(norm: str = "triton") -> Iterator[None]:
    """Attention and RMSNorm are one kernel, and autocast gives GroupNorm float32, as on CUDA. norm: fastdiff's is
    its kernel ("triton"), or PyTorch's operations ("reference")."""
    group_norm = F.group_norm

    def cast_group_norm(x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            x, weight, bias = (t if t is None else t.float() for t in (x, weight, bias))
        return group_norm(x, groups, weight, bias, eps)

    library, kind = torch.library.Library("fastdiff_cost", "FRAGMENT"), "CompositeExplicitAutograd"
    if not hasattr(torch.ops.fastdiff_cost, "attention"):
        library.define("attention(Tensor q, Tensor k, Tensor v) -> Tensor")
        library.impl("attention", lambda q, k, v: torch.empty_like(q), kind)
        library.define("attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out) -> Tensor[]")
        library.impl("attention_backward", lambda _, *qkv: [torch.empty_like(t) for t in qkv[:3]], kind)
        torch.library.register_autograd(
            "fastdiff_cost::attention",
            lambda ctx, grad: tuple(torch.ops.fastdiff_cost.attention_backward(grad, *ctx.saved_tensors)),
            setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output),
            lib=library,
        )
        library.define("rms_norm(Tensor x, Tensor? weight) -> Tensor")
        library.impl("rms_norm", lambda x, weight: torch.empty_like(x), kind)

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.ops.fastdiff_cost.attention(query, key, value)

    def rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        return torch.ops.fastdiff_cost.rms_norm(x, weight)

    with (
        mock.patch.object(F, "scaled_dot_product_attention", attention),
        mock.patch.object(F, "rms_norm", rms_norm),
        mock.patch.object(F, "group_norm", cast_group_norm),
        mock.patch("fastdiff.ops.group_norm.backend_of", return_value=norm),
        mock.patch("fastdiff.ops.checks.backend_of", return_value="triton"),
        mock.patch("torch.nn.utils.clip_grad._has_foreach_support", return_value=True),
    ):
        yield


def row(name: str, batch: int, counter: Meter) -> Row:
    """What a call with so many images cost."""
    total = sum(counter.kernels.values())
    return Row(name, batch, total, counter.bytes / 1e6 / batch, dict(counter.kernels.most_common()))
