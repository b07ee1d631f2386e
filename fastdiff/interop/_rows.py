"""Rows of `ops.update` by the names of their columns, for the modules of other libraries."""

import torch
from torch import Tensor

from ..rows import WIDTH

A, B, C, D, E, F, _, H, _ = range(WIDTH)

COLUMNS = {"a": A, "b": B, "c": C, "d": D, "e": E, "f": F, "h": H}


def rows_of(like: Tensor, dtype: torch.dtype = torch.float32, **columns: Tensor | float) -> Tensor:
    """Rows (n, 9) of `ops.update` on the device of like (n,), from columns given by name."""
    rows = torch.zeros(len(like), 9, dtype=dtype, device=like.device)
    for name, value in columns.items():
        rows[:, COLUMNS[name]] = value
    return rows
