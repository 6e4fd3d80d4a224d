"""Boxes: which elements of an array, axis by axis, and the runs of elements that they are made of."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from paramend.leaves.specs import Array

# The places along one axis, in their order: a range, or an array of places.
Places: TypeAlias = range | Array
Box: TypeAlias = tuple[Places, ...]


def whole(shape: Sequence[int]) -> Box:
    """All of an array."""
    return tuple(map(range, shape))


def shape_of(box: Box) -> tuple[int, ...]:
    """The shape of what a box holds."""
    return tuple(map(len, box))


def chosen(places: Places, of: Places) -> Places:
    """The places that stand at some places of others.

    >>> chosen(range(2, 0, -1), range(10, 20, 3)), chosen(np.array([2, 0]), range(5, 9)).tolist()
    (range(16, 10, -3), [7, 5])
    """
    if isinstance(places, range):
        if isinstance(of, np.ndarray):
            return of[np.arange(places.start, places.stop, places.step)]
        first, step = of.start + places.start * of.step, places.step * of.step
        return range(first, first + len(places) * step, step)
    return places * of.step + of.start if isinstance(of, range) else of[places]


def ends(places: Places) -> tuple[int, int]:
    """The least of some places, and one after the greatest; (0, 0) if there are none.

    >>> ends(range(9, 0, -3)), ends(np.array([4, 2])), ends(range(0))
    ((3, 10), (2, 5), (0, 0))
    """
    if not len(places):
        return 0, 0
    if isinstance(places, range):
        first, last = sorted((places[0], places[-1]))
        return first, last + 1
    return int(places.min()), int(places.max()) + 1


def shifted(places: Places, low: int) -> Places:
    """Places relative to another one.

    >>> shifted(range(5, 9, 2), 4), shifted(np.array([6, 4]), 4).tolist()
    (range(1, 5, 2), [2, 0])
    """
    if isinstance(places, range):
        return range(places.start - low, places.start - low + len(places) * places.step, places.step)
    return places - low


def evenly(places: Places) -> Places:
    """The places as a range if they are at equal distances, so that they can be read as a slice.

    >>> evenly(np.array([3, 5, 7])), evenly(np.array([3, 5, 6])).tolist()
    (range(3, 9, 2), [3, 5, 6])
    """
    if isinstance(places, range):
        return places
    if len(places) < 2:
        return range(int(places[0]), int(places[0]) + 1) if len(places) else range(0)
    step = int(places[1] - places[0])
    if not step or (np.diff(places) != step).any():
        return places
    return range(int(places[0]), int(places[0]) + step * len(places), step)


def boxes_of(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The boxes that together hold a range of elements in C order, first to last; at most 2n - 1 for n axes.

    >>> list(boxes_of((3, 4), 2, 10))
    [(range(0, 1), range(2, 4)), (range(1, 2), range(0, 4)), (range(2, 3), range(0, 2))]
    """
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), stop // inner  # the rows that are whole
    if first > last:  # within one row
        yield from _within(last, shape[1:], start, stop, inner)
        return
    yield from _within(first - 1, shape[1:], start, first * inner, inner)
    if first < last:
        yield (range(first, last), *whole(shape[1:]))
    yield from _within(last, shape[1:], last * inner, stop, inner)


def _within(row: int, rest: Sequence[int], start: int, stop: int, inner: int) -> Iterator[Box]:
    for box in boxes_of(rest, start - row * inner, stop - row * inner):
        yield (range(row, row + 1), *box)


def contiguous(box: Box, shape: Sequence[int]) -> tuple[int, int] | None:
    """The range of elements in C order that a box is; None if there are gaps.

    >>> contiguous((range(1, 3), range(4)), (3, 4)), contiguous((range(1, 3), range(3)), (3, 4))
    ((4, 12), None)
    """
    start, inner, full = 0, 1, True
    for places, length in zip(reversed(box), reversed(shape), strict=True):
        if not isinstance(places, range) or (len(places) > 1 and (places.step != 1 or not full)):
            return None
        start += places.start * inner if places else 0
        full = full and len(places) == length  # further out there may be one place only
        inner *= length
    return start, start + math.prod(shape_of(box))


def bare(array: Array) -> Array:
    """The array as unsigned integers of its width: numpy moves them faster than dtypes that it does not know itself."""
    return array.view(f"u{array.itemsize}") if array.itemsize in (1, 2, 4, 8) and array.dtype.kind != "O" else array


def select(array: Array, box: Box) -> Array:
    """The elements of an array at some places, axis by axis; a view where all places are ranges."""
    found = array[tuple(_slice(places) if isinstance(places, range) else slice(None) for places in box)]
    for axis, places in enumerate(box):
        if isinstance(places, np.ndarray):
            found = np.take(found, places, axis)
    return found


def _slice(places: range) -> slice:
    if not places:
        return slice(0)
    return slice(places.start, places.stop if places.stop >= 0 else None, places.step)


class Runs(NamedTuple):
    """Runs of elements in C order, one row each: the first one, how many, where they stand among all asked for."""

    starts: Array
    lengths: Array
    at: Array

    def where(self, which: Array) -> "Runs":
        return Runs(self.starts[which], self.lengths[which], self.at[which])


def cut(runs: Runs, edges: Array, most: int) -> tuple[Array, Array, Runs] | None:
    """Runs cut at edges that repeat with a period, from 0 to its length; None if there would be more than `most`. The
    number of the interval that each new run is in, how far from its beginning it starts, and the new runs.

    >>> number, inside, new = cut(Runs(*map(np.array, ([1], [6], [0]))), np.array([0, 2, 5]), 9)
    >>> number.tolist(), inside.tolist(), new.starts.tolist(), new.lengths.tolist(), new.at.tolist()
    ([0, 1, 2], [1, 0, 0], [1, 2, 5], [1, 3, 2], [0, 1, 4])
    """
    period, count = edges[-1], len(edges) - 1

    def interval(places: Array) -> Array:
        found: Array = places // period * count + np.searchsorted(edges, places % period, "right") - 1
        return found

    first, last = interval(runs.starts), interval(runs.starts + runs.lengths - 1)
    counts = last - first + 1
    total = int(counts.sum())
    if total > most:
        return None
    number = np.arange(total) + np.repeat(first - (np.cumsum(counts) - counts), counts)
    begin = number // count * period + edges[number % count]
    end = number // count * period + edges[number % count + 1]
    starts = np.maximum(begin, np.repeat(runs.starts, counts))
    stops = np.minimum(end, np.repeat(runs.starts + runs.lengths, counts))
    found = Runs(starts, stops - starts, np.repeat(runs.at - runs.starts, counts) + starts)
    some = found.lengths > 0  # an interval may be empty
    return number[some], (starts - begin)[some], found.where(some)
