"""A row of numbers: one step of a sampler, as `ops.update` applies it.

    x0hat = clip(x0_from_x x + x0_from_pred pred)
    x'    = from_x0 x0hat + from_x x + from_pred pred + noise z + from_hist hist

Rows are tensors (n, WIDTH), built and read by the names of their columns. In the formulas of papers and kernels the
columns are the letters a, b, c, d, e, f, g, h, w, in this order.

A sampler that remembers more than one tensor has hist (K, ...), K slots, and rows (n, WIDE) with the columns of
`History` too. A slot is read in every step, and the row says which one is overwritten. So a ring is a matter of
numbers, and nothing is moved:

    x' = ... + from_hist hist[0] + from_hist2 hist[1] + from_hist3 hist[2]
    hist[slot] = x0hat, x, or the mix kept_from_x0 x0hat + kept_from_x x
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


class History(NamedTuple):
    """The further columns of a row that writes one of several slots, or keeps a mix. A slot that is none of 0..K-1, as
    -1, keeps nothing; a single slot is always overwritten."""

    from_hist2: Tensor
    from_hist3: Tensor
    slot: Tensor
    kept_from_x0: Tensor
    kept_from_x: Tensor


WIDTH = len(Row._fields)
WIDE = WIDTH + len(History._fields)
MAX_SLOTS = 3
_NAMES = Row._fields + History._fields


def columns(rows: Tensor) -> Row:
    """The columns of rows (..., WIDTH or WIDE), each (...): views, so that writing to one writes to the rows."""
    return Row(*rows[..., :WIDTH].unbind(-1))


def history_columns(rows: Tensor) -> History:
    """The further columns of rows (..., WIDE), each (...); views too."""
    return History(*rows[..., WIDTH:].unbind(-1))


def make_rows(like: Tensor, dtype: torch.dtype | None = None, **values: Tensor | float) -> Tensor:
    """Rows on the device of like (n,) and of its type unless one is given, from columns by name; others are 0.

    Returns: (n, WIDE) if a column of History is given, else (n, WIDTH).
    Raises: TypeError for a name that is no column.
    """
    wide = any(name in History._fields for name in values)  # a method of sets would break a compiled graph
    # With the batch of vmap, if like has one.
    rows = like.new_zeros(like.shape[0], WIDE if wide else WIDTH, dtype=dtype)
    for name, value in values.items():
        if name not in _NAMES:
            raise TypeError(f"{name}: expected a column, one of {', '.join(_NAMES)}")
        rows[:, _NAMES.index(name)] = value
    return rows
