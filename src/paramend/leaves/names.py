"""Functions and classes in values that are pickled: by their names, as pickle does it."""

import pickle
import sys
from functools import cached_property, partial
from types import FrameType
from typing import Any, Self

from paramend.errors import Unsupported


def by_name(thing: Any, what: str, where: str = "", hint: str = "") -> Any:
    """The function or class, if another process finds it by its name, or the pickler sends its code; `Unsupported` for
    a lambda, or what was defined inside a function. What it is there for, `where`, goes before the reason.

    >>> by_name(len, "this selector")
    <built-in function len>
    """
    try:
        pickle.dumps(thing)
    except Exception as error:
        if not _sends_code(sys._getframe()):
            it = "it" if where else repr(thing)
            raise Unsupported(
                f"{what} cannot be pickled: {where}another process does not find {it} by its name",
                hint=f"define it with `def` or `class` at the top level of a module{hint}",
            ) from error
    return thing


class Alone:
    """A value whose copies are itself; a pickle may be another."""

    __slots__ = ()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self


class Unread:
    """What is found out of data when it is wanted: a copy, pickled or not, finds it out again, and takes no data along.
    That are properties that are kept, and what `_last` holds, of which the class has the first value."""

    def __getstate__(self) -> dict[str, Any]:
        kept = {n for kind in type(self).__mro__ for n, each in vars(kind).items() if isinstance(each, cached_property)}
        return {name: each for name, each in vars(self).items() if name not in kept and name != "_last"}


def _sends_code(frame: FrameType | None) -> bool:
    """Whether the pickler at work is cloudpickle, as Ray and joblib use it, which sends lambdas as code."""
    while frame is not None and not frame.f_globals.get("__name__", "").endswith("cloudpickle"):
        frame = frame.f_back
    return frame is not None


def bound(function: Any) -> tuple[Any, ...]:
    """What a function is compared by: partial ones compare by identity, which no copy shares."""
    return (function.func, function.args, function.keywords) if isinstance(function, partial) else (function,)


def called(function: Any) -> str:
    """A function as it is written."""
    if isinstance(function, partial):
        given = [*map(repr, function.args), *(f"{name}={value!r}" for name, value in function.keywords.items())]
        return f"functools.partial({', '.join([called(function.func), *given])})"
    return str(getattr(function, "__qualname__", repr(function)))
