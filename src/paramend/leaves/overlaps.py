"""Overlaps: arrays whose elements are, in whole or in part, the same memory."""

from collections.abc import Iterator, Mapping

import numpy as np

from paramend.leaves.specs import Array


def share(a: Array, b: Array) -> bool:
    """Whether two arrays share an element; assumed if that is too hard to decide. No element is read.

    >>> x = np.zeros(10)
    >>> share(x[:6], x[4:]), share(x[::2], x[1::2])
    (True, False)
    """
    try:
        return np.shares_memory(a, b, max_work=100_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def same(a: Array, b: Array) -> bool:
    """Whether two arrays are the same elements in the same order.

    >>> x = np.zeros((2, 2))
    >>> same(x, x[:]), same(x, x.T)
    (True, False)
    """
    return _start(a) == _start(b) and (a.shape, a.strides, a.itemsize) == (b.shape, b.strides, b.itemsize)


def repeats(a: Array) -> bool:
    """Whether some elements of an array may be one, as where an axis is expanded.

    >>> repeats(np.broadcast_to(np.zeros(1), (3,))), repeats(np.zeros((3, 2))[:, ::-1])
    (True, False)
    """
    reach = a.itemsize
    for step, length in sorted((abs(step), length) for step, length in zip(a.strides, a.shape, strict=True)):
        if length > 1:
            if step < reach:
                return True
            reach += step * (length - 1)
    return False


def overlapping(memories: Mapping[int, tuple[str, Array]]) -> Iterator[tuple[int, int]]:
    """The pairs of arrays that share an element; each is given by its number, with its device."""
    spans = []
    for number, (device, array) in memories.items():
        if array.size:
            steps = [step * (length - 1) for step, length in zip(array.strides, array.shape, strict=True)]
            start = _start(array) + sum(min(step, 0) for step in steps)
            spans.append((device, start, _start(array) + sum(max(step, 0) for step in steps) + array.itemsize, number))
    before: list[tuple[str, int, int, int]] = []
    for span in sorted(spans):
        device, start, _, number = span
        before = [other for other in before if other[0] == device and other[2] > start]
        for *_, other in before:
            if share(memories[other][1], memories[number][1]):
                yield other, number
        before.append(span)


def _start(a: Array) -> int:
    first: int = a.__array_interface__["data"][0]
    return first
