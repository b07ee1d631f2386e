"""Operands of the operations on the CPU, wherever the kernels of the other tests run."""

import torch
from strategies import table, tensor
from torch import Tensor

ROWS = 6
CPU = torch.device("cpu")


def cpu(x: Tensor) -> Tensor:
    return x.to(CPU)


def rows(columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return cpu(table(ROWS, columns, columns)).to(dtype)


def data(*shape: int, dtype: torch.dtype = torch.float32, salt: int = 0, layout: str = "contiguous") -> Tensor:
    return cpu(tensor(shape, dtype, layout, salt))
