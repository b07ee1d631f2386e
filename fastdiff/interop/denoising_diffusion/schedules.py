"""The noise schedules of denoising-diffusion-pytorch and the buffers made of them, in float64 and to the bit."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.checks import check_choice


def linear_beta_schedule(timesteps: int) -> Tensor:
    """beta from 0.1 / T to 20 / T (Ho et al. 2020, arXiv:2006.11239, where T = 1000)."""
    scale = 1000 / timesteps
    return torch.linspace(scale * 0.0001, scale * 0.02, timesteps, dtype=torch.float64)


def cosine_beta_schedule(timesteps: int, s: float = 0.008) -> Tensor:
    """alpha_bar_t = cos^2(pi/2 (t/T + s) / (1 + s)), normalised (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17)."""
    t = torch.linspace(0, timesteps, timesteps + 1, dtype=torch.float64) / timesteps
    return _betas(torch.cos((t + s) / (1 + s) * math.pi * 0.5) ** 2)


def sigmoid_beta_schedule(
    timesteps: int, start: float = -3, end: float = 3, tau: float = 1, clamp_min: float = 1e-5
) -> Tensor:
    """alpha_bar_t is a sigmoid from start to end (Jabri et al. 2022, arXiv:2212.11972).

    As in stock, clamp_min is unused.
    """
    t = torch.linspace(0, timesteps, timesteps + 1, dtype=torch.float64) / timesteps
    v_start, v_end = (torch.tensor(v / tau).sigmoid() for v in (start, end))
    return _betas((-((t * (end - start) + start) / tau).sigmoid() + v_end) / (v_end - v_start))


def _betas(alpha_bar: Tensor) -> Tensor:
    alpha_bar = alpha_bar / alpha_bar[0]
    return torch.clip(1 - (alpha_bar[1:] / alpha_bar[:-1]), 0, 0.999)


SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "linear": linear_beta_schedule,
    "cosine": cosine_beta_schedule,
    "sigmoid": sigmoid_beta_schedule,
}


def make_buffers(
    schedule: str, timesteps: int, options: dict[str, Any] | None, objective: str, min_snr_gamma: float | None
) -> dict[str, Tensor]:
    """The float32 buffers of stock by name, each (T,) on the CPU: the same operations in float64, cast last.

    Args:
        schedule, timesteps, options: a name of SCHEDULES, and the arguments of its function.
        min_snr_gamma: where the weights of the loss clip the signal-to-noise ratio (Hang et al. 2023,
            arXiv:2303.09556), or None.

    Raises: ValueError for an unknown name and for betas outside [0, 1).
    """
    check_choice("beta_schedule", schedule, SCHEDULES)
    with torch.device("cpu"):  # under torch.device("meta") there would be no values
        betas = SCHEDULES[schedule](timesteps, **(options or {}))
    if not bool(((betas >= 0) & (betas < 1)).all()):
        raise ValueError(f"beta_schedule, timesteps: expected betas in [0, 1), got {betas.min()} to {betas.max()}")
    alphas = 1.0 - betas
    alpha_bar = torch.cumprod(alphas, dim=0)
    alpha_bar_prev = F.pad(alpha_bar[:-1], (1, 0), value=1.0)
    posterior_variance = betas * (1.0 - alpha_bar_prev) / (1.0 - alpha_bar)
    snr = alpha_bar / (1 - alpha_bar)
    clipped_snr = snr if min_snr_gamma is None else snr.clamp(max=min_snr_gamma)
    weights = {"pred_noise": clipped_snr / snr, "pred_x0": clipped_snr, "pred_v": clipped_snr / (snr + 1)}
    buffers = {
        "betas": betas,
        "alphas_cumprod": alpha_bar,
        "alphas_cumprod_prev": alpha_bar_prev,
        "sqrt_alphas_cumprod": torch.sqrt(alpha_bar),
        "sqrt_one_minus_alphas_cumprod": torch.sqrt(1.0 - alpha_bar),
        "log_one_minus_alphas_cumprod": torch.log(1.0 - alpha_bar),
        "sqrt_recip_alphas_cumprod": torch.sqrt(1.0 / alpha_bar),
        "sqrt_recipm1_alphas_cumprod": torch.sqrt(1.0 / alpha_bar - 1),
        "posterior_variance": posterior_variance,
        "posterior_log_variance_clipped": torch.log(posterior_variance.clamp(min=1e-20)),
        "posterior_mean_coef1": betas * torch.sqrt(alpha_bar_prev) / (1.0 - alpha_bar),
        "posterior_mean_coef2": (1.0 - alpha_bar_prev) * torch.sqrt(alphas) / (1.0 - alpha_bar),
        "loss_weight": weights[objective],
    }
    return {name: value.to(torch.float32) for name, value in buffers.items()}


def fill_buffers(make: Callable[[], dict[str, Tensor]], module: nn.Module, *_: Any) -> None:
    """After a load, buffers that are still on the meta device are made where the weights are now."""
    device = next((p.device for p in module.parameters()), torch.device("meta"))
    if device.type != "meta":
        for name, value in make().items():
            if getattr(module, name).is_meta:
                setattr(module, name, value.to(device))
