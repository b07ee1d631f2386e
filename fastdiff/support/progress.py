"""The progress bar of a walk."""

from collections.abc import Iterable

from ..files import install


def bar(n: int, progress: bool) -> Iterable[int]:
    """0..n-1, with a progress bar where asked for. ImportError, naming the extra, where tqdm is missing."""
    if not progress:
        return range(n)
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(f"progress: needs tqdm; {install('train')}") from error
    steps: Iterable[int] = tqdm(range(n), desc="sampling", unit="step")
    return steps
