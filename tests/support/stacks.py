"""Calls from deep within others, where little of the interpreter's stack is left."""

import sys
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def with_few_calls_left(left: int, call: Callable[[], T]) -> T:
    """The result of a call for which only so many nested calls are left."""
    depth, frame = 0, sys._getframe()
    while frame is not None:
        depth, frame = depth + 1, frame.f_back
    return _down(sys.getrecursionlimit() - depth - left, call)


def _down(levels: int, call: Callable[[], T]) -> T:
    return call() if levels <= 0 else _down(levels - 1, call)
