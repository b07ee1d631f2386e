"""A row of numbers: one step of a sampler, as `ops.update` applies it.

    x0hat = clip(x0_from_x x + x0_from_pred pred)
    x'    = from_x0 x0hat + from_x x + from_pred pred + noise z + from_hist hist

Rows are tensors (n, 9), built and read by the names of their columns. In the formulas of papers and kernels the columns
are the letters a, b, c, d, e, f, g, h, w, in this order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# exp(-200) is 0 in float32, and unlike -inf it may be multiplied by 0.
LOG_ZERO = -200.0


class Row(NamedTuple):
    """The columns of a row. With a learned variance `noise` and `noise_high` are the logarithms of the standard
    deviation at raw = -1 and raw = 1."""

    x0_from_x: Tensor
    x0_from_pred: Tensor
    from_x0: Tensor
    from_x: Tensor
    from_pred: Tensor
    noise: Tensor
    from_hist: Tensor
    noise_high: Tensor
    guidance: Tensor


WIDTH = len(Row._fields)


def columns(rows: Tensor) -> Row:
    """The columns of rows (..., 9), each (...): views, so that writing to one writes to the rows."""
    return Row(*rows.unbind(-1))


def make_rows(like: Tensor, dtype: torch.dtype | None = None, **values: Tensor | float) -> Tensor:
    """Rows (n, 9) on the device of like (n,) and of its type unless one is given, from columns by name; others are 0.

    TypeError for a name that is no column.
    """
    rows = torch.zeros(len(like), WIDTH, dtype=dtype or like.dtype, device=like.device)
    for name, value in values.items():
        if name not in Row._fields:
            raise TypeError(f"{name}: expected a column, one of {', '.join(Row._fields)}")
        rows[:, Row._fields.index(name)] = value
    return rows
