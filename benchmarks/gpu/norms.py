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
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """The same in eager PyTorch."""
    h = F.group_norm(x if skip is None else torch.cat((x, skip), 1), groups, weight, bias, EPS)
    if scale is not None and shift is not None:
        h = h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return F.silu(h)


def fused(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    return ops.group_norm_silu(x, groups, weight, bias, EPS, scale, shift, skip=skip)


Norm = Callable[..., Tensor]


@dataclass
class Case:
    """The inputs of a norm.

    scaled: with a scale and shift for each sample and channel. halves: the last channels are a tensor of their own.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    device: torch.device
    groups: int = 32
    scaled: bool = False
    halves: bool = False

    def __post_init__(self) -> None:
        random = torch.Generator(self.device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, device=self.device).to(self.dtype)

        def lay(x: Tensor) -> Tensor:
            return x.contiguous(memory_format=LAYOUTS[self.layout])

        x, self.grad = (lay(draw(*self.shape)) for _ in range(2))
        batch, channels = self.shape[:2]
        self.given = {"x": x, "weight": 1 + 0.1 * draw(channels), "bias": 0.1 * draw(channels)}
        if self.scaled:
            self.given |= {name: 0.1 * draw(batch, channels) for name in ("scale", "shift")}
        if self.halves:  # as networks have them: in whole accesses, though groups may have channels of both
            parts = x.tensor_split([max(8, 2 * channels // 3 // 8 * 8)], 1)
            self.given |= dict(zip(("x", "skip"), map(lay, parts), strict=True))

    def forward(self, norm: Norm) -> Tensor:
        with torch.no_grad():
            return norm(groups=self.groups, **self.given)

    def with_gradients(self, norm: Norm) -> tuple[Tensor, ...]:
        return self._with_gradients(norm, self.given, self.grad)

    def _with_gradients(self, norm: Norm, given: dict[str, Tensor], grad: Tensor) -> tuple[Tensor, ...]:
        leaves = {name: v.detach().requires_grad_() for name, v in given.items()}
        y = norm(groups=self.groups, **leaves)
        return y.detach(), *torch.autograd.grad(y, [*leaves.values()], grad)

    def check(self, norm: Norm) -> None:
        """RuntimeError unless the norm and its gradients agree with float64, on the first samples."""
        n = len(few(self.grad))
        part = {name: v if name in ("weight", "bias") else v[:n] for name, v in self.given.items()}
        got = self._with_gradients(norm, part, self.grad[:n])
        want = self._with_gradients(stock, {name: v.double() for name, v in part.items()}, self.grad[:n].double())
        # The slope of SiLU adds a rounding, and the gradients by weight and bias are sums of them.
        agree(f"group norm {self.layout}", got, want, 4 * BOUND[self.dtype])

    def copy(self, tensors: int) -> Callable[[], object]:
        """A plain copy of the bytes of so many tensors like the result."""
        return copier(tensors * self.dtype.itemsize * self.grad.numel(), self.device)
