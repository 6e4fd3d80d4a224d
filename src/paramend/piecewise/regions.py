"""Regions: where the elements of a slice are within its leaf, computed without the leaf."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from paramend.edits.call import sliced_shape
from paramend.leaves.specs import Array


@dataclass(frozen=True, slots=True)
class Axis:
    """The positions that a slice takes along one axis, in its order, and their distance in elements of the leaf."""

    positions: range | Array
    stride: int

    def at(self, places: Array) -> Array:
        if isinstance(self.positions, range):
            return (self.positions.start + self.positions.step * places) * self.stride
        found: Array = self.positions[places] * self.stride
        return found


@dataclass(frozen=True, slots=True)
class Region:
    """The elements of a slice, as contiguous runs of `run` elements in the leaf, in the order of the slice. `first` is
    added to all positions; the runs are numbered over the axes in C order. If the slice repeats elements of the leaf,
    `last` are the places in the slice whose values count."""

    shape: tuple[int, ...]
    run: int
    first: int
    axes: tuple[Axis, ...]
    last: Array | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def count(self) -> int:
        return math.prod(len(axis.positions) for axis in self.axes)

    def starts(self, begin: int, end: int) -> Array:
        """The offsets in the leaf of the runs numbered `begin` to `end`."""
        places = np.arange(begin, end)
        found = np.full(end - begin, self.first, np.int64)
        for axis in reversed(self.axes):
            places, here = np.divmod(places, len(axis.positions))
            found += axis.at(here)
        return found

    def start(self, number: int) -> int:
        """The offset of one run in the leaf; faster than `starts` for a single one."""
        found = self.first
        for axis in reversed(self.axes):
            number, here = divmod(number, len(axis.positions))
            found += int(axis.positions[here]) * axis.stride
        return found

    @property
    def ascends(self) -> bool:
        return all(_ascends(axis.positions) for axis in self.axes)

    @property
    def shuffled(self) -> bool:
        """Whether the runs are at positions of a list, in another order than in the leaf."""
        return any(not isinstance(axis.positions, range) and not _ascends(axis.positions) for axis in self.axes)

    def ascending(self) -> "Region":
        """The same elements in the order of the leaf."""
        axes = (Axis(_sorted(axis.positions), axis.stride) for axis in self.axes)
        return Region(self.shape, self.run, self.first, tuple(axes), self.last)

    def pieces(self, budget: int, slack: int) -> Iterator[tuple[int, Array, int]]:
        """The slice from first to last in pieces: (place in the slice, where runs begin in the leaf, their length). The
        budget is about how many elements of the leaf a piece may span; neighbouring short runs, with gaps of less than
        `slack` elements, count with the gaps between them."""
        if not self.size:
            return
        if self.run >= budget:
            for number in range(self.count):
                start = self.starts(number, number + 1)
                for at in range(0, self.run, budget):
                    yield number * self.run + at, start + at, min(budget, self.run - at)
            return
        apart = min((abs(_step(axis)) for axis in self.axes[-1:]), default=self.run)
        each = max(self.run, min(apart, self.run + slack))
        together = max(budget // each, 1)
        for number in range(0, self.count, together):
            yield number * self.run, self.starts(number, min(number + together, self.count)), self.run


def _ascends(positions: range | Array) -> bool:
    if isinstance(positions, range):
        return positions.step > 0
    return bool((positions[1:] > positions[:-1]).all())


def _sorted(positions: range | Array) -> range | Array:
    if isinstance(positions, range):
        return positions if positions.step > 0 else positions[::-1]
    return np.sort(positions)


def _step(axis: Axis) -> int:
    # The indices of an array may be anywhere.
    return axis.positions.step * axis.stride if isinstance(axis.positions, range) else 1 << 62


def region(shape: tuple[int, ...], index: Any) -> Region:
    """The elements that `x[index]` takes from an array of this shape, in its order."""
    if index is None:
        return Region(shape, math.prod(shape), 0, ())
    inner = sliced_shape(shape, index)
    parts = [_part(part) for part in (index if isinstance(index, tuple) else (index,))]
    used = sum(part is not None and part is not Ellipsis for part in parts)
    arrays = [part for part in parts if isinstance(part, np.ndarray)]
    plain = all(part.ndim == 1 for part in arrays) and not any(isinstance(part, bool) for part in parts)
    if not plain or len(arrays) > 1 or (arrays and any(isinstance(part, int) for part in parts)):
        return _scattered(shape, index, inner)
    where = next((n for n, part in enumerate(parts) if part is Ellipsis), len(parts))
    parts[where : where + 1] = [slice(None)] * (len(shape) - used)
    parts = [part for part in parts if part is not None]
    if (
        arrays
        and arrays[0].dtype != bool
        and len(np.unique(arrays[0] % max(_length(shape, parts), 1))) < arrays[0].size
    ):
        return _scattered(shape, index, inner)  # some element is repeated
    first, run, axes, stride = 0, 1, list[Axis](), 1
    for length, part in zip(reversed(shape), reversed(parts), strict=True):
        if isinstance(part, int):
            first += (part % length) * stride
        elif isinstance(part, slice):
            positions = range(*part.indices(length))
            if run == stride and not axes and positions.step == 1:  # contiguous so far, and still
                first += positions.start * stride
                run *= len(positions)
            else:
                axes.append(Axis(positions, stride))
        else:
            found = np.flatnonzero(part) if part.dtype == bool else part.astype(np.int64) % max(length, 1)
            axes.append(Axis(found, stride))
        stride *= length
    return Region(inner, run, first, tuple(reversed(axes)))


def _part(part: Any) -> Any:
    if part is None or part is Ellipsis or isinstance(part, slice | bool):
        return part
    if isinstance(part, int | np.integer):
        return int(part)
    array = np.asarray(part)
    if array.ndim == 0:
        return bool(array) if array.dtype == bool else int(array)
    return array.astype(np.int64) if array.size == 0 and array.dtype != bool else array


def _length(shape: tuple[int, ...], parts: list[Any]) -> int:
    return next(length for length, part in zip(shape, parts, strict=True) if isinstance(part, np.ndarray))


def _scattered(shape: tuple[int, ...], index: Any, inner: tuple[int, ...]) -> Region:
    """The region of any other index: numpy says where each element is."""
    found = np.arange(math.prod(shape)).reshape(shape)[index].reshape(-1)
    places, last = np.unique(found[::-1], return_index=True)
    axes = (Axis(found, 1),)
    # If an element is written twice, the last value stays.
    return Region(inner, 1, 0, axes, None if len(places) == len(found) else np.sort(len(found) - 1 - last))
