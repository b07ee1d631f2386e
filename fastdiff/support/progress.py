"""What every walk along a process needs: eval mode and a progress bar."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

_lock = threading.Lock()
_held: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # modules kept in eval mode, and by how many walks


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for a module and all in it; afterwards each is as it was.

    Walks in several threads count together: the first sets a module's mode, the last gives it back. A module in eval
    mode is left alone. The mode belongs to the module, not to the thread: a training forward of the same module in
    another thread runs in eval mode meanwhile. Train one module and sample another, such as its copy.

    `module.eval()` is not called, since an override may do more (LoRA merges its weights there).
    """
    with _lock:
        parts = [part for part in module.modules() if part.training or part in _held]
        for part in parts:
            _held[part] = _held.get(part, 0) + 1
            part.training = False
    try:
        yield
    finally:
        with _lock:
            for part in parts:
                _held[part] -= 1
                if not _held[part]:
                    del _held[part]
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
