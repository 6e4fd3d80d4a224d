"""Nested values: how deep they may be, and walks that do not depend on how deep the caller is already."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from paramend.errors import ParamendError, Unsupported

# Containers within containers, in memory and in files. Walks that recurse take a few frames of the stack for each.
MAX_DEPTH = 200

A = TypeVar("A")
B = TypeVar("B")


def is_deep(data: object, levels: int = MAX_DEPTH) -> bool:
    """Whether the maps and lists of data are nested in more levels.

    >>> is_deep([[1]], 2), is_deep([[[]]], 2)
    (False, True)
    """
    here: list[Any] = [data]
    for _ in range(levels + 1):
        here = [node for node in here if isinstance(node, Mapping | list | tuple)]
        if not here:
            return False
        here = [child for node in here for child in (node.values() if isinstance(node, Mapping) else node)]
    return True


def folded(root: A, children: Callable[[A], Iterable[A]], close: Callable[[A, list[B]], B]) -> B:
    """What `close` makes of a value and of what it made of the values in it, its `children`.

    >>> folded([1, [2, 3]], lambda v: v if type(v) is list else (), lambda v, made: sum(made) if made else v)
    6
    """
    open_: list[tuple[A, Iterator[A], list[B]]] = [(root, iter(children(root)), [])]
    while True:
        value, rest, made = open_[-1]
        for child in rest:
            open_.append((child, iter(children(child)), []))
            break
        else:
            open_.pop()
            found = close(value, made)
            if not open_:
                return found
            open_[-1][2].append(found)


@contextmanager
def unexhausted(what: str, error: type[ParamendError] = Unsupported) -> Iterator[None]:
    """Raise an error of ours where the stack ends, because the caller is itself deep within calls."""
    try:
        yield
    except RecursionError:
        hint = "sys.setrecursionlimit(10_000), or call it from a function that is less deep"
        raise error(f"{what} is nested deeper than the calls that are left", hint=hint) from None
