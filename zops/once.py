"""A property that is worked out once, for each object by itself.

Until Python 3.12 `functools.cached_property` holds one lock for all objects of a class while it works one out: a host
that does not answer would keep every other host waiting.
"""

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

Value = TypeVar("Value")


class once(Generic[Value]):  # noqa: N801 - used as a decorator, like property
    """Turn a method without arguments into a property that keeps its first value.

    Two threads that come to the same object at the same time may both work it out.
    """

    def __init__(self, work: Callable[[Any], Value]) -> None:
        self._work = work
        self.__doc__ = work.__doc__

    @overload
    def __get__(self, owner: None, kind: type) -> "once[Value]": ...
    @overload
    def __get__(self, owner: object, kind: type) -> Value: ...
    def __get__(self, owner: object | None, kind: type) -> "once[Value] | Value":
        """Work the value out; the next look finds it in the object itself."""
        if owner is None:
            return self
        value = owner.__dict__[self._work.__name__] = self._work(owner)
        return value
