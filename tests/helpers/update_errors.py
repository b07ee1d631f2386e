"""How far an update in float32 may be from the float64 oracle."""

import torch
from tolerance import ARITHMETIC
from torch import Tensor

from fastdiff import reference


def columns(rows: Tensor, step: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    return reference.coefficients(rows.double(), step, x.double())


def update_errors(
    x: Tensor, pred: Tensor, rows: Tensor, step: Tensor, z: Tensor | None, z_error: Tensor | float,
    uncond: Tensor | None, raw: Tensor | None, hist: Tensor | None, clip: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """How far float32 may be from x' and from x0hat; all arguments in float64."""
    a, b, c, d, e, f, g, h, w = columns(rows, step, x)
    size = pred.abs()
    if uncond is not None:
        pred, size = uncond + w * (pred - uncond), uncond.abs() + w.abs() * (pred.abs() + uncond.abs())
    x0 = a * x + b * pred
    x0_error = ARITHMETIC * ((a * x).abs() + b.abs() * size)
    if clip is not None:
        x0_error = torch.where((x0.abs() > clip + x0_error) | x0.isinf(), 0.0, x0_error)
        x0 = x0.clamp(-clip, clip)
    error = c.abs() * x0_error + ARITHMETIC * ((c * x0).abs() + (d * x).abs() + e.abs() * size)
    if z is not None:
        f_error = ARITHMETIC * f.abs()
        if raw is not None:
            r = (raw + 1) / 2
            relative = ARITHMETIC * (1 + f.abs() + r.abs() * (h.abs() + f.abs()))
            f = (f + r * (h - f)).exp()
            f_error = torch.where(f == 0, 0.0, f * relative)  # raw may be infinite
        error = error + f_error * z.abs() + f.abs() * z_error
    if hist is not None:
        error = error + ARITHMETIC * (g * hist).abs()
    return error, x0_error
