"""Group norm and SiLU in both layouts, forward and with gradients, as the stages smoke, operations and host use it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import copier
from benchmarks.workloads import BOUND, agree, few
from fastdiff import ops

EPS = 1e-5
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# Tensors that must be read or written at least: (x, y), and with gradients (x, y), (dy, x, dx).
FORWARD_TENSORS, GRADIENT_TENSORS = 2, 5


def stock(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """The same in eager PyTorch."""
    h = F.group_norm(x, groups, weight, bias, EPS)
    if scale is not None and shift is not None:
        h = h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return F.silu(h)


def fused(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    return ops.group_norm_silu(x, groups, weight, bias, EPS, scale, shift)


Norm = Callable[..., Tensor]


@dataclass
class Case:
    """The inputs of a norm. scaled: with a scale and shift for each sample and channel."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    device: torch.device
    groups: int = 32
    scaled: bool = False

    def __post_init__(self) -> None:
        random = torch.Generator(self.device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, device=self.device).to(self.dtype)

        self.x, self.grad = (draw(*self.shape).to(memory_format=LAYOUTS[self.layout]) for _ in range(2))
        batch, channels = self.shape[:2]
        self.weight, self.bias = 1 + 0.1 * draw(channels), 0.1 * draw(channels)
        self.rows = [0.1 * draw(batch, channels) for _ in range(2)] if self.scaled else []

    def forward(self, norm: Norm) -> Tensor:
        with torch.no_grad():
            return norm(self.x, self.groups, self.weight, self.bias, *self.rows)

    def with_gradients(self, norm: Norm) -> tuple[Tensor, ...]:
        return self._with_gradients(norm, [self.x, self.weight, self.bias, *self.rows], self.grad)

    def _with_gradients(self, norm: Norm, tensors: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
        x, *rest = leaves = [v.detach().requires_grad_() for v in tensors]
        y = norm(x, self.groups, *rest)
        return y.detach(), *torch.autograd.grad(y, leaves, grad)

    def check(self, norm: Norm) -> None:
        """RuntimeError unless the norm and its gradients agree with float64, on the first samples."""
        n = len(few(self.x))
        part = [self.x[:n], self.weight, self.bias, *(row[:n] for row in self.rows)]
        got = self._with_gradients(norm, part, self.grad[:n])
        want = self._with_gradients(stock, [v.double() for v in part], self.grad[:n].double())
        # The slope of SiLU adds a rounding, and the gradients by weight and bias are sums of them.
        agree(f"group norm {self.layout}", got, want, 4 * BOUND[self.dtype])

    def copy(self, tensors: int) -> Callable[[], object]:
        """A plain copy of the bytes of so many tensors like x."""
        return copier(tensors * self.dtype.itemsize * self.x.numel(), self.device)
