"""Options of a constructor that may be set later."""

from collections.abc import Callable
from typing import Any


def settable(name: str, convert: Callable[[Any], Any] | None = None) -> Any:
    """The option `name` as an attribute: everything follows when it is set again.

    The first assignment, in the constructor, only stores the value. A later one calls the object's `apply_options`,
    which checks all options together. If that raises, the old value is back and nothing has changed.
    convert: what makes the value that is stored.
    """
    key = f"_{name}"

    def read(self: Any) -> Any:
        return self.__dict__[key]

    def write(self: Any, value: Any) -> None:
        value = value if convert is None else convert(value)
        first, before = key not in self.__dict__, self.__dict__.get(key)
        self.__dict__[key] = value
        if first:
            return
        try:
            self.apply_options()
        except BaseException:
            self.__dict__[key] = before
            raise

    return property(read, write)
