"""Weights of multistep rules: which share each remembered prediction has in a step, and in which slot it lies."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_NAMES = ("from_hist", "from_hist2", "from_hist3")


def phi(k: int, z: float) -> float:
    """phi_k(z) = sum of z^j / (j + k)!, the functions of exponential integrators; phi_1 = (e^z - 1) / z."""
    if abs(z) < 1:
        return sum(z**j / math.factorial(j + k) for j in range(20))
    value = math.exp(z)
    for i in range(k):
        value = (value - 1 / math.factorial(i)) / z
    return value


def exponential_moments(count: int, h: float, rate: float = -1.0) -> list[float]:
    """The integrals of e^(rate (h - u)) (u / h)^j over u from 0 to h for j < count: j! h phi_(j+1)(rate h)."""
    return [math.factorial(j) * h * phi(j + 1, rate * h) for j in range(count)]


def weights_of(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """The weights w with sum_a w_a nodes_a^j = moments_j: of an integral of the polynomial through the nodes."""
    found = []
    for a, node in enumerate(nodes):
        basis = [1.0]  # of the Lagrange polynomial of this node, the coefficients, the lowest power first
        for b, other in enumerate(nodes):
            if b != a:
                pairs = zip([0.0, *basis], [*basis, 0.0], strict=True)
                basis = [(low - other * high) / (node - other) for low, high in pairs]
        found.append(sum(c * moment for c, moment in zip(basis, moments, strict=True)))
    return found


def ring(by_age: Tensor, kept: Tensor | None = None) -> dict[str, Any]:
    """The columns of hist for a ring of slots, in which the newest tensor takes the place of the oldest.

    Args:
        by_age: (n, K), the share in each step of what was kept last, second to last, and so on.
        kept: (n,) bool, whether a step keeps anything; all do if None.

    Returns: from_hist and, with several slots, from_hist2, from_hist3 and slot.
    """
    n, slots = by_age.shape
    kept = torch.ones(n, dtype=torch.bool, device=by_age.device) if kept is None else kept
    before = kept.cumsum(0) - kept.long()  # how many were kept before each step
    age = (before[:, None] - torch.arange(slots, device=by_age.device) - 1) % slots  # of what each slot holds, from 0
    found: dict[str, Any] = dict(zip(_NAMES, by_age.gather(1, age).unbind(1), strict=False))
    if slots > 1:
        found["slot"] = torch.where(kept, before % slots, -1)
    return found
