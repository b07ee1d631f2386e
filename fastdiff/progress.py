"""What every walk along a process needs: eval mode and a progress bar."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for a module and all in it; afterwards each is as it was."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def bar(n: int, progress: bool) -> Iterable[int]:
    """0..n-1, with a progress bar where asked for. ImportError, naming the extra, where tqdm is missing."""
    if not progress:
        return range(n)
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress: needs tqdm; pip install 'fastdiff-kernels[train]'") from error
    steps: Iterable[int] = tqdm(range(n), desc="sampling", unit="step")
    return steps
