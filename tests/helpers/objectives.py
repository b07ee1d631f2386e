"""What a network is to predict under each objective, by the formulas of the papers."""

from typing import Any

import torch

SIGMA_DATA = 0.5
CLASSIC = ("eps", "x0", "v", "score")


def targets(alpha: Any, sigma: Any, x0: Any, eps: Any) -> dict[str, Any]:
    """By the name of the objective."""
    return {objective: target(objective, alpha, sigma, x0, eps) for objective in TARGETS}


def target(objective: str, alpha: Any, sigma: Any, x0: Any, eps: Any) -> Any:
    return TARGETS[objective](alpha, sigma, x0, eps)


def x0_errors(alpha: Any, sigma: Any) -> dict[str, Any]:
    """The error of x_0 for an error 1 of the prediction. That of eps is alpha / sigma times it, by x_t = alpha x_0 +
    sigma eps, and that of the score alpha / sigma^2 times."""
    one = 0 * sigma + 1
    return {
        "eps": sigma / alpha,
        "x0": one,
        "v": sigma / (alpha**2 + sigma**2),
        "score": sigma**2 / alpha,
        "flow": sigma / (alpha + sigma),
        "edm": SIGMA_DATA * sigma / (sigma**2 + SIGMA_DATA**2 * alpha**2) ** 0.5,
    }


def _edm(alpha: Any, sigma: Any, x0: Any, eps: Any) -> Any:
    """((1 - c_skip) x_0 - c_skip r eps) / c_out, with c_skip and c_out of Karras et al. 2022, table 1.

    With r = sigma / alpha = sigma_data tan(angle), so that both ends, 0 and infinity, are angles as any other.
    """
    alpha, sigma = (torch.as_tensor(value, dtype=torch.float64) for value in (alpha, sigma))
    angle = torch.atan2(sigma, SIGMA_DATA * alpha)
    target = angle.sin() / SIGMA_DATA * x0 - angle.cos() * eps
    return target.to(x0.dtype) if isinstance(x0, torch.Tensor) else target


TARGETS = {
    "eps": lambda alpha, sigma, x0, eps: eps,
    "x0": lambda alpha, sigma, x0, eps: x0,
    "v": lambda alpha, sigma, x0, eps: alpha * eps - sigma * x0,
    "score": lambda alpha, sigma, x0, eps: -eps / sigma,
    "flow": lambda alpha, sigma, x0, eps: eps - x0,
    "edm": _edm,
}
