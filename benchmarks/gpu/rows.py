"""A row is one thing to measure. A stage is a list of rows."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Figures = dict[str, Any]


class NotAvailable(Exception):
    """The row cannot be measured here. The message says what is missing."""


@dataclass(frozen=True)
class Setup:
    """The device, and whether the sizes are those of a rehearsal."""

    device: torch.device
    toy: bool

    def size(self, full: T, toy: T) -> T:
        return toy if self.toy else full


@dataclass(frozen=True)
class Row:
    """run() returns the figures of `method` on `case`, as JSON values. It is killed after `seconds`.

    turn: all rows of turn 1, of every stage, come before those of turn 2, and so on.
    """

    case: str
    method: str
    run: Callable[[], Figures]
    seconds: float
    turn: int = 1

    @property
    def name(self) -> str:
        return f"{self.case} / {self.method}"


@dataclass(frozen=True)
class Stage:
    """The rows of a module's `rows(setup)`, in order of their worth. In a turn the stage takes `seconds` at most."""

    name: str
    module: str
    seconds: float = float("inf")

    def rows(self, setup: Setup) -> Sequence[Row]:
        return importlib.import_module(self.module).rows(setup)


# In order of their worth.
STAGES = [
    Stage("smoke", "benchmarks.gpu.smoke", seconds=180),
    Stage("sampling", "benchmarks.gpu.sampling"),
    Stage("training", "benchmarks.gpu.training"),
    Stage("operations", "benchmarks.gpu.operations"),
    Stage("host", "benchmarks.gpu.host"),
    Stage("checks", "benchmarks.gpu.checks"),
]
