"""Errors that files cause, as messages."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MOST = 400  # characters of a reason that another library gives


def reason(error: BaseException) -> str:
    """Why something failed, on one line."""
    return " ".join(str(error).split())[:MOST] or type(error).__name__


@contextmanager
def blaming(path: Path, what: str | None = None) -> Iterator[None]:
    """Turn whatever the content of a file makes Python raise into a ValueError that begins with the file's name.

    Args:
        path: the file.
        what: what it should have been; None leaves it to the error to say so.
    """
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:  # content that nobody expected is met by any exception
        raise ValueError(f"{path}{':' if what is None else f' is not {what}:'} {reason(error)}") from error
