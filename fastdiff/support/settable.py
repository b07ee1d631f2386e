"""Options of a constructor: those that may be set later, and those that stay."""

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


def fixed() -> Any:
    """An attribute that the constructor sets, once: what was made of it would not follow."""
    return _Fixed()


class _Fixed:
    def __set_name__(self, owner: type, name: str) -> None:
        # The value has another key: up to PyTorch 2.11 torch.compile takes instance.__dict__[name] for the descriptor.
        self.name, self.key = name, f"_{name}"

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        kept = instance.__dict__
        for key in (self.key, self.name):  # the second is that of objects that an earlier version pickled
            if key in kept:
                return kept[key]
        raise AttributeError(self.name)

    def __set__(self, instance: Any, value: Any) -> None:
        if self.key in instance.__dict__ or self.name in instance.__dict__:
            kind = type(instance).__name__
            raise AttributeError(f"{self.name}: expected to stay as it was made; make another {kind}")
        instance.__dict__[self.key] = value
