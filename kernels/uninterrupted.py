"""Work that an interrupt (Ctrl-C) must not leave half done, such as an import or a compilation."""

import threading
from collections.abc import Callable
from typing import Any


def uninterrupted(function: Callable[[], Any]) -> Any:
    """The result of function(), which runs to its end.

    Python raises KeyboardInterrupt on the main thread alone. So the function runs on another one. The interrupt reaches
    the caller at once, and the function goes on.
    """
    if threading.current_thread() is not threading.main_thread():
        return function()
    result: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            result.append(function())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="fastdiff")
    try:
        thread.start()
    except RuntimeError:  # the interpreter ends, and starts no more threads
        return function()
    while thread.is_alive():
        thread.join(0.1)  # an interrupt just before an endless wait would be seen only after it
    if failed:
        raise failed[0]
    return result[0]
