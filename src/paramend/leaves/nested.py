"""Nested values, folded from the inside out without recursion: how deep files and users nest is no matter of the stack."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def folded(root: A, children: Callable[[A], Iterable[A]], close: Callable[[A, list[B]], B]) -> B:
    """What `close` makes of a value and of what it made of the values in it.

    Args:
        root: the outermost value.
        children: the values within a value, in order; none for one that holds no others.
        close: (a value, the results for its children) → its result.

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
