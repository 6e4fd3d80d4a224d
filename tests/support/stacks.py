"""Calls for which a known part of the interpreter's stack is left.

They run in threads of their own: what earlier tests did to the stack of this one is no matter.
"""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def with_all_calls_left(call: Callable[[], T]) -> T:
    """The result of a call for which nearly all of the stack is left."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def with_few_calls_left(left: int, call: Callable[[], T]) -> T:
    """The result of a call for which only so many nested calls are left."""

    def run() -> T:
        depth, frame = 0, sys._getframe()
        while frame is not None:
            depth, frame = depth + 1, frame.f_back
        return _down(sys.getrecursionlimit() - depth - left, call)

    return with_all_calls_left(run)


def _down(levels: int, call: Callable[[], T]) -> T:
    return call() if levels <= 0 else _down(levels - 1, call)
